from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hooked_llava.analysis import causal_trace, trace_means, trace_study
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape, write_constraints
from hooked_llava.toy.gqa_tables import write_gqa
from hooked_llava.toy.pope_tables import write_pope
from tests.cli.running import QUESTION, refused, run
from tests.launched import launch


def test_trace_prints_the_runs_and_writes_a_page(checkpoint, image, tmp_path):
    page = tmp_path / "trace.html"
    arguments = ("-c", "the star", "--replace", "a circle", "-o", str(page), "-m", checkpoint, "--max-new-tokens", "2")
    result = run("trace", image, QUESTION, *arguments)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    inputs = model.prepare(QUESTION, image)
    lines = result.stdout.splitlines()
    assert lines[0] == QUESTION
    clean = float(model(inputs)[0, -1].softmax(-1).max().detach())
    assert f"is {clean:.3f}; corrupted (replaced by" in result.stdout
    assert [line.split()[0] for line in lines if line.startswith(("mlp", "attn", "resid"))] == ["mlp", "attn", "resid"]
    assert page.read_text().startswith("<!doctype html>")


def test_several_constraints_with_embedded_corruption(checkpoint, tmp_path):
    page = str(tmp_path / "trace.html")
    arguments = ("-c", "color", "-c", "star", "--corruption", "mean", "-o", page, "-m", checkpoint, "--window", "2")
    result = run("trace", QUESTION, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "mean embedding) it is" in result.stdout


def test_windows_may_be_counted_as_the_released_code_does(checkpoint, tmp_path):
    page = tmp_path / "trace.html"
    windows = ("--window", "2", "--window-reading", "released")
    result = run("trace", QUESTION, "-c", "star", "--replace", "circle", *windows, "-o", str(page), "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    how = {"corruption": "circle", "window": 2, "window_reading": "released", "kinds": ("mlp",)}
    best = float(causal_trace(model, model.prepare(QUESTION), "star", **how).restored.max())
    line = next(line.split() for line in result.stdout.splitlines() if line.startswith("mlp"))
    assert line[-1] == f"{best:.3f}"
    assert "5 layers at a time (window 2 as the released code counts)" in page.read_text()


def test_what_does_not_fit_is_said_in_one_line(checkpoint, image, tmp_path):
    options = ("-m", checkpoint, "-o", str(tmp_path / "page.html"))
    assert "There is no constraint; name words of the question" in refused("trace", image, QUESTION, *options)
    assert "'square' does not occur in the question" in refused("trace", image, QUESTION, "-c", "square", *options)
    said = refused("trace", image, QUESTION, "-c", "star", "--replace", "the red circle", *options)
    assert "takes 3 tokens and the constraint 'star' 1" in said
    assert "Replace(" not in said
    two = ("-c", "color", "-c", "star", "--replace", "shape", "--replace", "circle", "--replace", "red")
    assert "--replace is given 3 times and --constraint 2 times" in refused("trace", image, QUESTION, *two, *options)
    said = refused("trace", image, QUESTION, "-c", "star", "--repeat", *options)
    assert "--repeat has nothing to repeat; give words with --replace" in said
    assert not (tmp_path / "page.html").exists()


def test_the_first_token_may_stand_at_every_place(checkpoint, tmp_path):
    page = str(tmp_path / "trace.html")
    arguments = ("-c", "the star", "--replace", "circle", "--repeat", "-o", page, "-m", checkpoint)
    result = run("trace", QUESTION, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "replaced by 'circle' at every token) it is" in result.stdout


def test_where_nothing_comes_back_no_position_is_named(checkpoint, tmp_path):
    page = str(tmp_path / "trace.html")
    result = run("trace", QUESTION, "-c", "star", "--replace", "star", "-o", page, "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    layers = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit() and "runs" not in line]
    assert len(layers) == HookedLLaVA.from_pretrained(checkpoint).cfg.n_layers
    assert all(len(row) == 4 for row in layers), layers  # the layer, and a probability for each kind


# ---------------------------------------------------------------------- a table of questions


def test_the_embedded_worlds_table(tmp_path):
    page, kept = tmp_path / "page.html", tmp_path / "traces.safetensors"
    options = ("--dataset", "tiny-shapes", "--limit", "2", "-o", str(page))
    result = run("trace", *options, "--results", str(kept), "--window", "2", "--window-reading", "released")
    assert result.exit_code == 0, result.stderr
    found = load(kept)
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    how = {"window": 2, "window_reading": "released", "progress": False}
    expected = trace_study(model, constraint_rows(2), corruption=other_shape, **how)
    np.testing.assert_allclose(found.indirect_effect, expected.indirect_effect, atol=1e-6)
    means = trace_means(expected)
    lines = [line.split() for line in result.stdout.splitlines()]
    for kind in means.kind.values.tolist():
        (line,) = [line for line in lines if line[:1] == [kind]]
        assert line[1:4] == [str(int(means.n_lowered.sel(kind=kind))), "of", str(int(means.n.sel(kind=kind)))]
        assert line[4] == "MLP"
        best = float(means.indirect_effect.sel(kind=kind, statistic="mean", output="mlp").max())
        assert float(line[5]) == pytest.approx(best, abs=0.0051)
    assert "5 layers at a time (window 2 as the released code counts)" in page.read_text()
    said = refused("trace", *options, "--results", str(kept), "--corruption", "noise")
    assert "holds another study" in said


def test_an_interrupted_table_goes_on(tmp_path, monkeypatch):
    traced: list[str] = []

    def counting(*given: object, **options: object) -> object:
        if len(traced) == 3:
            traced.append("killed")
            raise KeyboardInterrupt
        traced.append(str(options["corruption"]))
        return causal_trace(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("hooked_llava.analysis.studies.trace.causal_trace", counting)
    page, kept = tmp_path / "page.html", tmp_path / "traces.safetensors"
    options = ("--dataset", "tiny-shapes", "--limit", "2", "--batch-size", "2", "--results", str(kept), "-o", str(page))
    assert run("trace", *options).exit_code != 0
    assert not page.exists()
    result = run("trace", *options)
    assert result.exit_code == 0, result.stderr
    assert len(traced) == 4 + 4, "two of the six were kept"
    assert "Causal traces of 6 questions" in page.read_text()


def of_a_folder(checkpoint: str, folder: Path) -> tuple[str, ...]:
    return ("--dataset", str(folder), "--images", str(folder), "--all", "-m", checkpoint, "--replace", "a", "--repeat")


def test_released_tables_with_the_released_corruption(checkpoint, tmp_path):
    folder, kept = write_constraints(tmp_path / "tables", 2, kinds=["Known", "OK-VQA"]), tmp_path / "traces.safetensors"
    arguments = (*of_a_folder(checkpoint, folder), "--results", str(kept), "-o", str(tmp_path / "page.html"))
    result = run("trace", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "4 questions (0 placed with other capitals or punctuation)" in result.stdout
    found = load(kept)
    assert sorted(found.question.values.tolist()) == ["Known-0", "Known-1", "OK-VQA-0", "OK-VQA-1"]
    assert found.attrs["tail"] == "Answer in a few words."
    assert found.attrs["corruption"] == "replaced by 'a' at every token"


def one_of_two(folder: Path, arguments: tuple[str, ...], index: int) -> None:
    result = run("trace", *arguments, "-o", str(folder / f"page-{index}.html"))
    assert result.exit_code == 0, result.stderr
    (folder / f"said-{index}").write_text(result.stdout)


def test_of_two_processes_one_prints_and_writes(checkpoint, tmp_path):
    arguments = of_a_folder(checkpoint, write_constraints(tmp_path / "tables", 2, kinds=["Known"]))
    arguments += ("--batch-size", "1")
    assert launch(one_of_two, tmp_path, arguments) == [0, 0]
    assert (tmp_path / "said-1").read_text() == ""
    assert not (tmp_path / "page-1.html").exists()
    alone = run("trace", *arguments, "-o", str(tmp_path / "page-0.html"))
    assert (tmp_path / "said-0").read_text() == alone.stdout


def test_what_does_not_fit_a_table_is_said_in_one_line(checkpoint, image, tmp_path):
    page = ("-o", str(tmp_path / "page.html"), "-m", checkpoint)
    own = ("--dataset", "tiny-shapes", *page)
    assert "brings its own questions" in refused("trace", QUESTION, *own)
    assert "--constraint belongs to one question" in refused("trace", *own, "-c", "star")
    assert "--max-new-tokens belongs to one question" in refused("trace", *own, "--max-new-tokens", "2")
    assert "--replace is given several times" in refused("trace", *own, "--replace", "a", "--replace", "b")
    assert "--repeat has nothing to repeat" in refused("trace", *own, "--repeat")
    assert "--limit belongs to a table" in refused("trace", image, QUESTION, "-c", "star", "--limit", "2", *page)
    for write, name in ((write_gqa, "GQA"), (write_pope, "POPE")):
        without = write(tmp_path / name, 1)
        said = refused("trace", "--dataset", str(without), "--images", str(without), *page)
        assert f"is a table of {name}. It names no constraints" in said
        assert "give tiny-shapes, or a released file" in said
        assert "VQA-Constraints (OK-VQA, Movies, Known" in said
    folder = write_constraints(tmp_path / "tables", 1, kinds=["Known"])
    table = ("--dataset", str(folder))
    assert "say where they are with --images" in refused("trace", *table, *page)
    file = folder / "multimodal_known.csv"
    lines = [line.rpartition(",")[0] for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    assert "holds no answers" in refused("trace", *table, "--images", str(folder), *page)
    assert not (tmp_path / "page.html").exists()
