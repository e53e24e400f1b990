"""A circuit run block by block: every reader's input is summed up from what each sender wrote, in this run or in the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.oracles.slow_llava import SlowLLaVA


def circuit_logits(slow: SlowLLaVA, clean: Any, corrupted: Any, inside: Callable[[str, str], bool]) -> Tensor:
    """Logits [position, d_vocab] where `inside(sender, receiver)` says which edges carry this run's outputs.

    Senders are "embed", "L0H1" and "L0 mlp", receivers "L1H0 q" (k, v), "L1 mlp" and "logits".
    """
    config = slow.config.text_config
    n_layers, n_heads, n_key_value = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    there = {name: tensor.clone() for name, tensor in slow.run(**corrupted).items()}

    def written(seen: dict[str, Tensor], layer: int, after_heads: bool) -> dict[str, Tensor]:
        """What the senders before a place wrote, each by itself."""
        found = {"embed": seen["hook_embed"]}
        for i in range(layer + after_heads):
            result = seen[f"blocks.{i}.attn.hook_result"]
            found |= {f"L{i}H{h}": result[:, :, h] for h in range(n_heads)}
            if i < layer:
                found[f"L{i} mlp"] = seen[f"blocks.{i}.hook_mlp_out"]
        return found

    def read(receiver: str, layer: int, after_heads: bool = False) -> Tensor:
        mine, other = (written(seen, layer, after_heads) for seen in (slow.seen, there))
        total = torch.stack([mine[s] if inside(s, receiver) else other[s] for s in mine]).sum(0)
        for i in range(layer + after_heads):
            bias = slow.weights.get(f"language_model.layers.{i}.self_attn.o_proj.bias")
            total = total if bias is None else total + bias
        return total

    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer in range(n_layers):
        for kind, n in (("q", n_heads), ("k", n_key_value), ("v", n_key_value)):
            edits[f"blocks.{layer}.attn.hook_{kind}_input"] = lambda _, kind=kind, n=n, layer=layer: torch.stack(
                [read(f"L{layer}H{h} {kind}", layer) for h in range(n)], 2
            )
        edits[f"blocks.{layer}.hook_mlp_in"] = lambda _, layer=layer: read(f"L{layer} mlp", layer, after_heads=True)
    edits[f"blocks.{n_layers - 1}.hook_resid_post"] = lambda _: read("logits", n_layers)
    return slow.run(**clean, edits=edits)["hook_logits"][0]
