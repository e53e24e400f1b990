"""Weights of a Hugging Face model in memory, shared without a copy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.llava import llava_kind
from hooked_llava.architecture.tensors import expected_tensors, our_name
from hooked_llava.errors import CheckpointError
from hooked_llava.loading.packed import PackedWeight
from hooked_llava.loading.placement import check_whole
from hooked_llava.loading.weights import set_parameters


def share_weights(
    module: nn.Module, hf_model: nn.Module, config: LLaVAConfig, packed: Mapping[str, PackedWeight] | None = None
) -> None:
    """Give a module parameters of its own on the storage of a Hugging Face LLaVA model's; `packed` are those in few bits.

    They lie where the model's do, on one device or several. Raises `CheckpointError` if the model lacks a tensor or has one of
    another shape, and `ConfigError` if a block lies on several devices.
    """
    packed = packed or {}
    named = hf_model.named_parameters(remove_duplicate=False)
    given: dict[str | None, Tensor] = {our_name(name, config): parameter.detach() for name, parameter in named}
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name in packed:
            continue  # the shape is among what is packed
        if name not in given or tuple(given[name].shape) != shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise CheckpointError(
                f"The model's {name!r} has shape {found}; its config calls for {shape}. Pass a "
                f"{llava_kind(config.model_type).architecture} whose layers are those that its config describes."
            )
    check_whole({name: given[name].device for name in expected}, "The model that is given")
    set_parameters(module, ((name, packed.get(name, given[name])) for name in expected), config)
