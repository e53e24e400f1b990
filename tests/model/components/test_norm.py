"""Norms: the formulas, with and without listeners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_llava.model.components import LayerNorm, RMSNorm, make_norm
from tests.model.components.towers import LANGUAGE, VISION, tower, with_weights
from tests.pairs import off

X = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1


def made(cls: type, eps: float = 1e-5, dtype: torch.dtype = torch.float64) -> RMSNorm | LayerNorm:
    norm = with_weights(cls(48, eps), dtype)
    norm.weight.copy_(torch.linspace(0.5, 2, 48))
    return norm


def by_formula(norm: RMSNorm | LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    centered = x - x.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else x
    scale = (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scale, centered / scale * norm.weight + (norm.bias if norm.bias is not None else 0)


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_fused_and_explicit_are_the_formula(cls: type, eps: float) -> None:
    norm = made(cls, eps)
    scale, out = by_formula(norm, X)
    assert off(norm(X), out) < 1e-12
    seen: list[Tensor] = []
    norm.hook_scale.add_hook(lambda t, hook: seen.append(t))
    norm.hook_normalized.add_hook(lambda t, hook: seen.append(t))
    assert off(norm(X), out) < 1e-12
    assert off(seen[0], scale) < 1e-12
    assert off(seen[1], (out - (norm.bias if norm.bias is not None else 0)) / norm.weight) < 1e-12


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_statistics_are_taken_in_float32(cls: type) -> None:
    norm, exact = made(cls, dtype=torch.bfloat16), made(cls)
    big = (X * 100).bfloat16()
    scales: list[Tensor] = []
    expected = by_formula(exact, big.double())[1]
    assert off(norm(big).double(), expected) < 2e-2
    norm.hook_scale.add_hook(lambda t, hook: scales.append(t))
    assert off(norm(big).double(), expected) < 2e-2
    assert scales[0].dtype == torch.float32
    assert off(scales[0].double(), by_formula(exact, big.double())[0]) < 1e-6


def test_an_edited_scale_divides() -> None:
    norm = made(RMSNorm)
    plain = norm(X)
    norm.hook_scale.add_hook(lambda t, hook: 2 * t)
    assert off(norm(X), plain / 2) < 1e-12


def test_the_config_chooses() -> None:
    assert isinstance(make_norm(LANGUAGE), RMSNorm)
    assert isinstance(make_norm(VISION), LayerNorm)
    assert make_norm(tower(LANGUAGE, eps=0.25)).eps == 0.25
    assert make_norm(VISION).w.shape == make_norm(VISION).b.shape == (VISION.d_model,)
