from __future__ import annotations

from pathlib import Path

from PIL import Image

from hooked_llava.toy.images import image_path
from tests.cli.running import QUESTION, refused, run

PAIR = ("demo", "demo-blue-star", QUESTION)


def test_patch_prints_both_answers_and_writes_the_page(tmp_path):
    page = tmp_path / "patching.html"
    result = run("patch", *PAIR, "-o", str(page), "--max-new-tokens", "1", "--max-runs", "0", "--direction", "noise")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == QUESTION.split()
    assert lines[1][:2] == ["clean", "Orange"]
    assert lines[2][:2] == ["corrupted", "Blue"]
    assert float(lines[1][2]) > 0 > float(lines[2][2])
    assert f"The page is in {page}; open it in a browser." in result.stdout
    html = page.read_text(encoding="utf-8")
    assert "Every colored cell is one run of the clean prompt" in html
    assert "There are too many patches to measure each here" in html


def test_tokens_may_be_named(checkpoint, tmp_path):
    page = tmp_path / "patching.html"
    tokens = ("--answer", "red", "--versus", "blue")
    result = run("patch", *PAIR, *tokens, "-o", str(page), "-m", checkpoint, "--max-new-tokens", "1")
    assert result.exit_code == 0, result.stderr
    assert "logit of “red” minus that of “blue”" in page.read_text(encoding="utf-8")


def test_images_with_the_same_answer_are_refused(tmp_path):
    page = tmp_path / "patching.html"
    message = refused("patch", "demo", "demo", QUESTION, "-o", str(page))
    assert message.startswith("Error: Both prompts are answered with 'Orange'")
    assert "on the command line --answer and --versus" in message
    assert not page.exists()


def test_what_is_wrong_with_the_arguments_is_said_before_the_model_is_loaded(tmp_path):
    nowhere = ("-m", "nowhere", "-o")
    page = str(tmp_path / "patching.html")
    assert "There is no image 'dmo'" in refused("patch", "dmo", "demo", QUESTION, *nowhere, page)
    assert "Did you mean: demo" in refused("patch", "demo", "dmo", QUESTION, *nowhere, page)
    assert "is a folder; expected a file name" in refused("patch", *PAIR, *nowhere, str(tmp_path))


def test_images_of_other_sizes_are_patched_too(checkpoint, image, tmp_path):
    small = tmp_path / "small.png"
    Image.open(image_path("demo")).resize((20, 30)).save(small)
    page = tmp_path / "patching.html"
    tokens = ("--answer", "red", "--versus", "blue", "--max-new-tokens", "1")
    result = run("patch", image, str(small), QUESTION, *tokens, "-o", str(page), "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert Path(page).stat().st_size > 10_000
