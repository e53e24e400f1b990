from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import answer_probability, flow_study, probability_study, probability_summary
from hooked_llava.analysis.studies import probability as module
from hooked_llava.datasets import by_kind
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load
from hooked_llava.toy.gqa_tables import gqa_rows
from tests.pairs import as_users_run

FORMS = ["lower", "capitalised", "false lower", "false capitalised"]


def test_each_row_is_that_of_its_question_alone(tiny_shapes: HookedLLaVA) -> None:
    rows = gqa_rows(2, kinds=["ChooseAttr", "QueryAttr"])
    found = probability_study(tiny_shapes, rows, only_correct=False, batch_size=3)
    assert found.answer_probability.dims == ("question", "norm", "layer", "form")
    assert found.question.values.tolist() == [row.id for row in rows]
    for row, own in zip(rows, found.answer_probability, strict=True):
        prompt = tiny_shapes.prepare(row.question, row.image)
        alone = answer_probability(tiny_shapes, prompt, row.answer, row.false_option)
        np.testing.assert_allclose(own, alone, rtol=1e-4, atol=1e-7)
        assert np.isnan(own.sel(form="false lower")).all() == (row.kind == "QueryAttr")
    flow = flow_study(tiny_shapes, rows, ["image->last"], "all", only_correct=False, batch_size=3)
    np.testing.assert_array_equal(flow.answer_probability, found.answer_probability)


def test_it_goes_on_where_it_stopped(tiny_shapes: HookedLLaVA, tmp_path, monkeypatch) -> None:
    rows, out = gqa_rows(1, kinds=["ChooseAttr", "QueryAttr", "CompareAttr"]), tmp_path / "probability.safetensors"
    whole = probability_study(tiny_shapes, rows, only_correct=False)
    calls, measured = [], module.probability_of_rows

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*given)

    monkeypatch.setattr(module, "probability_of_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        probability_study(tiny_shapes, rows, only_correct=False, batch_size=1, out=out)
    assert not out.exists()
    resumed = probability_study(tiny_shapes, rows, only_correct=False, batch_size=1, out=out)
    assert len(calls) == 4, "the first question is not asked again"
    np.testing.assert_allclose(resumed.answer_probability, whole.answer_probability, rtol=1e-4, atol=1e-7)
    xr.testing.assert_identical(load(out).answer_probability, resumed.answer_probability)
    with pytest.raises(InputError, match="another study"):
        flow_study(tiny_shapes, rows, ["image->last"], "all", only_correct=False, batch_size=1, out=out)


def curves(*by_form: list[float]) -> xr.DataArray:
    return xr.DataArray(np.array(by_form).T, {"form": FORMS[: len(by_form)]}, dims=("layer", "form"))


@pytest.mark.parametrize("seed", range(5))
def test_the_summary_is_what_a_loop_over_layers_finds(seed: int) -> None:
    values = np.random.default_rng(seed).random((3, 6, 4))
    values[0, :, 2:] = np.nan
    given = xr.DataArray(values, {"form": FORMS}, dims=("question", "resid", "form"))
    found = probability_summary(given)
    for q in range(3):
        for f, form in enumerate(FORMS):
            curve, own = values[q, :, f].tolist(), found.isel(question=q).sel(form=form)
            if np.isnan(curve[0]):
                assert all(np.isnan(float(own[name])) for name in ("peak", "peak_layer", "half_layer", "final"))
                continue
            assert (float(own.peak), int(own.peak_layer)) == (max(curve), curve.index(max(curve)))
            assert int(own.half_layer) == next(i for i, p in enumerate(curve) if p >= max(curve) / 2)
            assert float(own.final) == curve[-1]
        since = None
        for layer in reversed(range(6)):
            if not values[q, layer, 1] > values[q, layer, 0]:
                break
            since = layer
        at = float(found.overtakes[q])
        assert np.isnan(at) if since is None else at == since


def test_the_summary_of_special_cases(tiny_shapes: HookedLLaVA) -> None:
    assert float(probability_summary(curves([0.1, 0.2], [0.2, 0.3])).overtakes) == 0
    assert np.isnan(float(probability_summary(curves([0.1, 0.2], [0.2, 0.2])).overtakes))
    assert np.isnan(float(probability_summary(curves([0.1, 0.2], [np.nan, np.nan])).overtakes))
    study = probability_study(tiny_shapes, gqa_rows(2, kinds=["ChooseAttr", "QueryAttr"]), only_correct=False)
    means = by_kind(study, n_boot=5)
    found = probability_summary(means.answer_probability)
    assert found.peak.dims == ("kind", "norm", "form")
    np.testing.assert_array_equal(found.final, means.answer_probability.sel(statistic="mean").isel(layer=-1))


def test_another_result_is_refused() -> None:
    with as_users_run(), pytest.raises(InputError, match="layer and form.*edge"):
        probability_summary(xr.DataArray([0.0], dims="edge"))
