"""The passes that an attribution to features takes: one forward and one backward, a path of them, or a re-run for each entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.architecture.hooks import Hook
from hooked_llava.model.attached_sae import Autoencoder, encoded_in_parts
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.attribution_methods import AttributionMethod
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import AnswerReading, read_answer
from hooked_llava.readout.answer_tokens import AnswerLike
from hooked_llava.readout.resid import logits_at, next_token_logits
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.map_quality import rank_correlation
from hooked_llava.steering.steering import width_of

_MOST_AT_ONCE = 2**24
"""Numbers of decoder rows that are held at once."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Features that are active at tokens of the prompt or of the reference, without the others.

    Attributes:
        position (Int[Tensor, " entry"]): The token.
        feature (Int[Tensor, " entry"]): The feature.
        active (Float[Tensor, " entry"]): Its activation in the prompt.
        change (Float[Tensor, " entry"]): The same less that in the reference, or less 0.
    """

    position: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"]
    active: Float[Tensor, " entry"]
    change: Float[Tensor, " entry"]

    def take(self, order: Int[Tensor, " some"]) -> Entries:
        """Some of them, in this order."""
        return Entries(*(values[order] for values in (self.position, self.feature, self.active, self.change)))


@dataclass(frozen=True, eq=False)
class Side:
    """One prompt that is run, and what is read from it.

    Attributes:
        reading (AnswerReading): The prompt, with an answer of several tokens appended.
        answers (tuple[tuple[int, AnswerReading], ...]): The answers that are read from it, each with its sign in d.
    """

    reading: AnswerReading
    answers: tuple[tuple[int, AnswerReading], ...]

    def preference(self, logits: Float[Tensor, "*run read d_vocab"]) -> Float[Tensor, "*run"]:
        """This prompt's part of d."""
        parts = [
            sign * own.log_probability(own.shaped(logits, *logits.shape[:-2]))[..., 0] for sign, own in self.answers
        ]
        return torch.stack(parts).sum(0)


class AttributionRuns:
    """The passes that an attribution takes, and the entries that it is made for.

    Args:
        model: the model.
        sae: the autoencoder.
        at: its hook.
        prompt: the prompt.
        sides: the prompts that are run, see `sides_of`.
        off: the prompt whose features are what "off" means; None for 0.
        n_forward: forward passes that were made to find the answers.
    """

    def __init__(
        self,
        model: HookedLLaVA,
        sae: Autoencoder,
        at: Hook,
        prompt: Inputs,
        sides: tuple[Side, ...],
        off: Inputs | None,
        n_forward: int = 0,
    ) -> None:
        self.model, self.sae, self.at, self.prompt, self.sides = model, sae, at, prompt, sides
        self.n_forward, self.n_backward, self.work = n_forward, 0, 0.0
        self.x, self.gradient, self.preference = self._differentiated()
        self.entries = self._active(None if off is None else self._activation(off))

    def measured(
        self, method: AttributionMethod, steps: int, top: int | None
    ) -> tuple[Entries, dict[str, Float[Tensor, " entry"]]]:
        """Entries from the largest attribution by size to the smallest, and their numbers."""
        entries, by_gradient = self.entries, self._along(self.gradient)
        values = {"attribution": by_gradient}
        if method == "integrated":
            values = {"attribution": self._along(self._mean_gradient(steps)), "gradient": by_gradient}
        elif method == "exact":
            largest = by_gradient.abs().argsort(descending=True, stable=True)[:top]
            entries = entries.take(largest)
            values = {"attribution": self._without_each(entries), "gradient": by_gradient[largest]}
        order = values["attribution"].abs().argsort(descending=True, stable=True)[:top]
        return entries.take(order), {name: numbers[order] for name, numbers in values.items()}

    def about(self) -> dict[str, Any]:
        """What was measured, and at what cost."""
        answers = [pair for side in self.sides for pair in side.answers]
        said = answers[0][1].attrs(self.model)
        if len(answers) > 1:
            said["baseline"] = answers[1][1].attrs(self.model, "baseline")["baseline"]
        image = set(self.prompt.token_map.spans.get("image", ()))
        counted = {"n_image": len(image), "n_text": len(set(self.prompt.token_map.own) - image)}
        cost = {"n_forward": self.n_forward, "n_backward": self.n_backward, "work": self.work}
        metric = {"metric": "logit_difference" if self._of_logits else "log_probability", "units": "nats"}
        return (
            said | counted | cost | metric | {"preference": self.preference, "sign": "positive argues for the answer"}
        )

    def labelled(
        self, entries: Entries, values: dict[str, Float[Tensor, " entry"]], attrs: dict[str, Any]
    ) -> xr.Dataset:
        """The entries with what stands at their tokens."""
        positions, labels = entries.position.tolist(), self.prompt.token_map.labels
        image = set(self.prompt.token_map.spans.get("image", ()))
        found = {name: ("entry", to_numpy(numbers)) for name, numbers in values.items()}
        coords = {
            "position": ("entry", positions),
            "label": ("entry", [labels[p] for p in positions]),
            "sae_feature": ("entry", entries.feature.tolist()),
            "in_image": ("entry", np.array([p in image for p in positions], dtype=bool)),
        }
        if "gradient" in values:
            attrs["rank_correlation"] = rank_correlation(
                *(to_numpy(values[name]) for name in ("attribution", "gradient"))
            )
        return xr.Dataset(found | {"activation": ("entry", to_numpy(entries.active))}, coords=coords, attrs=attrs)

    @property
    def _of_logits(self) -> bool:
        """Whether log P(answer) - log P(baseline) is a difference of logits: of one token each."""
        return len(self.sides) == 1 and len(self.sides[0].answers) > 1

    def _differentiated(self, shift: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """The activation at the hook [pos, d], the gradient of d there, and d; `shift` is added to the activation first."""
        n, total, preference, first = self.prompt.shape[1], None, 0.0, None
        for side in self.sides:
            x, gradient, value = self._one_side(side, shift)
            first = x[:n] if first is None else first
            total = gradient[:n] if total is None else total + gradient[:n]
            preference += value
        assert first is not None
        assert total is not None
        return first, total, preference

    def _one_side(self, side: Side, shift: Tensor | None) -> tuple[Tensor, Tensor, float]:
        model, inputs, layer = self.model, side.reading.inputs, max(self.at.stage, 0)
        held: list[Tensor] = []

        @reads_only
        def start(tensor: Tensor, hook: HookPoint) -> Tensor:
            x = tensor.detach().clone()
            if shift is not None:
                x[:, : len(shift)] += shift.to(x.dtype).view_as(x[:, : len(shift)])
            held.append(x.requires_grad_())
            return held[0]

        entering = model.embed(inputs) if layer == 0 else model(inputs, stop_at_layer=layer)
        where = {"attention_mask": inputs.padding_mask, "position_ids": inputs.position_ids}
        with torch.enable_grad(), model.hooks([(self.at.name, start)]):
            resid = model(entering, **where, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
            value = side.preference(logits_at(model, resid, side.reading.logit_positions)[0])
        (gradient,) = torch.autograd.grad(value, held)
        self.n_forward, self.n_backward = self.n_forward + 1, self.n_backward + 1
        return held[0].detach()[0].flatten(1), at_least_float32(gradient[0].flatten(1)), float(value)

    def _activation(self, inputs: Inputs) -> Float[Tensor, "pos d"]:
        """The activation at the hook in another prompt."""
        stop = self.at.stage + 1
        cache: Any = self.model.run_with_cache(inputs, names_filter=self.at.name, stop_at_layer=stop)[1]
        self.n_forward += 1
        return cache[self.at.name][0].flatten(1)

    def _active(self, off: Float[Tensor, "pos d"] | None) -> Entries:
        """What is active at the prompt's own tokens, there or in the reference."""
        own = torch.tensor(list(self.prompt.token_map.own), device=self.x.device)
        keys, active = self._sparse(self.x[own])
        change = active
        if off is not None:
            others, minus = self._sparse(off[own])
            keys, index = torch.cat([keys, others]).unique(return_inverse=True)
            change = active.new_zeros(len(keys)).index_add(0, index, torch.cat([active, -minus]))
            active = active.new_zeros(len(keys)).index_add(0, index[: len(active)], active)
        d_sae = len(self.sae.W_dec)
        return Entries(own[keys // d_sae], keys % d_sae, active, change)

    def _sparse(self, x: Float[Tensor, "pos d"]) -> tuple[Int[Tensor, " entry"], Float[Tensor, " entry"]]:
        """The active features of vectors: position * d_sae + feature, and the activation."""
        keys, values, before = [], [], 0
        for part in encoded_in_parts(self.sae, x.to(self.sae.b_dec.dtype)):
            row, slot = (part.values > 0).nonzero(as_tuple=True)
            keys.append((row + before) * len(self.sae.W_dec) + part.indices[row, slot])
            values.append(part.values[row, slot].detach())
            before += len(part.values)
        return torch.cat(keys), torch.cat(values)

    def _rows(self) -> list[Int[Tensor, " some"]]:
        """The entries in parts, whose decoder rows are held together."""
        everything = torch.arange(len(self.entries.feature), device=self.entries.feature.device)
        return list(everything.split(max(1, _MOST_AT_ONCE // self.sae.W_dec.shape[1])))

    def _along(self, gradient: Float[Tensor, "pos d"]) -> Float[Tensor, " entry"]:
        """What each feature adds to d at its token by a gradient: its change times the gradient along its decoder row."""
        e = self.entries
        parts = [
            (gradient[e.position[i]] * at_least_float32(self.sae.W_dec[e.feature[i]])).sum(-1) for i in self._rows()
        ]
        return torch.cat(parts) * at_least_float32(e.change)

    def _mean_gradient(self, steps: int) -> Float[Tensor, "pos d"]:
        """The mean gradient at the midpoints of equal parts of the line from all features off to the prompt's."""
        e, written = self.entries, torch.zeros_like(self.gradient)
        for i in self._rows():
            rows = at_least_float32(self.sae.W_dec[e.feature[i]] * e.change[i, None])
            written.index_add_(0, e.position[i], rows.to(written))
        shifts = (-(1 - (step + 0.5) / steps) * written for step in range(steps))
        return torch.stack([self._differentiated(shift)[1] for shift in shifts]).mean(0)

    def _without_each(self, entries: Entries) -> Float[Tensor, " entry"]:
        """d less d where one feature at one token is off, from a re-run for each."""
        shape = width_of(self.model, self.at)
        lost = [
            (p, -(change * self.sae.W_dec[feature]).detach().view(shape))
            for p, feature, change in zip(
                entries.position.tolist(), entries.feature.tolist(), entries.change, strict=True
            )
        ]
        runs = [Intervention(self.at.name, positions=[p], add=vector) for p, vector in lost]
        return torch.stack([self._changes(side, runs) for side in self.sides]).sum(0)

    def _changes(self, side: Side, runs: list[Intervention]) -> Float[Tensor, " run"]:
        """By how much each run lowers one prompt's part of d."""
        positions = side.reading.positions

        def preference(logits: Tensor) -> Tensor:
            return side.preference(logits[..., None, :] if positions == "last" else logits)

        replay = Replay(self.model, side.reading.inputs)
        found = preference(replay.logits(positions)) - replay.run(runs, preference, positions)
        self.n_forward, self.work = self.n_forward + 1, self.work + replay.work.forwards
        return found


def sides_of(
    model: HookedLLaVA, prompt: Inputs, answer: AnswerLike | None, baseline: AnswerLike | None
) -> tuple[tuple[Side, ...], int]:
    """The prompts that are run, and how many forward passes it took to know them.

    One prompt where all answers are a single token, else one for each answer.
    """
    asks_model = answer is None and not prompt.token_map.n_answer
    if asks_model:
        answer = int(next_token_logits(model, prompt)[0].argmax())
    found = [(1, read_answer(model, prompt, None if answer is None else [answer]))]
    if baseline is not None:
        found.append((-1, read_answer(model, prompt, [baseline], "baseline")))
    if all(reading.positions == "last" for _, reading in found):
        return (Side(found[0][1], tuple(found)),), int(asks_model)
    return tuple(Side(reading, ((sign, reading),)) for sign, reading in found), int(asks_model)
