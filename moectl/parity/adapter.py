"""What an adapter can say about somebody's module where guessing is not enough.

An adapter is one file with a class ``Adapter``, a subclass of the one here. Every method has the guess as its default
(``super()`` gives it), so that an adapter only says what the guess got wrong. ``new_adapter`` writes a commented
template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moectl.errors import ConfigError, NotFoundError
from moectl.parity.candidate.calls import Plan, arguments
from moectl.parity.candidate.construct import Construction, construct
from moectl.parity.candidate.expressions import Source
from moectl.parity.candidate.loading import load_file
from moectl.parity.candidate.settings import Settings, setting_of, settings_of
from moectl.parity.candidate.sizes import sizes_of
from moectl.parity.candidate.user_code import AdapterError, Failure, attempt
from moectl.parity.case import Inputs, Level, Reroute, Unsupported
from moectl.parity.formula import Formula

TEMPLATE = Path(__file__).resolve().parents[1] / "_templates" / "adapter.py.tmpl"
#: What a tape entry is read from: a submodule's path (its output), ``path:input``, or a function of the module's
#: result; None takes a guessed one away.
Reader = str | Callable[[Any], Tensor] | None


class _Guesses(Protocol):
    """What the default methods ask."""

    plan: Plan

    def guessed_sources(self, module: nn.Module) -> Mapping[str, Source]: ...


class Adapter:
    """Between moectl and one module.

    Attributes:
        family, level: of the comparison.
        config: the family's config of this case, in the form of config.json.
        sizes: by letter: D hidden, F expert intermediate, E experts, K experts per token, H heads, G key/value heads,
            P head dimension, V vocabulary, L layers.
        dtype: of weights and activations.
    """

    family: str
    level: Level
    config: dict[str, Any]
    sizes: dict[str, int]
    dtype: torch.dtype
    formula: Formula
    _guesses: _Guesses
    shown = ""
    asked: frozenset[str] = frozenset()

    def build(self, cls: Callable[..., Any]) -> nn.Module:
        """The module; its weights are replaced afterwards."""
        settings = self.settings()
        construction: Construction = construct(cls, settings)
        self.shown, self.asked = construction.shown, frozenset(map(setting_of, settings.used))
        return construction.module

    def weights(self, module: nn.Module) -> Mapping[str, Source]:
        """Each parameter's source: an expression over canonical names, or a function of the canonical weights.

        Parameters that are left out keep their initial values and are reported as extra.
        """
        return self._guesses.guessed_sources(module)

    def call(self, module: nn.Module, inputs: Inputs) -> Any:
        """Run it once: logits ``[B, S, V]``, hidden ``[B, S, D]``, or what a router returns; tuples are searched."""
        return module(**arguments(self._guesses.plan, inputs, self.dtype))

    def tensors(self, module: nn.Module) -> Mapping[str, Reader]:
        """Tape name -> where it is read, over and above what is guessed."""
        return {}

    @contextmanager
    def reroute(self, module: nn.Module, choose: Reroute) -> Iterator[None]:
        """While it lasts, ``module`` uses ``choose(layer, logits [T, E]) -> (weights [T, K], indices [T, K])``.

        The default replaces what ``torch.topk`` returns, which moectl does by itself; override it where the choice is
        made in another way.
        """
        yield

    def call_cached(self, module: nn.Module, inputs: Inputs, cache: Any, past: int) -> tuple[Any, Any]:
        """One piece of a sequence: (logits, cache). ``cache`` is None at first, ``past`` the positions before.

        Raises:
            Unsupported: the module keeps no cache that can be guessed.
        """
        given = self._guesses.plan.given
        if "cache" not in given or "use_cache" not in given:
            raise Unsupported("it keeps no key/value cache that can be guessed; an adapter's call_cached() gives one")
        values = arguments(self._guesses.plan, inputs, self.dtype, past=past)
        out = module(**values, **{given["cache"]: cache, given["use_cache"]: True})
        found = next(
            (getattr(out, name) for name in ("past_key_values", "cache", "kv_cache") if hasattr(out, name)), None
        )
        if found is None and isinstance(out, tuple) and len(out) > 1:
            found = out[1]
        if found is None:
            raise Unsupported(
                "its forward returns no cache that can be recognised; an adapter's call_cached() gives it"
            )
        return out, found

    def settings(self) -> Settings:
        """The config under all the names that people give its settings, as attributes and as items."""
        return settings_of(self.config, self.formula, self.level, self.dtype)


def load_adapter(path: Path | None) -> Adapter:
    """The adapter in ``path``, or the guess.

    Raises:
        NotFoundError: no such file.
        AdapterError: it cannot be imported, or has no class ``Adapter`` of the right kind.
    """
    if path is None:
        return Adapter()
    module = load_file(path, AdapterError)
    cls = getattr(module, "Adapter", None)
    if not isinstance(cls, type) or cls is Adapter or not issubclass(cls, Adapter):
        raise AdapterError(
            f"the adapter {path} has no class Adapter(moectl.parity.adapter.Adapter)",
            "Begin with `moectl compare-hf new-adapter`, which writes one.",
        )
    made = attempt(cls)
    if isinstance(made, Failure):
        raise AdapterError(f"the adapter {path} cannot be made: {made}", "It takes no arguments.")
    assert isinstance(made, Adapter)
    return made


def bound(
    adapter: Adapter, *, family: str, level: Level, config: Mapping[str, Any], formula: Formula, dtype: torch.dtype
) -> None:
    """Tell the adapter which comparison it is in."""
    adapter.family, adapter.level, adapter.config = family, level, dict(config)
    adapter.formula, adapter.sizes, adapter.dtype = formula, sizes_of(formula), dtype


def new_adapter(path: Path, level: Level) -> Path:
    """Write the commented template for ``level``. Nothing is ever overwritten.

    Raises:
        ConfigError: ``path`` exists, or is not a Python file's.
        NotFoundError: its folder does not exist.
    """
    if path.suffix != ".py":
        raise ConfigError(f"{path} is no Python file", f"Name it {path.with_suffix('.py')}.")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already", "Choose another name: nothing is overwritten.")
    if not path.parent.is_dir():
        raise NotFoundError(f"no folder {path.parent}", "Make it first.")
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(level=level, **_EXAMPLES[level])
    with path.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
    return path


_EXPERTS = '''\
        # sources["w1"] = "experts.gate_up_proj[:, :F].mT"            # [E, D, F]: all gates, turned
        # sources["experts.3.up.weight"] = "experts.gate_up_proj[3, F:]"
        # sources["experts.3.down.weight"] = "experts.down_proj[3]"
        # sources["router.weight"] = "gate.weight"'''
_ATTENTION = '''\
        # sources["qkv.weight"] = "cat([q_proj.weight, k_proj.weight, v_proj.weight])"
        # sources["wo"] = "o_proj.weight.mT"
        # sources["q_ln.scale"] = "q_norm.weight"'''


_EXAMPLES: Mapping[str, dict[str, str]] = {
    "router": {
        "weights": '        # sources["w_gate"] = "weight.mT"                              # [D, E]',
        "tensors": '        # "mlp.weights": lambda result: result["dense"],                # [T, E]',
    },
    "moe": {"weights": _EXPERTS, "tensors": '        # "mlp.router_logits": "router.linear",'},
    "attention": {"weights": _ATTENTION, "tensors": '        # "attn.heads": "out_proj:input",'},
    "layer": {
        "weights": '        # sources["moe.w1"] = "mlp.experts.gate_up_proj[:, :F].mT"\n'
        '        # sources["attn.qk.weight"] = "cat([self_attn.q_proj.weight, self_attn.k_proj.weight])"',
        "tensors": '        # "attn.residual": "norm_2:input",',
    },
    "model": {
        "weights": "        # for n in range(self.sizes[\"L\"]):\n"
        '        #     sources[f"blocks.{n}.moe.w1"] = f"model.layers.{n}.mlp.experts.gate_up_proj[:, :F].mT"\n'
        '        # sources["head.weight"] = "lm_head.weight"',
        "tensors": '        # "layers.0.mlp.output": "blocks.0.moe",',
    },
}  # fmt: skip
