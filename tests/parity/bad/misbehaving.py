"""One MoE block that is right, and the ways in which people's blocks go wrong apart from their numbers."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import styles


class Expert(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, ffn_dim, bias=False), nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Right(nn.Module):
    container = nn.ModuleList

    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__()
        self.gate, self.k = nn.Linear(dim, num_experts, bias=False), top_k
        self.experts = self.container([Expert(dim, ffn_dim) for _ in range(num_experts)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == e)
            out = out.index_add(0, rows, weights[rows, slot, None] * expert(flat[rows]))
        return out.view(x.shape)


class PlainList(Right):
    container = list


class Nan(Right):
    def forward(self, x):
        return super().forward(x) / (x * 0).sum()


class InPlace(Right):
    def forward(self, x):
        out = super().forward(x)
        x += out
        return out


class Dropping(Right):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1)


class Raising(Right):
    def forward(self, x):
        return super().forward(x) @ self.gate.weight


class RaisingOnOne(Right):
    def forward(self, x):
        if x.shape[1] == 1:
            raise IndexError("a sequence of one has no neighbours")
        return super().forward(x)


class Endless(Right):
    def forward(self, x):
        return self.forward(x)


class Exiting(Right):
    def forward(self, x):
        raise SystemExit(3)


class WrongShape(Right):
    def forward(self, x):
        return super().forward(x)[:, -1]


class WrongDtype(Right):
    def forward(self, x):
        return super().forward(x).to(torch.float16)


class OtherDevice(Right):
    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__(dim, ffn_dim, num_experts, top_k)
        self.scale = torch.ones(dim, device="meta")  # stands for the one GPU that a test machine has not

    def forward(self, x):
        return super().forward(x * self.scale)


class PlainTensor(Right):
    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__(dim, ffn_dim, num_experts, top_k)
        self.table = torch.ones(dim)

    def forward(self, x):
        return super().forward(x) * self.table


class Untrained(Right):
    def forward(self, x):
        return super().forward(x).detach()


class Biased(Right):
    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__(dim, ffn_dim, num_experts, top_k)
        self.gate = nn.Linear(dim, num_experts)


class WithoutGate(nn.Module):
    """Two routers, and nothing that tells them apart."""

    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        self.one, self.other = nn.Linear(dim, num_experts, bias=False), nn.Linear(dim, num_experts, bias=False)
        self.k = top_k

    def forward(self, x):
        return (self.one(x) + self.other(x)).softmax(-1).topk(self.k)


class NeedsMore(Right):
    def __init__(self, dim, ffn_dim, num_experts, top_k, mesh):
        super().__init__(dim, ffn_dim, num_experts, top_k)


class NeedsSetting(Right):
    def __init__(self, config):
        super().__init__(config.dim, config.ffn_dim, config.num_experts, config.top_k)
        self.capacity = config.eval_capacity_factor


class NeedsInput(Right):
    def forward(self, x, temperature):
        return super().forward(x / temperature)


class FailsToBuild(Right):
    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__(dim, ffn_dim, num_experts)


class NotAModule:
    pass


class Unnamed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.thing = nn.Parameter(torch.zeros(dim, 3))

    def forward(self, x):
        return x


class SquareExperts(nn.Module):
    """[E, D, F] at F = D, built without asking for sizes: nothing tells which way round."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 8, bias=False)
        self.w_gate = nn.Parameter(torch.zeros(8, 32, 32))
        self.w_up = nn.Parameter(torch.zeros(8, 32, 32))
        self.w_down = nn.Parameter(torch.zeros(8, 32, 32))

    def forward(self, x):
        return x


BUILT = Right(4, 4, 4, 2)
NUMBER = 5


class ByThreshold(Right):
    """Chooses without topk: by the k-th largest of a sorted list."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probs = self.gate(flat).softmax(-1)
        kth = probs.kthvalue(probs.shape[-1] - self.k + 1, dim=-1, keepdim=True).values
        weights = probs * (probs >= kth)
        weights = weights / weights.sum(-1, keepdim=True)
        return sum(weights[:, e, None] * expert(flat) for e, expert in enumerate(self.experts)).view(x.shape)


class Tied(styles.NanoModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = self.transformer.wte.weight


class AsksToTie(styles.NanoModel):
    def __init__(self, config):
        super().__init__(config)
        self.tied = config.tie_word_embeddings  # and does not


class NanInPadding(Right):
    def forward(self, x, mask=None):
        out = super().forward(x)
        return out if mask is None else out.masked_fill(~mask[..., None], float("nan"))


class DenseSized(Right):
    def __init__(self, config):
        super().__init__(config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok)


class ListedTwice(Right):
    """A plain list beside the ModuleList: torch knows all that is in it."""

    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__(dim, ffn_dim, num_experts, top_k)
        self.every = list(self.experts)
