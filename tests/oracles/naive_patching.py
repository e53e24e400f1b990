"""Patching the slow and plain way: hooks that save and overwrite, and one full forward pass for each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Metric = Callable[[Tensor], Tensor]


def activations(model: Any, inputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What passes through some hooks on the whole prompt."""
    held: dict[str, Tensor] = {}

    def save(tensor: Tensor, hook: Any) -> None:
        held[hook.name] = tensor.detach().clone()

    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(name, save) for name in names])
    return held


def patch_cells(
    model: Any, source: Any, base: Any, name: str, cells: Sequence[tuple[Any, ...]], metric: Metric
) -> list[float]:
    """The metric of the base run with tensor[cell] taken from the source run, for each cell."""
    there = activations(model, source, [name])[name]
    values = []
    for cell in cells:

        def overwrite(tensor: Tensor, hook: Any, cell: tuple[Any, ...] = cell) -> Tensor:
            tensor[cell] = there[cell]
            return tensor

        with torch.no_grad():
            values.append(float(metric(model.run_with_hooks(base, fwd_hooks=[(name, overwrite)])[0, -1])))
    return values


def outputs_of(model: Any, inputs: Any) -> dict[str, Tensor]:
    """What every attention, head and MLP adds to the stream."""
    kinds = ("hook_attn_out", "hook_mlp_out", "attn.hook_result")
    return activations(model, inputs, [f"blocks.{i}.{kind}" for i in range(model.cfg.n_layers) for kind in kinds])


def patch_path(
    model: Any,
    base: Any,
    there: dict[str, Tensor],
    here: dict[str, Tensor],
    sender: tuple[int, int | None],
    receiver: Any,
    positions: Sequence[int],
    metric: Metric,
    read: int | Sequence[int] = -1,
) -> float:
    """Path patching in two passes: all else frozen while the sender speaks, then the receiver alone is replaced.

    `there` and `here` are `outputs_of` the source and the base prompt.
    """
    outputs = [name for name in here if name.endswith("_out")]
    layer, head = sender
    spoken = f"blocks.{layer}.hook_{'mlp' if head is None else 'attn'}_out"
    result = f"blocks.{layer}.attn.hook_result"
    change = there[spoken] - here[spoken] if head is None else (there[result] - here[result])[:, :, head]

    def freeze(tensor: Tensor, hook: Any) -> Tensor:
        frozen = here[hook.name].clone()
        if hook.name == spoken:
            frozen[:, positions] += change[:, positions]
        return frozen

    heard: dict[str, Tensor] = {}

    def listen(tensor: Tensor, hook: Any) -> None:
        heard[hook.name] = tensor.clone()

    kind, to, *of = receiver if isinstance(receiver, tuple) else ("logits", None)
    name = f"blocks.{to}.mlp.hook_post" if kind == "mlp" else f"blocks.{to}.attn.hook_{kind}"
    listeners = [] if kind == "logits" else [(name, listen)]

    def replace(tensor: Tensor, hook: Any) -> Tensor:
        if kind == "mlp":
            return heard[name]
        tensor[:, :, of[0]] = heard[name][:, :, of[0]]
        return tensor

    with torch.no_grad():
        logits = model.run_with_hooks(base, fwd_hooks=[*((n, freeze) for n in outputs), *listeners])
        if kind != "logits":
            logits = model.run_with_hooks(base, fwd_hooks=[(name, replace)])
    return float(metric(logits[0, read]))


def gradient_at(model: Any, inputs: Any, name: str, metric: Metric, read: int | Sequence[int] = -1) -> Tensor:
    """Gradient of the metric at one activation, which is cut off from what it came from."""
    leaves = []

    def cut(tensor: Tensor, hook: Any) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[0]

    with torch.enable_grad():
        metric(model.run_with_hooks(inputs, fwd_hooks=[(name, cut)])[0, read]).backward()
    return leaves[0].grad


def gradient_at_copies(model: Any, inputs: Any, name: str, metric: Metric, entering: Tensor | None = None) -> Tensor:
    """Gradient of the metric at each head's own copy of the stream (`q_input` and its kin), by a whole backward pass.

    The run may begin with other embeddings than the prompt's.
    """
    copies = []

    def replace(tensor: Tensor, hook: Any) -> Tensor:
        copies.append(tensor.detach().clone().requires_grad_())
        return copies[0]

    begin = [] if entering is None else [("hook_embed", lambda tensor, hook: entering.clone())]
    with torch.enable_grad():
        value = metric(model.run_with_hooks(inputs, fwd_hooks=[*begin, (name, replace)])[0, -1])
    return torch.autograd.grad(value, copies[0])[0]


def edges(model: Any, source: Any, base: Any, metric: Metric, steps: int = 0) -> dict[tuple[str, str], float]:
    """Change of every sender times the gradient at every receiver behind it, by (sender, receiver).

    Senders are "embed", "L0H1" and "L0 mlp", receivers "L1H0 q" (k, v), "L1 mlp" and "logits". With steps the gradient is the
    mean over runs that begin at the midpoints of as many equal parts of the line between both prompts' embeddings (EAP-IG).
    """
    n_layers = model.cfg.n_layers
    there, here = outputs_of(model, source), outputs_of(model, base)
    embed = [activations(model, inputs, ["hook_embed"])["hook_embed"] for inputs in (source, base)]
    senders = {("embed", -1): embed[0] - embed[1]}
    line = [embed[1] + (i + 0.5) / steps * (embed[0] - embed[1]) for i in range(steps)] or [None]

    def gradient(name: str) -> Tensor:
        return sum(gradient_at_copies(model, base, name, metric, at) for at in line) / len(line)

    receivers: dict[tuple[str, int], Tensor] = {}
    for layer in range(n_layers):
        result, mlp = f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"
        for head, change in enumerate((there[result] - here[result]).unbind(2)):
            senders[f"L{layer}H{head}", 2 * layer] = change
        senders[f"L{layer} mlp", 2 * layer + 1] = there[mlp] - here[mlp]
        for x in "qkv":
            for head, own in enumerate(gradient(f"blocks.{layer}.attn.hook_{x}_input").unbind(2)):
                receivers[f"L{layer}H{head} {x}", 2 * layer] = own
        receivers[f"L{layer} mlp", 2 * layer + 1] = gradient(f"blocks.{layer}.hook_mlp_in")
    receivers["logits", 2 * n_layers] = gradient(f"blocks.{n_layers - 1}.hook_resid_post")
    return {
        (sender, receiver): float((change * own).sum())
        for (sender, at), change in senders.items()
        for (receiver, before), own in receivers.items()
        if at < before
    }
