from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import pope_study
from hooked_llava.datasets import pope_scores
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import load, save
from hooked_llava.toy.pope_tables import pope_rows
from hooked_llava.viz import pope_page
from tests.viz.browser import check_self_contained, table_rows


def test_a_page_of_a_table(tiny_shapes, tmp_path):
    result = pope_study(tiny_shapes, pope_rows(4, kinds=["random", "adversarial"]), batch_size=8, progress=False)
    save(result, tmp_path / "pope")
    read = load(tmp_path / "pope")
    assert isinstance(read, xr.Dataset)
    page = pope_page(read, n_boot=20)
    assert (page.question, page.answer) == ("Is the object there? Asked 8 questions", "")
    assert table_rows(page.html, "questions")[1:] == [["random", "4", "4", "4"], ["adversarial", "4", "4", "4"]]
    scores = pope_scores(result, n_boot=20)
    np.testing.assert_array_equal(page.results["scores"].f1, scores.f1)
    header, *rows = table_rows(page.html, "numbers")
    assert header == [
        "kind",
        "accuracy",
        "precision",
        "recall",
        "F1",
        "share of yes",
        "log odds: there",
        "log odds: not there",
    ]
    assert [row[0] for row in rows] == ["all", "random", "adversarial"]
    for row in rows:
        of_kind = scores.sel(kind=row[0], statistic="mean")
        shown = [float(cell.split()[0].replace("\u2212", "-")) for cell in row[1:]]
        assert shown[:5] == [1, 1, 1, 1, 0.5]
        assert shown[5:] == pytest.approx(of_kind.log_odds.values.tolist(), abs=0.051)
    assert "8 asked, 8 answered correctly, 8 measured<" in page.html
    assert "1 forward passes beside those that answer, each of a batch of questions" in page.html
    check_self_contained(page.html)


def test_a_share_of_nothing_is_a_dash(tiny_shapes):
    rows = [row for row in pope_rows(2, kinds=["random"]) if row.answer == "No"]
    result = pope_study(tiny_shapes, rows, progress=False)
    row = table_rows(pope_page(result, n_boot=5, title="Mine").html, "numbers")[1]
    assert (row[2], row[3], row[6]) == ("–", "–", "–")
    with pytest.raises(InputError, match=r"only_correct=True"):
        pope_page(result.assign_attrs(only_correct=True))
    with pytest.raises(InputError, match=r"pope_page.*'log_odds'.*pope_study"):
        pope_page(result.drop_vars("log_odds"))
