"""What is refused before anything runs, in words that say what was given, what was expected and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.replay import Intervention, Replay
from hooked_llava.replay.binding import bind
from tests.pairs import as_users_run, pair

Z = "blocks.1.attn.hook_z"


def placed(hook: str = Z, **what: Any) -> Any:
    models = pair()
    return bind(Intervention(hook, **({"zero": True} | what)), models.ours, models.ours.as_inputs(models.prompt()))


@pytest.mark.parametrize(
    "positions", [[3, 5], np.array([3, 5]), torch.tensor([3, 5]), slice(3, 6, 2), (np.int64(3), torch.tensor(5))]
)
def test_positions_may_be_any_whole_numbers(positions: Any) -> None:
    assert placed(positions=positions).positions[0] == (3, 5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"positions": [1.7]}, r"positions=\[1\.7\].*whole numbers, a slice.*span"),
        ({"positions": torch.tensor([True] * 5)}, r"mask.*mask\.nonzero"),
        ({"positions": [True, False]}, r"positions=\[True, False\].*whole numbers"),
        ({"positions": ["last", "image"]}, r"'image\|last'"),
        ({"heads": [1.5]}, r"heads=\[1\.5\].*whole numbers\."),
        ({"heads": "all"}, "heads='all'.*whole numbers"),
        ({"hook": "hook_image_embed", "image": 5}, r"image=5.*'hook_image_embed'.*0\.\.0"),
        ({"hook": "hook_image_embed", "image": -1}, r"image=-1.*'hook_image_embed'.*0\.\.0"),
        ({"hook": "hook_image_embed", "image": "a"}, "image='a'.*whole numbers"),
    ],
)
def test_places_that_are_none(what: dict[str, Any], message: str) -> None:
    with as_users_run(), pytest.raises(InputError, match=message):
        placed(**what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"block": "image"}, r"'image'.*expected 'source->target'"),
        ({"block": 3}, r"block=3.*\(source, target\)"),
        ({"block": ("image", "text", "last")}, r"block=\('image', 'text', 'last'\).*\(source, target\)"),
        ({"reweight": 3, "factor": 1}, r"reweight=3.*\(source, target\)"),
        ({"reweight": ("image", "last")}, r"reweight=\('image', 'last'\).*factor=None.*both"),
        ({"zero": True, "factor": 0.5}, r"reweight=None.*factor=0\.5.*both"),
        ({"reweight": ("image", "last"), "factor": -0.5}, r"factor=-0\.5.*at least 0"),
        ({"reweight": ("image", "last"), "factor": float("nan")}, r"factor=nan.*at least 0"),
        ({"reweight": ("image", "last"), "factor": "much"}, r"factor='much'.*at least 0"),
        ({"temperature": 0}, r"temperature=0.*above 0"),
        ({"temperature": [1, 2]}, r"temperature=\[1, 2\].*finite number"),
        ({"scale": "2"}, "scale='2'.*one number"),
        ({"value": "red"}, "value='red'.*tensor.*array.*numbers"),
        ({"zero": 0}, "'blocks.0.attn.hook_attn_scores'.*value, add, scale, zero"),
    ],
)
def test_changes_that_are_none(what: dict[str, Any], message: str) -> None:
    with as_users_run(), pytest.raises(InputError, match=message):
        Intervention("blocks.0.attn.hook_attn_scores", **what)


@pytest.mark.parametrize("action", [{"reweight": "image->last", "factor": 2.0}, {"block": "image->last"}])
@pytest.mark.parametrize("hook", [Z, "vision.blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"])
def test_edges_are_those_of_the_language_towers_scores(hook: str, action: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(action))}=.*language tower's attn.hook_attn_scores.*{hook}"):
        placed(hook, zero=False, **action)
    with pytest.raises(InputError, match="temperature=.*attn.hook_attn_scores.*blocks.1.attn.hook_z"):
        placed(Z, zero=False, temperature=2.0)


def test_runs_that_are_none() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt())
    with as_users_run():
        unnamed = Intervention(None, zero=True)  # type: ignore[arg-type]
    for runs, message in (
        (Intervention(Z, zero=True), "runs=.*one Intervention.*list"),
        ([[("hook", 0)]], r"run.*\('hook', 0\).*Interventions"),
        ([[unnamed]], "hook=None.*name"),  # type: ignore[arg-type]
        (
            [[Intervention(Z, fn=lambda t: t.double())]],
            r"torch\.float64.*\(12, 4, 12\) of torch\.float32",
        ),
    ):
        with as_users_run(), pytest.raises(InputError, match=message):
            replay.run(runs)  # type: ignore[arg-type]


def test_values_may_be_numbers_and_arrays() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt())
    d = models.ours.cfg.d_head
    same = [[Intervention(Z, positions=3, value=v)] for v in (0.5, np.full(d, 0.5), [0.5] * d, torch.full((d,), 0.5))]
    found = replay.run(same)
    assert torch.equal(found, found[:1].expand_as(found))
    assert Intervention(Z, positions=np.array([1, 2]), zero=True) == Intervention(Z, positions=[1, 2], zero=True)
