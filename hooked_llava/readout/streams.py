"""The residual stream of all layers at some positions, in one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.model.cache_hooks import saver
from hooked_llava.prompt.prepare import Inputs

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


@torch.no_grad()
def streams_at(
    model: HookedLLaVA, prompts: Inputs, index: Int[Tensor, "prompt position"]
) -> Float[Tensor, "layer prompt position d_model"]:
    """What enters every layer, and what leaves the last, at each prompt's own positions."""
    names = [*model.hooks_table.resolve("resid_pre"), model.hooks_table.name("resid_post", -1)]
    store: dict[str, Tensor] = {}
    hooks: list[Any] = [(names, saver(store, model.hooks_table, index.cpu()))]
    model.run_with_hooks(prompts, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    return torch.stack([store[name] for name in names])
