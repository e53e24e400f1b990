"""Attention messages, held against the slow model's heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.readout.head_outputs import head_outputs, head_outputs_along, summed_head_outputs
from tests.pairs import off, pair

GEOMETRIES = ["grouped", "biases"]


def seen(geometry: str, layer: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pattern and value of one layer for one prompt, and everything else."""
    models = pair(geometry, torch.float64)
    held = models.slow.run(**models.prompt())
    return held[f"blocks.{layer}.attn.hook_pattern"][0], held[f"blocks.{layer}.attn.hook_v"][0], held


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_message_is_pattern_times_value_through_the_heads_weights(geometry: str) -> None:
    ours = pair(geometry, torch.float64).ours
    pattern, value, _ = seen(geometry)
    messages = head_outputs(ours, 1, pattern, value)
    cfg = ours.config.language
    for head, query, key in ((0, 5, 3), (cfg.n_heads - 1, 7, 7), (1, 2, 0)):
        group = head // (cfg.n_heads // cfg.n_key_value_heads)
        expected = pattern[head, query, key] * (value[key, group] @ ours.blocks[1].attn.W_O[head])
        assert off(messages[head, query, key], expected) < 1e-12
    assert messages[:, 2, 5].abs().max() == 0, "nothing comes from later positions"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_messages_sum_to_heads_and_to_attention_less_its_bias(geometry: str) -> None:
    ours = pair(geometry, torch.float64).ours
    pattern, value, held = seen(geometry)
    messages = head_outputs(ours, 1, pattern, value)
    assert off(messages.sum(2).transpose(0, 1), held["blocks.1.attn.hook_result"][0]) < 1e-12
    out = held["blocks.1.hook_attn_out"][0] - ours.blocks[1].attn.b_O
    assert off(messages.sum((0, 2)), out) < 1e-12
    assert off(summed_head_outputs(ours, 1, pattern, value), messages.sum(0)) < 1e-12
    assert off(summed_head_outputs(ours, 1, pattern[:, -1:], value), messages.sum(0)[-1:]) < 1e-12


def test_the_part_along_a_direction() -> None:
    ours = pair("grouped", torch.float64).ours
    pattern, value, _ = seen("grouped")
    direction = torch.randn(48, dtype=torch.float64)
    expected = head_outputs(ours, 1, pattern, value) @ direction
    assert off(head_outputs_along(ours, 1, pattern, value, direction), expected) < 1e-12


def test_chosen_heads_and_further_axes_in_front() -> None:
    ours = pair("grouped", torch.float64).ours
    pattern, value, _ = seen("grouped")
    messages = head_outputs(ours, 1, pattern, value)
    assert torch.equal(head_outputs(ours, 1, pattern, value, heads=[4, 0]), messages[[4, 0]])
    two = head_outputs(ours, 1, torch.stack([pattern, pattern * 2]), torch.stack([value, value]))
    assert off(two, torch.stack([messages, messages * 2])) < 1e-12
    both = summed_head_outputs(ours, 1, torch.stack([pattern, pattern * 2]), torch.stack([value, value]))
    assert off(both, two.sum(1)) < 1e-12


def test_half_precision_is_multiplied_in_single() -> None:
    ours = pair("grouped", torch.bfloat16).ours
    messages = head_outputs(ours, 0, torch.rand(6, 1, 3).bfloat16(), torch.randn(3, 2, 8).bfloat16())
    assert messages.dtype == torch.float32


def test_layers_and_heads_that_are_not_there_are_refused() -> None:
    ours = pair("grouped", torch.float64).ours
    pattern, value, _ = seen("grouped")
    for wrong in (3, -4):
        with pytest.raises(InputError, match=rf"{wrong}.* layers.*-3\.\.2"):
            summed_head_outputs(ours, wrong, pattern, value)
    assert torch.equal(summed_head_outputs(ours, -1, pattern, value), summed_head_outputs(ours, 2, pattern, value))
    with pytest.raises(InputError, match=r"\[6, -7\].* heads.*-6\.\.5"):
        head_outputs(ours, 1, pattern, value, heads=[0, 6, -7])
