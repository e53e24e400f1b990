"""The shipped `tiny-shapes-next`: it answers, and small objects are read from the tiles and not from the base grid."""

import pytest

from benchmarks._maps import answers
from benchmarks.tiles import blanked
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.evaluate import held_out, prepare_examples
from hooked_llava.toy.images import image_path
from tests.cli.running import run

N = 40


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes-next")


@pytest.mark.parametrize(
    ("kind", "shown", "least", "most"),
    [
        ("query_color", "all", 0.9, 1.0),
        ("query_pos", "all", 0.8, 1.0),
        ("query_small", "all", 0.9, 1.0),
        ("query_small", "without base", 0.8, 1.0),
        ("query_small", "without tiles", 0.0, 0.5),
        ("query_beside", "all", 0.8, 1.0),
        ("query_same", "all", 0.9, 1.0),
        ("count_color", "all", 0.85, 1.0),
        ("count_color", "without tiles", 0.0, 0.6),
    ],
)
def test_what_is_answered_from_which_grid(model: HookedLLaVA, kind: str, shown: str, least: float, most: float) -> None:
    examples = held_out(kind, N, seed=17, world="tiny-shapes-next")
    inputs = prepare_examples(model, examples)
    if shown != "all":
        inputs = blanked(inputs, "base" if shown == "without base" else "fine")
    said = answers(model, inputs)
    right = sum(a == e.question.answer for a, e in zip(said, examples, strict=True)) / N
    assert least <= right <= most


def test_the_wide_image_is_asked_in_the_shell() -> None:
    result = run("ask", "wide", "What color is the heart?", "-m", "tiny-shapes-next")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1].strip() == "Blue"
    assert image_path("wide").is_file()
