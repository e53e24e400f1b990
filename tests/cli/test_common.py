from __future__ import annotations

from pathlib import Path

import pytest

from hooked_llava.toy.images import NAMES
from tests.cli.running import QUESTION, refused, run


@pytest.mark.parametrize("name", ["demo", "demo.png"])
def test_bundled_images_are_asked_by_name(checkpoint, name):
    assert run("ask", name, QUESTION, "-m", checkpoint, "--max-new-tokens", "1").exit_code == 0


def test_a_question_alone_is_asked_without_an_image(checkpoint):
    alone = run("ask", "Who made the star?", "-m", checkpoint, "--max-new-tokens", "1")
    flagged = run("ask", "--no-image", "Who made the star?", "-m", checkpoint, "--max-new-tokens", "1")
    assert alone.exit_code == flagged.exit_code == 0
    assert alone.stdout == flagged.stdout


def test_template_none_takes_the_question_as_the_whole_prompt(checkpoint, image):
    prompt = "USER: <image>\nWhat color is the star? ASSISTANT:"
    whole = run("ask", image, prompt, "--template", "none", "-m", checkpoint, "--max-new-tokens", "1")
    dressed = run("ask", image, QUESTION, "--template", "llava-1.5", "-m", checkpoint, "--max-new-tokens", "1")
    assert whole.exit_code == 0, whole.stderr
    assert whole.stdout.splitlines()[-5:] == dressed.stdout.splitlines()[-5:]


def test_dtype_is_taken(checkpoint, image):
    result = run("ask", image, QUESTION, "-m", checkpoint, "--max-new-tokens", "1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr


def test_unknown_images_get_a_suggestion():
    message = refused("ask", "dmo", QUESTION)
    assert message == (
        f"Error: There is no image 'dmo': neither a file, nor a bundled image ({', '.join(NAMES)}). Did you mean: demo?"
    )


def test_a_file_that_is_no_image_is_refused_before_the_model_is_loaded(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    assert "is not an image that PIL can read" in refused("ask", str(text), QUESTION, "-m", "nowhere")


def test_unknown_models_get_a_suggestion():
    message = refused("ask", "Who made the star?", "-m", "tiny-shpes")
    assert message.startswith("Error: There is no model 'tiny-shpes'")
    assert "Did you mean: tiny-shapes" in message
    assert "\n" not in message


def test_a_image_without_a_question_is_refused():
    assert refused("ask", "demo") == (
        "Error: There is an image, 'demo', and no question; give one after it, in quotes."
    )
    assert "There is no question; give one in quotes" in refused("ask")


def test_no_image_with_a_image_is_refused():
    assert "--no-image leaves only a question, but 'demo' is given before it" in refused(
        "ask", "--no-image", "demo", QUESTION
    )


def test_a_page_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    nowhere = tmp_path / "nowhere" / "report.html"
    assert "is in a folder that does not exist" in refused(
        "explain", "demo", QUESTION, "-o", str(nowhere), "-m", "none"
    )
    assert "is a folder; expected a file name" in refused(
        "explain", "demo", QUESTION, "-o", str(tmp_path), "-m", "none"
    )


def test_words_templates_and_devices_that_do_not_exist_are_refused(checkpoint):
    question = ("Who made the star?", "-m", checkpoint, "--max-new-tokens", "1")
    assert "There is no template 'lava'" in refused("ask", *question, "--template", "lava")
    assert "--device abacus cannot be used here" in refused("ask", *question, "--device", "abacus")
    assert "Error: " in refused("explain", *question, "--answer", "two words", "-o", "/tmp/unwritten.html")
    assert not Path("/tmp/unwritten.html").exists()
