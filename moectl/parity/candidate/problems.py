"""What is wrong with somebody's module apart from its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Problem(NamedTuple):
    """One thing found.

    Attributes:
        code: of the catalogue, or None where it has no entry.
        title: what it is, in a few words.
        evidence: what was seen, and where.
        hint: what to do.
        fails: whether the comparison fails by it; otherwise it is only told.
    """

    code: str | None
    title: str
    evidence: str
    hint: str
    fails: bool = True


def unreachable_parts(module: nn.Module) -> Iterator[Problem]:
    """Modules and parameters in plain lists and dicts: torch does not know them, so that no weights reach them."""
    known = {id(each) for each in (*module.modules(), *module.parameters())}
    for where, name, value in _attributes(module):
        hidden = _hidden_in(value, known)
        if hidden is not None:
            container, kind, count = hidden
            yield Problem(
                None,
                f"{where} is a plain {container}: torch does not know of what is in it",
                f"{count} {kind} in self.{name}; they are in neither parameters() nor state_dict()",
                f"Make it an nn.{'ParameterList' if kind == 'Parameters' else 'ModuleList'}"
                f"{' or nn.ModuleDict' if container == 'dict' else ''}.",
            )


def plain_tensors(module: nn.Module) -> Iterator[Problem]:
    """Tensors that are neither parameters nor buffers stay where they were made. Told; no failure by itself."""
    for where, name, value in _attributes(module):
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            yield Problem(
                "MOE013",
                f"{where} is a plain tensor, not a buffer",
                f"{list(value.shape)} {dtype} on {value.device}: it stays there when the module is moved or cast",
                f'Register it: self.register_buffer("{name}", …, persistent=False).',
                fails=False,
            )


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """(path, name, value) of what people set on modules themselves."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if not name.startswith("_"):
                yield f"{path}.{name}" if path else name, name, value


def _hidden_in(value: object, known: set[int]) -> tuple[str, str, int] | None:
    """(container, what, how many) of modules or parameters in a plain container, and nowhere else."""
    if not isinstance(value, (list, tuple, dict)):
        return None
    items = list(value.values()) if isinstance(value, dict) else list(value)
    flat = [inner for item in items for inner in (item if isinstance(item, (list, tuple)) else [item])]
    for kind, name in ((nn.Module, "modules"), (nn.Parameter, "Parameters")):
        count = sum(isinstance(each, kind) and id(each) not in known for each in flat)
        if count:
            return type(value).__name__, name, count
    return None
