from __future__ import annotations

from pathlib import Path

import pytest

from hooked_llava.analysis import pope_study
from hooked_llava.datasets import pope_scores
from hooked_llava.results.arrays import load
from hooked_llava.toy.gqa_tables import write_gqa
from hooked_llava.toy.pope_tables import pope_rows, write_pope
from tests.cli.running import refused, run
from tests.launched import launch

SCORES = ("accuracy", "precision", "recall", "f1", "yes_share")


def numbers(said: str) -> dict[str, list[float]]:
    """The printed scores of each kind of question."""
    lines = (line.split() for line in said.splitlines())
    return {words[0]: [float(w) for w in words[1:]] for words in lines if words[:1] and words[-1][0] in "+-"}


def test_the_embedded_worlds_table(tiny_shapes, tmp_path):
    page, kept = tmp_path / "page.html", tmp_path / "pope.safetensors"
    result = run("pope", "--dataset", "tiny-shapes", "--limit", "2", "--results", str(kept), "-o", str(page))
    assert result.exit_code == 0, result.stderr
    scores = pope_scores(pope_study(tiny_shapes, pope_rows(2), progress=False))
    found = numbers(result.stdout)
    assert list(found) == ["random", "popular", "adversarial", "all"]
    for kind, shown in found.items():
        of_kind = scores.sel(kind=kind)
        assert shown[:5] == pytest.approx([float(of_kind[name]) for name in SCORES], abs=0.00051)
        assert shown[5:] == pytest.approx(of_kind.log_odds.values.tolist(), abs=0.051)
    assert "Asked 6 questions" in page.read_text()
    assert load(kept).attrs["only_correct"] is False


def test_released_files_and_a_result_that_is_read_back(checkpoint, tmp_path):
    folder = write_pope(tmp_path / "pope", 2)
    page, kept = tmp_path / "page.html", tmp_path / "pope.safetensors"
    file = folder / "tiny_shapes_pope_popular.json"
    options = ("--images", str(folder), "-m", checkpoint, "-o", str(page), "--results", str(kept))
    result = run("pope", "--dataset", str(file), *options)
    assert result.exit_code == 0, result.stderr
    found = load(kept)
    assert found.question.values.tolist() == ["popular-1", "popular-2"]
    assert found.attrs["tail"] == "\nAnswer the question using a single word or phrase."
    page.unlink()
    again = run("pope", "--dataset", str(file), *options)
    assert again.stdout == result.stdout, "a finished study is read back"
    assert page.exists()
    assert "holds another study" in refused("pope", "--dataset", str(folder), *options)


def one_of_two(folder: Path, arguments: tuple[str, ...], index: int) -> None:
    result = run("pope", *arguments, "-o", str(folder / f"page-{index}.html"))
    assert result.exit_code == 0, result.stderr
    (folder / f"said-{index}").write_text(result.stdout)


def test_of_two_processes_one_prints_and_writes(checkpoint, tmp_path):
    table = write_pope(tmp_path / "pope", 2, kinds=["random"])
    arguments = ("--dataset", str(table), "--images", str(table), "--batch-size", "1", "-m", checkpoint)
    assert launch(one_of_two, tmp_path, arguments) == [0, 0]
    assert (tmp_path / "said-1").read_text() == ""
    assert not (tmp_path / "page-1.html").exists()
    alone = run("pope", *arguments, "-o", str(tmp_path / "page-0.html"))
    assert (tmp_path / "said-0").read_text() == alone.stdout


def test_what_does_not_fit_is_said_in_one_line(checkpoint, tmp_path):
    page = ("-o", str(tmp_path / "page.html"), "-m", checkpoint)
    gqa = write_gqa(tmp_path / "gqa", 1, kinds=["QueryAttr"])
    said = refused("pope", "--dataset", str(gqa), "--images", str(gqa), *page)
    assert "is a table of GQA. Its questions do not ask whether an object is there" in said
    assert "say where they are with --images" in refused("pope", "--dataset", str(write_pope(tmp_path / "p", 1)), *page)
    assert "tiny-shapes draws its own" in refused("pope", "--dataset", "tiny-shapes", "--images", str(gqa), *page)
    assert "--dataset" in run("pope", *page).stderr
    assert not (tmp_path / "page.html").exists()
