"""The tuned lens as the tuned-lens package computes it, by plain formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PlainTunedLens(nn.Module):
    """A zero linear map for each layer, added to what enters it: logits = unembed(rms_norm(h + A h + b))."""

    def __init__(self, n_layers: int, norm_weight: Tensor, eps: float, unembed: Tensor) -> None:
        super().__init__()
        d_model = len(norm_weight)
        self.translators = nn.ModuleList(nn.Linear(d_model, d_model, dtype=torch.float64) for _ in range(n_layers))
        for translator in self.translators:
            nn.init.zeros_(translator.weight)
            nn.init.zeros_(translator.bias)
        self.norm_weight, self.eps, self.unembed = norm_weight.detach().double(), eps, unembed.detach().double()

    def set(self, weights: Tensor, biases: Tensor) -> PlainTunedLens:
        for translator, weight, bias in zip(self.translators, weights, biases, strict=True):
            translator.weight.data, translator.bias.data = weight.double(), bias.double()
        return self

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        moved = hidden + self.translators[layer](hidden) if layer < len(self.translators) else hidden
        rms = (moved.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return (moved / rms * self.norm_weight) @ self.unembed.T


def plain_kl(final: Tensor, read: Tensor) -> Tensor:
    """KL(final || read) of the rows of logits, averaged, entry by entry of its definition."""
    p, q = final.softmax(-1), read.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def plain_training(
    lens: PlainTunedLens, batches: Sequence[Sequence[Tensor]], lr: float, weight_decay: float
) -> list[list[float]]:
    """Train on batches of streams [layer][position, d_model], the final one last; the divergences of each step and layer."""
    optimizer = torch.optim.AdamW(lens.parameters(), lr=lr, weight_decay=weight_decay)
    seen = []
    for step, streams in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (len(batches) - step) / len(batches)
        final = lens(streams[-1], len(streams)).detach()
        each = [plain_kl(final, lens(hidden, layer)) for layer, hidden in enumerate(streams[:-1])]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        seen.append([kl.item() for kl in each])
    return seen
