"""An analysis over a table of questions: asked, kept if answered correctly, measured, averaged by kind of question.

What is finished stays finished: with `out=` every batch is written as soon as it is done, so that an interrupted study
goes on where it stopped, and the result file appears only when it is whole. A file holds a hash of
what it is of: the questions, their images, the weights, and how they are asked and measured. Under `accelerate launch` or
`torchrun` each process measures its share of the batches, and all return the whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import xarray as xr

from hooked_llava.architecture.image_axis import Number
from hooked_llava.checks import whole_number
from hooked_llava.datasets.matching import Match, answers_match
from hooked_llava.datasets.parts import StudyParts, digest, image_digest
from hooked_llava.datasets.rows import StudyRow, boxes_lost, check_rows, prepare_rows
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import in_batches
from hooked_llava.machine.processes import Processes
from hooked_llava.model.weights_id import weights_hash
from hooked_llava.prompt.prepare import TEMPLATE_TAIL, TemplateLike
from hooked_llava.prompt.spans import BY_WORDS
from hooked_llava.prompt.templates import DEFAULT
from hooked_llava.replay.progress import progress_bar
from hooked_llava.results.map_quality import mean_intervals

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

Run = Callable[["Inputs", Sequence[StudyRow]], "xr.DataArray | xr.Dataset"]
"""From a batch of prompts and their rows to a result with the first axis `prompt` (without it for one prompt)."""
OF_ALL = "all"
"""The kind under which `by_kind` averages over every question."""
Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)
_LONGEST_WAIT = timedelta(weeks=4)  # of a process that is done, for the others


def study(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    run: Run,
    *,
    images: str | Path | None = None,
    out: str | os.PathLike[str] | None = None,
    only_correct: bool = True,
    match: Match = answers_match,
    batch_size: int = 8,
    max_new_tokens: int = 8,
    template: TemplateLike = DEFAULT,
    tail: str | None = TEMPLATE_TAIL,
    coverage: Number = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """An analysis of every question of a table, side by side on an axis `question`.

    The processes of `accelerate launch` or `torchrun` share it; each returns the whole, number by number that of one process.

    Args:
        model: the model.
        rows: the questions, each with an id of its own.
        run: the analysis, of a batch of prompts and their rows; its results must all have the same other axes.
        images: folder of the images that rows name.
        out: file for the result; started again with it, an interrupted study goes on, and a finished one is read back.
        only_correct: measure only what the model answers correctly, as Zhang et al. (2411.18620) do.
        match: what counts as correct, of what was said and the answer; the paper's own rule is `answers_match_exactly`.
        batch_size: questions at once, at most; fewer once memory runs out, with a warning.
        max_new_tokens: length of the answer at most.
        template: as for `model.prepare`.
        tail: as for `model.prepare`.
        coverage: share of a patch that the objects' boxes must cover for it to be one of `object`; as for `prepare_rows`.
        about: what `run` does, in plain values: a file of which any of this differs is refused.
        progress: show a progress bar on anything longer than two seconds.

    Returns the results in the table's order with coordinates `question` (ids), `kind`, `answer`, `said` and `boxes_lost`
    along `question`: how many of the row's boxes the model sees nothing of (their objects have no span); attributes
    `asked` and `correct` count questions by kind, and the options say how they were asked. Raises, before anything is
    asked, `InputError` for an empty table, repeated ids, missing images, a file of another study, and `SpanError` for
    what is no box; and `InputError` if no question is left to measure, or if processes differ in tables or files.
    """
    _check(rows, batch_size, judged=only_correct and match is answers_match)
    if out is not None:
        _check_out(Path(out))
    options = {"template": str(template), "tail": tail, "coverage": float(coverage), "only_correct": only_correct}
    options |= {} if match is answers_match else {"match": match.__name__}
    settings = {"max_new_tokens": max_new_tokens, "images": _place(images), **options, "about": dict(about or {})}
    parts = StudyParts(rows) if out is None else StudyParts.open(rows, Path(out), *_identity(model, rows, settings))
    processes = Processes.current(torch.device("cpu"), _LONGEST_WAIT)
    parts.check_agreement(processes)
    if parts.finished is not None:
        return parts.finished
    check_rows(parts.left(), images)
    prepare = partial(prepare_rows, model, images=images, template=template, tail=tail, coverage=coverage)
    asked = _Asking(model, run, prepare, only_correct, match, max_new_tokens, coverage)
    share = list(_batches(parts.left(), batch_size))[processes.index :: processes.n]
    asked.measure_all(share, parts, progress=progress and processes.index == 0)
    return parts.join(options, processes)


@dataclass(frozen=True)
class _Asking:
    """How one batch of rows is asked and measured."""

    model: HookedLLaVA
    run: Run
    prepare: Callable[[Sequence[StudyRow]], Inputs]
    only_correct: bool
    match: Match
    max_new_tokens: int
    coverage: Number

    def measure_all(self, batches: Sequence[Sequence[StudyRow]], parts: StudyParts, *, progress: bool) -> None:
        """Measure some batches, and keep each as soon as it is done."""
        done = len(parts.rows) - len(parts.left())
        total = done + sum(map(len, batches))
        with progress_bar(total, "question", shown=progress, done=done) as bar:
            for batch, part in in_batches(batches, self.measure):
                parts.add(batch, part)
                bar.update(len(batch))

    def measure(self, rows: Sequence[StudyRow]) -> xr.Dataset:
        """The analysis of those rows that are kept; empty if none is."""
        inputs = self.prepare(rows)
        said = self.model.generate(inputs, max_new_tokens=self.max_new_tokens)
        said = [said] if isinstance(said, str) else said
        right = [self.match(text, row.answer) for text, row in zip(said, rows, strict=True)]
        kept = [i for i, ok in enumerate(right) if ok or not self.only_correct]
        counts = {
            "asked": dict(Counter(row.kind for row in rows)),
            "correct": dict(Counter(row.kind for row, ok in zip(rows, right, strict=True) if ok)),
        }
        if not kept:
            return xr.Dataset(attrs=counts)
        chosen = [rows[i] for i in kept]
        inputs = inputs if len(kept) == len(rows) else self.prepare(chosen)
        result = _labelled(self.run(inputs, chosen), chosen, [said[i] for i in kept])
        lost = boxes_lost(inputs, chosen, self.coverage)
        return result.assign_coords(boxes_lost=("question", lost)).assign_attrs(counts)


def count_unseen(result: xr.Dataset) -> int:
    """How many questions of a study have an object that the model does not see: cut away, or too small."""
    return int((result["boxes_lost"] > 0).sum()) if "boxes_lost" in result.coords else 0


def as_kinds(result: Labelled) -> Labelled:
    """A result of one prompt, or means by kind, with the axes kind and statistic, of length one where it lacks them.

    >>> import xarray as xr
    >>> as_kinds(xr.DataArray([1.0], dims="edge")).dims
    ('kind', 'statistic', 'edge')
    """
    for axis, only in (("statistic", "mean"), ("kind", "")):
        result = result if axis in result.dims else result.expand_dims({axis: [only]})
    return result


def by_kind(result: xr.Dataset, *, n_boot: int = 1000, confidence: float = 0.95, seed: int = 0) -> xr.Dataset:
    """Mean and bootstrap interval of every number along `question`, by kind of question and over all of them.

    Questions are drawn with replacement within each kind; what is NaN (an edge that a question does not have) counts
    for nothing. Returns the axes kind and statistic ("mean", "low", "high") in the place of question, and `n` [kind],
    the number of questions. Raises `InputError` for a result without the axis question.

    >>> import xarray as xr
    >>> values = xr.Dataset({"effect": ("question", [1.0, 3.0, 5.0])}, coords={"kind": ("question", ["a", "a", "b"])})
    >>> by_kind(values).effect.sel(statistic="mean").values.tolist()
    [2.0, 5.0, 3.0]
    """
    if "question" not in result.dims or "kind" not in result.coords:
        raise InputError("by_kind averages along the axis 'question' by the coordinate 'kind', as study makes them.")
    kinds = [str(kind) for kind in result["kind"].values]
    groups = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    if len(groups) > 1:
        groups[OF_ALL] = list(range(len(kinds)))
    averaged: dict[str, Any] = {"n": ("kind", [len(group) for group in groups.values()])}
    for name, variable in result.data_vars.items():
        if "question" not in variable.dims or variable.dtype.kind not in "biuf":
            continue
        variable = variable.transpose("question", ...)
        values = variable.values.astype(float)
        stacked = [mean_intervals(values[g], n=n_boot, level=confidence, seed=seed) for g in groups.values()]
        averaged[str(name)] = (("kind", "statistic", *variable.dims[1:]), np.stack(stacked), dict(variable.attrs))
    coords = {name: c for name, c in result.coords.items() if "question" not in c.dims}
    coords |= {"kind": list(groups), "statistic": ["mean", "low", "high"]}
    attrs = {**result.attrs, "n_boot": n_boot, "confidence": confidence}
    return xr.Dataset(averaged, coords=coords, attrs=attrs)


def _labelled(result: xr.DataArray | xr.Dataset, rows: Sequence[StudyRow], said: Sequence[str]) -> xr.Dataset:
    """A result with the axis `question` first, and what is known of the questions along it."""
    dataset = result if isinstance(result, xr.Dataset) else result.to_dataset(name=str(result.name or "value"))
    dataset = dataset.assign_attrs(result.attrs)
    if "prompt" not in dataset.dims and len(rows) == 1:
        dataset = dataset.drop_vars("prompt", errors="ignore").expand_dims("prompt")
    if dataset.sizes.get("prompt") != len(rows):
        raise InputError(
            f"run returned the axes {dict(dataset.sizes)} for {len(rows)} prompts; expected an axis 'prompt' of "
            f"{len(rows)} (or none for a single prompt)."
        )
    words = {"question": [r.id for r in rows], "kind": [r.kind for r in rows], "answer": [r.answer for r in rows]}
    words["said"] = list(said)
    renamed = dataset.drop_vars(["prompt", *words], errors="ignore").rename(prompt="question")
    return renamed.assign_coords({name: ("question", np.array(column, dtype=str)) for name, column in words.items()})


def _batches(rows: Sequence[StudyRow], size: int) -> Iterator[list[StudyRow]]:
    """Neighbors that can be asked together."""
    for _, alike in groupby(rows, key=lambda row: (row.answer_prefix, row.image is None)):
        together = list(alike)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _check(rows: Sequence[StudyRow], batch_size: int, *, judged: bool) -> None:
    if not rows:
        raise InputError("The table has no questions; give at least one row.")
    whole_number(batch_size, "batch_size", least=1, expected="at least 1 question")
    repeated = [row_id for row_id, n in Counter(row.id for row in rows).items() if n > 1]
    if repeated:
        raise InputError(f"Rows share the ids {repeated[:3]}; give each row an id of its own.")
    if judged and not any(row.answer for row in rows):
        raise InputError(
            f"None of the {len(rows)} rows has an answer, so that nothing is known to be answered correctly; measure all with "
            "only_correct=False."
        )


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise InputError(
            f"out={str(out)!r} is a folder; give the name of a file, such as {str(out / 'study.safetensors')!r}."
        )
    if not out.parent.is_dir():
        raise InputError(f"out={str(out)!r} cannot be written: there is no folder {str(out.parent)!r}. Make it first.")


def _identity(model: HookedLLaVA, rows: Sequence[StudyRow], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A hash of the questions, the model, and how it is asked and measured; and the same in plain values, by name."""
    who = [model.config.model_name, str(model.cfg.dtype), weights_hash(model)]
    told = [_told(row) for row in rows]
    if any(span in json.dumps(settings["about"], default=str) for span in BY_WORDS):  # otherwise they mean nothing
        told = [[*one, list(row.objects), row.true_option] for one, row in zip(told, rows, strict=True)]
    questions = digest(json.dumps(told, default=str).encode())
    plain = dict(zip(("model", "dtype", "hash of the weights"), who, strict=True)) | {
        "number of questions": len(rows),
        "hash of the questions": questions,
    }
    plain |= {name: value for name, value in settings.items() if name != "about"} | settings["about"]
    fingerprint = digest(json.dumps([who, told, settings], sort_keys=True, default=str).encode())
    return fingerprint, json.loads(json.dumps(plain, default=str))


def _told(row: StudyRow) -> list[Any]:
    """What a row says, in plain values."""
    asked = [row.id, row.question, row.answer, row.kind, row.boxes, row.size, row.constraint, row.answer_prefix]
    later = [] if row.constraint_occurrence is None else [row.constraint_occurrence]  # 0.1 did not have it
    return [*asked, row.false_option, _shown(row), *later]


def _shown(row: StudyRow) -> str | None:
    """A row's image: its name, or a digest of its pixels."""
    if row.image is None or isinstance(row.image, (str, Path)):
        return None if row.image is None else str(row.image)
    return image_digest(row.image, f"The image of row {row.id}")


def _place(images: str | Path | None) -> str | None:
    return None if images is None else str(Path(images).resolve())
