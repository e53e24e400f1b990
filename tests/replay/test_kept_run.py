"""What a Replay keeps is what the model computes, and re-entering it anywhere gives the same."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.machine.devices import keeper
from hooked_llava.replay.kept_run import keep
from tests.pairs import batch, pair


@pytest.mark.parametrize("side", ["left", "right"])
def test_keeps_the_streams_and_re_enters_them(side: str) -> None:
    models = pair("grouped")
    inputs = models.ours.as_inputs(batch([models.prompt(n_text=3), models.prompt(n_text=5, seed=1)], side))
    kept = keep(models.ours, inputs)
    _, cache = models.ours.run_with_cache(inputs)
    assert (kept.n_prompts, kept.n_positions) == tuple(inputs.shape)
    for layer in range(3):
        torch.testing.assert_close(kept.entering(layer), cache["resid_pre", layer], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.entering(3), cache["resid_post", 2], rtol=1e-4, atol=1e-4)
    start, real = 6, inputs.attention_mask[:, 6:]
    for layer, block in enumerate(models.ours.blocks):
        rows = kept.entering(layer, start).repeat_interleave(2, 0)
        with torch.no_grad():
            out = block(rows, kept.context(start, 2)).unflatten(0, (2, 2))
        for row in range(2):
            torch.testing.assert_close(out[:, row][real], kept.entering(layer + 1, start)[real], rtol=1e-4, atol=1e-4)


def test_only_some_queries() -> None:
    models = pair()
    inputs = models.ours.as_inputs(models.prompt())
    kept = keep(models.ours, inputs)
    with torch.no_grad():
        blocks, only = models.ours.language.blocks, range(2, 3)
        out = blocks.run(kept.entering(2, 5), kept.context(5), layers=only, queries=[1, 3])
    torch.testing.assert_close(out, kept.entering(3, 5)[:, [1, 3]], rtol=1e-4, atol=1e-4)


def test_another_dtype_is_kept_and_the_models_is_given() -> None:
    models = pair()
    kept = keep(models.ours, models.ours.as_inputs(models.prompt()), kept=keeper(dtype=torch.bfloat16))
    assert kept.resid[0].dtype == torch.bfloat16
    assert kept.entering(0).dtype == torch.float32
