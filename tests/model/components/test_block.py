"""A block is two additions to the stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components import AttentionContext, Block
from tests.model.components.towers import LANGUAGE, VISION, tower, with_weights
from tests.pairs import off


@pytest.mark.parametrize("cfg", [tower(LANGUAGE, rotary=None), VISION], ids=["language", "vision"])
def test_two_additions(cfg: TowerConfig) -> None:
    block = with_weights(Block(cfg, 0))
    context = AttentionContext(causal=cfg.causal)
    x = torch.randn(2, 4, cfg.d_model, dtype=torch.float64)
    attn_out = block.attn(block.ln1(x), context, pre_norm=(x, block.ln1))
    middle = x + attn_out
    assert off(block(x, context), middle + block.mlp(block.ln2(middle))) < 1e-12


def test_nothing_added_is_nothing_changed() -> None:
    block = with_weights(Block(VISION, 0))
    for point in (block.hook_attn_out, block.hook_mlp_out):
        point.add_hook(lambda t, hook: torch.zeros_like(t))
    x = torch.randn(1, 3, VISION.d_model, dtype=torch.float64)
    assert torch.equal(block(x, AttentionContext()), x)


def test_hooks_in_order() -> None:
    block, seen = with_weights(Block(VISION, 0)), []
    for name, point in block.named_children():
        if name.startswith("hook_"):
            point.add_hook(lambda t, hook, name=name: seen.append(name))
    block(torch.randn(1, 2, VISION.d_model, dtype=torch.float64), AttentionContext())
    assert seen == [
        "hook_resid_pre",
        "hook_attn_out",
        "hook_resid_mid",
        "hook_mlp_in",
        "hook_mlp_out",
        "hook_resid_post",
    ]


def test_an_edit_of_resid_mid_reaches_the_stream_and_one_of_mlp_in_does_not() -> None:
    def zero(t: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(t)

    x = torch.randn(1, 3, VISION.d_model, dtype=torch.float64)
    block = with_weights(Block(VISION, 0))
    middle, silent = [], block.mlp(block.ln2(torch.zeros_like(x)))
    block.hook_resid_mid.add_hook(lambda t, hook: middle.append(t))
    block.hook_mlp_in.add_hook(zero)
    assert off(block(x, AttentionContext()), middle[0] + silent) < 1e-12
    block.hook_mlp_in.remove_hooks()
    block.hook_resid_mid.add_hook(zero)
    assert off(block(x, AttentionContext()), silent) < 1e-12
