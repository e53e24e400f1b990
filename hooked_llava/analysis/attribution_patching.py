"""Activation patching to first order, for every activation at once (Nanda 2023; edges: Syed et al. 2023).

The metric's change when an activation x of one run is replaced by x' of another is about (x' - x) . d metric / d x. One
backward pass gives the gradient at every hook, so that a forward pass over each prompt and one backward pass estimate
what exact patching needs one run for each cell to measure. With integrated gradients the gradient is averaged along the
straight line between the two prompts' embeddings (Hanna et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import check_metrics, metric_with_baselines, source_and_base
from hooked_llava.experiments.pairs import prompt_pairs
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.options.directions import Direction, check_direction
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.metrics import Metric, measured
from hooked_llava.readout.resid import logits_at
from hooked_llava.results.arrays import check_sizes, position_coords, stack, to_numpy
from hooked_llava.results.map_quality import rank_correlation
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import PromptsLike

Activations = dict[str, Tensor]
_PROJECTED = ("q", "k", "v")
_ROUNDING = 1e-6
"""Of the range of a map: as much as sums in float32 may be off."""


def attribution_patching(
    model: HookedLLaVA,
    clean: PromptsLike,
    corrupted: PromptsLike,
    *,
    hooks: str | tuple[str, int] | Sequence[str | tuple[str, int]] = ("resid_pre", "attn_out", "mlp_out"),
    metric: Metric | Sequence[Metric] | None = None,
    direction: Direction = "denoise",
    steps: int = 0,
    logit_positions: PositionsLike = "last",
) -> xr.Dataset:
    """First-order estimate of `activation_patching` at every layer and position (and head) of several hooks.

    Args:
        model: the model.
        clean: one prompt, or a batch or list of them.
        corrupted: as many others, each of the same length as its partner, with images and spans in the same places.
        hooks: short name or names of hooks of the language tower, every layer of each, or pairs such as ("z", 3); all
            together cost one backward pass.
        metric: function of logits [..., d_vocab], or a list with one for each pair; by default the logit difference of
            the two prompts' own answers.
        direction: "denoise": effect of clean activations in the corrupted run; "noise": the reverse.
        steps: points of the path for integrated gradients; 0 takes the gradient at the run that is patched.
        logit_positions: where the metric reads logits, if not at the last position (see `metrics.teacher_forced`).

    Returns one array for each hook, [layer, position] or [layer, position, head] (or kv_head), for several pairs after
    an axis pair: the estimated change of the metric. Attributes `clean` and `corrupted` hold the metric of the two
    runs. Raises `InputError` where the prompts do not match, for hooks of the image side or scores, and a metric
    without gradient.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.readout.metrics import Answer, log_probability
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pair = model.prepare("Who made the star?"), model.prepare("Who made the ring?")
    >>> red = log_probability(Answer.of(model, "Red"))
    >>> sorted(attribution_patching(model, *pair, hooks=["z", "mlp_out"], metric=red))
    ['mlp_out', 'z']
    """
    one = isinstance(hooks, str) or (
        isinstance(hooks, tuple) and len(hooks) > 1 and not isinstance(hooks[1], str | tuple)
    )
    listed = [hooks] if one else list(hooks)
    by_hook = {hook if isinstance(hook, str) else model.hooks_table.one(hook): _checked(model, hook) for hook in listed}
    names = [name for several in by_hook.values() for name in several]
    if not names:
        raise InputError(f"hooks={hooks!r} names no hook; give for example ['resid_pre', 'z'].")
    pairs, several = prompt_pairs(model, clean, corrupted, metric)
    check_sizes([{"position": one.shape[1]} for one, _, _ in pairs])

    def estimate(base: Inputs, changes: Activations, point: _Run, metric: Metric) -> xr.Dataset:
        gradients = point.gradients(names, metric)
        return xr.Dataset({hook: _estimate(model, base, own, changes, gradients) for hook, own in by_hook.items()})

    about = {"analysis": "attribution_patching", "hooks": list(by_hook)}
    results = _each_pair(model, pairs, names, names, estimate, direction, steps, logit_positions, **about)
    return stack(results, "pair") if several else results[0]


def edge_attribution(
    model: HookedLLaVA,
    clean: PromptsLike,
    corrupted: PromptsLike,
    *,
    metric: Metric | Sequence[Metric] | None = None,
    direction: Direction = "denoise",
    steps: int = 0,
    logit_positions: PositionsLike = "last",
) -> xr.Dataset:
    """First-order estimate of `path_patching` between every sender and every receiver.

    A path's estimate is what the sender's output changes by, times the gradient at the receiver's own copy of the
    residual stream, over all positions. The edges of one sender sum to its estimate as a node. Beyond a backward pass
    it holds the gradients at `q_input`, `k_input` and `v_input`, [pos, head, d_model] each, of one layer at a time.
    Arguments as for `attribution_patching`.

    Returns `heads` [receiver, layer, head], `mlps` [receiver, layer] and `embed` [receiver], with NaN where the sender
    does not lie before the receiver; receivers are "L3H2 q" (k, v), "L3 mlp" and "logits", as in `path_patching`.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.readout.metrics import Answer, log_probability
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pair = model.prepare("Who made the star?"), model.prepare("Who made the ring?")
    >>> edges = edge_attribution(model, *pair, metric=log_probability(Answer.of(model, "Red")))
    >>> edges.mlps.dims
    ('receiver', 'layer')
    """
    table, layers = model.hooks_table, range(model.cfg.n_layers)
    senders = ["hook_embed", *(table.name(part, i) for i in layers for part in ("z", "mlp_out"))]
    read_at = [table.name(part, i) for i in layers for part in (*_PROJECTED, *_mlp_readers(model))]
    read_at.append(table.name("resid_post", -1))
    held = [*read_at, *table.resolve("resid_pre")]

    def estimate(base: Inputs, changes: Activations, point: _Run, metric: Metric) -> xr.Dataset:
        return _edges(model, changes, point.held, point.gradients(read_at, metric))

    pairs, several = prompt_pairs(model, clean, corrupted, metric)
    results = _each_pair(
        model, pairs, senders, held, estimate, direction, steps, logit_positions, analysis="edge_attribution"
    )
    return stack(results, "pair") if several else results[0]


def agreement(exact: xr.DataArray, estimate: xr.DataArray) -> float:
    """Spearman's rank correlation of exact patching and its estimate, over the cells that both have as numbers.

    Cells that differ by rounding in float32 alone (1e-6 of the map's range) tie, and ties share their mean rank. NaN where one
    of them is constant. Raises `InputError` for maps with different axes.

    >>> exact, estimate = (xr.DataArray(v, dims="layer", coords={"layer": range(3)}) for v in ([1, 5, 9], [0, 1, 30]))
    >>> round(agreement(exact, estimate), 6)
    1.0
    """
    if set(exact.dims) != set(estimate.dims):
        raise InputError(f"The maps have axes {exact.dims} and {estimate.dims}; compare maps with the same axes.")
    first, second = xr.align(exact, estimate.transpose(*exact.dims), join="inner")
    pairs = np.stack([first.values.ravel(), second.values.ravel()]).astype(np.float64)
    return rank_correlation(*map(_without_rounding, pairs[:, np.isfinite(pairs).all(0)]))


def _without_rounding(values: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """The values, with those equal that differ by no more than rounding in float32."""
    order = values.argsort()
    ascending, tolerance, start = values[order], _ROUNDING * np.ptp(values) if len(values) else 0.0, 0
    while start < len(ascending):
        stop = np.searchsorted(ascending, ascending[start] + tolerance, side="right")
        ascending[start:stop] = ascending[start]
        start = stop
    return ascending[order.argsort()]


@dataclass(frozen=True)
class _Run:
    """Activations of a forward pass, with their graph if gradients are wanted, and logits where the metric reads."""

    held: Activations
    logits: Float[Tensor, "*position d_vocab"]

    def gradients(self, names: list[str], metric: Metric) -> Activations:
        with torch.enable_grad():
            value = measured(metric, self.logits, 0, one_number=True)
        if not value.requires_grad:
            raise InputError(
                "The metric has no gradient (a rank, or numbers taken out of torch); give a differentiable one."
            )
        found = torch.autograd.grad(value, [self.held[name] for name in names])
        return dict(zip(names, found, strict=True))


def _each_pair(
    model: HookedLLaVA,
    pairs: list[tuple[Inputs, Inputs, Metric | None]],
    changing: list[str],
    at_points: list[str],
    estimate: Callable[[Inputs, Activations, _Run, Metric], xr.Dataset],
    direction: Direction,
    steps: int,
    logit_positions: PositionsLike,
    *,
    analysis: str,
    **about: Any,
) -> list[xr.Dataset]:
    """The estimate for each pair, from what changes between its runs and from the run (or path) that is patched.

    `changing` are the hooks whose difference the estimate needs, `at_points` those held with their graph.
    """
    check_direction(direction)
    whole_number(steps, "steps", least=0, expected="0 for a plain gradient, or the number of points of the path")
    check_metrics(model, pairs, logit_positions, swept=False)
    results, how = [], {"direction": direction, "steps": steps, "read": logit_positions, **about}
    for clean, corrupted, own_metric in pairs:
        source, base = source_and_base(clean, corrupted, direction)
        with provenance(analysis, model, clean, corrupted=corrupted, n_forward=2 + steps, **how) as made:
            start, end = model.embed(base), model.embed(source)
            there = _run(model, source, end, changing, logit_positions)
            here = _run(
                model, base, start, changing if steps else [*changing, *at_points], logit_positions, graph=not steps
            )
            measure, baselines = metric_with_baselines(model, own_metric, there.logits, here.logits.detach(), direction)
            changes = {name: there.held.pop(name) - here.held[name].detach() for name in changing}
            points = _along_path(model, base, start, end, at_points, logit_positions, steps) if steps else [here]
            result = sum(estimate(base, changes, point, measure) for point in points) / max(1, steps)
            results.append(result.assign_attrs(made.attrs(**baselines, n_backward=max(1, steps))))
    return results


def _along_path(
    model: HookedLLaVA,
    base: Inputs,
    start: Tensor,
    end: Tensor,
    names: list[str],
    logit_positions: PositionsLike,
    steps: int,
) -> Iterator[_Run]:
    """Runs at the midpoints of equal parts of the line between two embeddings."""
    for step in range(steps):
        yield _run(model, base, start + (step + 0.5) / steps * (end - start), names, logit_positions, graph=True)


def _run(
    model: HookedLLaVA,
    inputs: Inputs,
    embedding: Tensor,
    names: list[str],
    logit_positions: PositionsLike,
    *,
    graph: bool = False,
) -> _Run:
    """A forward pass that enters with what the merge gives, and computes logits only where they are read."""
    held: Activations = {}

    @reads_only
    def keep(tensor: Tensor, hook: HookPoint) -> Tensor:
        # A tensor of its own for each hook: `q_input` and its kin are subtracted from what they were made of, and the
        # gradient at the hook must not count that.
        assert hook.name is not None
        held[hook.name] = tensor.view_as(tensor)
        return held[hook.name]

    with torch.set_grad_enabled(graph), model.hooks([(names, keep)] if names else []):
        entering = embedding.detach().requires_grad_(graph)
        where = {"attention_mask": inputs.padding_mask, "position_ids": inputs.position_ids}
        resid = model(entering, **where, stop_at_layer=model.cfg.n_layers)  # (1, pos, d_model)
        logits = logits_at(model, resid, resolve_positions(logit_positions, inputs))[0]  # (position, d_vocab)
        return _Run(held, logits[0] if isinstance(logit_positions, str) and logit_positions == "last" else logits)


def _checked(model: HookedLLaVA, hook: Any) -> list[str]:
    table = model.hooks_table
    names, in_path = table.resolve(hook), range(-1, model.cfg.n_layers)  # what comes after is read at one position only
    for name in names:
        if table[name].stage not in in_path or "key" in table[name].axes:
            raise InputError(
                f"attribution_patching works on vectors in the language tower's blocks, not on {name!r}; use "
                "activation_patching (for the image's part: 'hook_embed' at image positions)."
            )
    if len({table[name].spec for name in names}) != 1:
        raise InputError(f"hooks: {hook!r} means several hooks; name each by itself.")
    return names


def _estimate(
    model: HookedLLaVA, base: Inputs, names: list[str], changes: Activations, gradients: Activations
) -> xr.DataArray:
    """(x' - x) . gradient over the last axis, stacked over the layers."""
    rows = [einsum("... d, ... d -> ...", changes[name][0].float(), gradients[name][0].float()) for name in names]
    axes = model.hooks_table[names[0]].axes[1:-1]
    dims = tuple("position" if axis == "pos" else axis for axis in axes)
    coords = position_coords(base.token_map, range(base.shape[1]))
    if len(dims) > 1:
        coords[dims[1]] = range(rows[0].shape[-1])
    if model.hooks_table[names[0]].layer is None:
        return xr.DataArray(to_numpy(rows[0]), dims=dims, coords=coords, name="change")
    coords["layer"] = [model.hooks_table[name].layer for name in names]
    stacked = torch.stack([row.to(model.cfg.device) for row in rows])
    return xr.DataArray(to_numpy(stacked), dims=("layer", *dims), coords=coords, name="change")


def _receivers(model: HookedLLaVA) -> list[list[str]]:
    """Labels of what reads the residual stream, layer by layer: queries, keys and values by head, MLP; then the logits."""
    cfg = model.config.language
    kinds = (("q", cfg.n_heads), ("k", cfg.n_key_value_heads), ("v", cfg.n_key_value_heads))
    by_layer = [
        [*(f"L{layer}H{head} {x}" for x, n_heads in kinds for head in range(n_heads)), f"L{layer} mlp"]
        for layer in range(cfg.n_layers)
    ]
    return [*by_layer, ["logits"]]


def _edges(model: HookedLLaVA, changes: Activations, held: Activations, gradients: Activations) -> xr.Dataset:
    """Every sender's change against every receiver's gradient, where the sender comes before; a layer at a time."""
    cfg = model.config.language
    labels = _receivers(model)
    parts = []
    for layer, own in enumerate(labels):
        if layer < cfg.n_layers:
            reading = _reading(model, layer, held, gradients)  # (receiver, pos, d_model), the MLP last
        else:
            reading = gradients[model.hooks_table.name("resid_post", -1)].float()
        parts.append(_into_layer(model, layer, reading, changes))
        assert len(reading) == len(own)
        del reading  # before the next layer's are made
    heads, mlps, embed = (np.concatenate(part) for part in zip(*parts, strict=True))
    return xr.Dataset(
        {
            "heads": (("receiver", "layer", "head"), heads),
            "mlps": (("receiver", "layer"), mlps),
            "embed": (("receiver",), embed),
        },
        coords={
            "receiver": [label for own in labels for label in own],
            "layer": range(cfg.n_layers),
            "head": range(cfg.n_heads),
        },
    )


def _reading(
    model: HookedLLaVA, layer: int, held: Activations, gradients: Activations
) -> Float[Tensor, "receiver pos d_model"]:
    """Gradients at every place of a layer that reads the residual stream: each head's copy for q, k and v, and the MLP's.

    Those of the copies (`q_input` and its kin) are made here, from the gradients at queries, keys and values: through
    the projection and the norm, so that no run holds a copy of it for every head of every layer.
    """
    block, table = model.blocks[layer], model.hooks_table
    resid = held[table.name("resid_pre", layer)][0].detach()

    def before_norm(after_norm: Float[Tensor, "reader pos d_model"]) -> Float[Tensor, "reader pos d_model"]:
        copies = resid.expand_as(after_norm).clone().requires_grad_()
        with torch.enable_grad():
            normalized = block.ln1.fused(copies)
        return torch.autograd.grad(normalized, copies, after_norm)[0].float()

    rows = []
    for name, linear in zip(_PROJECTED, (block.attn.query, block.attn.key, block.attn.value), strict=True):
        gradient = gradients[table.name(name, layer)][0]  # (pos, head, d_head)
        weight = linear.weight.unflatten(0, (-1, gradient.shape[-1]))
        rows.append(before_norm(einsum("p h d, h d m -> h p m", gradient, weight)))
    of_mlp = {name: gradients[table.name(name, layer)] for name in _mlp_readers(model)}  # (1, pos, d_model or d_mlp)
    if "mlp_in" in of_mlp:
        return torch.cat([*rows, of_mlp["mlp_in"].float()])
    linears = (block.mlp.up,) if block.mlp.gate is None else (block.mlp.gate, block.mlp.up)
    after_norm = [gradient @ linear.weight for gradient, linear in zip(of_mlp.values(), linears, strict=True)]
    return torch.cat([*rows, before_norm(torch.stack(after_norm).sum(0))])


def _mlp_readers(model: HookedLLaVA) -> tuple[str, ...]:
    """What an MLP reads, as hooks: its own copy of the residual stream, or in a parallel block its neurons before activation."""
    cfg = model.config.language
    if not cfg.parallel_attn_mlp:
        return ("mlp_in",)
    return ("mlp.pre", "mlp.pre_linear") if cfg.gated_mlp else ("mlp.pre",)


def _into_layer(
    model: HookedLLaVA, layer: int, reading: Float[Tensor, "receiver pos d_model"], changes: Activations
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges from every head, MLP and the embedding into a layer's readers; its MLP (the last) also reads its heads.

    Not in a parallel block, whose MLP reads what its heads read.
    """
    cfg = model.config.language
    heads = np.full((len(reading), cfg.n_layers, cfg.n_heads), np.nan, dtype=np.float32)
    mlps = heads[:, :, 0].copy()
    embed = to_numpy(einsum("p m, r p m -> r", changes["hook_embed"][0].float().to(reading.device), reading))
    for sender in range(min(layer + (not cfg.parallel_attn_mlp), cfg.n_layers)):
        readers = slice(None) if sender < layer else slice(-1, None)
        z = changes[model.hooks_table.name("z", sender)][0].to(reading.device)  # (pos, head, d_head)
        wrote = einsum("p h d, h d m -> h p m", z, model.blocks[sender].attn.W_O.to(z.device)).float()
        heads[readers, sender] = to_numpy(einsum("h p m, r p m -> r h", wrote, reading[readers]))
        if sender < layer:
            change = changes[model.hooks_table.name("mlp_out", sender)][0].float().to(reading.device)
            mlps[:, sender] = to_numpy(einsum("p m, r p m -> r", change, reading))
    return heads, mlps, embed
