"""A causal trace over a table: its means are those of single traces, and an interrupted one goes on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import best_effects, causal_trace, trace_means, trace_study
from hooked_llava.datasets import StudyRow, prepare_rows
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, OtherImage, Replace
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load, save

MODULE = "hooked_llava.analysis.studies.trace"
OUTPUTS = ("mlp", "attn", "resid")


@pytest.fixture(scope="module")
def table() -> list[StudyRow]:
    """Questions of two kinds; constraints of one token and of two, and one that stands before everything else."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    asked = [("What color is the star ?", "star"), ("Is this star red ?", "this star"), ("What is it ?", "What")]
    return [
        StudyRow(id=f"{kind}{i}", question=q, answer="red", kind=kind, image=image, constraint=constraint)
        for kind in "AB"
        for i, (q, constraint) in enumerate(asked)
    ]


def other_words(row: StudyRow) -> Replace:
    return Replace("circle" if " " not in row.constraint else "the circle")


@pytest.fixture(scope="module")
def result(model: HookedLLaVA, table: list[StudyRow]) -> xr.Dataset:
    return trace_study(model, table, corruption=other_words, only_correct=False, batch_size=4, progress=False)


def by_hand(model: HookedLLaVA, rows: list[StudyRow], least: float) -> dict[tuple[str, str, int, str], list[float]]:
    """The effects by kind of question, output, layer and role, question by question, from single traces; with loops."""
    effects = defaultdict(list)
    for row in rows:
        trace = causal_trace(model, prepare_rows(model, [row]), row.constraint, corruption=other_words(row))
        if (float(trace.p_clean) - float(trace.p_corrupted)) / float(trace.p_clean) < least:
            continue
        for output in OUTPUTS:
            for layer in trace.layer.values.tolist():
                found = defaultdict(list)
                for position, role in zip(trace.position.values, trace.role.values.tolist(), strict=True):
                    at = trace.indirect_effect.sel(kind=output, layer=layer, position=position)
                    found[role].append(float(at))
                for role, values in found.items():
                    effects[row.kind, output, layer, role].append(sum(values) / len(values))
    return effects


def test_means_are_those_of_single_traces(model, table, result):
    drops = sorted(result.lowered_by.values.tolist())
    least = (drops[1] + drops[2]) / 2  # two of the six are left out
    means, expected = trace_means(result, min_drop=least, n_boot=20), by_hand(model, table, least)
    assert sum(len(values) for key, values in expected.items() if key[1:] == ("mlp", 0, "last")) == 4
    for (kind, output, layer, role), values in expected.items():
        at = {"kind": kind, "output": output, "layer": layer, "role": role}
        found = means.indirect_effect.sel(at)
        assert float(found.sel(statistic="mean")) == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert int(means.n_counted.sel(kind=kind, role=role)) == len(values)
        ends = [float(found.sel(statistic=end)) for end in ("low", "high")]
        if len(values) == 1:
            assert np.isnan(ends).all()
        else:
            assert min(values) - 1e-6 <= ends[0] <= ends[1] <= max(values) + 1e-6
    assert {key[3] for key in expected} == set(means.role.values.tolist()), (
        "and roles that no question has are left out"
    )
    share = means.lowered.sel(statistic="mean")
    assert share.sel(kind="all") == pytest.approx(4 / 6)
    assert means.n.sel(kind="all") == 6
    whole = trace_means(result, min_drop=-np.inf, n_boot=5)
    np.testing.assert_allclose(
        whole.indirect_effect.sel(kind="all", statistic="mean", role="last"),
        result.indirect_effect.sel(role="last").mean("question"),
    )


def test_questions_that_are_whole_prompts_are_traced_as_they_are_written(model, table):
    whole = [replace(row, question=f"USER: <image>\n{row.question} ASSISTANT:") for row in table[:2]]
    how = {"corruption": other_words, "only_correct": False, "progress": False, "template": None}
    found = trace_study(model, whole, **how)
    for row in whole:
        prompt = prepare_rows(model, [row], template=None)
        alone = causal_trace(model, prompt, row.constraint, corruption=other_words(row))
        assert float(found.p_corrupted.sel(question=row.id)) == pytest.approx(float(alone.p_corrupted), rel=1e-4)
    with pytest.raises(InputError, match=rf"{whole[0].id}.*the very same"):
        trace_study(model, whole, **(how | {"corruption": Replace("the very same")}))


def test_the_best_effects_are_the_largest_means(result):
    means = trace_means(result, min_drop=-np.inf, n_boot=5)
    best = best_effects(means)
    for kind in means.kind.values.tolist():
        for output in OUTPUTS:
            at = {"kind": kind, "output": output}
            cell, all_of = best.sel(at), means.indirect_effect.sel(at)
            largest = float(all_of.sel(statistic="mean").max())
            assert float(cell.indirect_effect.sel(statistic="mean")) >= largest - 1.001e-3 * abs(largest)
            lower = all_of.sel(statistic="mean").where(all_of.layer < cell.layer).max()
            assert not float(lower) >= largest - 0.999e-3 * abs(largest), "of equal ones the first"
            there = all_of.sel(layer=int(cell.layer), role=str(cell.role.values))
            xr.testing.assert_equal(there.reset_coords(drop=True), cell.indirect_effect.reset_coords(drop=True))


def test_where_nothing_is_lowered_the_share_says_so(result):
    means = trace_means(result, min_drop=1.5, n_boot=5)
    assert means.lowered.values.tolist() == [[0.0] * 3] * 3
    assert means.indirect_effect.isnull().all()
    assert (means.n_counted == 0).all()
    assert best_effects(means).indirect_effect.isnull().all()


def test_the_result_says_how_it_was_made_and_can_be_kept(result, tmp_path):
    assert result.attrs["corruption"] == "replaced by other words"
    assert result.indirect_effect.dims == ("question", "output", "layer", "role")
    assert result.attrs["asked"] == {"A": 3, "B": 3}
    save(result, tmp_path / "trace")
    xr.testing.assert_identical(load(tmp_path / "trace"), result)


def test_an_interrupted_study_goes_on_and_no_question_is_traced_twice(model, table, result, tmp_path, monkeypatch):
    traced: list[str] = []

    def counting(model: Any, inputs: Any, *where: Any, **options: Any) -> xr.Dataset:
        if len(traced) == 3:
            traced.append("killed")
            raise KeyboardInterrupt
        traced.append(inputs.prompts[0])
        return causal_trace(model, inputs, *where, **options)

    monkeypatch.setattr(f"{MODULE}.causal_trace", counting)
    how: dict[str, Any] = {
        "corruption": other_words,
        "only_correct": False,
        "out": tmp_path / "trace",
        "progress": False,
    }
    with pytest.raises(KeyboardInterrupt):
        trace_study(model, table, batch_size=2, **how)
    assert not (tmp_path / "trace").exists()
    found = trace_study(model, table, batch_size=2, **how)
    assert len(traced) == 4 + 4, "of the two batches that were begun one was kept"
    assert not Path(f"{tmp_path / 'trace'}.parts").exists()
    for name in ("indirect_effect", "p_corrupted"):
        np.testing.assert_allclose(found[name], result[name], atol=1e-6)
    assert trace_study(model, table, batch_size=2, **how).identical(found)
    assert len(traced) == 8


@pytest.mark.parametrize(
    "changed",
    [
        {"corruption": lambda row: Replace("red" if " " not in row.constraint else "the red")},
        {"corruption": Noise()},
        {"window": 2},
        {"window_reading": "released"},
        {"kinds": ("mlp",)},
        {"layers": [0]},
    ],
)
def test_a_file_of_another_study_is_refused(model, table, tmp_path, changed):
    how: dict[str, Any] = {
        "corruption": other_words,
        "only_correct": False,
        "out": tmp_path / "trace",
        "progress": False,
    }
    trace_study(model, table[:1], **how)
    with pytest.raises(InputError, match="holds another study"):
        trace_study(model, table[:1], **how | changed)


def test_other_images_are_known_by_their_pixels(model, table, tmp_path):
    pixels = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]
    how: dict[str, Any] = {"only_correct": False, "out": tmp_path / "trace", "progress": False, "kinds": ("resid",)}
    found = trace_study(model, table[:2], corruption=OtherImage(pixels[0]), **how)
    alone = causal_trace(
        model, prepare_rows(model, table[:1]), "star", corruption=OtherImage(pixels[0]), kinds=("resid",)
    )
    assert float(found.p_corrupted[0]) == pytest.approx(float(alone.p_corrupted), abs=1e-6)
    with pytest.raises(InputError, match="holds another study"):
        trace_study(model, table[:2], corruption=OtherImage(pixels[1]), **how)
    with pytest.raises(InputError, match="OtherImage.*image"):
        trace_study(model, table[:2], corruption=OtherImage(model.prepare("What ?", pixels[0])), **how)


def test_what_does_not_fit_is_said_before_anything_is_asked(model, table, monkeypatch):
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(HookedLLaVA, "generate", asked)
    how: dict[str, Any] = {"only_correct": False, "progress": False}
    with pytest.raises(InputError, match="'A0'.*constraint="):
        trace_study(model, [replace(table[0], constraint="")], **how)
    with pytest.raises(SpanError, match="Row A0.*'square'"):
        trace_study(model, [replace(table[0], constraint="square")], **how)
    with pytest.raises(InputError, match="Row A1.*'circle' takes 1 token.*'this star' 2"):
        trace_study(model, table, corruption="circle", **how)
    with pytest.raises(InputError, match="window=99.*1 to"):
        trace_study(model, table, window=99, **how)
    with pytest.raises(InputError, match="kinds=.*'mlps'"):
        trace_study(model, table, kinds=["mlps"], **how)
    with pytest.raises(InputError, match="6 rows.*answer.*only_correct=False"):
        trace_study(model, [replace(row, answer="") for row in table], corruption=MeanEmbedding())


def test_means_of_another_result_are_refused(result):
    with pytest.raises(InputError, match="trace_study.*'lowered_by'"):
        trace_means(result.drop_vars("lowered_by"))
