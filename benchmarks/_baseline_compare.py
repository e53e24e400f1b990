"""What differs between two recordings, or between two folders of benchmark results."""

from __future__ import annotations

import difflib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks._baseline_store import MANIFEST, Record

TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2}
"""Largest difference of an array's values, in units of its scale: its largest absolute value in the old recording."""
SMALLEST_SCALE = {"float64": 1e-3, "float32": 1e-1, "bfloat16": 1.0}
"""Arrays of less are compared as if this were their scale: they are what rounding leaves of larger numbers."""
LOOSE = 1.3
"""Factor by which a loosely compared number may grow or shrink."""
RATIO = 1.15
"""Factor by which a benchmark's ratio may differ, where its quartiles say no more."""
T = TypeVar("T")
_BESIDE_TAGS = re.compile(r"\s+(?=<)|(?<=>)\s+|(?<=>)(?=<)")
_COUNTS = ("counted", "runs", "passes")


def differences(old: Path, new: Path, *, only: str = "", texts: bool = True) -> list[str]:
    """One text for each difference; an empty list if the two agree.

    Both are recordings (of which `only` chooses cases, and texts may be left out), or both are folders of benchmark results.
    Raises `FileNotFoundError` for a folder that is neither.
    """
    kinds = [_kind(folder) for folder in (old, new)]
    if kinds[0] != kinds[1]:
        raise FileNotFoundError(f"{old} is {kinds[0]} and {new} is {kinds[1]}; give two of one kind.")
    if kinds[0] == "a folder of results":
        return list(_between_results(old, new))
    return list(_between_recordings(old, new, only, texts=texts))


def _kind(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return "a recording"
    if any(folder.glob("*.json")):
        return "a folder of results"
    raise FileNotFoundError(f"{folder} holds neither a recording ({MANIFEST}) nor results (*.json).")


def _names(here: Mapping[str, Any] | list[str], there: Mapping[str, Any] | list[str], what: str) -> Iterator[str]:
    """What only one of two has, on a line."""
    for side, names in (("OLD", [n for n in here if n not in there]), ("NEW", [n for n in there if n not in here])):
        if names:
            yield f"only {side} has the {what}{'s' * (len(names) > 1)} {', '.join(names)}"


# ---------------------------------------------------------------------- recordings


def _between_recordings(old: Path, new: Path, only: str, *, texts: bool) -> Iterator[str]:
    listed = [json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["cases"] for folder in (old, new)]
    listed = [[case for case in cases if only in case] for cases in listed]
    yield from _names(*listed, "case")
    for case in listed[0]:
        if case in listed[1]:
            found = between(Record.load(old / case), Record.load(new / case), texts=texts)
            yield from (f"{case}  {text}" for text in found)


def between(old: Record, new: Record, *, texts: bool = True) -> Iterator[str]:
    """The differences of one case.

    >>> one, other = Record(), Record()
    >>> one.add("x", np.array([1.0, 2.0])), other.add("x", np.array([1.0, 2.5]))
    (None, None)
    >>> list(between(one, other))
    ['x: differs by 0.25 of its scale 2 (limit 1e-09), 1 of 2 values, most at [1]: 2.0 -> 2.5']
    """
    said = (old.texts, new.texts) if texts else ({}, {})
    yield from _names(old.arrays, new.arrays, "array")
    yield from _names(*said, "text")
    yield from _names(old.loose, new.loose, "number")
    for name, before in _in_both(old.arrays, new.arrays):
        if found := _array_difference(before, new.arrays[name], old.dtype):
            yield f"{name}: {found}"
    for name, before in _in_both(*said):
        before, after = _as_shown(before), _as_shown(said[1][name])
        if before != after:
            yield f"{name}: the text differs\n{_diff(before, after)}"
    for name, before in _in_both(old.loose, new.loose):
        after = new.loose[name]
        if max(before, after) > LOOSE * min(before, after):
            yield f"{name}: {before:.4g} -> {after:.4g}, more than a factor {LOOSE}"


def _as_shown(text: str) -> str:
    """An HTML page as a browser reads it: blanks beside tags, and how a character is written, make no difference."""
    if not text.startswith("<!doctype html>"):
        return text
    return html.unescape(_BESIDE_TAGS.sub("\n", text))


def _in_both(old: Mapping[str, T], new: Mapping[str, T]) -> list[tuple[str, T]]:
    return [(name, value) for name, value in old.items() if name in new]


def _array_difference(old: np.ndarray, new: np.ndarray, dtype: str) -> str:
    """What differs, in words, or nothing."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{old.dtype}{list(old.shape)} -> {new.dtype}{list(new.shape)}"
    if old.dtype.kind != "f":
        wrong = old != new
        if not wrong.any():
            return ""
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        return f"{wrong.sum()} of {old.size} values differ, first at {list(at)}: {old[at]} -> {new[at]}"
    coarser = max(dtype, old.dtype.name, key=TOLERANCE.__getitem__)
    limit = TOLERANCE[coarser]
    finite = np.isfinite(old) & np.isfinite(new)
    scale = max(float(np.abs(old[finite]).max(initial=0.0)), SMALLEST_SCALE[coarser])
    with np.errstate(invalid="ignore"):
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        off = np.where(same, 0.0, np.where(finite, np.abs(old.astype(float) - new), math.inf)) / scale
    if not (off > limit).any():
        return ""
    at = tuple(int(i) for i in np.unravel_index(off.argmax(), off.shape))
    return (
        f"differs by {off[at]:.3g} of its scale {scale:.3g} (limit {limit:g}), {(off > limit).sum()} of {old.size} values, "
        f"most at {list(at)}: {old[at]} -> {new[at]}"
    )


def _diff(old: str, new: str) -> str:
    lines = difflib.unified_diff(_lines(old), _lines(new), "OLD", "NEW", lineterm="", n=1)
    return "\n".join(f"    {line}" for line in lines)


def _lines(text: str) -> list[str]:
    """The lines of a text; of a list or a table in JSON a line for each entry."""
    if text.startswith(("[", "{")):
        try:
            text = json.dumps(json.loads(text), indent=1, ensure_ascii=False)
        except json.JSONDecodeError:  # a text that only begins like one
            return text.splitlines()
    return text.splitlines()


# ---------------------------------------------------------------------- benchmark results


def _between_results(old: Path, new: Path) -> Iterator[str]:
    """Ratios to the baseline that differ by more than they scatter, and counts that differ at all."""
    files = [{path.name: path for path in folder.glob("*.json")} for folder in (old, new)]
    for name in sorted(files[0].keys() & files[1].keys()):
        here, there = (dict(_measured(json.loads(f[name].read_text(encoding="utf-8")))) for f in files)
        yield from (f"{name}  {text}" for text in _names(here, there, "number"))
        for place in (place for place in here if place in there):
            (before, scatter), (after, more) = here[place], there[place]
            limit = max(before * (RATIO - 1), scatter, more) if place.endswith("ratio") else 1e-9 * abs(before)
            if abs(after - before) > limit:
                yield f"{name}  {place}: {before:.4g} -> {after:.4g}"


def _measured(report: Any, place: str = "") -> Iterator[tuple[str, tuple[float, float]]]:
    """Every ratio with the width between its quartiles, and every count, by where it stands."""
    if isinstance(report, list):
        report = {str(i): item for i, item in enumerate(report)}
    if not isinstance(report, dict):
        return
    low, high = report.get("ratio_iqr", (0.0, 0.0))
    for key, value in report.items():
        here = f"{place} / {key}" if place else key
        if key in ("ratio", *_COUNTS) and isinstance(value, (int, float)):
            yield here, (float(value), high - low)
        else:
            yield from _measured(value, here)
