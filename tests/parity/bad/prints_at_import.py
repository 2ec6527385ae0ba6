from torch import nn

print("hello from the module")


class Router(nn.Module):
    def __init__(self, hidden_size, num_experts, top_k):
        super().__init__()
        print("hello from the constructor")
        self.gate, self.k = nn.Linear(hidden_size, num_experts, bias=False), top_k

    def forward(self, x):
        print("hello from forward")
        probs = self.gate(x).softmax(-1)
        weights, indices = probs.topk(self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices
