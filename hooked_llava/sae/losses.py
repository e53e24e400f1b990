"""What training a sparse autoencoder minimises, and the constraints it keeps: the formulas alone.

Gao et al. (2406.04093): the share of variance unexplained, and the auxiliary loss that brings dead features back. Bussmann et al.
(2412.06410, 2503.17547): BatchTopK and Matryoshka. Rajamanoharan et al. (2407.14435): JumpReLU with straight-through gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_llava.machine.processes import Processes
from hooked_llava.sae.autoencoder import SparseAutoencoder

_ITERATIONS, _TOLERANCE = 100, 1e-6


def variance_around_mean(chunks: list[Tensor], processes: Processes) -> Float[Tensor, ""]:
    """The sum of squared distances of all vectors [batch, d_in], of all chunks and processes, from their mean.

    >>> variance_around_mean([torch.tensor([[0.0]]), torch.tensor([[2.0]])], Processes(0, 1)).item()
    2.0
    """
    sums = torch.stack([F.pad(x.sum(0), (0, 1), value=float(len(x))) for x in chunks]).sum(0)
    total = processes.sum(sums)
    mean = total[:-1] / total[-1]
    return processes.sum(torch.stack([(x - mean).pow(2).sum() for x in chunks]).sum(0))


@torch.no_grad()
def geometric_median(x: Float[Tensor, "batch d_in"], processes: Processes) -> Float[Tensor, " d_in"]:
    """The point whose summed distance from all vectors of all processes is least (Weiszfeld's iteration), in float64.

    >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]]), Processes(0, 1)).abs().item() < 1e-3
    True
    """
    x = x.double()
    weights = x.new_ones(len(x), 1)
    median = x.new_full((x.shape[1],), torch.inf)
    for _ in range(_ITERATIONS):
        sums = processes.sum(torch.cat([(weights * x).sum(0), weights.sum(0)]))
        before, median = median, sums[:-1] / sums[-1]
        if bool((median - before).norm() <= _TOLERANCE * median.norm()):
            break
        weights = 1 / (x - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
    return median


def auxiliary_loss(
    sae: SparseAutoencoder,
    pre_acts: Float[Tensor, "batch d_sae"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
    variance: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """How badly the dead features that are most active predict the error (Gao et al.), as a share of variance.

    The d_in / 2 most active dead features of each vector; scaled down where there are fewer dead ones. No bias is added, since
    the error has none, and no gradient goes through the error.
    """
    (chosen,) = dead.nonzero(as_tuple=True)
    usual = max(sae.cfg.d_in // 2, 1)
    if not len(chosen):
        return error.new_zeros(())
    values, indices = pre_acts[:, chosen].topk(min(usual, len(chosen)), dim=-1, sorted=False)
    predicted = F.embedding_bag(indices, sae.W_dec[chosen], per_sample_weights=values, mode="sum")
    return min(len(chosen) / usual, 1.0) * (error.detach() - predicted).pow(2).sum() / variance


def batch_threshold(pre_acts: Float[Tensor, "batch d_sae"], n_kept: int, processes: Processes) -> Float[Tensor, ""]:
    """The n_kept-th largest activation of a batch that all processes hold together.

    >>> batch_threshold(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), 2, Processes(0, 1)).item()
    2.0
    """
    flat = pre_acts.detach().flatten()
    largest = flat.topk(min(n_kept, flat.numel())).values
    if processes.n > 1:
        largest = processes.gather(F.pad(largest, (0, n_kept - len(largest)))).topk(n_kept).values
    return largest[-1]


class Step(torch.autograd.Function):
    """1 where an activation is above its threshold; the threshold's gradient by a rectangular kernel."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """1 or 0 for each activation."""
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """No gradient for activations: the step is flat."""
        pre_acts, threshold = ctx.saved_tensors
        near = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(pre_acts.dtype)
        return None, -(near * grads[0]).sum(0) / ctx.bandwidth, None


class JumpReLU(torch.autograd.Function):
    """An activation where it is above its threshold, else 0; the threshold's gradient by a rectangular kernel."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """The activations that stay."""
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The activations that stay pass their gradient."""
        pre_acts, threshold = ctx.saved_tensors
        near = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(pre_acts.dtype)
        return (pre_acts > threshold) * grads[0], -(threshold / ctx.bandwidth) * (near * grads[0]).sum(0), None


def nested_errors(
    sae: SparseAutoencoder, x: Float[Tensor, "batch d_in"], acts: Float[Tensor, "batch d_sae"]
) -> list[Float[Tensor, "batch d_in"]]:
    """What the first features of every group leave unexplained, the smallest group first."""
    reconstruction, errors, start = sae.b_dec, [], 0
    for stop in sae.cfg.groups or (sae.cfg.d_sae,):
        reconstruction = reconstruction + acts[:, start:stop] @ sae.W_dec[start:stop]
        errors.append(x - reconstruction)
        start = stop
    return errors


@torch.no_grad()
def remove_parallel_gradient(sae: SparseAutoencoder) -> None:
    """Take from the decoder's gradient what would only change the length of its unit rows."""
    assert sae.W_dec.grad is not None
    along = (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True)
    sae.W_dec.grad -= along * sae.W_dec


@torch.no_grad()
def normalize_decoder(sae: SparseAutoencoder) -> None:
    """Give every row of the decoder length 1."""
    sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
