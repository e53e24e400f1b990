"""Interventions are data: exactly one action, printable, comparable, hashable."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.replay import Intervention, Replay
from tests.oracles.plain_outputs import softened
from tests.pairs import off, pair


def test_prints_what_was_given() -> None:
    shown = repr(Intervention("blocks.0.hook_mlp_out", positions="last", value=torch.zeros(3, 4)))
    assert shown == "Intervention('blocks.0.hook_mlp_out', positions='last', value=tensor[3, 4])"


def test_equal_and_hashable_where_the_contents_are() -> None:
    one, same = (Intervention("blocks.0.hook_mlp_out", add=torch.ones(3), positions=[1, 2]) for _ in range(2))
    other = Intervention("blocks.0.hook_mlp_out", add=torch.ones(3) * 2, positions=[1, 2])
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2


@pytest.mark.parametrize("given", [{}, {"zero": True, "scale": 2.0}, {"value": torch.ones(2), "add": torch.ones(2)}])
def test_says_exactly_one_thing_to_do(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match="position_mean, mean_of"):
        Intervention("blocks.0.hook_mlp_out", **given)


def test_block_names_its_own_positions() -> None:
    with pytest.raises(InputError, match="leave positions= out"):
        Intervention("blocks.0.attn.hook_attn_scores", block=("image", "last"), positions="last")
    with pytest.raises(InputError, match="reweight=.*leave positions= out"):
        Intervention("blocks.0.attn.hook_attn_scores", reweight="image->last", factor=2.0, positions="last")


def test_a_mean_over_positions_has_two_names() -> None:
    named = Intervention("blocks.0.hook_mlp_out", positions="image", position_mean=True)
    assert named == Intervention("blocks.0.hook_mlp_out", positions="image", mean=True)
    assert repr(named) == "Intervention('blocks.0.hook_mlp_out', positions='image', position_mean=True)"
    assert named.action == "position_mean"


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Intervention("blocks.0.hook_mlp_out", zero=True).hook = "other"  # type: ignore[misc]


@pytest.mark.parametrize("geometry", ["plain", "grouped"])
@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_a_temperature_is_the_scale_of_scores_in_transformers(geometry: str, temperature: float) -> None:
    models, prompt = pair(geometry), pair(geometry).prompt()
    replay = Replay(models.ours, prompt)
    for layers in ([0], [1, 2]):
        run = [Intervention(("attn_scores", layer), temperature=temperature) for layer in layers]
        expected = softened(models.hf, prompt, layers, temperature)
        assert off(replay.run([run])[0], expected) < 1e-5
        assert off(replay.logits(), expected) > 1e-3
    assert off(models.hf_logits(prompt)[0, -1], replay.logits()) < 1e-5, "the other model is as it was"
