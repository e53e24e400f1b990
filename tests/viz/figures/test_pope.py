from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.datasets import StudyRow, pope_scores
from hooked_llava.errors import InputError
from hooked_llava.viz import knockout_curves, pope_bars

LABELS, SAID = ["Yes", "No", "No", "Yes"], ["Yes", "Yes", "No", "Yes"]
KINDS = ["random", "random", "random", "popular"]


def study() -> xr.Dataset:
    """A study as pope_study gives it."""
    coords = {"kind": KINDS, "answer": LABELS, "said": SAID}
    odds = ("question", [8.0, 2.0, -6.0, 4.0])
    about = {"analysis": "pope_study", "model": "mine", "only_correct": False}
    return xr.Dataset({"log_odds": odds}, {name: ("question", words) for name, words in coords.items()}, about)


def heights(axes, label: str) -> list[float]:
    """The bars of one kind of question, by its entry of the legend."""
    (bars,) = [bars for bars in axes.containers if str(bars.get_label()).startswith(label)]
    return [float(bar.get_height()) for bar in bars]


@pytest.mark.parametrize("n_boot", [0, 30])
def test_bars_are_the_scores_of_each_kind(n_boot: int) -> None:
    scores = pope_scores(study(), n_boot=n_boot)
    figure = pope_bars(scores)
    upper, lower = figure.axes
    assert [bars.get_label() for bars in upper.containers] == ["all (4)", "random (3)", "popular (1)"]
    own = scores.sel(statistic="mean") if n_boot else scores
    for kind in ("all", "random", "popular"):
        of_kind = own.sel(kind=kind)
        expected = [float(of_kind[name]) for name in ("accuracy", "precision", "recall", "f1", "yes_share")]
        assert heights(upper, kind) == expected
    names = [label.get_text() for label in upper.get_xticklabels()]
    assert names == ["accuracy", "precision", "recall", "F1", "share of yes"]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["object is there", "object is not there"]
    drawn = [[float(bar.get_height()) for bar in bars] for bars in lower.containers]
    np.testing.assert_array_equal(drawn[:2], [[6, -2], [8, -2]])
    assert drawn[2][0] == 4
    assert [text.get_text() for text in lower.texts] == ["–"], "no popular object is absent"
    assert figure.get_suptitle() == "Is the object there?"
    assert "mine" in figure.get_supxlabel()
    assert len(figure.legends[0].get_texts()) == 4


def test_the_line_is_the_true_share_across_the_bars_of_the_share_of_yes() -> None:
    (upper, _) = pope_bars(pope_scores(study())).axes
    lines = [segment for lines in upper.collections for segment in lines.get_segments()]
    bars = [list(bars)[-1] for bars in upper.containers]
    for line, bar, share in zip(lines, bars, (0.5, 1 / 3, 1.0), strict=True):
        assert line[:, 1].tolist() == pytest.approx([share, share])
        assert line[0, 0] <= bar.get_x()
        assert line[1, 0] >= bar.get_x() + bar.get_width()


def test_intervals_are_lines_from_end_to_end() -> None:
    scores = pope_scores(study(), n_boot=30)
    upper = pope_bars(scores).axes[0]
    ends = np.array([line[:, 1] for lines in upper.collections for line in lines.get_segments()])
    recall = scores.accuracy.sel(kind="random", statistic=["low", "high"]).values
    assert (np.abs(ends - recall).max(axis=1) < 1e-9).any()


def test_without_log_odds_there_is_one_panel() -> None:
    rows = [StudyRow(id=str(i), question="?", answer=label, kind="random") for i, label in enumerate(LABELS)]
    figure = pope_bars(pope_scores(rows, SAID), title="Mine")
    assert len(figure.axes) == 1
    assert figure.get_suptitle() == "Mine"
    nothing = pope_bars(pope_scores(rows[1:3], ["No", "No"])).axes[0]
    assert len(nothing.texts) == 3, "precision, recall and F1 are shares of nothing"


def test_another_result_is_refused() -> None:
    with pytest.raises(InputError, match=r"pope_bars.*'accuracy'.*pope_scores.*pope_study"):
        pope_bars(study())
    with pytest.raises(InputError, match=r"knockout_curves.*'effect'.*viz\.pope_bars\(pope_scores\(study"):
        knockout_curves(study())
