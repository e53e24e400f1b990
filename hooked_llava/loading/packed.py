"""Weights in 8 or 4 bits as files and transformers keep them: the parts of each, by the names that bitsandbytes gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

BITSANDBYTES = "bitsandbytes"
CODES, SCALES, FORMAT = "weight", "SCB", "weight_format"
STATE = "weight.quant_state.bitsandbytes__"
"""How the name of the tensor begins that says in bytes what else there is to say of a weight in 4 bits."""
_PART = re.compile(
    r"(.+)\.(SCB|weight_format|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+))"
)
_Held = TypeVar("_Held")


@dataclass(frozen=True)
class PackedWeight:
    """A weight of few bits.

    Attributes:
        parts (Mapping[str, Tensor]): Its tensors as bitsandbytes names them in the state dict of a linear layer: "weight"
            are the codes, "SCB" the scales of a weight in 8 bits, "weight.absmax" and others those of one in 4 bits.
        dtype (torch.dtype): The dtype that it is read in.
    """

    parts: Mapping[str, Tensor]
    dtype: torch.dtype


@runtime_checkable
class KeepsPacked(Protocol):
    """A linear map that keeps its weight in few bits."""

    bits: ClassVar[int]

    def keep_weight(self, weight: Tensor | PackedWeight) -> None:
        """Take a weight in floating point, which is packed, or one that is packed already."""
        ...


def part_of(name: str) -> tuple[str, str] | None:
    """The weight that a stored tensor belongs to, and which part of it the tensor is; None for any other tensor.

    The codes are no such part: they have the name of the weight itself.

    >>> part_of("lm_head.weight.absmax"), part_of("lm_head.SCB"), part_of("lm_head.weight")
    (('lm_head.weight', 'weight.absmax'), ('lm_head.weight', 'SCB'), None)
    """
    found = _PART.fullmatch(name)
    return None if found is None else (f"{found[1]}.weight", found[2])


def by_weight(named: Iterable[tuple[str, _Held]]) -> dict[str, dict[str, _Held]]:
    """Parts by the weight that they belong to; what belongs to no packed weight is left out."""
    found: dict[str, dict[str, _Held]] = {}
    for name, held in named:
        if (part := part_of(name)) is not None:
            found.setdefault(part[0], {})[part[1]] = held
    return found


def is_bitsandbytes(quantization_config: object) -> bool:
    """Whether the quantization_config of a model or of a config.json is bitsandbytes'; early files name no method.

    >>> is_bitsandbytes({"load_in_8bit": True}), is_bitsandbytes({"quant_method": "gptq"}), is_bitsandbytes(None)
    (True, False, False)
    """
    if not isinstance(quantization_config, Mapping):
        return getattr(quantization_config, "quant_method", None) == BITSANDBYTES
    early = "load_in_8bit" in quantization_config or "load_in_4bit" in quantization_config
    return quantization_config.get("quant_method", BITSANDBYTES if early else None) == BITSANDBYTES


def packed_layers(hf_model: nn.Module) -> dict[str, Any]:
    """The layers of a model whose weight bitsandbytes keeps in 8 or 4 bits, by their paths."""
    return {path: module for path, module in hf_model.named_modules() if _is_packed(module)}


def _is_packed(module: nn.Module) -> bool:
    # by its name, since bitsandbytes takes seconds to import
    kind = type(getattr(module, "weight", None)).__name__
    if kind == "Int8Params":
        return module.weight.dtype == torch.int8
    return kind == "Params4bit" and module.weight.quant_state is not None
