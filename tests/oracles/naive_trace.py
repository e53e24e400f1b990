"""Causal tracing the slow and plain way: two prompts, hooks that overwrite, one full forward pass for each cell.

Written from the definition (Meng et al. 2022; Basu et al. 2024): nothing is shared between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HOOKS = {"mlp": "hook_mlp_out", "attn": "hook_attn_out", "resid": "hook_resid_post"}


def embeddings(model: Any, prompt: Any) -> Tensor:
    """What enters block 0."""
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt, names_filter="hook_embed")
    return cache["hook_embed"]


def trace_naively(
    model: Any, prompt: Any, corrupted: Tensor, cells: Sequence[tuple[str, Sequence[int], int]], read: Any = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the clean run, of the run whose block 0 gets `corrupted`, and of that run with each cell restored.

    They are the last position's, or those of others.
    A cell is (kind, layers restored together, position).
    """
    names = [f"blocks.{i}.{hook}" for i in range(model.cfg.n_layers) for hook in HOOKS.values()]
    with torch.no_grad():
        clean_logits, clean = model.run_with_cache(prompt, names_filter=names)

        def corrupt(tensor: Tensor, hook: Any) -> Tensor:
            return corrupted.clone()

        start = [("hook_embed", corrupt)]
        corrupted_logits = model.run_with_hooks(prompt, fwd_hooks=start)
        rows = []
        for kind, layers, position in cells:

            def restore(tensor: Tensor, hook: Any, position: int = position) -> Tensor:
                tensor[:, position] = clean[hook.name][:, position]
                return tensor

            hooks = [(f"blocks.{layer}.{HOOKS[kind]}", restore) for layer in layers]
            rows.append(model.run_with_hooks(prompt, fwd_hooks=start + hooks)[0, read])
    return clean_logits[0, read], corrupted_logits[0, read], torch.stack(rows)


@torch.no_grad()
def trace_in_transformers(
    hf_model: Any, clean: dict[str, Tensor], other: dict[str, Tensor], cells: Sequence[tuple[str, int, int]]
) -> tuple[float, float, list[float]]:
    """P of the clean prompt's most probable next token: there, after another prompt of the same length, and after that with a
    module's output at one position (kind, layer, position) overwritten by what it was in the clean run.
    """
    layers = hf_model.model.language_model.layers
    parts = {"mlp": lambda block: block.mlp, "attn": lambda block: block.self_attn, "resid": lambda block: block}

    def run(prompt: dict[str, Tensor], cell: tuple[str, int, int], kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        kind, layer, position = cell

        def hook(module: Any, given: Any, out: Any) -> Any:
            value = (out[0] if isinstance(out, tuple) else out).clone()
            seen.append(value[0, position])
            if kept is None:
                return out
            value[0, position] = kept
            return (value, *out[1:]) if isinstance(out, tuple) else value

        handle = parts[kind](layers[layer]).register_forward_hook(hook)
        p = hf_model(**prompt).logits[0, -1].softmax(-1)
        handle.remove()
        return p, seen[0].clone()

    p_clean, _ = run(clean, cells[0])
    answer = int(p_clean.argmax())
    p_other, _ = run(other, cells[0])
    restored = [float(run(other, cell, run(clean, cell)[1])[0][answer]) for cell in cells]
    return float(p_clean[answer]), float(p_other[answer]), restored
