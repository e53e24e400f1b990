"""The runner over a table: what it keeps, what it averages, and that it goes on where it stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from hooked_llava.datasets import StudyRow, answers_match_exactly, by_kind, study
from hooked_llava.errors import HookedLLaVAWarning, InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load, save
from hooked_llava.toy.gqa_tables import gqa_rows
from tests.fixtures_processor import make_processor
from tests.launched import launch
from tests.pairs import fresh_pair


class Counting:
    """An analysis that says how long each prompt is, and counts how often it is asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.fail_at = fail_at

    def __call__(self, inputs: Any, rows: Sequence[StudyRow]) -> xr.DataArray:
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [row.id for row in rows]
        lengths = [len(m.real) for m in inputs.token_maps]
        values = np.array([[n, 2.0 * n] for n in lengths])
        attrs = {"n_forward": 1, "model": "m", "prompt": " | ".join(r.question for r in rows), "first": rows[0].id}
        result = xr.DataArray(values, dims=("prompt", "layer"), name="length", attrs=attrs)
        return result[0] if len(rows) == 1 else result


ROWS = gqa_rows(4, kinds=["ChooseAttr", "QueryAttr"])


def wrong(row: StudyRow) -> StudyRow:
    return replace(row, answer="nonsense")


def test_every_question_with_its_kind_and_what_was_said(tiny_shapes: HookedLLaVA) -> None:
    run = Counting()
    result = study(tiny_shapes, ROWS, run, batch_size=3)
    assert result.length.dims == ("question", "layer")
    assert result.question.values.tolist() == [row.id for row in ROWS] == run.asked
    assert result.kind.values.tolist() == [row.kind for row in ROWS]
    assert [said.lower() for said in result.said.values] == result.answer.values.tolist() == [r.answer for r in ROWS]
    assert result.attrs["asked"] == result.attrs["correct"] == {"ChooseAttr": 4, "QueryAttr": 4}
    assert result.attrs["n_forward"] == 3
    assert result.attrs["model"] == "m"
    assert not {"prompt", "first", "rows"} & set(result.attrs), "what only one of the batches has"
    assert result.boxes_lost.values.tolist() == [0] * 8
    assert {name: result.attrs[name] for name in ("template", "tail", "coverage", "only_correct")} == {
        "template": "default",
        "tail": "template",
        "coverage": 0.0,
        "only_correct": True,
    }
    lengths = [len(tiny_shapes.prepare(row.question, row.image).token_map.real) for row in ROWS]
    assert result.length[:, 0].values.tolist() == lengths
    one_by_one = study(tiny_shapes, ROWS, Counting(), batch_size=1)
    assert one_by_one.length.equals(result.length)


def test_only_what_is_answered_correctly_is_measured(tiny_shapes: HookedLLaVA) -> None:
    rows = [wrong(ROWS[0]), ROWS[1], ROWS[2], wrong(ROWS[3]), wrong(ROWS[4]), wrong(ROWS[5])]
    result = study(tiny_shapes, rows, Counting(), batch_size=2)
    assert result.question.values.tolist() == [ROWS[1].id, ROWS[2].id]
    assert result.attrs["asked"] == {"ChooseAttr": 4, "QueryAttr": 2}
    assert result.attrs["correct"] == {"ChooseAttr": 2}
    every = study(tiny_shapes, rows, Counting(), batch_size=2, only_correct=False)
    assert every.sizes["question"] == 6
    assert every.attrs["correct"] == {"ChooseAttr": 2}
    with pytest.raises(InputError, match="the 2 questions"):
        study(tiny_shapes, rows[-2:], Counting())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_interrupted_study_goes_on_where_it_stopped(
    tiny_shapes: HookedLLaVA, tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "study.safetensors"
    with pytest.raises(KeyboardInterrupt):
        study(tiny_shapes, ROWS, Counting(fail_at=4), out=out, batch_size=2)
    assert not out.exists()
    assert [p.name for p in sorted((tmp_path / "study.safetensors.parts").iterdir())] == [
        "000000.safetensors",
        "000002.safetensors",
    ]
    again = Counting()
    result = study(tiny_shapes, ROWS, again, out=out, batch_size=batch_size)
    assert again.asked == [row.id for row in ROWS[4:]]
    assert [p.name for p in tmp_path.iterdir()] == ["study.safetensors"]
    assert result.length.equals(study(tiny_shapes, ROWS, Counting(), batch_size=2).length)
    assert load(out).equals(result)
    never = Counting()
    assert study(tiny_shapes, ROWS, never, out=out, batch_size=2).equals(result)
    assert never.asked == []


def test_what_an_interrupted_study_left_out_takes_its_place_in_the_table(
    tiny_shapes: HookedLLaVA, tmp_path: Path
) -> None:
    """Rows of two kinds of prompt take turns, and are asked in the table's order whatever was finished before."""
    text = [StudyRow(id=f"t{i}", question="Who made the star?", answer="?", kind="fact") for i in range(2)]
    rows = [ROWS[0], text[0], ROWS[1], text[1]]
    with pytest.raises(KeyboardInterrupt):
        study(tiny_shapes, rows, Counting(fail_at=2), out=tmp_path / "a", only_correct=False)
    (tmp_path / "a.parts" / "000000.safetensors").unlink()
    result = study(tiny_shapes, rows, Counting(), out=tmp_path / "a", only_correct=False)
    assert result.question.values.tolist() == [row.id for row in rows]


TWO: dict[str, Any] = {"batch_size": 2, "progress": False}


def share(model: HookedLLaVA, folder: Path, out: Path | None, index: int) -> None:
    """What each process of a launch does; its result and what it was asked are left in the folder."""
    run = Counting()
    save(study(model, ROWS, run, out=out, **TWO), folder / f"result-{index}")
    (folder / f"asked-{index}").write_text(" ".join(run.asked))


def asked_by(folder: Path, index: int) -> list[str]:
    return (folder / f"asked-{index}").read_text().split()


@pytest.mark.parametrize("with_file", [False, True])
def test_two_processes_share_a_study_and_both_return_the_whole(
    tiny_shapes: HookedLLaVA, tmp_path: Path, *, with_file: bool
) -> None:
    out = tmp_path / "study.safetensors" if with_file else None
    assert launch(share, tiny_shapes, tmp_path, out) == [0, 0]
    alone = study(tiny_shapes, ROWS, Counting(), **TWO)
    for index, expected in enumerate((ROWS[:2] + ROWS[4:6], ROWS[2:4] + ROWS[6:])):
        assert asked_by(tmp_path, index) == [row.id for row in expected]
        result = load(tmp_path / f"result-{index}")
        for name in ("fingerprint", "study_of"):
            result.attrs.pop(name, None)
        assert result.identical(alone)
    if out is not None:
        assert load(out).equals(alone)
        assert not out.with_name(f"{out.name}.parts").exists()


def killed_in_its_second_batch(model: HookedLLaVA, out: Path, index: int) -> None:
    class Killed(Counting):
        def __call__(self, inputs: Any, rows: Sequence[StudyRow]) -> xr.DataArray:
            if index == 1 and self.asked:
                first = out.with_name(f"{out.name}.parts") / "000000.safetensors"
                for _ in range(6000):  # a minute: until the other has kept its first batch, however busy the machine is
                    if first.exists():
                        break
                    time.sleep(0.01)
                os._exit(9)
            return super().__call__(inputs, rows)

    study(model, ROWS, Killed(), out=out, **TWO)


def test_what_a_killed_process_has_finished_is_kept_for_any_number_of_processes(
    tiny_shapes: HookedLLaVA, tmp_path: Path
) -> None:
    out = tmp_path / "study.safetensors"
    codes = launch(killed_in_its_second_batch, tiny_shapes, out)
    assert codes[1] == 9
    assert codes[0] != 0, "ended with the other"
    assert not out.exists()
    parts = [int(path.stem) for path in sorted(out.with_name(f"{out.name}.parts").iterdir())]
    assert {0, 2} <= set(parts) <= {0, 2, 4}, (
        "all but the batch from row 6 on, and perhaps one that was not asked in time"
    )
    again = Counting()
    result = study(tiny_shapes, ROWS, again, out=out, **TWO)
    assert again.asked == [row.id for i in (4, 6) if i not in parts for row in ROWS[i : i + 2]]
    assert load(out).equals(result)
    assert result.length.equals(study(tiny_shapes, ROWS, Counting(), **TWO).length)


def test_three_processes_go_on_with_what_one_has_left(tiny_shapes: HookedLLaVA, tmp_path: Path) -> None:
    out = tmp_path / "study.safetensors"
    with pytest.raises(KeyboardInterrupt):
        study(tiny_shapes, ROWS, Counting(fail_at=4), out=out, **TWO)
    assert launch(share, tiny_shapes, tmp_path, out, n=3) == [0, 0, 0]
    assert [asked_by(tmp_path, i) for i in range(3)] == [[r.id for r in ROWS[4:6]], [r.id for r in ROWS[6:]], []]
    assert load(out).length.equals(study(tiny_shapes, ROWS, Counting(), **TWO).length)


def unlike(model: HookedLLaVA, folder: Path, index: int) -> None:
    run = Counting()
    with pytest.raises(InputError, match=r"Processes \d and \d of 2.*different questions"):
        study(model, ROWS[index:], run, **TWO)
    assert run.asked == []


def test_processes_with_different_tables_are_refused(tiny_shapes: HookedLLaVA, tmp_path: Path) -> None:
    assert launch(unlike, tiny_shapes, tmp_path) == [0, 0]


@pytest.mark.parametrize("stage", ["finished", "interrupted"])
def test_a_file_of_another_study_is_not_touched(tiny_shapes: HookedLLaVA, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "study"
    if stage == "finished":
        study(tiny_shapes, ROWS[:2], Counting(), out=out)
    else:
        with pytest.raises(KeyboardInterrupt):
            study(tiny_shapes, ROWS[:4], Counting(fail_at=2), out=out, batch_size=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for rows, options in ((ROWS[1:3], {}), (ROWS[:2], {"about": {"edges": ["a"]}}), (ROWS[:2], {"tail": None})):
        run = Counting()
        with pytest.raises(InputError, match="holds another study"):
            study(tiny_shapes, rows, run, out=out, **options)
        assert run.asked == []
    with pytest.raises(InputError, match=r"number of questions=\d \(asked for: 1\)"):  # as another --limit makes it
        study(tiny_shapes, ROWS[:1], Counting(), out=out)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_model_images_or_answers_make_another_study(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    rows = [StudyRow(id="1", question="What color is the star?", answer="red", image=Image.fromarray(pixels))]
    named = [replace(rows[0], image="1.png", size=(16, 16))]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "1.png")

    def talking(dtype: torch.dtype = torch.float32) -> HookedLLaVA:
        return HookedLLaVA.from_hf(fresh_pair(dtype=dtype).hf, processor=make_processor())

    def ask(rows: list[StudyRow], out: str, model: HookedLLaVA, **options: Any) -> list[str]:
        run = Counting()
        study(model, rows, run, out=tmp_path / out, only_correct=False, **options)
        return run.asked

    assert ask(rows, "own", talking()) == ["1"]
    assert ask(rows, "own", talking()) == [], "the same again: read back"
    assert ask([replace(rows[0], image=pixels)], "own", talking()) == [], "the same pixels in another form"
    edited = talking()
    edited.blocks[0].mlp.W_in[0, 0] += 1e-4
    other = [replace(rows[0], image=Image.fromarray(pixels + 1))]
    for differs, again in {
        "weights=": lambda: ask(rows, "own", edited),
        "dtype='torch.float32'.*torch.float64": lambda: ask(rows, "own", talking(torch.float64)),
        "questions=": lambda: ask(other, "own", talking()),
        "max_new_tokens=.*3": lambda: ask(rows, "own", talking(), max_new_tokens=3),
    }.items():
        with pytest.raises(InputError, match=f"own.*another study.*{differs}"):
            again()
    assert ask(named, "files", talking(), images=tmp_path / "a") == ["1"]
    (tmp_path / "a" / "1.png").unlink()
    assert ask(named, "files", talking(), images=tmp_path / "a") == [], "what is finished needs no images"
    for rows, images in ((named, "b"), ([replace(named[0], size=None)], "a")):
        with pytest.raises(InputError, match="holds another study"):
            ask(rows, "files", talking(), images=tmp_path / images)


def test_images_and_boxes_of_all_rows_are_looked_at_before_any_is_asked(
    tiny_shapes: HookedLLaVA, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")
    first = StudyRow(id="1", question="What color is the star?", answer="red", image="there")
    last = replace(first, id="2", boxes=((0, 0, 8, 8),), size=(64, 64))
    for row, error, message in (
        (replace(last, image="gone"), InputError, "Row 2.*image 'gone'"),
        (
            replace(last, size=(500, 333)),
            InputError,
            "row 2.*64 x 64 pixels.*boxes.*500 x 333",
        ),
        (replace(last, boxes=((9, 9, 3, 3),)), SpanError, r"Row 2: \(9, 9, 3, 3\).*x0 < x1"),
        (replace(last, image=None), InputError, "Row 2.*boxes.*no image"),
    ):
        run = Counting()
        with pytest.raises(error, match=message):
            study(tiny_shapes, [first, row], run, images=tmp_path, only_correct=False, batch_size=1)
        assert run.asked == []
    with pytest.raises(InputError, match="folder '.*nowhere'.*row 1"):
        study(tiny_shapes, [first, last], Counting(), images=tmp_path / "nowhere")
    assert len(study(tiny_shapes, [first, last], Counting(), images=tmp_path, only_correct=False).question) == 2


def test_questions_without_image_are_asked_apart(tiny_shapes: HookedLLaVA) -> None:
    text = [StudyRow(id=f"t{i}", question="Who made the star?", answer="?", kind="fact") for i in range(2)]
    result = study(tiny_shapes, [ROWS[0], *text, ROWS[1]], Counting(), only_correct=False)
    assert result.question.values.tolist() == [ROWS[0].id, "t0", "t1", ROWS[1].id]


def test_what_does_not_fit_is_said(tiny_shapes: HookedLLaVA, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no questions"):
        study(tiny_shapes, [], Counting())
    with pytest.raises(InputError, match=r"share the ids \['ChooseAttr-0'\]"):
        study(tiny_shapes, [ROWS[0], ROWS[0]], Counting())
    with pytest.raises(InputError, match="batch_size=0"):
        study(tiny_shapes, ROWS, Counting(), batch_size=0)
    with pytest.raises(InputError, match="no folder '.*'"):
        study(tiny_shapes, ROWS, Counting(), out=tmp_path / "none" / "study")
    never = Counting()
    with pytest.raises(InputError, match=r"out='.*a folder.*file.*study\.safetensors"):
        study(tiny_shapes, ROWS, never, out=tmp_path)
    assert never.asked == []
    with pytest.raises(InputError, match="expected an axis 'prompt' of 2"):
        study(tiny_shapes, ROWS[:2], lambda inputs, rows: xr.DataArray([1.0], dims="layer"))
    sizes = iter([2, 3])

    def uneven(inputs: Any, rows: Any) -> xr.DataArray:
        n = next(sizes)
        return xr.DataArray(np.zeros((1, n)), dims=("prompt", "layer"), coords={"layer": range(n)})

    with pytest.raises(InputError, match="batches.*different axes"):
        study(tiny_shapes, ROWS[:2], uneven, batch_size=1)


def test_a_study_may_compare_answers_in_another_way(tiny_shapes: HookedLLaVA, tmp_path: Path) -> None:
    out = tmp_path / "study.safetensors"
    rows = [replace(ROWS[0], answer=ROWS[0].answer.capitalize()), *ROWS[1:]]  # as the exact comparison does not take it
    loose = study(tiny_shapes, rows, Counting())
    assert loose.question.values.tolist() == [row.id for row in rows]
    assert "match" not in loose.attrs
    exact = study(tiny_shapes, rows, Counting(), match=answers_match_exactly, out=out)
    assert exact.question.values.tolist() == [row.id for row in rows[1:]]
    assert exact.attrs["match"] == "answers_match_exactly"
    with pytest.raises(InputError, match="holds another study"):
        study(tiny_shapes, rows, Counting(), out=out)


def test_means_and_intervals_by_kind() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 2))
    values[:, 1] += 5
    values[:20, 1] = np.nan
    kinds = ["a"] * 20 + ["b"] * 40
    data = xr.Dataset(
        {"effect": (("question", "edge"), values), "word": ("question", ["x"] * 60)},
        coords={"kind": ("question", kinds), "edge": ["p", "q"]},
        attrs={"model": "m"},
    )
    found = by_kind(data, n_boot=400)
    assert "word" not in found
    assert found.kind.values.tolist() == ["a", "b", "all"]
    assert found.n.values.tolist() == [20, 40, 60]
    mean, low, high = (found.effect.sel(statistic=s) for s in ("mean", "low", "high"))
    np.testing.assert_allclose(mean.sel(kind="b"), values[20:].mean(0))
    np.testing.assert_allclose(mean.sel(kind="all", edge="q"), np.nanmean(values[:, 1]))
    assert np.isnan(found.effect.sel(kind="a", edge="q")).all()
    # For means of a normal sample the bootstrap's interval is about 1.96 standard errors to either side.
    error = values[20:].std(0) / np.sqrt(40)
    np.testing.assert_allclose((high - low).sel(kind="b"), 2 * 1.96 * error, rtol=0.2)
    assert bool((low.sel(kind="b") < mean.sel(kind="b")).all())
    assert by_kind(data, n_boot=400).equals(found)
    wide = by_kind(data, n_boot=400, confidence=0.5)
    assert bool(((wide.effect[1, 2] - wide.effect[1, 1]) < (high - low).sel(kind="b")).all())
    assert found.attrs["model"] == "m"
    with pytest.raises(InputError, match="by_kind.*axis 'question'.*'kind'"):
        by_kind(data.drop_vars("kind"))


def test_one_kind_needs_no_mean_of_all() -> None:
    data = xr.Dataset({"x": ("question", [1.0, 3.0])}, coords={"kind": ("question", ["a", "a"])})
    assert by_kind(data).kind.values.tolist() == ["a"]


def test_where_memory_runs_out_a_study_goes_on_with_half_of_the_questions(tiny_shapes: HookedLLaVA) -> None:
    plain, counting = study(tiny_shapes, ROWS, Counting(), batch_size=8), Counting()

    def short_of_memory(inputs: Any, rows: Sequence[StudyRow]) -> xr.DataArray:
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return counting(inputs, rows)

    with pytest.warns(HookedLLaVAWarning, match=r"8 at once.*4 at once"):
        result = study(tiny_shapes, ROWS, short_of_memory, batch_size=8, progress=False)
    assert result.length.equals(plain.length)
    assert sorted(counting.asked) == sorted(row.id for row in ROWS)
