"""One good router, and everything that can be wrong with it: which checks must notice, and what they must say."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import NamedTuple

GOOD = '''
import random
import torch
from torch import nn
from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk


class Mine(Router):
    """Top-k of a softmax."""

    class Config(RouterConfig):
        top_k: int = 2

    def route(self, x_TD, mask_T):
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE
        probs_TE = torch.softmax(scores_TE, dim=-1)
        clean_TE = torch.softmax(logits_TE, dim=-1)
        indices_TK = stable_topk(scores_TE.detach(), self.top_k)
        weights_TK = probs_TE.gather(1, indices_TK)
        keep_TK = None
        return RouterOutput(
            indices_TK, weights_TK, logits_TE, probs_TE, clean_TE, entropy(clean_TE), keep_TK
        )
'''
_RETURN, _ROUTE, _CLASS = "        return RouterOutput(", "    def route(", "class Mine("
_SCORES, _WEIGHTS = "scores_TE = logits_TE\n", "weights_TK = probs_TE.gather(1, indices_TK)"

Edit = tuple[str, str]


class Mistake(NamedTuple):
    """What to change in the good router.

    Attributes:
        edits: pairs of a text that is there once and what replaces it.
        fails: names of the checks that must fail.
        says: part of the first one's evidence.
        others: whether more may fail, because the mistake touches what they look at too.
    """

    edits: tuple[Edit, ...]
    fails: str
    says: str
    others: bool = False

    def source(self) -> str:
        text = GOOD
        for old, new in self.edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text


def _lines(text: str) -> tuple[Edit, ...]:
    """More lines at the end of ``route()``, before it returns."""
    return ((_RETURN, indent(dedent(text), " " * 8) + "\n" + _RETURN),)


def _members(text: str) -> tuple[Edit, ...]:
    """More members of the class."""
    return ((_ROUTE, indent(dedent(text), " " * 4) + "\n\n" + _ROUTE),)


def _first(text: str) -> tuple[Edit, ...]:
    """More lines before the class."""
    return ((_CLASS, text + "\n" + _CLASS),)


def _swap(old: str, new: str) -> tuple[Edit, ...]:
    return ((old, new),)


def _with_init(line: str, *, and_also: str = "") -> tuple[Edit, ...]:
    """One more line in the constructor, and more members."""
    init = f"def __init__(self, *args, **kwargs):\n    super().__init__(*args, **kwargs)\n    {line}"
    return _members(f"{and_also}\n\n{init}")


def _forward(body: str) -> tuple[Edit, ...]:
    return _members(f"def forward(self, x, token_mask=None):\n    {body}")


LOADING = {
    "raises on import": Mistake(_first("raise RuntimeError('no luck')"), "loads", "RuntimeError: no luck"),
    "ends the interpreter": Mistake(_first("raise SystemExit(7)"), "loads", "SystemExit: 7"),
    "is no router": Mistake(
        _swap("class Mine(Router)", "class Mine(nn.Module)"), "loads", "is not a subclass of moectl"
    ),
    "does not route": Mistake(_swap(_ROUTE, "    def rout("), "loads", "does not implement route()"),
    "takes no config": Mistake(
        _members("def __init__(self, *, hidden_size, num_experts):\n    pass"),
        "builds",
        "Mine.__init__() takes 1 positional argument",
    ),
    "raises when built": Mistake(
        _members("def reset_parameters(self):\n    raise KeyError('gate')"), "builds", "raised KeyError: 'gate'"
    ),
    "gate of another shape": Mistake(
        _with_init("self.weight = nn.Parameter(torch.randn(3, 3))"), "builds", "must be [E, D] = [8, 64], not (3, 3)"
    ),
    "gate that is never drawn": Mistake(
        _members("def reset_parameters(self):\n    nn.init.eye_(self.weight)"), "builds", "the same under every seed"
    ),
    "frozen gate": Mistake(_with_init("self.weight.requires_grad_(False)"), "builds", "learns = False"),
    "NaN to begin with": Mistake(
        _with_init("self.register_buffer('scale', torch.tensor(float('nan')))"), "builds", "scale is not finite"
    ),
    "lenient options": Mistake(
        _swap("top_k: int = 2", "top_k: int = 2\n        model_config = {'extra': 'allow'}"),
        "options",
        "accepted in silence",
    ),
}
OUTPUTS = {
    "route raises": Mistake(_lines("{}['lost']"), "route", "raised KeyError: 'lost' (mine.py:23)"),
    "returns a tuple": Mistake(
        (("return RouterOutput(", "return tuple(("), ("keep_TK\n        )", "keep_TK\n        ))")),
        "route",
        "returned a tuple, not a RouterOutput",
    ),
    "weights of another shape": Mistake(
        _swap(_WEIGHTS, "weights_TK = probs_TE"),
        "shapes",
        "in training topk_weights has the shape (64, 8), not (64, 2)",
    ),
    "entropy of another shape": Mistake(
        _swap("entropy(clean_TE)", "entropy(clean_TE)[:, None]"), "shapes", "entropy has the shape (64, 1), not (64,)"
    ),
    "keep of another shape": Mistake(
        _swap("keep_TK = None", "keep_TK = torch.ones(len(x_TD), dtype=torch.bool)"),
        "shapes",
        "keep has the shape (64,)",
    ),
    "wrong in eval alone": Mistake(
        _swap(_WEIGHTS, f"{_WEIGHTS}[:, : 2 if self.training else 1]"), "shapes", "in eval topk_weights has the shape"
    ),
    "no tensor": Mistake(_swap("entropy(clean_TE)", "0.0"), "shapes", "entropy is a float, not a tensor"),
    "int32 indices": Mistake(_lines("indices_TK = indices_TK.int()"), "dtypes", "topk_indices is torch.int32"),
    "keep of integers": Mistake(
        _swap("keep_TK = None", "keep_TK = torch.ones_like(indices_TK)"), "dtypes", "keep is torch.int64"
    ),
    "float64 lost": Mistake(
        _lines("weights_TK = weights_TK.float()"), "dtypes", "topk_weights is torch.float32 for tokens of torch.float64"
    ),
    "index past the last expert": Mistake(
        _lines("indices_TK = indices_TK + 1"), "indices", "is sent to expert 8, but there are experts 0 to 7"
    ),
    "negative index": Mistake(_lines("indices_TK = indices_TK - 1"), "indices", "is sent to expert -1"),
    "one expert twice": Mistake(
        _lines("indices_TK = indices_TK[:, :1].expand(-1, 2)"), "indices", "token 0 is sent to expert"
    ),
    "NaN weights": Mistake(
        _lines("weights_TK = weights_TK * float('nan')"), "weights", "topk_weights is [nan, nan] for token 0"
    ),
    "infinite weights in training": Mistake(
        _lines("weights_TK = weights_TK / (0.0 if self.training else 1.0)"),
        "weights",
        "in training topk_weights is [inf",
    ),
    "probabilities that sum to two": Mistake(
        _lines("probs_TE = probs_TE * 2"),
        "probabilities extreme-logits",
        "router_probs of token 0 is no distribution: it",
    ),
    "negative probabilities": Mistake(
        _lines("probs_TE = probs_TE + torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0, 0]).to(probs_TE)"),
        "probabilities",
        "its least is -0.",
    ),
    "infinite logits": Mistake(
        _lines("logits_TE = logits_TE.masked_fill(logits_TE < 0, float('-inf'))"),
        "probabilities extreme-logits",
        "router_logits of token 0 are not finite",
        others=True,
    ),
    "entropy in bits": Mistake(_swap("entropy(clean_TE)", "entropy(clean_TE) / 0.6931"), "entropy", "(nats)"),
    "noise in the clean distribution": Mistake(
        _lines("clean_TE = torch.softmax(logits_TE + torch.randn_like(logits_TE) * self.training, -1)"),
        "entropy",
        "in training router_probs_clean changes",
    ),
    "noise in the logits": Mistake(
        _lines("logits_TE = logits_TE + 0.1 * torch.randn_like(logits_TE) * self.training"),
        "entropy",
        "in training router_logits changes",
    ),
    "forward that knows no batches": Mistake(
        _forward("assert x.dim() == 2; return super().forward(x, token_mask)"), "forward", "raised AssertionError"
    ),
    "forward that turns batches around": Mistake(
        _forward("return super().forward(x.flip(0) if x.dim() == 3 else x, token_mask)"), "forward", "instead of [T, D]"
    ),
}
LEARNING = {
    "detached weights": Mistake(_lines("weights_TK = weights_TK.detach()"), "gradient", "no gradient reaches the gate"),
    "constant weights": Mistake(
        _lines("weights_TK = weights_TK / weights_TK"), "gradient", "no gradient reaches the gate", others=True
    ),
    "learns against its word": Mistake(_members("learns = False"), "gradient", "declares learns = False"),
    "idle parameter": Mistake(_with_init("self.idle = nn.Parameter(torch.zeros(3))"), "gradient", "parameter idle"),
    "gradient without end": Mistake(
        _lines("weights_TK = weights_TK + 0 * (weights_TK - weights_TK).abs().sqrt()"),
        "gradient padding",
        "gate (weight) is not finite",
        others=True,
    ),
    "zero gate trained": Mistake(
        _members("def training_problem(self):\n    return None"), "training-problem", "a gate of zeros"
    ),
    "problem without words": Mistake(
        _members("def training_problem(self):\n    return True"), "training-problem", "returned True"
    ),
}
BEHAVIOUR = {
    "random in eval": Mistake(
        _lines("weights_TK = weights_TK + torch.randn_like(weights_TK)"),
        "determinism",
        "in eval topk_weights differs between two calls",
        others=True,
    ),
    "generator of its own": Mistake(
        _lines("weights_TK = weights_TK + random.random() * self.training"),
        "determinism",
        "in training, twice under the same torch.manual_seed",
        others=True,
    ),
    "state that moves in eval": Mistake(
        (*_with_init("self.register_buffer('calls', torch.zeros((), dtype=torch.int64))"), *_lines("self.calls += 1")),
        "determinism",
        "a call in eval changed its state: calls",
    ),
    "padding kept in use": Mistake(
        _forward("return super().forward(x, token_mask)._replace(keep=None)"), "padding", "keep must be False there"
    ),
    "padding weighed": Mistake(
        _forward(
            "out = super().forward(x, token_mask);"
            " return out._replace(topk_weights=out.topk_weights + (0 if out.keep is None else 1.0 * ~out.keep))"
        ),
        "padding",
        "has another combine weight than 0",
    ),
    "mean over padding too": Mistake(
        _lines("weights_TK = weights_TK + x_TD.mean()"), "padding decode causality", "with padding (right)", others=True
    ),
    "NaN let through": Mistake(
        _forward(
            "out = super().forward(x, token_mask); return out._replace(topk_weights=out.topk_weights + 0 * x.sum())"
        ),
        "padding",
        "with padding (right)",
        others=True,
    ),
    "no tokens": Mistake(_lines("x_TD.max()"), "empty-batch", "raised RouterError"),
    "a single token": Mistake(
        _lines("weights_TK = weights_TK + 0 * x_TD.std(0).sum()"),
        "one-token",
        "raised RouterError: router",
        others=True,
    ),
    "ties by topk": Mistake(
        _swap("stable_topk(scores_TE.detach(), self.top_k)", "scores_TE.detach().topk(self.top_k).indices"),
        "ties",
        "not the lowest 2",
    ),
    "ties by chance": Mistake(
        _swap("scores_TE.detach(), self", "scores_TE.detach() + 1e-6 * random.random() * torch.eye(8)[3], self"),
        "ties",
        "not the lowest 2",
        others=True,
    ),
    "exponential without care": Mistake(
        _swap(
            "probs_TE = torch.softmax(scores_TE, dim=-1)",
            "probs_TE = scores_TE.exp() / scores_TE.exp().sum(1)[:, None]",
        ),
        "extreme-logits",
        "with logits of ±800: router",
    ),
    "low precision": Mistake(
        _swap("self.logits(x_TD)", "(x_TD.bfloat16() @ self.weight.bfloat16().T).to(x_TD.dtype)"),
        "low-precision",
        "router_logits of float32 tokens are bfloat16 numbers",
        others=True,
    ),
    "the weight's own precision": Mistake(
        _swap("self.logits(x_TD)", "(x_TD.to(self.weight.dtype) @ self.weight.T).to(x_TD.dtype)"),
        "low-precision",
        "with bfloat16 parameters",
    ),
    "autocast": Mistake(
        _forward("return super().forward(x * (1 + torch.is_autocast_enabled('cpu')), token_mask)"),
        "low-precision",
        "under bfloat16 autocast",
    ),
    "looks ahead": Mistake(
        _lines("weights_TK = weights_TK + (x_TD[:, :1].roll(-1, 0) > 0)"),
        "causality",
        "declares causal = True, but in training mode the output at token",
        others=True,
    ),
    "looks back": Mistake(
        _lines("weights_TK = weights_TK + (x_TD[:, :1].cumsum(0) > 0)"),
        "decode",
        "alone instead of with the rest of the batch",
        others=True,
    ),
}
LIFE = {
    "load refused": Mistake(
        _members("def after_step(self, load_E):\n    raise NotImplementedError"),
        "after-step state",
        "raised NotImplementedError (mine.py:16)",
    ),
    "division by no load": Mistake(
        _with_init(
            "self.register_buffer('share', torch.zeros(8))",
            and_also="def after_step(self, load_E):\n    self.share.copy_(load_E / load_E.sum())",
        ),
        "after-step",
        "after a step that loaded no expert share is not finite",
    ),
    "moves its gate": Mistake(
        _members("def after_step(self, load_E):\n    self.weight.data += 1"), "after-step", "the optimizer's to move"
    ),
    "state kept to itself": Mistake(
        (*_with_init("self.shift = torch.randn(())"), *_lines("weights_TK = weights_TK + self.shift")),
        "state",
        "load_state_dict()",
        others=True,
    ),
    "buffers registered low": Mistake(
        _with_init("self.register_buffer('bias', torch.zeros(8, dtype=torch.bfloat16))"),
        "buffers",
        "the buffer bias is registered in torch.bfloat16: register it in float32 (MOE041)",
    ),
    "buffers cast": Mistake(
        _with_init(
            "self.register_buffer('bias', torch.zeros(8))",
            and_also="def _apply(self, fn, recurse=True):\n    return nn.Module._apply(self, fn, recurse)",
        ),
        "buffers",
        "the buffer bias is torch.bfloat16",
    ),
}
GRAPHS = {
    "a branch on values": Mistake(
        _lines("if x_TD.sum() > 0.5:\n    weights_TK = weights_TK * 1.0"), "compile", "raised"
    ),
    "an item": Mistake(_lines("if x_TD.sum().item() > 0.5:\n    weights_TK = weights_TK * 1.0"), "compile", "raised"),
    "another answer when compiled": Mistake(
        _lines("weights_TK = weights_TK * (2.0 if torch.compiler.is_compiling() else 1.0)"),
        "compile",
        "compiled, in eval",
    ),
}
MISTAKES = {**LOADING, **OUTPUTS, **LEARNING, **BEHAVIOUR, **LIFE, **GRAPHS}
