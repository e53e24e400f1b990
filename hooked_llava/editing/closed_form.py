"""From keys and value differences to an update of the weights.

Asked for is the smallest change D of W_out (Basu et al. 2024, arXiv 2406.04236) that answers keys K with differences R:

    min over D of  lam |D|^2 + |K D - R|^2,   D = K^T (K K^T + lam 1)^-1 R,

which for one key is k (z* - z) / (lam + |k|^2): rank one, no inverse of a d_mlp x d_mlp matrix. With the second moment C of
keys in place of 1 it is the update of ROME (Meng et al. 2022), D = C^-1 K^T (K C^-1 K^T + lam 1)^-1 R.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.editing.change import Change
from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32

_MAX_CONDITION = 1e12


def closed_form(
    keys: Float[Tensor, "key d_mlp"],
    request: Int[Tensor, " key"],
    delta: Float[Tensor, "request d_model"],
    *,
    lam: float,
    kept: Float[Tensor, "kept d_mlp"] | None = None,
    corrected: Float[Tensor, "all_keys d_mlp"] | None = None,
) -> Change:
    """The update as factors of rank one for each request, for a weight stored [d_model, d_mlp].

    Args:
        keys: one or more for each request, which all get its difference.
        request: which request each key belongs to.
        delta: what the weight's output is to change by, for each request.
        lam: how much smallness of the update counts against it.
        kept: keys whose output is to stay as it is.
        corrected: C^-1 times each key and kept key, for ROME; the keys themselves by default.

    Raises `InputError` where the keys do not determine an update: linearly dependent ones with lam = 0.

    >>> key, delta = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    >>> closed_form(key, torch.tensor([0]), delta, lam=0.0).matrix() @ key[0]
    tensor([1., 2.])
    """
    if not lam >= 0:
        raise InputError(f"lam={lam} is not a weight of the update's size; expected 0 or more.")
    n = len(keys)
    every = (keys if kept is None else torch.cat([keys, kept])).double()
    written = every if corrected is None else corrected.double()
    gram = every @ written.T + lam * torch.eye(len(every), dtype=torch.float64, device=every.device)
    _check_solvable(gram, lam)
    # Only the first n rows of R are not zero, and rows of one request are equal: rank one for each request is enough.
    weights = torch.linalg.solve(gram, torch.eye(len(gram), n, dtype=gram.dtype, device=gram.device))
    per_key = weights.T @ written  # (key, d_mlp)
    right = per_key.new_zeros(len(delta), every.shape[1]).index_add(0, request, per_key)
    left = at_least_float32(delta).T.contiguous()
    return Change(left, right.to(left.dtype))


def _check_solvable(gram: Tensor, lam: float) -> None:
    values = torch.linalg.svdvals(gram)
    if not bool(values.isfinite().all()) or float(values[-1]) * _MAX_CONDITION <= float(values[0]):
        raise InputError(
            f"The update is singular: the keys of these requests (and those to be kept) are linearly dependent, and lam="
            f"{lam:g} does not decide between them. Raise lam, or leave out prompts that are the same."
        )
