"""What an edit changed: the fact it was to change, the ways of asking for it, and everything else.

The measures of Basu et al. (arXiv 2406.04236) and Meng et al. (arXiv 2202.05262): efficacy (the edited question),
generalisation (other images, other words), specificity (questions whose answers are to stay) and locality (how far the
next-token distribution of unrelated prompts moves).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.editing import weight_records
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.magnitude import MAGNITUDES, MAX_ANSWER, AnswerBefore, no_magnitudes
from hooked_llava.editing.prompts import KeptPrompts, keep_prompts
from hooked_llava.editing.request import EditRequest
from hooked_llava.editing.roles import PROBE_ROLES, Role
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import samples
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer import (
    FIRST,
    WHOLE,
    answer_is_said,
    answer_log_probability,
    said_until_wrong,
    token_table,
)
from hooked_llava.readout.answer_tokens import one_answer
from hooked_llava.readout.metrics import kl_divergence
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.results.provenance import Provenance


@dataclass(frozen=True)
class Probe:
    """Prompts that say one thing about an edit.

    Attributes:
        name (str): What is asked, such as "other images".
        role (Role): What it measures.
        prompts (InputsLike | KeptPrompts): The prompts, or prompts that were run before.
        expected (Sequence[str | int | Sequence[int]] | str | int | None): The answers, one for all prompts or one each:
            text of one or more tokens, or token ids (a list of lists for several); None: the first token of what the
            model answers without the edit.
    """

    name: str
    role: Role
    prompts: InputsLike | KeptPrompts
    expected: Sequence[str | int | Sequence[int]] | str | int | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """A probe's prompts, asked without the edit and with it.

    Attributes:
        probe (Probe): What was asked.
        expected (Int[Tensor, "prompt read variant"]): The tokens that are expected where they are predicted, -1 after
            an answer's end.
        measured (str): "whole answer", or "first token" where nothing was expected but what the model says.
        before (Float[Tensor, "prompt read d_vocab"]): Logits there without the edit.
        after (Float[Tensor, "prompt read d_vocab"]): Likewise with it.
        answer_before (AnswerBefore | None): What is answered without the edit, where that is to change.
    """

    probe: Probe
    expected: Int[Tensor, "prompt read variant"]
    measured: str
    before: Float[Tensor, "prompt read d_vocab"]
    after: Float[Tensor, "prompt read d_vocab"]
    answer_before: AnswerBefore | None = None

    @property
    def n_forward(self) -> int:
        """Prompts that were run: without the edit and with it, and again for what was generated."""
        told = self.answer_before
        return len(self.before) * (2 if told is None else 3 if told.ids.shape[1] == 1 else 5)

    def measures(self) -> dict[str, Float[Tensor, " prompt"]]:
        """What is measured of every prompt, as `evaluate_edit` averages it."""
        first, now = self.before[:, 0], self.after[:, 0]
        return {
            "accuracy_before": answer_is_said(self.before, self.expected).float(),
            "accuracy": answer_is_said(self.after, self.expected).float(),
            "probability_before": answer_log_probability(self.before, self.expected).exp(),
            "probability": answer_log_probability(self.after, self.expected).exp(),
            "changed": (first.argmax(-1) != now.argmax(-1)).float(),
            "kl": kl_divergence(first)(now),
            **self._magnitudes(),
        }

    def _magnitudes(self) -> dict[str, Float[Tensor, " prompt"]]:
        told = self.answer_before
        return (
            no_magnitudes(len(self.before)) if told is None else told.magnitudes(self.expected, self.before, self.after)
        )

    def said(self, model: HookedLLaVA) -> tuple[list[str], list[str]]:
        """What each prompt is answered before and after, up to the first token that is not the expected answer's."""
        rows = [logits.argmax(-1) for logits in (self.before, self.after)]
        before, after = (
            [decode_text(model, said_until_wrong(best, ids)) for best, ids in zip(row, self.expected, strict=True)]
            for row in rows
        )
        return before, after


def evaluate_edit(
    model: HookedLLaVA, edit: Edit, probes: Sequence[Probe], *, max_new_tokens: int = MAX_ANSWER
) -> xr.Dataset:
    """How often each probe's prompts get the expected answer, without the edit and with it.

    Args:
        model: the edit's model.
        edit: an edit, applied or not; it is left as it is found.
        probes: what to ask. For efficacy and generalisation `expected` is the edit's target, for specificity the answer
            that is to stay.
        max_new_tokens: length at most of the answers before the edit, that targets are set against.

    Returns a dataset over `probe` (with its `role`, number of prompts `n`, and `measured`): `accuracy_before` and `accuracy`
    (share of prompts that the model answers, greedily, with every token of what is expected), `probability_before` and
    `probability` (mean P of the whole of it), `changed` (share whose most probable next token is another than before) and `kl`
    (mean KL(before || after) of the next token in nats). Where answers are to change there are besides `magnitude_before` and
    `magnitude`, the mean P(target) - P(answer before): efficacy magnitude, with the answer that is generated without the edit,
    whole answers on both sides; and `first_token_magnitude_before` and `first_token_magnitude`, the same of their first
    tokens, as the papers have it (0 if they begin alike). They are NaN elsewhere, and for prompts that were kept without their
    answers (`keep_prompts(..., max_new_tokens=20)`). `measured` is "whole answer", or "first token" where nothing is
    expected but what the model says without the edit. Raises `InputError` for an edit of another model, no probes, expected
    answers that do not fit, and kept prompts that are out of date or that the edit changes before they enter the first layer.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, multedit
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> edit = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last")
    >>> other = Probe("other words", "generalisation", model.prepare("Who is the maker of the star?"), "Boris")
    >>> evaluate_edit(model, edit, [other]).accuracy_before.values.tolist()
    [0.0]
    """
    made = Provenance.of("evaluate_edit", model, edited_questions(edit), method=dict(edit.method))
    asked = ask_probes(model, edit, probes, max_new_tokens=max_new_tokens)
    made.n_forward = sum(one.n_forward for one in asked)
    return averaged(asked, made)


def averaged(asked: Sequence[Asked], made: Provenance) -> xr.Dataset:
    """The result of `evaluate_edit`."""
    names = {"probe": [one.probe.name for one in asked], "role": ("probe", [one.probe.role for one in asked])}
    names["measured"] = ("probe", [one.measured for one in asked])
    rows = [{name: float(x.mean()) for name, x in one.measures().items()} | {"n": len(one.before)} for one in asked]
    values = {name: ("probe", [row[name] for row in rows]) for name in rows[0]}
    return xr.Dataset(values, coords=names, attrs=made.attrs())


def ask_probes(
    model: HookedLLaVA, edit: Edit, probes: Sequence[Probe], *, max_new_tokens: int = MAX_ANSWER
) -> list[Asked]:
    """Every probe's prompts asked without the edit and with it, whether or not it is applied now; as `evaluate_edit`."""
    edit.check_model(model)
    if not probes:
        raise InputError("There are no probes; give at least one.")
    was_applied = edit.is_applied
    if was_applied:
        edit.revert()
    try:
        layer, weights = edit.first_affected_layer, samples(weight_records.originals(model))
        kept = [_kept(model, probe, edit, layer, weights, max_new_tokens) for probe in probes]
        expected = [_expected(model, probe, prompts) for probe, prompts in zip(probes, kept, strict=True)]
        told = [
            prompts.answers if PROBE_ROLES[p.role].to_change else None for p, prompts in zip(probes, kept, strict=True)
        ]
        read = [_to_read(ids, ours) for (ids, _), ours in zip(expected, told, strict=True)]
        before = [[_before(prompts, ids) for ids in own] for prompts, own in zip(kept, read, strict=True)]
        with edit.applied():
            after = [_now(*one, layer) for one in zip(probes, kept, read, strict=True)]
    finally:
        if was_applied:
            edit.apply()
    return [
        Asked(probe, ids, measured, b[0], a[0], None if ours is None else AnswerBefore.of(ours, b[-1], a[-1]))
        for probe, (ids, measured), ours, b, a in zip(probes, expected, told, before, after, strict=True)
    ]


def _to_read(expected: Tensor, told: Tensor | None) -> list[Int[Tensor, "..."]]:
    """Answers to be appended: what is expected, and what was answered; its first token alone is read before any answer."""
    return [expected[..., 0], *([] if told is None or told.shape[1] == 1 else [told])]


def summary(result: xr.Dataset) -> dict[str, float]:
    """An edit's measures by role, each probe with one vote: accuracy of efficacy and generalisation, the drop of
    specificity (accuracy before less after, in points) and the KL of locality in nats; what was not probed is absent.

    Efficacy has besides `efficacy_magnitude`, P(target) - P(answer before) of whole answers, and
    `efficacy_first_token_magnitude`, that of their first tokens.
    """
    found: dict[str, float] = {}
    for name, role in PROBE_ROLES.items():
        own = result.isel(probe=[i for i, of in enumerate(result.role.values) if of == name])
        if own.sizes["probe"]:
            found[role.measure] = role.of(own)
        if name == "efficacy":
            found |= {
                f"{name}_{of}": float(own[of].mean()) for of in MAGNITUDES if of in own and own[of].notnull().any()
            }
    return found


def sequential_edits(
    model: HookedLLaVA,
    requests: Sequence[EditRequest],
    make: Callable[[HookedLLaVA, EditRequest], Edit],
    measure: Callable[[int], Mapping[str, float]],
    *,
    at: Sequence[int] = (1, 2, 5, 10, 20, 50),
) -> xr.Dataset:
    """One edit after the other, each computed on the model that the earlier ones left; all are reverted at the end.

    Args:
        model: the model.
        requests: the facts to change, in this order.
        make: computes an edit for one request, for example `lambda m, r: multedit(m, r, layer=4)`.
        measure: called after so many edits as `at` says; returns numbers by name, the same names every time.
        at: after how many edits to measure; more than there are requests are left out.

    Returns a dataset over `n_edits`. Raises `InputError` if `at` names no number of edits, or the names differ.
    """
    points = sorted({n for n in at if 1 <= n <= len(requests)})
    if not points:
        raise InputError(f"at={list(at)} names no number of edits from 1 to {len(requests)}.")
    made = Provenance.of("sequential_edits", model, f"{points[-1]} requests", method="sequential")
    rows: list[Mapping[str, float]] = []
    with ExitStack() as active:
        for n, request in enumerate(requests[: points[-1]], start=1):
            active.enter_context(make(model, request).applied())
            if n in points:
                rows.append(measure(n))
                if rows[-1].keys() != rows[0].keys():
                    raise InputError(
                        f"measure({n}) returned {sorted(rows[-1])} and measure({points[0]}) {sorted(rows[0])}; expected the "
                        "same names every time."
                    )
    values = {name: ("n_edits", [row[name] for row in rows]) for name in rows[0]}
    return xr.Dataset(values, coords={"n_edits": points}, attrs=made.attrs())


def _kept(
    model: HookedLLaVA, probe: Probe, edit: Edit, layer: int | None, weights: Tensor, max_new_tokens: int
) -> KeptPrompts:
    """The probe's prompts without the edit, to be entered at its first layer."""
    one_of(probe.role, PROBE_ROLES, "role", says=f"Probe {probe.name!r} has role {probe.role!r}.")
    given = probe.prompts
    if not isinstance(given, KeptPrompts):
        n_new = max_new_tokens if PROBE_ROLES[probe.role].to_change else 0
        return keep_prompts(model, given, [layer or 0], max_new_tokens=n_new)
    given.check_current(model, weights, probe.name)
    if layer is None:
        raise InputError(
            f"The edit changes what enters the first layer ({', '.join(edit.changes)}), which the kept prompts of probe "
            f"{probe.name!r} hold as it was. Give the prompts themselves."
        )
    return given


def _before(kept: KeptPrompts, ids: Int[Tensor, "prompt read"]) -> Float[Tensor, "prompt read d_vocab"]:
    """Logits without the edit; of the next token they were kept."""
    return kept.before[:, None] if ids.shape[1] == 1 else kept.answer_logits(ids)


def _now(probe: Probe, prompts: KeptPrompts, read: Sequence[Tensor], layer: int | None) -> list[Float[Tensor, "..."]]:
    """Logits of each answer under the edit: from its first layer on, or from the pixels and tokens on."""
    if layer is not None:
        return [prompts.answer_logits(ids, layer) for ids in read]
    assert not isinstance(probe.prompts, KeptPrompts)  # these have been refused
    again = keep_prompts(prompts.kept.model, probe.prompts)
    return [_before(again, ids) for ids in read]


def _expected(model: HookedLLaVA, probe: Probe, prompts: KeptPrompts) -> tuple[Int[Tensor, "prompt read variant"], str]:
    """The tokens of one answer for each prompt, and whether they are the whole of it."""
    if probe.expected is None:
        if PROBE_ROLES[probe.role].to_change:
            raise InputError(f"Probe {probe.name!r} measures {probe.role} and needs expected=, the edit's target.")
        return prompts.before.argmax(-1)[:, None, None], FIRST
    several = isinstance(probe.expected, Sequence | np.ndarray | Tensor) and not isinstance(probe.expected, str)
    given: Sequence[Any] = probe.expected if several else [probe.expected] * len(prompts)  # type: ignore[assignment]
    if len(given) != len(prompts):
        raise InputError(f"Probe {probe.name!r} has {len(prompts)} prompts and {len(given)} expected answers.")
    rows = [
        one_answer(model, prompt, answer).variants for prompt, answer in zip(prompts.token_maps, given, strict=True)
    ]
    return token_table(rows), WHOLE


def edited_questions(edit: Edit) -> str:
    """The edit's requests in a line."""
    texts = [f"{request.get('prompts', ['?'])[0]} -> {request.get('target', '?')}" for request in edit.requests]
    return " | ".join(texts)
