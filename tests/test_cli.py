from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hooked_llava.cli import app
from hooked_llava.model import HookedLLaVA
from hooked_llava.toy.pictures import SEEDS
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny untrained model on disk, as a user would have one."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(path)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def refused(*arguments: str) -> str:
    """What is said to standard error; nothing may be said anywhere else."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def test_ask_prints_question_answer_and_tokens(checkpoint, picture):
    result = run("ask", picture, QUESTION, "-m", checkpoint, "--max-new-tokens", "3", "--top", "4")
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    model = HookedLLaVA.from_pretrained(checkpoint)
    inputs = model.prepare(QUESTION, picture)
    assert lines[0] == QUESTION
    assert lines[1] == (model.generate(inputs, max_new_tokens=3) or "(nothing)")
    assert lines[3].split() == ["first", "token", "probability"]
    probabilities = [float(line.split()[1]) for line in lines[4:8]]
    assert probabilities == sorted(probabilities, reverse=True)
    best = model(inputs)[0, -1].softmax(-1).max().detach()
    assert probabilities[0] == pytest.approx(float(best), abs=6e-4)


@pytest.mark.parametrize("name", ["demo", "demo.png"])
def test_bundled_pictures_are_asked_by_name(checkpoint, name):
    assert run("ask", name, QUESTION, "-m", checkpoint, "--max-new-tokens", "1").exit_code == 0


def test_a_question_alone_is_asked_without_a_picture(checkpoint):
    alone = run("ask", "Who made the star?", "-m", checkpoint, "--max-new-tokens", "1")
    flagged = run("ask", "--no-image", "Who made the star?", "-m", checkpoint, "--max-new-tokens", "1")
    assert alone.exit_code == flagged.exit_code == 0
    assert alone.stdout == flagged.stdout


def test_template_none_takes_the_question_as_the_whole_prompt(checkpoint, picture):
    prompt = "USER: <image>\nWhat color is the star? ASSISTANT:"
    whole = run("ask", picture, prompt, "--template", "none", "-m", checkpoint, "--max-new-tokens", "1")
    dressed = run("ask", picture, QUESTION, "--template", "llava-1.5", "-m", checkpoint, "--max-new-tokens", "1")
    assert whole.exit_code == 0, whole.stderr
    assert whole.stdout.splitlines()[-5:] == dressed.stdout.splitlines()[-5:]


def test_dtype_is_taken(checkpoint, picture):
    result = run("ask", picture, QUESTION, "-m", checkpoint, "--max-new-tokens", "1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr


def test_explain_prints_the_answer_and_writes_the_page(checkpoint, picture, tmp_path):
    page = tmp_path / "report.html"
    result = run("explain", picture, QUESTION, "-o", str(page), "-m", checkpoint, "--max-new-tokens", "2")
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


def test_verify_prints_the_table_and_says_by_its_status_whether_all_is_the_same(checkpoint, monkeypatch):
    result = run("verify", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split()[:2] == ["activation", "difference"]
    assert "hook_logits" in result.stdout
    monkeypatch.setattr("hooked_llava.verify.TOLERANCE", -1.0)
    monkeypatch.setattr("hooked_llava.verify._ROUNDINGS", -1)
    assert run("verify", checkpoint).exit_code == 1


def test_unknown_pictures_get_a_suggestion():
    message = refused("ask", "dmo", QUESTION)
    assert message == (
        f"Error: There is no picture 'dmo': neither a file, nor a bundled picture ({', '.join(SEEDS)}). "
        "Did you mean: demo?"
    )


def test_a_file_that_is_no_picture_is_refused_before_the_model_is_loaded(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    assert "is not a picture that PIL can read" in refused("ask", str(text), QUESTION, "-m", "nowhere")


def test_unknown_models_get_a_suggestion():
    message = refused("ask", "Who made the star?", "-m", "tiny-shpes")
    assert message.startswith("Error: There is no model 'tiny-shpes'")
    assert "Did you mean: tiny-shapes" in message
    assert "\n" not in message


def test_a_picture_without_a_question_is_refused():
    assert refused("ask", "demo") == (
        "Error: There is a picture, 'demo', and no question; give one after it, in quotes."
    )
    assert "There is no question; give one in quotes" in refused("ask")


def test_no_image_with_a_picture_is_refused():
    assert "--no-image leaves only a question, and 'demo' stands before it" in refused(
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


def test_help_has_examples_and_every_option():
    assert "hooked-llava ask demo" in run("--help").stdout
    explained = run("explain", "--help").stdout
    for option in (
        "--output",
        "--model",
        "--no-image",
        "--versus",
        "--template",
        "--max-new-tokens",
        "--device",
        "--dtype",
    ):
        assert option in explained
    assert "hooked-llava explain demo" in explained


def test_help_loads_nothing_that_draws():
    heavy = ("matplotlib", "xarray", "hooked_llava.viz")
    code = f"import sys, hooked_llava.cli; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
