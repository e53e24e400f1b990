"""Tokens -> text, and text -> tokens: what the vocabulary calls its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.checks import as_index, is_whole_number, whole_number
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def decode_tokens(model: HookedLLaVA, ids: Int[Tensor, "*shape"]) -> np.ndarray:
    """Each token as a string, in an array of the same shape; "#17" for an id that no tokenizer, or not this model's, knows."""
    flat = ids.reshape(-1).tolist()
    if model.processor is None:
        names = [f"#{i}" for i in flat]
    else:
        names = [model.tokenizer.decode([i], clean_up_tokenization_spaces=False) or _unspoken(model, i) for i in flat]
    return np.array(names, dtype=object).reshape(tuple(ids.shape)).astype(str)


def _unspoken(model: HookedLLaVA, token: int) -> str:
    """What stands for a token that decodes to nothing: "" where the tokenizer has it (a lone space), else its number."""
    return "" if model.tokenizer.convert_ids_to_tokens([token])[0] is not None else f"#{token}"


def decode_text(model: HookedLLaVA, ids: Sequence[int]) -> str:
    """Token ids as text; "#17 #4" for a model without a tokenizer."""
    if len(ids) == 1 or model.processor is None:
        return " ".join(decode_tokens(model, torch.tensor(list(ids))).tolist())
    return str(model.to_string(list(ids)))


def token_names(model: HookedLLaVA, ids: Sequence[int]) -> list[str]:
    """Each token as the vocabulary writes it ("▁red", "Ġred"); "#17" for an id that no tokenizer, or not this model's, knows."""
    if model.processor is None:
        return [f"#{i}" for i in ids]
    found = model.tokenizer.convert_ids_to_tokens(list(ids))
    return [f"#{i}" if name is None else str(name) for i, name in zip(ids, found, strict=True)]


def check_k(model: HookedLLaVA, k: int) -> None:
    """Raise `InputError` unless the vocabulary has k words."""
    d_vocab = model.cfg.d_vocab
    whole_number(k, "k", least=1, most=d_vocab, of=" words", expected=f"1 to {d_vocab}, the size of the vocabulary")


def token_id(model: HookedLLaVA, token: str | SupportsIndex) -> int:
    """Id of a word that is a single token, or of an id within the vocabulary (any integer); raises `InputError`."""
    if isinstance(token, str):
        return model.to_single_token(token)
    if not is_whole_number(token):
        raise InputError(f"{token!r} is no token; expected a word, or a token id that is a whole number.")
    says = f"Token id {token} is not in the vocabulary"
    return as_index(token, model.cfg.d_vocab, "token", says=says, from_end=False)
