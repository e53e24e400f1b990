"""Small checkpoints on disk, written by hand in each layout, and a module that stands for the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import expected_tensors

LAYOUTS = {
    "as in memory": [],
    "in memory with vision_model": [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")],
    "as written by transformers 5": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ],
    "as on the hub": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
    ],
}


def state_in(layout: str, model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of a layout; a tied head is left out, as on disk."""
    state = {}
    for name, tensor in model.named_parameters():
        for pattern, replacement in LAYOUTS[layout]:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor.detach().clone()
    return state


def write(
    folder: Path, model: LlavaForConditionalGeneration, *, layout: str = "as on the hub", shards: int = 1
) -> Path:
    """A checkpoint folder of the given layout, in one file or sharded."""
    return write_state(folder, model.config, state_in(layout, model), shards=shards)


def write_state(folder: Path, config: LlavaConfig, state: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def blank_module(config: LLaVAConfig) -> nn.Module:
    """Modules and parameters under our names, on the meta device: what the loader knows of a model."""
    root = nn.Module()
    for name, shape in expected_tensors(config).items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    if config.language.tied_embeddings:
        root.get_submodule("language").add_module("unembed", nn.Module())
        unembed = root.get_submodule("language.unembed")
        unembed.register_parameter("weight", root.get_parameter("language.embed.weight"))
    return root
