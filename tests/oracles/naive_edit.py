"""Editing the slow and plain way, on Hugging Face's model: full forwards, torch's Adam, dense inverses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def down_proj(hf_model: Any, layer: int) -> Any:
    return hf_model.model.language_model.layers[layer].mlp.down_proj


def key_and_value(hf_model: Any, prompt: dict[str, Tensor], layer: int, position: int) -> tuple[Tensor, Tensor]:
    """What enters and what leaves a layer's last matrix at one position of the only prompt."""
    seen: list[Tensor] = []

    def save(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.extend((given[0][0, position].clone(), out[0, position].clone()))

    handle = down_proj(hf_model, layer).register_forward_hook(save)
    with torch.no_grad():
        hf_model(**prompt)
    handle.remove()
    return seen[0], seen[1]


def value_difference(
    hf_model: Any,
    prompts: list[dict[str, Tensor]],
    layer: int,
    positions: list[int],
    target: list[int],
    *,
    steps: int,
    lr: float,
    clamp: float,
    weight_decay: float,
) -> Tensor:
    """delta by Adam on -log P(target) + weight_decay |delta| / |z|^2, cut to clamp |z| after every step."""
    values = [
        key_and_value(hf_model, prompt, layer, position)[1] for prompt, position in zip(prompts, positions, strict=True)
    ]
    size = torch.stack(values).mean(0).norm()
    delta = torch.zeros_like(values[0], requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    for _ in range(steps):
        loss = sum(
            -log_probability(hf_model, prompt, target, layer, position, delta)
            for prompt, position in zip(prompts, positions, strict=True)
        ) / len(prompts)
        # the length has no gradient at 0, where torch gives 0 as well
        loss = loss + weight_decay * delta.norm() / size**2
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > clamp * size:
                delta.mul_(clamp * size / delta.norm())
    return delta.detach()


def log_probability(
    hf_model: Any, prompt: dict[str, Tensor], target: list[int], layer: int, position: int, delta: Tensor
) -> Tensor:
    """log P(target | prompt) with delta added to an MLP's output at one position."""

    def add(module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        mask = torch.zeros(out.shape[1], 1)
        mask[position] = 1.0
        return out + mask * delta

    ids = torch.cat([prompt["input_ids"], torch.tensor([target])], dim=1)
    handle = down_proj(hf_model, layer).register_forward_hook(add)
    logits = hf_model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    handle.remove()
    first = prompt["input_ids"].shape[1] - 1
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[first + i, token] for i, token in enumerate(target)]).sum()


@torch.no_grad()
def greedy_answer(hf_model: Any, prompt: dict[str, Tensor], n: int) -> list[int]:
    """n tokens, each the most probable one after a forward of everything before it."""
    said: list[int] = []
    for _ in range(n):
        said.append(int(_logits_after(hf_model, prompt, said).argmax()))
    return said


@torch.no_grad()
def magnitude(hf_model: Any, prompt: dict[str, Tensor], target: list[int], answer: list[int]) -> float:
    """P(target) - P(answer), each the product over its tokens, one forward for each token."""
    p = {}
    for name, ids in (("target", target), ("answer", answer)):
        p[name] = 1.0
        for i, token in enumerate(ids):
            p[name] *= float(_logits_after(hf_model, prompt, ids[:i]).double().softmax(-1)[token])
    return p["target"] - p["answer"]


def _logits_after(hf_model: Any, prompt: dict[str, Tensor], said: list[int]) -> Tensor:
    ids = torch.cat([prompt["input_ids"], torch.tensor([said], dtype=torch.long)], dim=1)
    return hf_model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]


def updated_weight(
    weight: Tensor, keys: Tensor, values: Tensor, lam: float, covariance: Tensor | None = None
) -> Tensor:
    """argmin over W of lam tr((W - W0) C (W - W0)^T) + sum |W k - z|^2, by the dense normal equations in float64.

    weight is [out, in], keys [n, in], values [n, out]; C is the identity unless given.
    """
    w, k, z = weight.double(), keys.double(), values.double()
    c = torch.eye(w.shape[1], dtype=torch.float64) if covariance is None else covariance.double()
    return (lam * w @ c + z.T @ k) @ torch.linalg.inv(lam * c + k.T @ k)


def rome_weight(weight: Tensor, key: Tensor, value: Tensor, covariance: Tensor) -> Tensor:
    """Equation 2 of 2202.05262: W + (v - W k) (C^-1 k)^T / ((C^-1 k)^T k)."""
    w, k, v = weight.double(), key.double(), value.double()
    direction = torch.linalg.inv(covariance.double()) @ k
    return w + torch.outer(v - w @ k, direction) / (direction @ k)
