"""Vectors of the residual stream in the space of words: by the unembedding, or by the input embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

Space = Literal["unembed", "embed", "cosine"]
SPACES = ("unembed", "embed", "cosine")


def project(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    space: Space,
    scale: Float[Tensor, "1"] | None = None,
) -> Float[Tensor, "*shape d_vocab"]:
    """One number for every word of the vocabulary, in float32 at least.

    "unembed": logits through the final norm with a given scale (frozen), as parts of the final stream are read.
    "embed": inner product with each word's input embedding; "cosine": their cosine, which does not favour long vectors.

    Raises `InputError` for another space, or "unembed" without a scale.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> project(model, model.W_E[:3], "cosine").argmax(-1).tolist()
    [0, 1, 2]
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if space == "unembed":
        if scale is None:
            raise InputError("space='unembed' needs scale=, the final norm's scale at the position of the answer.")
        return wide / scale * model.ln_final.weight.to(wide.dtype) @ model.unembed.weight.T.to(wide.dtype)
    if space not in SPACES:
        raise InputError(f"space={space!r}; expected one of {', '.join(SPACES)}.")
    table = model.W_E.to(wide.dtype)
    if space == "embed":
        return wide @ table.T
    return torch.nn.functional.normalize(wide, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
