"""moectl: a command-line lab bench for Mixture-of-Experts language models.

Importing the package is free: nothing heavy is loaded until a name is used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from moectl.walk.loading import load

        return load
    raise AttributeError(f"module 'moectl' has no attribute {name!r}")
