"""Re-entering the vision tower gives what the whole pass with the same change gives."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.replay.binding import bind
from hooked_llava.replay.image_side import ImageSide
from hooked_llava.replay.intervention import Intervention
from tests.pairs import pair


@pytest.mark.parametrize(
    "hook",
    ["vision.hook_patch_embed", "vision.blocks.0.hook_resid_pre", "vision.blocks.1.hook_mlp_out", "projector.hook_pre"],
)
def test_equals_the_whole_pass(hook: str) -> None:
    models = pair()
    inputs = models.ours.as_inputs(models.prompt(n_images=2))
    side = ImageSide(models.ours, inputs)
    change = bind(Intervention(hook, positions=[2], image=1, zero=True), models.ours, inputs)
    other = bind(Intervention("vision.hook_out", scale=0.5), models.ours, inputs)
    found = side.rerun([[change], [other], [change, other]])
    row = 2 + (models.ours.hooks_table[hook].axes[1] == "pos")  # the class token comes first

    def zero(tensor: torch.Tensor, hook: object) -> None:
        tensor[1, row] = 0

    def halve(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        return tensor * 0.5

    for i, hooks in enumerate(
        ([(hook, zero)], [("vision.hook_out", halve)], [(hook, zero), ("vision.hook_out", halve)])
    ):
        with torch.no_grad(), models.ours.hooks(hooks):
            expected = models.ours.projector(models.ours.vision(inputs.pixel_values))
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


def test_does_only_the_blocks_above_the_change() -> None:
    models = pair()
    inputs = models.ours.as_inputs(models.prompt())
    side = ImageSide(models.ours, inputs)
    late = bind(Intervention("vision.blocks.1.hook_mlp_out", zero=True), models.ours, inputs)
    ran: list[str] = []
    with models.ours.hooks([("vision.blocks.*.hook_resid_pre", lambda tensor, hook: ran.append(hook.name))]):
        _ = side.states
        ran.clear()
        side.rerun([[late], [late]])
    assert ran == ["vision.blocks.1.hook_resid_pre"]
    assert side.rows_through_blocks([[late], [late]]) == 2
