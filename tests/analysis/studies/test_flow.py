from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import flow_study, knockout_study
from hooked_llava.datasets import StudyRow
from hooked_llava.errors import InputError, SpanError


@pytest.fixture(scope="module")
def table() -> list[StudyRow]:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    asked = ["Is the star red or blue?", "What color is it?"]
    shared = {"answer": "red", "false_option": "blue", "kind": "A", "image": image, "boxes": ((0, 0, 8, 8),)}
    return [StudyRow(id=str(i), question=question, **shared) for i, question in enumerate(asked)]


def test_knockout_and_probabilities_stand_side_by_side(model, table):
    edges = ["image->last", "object->question"]
    result = flow_study(model, table, edges, 1, only_correct=False)
    assert result.answer_probability.dims == ("question", "norm", "resid", "form")
    assert result.sizes["resid"] == result.sizes["layer"] + 1
    assert np.isfinite(result.answer_probability.sel(form=["lower", "false lower"])).all()
    alone = knockout_study(model, table, edges, 1, only_correct=False)
    np.testing.assert_array_equal(result.effect, alone.effect)
    np.testing.assert_array_equal(result.total_effect, alone.total_effect)


def test_edges_may_be_weighted_as_in_a_knockout_study(model, table, tmp_path):
    result = flow_study(model, table, ["image->last"], 1, factor=0.3, only_correct=False, out=tmp_path / "flow")
    alone = knockout_study(model, table, ["image->last"], 1, factor=0.3, only_correct=False)
    np.testing.assert_array_equal(result.effect, alone.effect)
    assert result.attrs["factor"] == 0.3
    with pytest.raises(InputError, match="another study"):
        flow_study(model, table, ["image->last"], 1, only_correct=False, out=tmp_path / "flow")
    with pytest.raises(InputError, match=r"factor=-1.*at least 0"):
        flow_study(model, table, ["image->last"], factor=-1)


def test_misspelt_spans_are_refused_before_anything_is_asked(model, table):
    with pytest.raises(SpanError, match="'imgae'.*Did you mean: image"):
        flow_study(model, table, ["imgae->last"])
