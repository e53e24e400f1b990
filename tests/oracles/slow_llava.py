"""LLaVA's forward pass written from the formulas, one head at a time, on the weights of a Hugging Face model.

It knows nothing of hooked_llava: no fused kernels, no cache, no classes shared with it. Every activation passes
through `point`, where a function may replace it, so an edit made by a hook has something independent to be held
against. The names are those of the hook table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Edits = dict[str, Callable[[Tensor], Tensor]]
"""For each hook's name, what to make of the activation there."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


class SlowLLaVA:
    """The three parts of a LLaVA as loops over layers and heads; `run` gives every activation by name."""

    def __init__(self, hf_model: Any) -> None:
        self.config = hf_model.config
        self.weights = {name.removeprefix("model."): w.detach() for name, w in hf_model.state_dict().items()}
        if self.config.tie_word_embeddings:
            self.weights["lm_head.weight"] = self.weights["language_model.embed_tokens.weight"]
        self.dtype = self.weights["lm_head.weight"].dtype

    def run(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        edits: Edits | None = None,
    ) -> dict[str, Tensor]:
        """Every activation of one forward pass under its hook's name, `edits` applied where they are named."""
        self.edits, self.seen = dict(edits or {}), {}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embedding = self.weights["language_model.embed_tokens.weight"]
        stream = self.point("hook_text_embed", embedding[input_ids]).clone()
        if pixel_values is not None:
            features = self.point("hook_image_embed", self.projector(self.vision(pixel_values.to(self.dtype))))
            stream[input_ids == self.config.image_token_id] = features.flatten(0, 1)
        stream = self.language(self.point("hook_embed", stream), mask.bool(), position_ids)
        final = self.norm("ln_final", "language_model.norm", stream, self.config.text_config.rms_norm_eps)
        self.point("hook_logits", final @ self.weights["lm_head.weight"].T)
        left = set(self.edits) - set(self.seen)
        assert not left, f"edits that never applied: {left}"
        return self.seen

    def point(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.edits:
            tensor = self.edits[name](tensor.clone())
        self.seen[name] = tensor.clone()
        return tensor

    # ------------------------------------------------------------------ the three parts

    def vision(self, pixels: Tensor) -> Tensor:
        config, root = self.config.vision_config, "vision_tower."
        if not any(name.startswith("vision_tower.embeddings") for name in self.weights):
            root = "vision_tower.vision_model."
        kernel = self.weights[root + "embeddings.patch_embedding.weight"]  # (d_model, channel, height, width)
        side, n = config.patch_size, config.image_size // config.patch_size
        patches = [
            torch.einsum("nchw,dchw->nd", pixels[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side], kernel)
            for r in range(n)
            for c in range(n)
        ]
        embedded = self.point("vision.hook_patch_embed", torch.stack(patches, dim=1))
        positions = self.weights[root + "embeddings.position_embedding.weight"]
        positions = self.point("vision.hook_pos_embed", torch.stack([positions] * len(pixels)))
        class_token = torch.stack([self.weights[root + "embeddings.class_embedding"][None]] * len(pixels))
        stream = torch.cat([class_token, embedded], dim=1) + positions
        stream = self.norm("vision.ln_pre", root + "pre_layrnorm", stream, config.layer_norm_eps)
        states = [self.point("vision.hook_embed", stream)]
        everything = torch.ones(len(pixels), n * n + 1, n * n + 1, dtype=torch.bool)
        n_states = config.num_hidden_layers + 1
        chosen = self.config.vision_feature_layer
        chosen = [i % n_states for i in (chosen if isinstance(chosen, list) else [chosen])]
        for layer in range(max(chosen)):
            hf = f"{root}encoder.layers.{layer}."
            names = {"ln1": "layer_norm1", "ln2": "layer_norm2", "output": "self_attn.out_proj"}
            states.append(
                self.block(
                    f"vision.blocks.{layer}.",
                    {short: hf + long for short, long in names.items()}
                    | {"attn": hf + "self_attn.", "mlp": hf + "mlp."},
                    states[-1],
                    everything,
                    n_heads=config.num_attention_heads,
                    n_kv_heads=config.num_attention_heads,
                    eps=config.layer_norm_eps,
                    act=config.hidden_act,
                )
            )
        features = torch.cat([states[i] for i in chosen], dim=-1)
        default = self.config.vision_feature_select_strategy == "default"
        return self.point("vision.hook_out", features[:, 1:] if default else features)

    def projector(self, features: Tensor) -> Tensor:
        root = "multi_modal_projector."
        pre = self.point("projector.hook_pre", self.linear(root + "linear_1", features))
        post = self.point("projector.hook_post", _ACTIVATIONS[self.config.projector_hidden_act](pre))
        return self.point("projector.hook_out", self.linear(root + "linear_2", post))

    def language(self, stream: Tensor, mask: Tensor, position_ids: Tensor | None) -> Tensor:
        config = self.config.text_config
        n_batch, n_pos = mask.shape
        allowed = torch.zeros(n_batch, n_pos, n_pos, dtype=torch.bool)
        for b in range(n_batch):
            for query in range(n_pos):
                for key in range(query + 1):
                    allowed[b, query, key] = mask[b, key]
        if position_ids is None:
            position_ids = torch.tensor([[max(0, int(row[: p + 1].sum()) - 1) for p in range(n_pos)] for row in mask])
        self.positions = position_ids
        for layer in range(config.num_hidden_layers):
            hf = f"language_model.layers.{layer}."
            names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "output": "self_attn.o_proj"}
            stream = self.block(
                f"blocks.{layer}.",
                {short: hf + long for short, long in names.items()} | {"attn": hf + "self_attn.", "mlp": hf + "mlp."},
                stream,
                allowed,
                n_heads=config.num_attention_heads,
                n_kv_heads=config.num_key_value_heads,
                eps=config.rms_norm_eps,
                act=config.hidden_act,
                rotary=True,
            )
        return stream

    # ------------------------------------------------------------------ the parts of a block

    def block(
        self, name: str, hf: dict[str, str], stream: Tensor, allowed: Tensor, *, eps: float, act: str, **heads: Any
    ) -> Tensor:
        stream = self.point(name + "hook_resid_pre", stream)
        attn_out = self.attention(name, hf, stream, allowed, eps, **heads)
        middle = self.point(name + "hook_resid_mid", stream + self.point(name + "hook_attn_out", attn_out))
        x = self.norm(name + "ln2", hf["ln2"], self.point(name + "hook_mlp_in", middle), eps)
        if hf["mlp"] + "gate_proj.weight" in self.weights:
            gate = self.point(name + "mlp.hook_pre", self.linear(hf["mlp"] + "gate_proj", x))
            up = self.point(name + "mlp.hook_pre_linear", self.linear(hf["mlp"] + "up_proj", x))
            post, down = _ACTIVATIONS[act](gate) * up, "down_proj"
        else:
            post, down = _ACTIVATIONS[act](self.point(name + "mlp.hook_pre", self.linear(hf["mlp"] + "fc1", x))), "fc2"
        post = self.point(name + "mlp.hook_post", post)
        mlp_out = self.point(name + "hook_mlp_out", self.linear(hf["mlp"] + down, post))
        return self.point(name + "hook_resid_post", middle + mlp_out)

    def attention(
        self,
        name: str,
        hf: dict[str, str],
        stream: Tensor,
        allowed: Tensor,
        eps: float,
        *,
        n_heads: int,
        n_kv_heads: int,
        rotary: bool = False,
    ) -> Tensor:
        x = self.norm(name + "ln1", hf["ln1"], stream, eps)
        q = self.heads(name, "q", hf, stream, x, n_heads, eps)
        k = self.heads(name, "k", hf, stream, x, n_kv_heads, eps)
        v = self.heads(name, "v", hf, stream, x, n_kv_heads, eps)
        if rotary:
            q, k = (
                self.point(name + "attn.hook_rot_q", self.rotate(q)),
                self.point(name + "attn.hook_rot_k", self.rotate(k)),
            )
        d_head, group = q.shape[-1], n_heads // n_kv_heads
        scores = torch.stack(
            [torch.einsum("bqd,bkd->bqk", q[:, :, h], k[:, :, h // group]) / math.sqrt(d_head) for h in range(n_heads)],
            1,
        )
        scores = self.point(name + "attn.hook_attn_scores", scores.masked_fill(~allowed[:, None], -torch.inf))
        exponential = torch.where(scores == -torch.inf, 0.0, (scores - scores.amax(-1, keepdim=True)).exp())
        total = exponential.sum(-1, keepdim=True)
        pattern = torch.where(total > 0, exponential / total, 0.0)
        pattern = self.point(name + "attn.hook_pattern", pattern)
        z = torch.stack([torch.einsum("bqk,bkd->bqd", pattern[:, h], v[:, :, h // group]) for h in range(n_heads)], 2)
        z = self.point(name + "attn.hook_z", z)
        output = self.weights[hf["output"] + ".weight"]  # (d_model, head x d_head)
        result = [z[:, :, h] @ output[:, h * d_head : (h + 1) * d_head].T for h in range(n_heads)]
        total = self.point(name + "attn.hook_result", torch.stack(result, 2)).sum(2)
        bias = self.weights.get(hf["output"] + ".bias")
        return total if bias is None else total + bias

    def heads(
        self, name: str, letter: str, hf: dict[str, str], stream: Tensor, x: Tensor, n_heads: int, eps: float
    ) -> Tensor:
        """Queries, keys or values; each head normalizes its own copy of the stream if that copy was replaced."""
        point = f"{name}attn.hook_{letter}_input"
        copies = self.point(point, torch.stack([stream] * n_heads, dim=2))
        weight, bias = (self.weights.get(f"{hf['attn']}{letter}_proj.{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        d_head = len(weight) // n_heads
        out = []
        for h in range(n_heads):
            rows = slice(h * d_head, (h + 1) * d_head)
            own = self.plain_norm(hf["ln1"], copies[:, :, h], eps)[2] if point in self.edits else x
            out.append(own @ weight[rows].T + (0 if bias is None else bias[rows]))
        return self.point(f"{name}attn.hook_{letter}", torch.stack(out, dim=2))

    def norm(self, name: str, hf: str, x: Tensor, eps: float) -> Tensor:
        scale, centered, _ = self.plain_norm(hf, x, eps)
        normalized = self.point(name + ".hook_normalized", centered / self.point(name + ".hook_scale", scale))
        out = normalized * self.weights[hf + ".weight"]
        return out + self.weights[hf + ".bias"] if hf + ".bias" in self.weights else out

    def plain_norm(self, hf: str, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, what is divided by it, the norm's output): LayerNorm where there is a bias, RMSNorm otherwise."""
        bias = self.weights.get(hf + ".bias")
        centered = x if bias is None else x - x.sum(-1, keepdim=True) / x.shape[-1]
        scale = ((centered * centered).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
        return scale, centered, centered / scale * self.weights[hf + ".weight"] + (0 if bias is None else bias)

    def rotate(self, x: Tensor) -> Tensor:
        """Each pair (j, j + d/2) of dimensions as a complex number, turned by its angle."""
        half = x.shape[-1] // 2
        theta = self.config.text_config.rope_parameters["rope_theta"]
        speeds = theta ** -(torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(()).double(), self.positions[..., None].double() * speeds)[:, :, None]
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out
