"""Memory of a training run, by formula: what is held, and the moment at which most of it is.

On a GPU one optimizer step is followed moment by moment: all activations and the gradients that the loss has
made; then, layer by layer from the last, activations freed and gradients made. A CPU's process keeps what it
has touched. Beside the step stands the evaluation, which holds whole logits. What a layer keeps for its
backward is counted tensor by tensor, as decoder and experts keep it (a test counts the real ones).

Letters in formulas: N tokens of a micro-batch, S of a row, D hidden, F MLP columns, Q query columns, G key
columns, H heads, K experts per token, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moectl.config.schema import ExperimentConfig
from moectl.hf.shape import HFShape
from moectl.moe.products import cpu_has_bfloat16
from moectl.planning.anatomy import Anatomy, MoEAnatomy

MASTER = 4  # bytes of a weight, its gradient and each of AdamW's two moments, but for float64
RUNTIME = {"cpu": 45e6, "cuda": 600e6}  # libraries and thread pools after their first use; CUDA context
# glibc keeps what was freed below 32 MB for itself, in pieces; experts' pieces have another size in every step.
# What is resident beyond what is in use, as a share of what the layers keep; benchmarks/plan_memory.py measured it.
SPARE = {"dense": 0.22, "moe": 0.65}
MADE = 0.5  # of the experts' own bytes: what making them from a dense model has touched
CUDA_SPARE = 0.05  # blocks that the caching allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        weights: parameters, at master precision.
        gradients: those there at that moment.
        optimizer: its state.
        activations: what the layers keep for their backward, and the final hidden states.
        passing: what is made and freed at that moment.
        spare: what the allocator holds beyond what is in use.
        runtime: libraries, thread pools, a CUDA context: there whatever the model.
        step: the peak of an optimizer step. evaluation: that of an evaluation.
        expert_share: of weights, gradients and optimizer state, between 0 and 1.
        checkpointed: the step's peak if only each layer's input were kept (activation checkpointing).
    """

    device: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    passing: float
    spare: float
    runtime: float
    step: float
    evaluation: float
    expert_share: float
    checkpointed: float

    @property
    def peak(self) -> float:
        return max(self.step, self.evaluation)

    @property
    def during(self) -> str:
        """When the peak is."""
        return "training" if self.step >= self.evaluation else "evaluation"


class _Moment(NamedTuple):
    """Bytes at one moment of a step, beside weights and optimizer."""

    gradients: float
    activations: float
    passing: float
    spare: float


@dataclass(frozen=True)
class _Sizes:
    """Of one run on one kind of device: bytes per number, tokens, and what each layer keeps."""

    model: Anatomy
    device: str
    width: float  # bytes of an activation
    tokens: int  # N
    layers: tuple[float, ...]  # bytes kept by each
    passing: tuple[float, ...]  # bytes that pass in each one's backward


def plan_memory(model: Anatomy, config: ExperimentConfig, block_size: int, device: str) -> Memory:
    """What training ``model`` holds on ``device`` (``cpu`` or ``cuda``)."""
    train, precision = config.train, computed_precision(config.train.precision, device)
    master = 8 if precision == "float64" else MASTER
    total = model.parameters.total * master
    experts = sum(part for _, part in model.layers) * master
    sizes = _sizes(model, device, precision, train.batch_size * (block_size - 1))
    casts = total / 2 if precision in ("bfloat16", "float16") else 0.0  # autocast's copies, until the step's end
    fixed = 3 * total + casts + RUNTIME[device]
    logits = _evaluation(model, config, block_size)
    fullest = _resident(sizes, master) if device == "cpu" else _fullest(sizes, master, train.grad_accum > 1)
    step = fixed + sum(fullest)
    return Memory(
        device=device,
        weights=total + casts,
        gradients=fullest.gradients,
        optimizer=2 * total,
        activations=fullest.activations,
        passing=fullest.passing,
        spare=fullest.spare,
        runtime=RUNTIME[device],
        step=step,
        # Pages of a CPU that were used in training stay with the process; CUDA's pool is used again.
        evaluation=logits + (step if device == "cpu" else fixed + total),
        expert_share=experts / total,
        checkpointed=step - fullest.activations - fullest.spare + _recomputed(sizes),
    )


def computed_precision(asked: str, device: str) -> str:
    """What a run computes in: this machine's CPU may have no bfloat16, and computes in float32 then."""
    return "float32" if device == "cpu" and asked.startswith("bfloat16") and not cpu_has_bfloat16() else asked


def _resident(sizes: _Sizes, master: int) -> _Moment:
    """What a CPU's process has touched when a step is done, and keeps.

    Activations come from the heap of the main thread and gradients from that of autograd's thread: neither
    takes the other's place, so that the process holds the most of both.
    """
    model = sizes.model
    kept = sum(sizes.layers) + _final(sizes) + _mask(sizes)
    sparse = set(model.config.moe_layers)
    spare = sum(size * SPARE["moe" if number in sparse else "dense"] for number, size in enumerate(sizes.layers))
    experts = [part for _, part in model.layers]
    spare += MADE * master * sum(experts)
    norms = 8 * max(experts) * 2 / 3  # of the largest gradient, in float64
    return _Moment(model.parameters.total * master, kept, 2 * _vocabulary(model) * master + norms, spare)


def _fullest(sizes: _Sizes, master: int, accumulates: bool) -> _Moment:
    """Follow one step backwards on a device whose memory is used again at once, to its fullest moment."""
    model = sizes.model
    vocabulary, total = _vocabulary(model) * master, model.parameters.total * master
    made = total if accumulates else 0
    kept = sum(sizes.layers) + _final(sizes) + _mask(sizes)
    moments = [_Moment(made, kept, 2 * vocabulary, CUDA_SPARE * kept)]  # the loss's gradients, made and scaled
    made += 0 if accumulates else vocabulary
    kept -= _final(sizes)
    for number in reversed(range(len(sizes.layers))):
        moments.append(_Moment(made, kept, sizes.passing[number], CUDA_SPARE * kept))
        kept -= sizes.layers[number]
        made += 0 if accumulates else sum(model.layers[number]) * master
    moments.append(_Moment(total, 0.0, vocabulary, 0.0))  # the embedding's own gradient, before it is added
    return max(moments, key=sum)


def _recomputed(sizes: _Sizes) -> float:
    """Activations if each layer kept its input alone, and the rest were made again, layer by layer."""
    inputs = len(sizes.layers) * sizes.tokens * sizes.model.config.hidden_size * sizes.width
    return inputs + _final(sizes) + _mask(sizes) + max(map(sum, zip(sizes.layers, sizes.passing, strict=True)))


def _final(sizes: _Sizes) -> float:
    """Bytes that the last norm keeps, and the gradient of the final hidden states."""
    return 3 * sizes.tokens * sizes.model.config.hidden_size * sizes.width


def _mask(sizes: _Sizes) -> float:
    """Bytes of who sees whom, which our decoder makes once for all layers and heads; transformers' is a layer's."""
    ours = not isinstance(sizes.model.config, HFShape)
    return ours * sizes.tokens * sizes.model.length * sizes.width


def _vocabulary(model: Anatomy) -> int:
    """Numbers of the output embedding."""
    return model.config.vocab_size * model.config.hidden_size


def _evaluation(model: Anatomy, config: ExperimentConfig, block_size: int) -> float:
    """Whole logits, and the copy of them that leaves out each row's last."""
    return 2 * MASTER * config.eval.batch_size * block_size * model.config.vocab_size


def _sizes(model: Anatomy, device: str, precision: str, tokens: int) -> _Sizes:
    width = {"float64": 8.0, "float32": 4.0}.get(precision, 3.0)  # autocast: products in 2 bytes, norms in 4
    if precision == "bfloat16-pure" and device == "cuda":  # on a CPU pages of what was float32 for a moment stay
        width = 2.0
    sparse = set(model.config.moe_layers)
    layers, passing = [], []
    for number in range(model.config.num_layers):
        moe = model.moe if number in sparse else None
        layers.append(tokens * width * kept_per_token(model, moe, device))
        passing.append(tokens * width * _passing_per_token(model, moe))
    return _Sizes(model, device, width, tokens, tuple(layers), tuple(passing))


def kept_per_token(model: Anatomy, moe: MoEAnatomy | None, device: str) -> float:
    """Numbers that one layer keeps for its backward, per token; ``moe`` of a MoE layer, None of a dense one."""
    config = model.config
    if isinstance(config, HFShape):
        norms, attention, mlp = _kept_by_transformers(model, config, device)
    else:
        hidden, queries, keys = config.hidden_size, model.query_size, model.key_size
        norms = 2 * (3 * hidden + 1)  # input, normalised, scaled, and the root of the mean square
        # Before and after the head norm, rotated; the output.
        attention = 4 * queries + 4 * keys + 2 * config.num_heads + config.num_kv_heads
        mlp = 4 * config.intermediate_size
        if device == "cuda" and config.num_heads != config.num_kv_heads:
            # No fused CUDA kernel takes a mask with grouped queries: the weights of all heads are made.
            attention += config.num_heads * model.length + 2 * queries
    return norms + attention + (mlp if moe is None else _kept_by_experts(moe, config.hidden_size))


def _kept_by_transformers(model: Anatomy, config: HFShape, device: str) -> tuple[int, int, int]:
    """Of norms, attention and dense MLP of a layer of transformers, per token."""
    hidden, queries, keys, size = config.hidden_size, model.query_size, model.key_size, config.intermediate_size
    if not config.family.gated:
        # Norms, their means and roots; queries, keys and values in one; a GELU written out in products.
        attention = 4 * hidden + model.length + config.num_heads
        if config.config.attn_pdrop and device == "cpu":  # no fused kernel there drops weights
            attention = 4 * hidden + 3 * config.num_heads * model.length
        dropped = 2 * hidden if config.family.dropout_of(config.config) else 0
        return 4 * hidden + 4 + dropped, attention, 5 * size
    heads, groups = config.num_heads, config.num_kv_heads
    normed = 2 * (queries + keys) + heads + groups if config.family.name == "qwen3" else 0
    # Queries, keys and values of as many heads, the output and the sums; a mask for who sees whom.
    attention = 4 * queries + heads + normed + model.length
    return 2 * (3 * hidden + 1), attention, 4 * size


def _kept_by_experts(moe: MoEAnatomy, hidden: int) -> float:
    slots = moe.per_token_max
    routing = 7 * moe.num_experts + 9 * slots  # logits, probabilities, losses; ids are 8 bytes wide
    shared = 4 * moe.shared_size
    if moe.backend == "grouped":
        return routing + shared + slots * (moe.matrices - 1) * moe.size  # the pre-activation alone
    if moe.backend == "full":
        return routing + shared + moe.num_experts * (4 * moe.size + hidden) + (slots + 1) * hidden
    return routing + shared + slots * (4 * moe.size + 3 * hidden)


def _passing_per_token(model: Anatomy, moe: MoEAnatomy | None) -> float:
    """Numbers per token that one layer's backward holds beside what was kept, at its widest."""
    hidden = model.config.hidden_size
    if moe is None:
        return 2 * model.config.intermediate_size + 2 * hidden
    return 4 * hidden + 2 * moe.shared_size + 2 * moe.size * moe.per_token_max / moe.num_experts
