"""All that knows transformers."""

from moectl.hf.upcycle import upcycle

__all__ = ["upcycle"]
