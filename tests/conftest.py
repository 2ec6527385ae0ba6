"""What holds for every test: one thread, and property tests that find the same thing on every machine."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch is first imported. One thread: tests share their cores, and sums then round alike everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest --hypothesis-profile=explore` looks for new examples, for as long as you have patience.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("fixed")
