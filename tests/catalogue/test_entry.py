"""How an entry is written: what is read from a file, and what is refused with the reason."""

from __future__ import annotations

import pytest

from moectl.catalogue.entry import EntryError, parse

GOOD = """# MOE900: A title with `code`

- severity: slow
- component: router

## Symptom

It is slow.

Very.

## Cause

A loop:

```python
## not a section
# nor this
```

## Fix

Mend it.

## Check

By reading.

## Avoid

Do not.

## Source

Somewhere.
"""


def test_fields_are_read() -> None:
    one = parse(GOOD, "MOE900.md")
    assert (one.code, one.title, one.severity, one.component) == ("MOE900", "A title with `code`", "slow", "router")
    assert one.symptom == "It is slow.\n\nVery."
    assert one.cause == "A loop:\n\n```python\n## not a section\n# nor this\n```"
    assert (one.fix, one.check, one.avoid, one.source) == ("Mend it.", "By reading.", "Do not.", "Somewhere.")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("# MOE900: A", "# 900 A", "first line"),
        (GOOD, "", "first line"),
        ("severity: slow", "severity: sluggish", "'- severity: …' must be one of wrong results"),
        ("- severity: slow\n", "", "not None"),
        ("component: router", "component: roter", "'- component: …' must be one of attention"),
        ("## Avoid\n\nDo not.\n\n", "", "its sections must be"),
        ("## Cause", "## Why", "its sections must be"),
        ("Do not.", "", "it says nothing under avoid"),
        (
            "## Fix\n\nMend it.\n\n## Check\n\nBy reading.",
            "## Check\n\nBy reading.\n\n## Fix\n\nMend it.",
            "not symptom",
        ),
    ],
)
def test_what_is_no_entry_is_refused_with_the_reason(old: str, new: str, says: str) -> None:
    with pytest.raises(EntryError) as error:
        parse(GOOD.replace(old, new), "MOE900.md")
    assert "MOE900.md" in error.value.message
    assert says in error.value.message
