"""POPE's files are read as they are released, and its numbers are those of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from hooked_llava import HookedLLaVA
from hooked_llava.analysis import pope_study
from hooked_llava.datasets import StudyRow, pope_scores, prepare_rows, read_pope
from hooked_llava.datasets.pope import POPE_KINDS, is_pope, said_yes
from hooked_llava.errors import InputError
from hooked_llava.results.provenance import forward_passes
from hooked_llava.toy.pope_tables import pope_rows, write_pope
from tests.oracles.plain_pope import released_label, released_scores

LINE = {
    "question_id": 1,
    "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there a snowboard in the image?",
    "label": "yes",
}
"""A line as coco_pope_random.json has them."""


def written(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return file


def test_a_released_file(tmp_path: Path) -> None:
    other = {**LINE, "question_id": 2, "label": "no"}
    written(tmp_path / "coco_pope_adversarial.json", LINE)
    written(tmp_path / "coco_pope_random.json", LINE, other)
    written(tmp_path / "captions.json", {"text": "a dog"})
    rows = read_pope(tmp_path)
    assert [row.id for row in rows] == ["random-1", "random-2", "adversarial-1"]
    assert (rows[0].question, rows[0].answer, rows[1].answer) == (LINE["text"], "Yes", "No")
    assert (rows[0].image, rows[0].kind) == (LINE["image"], "random")
    assert [row.id for row in read_pope(tmp_path, limit=1)] == ["random-1", "adversarial-1"]
    assert [row.kind for row in read_pope(tmp_path, kinds=["adversarial"])] == ["adversarial"]


def test_one_file_with_categories(tmp_path: Path) -> None:
    lines = [{**LINE, "category": kind} for kind in POPE_KINDS]
    assert [row.kind for row in read_pope(written(tmp_path / "llava_pope_test.jsonl", *lines))] == list(POPE_KINDS)


def test_a_table_is_known_by_its_content(tmp_path: Path) -> None:
    assert is_pope(written(tmp_path / "mine.txt", LINE))
    assert not is_pope(tmp_path), "no file is named after a kind"
    assert is_pope(write_pope(tmp_path, n=1))
    (tmp_path / "gqa.csv").write_text("question_id,image,text,label\n1,a,b,yes\n", encoding="utf-8")
    assert not is_pope(tmp_path / "gqa.csv")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'rare'.*random"):
        read_pope(tmp_path, kinds=["rare"])
    with pytest.raises(InputError, match=r"coco_pope_random\.json"):
        read_pope(tmp_path)
    with pytest.raises(InputError, match=r"nowhere'.*coco_pope_random\.json"):
        read_pope(tmp_path / "nowhere")
    with pytest.raises(InputError, match="limit=0.*least 1"):
        read_pope(written(tmp_path / "random.json", LINE), limit=0)
    with pytest.raises(InputError, match=r"kind ''.*label 'yes'.*category"):
        read_pope(written(tmp_path / "mine.json", LINE))
    with pytest.raises(InputError, match=r"line 2.*label 'maybe'"):
        read_pope(written(tmp_path / "random.json", LINE, {**LINE, "label": "maybe"}))
    with pytest.raises(InputError, match=r"line 1 lacks \['label'\]"):
        read_pope(written(tmp_path / "random.json", {name: v for name, v in LINE.items() if name != "label"}))
    (tmp_path / "random.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is no JSON"):
        read_pope(tmp_path / "random.json")


SAID = ["Yes", "No", "no, there is not", "Yes, a dog.", "There is not. Yes", "I think so", "No.", "Yes"]
LABELS = ["yes", "no", "yes", "no", "no", "yes", "yes", "no"]


def test_an_answer_counts_as_in_the_released_evaluation() -> None:
    for text in [*SAID, "", "Nothing", "yes.no", "No,yes", "no\nidea"]:
        assert said_yes(text) == (released_label(text) == "yes"), text


def test_the_numbers_are_those_of_the_released_evaluation() -> None:
    rows = [
        StudyRow(id=str(i), question="?", answer=label.capitalize(), kind=kind)
        for i, (label, kind) in enumerate(zip(LABELS, 2 * ["random"] * 2 + 2 * ["popular"] * 2, strict=True))
    ]
    found = pope_scores(rows, SAID)
    assert found.kind.values.tolist() == ["random", "popular", "all"]
    assert found.n.values.tolist() == [4, 4, 8]
    for kind, part in (("random", slice(4)), ("popular", slice(4, 8)), ("all", slice(8))):
        expected = released_scores(SAID[part], LABELS[part])
        assert {name: float(found[name].sel(kind=kind)) for name in expected} == pytest.approx(expected)


def test_intervals_are_those_of_questions_drawn_within_each_answer() -> None:
    """The share of objects that are found is then binomial, and so is the share of yes where no object is there."""
    there, found, absent, made_up = 60, 42, 40, 10
    labels = ["Yes"] * there + ["No"] * absent
    said = ["Yes"] * found + ["No"] * (there - found) + ["Yes"] * made_up + ["No"] * (absent - made_up)
    rows = [StudyRow(id=str(i), question="?", answer=label, kind="random") for i, label in enumerate(labels)]
    scores = pope_scores(rows, said, n_boot=20_000, confidence=0.9).isel(kind=0)
    plain = pope_scores(rows, said).isel(kind=0)
    for name in ("accuracy", "precision", "recall", "f1", "yes_share"):
        assert float(scores[name].sel(statistic="mean")) == float(plain[name])
    ends = binom.ppf([0.05, 0.95], there, found / there) / there
    assert scores.recall.sel(statistic=["low", "high"]).values == pytest.approx(ends, abs=1.01 / there)
    spread = found * (1 - found / there) + made_up * (1 - made_up / absent)  # the variance of the sum of two binomials
    width = float(scores.yes_share.sel(statistic="high") - scores.yes_share.sel(statistic="low"))
    assert width == pytest.approx(2 * 1.645 * spread**0.5 / len(rows), abs=0.02)
    assert float(scores.true_share) == 0.6
    assert pope_scores(rows, labels, n_boot=50).yes_share.values.tolist() == [[0.6, 0.6, 0.6]], "the table is given"


def test_shares_of_nothing_are_no_numbers() -> None:
    rows = [StudyRow(id="1", question="?", answer="No", kind="random")]
    found = pope_scores(rows, ["No"]).isel(kind=0)
    assert np.isnan(found.precision)
    assert np.isnan(found.recall)
    assert (float(found.accuracy), float(found.yes_share)) == (1, 0)
    assert found.true_share.item() == 0
    with_ends = pope_scores(rows, ["No"], n_boot=10).isel(kind=0)
    assert np.isnan(with_ends.precision).all()
    assert with_ends.accuracy.values.tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=r"n_boot=-1.*0"):
        pope_scores(rows, ["No"], n_boot=-1)
    with pytest.raises(InputError, match=r"1 questions.*said=\[\]"):
        pope_scores(rows, [])


def test_the_embedded_worlds_table_says_the_truth(tmp_path: Path) -> None:
    rows = pope_rows(6)
    assert [row.answer for row in rows] == 9 * ["Yes", "No"]
    for row in rows:
        shape = row.objects[0]
        assert shape in row.question
        there = bool(row.boxes)
        assert there or row.answer == "No"
        if row.answer == "No":
            assert there == (row.kind == "adversarial"), "its shape is there in another color"
    back = read_pope(write_pope(tmp_path, n=6))
    assert [(r.id, r.question, r.answer) for r in back] == [(r.id, r.question, r.answer) for r in rows]


def test_a_study_gives_log_odds_at_one_forward_a_batch_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = HookedLLaVA.from_pretrained("tiny-shapes"), pope_rows(3)
    runs: list[int] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda inputs: runs.append(len(inputs)) or embed(inputs))
    found = pope_study(model, rows, out=tmp_path / "pope", batch_size=9)
    assert runs == [9, 9], "one pass to answer and one for the log odds"
    assert forward_passes(found.attrs) == 1, "beside the one that answers"
    assert found.sizes["question"] == len(rows), "wrong answers are kept"
    again = pope_study(model, rows, out=tmp_path / "pope", batch_size=9)
    assert len(runs) == 2
    assert again.equals(found)
    ids = [model.to_single_token(word) for word in ("Yes", "No")]
    with torch.no_grad():
        for row, odds in zip(rows, found.log_odds.values, strict=True):
            p = model(prepare_rows(model, [row]))[0, -1].double().softmax(-1)[ids]
            assert float(odds) == pytest.approx(float((p[0] / p[1]).log()), abs=1e-3)
    scores = pope_scores(found)
    means = scores.log_odds.sel(kind="all")
    truth = found.answer.values == "Yes"
    assert means.values.tolist() == pytest.approx(
        [found.log_odds.values[truth].mean(), found.log_odds.values[~truth].mean()]
    )
    with_ends = pope_scores(found, n_boot=20)
    assert with_ends.log_odds.dims == ("kind", "label", "statistic")
    np.testing.assert_array_equal(with_ends.log_odds.sel(statistic="mean"), scores.log_odds)
    assert scores.attrs["model"] == "tiny-shapes"
    expected = released_scores(found.said.values.tolist(), [a.lower() for a in found.answer.values.tolist()])
    assert float(scores.f1.sel(kind="all")) == pytest.approx(expected["f1"])
    with pytest.raises(InputError, match="only_correct=True"):
        pope_scores(found.assign_attrs(only_correct=True))
