"""Rotary positions: rotations by the position's angle."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.architecture.sizes import RotaryConfig
from hooked_llava.model.components import RotaryEmbedding
from hooked_llava.model.components.rotary import rotate
from tests.pairs import off

CONFIG = RotaryConfig((1.0, 0.3, 0.01))


def rotation(
    position: int, dtype: torch.dtype = torch.float64, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    return RotaryEmbedding(RotaryConfig(CONFIG.frequencies, scaling))(torch.tensor([[position]]), dtype)


@settings(max_examples=25)
@given(st.integers(0, 4000))
def test_each_pair_turns_by_its_own_angle(position: int) -> None:
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    turned = rotate(x, rotation(position))
    for head in range(2):
        for pair, speed in enumerate(CONFIG.frequencies):
            angle = torch.tensor(position * torch.tensor(speed).item(), dtype=torch.float32).double().item()
            a, b = x[0, 0, head, pair].item(), x[0, 0, head, pair + 3].item()
            assert math.isclose(turned[0, 0, head, pair], a * math.cos(angle) - b * math.sin(angle), abs_tol=1e-3)
            assert math.isclose(turned[0, 0, head, pair + 3], a * math.sin(angle) + b * math.cos(angle), abs_tol=1e-3)
    assert off(turned.norm(dim=-1), x.norm(dim=-1)) < 1e-6


@settings(max_examples=25)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_scores_depend_on_the_distance_only(query: int, key: int, by: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    here = (rotate(q, rotation(query)) * rotate(k, rotation(key))).sum()
    there = (rotate(q, rotation(query + by)) * rotate(k, rotation(key + by))).sum()
    assert abs(here - there) < 1e-4


def test_position_zero_stays_and_scaling_scales() -> None:
    x = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    assert torch.equal(rotate(x, rotation(0)), x)
    assert off(rotate(x, rotation(5, scaling=2.0)), 2 * rotate(x, rotation(5))) < 1e-6


def test_angles_are_computed_in_float32_and_then_rounded() -> None:
    cos, sin = rotation(3000, torch.bfloat16)
    exact = torch.tensor([3000.0]) * torch.tensor(CONFIG.frequencies)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert torch.equal(cos[0, 0, 0, :3], exact.cos().bfloat16())
    assert torch.equal(sin[0, 0, 0, 3:], exact.sin().bfloat16())
