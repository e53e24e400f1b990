"""Warnings point at the user's line, however deep in the library they arise."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hooked_llava import HookedLLaVA
from hooked_llava.analysis import head_scores, logit_attribution, logit_lens
from hooked_llava.errors import PromptWithoutTemplate, warn_user
from hooked_llava.replay import Replay
from hooked_llava.toy.images import image_path

BARE = "Who made the star?"


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(BARE),
        lambda model: model.generate(BARE, max_new_tokens=1),
        lambda model: model.run_with_cache(BARE, names_filter="hook_embed"),
        lambda model: logit_lens(model, BARE),
        lambda model: head_scores(model, BARE, "Red"),
        lambda model: logit_attribution(model, BARE, "Red"),
        lambda model: Replay(model, BARE),
    ],
    ids=["model", "generate", "run_with_cache", "logit_lens", "head_scores", "logit_attribution", "replay"],
)
def test_every_way_in_warns_at_the_line_that_used_it(use: Callable[[HookedLLaVA], Any]) -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    with pytest.warns(PromptWithoutTemplate) as caught:
        use(model)
    assert {Path(w.filename) for w in caught} == {Path(__file__)}
    assert {w.lineno for w in caught} == {inspect.getsourcelines(use)[1]}, linecache.getline(__file__, caught[0].lineno)


def test_a_warning_from_the_users_own_file_is_at_his_line() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        warn_user("here", UserWarning)
    assert Path(caught[0].filename) == Path(__file__)


def test_the_same_question_prepared_is_silent_and_is_answered_otherwise() -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    question = "What color is the star?"
    prepared = model.generate(model.prepare(question, images=image_path("demo")))
    with pytest.warns(PromptWithoutTemplate):
        assert model.generate(question) != prepared
