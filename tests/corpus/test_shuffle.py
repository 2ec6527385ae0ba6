from __future__ import annotations

import numpy as np
import pytest

from moectl.corpus.shuffle import permutation


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_holds_every_number_once(size: int) -> None:
    assert sorted(permutation(size, 3, 1).tolist()) == list(range(size))


def test_depends_on_all_entropy_and_nothing_else() -> None:
    assert np.array_equal(permutation(50, 1, 2), permutation(50, 1, 2))
    assert not np.array_equal(permutation(50, 1, 2), permutation(50, 1, 3))
    assert not np.array_equal(permutation(50, 1, 2), permutation(50, 2, 2))


def test_the_order_is_pinned_across_machines() -> None:
    """These values must never change: prepared data and data order rest on them."""
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
