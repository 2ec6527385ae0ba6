"""Right, but nothing like anything: sizes in a list, columns for tokens, names of the alphabet."""

import torch
import torch.nn.functional as F
from torch import nn


class Scores(nn.Module):
    def forward(self, x, alpha):
        return x @ alpha


class Strange(nn.Module):
    def __init__(self, where, wide, narrow, numbers):
        super().__init__()
        experts, self.chosen = numbers
        self.alpha = nn.Parameter(torch.zeros(wide, experts, device=where))
        self.beta = nn.Parameter(torch.zeros(2, experts, wide, narrow))
        self.gamma = nn.Parameter(torch.zeros(experts, narrow, wide))
        self.scores = Scores()

    def forward(self, columns):
        x = columns.T
        probs = self.scores(x, self.alpha).softmax(-1)
        best, which = probs.topk(self.chosen)
        best = best / best.sum(-1, keepdim=True)
        share = torch.zeros_like(probs).scatter(-1, which, best)
        hidden = F.silu(torch.einsum("td,edf->tef", x, self.beta[0])) * torch.einsum("td,edf->tef", x, self.beta[1])
        return {"y": torch.einsum("tef,efd,te->dt", hidden, self.gamma, share)}


class OddRouter(nn.Module):
    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        self.odd, self.even = nn.Parameter(torch.zeros(dim, num_experts)), nn.Parameter(torch.zeros(dim, num_experts))
        self.k = top_k

    def forward(self, x):
        probs = (x @ self.odd).softmax(-1)
        best, which = probs.topk(self.k)
        best = best / best.sum(-1, keepdim=True)
        return {"dense": torch.zeros_like(probs).scatter(-1, which, best)}


class Chooser(nn.Module):
    """Chooses by hand, or as it is told."""

    def __init__(self, dim, ffn_dim, num_experts, top_k):
        super().__init__()
        self.gate, self.k, self.choose = nn.Linear(dim, num_experts, bias=False), top_k, None
        self.w13 = nn.Parameter(torch.zeros(num_experts, 2 * ffn_dim, dim))
        self.w2 = nn.Parameter(torch.zeros(num_experts, dim, ffn_dim))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        logits = self.gate(flat)
        if self.choose is not None:
            weights, which = self.choose(logits)
        else:
            probs = logits.softmax(-1)
            rank = (probs[:, None] > probs[:, :, None]).sum(-1)
            which = torch.stack([(rank == r).nonzero()[:, 1] for r in range(self.k)], dim=1)
            weights = probs.gather(1, which)
            weights = weights / weights.sum(-1, keepdim=True)
        share = torch.zeros_like(logits).scatter(-1, which, weights)
        gate, up = torch.einsum("td,efd->tef", flat, self.w13).chunk(2, -1)
        return torch.einsum("tef,edf,te->td", F.silu(gate) * up, self.w2, share).view(x.shape)
