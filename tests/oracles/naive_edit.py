"""Editing the slow and plain way, on Hugging Face's model: full forwards, torch's Adam, dense inverses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def down_proj(hf_model: Any, layer: int) -> Any:
    mlp = hf_model.model.language_model.layers[layer].mlp
    return mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj  # Phi's name for it


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
    size: Tensor | None = None,
) -> Tensor:
    """delta by Adam on -log P(target) + weight_decay |delta| / |z|^2, cut to clamp |z| after every step.

    z is the MLP's output, unless its length is given.
    """
    values = [
        key_and_value(hf_model, prompt, layer, position)[1] for prompt, position in zip(prompts, positions, strict=True)
    ]
    size = torch.stack(values).mean(0).norm() if size is None else size
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


@contextmanager
def _added(hf_model: Any, layer: int, position: int, delta: Tensor) -> Iterator[None]:
    """delta added to an MLP's output at one position."""

    def add(module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        mask = torch.zeros(out.shape[1], 1)
        mask[position] = 1.0
        return out + mask * delta

    handle = down_proj(hf_model, layer).register_forward_hook(add)
    yield
    handle.remove()


def log_probability(
    hf_model: Any, prompt: dict[str, Tensor], target: list[int], layer: int, position: int, delta: Tensor
) -> Tensor:
    """log P(target | prompt) with delta added to an MLP's output at one position."""

    ids = torch.cat([prompt["input_ids"], torch.tensor([target])], dim=1)
    with _added(hf_model, layer, position, delta):
        logits = hf_model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    first = prompt["input_ids"].shape[1] - 1
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[first + i, token] for i, token in enumerate(target)]).sum()


def released_rome_value(
    hf_model: Any,
    prompts: list[dict[str, Tensor]],
    positions: list[int],
    essence: dict[str, Tensor],
    essence_position: int,
    target: list[int],
    layer: int,
    *,
    evaluations: int = 20,
) -> Tensor:
    """delta as ROME's released code finds it: compute_v.py, with its settings for GPT-2 XL; the plain prompt comes first."""
    value = key_and_value(hf_model, prompts[0], layer, positions[0])[1]
    delta = torch.zeros_like(value, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.5)
    before = None
    for evaluation in range(evaluations):
        nll = torch.tensor(0.0)
        for prompt, position in zip(prompts, positions, strict=True):
            nll = nll - log_probability(hf_model, prompt, target, layer, position, delta) / len(target)
        with _added(hf_model, layer, essence_position, delta):
            now = hf_model(**essence).logits[0, essence_position].log_softmax(-1)
        before = now.detach() if before is None else before
        kl = sum(now[i].exp() * (now[i] - before[i]) for i in range(len(now)))
        loss = nll / len(prompts) + 0.0625 * kl + 0.5 * delta.norm() / value.norm() ** 2
        if loss < 0.05 or evaluation == evaluations - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > 4 * value.norm():
                delta.mul_(4 * value.norm() / delta.norm())
    return delta.detach()


def released_rome_weight(weight: Tensor, keys: Tensor, delta: Tensor, covariance: Tensor) -> Tensor:
    """W + delta u^T / (k u), u = C^-1 times the mean of all keys, k the first of them, that of the plain prompt."""
    w, k = weight.double(), keys.double()
    u = torch.linalg.inv(covariance.double()) @ (sum(k) / len(k))
    u = u / u.norm()
    return w + torch.outer(delta.double(), u) / (k[0] @ u)


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


@torch.no_grad()
def memit_changes(
    hf_model: Any,
    prompts: list[dict[str, Tensor]],
    positions: list[int],
    targets: list[Tensor],
    layers: list[int],
    moments: list[Tensor],
    lam: float,
) -> list[Tensor]:
    """Algorithm 1 of 2210.07229: the update of each layer's matrix [out, in]; targets are z_i, and moments E[k k^T].

    Layer after layer in place, each prompt by itself, the normal equations solved column by column in float64.
    """
    before, changes = [down_proj(hf_model, layer).weight.clone() for layer in layers], []
    for i, (layer, moment) in enumerate(zip(layers, moments, strict=True)):
        left_side = lam * moment.double()
        right_side = torch.zeros(len(moment), len(targets[0]), dtype=torch.float64)
        for prompt, position, z in zip(prompts, positions, targets, strict=True):
            key = key_and_value(hf_model, prompt, layer, position)[0].double()
            missing = z.double() - leaving(hf_model, prompt, layers[-1], position).double()
            left_side = left_side + torch.outer(key, key)
            right_side += torch.outer(key, missing / (len(layers) - i))
        columns = [torch.linalg.solve(left_side, column) for column in right_side.T]
        changes.append(torch.stack(columns))
        down_proj(hf_model, layer).weight += changes[-1].float()
    for layer, weight in zip(layers, before, strict=True):
        down_proj(hf_model, layer).weight.copy_(weight)
    return changes


@torch.no_grad()
def leaving(hf_model: Any, prompt: dict[str, Tensor], layer: int, position: int) -> Tensor:
    """The residual stream that leaves a layer at a position of the only prompt."""
    seen: list[Tensor] = []

    def save(module: Any, given: tuple[Tensor, ...], out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out)[0, position].clone())

    handle = hf_model.model.language_model.layers[layer].register_forward_hook(save)
    hf_model(**prompt)
    handle.remove()
    return seen[0]


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
