"""Where the answers to a table of questions come back: a causal trace of each, summed up by the roles of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hooked_llava.analysis.causal_trace import LOWERED, ROLES, by_role, causal_trace, restored_windows
from hooked_llava.datasets.parts import image_digest
from hooked_llava.datasets.rows import StudyRow, naming_row, prepare_rows
from hooked_llava.datasets.study import by_kind, study
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import (
    Corruption,
    Noise,
    OtherImage,
    Replace,
    describe,
    replacement,
)
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.options.window_readings import WindowReading
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.templates import image_token_of
from hooked_llava.results.arrays import TIED, join_attrs

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

_ALIKE = ("model", "corruption_kind", "window", "window_reading", "units")
_EFFECTS = ["indirect_effect", "restored"]


def trace_study(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    *,
    corruption: Corruption | Callable[[StudyRow], Corruption] = Noise(),  # noqa: B008 (it is frozen)
    kinds: Sequence[str] = tuple(TRACE_KINDS),
    window: int = 1,
    window_reading: WindowReading = "centered",
    layers: int | Sequence[int] | None = None,
    **options: Any,
) -> xr.Dataset:
    """`causal_trace` of every question of a table, averaged over the tokens of each role; see `datasets.study`.

    Basu et al. (2406.04236) trace the tables that `datasets.read_vqa_constraints` reads. These hold no answers: measure them
    with only_correct=False. What is followed is the model's own first token. `trace_means` averages over questions.

    Args:
        model: the model.
        rows: the questions, each with a constraint.
        corruption: as for `causal_trace`; or a function that gives each row its own.
        kinds: as for `causal_trace`, as all that follow.
        window: how many layers are restored together.
        window_reading: what the width counts.
        layers: centers of the windows.
        options: those of `datasets.study`: `images`, `out`, `only_correct`, `match`, `batch_size`, `template`, `tail`, ...

    Returns `indirect_effect` and `restored` [question, output, layer, role], NaN for a role that a question lacks, where output
    is what was restored (`kinds`); `p_clean`, `p_corrupted` and `lowered_by` [question]. Raises as both functions; rows
    without a constraint, and words of another number of tokens, are refused before anything is asked.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", constraint="the star")
    >>> dict(trace_study(model, [row], corruption="the ring").indirect_effect.sizes)
    {'question': 1, 'output': 3, 'layer': 6, 'role': 9}
    """
    named, centers, _ = restored_windows(model, kinds, window, window_reading, layers)
    chosen = {row.id: corruption(row) if callable(corruption) else corruption for row in rows}
    _check_words(model, rows, chosen, **{name: options[name] for name in ("template", "tail") if name in options})
    how: dict[str, Any] = {"kinds": named, "window": window, "window_reading": window_reading, "layers": centers}
    told = [_told(chosen[row.id]) for row in rows] if callable(corruption) else _told(corruption)
    about = {**how, "corruption": told, "analysis": "causal_trace"}
    said = _said(
        {"corruption": describe(one), "corruption_kind": describe(one, words=False)} for one in chosen.values()
    )

    def run(inputs: Inputs, asked: Sequence[StudyRow]) -> xr.Dataset:
        def trace(one: Inputs, row: StudyRow) -> xr.Dataset:
            return causal_trace(model, one, one.token_map["constraint"], corruption=chosen[row.id], **how)

        return _side_by_side(inputs.each(trace, inputs, asked)).assign_attrs(corruption=said)

    return study(model, rows, run, about=about, **options)


def trace_means(result: xr.Dataset, *, min_drop: float = LOWERED, n_boot: int = 1000) -> xr.Dataset:
    """A trace study averaged by kind of question, with bootstrap intervals; its effects over the lowered questions alone.

    Questions whose answer the corruption lowers by less than `min_drop` of its probability have nothing to restore.

    Returns what `datasets.by_kind` does, with `lowered` [kind, statistic], the share of questions whose answer was lowered,
    `n_lowered` [kind], their number, and `n_counted` [kind, role], over how many questions the effects are averaged: lowered
    ones that have the role; one alone has no interval. Roles that no question has are left out. Raises `InputError` for another
    result.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", constraint="the star")
    >>> means = trace_means(trace_study(model, [row], corruption="the ring"))
    >>> means.lowered.sel(statistic="mean").values.tolist(), means.n_counted.sel(role="last").values.tolist()
    ([1.0], [1])
    """
    if missing := [name for name in (*_EFFECTS, "lowered_by") if name not in result]:
        raise InputError(f"trace_means averages what trace_study gives; got {list(result)}, which lacks {missing}.")
    present = result.indirect_effect.notnull().any(("question", "output", "layer"))
    result = result.isel(role=np.flatnonzero(present.values))
    lowered = result.lowered_by >= min_drop
    effects = result[_EFFECTS].where(lowered)
    counted = effects.indirect_effect.notnull().any(("output", "layer"))
    means = by_kind(result.assign(effects).assign(lowered=lowered, counted=counted), n_boot=n_boot)
    n_counted, n_lowered = (
        (means[name].sel(statistic="mean", drop=True) * means.n).round().astype(int) for name in ("counted", "lowered")
    )
    known = (n_counted > 1) | (means.statistic == "mean")  # of one question there is no interval
    means = means.drop_vars("counted").assign(means[_EFFECTS].where(known))
    return means.assign(n_counted=n_counted, n_lowered=n_lowered).assign_attrs(min_drop=min_drop)


def best_effects(means: xr.Dataset) -> xr.Dataset:
    """For each kind of question and output the largest mean effect [kind, output, statistic], with its `layer` and `role`.

    `means` are those of `trace_means`. Of several as large (but for a thousandth) it is the first, in the lowest layer. NaN for a
    kind of which no question was lowered.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", constraint="the star")
    >>> best = best_effects(trace_means(trace_study(model, [row], corruption="the ring")))
    >>> best.output.values.tolist(), best.layer.values[0].tolist(), best.role.values[0].tolist()
    (['mlp', 'attn', 'resid'], [4, 0, 0], ['last', 'constraint last', 'constraint last'])
    """
    cells = means.indirect_effect.stack(cell=("layer", "role")).reset_index("cell")
    effects = cells.sel(statistic="mean", drop=True).fillna(-np.inf)
    largest = effects.max("cell")
    at = (effects >= largest - TIED * abs(largest)).argmax("cell")
    return cells.isel(cell=at).to_dataset(name="indirect_effect").assign_attrs(means.attrs)


def average_traces(traces: Sequence[xr.Dataset], *, min_drop: float = LOWERED) -> xr.Dataset:
    """The mean indirect effect of traces of one question each by kind, layer and role, with its 95% interval.

    Each trace is one vote per role. Questions whose answer the corruption lowers by less than `min_drop` of its
    probability have nothing to restore: they are left out and counted in the attributes `left_out` and `left_out_drops`.

    Returns `indirect_effect`, `low`, `high` (of its bootstrap interval over questions) [kind, layer, role], `n` [role]. Raises
    `InputError` if there is no trace, or none is left, or they differ in model, kinds, layers, windows or units. For the
    questions of a table there is `trace_study`.
    """
    _check_alike(traces)
    drops = [float(trace.lowered_by) for trace in traces]
    kept = [trace for trace, drop in zip(traces, drops, strict=True) if drop >= min_drop]
    if not kept:
        raise InputError(
            f"None of the {len(drops)} traces is of a question whose answer the corruption lowers by {min_drop:g} or "
            f"more (largest: {max(drops, default=0.0):.3g}), so there is nothing to average. Corrupt harder."
        )
    stacked = _side_by_side(kept).rename(prompt="question")
    means = trace_means(stacked.assign_coords(kind=("question", [""] * len(kept))), min_drop=min_drop).isel(
        kind=0, drop=True
    )
    means = means.rename(output="kind")
    ends = {name: means.indirect_effect.sel(statistic=name, drop=True) for name in ("mean", "low", "high")}
    left_out = [drop for drop in drops if drop < min_drop]
    attrs = {name: value for name, value in means.attrs.items() if name not in ("n_boot", "confidence")}
    return xr.Dataset(
        {"indirect_effect": ends["mean"], "low": ends["low"], "high": ends["high"], "n": means.n_counted},
        attrs=attrs | {"left_out": len(left_out), "left_out_drops": left_out},
    )


def _side_by_side(traces: Sequence[xr.Dataset]) -> xr.Dataset:
    """Traces summed up by role as [prompt, output, layer, role], with all roles; costs are added up."""
    each = [by_role(trace).drop_vars("n_positions").reindex(role=list(ROLES)) for trace in traces]
    joined = xr.concat(each, "prompt", join="exact", coords="minimal", compat="override", combine_attrs="drop")
    attrs = join_attrs([trace.attrs for trace in traces], keep_differing=False)
    return joined.rename(kind="output").assign_attrs(attrs | {"corruption": _said(trace.attrs for trace in traces)})


def _said(abouts: Iterable[Mapping[str, Any]]) -> str:
    """The corruption in words: the one that all have, or else their kinds."""
    abouts = list(abouts)
    words = {str(about["corruption"]) for about in abouts}
    return words.pop() if len(words) == 1 else " or ".join(dict.fromkeys(about["corruption_kind"] for about in abouts))


def _told(corruption: Corruption) -> str:
    """A corruption as the file of a study knows it; raises `InputError` for an image that has no pixels of its own."""
    if not isinstance(corruption, OtherImage):
        return repr(corruption)
    if isinstance(corruption.image, Inputs | Mapping):
        raise InputError("OtherImage(...) of a table takes an image, a file or pixels, and was given prepared inputs.")
    return f"OtherImage({image_digest(corruption.image, 'The other image')})"


def _check_words(
    model: HookedLLaVA, rows: Sequence[StudyRow], chosen: Mapping[str, Corruption], **written: Any
) -> None:
    """That rows have constraints and replacements fit them, as far as the questions' words say it, written as they are asked."""
    if lacking := [row.id for row in rows if not row.constraint]:
        raise InputError(
            f"The rows {lacking[:3]} have no constraint, the words that are corrupted; name them: StudyRow(constraint=...)."
        )
    known = set()
    for row in rows:
        corruption = chosen[row.id]
        asked = (row.question, row.constraint, row.constraint_occurrence, repr(corruption))
        if asked in known:
            continue
        known.add(asked)
        words_only = replace(
            row, question=row.question.replace(image_token_of(model.processor), ""), image=None, boxes=()
        )
        token_map = prepare_rows(model, [words_only], **written).token_map
        if isinstance(corruption, str | Replace):
            words = Replace(corruption) if isinstance(corruption, str) else corruption
            with naming_row(row):
                replacement(model, token_map, [token_map["constraint"]], words)


def _check_alike(traces: Sequence[xr.Dataset]) -> None:
    """Raises `InputError` unless the traces measure the same; of a corruption the words may differ, not its kind."""
    for trace in traces:
        for name in ("kind", "layer"):
            if not np.array_equal(trace[name].values, traces[0][name].values):
                given = [t[name].values.tolist() for t in (traces[0], trace)]
                raise InputError(
                    f"The traces have different {name}s, {given[0]} and {given[1]}; average like with like."
                )
        for name in _ALIKE:
            given = [str(t.attrs.get(name, "not given")) for t in (traces[0], trace)]
            if given[0] != given[1]:
                raise InputError(f"The traces differ in {name}: {given[0]!r} and {given[1]!r}; average like with like.")
