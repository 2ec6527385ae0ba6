"""One entry by its code, or the best ones for some words.

Search ranks over all fields, and is indifferent to case, plural, -ise or -ize, and small slips.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache

from moectl.catalogue.entry import Entry
from moectl.catalogue.loading import entries
from moectl.errors import ConfigError

#: What a word counts for, by the field that holds it.
_WEIGHTS = {
    "code": 12.0,
    "title": 8.0,
    "symptom": 4.0,
    "component": 3.0,
    "cause": 2.0,
    "severity": 2.0,
    "fix": 1.5,
    "avoid": 1.0,
    "check": 1.0,
    "source": 1.0,
}
_WORD = re.compile(r"[a-z0-9]+")
_COMMON = frozenset(
    "a an and are as at be but by do does for from has have i in is it its me my of on or so that the then this to"
    " was what when why with".split()
)
_PREFIX, _SLIP = 0.6, 0.4  # what the beginning of a word counts for, and a misspelt one
_LEAST = 0.3  # results with a smaller share of the best one's score are left out
# Bounded: Python refuses to make a number of thousands of digits.
_CODE = re.compile(r"(?P<letters>[a-z]*)[\s_-]*(?P<number>[0-9]{1,9})", re.IGNORECASE)


def entry(code: str, among: Sequence[Entry] = ()) -> Entry:
    """The entry of a code: ``MOE007``, ``moe7``, ``moe-007`` and ``7`` are the same one.

    Args:
        code: as the user wrote it.
        among: a project's own entries, found by their own codes (``OWN001``, ``own1``).

    Raises:
        ConfigError: no such entry; the nearest is named.
    """
    known = {each.code: each for each in (*entries(), *among)}
    match = _CODE.fullmatch(code.strip())
    wanted = f"{match['letters'].upper() or 'MOE'}{int(match['number']):03d}" if match else code.strip().upper()
    if wanted in known:
        return known[wanted]
    shown = code if len(code) <= 60 else f"{code[:59]}…"
    raise ConfigError(f"there is no catalogue entry '{shown}'", _nearest(code, wanted, known))


def search(words: str, among: Sequence[Entry] | None = None) -> list[Entry]:
    """Entries that speak of ``words``, best first; none where nothing fits.

    An entry must hold at least half of the words. Those that hold more of them come first, then those that
    hold them in a heavier field or hold rarer ones.

    Args:
        words: any text.
        among: entries to look in; None for the catalogue.
    """
    among = entries() if among is None else among
    terms = list(dict.fromkeys(_stems(words)))
    indexes = [_index(each) for each in among]
    rarity = _rarity(indexes)
    forms = [_forms(term, rarity) for term in terms]
    ranked = []
    for place, index in enumerate(indexes):
        values = [_value(index, form, rarity) for form in forms]
        hits = sum(value > 0 for value in values)
        if hits and 2 * hits >= len(terms):
            ranked.append((hits, sum(values), -place))
    ranked.sort(reverse=True)
    best = max((score for _, score, _ in ranked), default=0.0)
    return [among[-place] for _, score, place in ranked if score >= _LEAST * best]


def _nearest(code: str, wanted: str, known: dict[str, Entry]) -> str:
    """What to try: the nearest code, or for words instead of a code the entry that speaks of them."""
    spoken = [] if any(character.isdigit() for character in code) else search(code, list(known.values()))
    close = get_close_matches(wanted[:80], known, n=1, cutoff=0.5)
    near = spoken[0] if spoken else known[close[0]] if close else None
    first, last = entries()[0].code, entries()[-1].code
    listing = f"Codes go from {first} to {last}: moectl explain --list, or moectl explain --search WORDS."
    return f"The nearest is {near.code} ({near.title}). {listing}" if near else listing


def _value(index: dict[str, float], form: dict[str, float], rarity: dict[str, float]) -> float:
    """What one term is worth in one entry; 0 where it does not occur."""
    return max((share * index[word] * rarity[word] for word, share in form.items() if word in index), default=0.0)


def _forms(term: str, known: Iterable[str]) -> dict[str, float]:
    """The known words that ``term`` may stand for, each with what it then counts for."""
    known = set(known)
    forms = {word: _PREFIX for word in known if len(term) >= 4 and word.startswith(term)}
    if term in known:
        forms[term] = 1.0
    if not forms and len(term) >= 4:
        forms = dict.fromkeys(get_close_matches(term, sorted(known), n=2, cutoff=0.8), _SLIP)
    return forms


def _rarity(indexes: list[dict[str, float]]) -> dict[str, float]:
    counts = Counter(word for index in indexes for word in index)
    return {word: math.log(1 + len(indexes) / count) for word, count in counts.items()}


@cache
def _index(each: Entry) -> dict[str, float]:
    """Word -> the sum of the weights of the fields that hold it."""
    index: dict[str, float] = {}
    for field, weight in _WEIGHTS.items():
        for word in set(_stems(getattr(each, field))):
            index[word] = index.get(word, 0.0) + weight
    return index


def _stems(text: str) -> list[str]:
    return [_stem(word) for word in _WORD.findall(text.lower()) if word not in _COMMON]


def _stem(word: str) -> str:
    """The word without plural and in its -ise form; nothing cleverer."""
    if len(word) > 4 and word.endswith("ies"):
        word = f"{word[:-3]}y"
    elif len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        word = word[:-2]
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return re.sub(r"iz(?=e|ing|ation)", "is", word)
