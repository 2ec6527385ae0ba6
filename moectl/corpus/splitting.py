"""Which texts are held out: whole groups, before packing, with no text on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from moectl.corpus.texts import DomainTexts, Text, text_hash
from moectl.errors import MoectlError

MIN_GROUPS = 10
Split = Literal["train", "eval"]


class Placed(NamedTuple):
    """A text and the split that it went to."""

    text: Text
    split: Split


class SplitDomain(NamedTuple):
    """The texts of one domain in their order, and how many duplicates moved to train."""

    name: str
    placed: list[Placed]
    duplicates_moved: int


def num_eval_groups(num_groups: int) -> int:
    """``min(max(10, 5 %), 10 %)`` of the groups, rounded down, at least 1; needs 10 groups or more."""
    if num_groups < MIN_GROUPS:
        raise ValueError(f"{num_groups} groups cannot be split; {MIN_GROUPS} are needed")
    return max(1, int(min(max(10, num_groups / 20), num_groups / 10)))


def eval_groups(domain: str, groups: Iterable[str], seed: int) -> frozenset[str]:
    """The held-out groups of a domain, drawn by keyed hash.

    The order of the texts does not matter, nor do other domains, nor the machine.
    """
    keyed = sorted(set(groups), key=lambda group: _key(seed, domain, group))
    return frozenset(keyed[: num_eval_groups(len(keyed))])


def split(domains: Sequence[DomainTexts], seed: int) -> list[SplitDomain]:
    """Split every domain by group, then move held-out texts that training also holds to train.

    Equal means equal up to Unicode form, case and white space, in any domain. A moved text leaves
    its group for one of its own (``duplicate:...``), so that no group has texts on both sides.

    Raises:
        MoectlError: under 10 groups, or nothing left to hold out (exit 1).
    """
    held_out = {domain.name: _held_out(domain, seed) for domain in domains}
    hashes = {domain.name: [text_hash(text.text) for text in domain.texts] for domain in domains}
    trained = {
        digest
        for domain in domains
        for text, digest in zip(domain.texts, hashes[domain.name], strict=True)
        if text.group not in held_out[domain.name]
    }
    result = []
    for domain in domains:
        placed: list[Placed] = []
        moved = 0
        for text, digest in zip(domain.texts, hashes[domain.name], strict=True):
            if text.group not in held_out[domain.name]:
                placed.append(Placed(text, "train"))
            elif digest in trained:
                placed.append(Placed(text._replace(group=f"duplicate:{digest[:16]}"), "train"))
                moved += 1
            else:
                placed.append(Placed(text, "eval"))
        if all(item.split == "train" for item in placed):
            raise MoectlError(
                f"domain '{domain.name}': every held-out text also stands in the training text, "
                "nothing is left to evaluate on",
                "Remove duplicates from the source, or add texts.",
            )
        result.append(SplitDomain(domain.name, placed, moved))
    return result


def _held_out(domain: DomainTexts, seed: int) -> frozenset[str]:
    groups = {text.group for text in domain.texts}
    if len(groups) < MIN_GROUPS:
        raise MoectlError(
            f"domain '{domain.name}' has {_count(len(groups), 'group')} "
            f"({_count(len(domain.texts), 'text')}), too few to hold some out: at least {MIN_GROUPS} are needed",
            "Add texts, or give them finer groups (field 'group'; without it each text is its own group).",
        )
    return eval_groups(domain.name, groups, seed)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _key(seed: int, domain: str, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{domain}\0{group}".encode()).digest()
