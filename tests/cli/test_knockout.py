from __future__ import annotations

from pathlib import Path

import pytest

from hooked_llava.analysis import attention_knockout
from hooked_llava.cli.tables import OptionalTable
from hooked_llava.datasets.pope import POPE_KINDS
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load
from hooked_llava.toy.constraint_tables import write_constraints
from hooked_llava.toy.gqa_tables import write_gqa
from hooked_llava.toy.pope_tables import write_pope
from tests.cli.running import QUESTION, refused, run
from tests.launched import launch


def test_one_question_prints_the_edges_and_writes_a_page(checkpoint, image, tmp_path):
    page = tmp_path / "page.html"
    options = ("-o", str(page), "-m", checkpoint, "--max-new-tokens", "2", "--window", "1")
    result = run("knockout", image, QUESTION, "--box", "20,5,30,15", *options)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    inputs = model.prepare(QUESTION, image).with_boxes(object=[(20, 5, 30, 15)])
    expected = attention_knockout(model, inputs, ["question->last", "object->question"], 1, total=True)
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if "->" in line}
    assert len(lines) == 9
    for edge in expected.edge.values.tolist():
        assert float(lines[edge][1]) == pytest.approx(float(expected.total_effect.sel(edge=edge)), abs=0.051)
        assert float(lines[edge][3]) == pytest.approx(float(expected.effect.sel(edge=edge).min()), abs=0.051)
    assert page.read_text().startswith("<!doctype html>")


def test_edges_can_be_chosen(checkpoint, tmp_path):
    page = str(tmp_path / "page.html")
    result = run("knockout", QUESTION, "--edge", "question|rest->last", "-o", page, "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines() if "->" in line] == ["question|rest->last"]


def test_a_table_of_questions_and_its_result_file(checkpoint, tmp_path):
    folder = write_gqa(tmp_path / "gqa", 2, kinds=["ChooseAttr", "QueryAttr"])
    page, kept = tmp_path / "page.html", tmp_path / "flow.safetensors"
    options = ("-o", str(page), "-m", checkpoint, "--images", str(folder), "--all", "--edge", "image->last")
    result = run("knockout", "--dataset", str(folder), "--results", str(kept), *options)
    assert result.exit_code == 0, result.stderr
    assert "Information flow over 4 questions" in result.stdout
    found = load(kept)
    assert found.question.values.tolist() == ["ChooseAttr-0", "ChooseAttr-1", "QueryAttr-0", "QueryAttr-1"]
    assert found.attrs["tail"] == " \nAnswer the question using a single word or phrase."
    assert found.attrs["only_correct"] is False
    few = run("knockout", "--dataset", str(folder), "--limit", "1", *options)
    assert "over 2 questions" in few.stdout
    said = refused("knockout", "--dataset", str(folder), "--limit", "1", "--results", str(kept), *options)
    assert "holds another study" in said


def test_a_table_of_pope_is_known_by_its_content(tmp_path):
    folder = write_pope(tmp_path / "pope", 2)
    for path, kinds in ((folder, POPE_KINDS), (folder / "tiny_shapes_pope_popular.json", ("popular",))):
        rows, how = OptionalTable(dataset=str(path), images=folder).questions()
        assert [row.id for row in rows] == [f"{kind}-{i}" for kind in kinds for i in (1, 2)]
        assert how == {"tail": "\nAnswer the question using a single word or phrase."}


def one_of_two(folder: Path, arguments: tuple[str, ...], index: int) -> None:
    result = run("knockout", *arguments, "-o", str(folder / f"page-{index}.html"))
    assert result.exit_code == 0, result.stderr
    (folder / f"said-{index}").write_text(result.stdout)


def test_of_two_processes_one_prints_and_writes(checkpoint, tmp_path):
    table, page = write_gqa(tmp_path / "gqa", 2, kinds=["ChooseAttr"]), tmp_path / "page-0.html"
    arguments = ("--dataset", str(table), "--images", str(table), "--all", "--edge", "image->last", "--batch-size", "1")
    arguments += ("-m", checkpoint)
    assert launch(one_of_two, tmp_path, arguments) == [0, 0]
    assert (tmp_path / "said-1").read_text() == ""
    assert not (tmp_path / "page-1.html").exists()
    assert page.read_text().startswith("<!doctype html>")
    assert (tmp_path / "said-0").read_text() == run("knockout", *arguments, "-o", str(page)).stdout


def test_an_edge_that_no_question_has_is_a_dash(checkpoint, tmp_path):
    page = ("-o", str(tmp_path / "page.html"), "-m", checkpoint)
    folder = write_gqa(tmp_path / "gqa", 1, kinds=["QueryAttr"])
    edges = ("--edge", "constraint->last", "--edge", "image->last")
    result = run("knockout", "--dataset", str(folder), "--images", str(folder), "--all", *edges, *page)
    assert result.exit_code == 0, result.stderr
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if "->" in line}
    assert lines["constraint->last"] == ["–", "–"]
    assert lines["image->last"][0][0] in "+-"


def test_another_metric(checkpoint, tmp_path):
    page = ("-o", str(tmp_path / "page.html"), "-m", checkpoint)
    result = run("knockout", QUESTION, "--edge", "question->last", "--metric", "log_probability", *page)
    assert result.exit_code == 0, result.stderr
    line = next(line.split() for line in result.stdout.splitlines() if "->" in line)
    model = HookedLLaVA.from_pretrained(checkpoint)
    inputs = model.prepare(QUESTION)
    expected = attention_knockout(model, inputs, ["question->last"], "all", metric="log_probability")
    assert float(line[1]) == pytest.approx(float(expected.effect[0]), abs=0.00051)


def test_edges_may_be_weighted(checkpoint, tmp_path):
    page = tmp_path / "page.html"
    options = ("--edge", "question->last", "--factor", "0.3", "-o", str(page), "-m", checkpoint)
    result = run("knockout", QUESTION, *options)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    expected = attention_knockout(model, model.prepare(QUESTION), ["question->last"], "all", factor=0.3)
    line = next(line.split() for line in result.stdout.splitlines() if "->" in line)
    assert float(line[1]) == pytest.approx(float(expected.effect[0]), abs=0.051)
    assert "weighted by 0.3" in result.stdout
    assert "blocked" not in result.stdout
    folder, kept = write_gqa(tmp_path / "gqa", 1, kinds=["QueryAttr"]), tmp_path / "flow.safetensors"
    table = ("--dataset", str(folder), "--images", str(folder), "--all", "--results", str(kept))
    result = run("knockout", *table, *options)
    assert "weighted by 0.3" in result.stdout, result.stderr
    assert load(kept).attrs["factor"] == 0.3


def test_the_embedded_table(tmp_path):
    result = run("knockout", "--dataset", "tiny-shapes", "--limit", "1", "-o", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.stderr
    assert "random->question" in result.stdout


def test_what_does_not_fit_is_said_in_one_line(checkpoint, image, tmp_path):
    options = ("-m", checkpoint, "-o", str(tmp_path / "page.html"))
    assert "--box 1,2,3 is no box" in refused("knockout", image, QUESTION, "--box", "1,2,3", *options)
    assert "--limit belongs to a table" in refused("knockout", image, QUESTION, "--limit", "3", *options)
    assert "--all belongs to a table" in refused("knockout", image, QUESTION, "--all", *options)
    assert "'image' is no edge" in refused("knockout", image, QUESTION, "--edge", "image", *options)
    assert "brings its own questions" in refused("knockout", QUESTION, "--dataset", "tiny-shapes", *options)
    assert "a table has the boxes" in refused("knockout", "--dataset", "tiny-shapes", "--box", "1,2,3,4", *options)
    assert "is no file and no folder" in refused("knockout", "--dataset", "nowhere", *options)
    folder = write_gqa(tmp_path / "gqa", 1, kinds=["QueryAttr"])
    constraints = str(write_constraints(tmp_path / "constraints", 1))
    said = refused("knockout", "--dataset", constraints, "--images", constraints, *options)
    assert "is a table of VQA-Constraints. Its questions have no answers" in said
    own = ("--dataset", "tiny-shapes")
    for option in (("--max-new-tokens", "3"), ("--no-image",)):
        assert f"{option[0]} belongs to one question" in refused("knockout", *own, *option, *options)
    assert "--batch-size belongs to a table" in refused("knockout", image, QUESTION, "--batch-size", "3", *options)
    assert "tiny-shapes draws its own" in refused("knockout", *own, "--images", str(folder), *options)
    nowhere = ("--dataset", str(folder), "--images", str(tmp_path / "nowhere"))
    assert "there is no such folder" in refused("knockout", *nowhere, *options)
    assert "say where they are with --images" in refused("knockout", "--dataset", str(folder), *options)
    assert not Path(options[-1]).exists()
