"""One pass serves runs that join at different layers, and carries no position that nothing can have reached."""

from __future__ import annotations

import torch

from hooked_llava.replay import Intervention, Replay
from hooked_llava.replay.layer_pass import LayerPass
from tests.oracles.naive_interventions import run_naively
from tests.pairs import pair


def layer_pass(replay: Replay, runs: list[list[Intervention]], positions: list[int]) -> torch.Tensor:
    planned = [replay._plan(i, run) for i, run in enumerate(runs)]
    return LayerPass(replay, planned, replay.wanted(positions)).logits()


def test_a_staircase_of_runs_in_the_order_given() -> None:
    model = pair("grouped").ours
    inputs = model.as_inputs(pair("grouped").prompt())
    hooks = ["blocks.2.hook_mlp_out", "hook_embed", "ln_final.hook_normalized", "blocks.1.hook_resid_pre"]
    runs = [[Intervention(hook, positions=[7, 9], scale=0.5)] for hook in hooks]
    replay = Replay(model, inputs)
    found = layer_pass(replay, runs, [-1, 8, 3])
    n = inputs.shape[1]
    expected = run_naively(model, inputs, runs)[:, :, [n - 1, 8, 3]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    kept = replay.kept_logits([3])
    torch.testing.assert_close(found[:, :, 2], kept[:, 0].expand(4, -1, -1), rtol=1e-5, atol=1e-5)


def test_work_is_the_suffix_times_the_layers_from_the_entry_on() -> None:
    model = pair().ours
    inputs = model.as_inputs(pair().prompt())
    replay, n = Replay(model, inputs), inputs.shape[1]
    layer_pass(replay, [[Intervention("blocks.1.hook_mlp_out", positions=[n - 3], zero=True)]], [n - 1])
    last_layer = 1 + 3 * replay.key_value_share  # one query, keys and values of three positions
    assert replay.work.token_layers == 3 + last_layer
