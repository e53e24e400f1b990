"""A branch of a Replay is the run of the reworded prompt, at the cost of what lies behind the change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.replay import Intervention, Replay
from tests.pairs import batch, pair


def changes(model: Any, where: list[int], hook: str = "hook_embed") -> Intervention:
    value = torch.randn(len(where), model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    return Intervention(hook, positions=where, value=value)


@pytest.mark.parametrize("geometry", ["plain", "grouped"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_runs_of_a_branch_are_runs_with_the_change_in_front(geometry: str, side: Any) -> None:
    models = pair(geometry)
    model = models.ours
    lengths = (3, 3) if side == "none" else (3, 5)
    rows = [models.prompt(n_text=n, seed=i) for i, n in enumerate(lengths)]
    replay = Replay(model, batch(rows, "left" if side == "none" else side))
    change = changes(model, [6, 7])
    later = [
        Intervention("blocks.1.hook_mlp_out", positions=[7], zero=True),
        Intervention("blocks.0.attn.hook_v", positions=[6], scale=0.5),
        Intervention("blocks.2.hook_resid_post", positions="last", scale=2.0),
    ]
    branch = replay.branch(change)
    wanted = replay.run([[change], *([change, one] for one in later)])
    found = torch.cat([branch.logits()[None], branch.run(later)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert replay.logits().ne(branch.logits()).any()


def test_it_costs_only_the_positions_behind_the_change() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt(n_text=7))
    n = replay.kept.n_positions
    replay.branch(changes(models.ours, [n - 2]))
    assert replay.work.token_layers == 2 * models.ours.cfg.n_layers
    branch = replay.branch([])
    assert torch.equal(branch.logits(), replay.logits())
    assert branch.work.token_layers == 0


def test_only_embeddings_branch_off() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt())
    with pytest.raises(InputError, match=r"A branch changes embeddings, .* blocks\.1\.hook_mlp_out was given"):
        replay.branch(Intervention("blocks.1.hook_mlp_out", zero=True))
    with pytest.raises(InputError, match="projector.hook_out was given"):
        replay.branch(Intervention("projector.hook_out", zero=True))


def test_a_image_that_was_replaced_cannot_be_changed_below() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt())
    below = Intervention("vision.blocks.0.hook_mlp_out", zero=True)
    branch = replay.branch(changes(models.ours, [2, 3]))
    with pytest.raises(InputError, match=r"hook_\w+ .*image's embeddings.*branch.*Replay"):
        branch.run([below])
    text_only = replay.branch(changes(models.ours, [replay.kept.n_positions - 1], "hook_text_embed"))
    again = replay.run([[below, changes(models.ours, [replay.kept.n_positions - 1], "hook_text_embed")]])
    torch.testing.assert_close(text_only.run([below]), again, rtol=1e-4, atol=1e-4)
