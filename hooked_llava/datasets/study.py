"""An analysis over a table of questions: asked, kept if answered correctly, measured, averaged by kind of question.

What is finished stays finished: with `out=` every batch is written as soon as it is done, so that an interrupted study
goes on where it stopped, and the result file appears only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hooked_llava.datasets.rows import StudyRow, prepare_rows
from hooked_llava.errors import InputError
from hooked_llava.geometry import Number
from hooked_llava.inputs import TEMPLATE_TAIL
from hooked_llava.results import load, save
from hooked_llava.templates import DEFAULT

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA

Run = Callable[["Inputs", Sequence[StudyRow]], Any]
"""From a batch of prompts and their rows to a result with the first axis `prompt` (without it for one prompt)."""
OF_ALL = "all"
"""The kind under which `by_kind` averages over every question."""
_ADDED = ("n_forward", "seconds", "work", "runs")
_PATIENCE = 2.0  # seconds before a progress bar appears


def study(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    run: Run,
    *,
    images: str | Path | None = None,
    out: str | os.PathLike[str] | None = None,
    only_correct: bool = True,
    batch_size: int = 8,
    max_new_tokens: int = 8,
    template: Any = DEFAULT,
    tail: str | None = TEMPLATE_TAIL,
    coverage: Number = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """An analysis of every question of a table, side by side on an axis `question`.

    Args:
        model: the model.
        rows: the questions, each with an id of its own.
        run: the analysis, of a batch of prompts and their rows; its results must all have the same other axes.
        images: folder of the pictures that rows name.
        out: file to write the result to; an interrupted study that is started again with it goes on, and a finished one
            is read back.
        only_correct: measure only what the model answers correctly (without regard to case and a final full stop), as
            Zhang et al. (2411.18620) do.
        batch_size: questions at once, at most.
        max_new_tokens: length of the answer at most.
        template: as for `model.prepare`.
        tail: as for `model.prepare`.
        coverage: share of a patch that the objects' boxes must cover for it to be one of `object`.
        about: what `run` does, in plain values; a file that was made otherwise is then refused.
        progress: show a progress bar on anything longer than two seconds.

    Returns the results with coordinates `question` (ids), `kind`, `answer` and `said` along `question`; attributes
    `asked` and `correct` count questions by kind, and the options say how they were asked. Raises `InputError` for an
    empty table, repeated ids, missing pictures, a file of another study, and if no question is left to measure.
    """
    _check(rows, batch_size)
    options = {"template": str(template), "tail": tail, "coverage": float(coverage), "only_correct": only_correct}
    settings = {"model": model.config.model_name, "batch_size": batch_size, **options, "about": dict(about or {})}
    parts = _Parts.open(out, _fingerprint(rows, settings))
    if parts.finished is not None:
        return parts.finished
    asked = _Asking(model, run, images, only_correct, max_new_tokens, template, tail, coverage)
    hidden = None if progress else True
    with tqdm(total=len(rows), unit="question", delay=_PATIENCE, disable=hidden, leave=False) as bar:
        for number, batch in enumerate(_batches(rows, batch_size)):
            if number not in parts:
                parts.add(number, asked.measure(batch))
            bar.update(len(batch))
    return parts.join(options)


@dataclass(frozen=True)
class _Asking:
    """How one batch of rows is asked and measured."""

    model: HookedLLaVA
    run: Run
    images: str | Path | None
    only_correct: bool
    max_new_tokens: int
    template: Any
    tail: str | None
    coverage: Number

    def measure(self, rows: Sequence[StudyRow]) -> xr.Dataset:
        """The analysis of those rows that are kept; empty if none is."""
        import xarray as xr

        inputs = self._prepare(rows)
        said = self.model.generate(inputs, max_new_tokens=self.max_new_tokens)
        said = [said] if isinstance(said, str) else said
        right = [answers_match(text, row.answer) for text, row in zip(said, rows, strict=True)]
        kept = [i for i, ok in enumerate(right) if ok or not self.only_correct]
        counts = {
            "asked": dict(Counter(row.kind for row in rows)),
            "correct": dict(Counter(row.kind for row, ok in zip(rows, right, strict=True) if ok)),
        }
        if not kept:
            return xr.Dataset(attrs=counts)
        chosen = [rows[i] for i in kept]
        result = self.run(inputs if len(kept) == len(rows) else self._prepare(chosen), chosen)
        return _labelled(result, chosen, [said[i] for i in kept]).assign_attrs(counts)

    def _prepare(self, rows: Sequence[StudyRow]) -> Inputs:
        return prepare_rows(
            self.model, rows, self.images, template=self.template, tail=self.tail, coverage=self.coverage
        )


def answers_match(said: str, answer: str) -> bool:
    """Whether two answers are the same but for case, blanks around them and a final full stop.

    >>> answers_match(" Red.", "red"), answers_match("Redder", "red")
    (True, False)
    """
    return _plain(said) == _plain(answer)


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
    import xarray as xr

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
        stacked = [_intervals(values[group], n_boot, confidence, seed) for group in groups.values()]
        averaged[str(name)] = (("kind", "statistic", *variable.dims[1:]), np.stack(stacked), dict(variable.attrs))
    coords = {name: c for name, c in result.coords.items() if "question" not in c.dims}
    coords |= {"kind": list(groups), "statistic": ["mean", "low", "high"]}
    attrs = {**result.attrs, "n_boot": n_boot, "confidence": confidence}
    return xr.Dataset(averaged, coords=coords, attrs=attrs)


def _intervals(values: np.ndarray, n_boot: int, confidence: float, seed: int) -> np.ndarray:
    """Mean and percentile interval [statistic, ...] over the first axis."""
    n = len(values)
    flat = values.reshape(n, -1)
    valid = np.isfinite(flat)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    weights = np.concatenate([np.ones((1, n)), drawn])  # the sample itself first
    weight = weights @ valid
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(valid, flat, 0)) / weight  # NaN where nothing that counts was drawn
    tail = 50 * (1 - confidence)
    found = means[0], *_percentiles(means[1:], (tail, 100 - tail))
    return np.stack(found).reshape(3, *values.shape[1:])


def _percentiles(means: np.ndarray, at: tuple[float, float]) -> list[np.ndarray]:
    """Percentiles of each column, NaN for those without any number."""
    empty = ~np.isfinite(means).any(axis=0)
    filled = np.where(empty, 0.0, means)
    return [np.where(empty, np.nan, column) for column in np.nanpercentile(filled, at, axis=0)]


class _Parts:
    """The finished batches of a study, in files if it has one."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.folder = None if path is None else path.with_name(path.name + ".parts")
        self.done: dict[int, Any] = {}
        self.finished: Any = None

    @classmethod
    def open(cls, out: str | os.PathLike[str] | None, fingerprint: str) -> _Parts:
        """What an earlier run left behind; raises `InputError` if that was another study."""
        parts = cls(None if out is None else Path(out), fingerprint)
        if parts.path is None or parts.folder is None:
            return parts
        if not parts.path.parent.is_dir():
            raise InputError(f"The result cannot be written: there is no folder {str(parts.path.parent)!r}.")
        if parts.path.is_file():
            parts.finished = parts.mine(load(parts.path), parts.path)
        elif parts.folder.is_dir():
            for file in sorted(parts.folder.glob("*.safetensors")):
                parts.done[int(file.stem)] = parts.mine(load(file), parts.folder)
        return parts

    def mine(self, result: Any, where: Path) -> Any:
        """The result, if it is of this study."""
        if result.attrs.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"{str(where)!r} holds another study (other questions, another model or other settings); "
                "remove it, or give another out=."
            )
        return result

    def __contains__(self, number: int) -> bool:
        return number in self.done

    def add(self, number: int, part: xr.Dataset) -> None:
        """Keep a finished batch."""
        part = part.assign_attrs(fingerprint=self.fingerprint)
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            save(part, self.folder / f"{number:06d}.safetensors")
        self.done[number] = part

    def join(self, options: Mapping[str, Any]) -> xr.Dataset:
        """All batches one behind the other, with how they were asked; written to the file if there is one."""
        import xarray as xr

        every = [self.done[number] for number in sorted(self.done)]
        found = [part for part in every if "question" in part.dims]
        asked, correct = (_sum(part.attrs[name] for part in every) for name in ("asked", "correct"))
        if not found:
            raise InputError(
                f"None of the {sum(asked.values())} questions was answered correctly, so nothing was measured. "
                "Check template= and tail=, or measure all with only_correct=False."
            )
        try:
            joined = xr.concat(found, dim="question", join="exact", coords="minimal", compat="override")
        except ValueError as error:
            raise InputError(f"The results of the batches have different axes and do not join: {error}") from None
        attrs = {**_joined_attrs([part.attrs for part in found]), "asked": asked, "correct": correct, **options}
        joined = joined.assign_attrs(attrs)
        if self.path is not None and self.folder is not None:
            save(joined, self.path)
            shutil.rmtree(self.folder)
        return joined


def _labelled(result: Any, rows: Sequence[StudyRow], said: Sequence[str]) -> xr.Dataset:
    """A result with the axis `question` first, and what is known of the questions along it."""
    dataset = result if hasattr(result, "data_vars") else result.to_dataset(name=str(result.name or "value"))
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


def _joined_attrs(attrs: list[dict[str, Any]]) -> dict[str, Any]:
    """Costs added up; of the rest, what all have alike."""
    joined: dict[str, Any] = {}
    for name, first in attrs[0].items():
        values = [a.get(name) for a in attrs]
        if name in _ADDED:
            joined[name] = sum(values)
        elif all(value == first for value in values) and name != "prompt":
            joined[name] = first
    return joined


def _sum(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _batches(rows: Sequence[StudyRow], size: int) -> Iterator[list[StudyRow]]:
    """Neighbours that can be asked together."""
    for _, alike in groupby(rows, key=lambda row: (row.answer_prefix, row.picture is None)):
        together = list(alike)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _check(rows: Sequence[StudyRow], batch_size: int) -> None:
    if not rows:
        raise InputError("The table has no questions; give at least one row.")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected at least 1 question.")
    repeated = [row_id for row_id, n in Counter(row.id for row in rows).items() if n > 1]
    if repeated:
        raise InputError(f"Rows share the ids {repeated[:3]}; give each row an id of its own.")


def _fingerprint(rows: Sequence[StudyRow], settings: Mapping[str, Any]) -> str:
    """A digest of the questions and of how they are measured."""
    told = [[r.id, r.question, r.answer, r.kind, r.boxes, r.constraint, r.answer_prefix, r.false_option] for r in rows]
    text = json.dumps([told, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
