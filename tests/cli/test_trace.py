from __future__ import annotations

from hooked_llava.analysis import causal_trace
from hooked_llava.model.llava import HookedLLaVA
from tests.cli.running import QUESTION, refused, run


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
    assert f"is {clean:.3f}; replaced by" in result.stdout
    assert [line.split()[0] for line in lines if line.startswith(("mlp", "attn", "resid"))] == ["mlp", "attn", "resid"]
    assert page.read_text().startswith("<!doctype html>")


def test_several_constraints_with_embedded_corruption(checkpoint, tmp_path):
    page = str(tmp_path / "trace.html")
    arguments = ("-c", "color", "-c", "star", "--corruption", "mean", "-o", page, "-m", checkpoint, "--window", "2")
    result = run("trace", QUESTION, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "mean embedding, it is" in result.stdout


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
    assert "replaced by 'circle' at every token, it is" in result.stdout
