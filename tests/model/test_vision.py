"""The vision tower: which layers are run and which features come out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_llava.model.vision import VisionTower
from tests.pairs import Pair, fresh_pair, off, pair


def states(models: Pair, pixels: Tensor) -> list[Tensor]:
    """Hugging Face's hidden states of the CLIP tower."""
    with torch.no_grad():
        return list(models.hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("geometry", ["plain", "last_layer", "several_layers", "full", "several_layers_full", "deep"])
def test_features_are_hugging_faces_hidden_states(geometry: str) -> None:
    models = pair(geometry)
    pixels = models.prompt(n_images=2)["pixel_values"]
    layers, first = models.ours.config.vision.feature_layers, int(models.ours.config.vision.drop_class_token)
    expected = torch.cat([states(models, pixels)[layer][:, first:] for layer in layers], dim=-1)
    features = models.ours.vision(pixels)
    assert features.shape[1:] == (models.ours.config.vision.n_features, models.ours.config.vision.d_features)
    assert off(features, expected) < 1e-5


def test_blocks_above_the_feature_layer_and_the_post_norm_are_not_run() -> None:
    models = fresh_pair()
    pixels = models.prompt()["pixel_values"]
    before = models.ours.vision(pixels)
    tower: VisionTower = models.ours.vision
    for part in (*tower.blocks[tower.cfg.n_layers_run :], tower.ln_post):
        for parameter in part.parameters():
            parameter.fill_(torch.nan)
    run: list[int] = []
    for layer, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, layer=layer: run.append(layer))
    assert torch.equal(tower(pixels), before)
    assert run == [0, 1]
    assert len(tower.blocks) == 3


def test_patches_come_row_by_row_behind_the_class_token() -> None:
    models = fresh_pair("odd")
    tower = models.ours.vision
    tower.patch_embed.weight.fill_(1)
    pixels = torch.zeros(1, 3, 21, 21)
    pixels[:, 0, 7, 14] = 1  # row 1, column 2 of 3 x 3 patches
    seen: list[Tensor] = []
    with models.ours.hooks([("vision.hook_patch_embed", lambda t, hook: seen.append(t))]):
        tower(pixels)
    assert seen[0][0, :, 0].nonzero().flatten().tolist() == [1 * 3 + 2]


def test_each_image_is_seen_on_its_own() -> None:
    models = pair()
    pixels = models.prompt(n_images=3)["pixel_values"]
    together = models.ours.vision(pixels)
    for i in range(3):
        assert off(together[i : i + 1], models.ours.vision(pixels[i : i + 1])) < 1e-5


def test_pixels_are_cast_to_the_weights() -> None:
    models = pair("plain", torch.bfloat16)
    assert models.ours.vision(models.prompt()["pixel_values"].float()).dtype == torch.bfloat16
