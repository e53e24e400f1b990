from __future__ import annotations

from hooked_llava.model.llava import HookedLLaVA
from tests.cli.running import QUESTION, refused, run


def test_describe_prints_what_the_model_says_of_itself_and_of_a_prompt(checkpoint, image):
    model = HookedLLaVA.from_pretrained(checkpoint)
    alone = run("describe", "-m", checkpoint)
    assert alone.exit_code == 0, alone.stderr
    assert alone.stdout == f"{model.describe()}\n"
    asked = run("describe", image, QUESTION, "-m", checkpoint)
    assert asked.stdout == f"{model.describe(model.prepare(QUESTION, image))}\n"
    text = run("describe", QUESTION, "-m", checkpoint).stdout
    assert "needs images, equally many in every prompt" in text


def test_describe_refuses_an_image_that_is_not_there(checkpoint):
    assert "nowhere.png" in refused("describe", "nowhere.png", QUESTION, "-m", checkpoint)
