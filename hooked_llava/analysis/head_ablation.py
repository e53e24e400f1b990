"""Does the answer depend on these heads?

Scores say what a head writes; whether it is needed is found by taking it away. Each head's z, at the answer's position or
at others, is replaced by its mean over reference prompts, so that what all prompts share stays and what this one says goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.analysis.maps.scores import check_heads
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.prompt.where import PositionsLike, positions_of
from hooked_llava.readout.answer import answer_is_said
from hooked_llava.readout.answer_cache import Target, read_target
from hooked_llava.readout.metric_names import about_metric
from hooked_llava.readout.metrics import Metric, measured
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.reference_mean import Reference, reference_means
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Replacement = Literal["mean", "zero"]
Sets = Mapping[str, Sequence[tuple[int, int]]] | Sequence[tuple[int, int]]


def ablate_heads(
    model: HookedLLaVA,
    inputs: InputsLike,
    heads: Sets,
    target: Target = None,
    *,
    reference: Reference | None = None,
    replace: Replacement = "mean",
    positions: PositionsLike = "last",
    metric: Metric | Sequence[Metric] | None = None,
) -> xr.Dataset:
    """What the answer loses when sets of heads are taken away, by default at the position where it is read, through Replay.

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a last axis prompt.
        heads: (layer, head) pairs taken away together, or several such sets by name (`nested_sets`, `heads_by_layer`).
        target: answer that is scored, one token each; the model's own by default.
        reference: prompts over which each head's z is averaged, for "mean", or what else `mean_of=` of an intervention takes;
            the inputs themselves by default, which then must be several, or have several positions there.
        replace: what takes the place of a head's z.
        positions: where z is replaced: a span ("last", "question", "image"), or positions. The mean is one over all of them.
        metric: function of logits [..., d_vocab] where the answer is read; or a list with one for each prompt.

    Returns `log_probability`, `correct` (whether the answer is still the most probable token) and perhaps `metric`, [set,
    prompt], the first set being "none". Takes one forward pass, one more for the mean, and what each set's positions and
    layers can reach (attribute `work`): at most one more for each set. Raises `InputError` for heads or positions that are
    not there, a set of the name "none", a mean over one activation, and a metric without one number for each run.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare(["Who made the star?", "Who made the ring?"])
    >>> lost = ablate_heads(model, inputs, heads_by_layer(model), positions="question|last")
    >>> lost.correct.values[0].tolist()
    [True, True]
    """
    prompts = model.as_inputs(inputs)
    sets = _sets(model, heads)
    one_of(replace, get_args(Replacement), "replace")
    others = prompts if reference is None else reference
    _check_positions(prompts, positions, others if replace == "mean" else None)
    metrics = _metrics(model, metric, len(prompts), len(sets))
    found = read_target(model, prompts, target)
    if found.logit_positions.shape[1] != 1:
        raise InputError("ablate_heads scores answers of one token; give a word that is one, or its first token.")
    how = {"replace": replace, "heads": sets, "positions": positions}
    with provenance("ablate_heads", model, prompts, n_forward=1 + (replace == "mean"), **how) as made:
        means = _means(model, others, positions) if replace == "mean" else None
        replay = Replay(model, found.inputs)
        found = found.with_own(model, replay.kept_logits("last"))
        assert found.ids is not None
        runs = [[_replacement(*pair, positions, means) for pair in pairs] for pairs in sets.values()]
        logits = replay.run(runs).reshape(len(sets), len(prompts), 1, -1)
        values = {"log_probability": found.log_probability(logits), "correct": answer_is_said(logits, found.ids)}
        values |= {"metric": _measured(metrics, logits[:, :, 0])} if metrics else {}
        return xr.Dataset(
            {name: (("set", "prompt"), to_numpy(value)) for name, value in values.items()},
            coords={"set": list(sets), "n_heads": ("set", [len(set(pairs)) for pairs in sets.values()])},
            attrs=made.attrs(**found.attrs(model, "target"), **_about(model, metrics), work=replay.work.forwards),
        )


def _sets(model: HookedLLaVA, heads: Sets) -> dict[str, list[tuple[int, int]]]:
    """The sets by name, checked, after that of no head."""
    cfg = model.config.language
    named = heads if isinstance(heads, Mapping) else {"heads": heads}
    if "none" in named:
        raise InputError("A set of heads is named 'none', as the run with all heads is; give it another name.")
    return {"none": []} | {name: check_heads(pairs, cfg.n_layers, cfg.n_heads) for name, pairs in named.items()}


def nested_sets(name: str, heads: Sequence[tuple[int, int]], sizes: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """The first so many heads of a ranking, for several sizes, as `ablate_heads` takes them: "name 4" and so on.

    >>> list(nested_sets("top", [(2, 3), (2, 1), (0, 4)], (1, 3)))
    ['top 1', 'top 3']
    """
    if outside := [size for size in sizes if not 1 <= size <= len(heads)]:
        raise InputError(f"Sizes {outside} of a ranking of {len(heads)} heads; expected 1 to {len(heads)}.")
    return {f"{name} {size}": list(heads[:size]) for size in sizes}


def heads_by_layer(model: HookedLLaVA) -> dict[str, list[tuple[int, int]]]:
    """All heads of each layer, as `ablate_heads` takes them: "layer 0" and so on.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> list(heads_by_layer(model))[:2]
    ['layer 0', 'layer 1']
    """
    cfg = model.config.language
    return {f"layer {layer}": [(layer, head) for head in range(cfg.n_heads)] for layer in range(cfg.n_layers)}


def random_heads(model: HookedLLaVA, seed: int) -> list[tuple[int, int]]:
    """All heads of the language tower in random order: the ranking that every other has to beat.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> len(set(random_heads(model, 0))) == model.cfg.n_layers * model.cfg.n_heads
    True
    """
    n_heads = model.cfg.n_heads
    order = np.random.default_rng(seed).permutation(model.cfg.n_layers * n_heads)
    return [divmod(int(i), n_heads) for i in order]


def _check_positions(prompts: Inputs, positions: PositionsLike, averaged: Reference | None) -> None:
    """Raise `InputError` where a prompt has no such position, or the mean would be over a single activation."""

    def count(token_map: TokenMap) -> int:
        if found := positions_of(positions, token_map, prompts.shape[1]):
            return len(found)
        raise InputError(
            f"positions={positions!r} name no position of the prompt; expected a span that it has, or numbers."
        )

    fewest = min(prompts.each(count, prompts.token_maps))
    if isinstance(averaged, Inputs) and len(averaged) < 2 and fewest == 1:
        raise InputError("replace='mean' over 1 prompt changes nothing; give reference= several prompts.")


def _means(model: HookedLLaVA, reference: Reference, positions: PositionsLike) -> list[Float[Tensor, "head d_head"]]:
    """Every head's mean z at these positions."""
    places = [(("z", layer), positions) for layer in range(model.cfg.n_layers)]
    return [mean[-1] if mean.ndim > 2 else mean for mean in reference_means(model, reference, places)]


def _replacement(layer: int, head: int, positions: PositionsLike, means: list[Tensor] | None) -> Intervention:
    if means is None:
        return Intervention(("z", layer), positions=positions, heads=[head], zero=True)
    return Intervention(("z", layer), positions=positions, heads=[head], value=means[layer][head])


def _metrics(model: HookedLLaVA, metric: Metric | Sequence[Metric] | None, n_prompts: int, n_sets: int) -> list[Metric]:
    """One metric for each prompt, or one for all of them; each is tried on zeros before anything is run."""
    if metric is None:
        return []
    metrics = list(metric) if isinstance(metric, Sequence) else [metric]
    if isinstance(metric, Sequence) and len(metrics) != n_prompts:
        raise InputError(
            f"metric= has {len(metrics)} metrics for {n_prompts} prompts; give one for all, or one for each."
        )
    zeros = torch.zeros(model.config.language.d_vocab, device=model.cfg.device, dtype=model.cfg.dtype)
    _measured(metrics, zeros.expand(n_sets, n_prompts, -1).clone())
    return metrics


def _measured(metrics: list[Metric], logits: Float[Tensor, "set prompt d_vocab"]) -> Float[Tensor, "set prompt"]:
    if len(metrics) == 1:
        return measured(metrics[0], logits, 2, one_number=True)
    own = zip(metrics, logits.unbind(1), strict=True)
    return torch.stack([measured(metric, of_prompt, 1, one_number=True) for metric, of_prompt in own], 1)


def _about(model: HookedLLaVA, metrics: list[Metric]) -> dict[str, Any]:
    """What the metrics measure: as `about_metric` says it, of several prompts a list of what differs."""
    each = [about_metric(model, metric) for metric in metrics]
    names = dict.fromkeys(name for about in each for name in about)
    listed = {name: [about.get(name) for about in each] for name in names}
    return {name: values[0] if values.count(values[0]) == len(values) else values for name, values in listed.items()}
