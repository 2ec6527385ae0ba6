"""The catalogue of mistakes that are made with Mixture-of-Experts models: how to know them, and how to mend them.

>>> from moectl.catalogue import entry
>>> entry("16").title
'`norm_topk_prob` ignored'

The text of an entry is a Markdown file in ``entries/``. Standard library only: a check that names a
code costs no import to speak of.
"""

from moectl.catalogue.document import markdown
from moectl.catalogue.entry import COMPONENTS, SEVERITIES, Entry
from moectl.catalogue.loading import entries
from moectl.catalogue.searching import entry, search

__all__ = ["COMPONENTS", "SEVERITIES", "Entry", "entries", "entry", "markdown", "search"]
