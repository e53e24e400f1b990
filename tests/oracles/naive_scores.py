"""Log-probability increase and its kin, written from methods.md 2.1 as loops over single vectors.

Works on the activations that the slow model hands out, and on Hugging Face's weights; nothing of the library is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NaiveScores:
    """S of everything at the last position of one prompt, for one token."""

    def __init__(self, hf: Any, seen: dict[str, Tensor], token: int, at: int = -1) -> None:
        self.hf, self.seen, self.token, self.at = hf, seen, token, at
        text = hf.config.text_config
        self.n_layers, self.n_heads = text.num_hidden_layers, text.num_attention_heads
        self.group = self.n_heads // text.num_key_value_heads
        norm = hf.model.language_model.norm
        self.weight, self.bias, self.unembed = norm.weight, getattr(norm, "bias", None), hf.lm_head.weight
        final = self.centered(seen[f"blocks.{self.n_layers - 1}.hook_resid_post"][0, at])
        self.sigma = ((final * final).mean() + text.rms_norm_eps) ** 0.5

    def centered(self, u: Tensor) -> Tensor:
        """A LayerNorm (a norm with a bias) subtracts the mean."""
        return u if self.bias is None else u - u.sum() / len(u)

    def part(self, u: Tensor) -> Tensor:
        """The logits that a part of the stream gives: all of them sum to the model's, less the bias's."""
        return self.unembed @ (self.centered(u) / self.sigma * self.weight)

    def lens(self, u: Tensor) -> Tensor:
        return self.part(u) + (0 if self.bias is None else self.unembed @ self.bias)

    def log_p(self, u: Tensor) -> float:
        logits = self.lens(u)
        return float(logits[self.token] - torch.log(torch.exp(logits - logits.max()).sum()) - logits.max())

    def increase(self, v: Tensor, u: Tensor) -> float:
        return self.log_p(u + v) - self.log_p(u)

    def stream(self, layer: int) -> Tensor:
        return self.seen[f"blocks.{layer}.hook_resid_pre"][0, self.at]

    def layer(self, layer: int) -> list[float]:
        attention = self.seen[f"blocks.{layer}.hook_attn_out"][0, self.at]
        mlp = self.seen[f"blocks.{layer}.hook_mlp_out"][0, self.at]
        x = self.stream(layer)
        return [self.increase(attention, x), self.increase(mlp, x + attention)]

    def head(self, layer: int, head: int) -> float:
        return self.increase(self.seen[f"blocks.{layer}.attn.hook_result"][0, self.at, head], self.stream(layer))

    def neuron_output(self, layer: int, neuron: int) -> Tensor:
        """m_n times the neuron's column of the output weights."""
        down = self.hf.model.language_model.layers[layer].mlp.down_proj.weight
        return self.seen[f"blocks.{layer}.mlp.hook_post"][0, self.at, neuron] * down[:, neuron]

    def neuron(self, layer: int, neuron: int) -> float:
        attention = self.seen[f"blocks.{layer}.hook_attn_out"][0, self.at]
        return self.increase(self.neuron_output(layer, neuron), self.stream(layer) + attention)

    def message(self, layer: int, head: int, key: int) -> Tensor:
        attention = self.hf.model.language_model.layers[layer].self_attn
        d_head = attention.head_dim
        W_O = attention.o_proj.weight[:, head * d_head : (head + 1) * d_head].T
        pattern = self.seen[f"blocks.{layer}.attn.hook_pattern"][0, head, self.at, key]
        value = self.seen[f"blocks.{layer}.attn.hook_v"][0, key, head // self.group]
        return pattern * (value @ W_O)

    def position(self, layer: int, head: int, key: int) -> float:
        return self.increase(self.message(layer, head, key), self.stream(layer))

    def position_of_layer(self, layer: int, key: int) -> float:
        summed = sum(self.message(layer, head, key) for head in range(self.n_heads))
        return self.increase(summed, self.stream(layer))


def rollout(patterns: list[Tensor], keep: float, pass_on: float) -> Tensor:
    """(keep I + pass_on A_L) ... (keep I + pass_on A_1), whole matrices [pos, pos]."""
    n = len(patterns[0])
    product = torch.eye(n, dtype=patterns[0].dtype)
    for pattern in patterns:
        product = (keep * torch.eye(n, dtype=pattern.dtype) + pass_on * pattern) @ product
    return product
