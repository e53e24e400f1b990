"""Vectors of the residual stream in the space of words: by the unembedding, or by the input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.readout.lens import wide

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Space = Literal["unembed", "embed", "cosine"]
SPACES = ("unembed", "embed", "cosine")


def project(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    space: Space,
    scale: Float[Tensor, "1"] | None = None,
    *,
    bias: bool = False,
) -> Float[Tensor, "*shape d_vocab"]:
    """One number for every word of the vocabulary, in float32 at least.

    "unembed": logits through the final norm with a given scale (frozen), as parts of the final stream are read; with
    `bias` as the whole stream is, with a LayerNorm's bias.
    "embed": inner product with each word's input embedding; "cosine": their cosine, which does not favour long vectors.

    Raises `InputError` for another space, or "unembed" without a scale.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> project(model, model.W_E[:3], "cosine").argmax(-1).tolist()
    [0, 1, 2]
    """
    rows = wide(vectors)
    if space == "unembed":
        if scale is None:
            raise InputError("space='unembed' needs scale=, the final norm's scale at the position of the answer.")
        return model.ln_final.frozen(rows, scale, bias=bias) @ model.unembed.weight.T.to(rows.dtype)
    check_spaces([space])
    table = model.W_E.to(rows.dtype)
    if space == "embed":
        return rows @ table.T
    return torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T


def check_spaces(spaces: Sequence[str]) -> None:
    """Raise `InputError` for a space that there is not."""
    for space in spaces:
        one_of(space, SPACES, "space", expected=f"one of {', '.join(SPACES)}")
