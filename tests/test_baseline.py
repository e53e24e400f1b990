"""The safety net finds what changed and nothing else, and what the golden recording holds is still computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from benchmarks import baseline
from benchmarks._baseline_cases import Case, record
from benchmarks._baseline_compare import between, differences
from benchmarks._baseline_memory import peak
from benchmarks._baseline_store import Loose, Record
from tests.pairs import as_users_run

GOLDEN = Path(__file__).parent / "data" / "baseline"
RESULTS = Path(baseline.__file__).parent / "results"
HOW_TO = "meant to change? python -m benchmarks.baseline record tests/data/baseline --only golden/"


@pytest.fixture(autouse=True)
def without_type_checks() -> Iterator[None]:
    with as_users_run():
        yield


def recording(folder: Path, **cases: Record) -> Path:
    for name, one in cases.items():
        one.save(folder / name)
    (folder / "recording.json").write_text(json.dumps({"cases": list(cases)}), encoding="utf-8")
    return folder


def example(**changed: object) -> Record:
    """A record of everything that cases return, some of it otherwise."""
    made = Record()
    curve = xr.DataArray([1.0, 2.0], {"word": ("layer", ["a", "b"])}, ("layer",), attrs={"runs": 3, "seconds": 1.5})
    values: dict[str, object] = {
        "large": torch.linspace(-100.0, 100.0, 5, dtype=torch.float64),
        "single": torch.tensor([1.0, float("nan")]),
        "ids": torch.tensor([3, 5]),
        "curve": curve,
        "text": "one\ntwo\nthree",
        "order": ["a", "b", "c"],
        "memory": Loose(1000.0),
    }
    for name, value in (values | changed).items():
        made.add(name, value)
    return made


def test_equal_recordings_have_no_difference(tmp_path: Path) -> None:
    folders = [recording(tmp_path / name, case=example()) for name in ("old", "new")]
    assert differences(*folders) == []
    assert baseline.main(["compare", *map(str, folders)]) == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"large": torch.linspace(-100.0, 100.0, 5).double() + 2e-7}, r"large: differs by .* of its scale 100"),
        ({"single": torch.tensor([1.0 + 3e-5, float("nan")])}, r"single: differs by 3"),
        ({"single": torch.tensor([1.0, 0.0])}, r"single: differs by inf .* at \[1\]: nan -> 0"),
        ({"single": torch.tensor([[1.0, 2.0]])}, r"single: float32\[2\] -> float32\[1, 2\]"),
        ({"ids": torch.tensor([3, 6])}, r"ids: 1 of 2 values differ, first at \[1\]: 5 -> 6"),
        ({"text": "one\ntoo\nthree"}, r"(?s)text: the text differs.*-two.*\+too"),
        ({"order": ["b", "a", "c"]}, r"(?s)order: the text differs.*\"b\""),
        ({"memory": Loose(1400.0)}, r"memory: 1000 -> 1400.*factor"),
        ({"further": 1.0}, r"NEW.*further"),
    ],
)  # fmt: skip
def test_a_planted_change_is_found_and_nothing_else(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    old, new = recording(tmp_path / "old", case=example()), recording(tmp_path / "new", case=example(**changed))
    found = differences(old, new)
    assert len(found) == 1
    assert found[0].startswith("case  ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found[0].removeprefix("case  "))
    assert baseline.main(["compare", str(old), str(new)]) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"large": torch.tensor([-100.0, -50, 5e-8, 50, 100], dtype=torch.float64)},
        {"single": torch.tensor([1.0 + 3e-6, float("nan")])},
        {"memory": Loose(800.0)},
    ],
)
def test_roundings_are_no_difference(tmp_path: Path, changed: dict[str, object]) -> None:
    assert list(between(example(), example(**changed))) == []


def test_what_rounding_leaves_of_zero_is_no_difference() -> None:
    noise = [Record(), Record()]
    for one, value in zip(noise, (1e-17, -3e-17), strict=True):
        one.add("effect", np.full(3, value))
    assert list(between(*noise)) == []


def test_labels_and_attributes_count_and_times_do_not() -> None:
    curve = xr.DataArray([1.0, 2.0], {"word": ("layer", ["a", "c"])}, ("layer",), attrs={"runs": 4, "seconds": 9.0})
    found = list(between(example(), example(curve=curve)))
    assert [text.partition(":")[0] for text in found] == ["curve@word", "curve.runs"]
    assert list(between(example(), example(curve=curve), texts=False)) == []


def test_cases_that_are_missing_are_named(tmp_path: Path) -> None:
    old, new = recording(tmp_path / "old", a=example(), b=example()), recording(tmp_path / "new", a=example())
    assert differences(old, new) == ["only OLD has the case b"]
    assert differences(old, new, only="a") == []
    with pytest.raises(FileNotFoundError, match="neither a recording"):
        differences(old, tmp_path)


def test_a_failing_case_is_recorded_as_what_it_raises(tmp_path: Path) -> None:
    def fails() -> dict[str, object]:
        raise ValueError(f"no file in {Path.cwd()}")

    made = record(Case(lambda: {"good": 1, "bad": fails}, "float64", quick=False))
    assert made.texts == {"good": "1", "bad": "ValueError: no file in FOLDER", "warnings": "[]"}
    assert record(Case(fails, "float64", quick=False)).texts["exception"].startswith("ValueError")


def test_memory_is_the_most_that_is_there_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second.view(10, 100) + second.view(10, 100)

    assert peak(work).value == 2 * 4000


def test_results_of_benchmarks_are_compared_by_their_ratios(tmp_path: Path) -> None:
    names = ("hook_overhead", "patching", "knockout", "causal_trace", "head_scores")
    assert all((RESULTS / f"{name}.json").is_file() for name in names)
    assert differences(RESULTS, RESULTS) == []
    report = json.loads((RESULTS / "knockout.json").read_text(encoding="utf-8"))
    row = report["geometries"]["medium"]["rows"]["window 9"]
    row["passes"] += 1
    row["hooked_llava"]["ratio"] *= 1.01
    row["one pass of the released procedure"]["ratio"] *= 2
    (tmp_path / "knockout.json").write_text(json.dumps(report), encoding="utf-8")
    found = differences(RESULTS, tmp_path)
    assert len(found) == 2
    assert any("one pass of the released procedure / ratio" in text for text in found)
    assert any("window 9 / passes: 54 -> 55" in text for text in found)


def test_the_golden_recording_is_what_is_computed(tmp_path: Path) -> None:
    chosen = baseline.cases("golden/")
    assert len(chosen) == 4
    baseline.write(tmp_path, chosen)
    found = differences(GOLDEN, tmp_path)
    assert not found, "\n".join([*found, HOW_TO])
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 200_000


@pytest.mark.slow
def test_quick_cases_run_and_give_the_same_again(tmp_path: Path) -> None:
    chosen = baseline.cases(quick=True)
    assert {name.partition("/")[0] for name in chosen} == set(baseline.GROUPS)
    baseline.write(tmp_path / "one", chosen)
    broken = {name: text for name in chosen if (text := Record.load(tmp_path / "one" / name).texts.get("exception"))}
    assert broken == {}
    again = {name: case for name, case in chosen.items() if name.startswith(("patching", "files"))}
    baseline.write(tmp_path / "two", again)
    found = differences(tmp_path / "one", tmp_path / "two")
    assert [text for text in found if not text.startswith("only OLD has the case")] == []
