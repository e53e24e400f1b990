"""How much does a steering do, at which strength, and what else does it change? With the controls that the answer needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, SupportsFloat, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import finite_number, one_of
from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.steering_modes import Control
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike, PromptsLike
from hooked_llava.readout.answer import AnswerReading, answer_is_said, read_answer
from hooked_llava.readout.answer_tokens import Target
from hooked_llava.readout.metrics import kl_divergence
from hooked_llava.readout.vocabulary import decode_tokens
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance
from hooked_llava.steering.directions import mean_difference, random_direction
from hooked_llava.steering.steering import DirectionLike, Steering, steer

_NEEDS: dict[Control, str] = {
    "reconstruction": "features of an autoencoder that is not attached with its error",
    "random_feature": "features in place of a direction",
    "mean_difference": "contrast=(prompts, others)",
}
STEERED = "steered"
"""What is asked about, on the axis `steered_by`; the other entries are controls."""


@torch.no_grad()
def steering_sweep(
    model: HookedLLaVA,
    inputs: InputsLike,
    direction: DirectionLike,
    strengths: Iterable[SupportsFloat],
    *,
    answer: Target = None,
    others: InputsLike | None = None,
    contrast: tuple[PromptsLike, PromptsLike] | None = None,
    controls: Control | Sequence[Control] | None = None,
    seed: int = 0,
    **how: Any,
) -> xr.Dataset:
    """The probability of an answer by strength of a steering, its side effects on other questions, and controls.

    Args:
        model: the model.
        inputs: the prompts; several give an axis prompt.
        direction: a vector, or {feature: value}, as for `steer`.
        strengths: what the direction, or the features' values, are multiplied by.
        answer: whose probability is followed, the whole of it; by default the model's own next token.
        others: other questions, to be left as they are.
        contrast: two sets of prompts, whose difference of means at the same hook and positions is a control.
        controls: names in `hooked_llava.options.steering_modes.CONTROLS`; by default all that there can be.
        seed: of what is drawn at random.
        how: hook, positions, phases, mode and sae, as for `steer`. phases="decode" needs an answer of several tokens.

    Returns `log_probability`, `said` (whether each token of the answer is the most probable) and `first_token` (the most
    probable one after the prompt) [steered_by, strength, prompt], and with `others` `other_kl`, KL(unsteered || steered) of the
    next token in nats, and `other_changed`, whether another is the most probable, [steered_by, strength, other]. `steered_by`
    is "steered" and the controls. `unsteered` holds log P without any steering. Raises `InputError` for controls that cannot
    be had, and as `steer` and `read_answer`.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> star, ring = (model.prepare(f"Who made the {shape}?") for shape in ("star", "ring"))
    >>> there = {"hook": ("resid_post", 2), "positions": "last"}
    >>> direction = mean_difference(model, ring, star, **there)
    >>> sweep = steering_sweep(model, star, direction, [0, 1, 2], others=ring, **there)
    >>> sweep.log_probability.dims, sweep.steered_by.values.tolist()
    (('steered_by', 'strength'), ['steered', 'random_direction'])
    """
    reading = read_answer(model, inputs, answer)
    if how.get("phases") == "decode" and reading.positions == "last":
        raise InputError(
            "phases='decode' acts on an answer's tokens but the last, and it has one: nothing would change."
        )
    if not isinstance(strengths, Iterable) or isinstance(strengths, str) or "strength" in how:
        raise InputError(f"strengths={strengths!r}; expected several numbers, such as [0, 1, 2], and no strength=.")
    if not (values := [finite_number(one, "strengths") for one in strengths]):
        raise InputError("strengths=[] asks for nothing; give at least one number.")
    ways = _ways(model, direction, values, how, contrast, controls, seed)
    about = dict(ways[STEERED][0].about) | {"strength": values, "seed": seed}
    with provenance("steering_sweep", model, reading.inputs, n_forward=0, **about) as made:
        result, about = _measured(model, reading, None if others is None else model.as_inputs(others), ways)
        result = result.assign_coords(strength=values).assign_attrs(made.attrs(**about))
    return result if len(reading.inputs) > 1 else result.isel(prompt=0, drop=True)


def _measured(
    model: HookedLLaVA, reading: AnswerReading, others: Inputs | None, ways: Mapping[str, Sequence[Steering]]
) -> tuple[xr.Dataset, dict[str, Any]]:
    """The numbers by way, strength and prompt, and what was measured at what cost."""
    cells = [one for by_strength in ways.values() for one in by_strength]

    def by_cell(values: Tensor, last: str) -> tuple[tuple[str, ...], np.ndarray]:
        return ("steered_by", "strength", last), to_numpy(values).reshape(len(ways), -1, values.shape[-1])

    logits, unsteered, cost = _replayed(model, reading.inputs, cells, reading.positions)
    logits, unsteered = reading.shaped(logits, len(cells)), reading.shaped(unsteered)
    reading = reading.with_own(model, unsteered)
    assert reading.ids is not None
    found: dict[str, Any] = {
        "log_probability": by_cell(reading.log_probability(logits), "prompt"),
        "said": by_cell(answer_is_said(logits, reading.ids), "prompt"),
        "unsteered": ("prompt", to_numpy(reading.log_probability(unsteered))),
        "first_token": (
            ("steered_by", "strength", "prompt"),
            decode_tokens(model, logits[:, :, 0].argmax(-1)).reshape(len(ways), -1, len(reading.inputs)),
        ),
    }
    if others is not None:
        there, before, further = _replayed(model, others, cells, "last")
        there, before = there.reshape(len(cells), len(others), -1), before.reshape(len(others), -1)
        found["other_kl"] = by_cell(kl_divergence(before)(there), "other")
        found["other_changed"] = by_cell(there.argmax(-1) != before.argmax(-1), "other")
        cost = cost + further
    about = reading.attrs(model) | dict(zip(("n_forward", "work", "runs"), cost.tolist(), strict=True))
    return xr.Dataset(found, coords={"steered_by": list(ways)}), about


def _ways(
    model: HookedLLaVA,
    direction: DirectionLike,
    strengths: Sequence[float],
    how: dict[str, Any],
    contrast: tuple[PromptsLike, PromptsLike] | None,
    controls: Control | Sequence[Control] | None,
    seed: int,
) -> dict[str, list[Steering]]:
    """The steering and its controls, each at every strength."""
    first = steer(model, direction, **how)
    at_hook = how | {"hook": first.hook}
    of_features = isinstance(direction, Mapping)
    then = model.hook_dict[first.hook].then
    possible: dict[Control, bool] = {
        "reconstruction": of_features and (then is None or not getattr(then, "keep_error", True)),
        "random_feature": of_features,
        "random_direction": True,
        "mean_difference": contrast is not None,
    }
    can = [control for control, it_can in possible.items() if it_can]
    controls = [controls] if isinstance(controls, str) else controls
    for control in controls or ():
        one_of(control, get_args(Control), "controls")
        if control not in can:
            raise InputError(f"controls={control!r} needs {_NEEDS[control]}.")
    ways: dict[str, tuple[Any, dict[str, Any]]] = {STEERED: (direction, at_hook)}
    along = at_hook | ({"sae": None, "mode": "add"} if of_features else {})
    for control in can if controls is None else controls:
        if control == "reconstruction":
            ways[control] = {}, at_hook | {"mode": "replace"}
        elif control == "random_feature":
            ways[control] = _other_features(direction, first, how, model, seed), at_hook
        elif control == "random_direction":
            ways[control] = random_direction(first.written, seed=seed), along
        else:
            assert contrast is not None
            means = mean_difference(model, *contrast, hook=first.hook, positions=how.get("positions")).flatten()
            ways[control] = means * (at_least_float32(first.written).norm() / means.norm()), along
    return {name: [steer(model, what, strength=s, **there) for s in strengths] for name, (what, there) in ways.items()}


def _other_features(
    features: Any, first: Steering, how: Mapping[str, Any], model: HookedLLaVA, seed: int
) -> dict[int, float]:
    """As many other features at the same values."""
    then = model.hook_dict[first.hook].then
    sae = how.get("sae") or getattr(then, "sae", None)
    assert sae is not None
    others = np.setdiff1d(np.arange(len(sae.W_dec)), list(features))
    if len(others) < len(features):
        raise InputError(f"controls='random_feature': {len(others)} features are left to draw {len(features)} from.")
    drawn = np.random.default_rng(seed).choice(others, len(features), replace=False)
    return dict(zip(drawn.tolist(), features.values(), strict=True))


def _replayed(
    model: HookedLLaVA, inputs: Inputs, cells: Sequence[Steering], positions: Any
) -> tuple[Float[Tensor, "cell ..."], Float[Tensor, "..."], np.ndarray]:
    """Logits under each steering and without any, and the cost: kept runs, forward passes re-run, runs.

    Those that put a reconstruction in share a run that has it.
    """
    plain = Replay(model, inputs)
    logits: list[Tensor] = [torch.empty(0)] * len(cells)
    cost = np.array([1.0, 0.0, 0.0])
    for reconstructs in (False, True):
        own = [i for i, one in enumerate(cells) if (one.reconstructs is not None) is reconstructs]
        if not own:
            continue
        with cells[own[0]].attached() if reconstructs else nullcontext():
            replay = Replay(model, inputs) if reconstructs else plain
            found = replay.run([cells[i].interventions for i in own], positions=positions)
        for i, row in zip(own, found, strict=True):
            logits[i] = row
        cost += (reconstructs, replay.work.forwards, len(own))
    return torch.stack(logits), plain.logits(positions), cost
