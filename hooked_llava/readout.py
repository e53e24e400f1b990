"""Vectors -> words: reading a residual stream through the unembedding.

Three lenses are in use, and papers differ in which: `final` applies the final norm to the vector itself, `frozen` the
final norm with the scale that the actual final stream had (so that parts add up to the logits), `none` no norm at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

Lens = Literal["final", "frozen", "none"]
_CHUNK = 2**24  # logits held at once


def lens(
    model: HookedLLaVA,
    vectors: Float[Tensor, "*shape d_model"],
    *,
    norm: Lens = "final",
    scale: Float[Tensor, "*scale 1"] | None = None,
) -> Float[Tensor, "*shape d_vocab"]:
    """Logits that vectors of the residual stream stand for.

    Args:
        model: the model whose final norm and unembedding are used; its hooks do not fire.
        vectors: in the residual stream.
        norm: "final": (u / rms(u) * weight) W_U; "frozen": (u / scale * weight) W_U; "none": u W_U.
        scale: for "frozen", `ln_final.hook_scale` of the position that the answer is read at.

    Raises `InputError` for an unknown norm, or "frozen" without a scale.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> bool((lens(model, model.W_E[:2], norm="none") == model.W_E[:2] @ model.W_U).all())
    True
    """
    if norm == "final":
        return model.unembed(model.ln_final.fused(vectors))
    if norm == "none":
        return model.unembed(vectors)
    if norm != "frozen":
        raise InputError(f"norm={norm!r} is no lens; expected 'final', 'frozen' or 'none'.")
    if scale is None:
        raise InputError("norm='frozen' needs scale=, the final norm's scale at the position of the answer.")
    return model.unembed((vectors / scale).to(vectors.dtype) * model.ln_final.weight)


def top_tokens(
    model: HookedLLaVA, vectors: Float[Tensor, "*shape d_model"], k: int, *, norm: Lens = "final"
) -> tuple[Float[Tensor, "*shape k"], Int[Tensor, "*shape k"]]:
    """The k most probable tokens of each vector and their probabilities, without holding all logits at once."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    per_chunk = max(1, _CHUNK // model.cfg.d_vocab)
    found = [lens(model, chunk, norm=norm).float().softmax(-1).topk(k, dim=-1) for chunk in rows.split(per_chunk)]
    shape = (*vectors.shape[:-1], k)
    return torch.cat([f.values for f in found]).reshape(shape), torch.cat([f.indices for f in found]).reshape(shape)


def words(model: HookedLLaVA, ids: Int[Tensor, "*shape"]) -> np.ndarray:
    """Each token as a string, in an array of the same shape; "#17" for a model without a tokenizer."""
    flat = ids.reshape(-1).tolist()
    if model.processor is None:
        names = [f"#{i}" for i in flat]
    else:
        names = [model.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in flat]
    return np.array(names, dtype=object).reshape(tuple(ids.shape)).astype(str)


def token_id(model: HookedLLaVA, token: str | int) -> int:
    """Id of a word that is a single token, or of an id within the vocabulary; raises `InputError`."""
    if isinstance(token, str):
        return model.to_single_token(token)
    if not 0 <= token < model.cfg.d_vocab:
        raise InputError(f"Token id {token} is not in the vocabulary; expected 0..{model.cfg.d_vocab - 1}.")
    return int(token)
