"""The next token of each prompt of a batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from hooked_llava.analysis import next_tokens
from hooked_llava.errors import InputError
from tests.pairs import batch, pair


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompts_own_next_token(side: Literal["left", "right"]) -> None:
    models = pair()
    rows = [models.prompt(n_text=3), models.prompt(n_images=0, n_text=9), models.prompt(n_images=2)]
    result = next_tokens(models.ours, batch(rows, side), k=4)
    assert dict(result.sizes) == {"prompt": 3, "rank": 4}
    for i, row in enumerate(rows):
        with torch.no_grad():
            best = models.hf(**row).logits[0, -1].softmax(-1).topk(4)
        np.testing.assert_allclose(result.probability[i], best.values, atol=1e-5)
        assert result.token_id[i].values.tolist() == best.indices.tolist()
        assert result.token[i].values.tolist() == [f"#{token}" for token in best.indices.tolist()]


def test_only_one_positions_logits_are_computed() -> None:
    models = pair()
    shapes: list[tuple[int, ...]] = []
    with models.ours.hooks([("hook_logits", lambda x, hook: shapes.append(tuple(x.shape)))]):
        next_tokens(models.ours, models.prompt(batch=2))
    assert shapes == [(2, 1, 99)]
    assert not torch.is_inference_mode_enabled()


def test_more_words_than_there_are_is_refused_before_anything_runs() -> None:
    models, fired = pair(), []
    hooked = models.ours.hooks([("hook_embed", lambda x, hook: fired.append(hook))])
    with hooked, pytest.raises(InputError, match="k=100 words; expected 1 to 99"):
        next_tokens(models.ours, models.prompt(), k=100)
    assert not fired
