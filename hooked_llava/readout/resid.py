"""The residual stream at chosen positions, and the logits there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.machine.devices import to_device
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.prompt.inputs import Inputs

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def rows_at(
    rows: Float[Tensor, "prompt pos width"], positions: Int[Tensor, "prompt position"]
) -> Float[Tensor, "prompt position width"]:
    """The rows at each prompt's own positions; gradients pass.

    >>> rows_at(torch.arange(6.0).reshape(2, 3, 1), torch.tensor([[2], [0]])).flatten().tolist()
    [2.0, 3.0]
    """
    prompt = torch.arange(len(rows), device=rows.device)[:, None]
    return rows[prompt, to_device(positions, rows.device)]


def logits_at(
    model: HookedLLaVA, resid: Float[Tensor, "prompt pos d_model"], positions: Int[Tensor, "prompt position"]
) -> Float[Tensor, "prompt position d_vocab"]:
    """Logits at each prompt's own positions, from the final residual stream; only these positions are unembedded.

    Every analysis reads its logits here. Hooks of the final norm and of the logits fire; gradients pass.
    """
    return model.language.to_logits(rows_at(resid, positions))


def next_token_logits(model: HookedLLaVA, prompts: Inputs) -> Float[Tensor, "prompt d_vocab"]:
    """Logits of the token after each prompt, in one forward pass."""
    resid = model(prompts, stop_at_layer=model.cfg.n_layers)
    return logits_at(model, resid, prompts.last[:, None])[:, 0]


@torch.no_grad()
def logits_and_activations(
    model: HookedLLaVA, prompts: Inputs, positions: Int[Tensor, "prompt position"], names: Sequence[str]
) -> tuple[Float[Tensor, "prompt position d_vocab"], dict[str, Tensor]]:
    """Logits at some positions, and the named activations at all, in one forward pass.

    All positions are unembedded only where `hook_logits` is asked for.
    """
    table, n_layers = model.hooks_table, model.cfg.n_layers
    store: dict[str, Tensor] = {}
    keep = caching_hook(store, model)
    inside = [name for name in names if table[name].stage < n_layers]
    after = [name for name in names if name not in inside]
    resid = model.run_with_hooks(prompts, fwd_hooks=[(inside, keep)] if inside else [], stop_at_layer=n_layers)
    assert resid is not None
    if not after:
        return logits_at(model, resid, positions), store
    with model.hooks([(after, keep)]):
        if "hook_logits" in after:
            return rows_at(model.language.to_logits(resid), positions), store
        normalized = rows_at(model.language.normalized(resid), positions)
        return model.language.unembedded(normalized), store


def resid_names(model: HookedLLaVA) -> list[str]:
    """Full names of what enters every layer, and of what leaves the last."""
    return [*model.hooks_table.resolve("resid_pre"), model.hooks_table.name("resid_post", -1)]


@torch.no_grad()
def resid_by_layer(
    model: HookedLLaVA, prompts: Inputs, positions: Int[Tensor, "prompt position"]
) -> Float[Tensor, "layer prompt position d_model"]:
    """What enters every layer, and what leaves the last, at each prompt's own positions, in one forward pass."""
    names = model.hooks_table.resolve("resid_pre")
    store: dict[str, Tensor] = {}
    hooks = [(names, caching_hook(store, model, positions))]
    final = model.run_with_hooks(prompts, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    assert final is not None
    return torch.stack([*(store[name] for name in names), rows_at(final, positions)])
