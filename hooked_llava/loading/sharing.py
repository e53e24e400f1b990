"""Weights of a Hugging Face model in memory, shared without a copy."""

from __future__ import annotations

from torch import nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import TIED, TIED_TO, expected_tensors, our_name
from hooked_llava.errors import CheckpointError
from hooked_llava.loading.checkpoint import set_parameter


def share_weights(module: nn.Module, hf_model: nn.Module, config: LLaVAConfig) -> None:
    """Give a module parameters of its own on the storage of a `LlavaForConditionalGeneration`'s.

    Raises `CheckpointError` if the model lacks a tensor or has one of another shape.
    """
    given = {our_name(name, config): parameter.detach() for name, parameter in hf_model.state_dict().items()}
    for name, shape in expected_tensors(config).items():
        if name not in given or tuple(given[name].shape) != shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise CheckpointError(
                f"The model's {name!r} has shape {found}; its config calls for {shape}. Pass a "
                "LlavaForConditionalGeneration whose layers are those that its config describes."
            )
        set_parameter(module, name, nn.Parameter(given[name], requires_grad=False))
    if config.language.tied_embeddings:
        set_parameter(module, TIED, module.get_parameter(TIED_TO))
