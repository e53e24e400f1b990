"""Training a sparse autoencoder, written as formulas over plain tensors and loops over vectors (Gao et al. 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor


def fvu_by_hand(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error over squared distance from the mean, both summed vector by vector."""
    mean = sum(x) / len(x)
    return sum(((a - b) ** 2).sum() for a, b in zip(x, reconstruction, strict=True)) / sum(
        ((a - mean) ** 2).sum() for a in x
    )


def topk_by_hand(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Activations before the choice, and the reconstruction by the k largest, of every vector."""
    pre_acts = torch.stack([torch.relu(W_enc @ (row - b_dec) + b_enc) for row in x])
    rows = []
    for acts in pre_acts:
        best = sorted(range(len(acts)), key=lambda i: -acts[i].item())[:k]
        rows.append(b_dec + sum(acts[i] * W_dec[i] for i in best))
    return pre_acts, torch.stack(rows)


def auxiliary_by_hand(x: Tensor, reconstruction: Tensor, pre_acts: Tensor, W_dec: Tensor, dead: list[int]) -> Tensor:
    """Squared error of the dead features' prediction of the error, without a bias, as a share of variance."""
    if not dead:
        return x.new_zeros(())
    mean, usual = sum(x) / len(x), x.shape[1] // 2
    total = x.new_zeros(())
    for row, its, acts in zip(x, reconstruction, pre_acts, strict=True):
        best = sorted(dead, key=lambda i: -acts[i].item())[: min(usual, len(dead))]
        error = (row - its).detach()
        total = total + ((error - sum(acts[i] * W_dec[i] for i in best)) ** 2).sum()
    return min(len(dead) / usual, 1.0) * total / sum(((row - mean) ** 2).sum() for row in x)


def median_by_hand(x: Tensor) -> Tensor:
    """The point of least summed distance, by gradient descent on that sum with ever shorter steps."""
    point = x.double().mean(0)
    for i in range(3000):
        away = x.double() - point
        point = point + 0.5 * 0.998**i * (away / away.norm(dim=1, keepdim=True)).mean(0)
    return point


def train_by_hand(
    batches: list[Tensor],
    sae: dict[str, Tensor],
    rates: list[float],
    *,
    k: int,
    dead_after: int,
    aux_weight: float,
    clip: float,
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """TopK training from start values, one Adam step a batch; weights, and the FVU and auxiliary loss of every step."""
    named = {name: tensor.clone().requires_grad_() for name, tensor in sae.items()}
    optimizer = torch.optim.Adam(named.values(), lr=1.0)
    unfired, seen = [0] * len(named["W_dec"]), []
    for x, rate in zip(batches, rates, strict=True):
        dead = [i for i, n in enumerate(unfired) if n >= dead_after]
        pre_acts, reconstruction = topk_by_hand(x, *(named[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")), k)
        fvu = fvu_by_hand(x, reconstruction)
        aux = auxiliary_by_hand(x, reconstruction, pre_acts, named["W_dec"], dead)
        optimizer.zero_grad()
        (fvu + aux_weight * aux).backward()
        with torch.no_grad():
            for row, gradient in zip(named["W_dec"], named["W_dec"].grad, strict=True):
                gradient -= (row @ gradient) * row
        norm = sum((p.grad**2).sum() for p in named.values()) ** 0.5
        for p in named.values():
            p.grad *= min(1.0, clip / float(norm + 1e-6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for row in named["W_dec"]:
                row /= row.norm()
        largest = [sorted(range(len(acts)), key=lambda i: -acts[i])[:k] for acts in pre_acts.tolist()]
        active = {i for acts, best in zip(pre_acts.tolist(), largest, strict=True) for i in best if acts[i] > 0}
        unfired = [0 if i in active else n + len(x) for i, n in enumerate(unfired)]
        seen.append((fvu.item(), aux.item()))
    return {name: tensor.detach() for name, tensor in named.items()}, seen
