"""A second kept run that shares the beginning of a first: the same prompts with other embeddings from some position on.

Attention is causal, so what lies before the first changed embedding is as it was. Where an image comes first and only
words after it are changed, the second run costs a few positions instead of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hooked_llava.replay.kept_run import KeptRun
from hooked_llava.replay.layer_pass import recordable, recorded
from hooked_llava.replay.plan import PlannedRun
from hooked_llava.replay.state import ReplayState

EMBEDDINGS = ("hook_embed", "hook_text_embed")
"""The hooks that a branch may change: after them nothing but the model itself makes up the run."""
_KEPT = ("resid_pre", "resid_post", "v")


@torch.no_grad()
def branched_run(state: ReplayState, changes: PlannedRun, keep: Callable[[Tensor], Tensor]) -> KeptRun:
    """The kept run under changes of embeddings, kept as the first is; what lies before the first of them is not run again."""
    kept, start, n_layers = state.kept, changes.start, state.model.cfg.n_layers
    if start is None:
        return kept
    k_name = "k" if state.model.language.rotary is None else "rot_k"
    names = recordable(state, [*_KEPT, k_name])
    _, seen = recorded(state, changes, names, list(range(start, kept.n_positions)))
    table = state.model.hooks_table
    fresh = [seen[table.name("resid_pre", layer)] for layer in range(n_layers)]
    fresh.append(seen[table.name("resid_post", -1)])
    resid = {layer: keep(_joined(old, fresh[layer], start)) for layer, old in kept.resid.items()}
    assert kept.kv is not None
    kv = kept.kv.copied()
    for layer in range(n_layers):
        kv.keep(layer, lambda both: keep(both.clone()))
        k, v = kv.layer(layer)
        k[:, :, start:] = seen[table.name(k_name, layer)].transpose(1, 2).to(k)
        v[:, :, start:] = seen[table.name("v", layer)].transpose(1, 2).to(v)
    return replace(kept, resid=resid, kv=kv)


def _joined(old: Tensor, new: Tensor, start: int) -> Tensor:
    return torch.cat([old[:, :start], new.to(old)], dim=1)
