"""Logits where the answer is read: equal to the whole run's, with only these positions unembedded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.where import resolve_positions
from hooked_llava.readout.resid import logits_and_activations, logits_at, next_token_logits, resid_by_layer
from tests.pairs import off, pair

MODELS = pair("grouped", torch.float64)
OURS = MODELS.ours
N_LAYERS = OURS.cfg.n_layers


def unembedded(model: HookedLLaVA) -> list[int]:
    """How many positions of each later run are unembedded, as the runs are made."""
    seen: list[int] = []
    model.hook_dict["hook_logits"].add_hook(lambda logits, hook: seen.append(logits.shape[1]))
    return seen


@pytest.mark.parametrize("where", ["last", "image", -2, [0, 3]])
def test_logits_are_those_of_the_whole_run(where: Any) -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    index = resolve_positions(where, inputs)
    expected = OURS(inputs)[:, index[0]]
    assert off(logits_at(OURS, OURS(inputs, stop_at_layer=N_LAYERS), index), expected) < 1e-12


def test_only_what_is_read_is_unembedded() -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    seen = unembedded(OURS)
    try:
        next_token_logits(OURS, inputs)
        logits_and_activations(OURS, inputs, inputs.last[:, None], ["blocks.0.attn.hook_z"])
        logits_and_activations(OURS, inputs, inputs.last[:, None], ["blocks.0.attn.hook_z", "ln_final.hook_scale"])
    finally:
        OURS.reset_hooks()
    assert seen == [1, 1, inputs.shape[1]], "all positions only where the final norm is asked for"


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "hook_logits"])
def test_activations_come_with_the_logits(name: str) -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    index = resolve_positions([1, 4], inputs)
    logits, held = logits_and_activations(OURS, inputs, index, [name])
    whole, cache = OURS.run_with_cache(inputs, names_filter=name)
    assert off(held[name], cache[name]) < 1e-12
    assert off(logits, whole[:, [1, 4]]) < 1e-12


def test_the_residual_stream_of_every_layer() -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    _, cache = OURS.run_with_cache(inputs, names_filter=["resid_pre", "resid_post"])
    expected = torch.stack([*(cache["resid_pre", i] for i in range(N_LAYERS)), cache["resid_post", -1]])
    assert off(resid_by_layer(OURS, inputs, torch.tensor([[2, 5]])), expected[:, :, [2, 5]]) < 1e-12
