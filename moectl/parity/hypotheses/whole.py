"""Mistakes around the components: norms, residuals, embeddings, masks and documents that nobody looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, positions_of
from moectl.parity.formula import Formula, NormFormula
from moectl.parity.hypotheses.kinds import Hypothesis, Look, Variant, whole

#: Values that people leave in; `torch.nn.RMSNorm` without one takes the dtype's machine epsilon.
EPSILONS = (
    1e-6,
    1e-5,
    1e-8,
    1e-12,
    1e-7,
    1e-9,
    1e-4,
    1e-3,
    0.0,
    *(torch.finfo(d).eps for d in (torch.float32, torch.float64)),
)
#: Which norms are changed together, and what people call them. Empty: all.
ALL = ("attn", "mlp", "q", "k", "final")
WHERE: dict[tuple[str, ...], str] = {
    ALL: "of all norms",
    ("attn", "mlp", "final"): "of all but the q/k norms",
    ("attn", "mlp"): "of the norms before attention and MLP",
    ("q", "k"): "of the q/k norms",
    ("final",): "of the last norm",
    ("attn",): "of the norm before attention",
    ("mlp",): "of the norm before the MLP",
}


def _norms(look: Look, label: str, change: Callable[[NormFormula], NormFormula]) -> Iterator[Variant]:
    """The same change in all norms, or in some of them; only those that this level and family have."""
    here = {"attention": {"q", "k"}, "layer": {"q", "k", "attn", "mlp"}}.get(look.cases[0].level, set(ALL))
    if look.formula.attention.qk_norm == "none":
        here -= {"q", "k"}
    done = set()
    for roles, where in WHERE.items():
        changed = tuple(role for role in roles if role in here)
        if changed in done or not changed or (roles != ALL and changed != roles):
            continue
        done.add(changed)

        def formula(formula: Formula, _: Case, roles: tuple[str, ...] = changed) -> Formula:
            own = dict(formula.norms)
            for role in roles:
                own[role] = change(own.get(role, formula.norm))
            return replace(formula, norms=tuple(own.items()))

        yield Variant(f"{label} {where}", formula)


def _epsilons(look: Look) -> Iterator[Variant]:
    own = look.formula.norm.eps
    for eps in EPSILONS:
        if abs(eps - own) > 1e-3 * own:
            yield from _norms(look, f"eps {eps:.3g}, not {own:g},", partial(replace, eps=eps))
    yield from _norms(look, "eps added to the root instead of under it, ", partial(replace, eps_place="outside"))


def _weights(look: Look) -> Iterator[Variant]:
    yield from _norms(look, "1 + weight", partial(replace, weight="one_plus"))
    yield from _norms(look, "no weight", partial(replace, weight="none"))


def _kinds(look: Look) -> Iterator[Variant]:
    yield from _norms(look, "the mean is taken off (LayerNorm)", partial(replace, kind="layer"))
    for role, where in (("attn", "attention"), ("mlp", "the MLP"), ("final", "the head")):
        if look.cases[0].level == "model" or (look.cases[0].level == "layer" and role != "final"):
            yield whole(f"no norm before {where}", norms=(*look.formula.norms, (role, NormFormula(kind="identity"))))


def _low_precision(look: Look) -> Iterator[Variant]:
    for dtype in ("bfloat16", "float16"):
        for alone, label in ((True, "statistic"), (False, "all of it")):
            yield from _norms(look, f"{label} in {dtype}", partial(replace, dtype=dtype, statistic_alone=alone))


def _residuals(look: Look) -> Iterator[Variant]:
    for place, name in (("residual_attn", "attention"), ("residual_mlp", "the MLP")):
        yield whole(f"nothing added back after {name}", **{place: "none"})
        yield whole(f"the normed input added back after {name}", **{place: "normed"})
    yield whole("the normed input added back after both", residual_attn="normed", residual_mlp="normed")
    yield whole("nothing added back after either", residual_attn="none", residual_mlp="none")


def _order(look: Look) -> Iterator[Variant]:
    yield whole("the MLP is given the norm of the layer's input, beside attention", order="parallel")
    change = whole("", order="post_norm").formula  # hooks read the norms' outputs for the inputs
    yield Variant("norms after the additions (post-norm)", change, shown_as={"attn.input": "", "mlp.input": ""})


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tied(look: Look) -> Iterator[Variant]:
    if look.cases[0].level != "model" or look.formula.tie_embeddings:
        return

    def copied(to: str, source: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        return lambda weights: {**weights, to: weights[source]} if source in weights else dict(weights)

    yield Variant("the head is the embedding", weights=copied(HEAD, EMBEDDING))
    yield Variant("the embedding is the head", weights=copied(EMBEDDING, HEAD))


def _unmasked(inputs: Inputs) -> Inputs:
    """Without the mask, at the positions that it gives."""
    return inputs._replace(attention_mask=None, positions=positions_of(inputs))


def _mask(look: Look) -> Iterator[Variant]:
    if any(case.inputs.attention_mask is not None for case in look.cases):
        yield Variant("padding attended to", inputs=_unmasked)


def _documents(look: Look) -> Iterator[Variant]:
    if any(case.inputs.doc_ids is not None for case in look.cases):
        yield Variant("documents not kept apart", inputs=lambda inputs: inputs._replace(doc_ids=None))


HYPOTHESES = (
    Hypothesis("norm-eps", ("MOE025",), "RMSNorm epsilon wrong", "norm", _epsilons),
    Hypothesis("norm-precision", ("MOE026",), "RMSNorm statistic in low precision", "norm", _low_precision),
    Hypothesis("norm-weight", ("MOE074",), "RMSNorm weight misplaced", "norm", _weights),
    Hypothesis("layer-order", ("MOE106",), "norm, attention and MLP in another order", "model", _order),
    Hypothesis("norm-kind", ("MOE099",), "a norm missing, or of another kind", "norm", _kinds),
    Hypothesis("residual", ("MOE067",), "residual missing, or taken after the norm", "model", _residuals),
    Hypothesis("tied", ("MOE030",), "embedding tied against the config", "model", _tied),
    Hypothesis("padding-ignored", ("MOE061",), "padding attended to", "attention", _mask),
    Hypothesis("documents-ignored", ("MOE053",), "attention across packed documents", "attention", _documents),
)
