"""Which component speaks to which?

Path patching (Wang et al. 2022, Goldowsky-Dill et al. 2023): the direct path from a sender to a receiver is the
residual stream alone: with everything between them frozen, the receiver reads its old input plus what the sender's
output changed by. So a path is one intervention, that difference added to the receiver's own copy of it, and
everything after the receiver runs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices, one_of
from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import check_metrics, metric_with_baselines, source_and_base
from hooked_llava.experiments.pairs import prompt_pairs
from hooked_llava.machine.devices import to_device
from hooked_llava.model.requirements import require
from hooked_llava.options.directions import Direction, check_direction
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.metrics import Metric
from hooked_llava.readout.resid import logits_and_activations
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import stack, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import PromptsLike

Senders = Literal["heads", "mlps"]
Receiver = Literal["logits"] | tuple[str, int] | tuple[str, int, int]
"""The final residual stream; ("mlp", layer); or ("q" | "k" | "v", layer, head)."""


class _Target(NamedTuple):
    """Where a receiver reads the residual stream."""

    kind: str
    hook: str
    layer: int
    head: int | None = None


def path_patching(
    model: HookedLLaVA,
    clean: PromptsLike,
    corrupted: PromptsLike,
    *,
    receivers: Receiver | Sequence[Receiver] = ("logits",),
    senders: Senders = "heads",
    positions: PositionsLike | None = None,
    metric: Metric | Sequence[Metric] | None = None,
    direction: Direction = "denoise",
    logit_positions: PositionsLike = "last",
    batch_size: int | None = None,
) -> xr.DataArray:
    """The metric when one sender's output, as one receiver alone reads it, is taken from the other prompt.

    Args:
        model: the model.
        clean: one prompt, or a batch or list of them.
        corrupted: as many others, each of the same length as its partner, with images and spans in the same places.
        receivers: one or several of "logits", ("mlp", layer), and ("q" | "k" | "v", layer, head); key-value heads for k
            and v.
        senders: every attention head, or every MLP, that lies before the receiver.
        positions: where the path runs (span or list); all positions by default.
        metric: function of logits [..., d_vocab], or a list with one for each pair; by default the logit difference of
            the two prompts' own answers.
        direction: "denoise": clean outputs into the corrupted run; "noise": the reverse.
        logit_positions: where the metric reads logits, if not at the last position (see `metrics.teacher_forced`).
        batch_size: rows at once; chosen from the free memory by default.

    Returns [receiver, layer, head] or [receiver, layer], for several pairs after an axis pair, with NaN where the
    sender does not lie before the receiver; attributes `clean` and `corrupted` hold the metric of the unpatched runs.
    Raises `InputError` for prompts that do not match and unknown senders or receivers.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.readout.metrics import Answer, probability
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pair = model.prepare("Who made the star?"), model.prepare("Who made the ring?")
    >>> path_patching(model, *pair, senders="mlps", metric=probability(Answer.of(model, "Red"))).dims
    ('receiver', 'layer')
    """
    check_direction(direction)
    one_of(senders, get_args(Senders), "senders")
    targets = [_target(model, receiver) for receiver in _listed(receivers)]
    pairs, several = prompt_pairs(model, clean, corrupted, metric)
    check_metrics(model, pairs, logit_positions)
    options = {"senders": senders, "positions": positions, "direction": direction, "logit_positions": logit_positions}
    options["batch_size"] = batch_size
    results = [_one_pair(model, *pair, targets, **options) for pair in pairs]
    results = [result.assign_coords(receiver=[_label(target) for target in targets]) for result in results]
    return stack(results, "pair") if several else results[0]


def _one_pair(
    model: HookedLLaVA,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric | None,
    targets: list[_Target],
    *,
    senders: Senders,
    positions: PositionsLike | None,
    direction: Direction,
    logit_positions: PositionsLike,
    batch_size: int | None,
) -> xr.DataArray:
    source, base = source_and_base(clean, corrupted, direction)
    where = list(base.token_map.real) if positions is None else resolve_positions(positions, base)[0].tolist()
    how = {"senders": senders, "positions": positions, "direction": direction, "read": logit_positions}
    with provenance("path_patching", model, clean, corrupted=corrupted, n_forward=3, **how) as made:
        replay = Replay(model, base)
        sending = model.hooks_table.resolve("z" if senders == "heads" else "mlp_out")
        read_there = resolve_positions(logit_positions, source)
        logits, there = logits_and_activations(model, source, read_there, sending)
        _, here = logits_and_activations(model, base, read_there, sending)
        there_logits = replay.shaped(logits[None], logit_positions)[0]
        metric, baselines = metric_with_baselines(
            model, metric, there_logits, replay.logits(logit_positions), direction
        )
        n_heads = (model.cfg.n_heads,) if senders == "heads" else ()
        table = np.full((len(targets), model.cfg.n_layers, *n_heads), np.nan)
        for layer in range(model.cfg.n_layers):  # one layer's changes at a time: [head pos d_model] is large
            receiving = [r for r, target in enumerate(targets) if _lies_before(layer, target, senders)]
            changes = _changes(model, there, here, layer, where)
            runs = [[_path(targets[r], change, where)] for r in receiving for change in changes]
            values = to_numpy(replay.run(runs, metric, logit_positions, batch_size))
            table[receiving, layer] = values.reshape(len(receiving), *n_heads)
        return xr.DataArray(
            table,
            dims=("receiver", "layer", "head")[: table.ndim],
            coords={"layer": range(model.cfg.n_layers)} | ({"head": range(*n_heads)} if n_heads else {}),
            name="metric",
            attrs=made.attrs(**baselines, work=replay.work.forwards),
        )


def _changes(
    model: HookedLLaVA, there: dict[str, Tensor], here: dict[str, Tensor], layer: int, where: list[int]
) -> Float[Tensor, "sender position d_model"]:
    """What each sender of a layer adds to the residual stream in the source run, less what it adds in the base run."""
    name, at = model.hooks_table.name("mlp_out", layer), to_device(where, model.cfg.device)
    if name in there:
        return (there[name] - here[name])[:, at]
    name = model.hooks_table.name("z", layer)
    change = (there[name] - here[name])[0, at]  # (position, head, d_head)
    return einsum("p h d, h d m -> h p m", change, model.blocks[layer].attn.W_O.to(change.device))


def _listed(receivers: Receiver | Sequence[Receiver]) -> list[Any]:
    """Receivers as a list, also where one is given by itself."""
    one = isinstance(receivers, str) or any(hasattr(entry, "__index__") for entry in receivers)
    listed = [receivers] if one else list(receivers)
    if not listed:
        raise InputError(f"receivers={receivers!r} names none; give 'logits', ('mlp', layer) or ('q', layer, head).")
    return listed


def _target(model: HookedLLaVA, receiver: Receiver) -> _Target:
    n_layers, cfg, table = model.cfg.n_layers, model.config.language, model.hooks_table
    if receiver == "logits":
        return _Target("logits", table.name("resid_post", -1), n_layers)
    kind, *numbers = receiver if isinstance(receiver, tuple) and receiver else (receiver,)
    known = len(numbers) == (1 if kind == "mlp" else 2 if kind in ("q", "k", "v") else None)
    if not known or not all(hasattr(number, "__index__") for number in numbers):
        raise InputError(
            f"{receiver!r} is no receiver; expected 'logits', ('mlp', layer), or ('q' | 'k' | 'v', layer, head)."
        )
    layer = as_indices(numbers[0], n_layers, f"layers, as in the receiver {receiver}")[0]
    if kind == "mlp":
        require(["separate_mlps"], f"receiver={receiver!r}", model)
        return _Target(kind, table.name("mlp_in", layer), layer)
    n_heads = cfg.n_heads if kind == "q" else cfg.n_key_value_heads
    head = as_indices(numbers[1], n_heads, f"heads, as in the receiver {receiver}")[0]
    return _Target(kind, table.name(f"{kind}_input", layer), layer, head)


def _lies_before(layer: int, target: _Target, senders: str) -> bool:
    """Attention of a layer comes before its MLP, and both after the layer's queries, keys and values are read."""
    return layer < target.layer or (layer == target.layer and senders == "heads" and target.kind == "mlp")


def _path(target: _Target, change: Float[Tensor, "position d_model"], where: list[int]) -> Intervention:
    if target.head is None:
        return Intervention(target.hook, positions=where, add=change)
    return Intervention(target.hook, positions=where, heads=[target.head], add=change[:, None])


def _label(target: _Target) -> str:
    if target.head is not None:
        return f"L{target.layer}H{target.head} {target.kind}"
    return f"L{target.layer} mlp" if target.kind == "mlp" else "logits"
