from __future__ import annotations

from hooked_llava.cli.explain import PatchMethod
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.viz.pages.explain import OCCLUDED_UNASKED
from tests.cli.running import QUESTION, run


def test_explain_prints_the_answer_and_writes_the_page(checkpoint, image, tmp_path):
    page = tmp_path / "report.html"
    result = run("explain", image, QUESTION, "-o", str(page), "-m", checkpoint, "--max-new-tokens", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == QUESTION
    assert f"The page is in {page}; open it in a browser." in result.stdout
    assert '<section id="attention">' in page.read_text(encoding="utf-8")


def test_explain_follows_answer_and_versus(checkpoint, tmp_path):
    page = tmp_path / "report.html"
    words = ("--answer", "red", "--versus", "blue")
    result = run("explain", "Who made the star?", *words, "-o", str(page), "-m", checkpoint, "--max-new-tokens", "1")
    assert result.exit_code == 0, result.stderr
    html = page.read_text(encoding="utf-8")
    assert "logit of “red” minus that of “blue”" in html
    assert 'id="attention"' not in html


def test_explain_draws_the_patch_map_that_was_asked_for(checkpoint, image, tmp_path):
    page = tmp_path / "report.html"
    options = ("--patches", "grad_x_input", "--no-occlusion", "--max-new-tokens", "1")
    result = run("explain", image, QUESTION, *options, "-o", str(page), "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    html = page.read_text(encoding="utf-8")
    assert "<h3>Gradient × input</h3>" in html
    assert "<h3>Occlusion</h3>" not in html


def test_methods_are_those_of_the_library():
    assert tuple(PatchMethod) == tuple(PATCH_MAPS)
    assert "Default: up to 256 patches" in run("explain", "--help").stdout
    assert OCCLUDED_UNASKED == 256
