"""Analyses of images that are cut into tiles: each number by its definition, with plain hooks and full forward passes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava import analysis, results
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.pairs import changed_patches
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.readout.metrics import Answer, log_probability
from hooked_llava.results.image_axes import ImageAxes, patches_of_cells
from hooked_llava.results.map_quality import map_quality
from tests.architecture.processors import PATCH
from tests.oracles.naive_patching import patch_cells
from tests.oracles.naive_scores import rollout
from tests.tiled import KINDS, TILES, drawn, with_processor

SMALL, POOLED, TALL = (24, 100), (50, 170), (100, 30)
SIZES = {"next": SMALL, "onevision": POOLED}
EVERY = pytest.mark.parametrize("kind", KINDS)
TARGET = 7


def prompt_of(kind: str, *sizes: tuple[int, int], seed: int = 0) -> Any:
    return with_processor(kind).prepare("What color is the star?", drawn(*(sizes or (SIZES[kind],)), seed=seed))


@cache
def setting(kind: str) -> tuple[Any, Any, ImageLayout]:
    prompt = prompt_of(kind)
    return with_processor(kind), prompt, prompt.layouts[0]


@torch.no_grad()
def log_p(model: Any, inputs: Any, hooks: Any = ()) -> float:
    return float(model.run_with_hooks(inputs, fwd_hooks=list(hooks))[0, -1].log_softmax(-1)[TARGET])


def some(layout: ImageLayout) -> list[int]:
    """A few features of every grid, and their newlines last."""
    cells = [layout.cell_features(name).ravel() for name in layout.names]
    return [int(f) for own in cells for f in own[[0, len(own) // 2, -1]]]


# ---------------------------------------------------------------------- positions


@EVERY
def test_what_is_read_by_position_is_the_same_by_feature(kind: str) -> None:
    model, prompt, layout = setting(kind)
    image = prompt.token_map["image"].tolist()
    attention = analysis.image_attention(model, prompt)
    _, cache_ = model.run_with_cache(prompt, names_filter="pattern")
    assert attention.dims == ("image", "layer", "head", "feature")
    np.testing.assert_allclose(attention[0, 1], cache_["pattern", 1][0, :, -1, image], atol=1e-6)
    source = analysis.logit_attribution(model, prompt, TARGET, by="source")
    by_patch = analysis.logit_attribution(model, prompt, TARGET, by="patch")
    assert by_patch.dims == ("layer", "head", "feature")
    np.testing.assert_allclose(by_patch, source.isel(source=image), atol=1e-6)
    assert by_patch.label.values.tolist() == source.label.values[image].tolist() == layout.labels()
    mean = analysis.patch_importance(model, prompt, TARGET, method="attention")
    np.testing.assert_allclose(mean, attention.mean(("layer", "head")), atol=1e-6)
    best = analysis.head_scores(model, prompt, TARGET)
    heads = analysis.top_heads(best, 2)
    scores = analysis.position_scores(model, prompt, TARGET, heads=heads).score.sum("head")
    found = analysis.patch_importance(model, prompt, TARGET, heads=heads)
    np.testing.assert_allclose(found[0], scores.isel(position=image), atol=1e-5)
    assert found.attrs["heads"] == [f"{layer}.{head}" for layer, head in heads]
    contribution = analysis.attention_contribution(model, prompt, "star").image_to_constraint
    assert contribution.dims == ("layer", "image", "feature")
    assert contribution.feature_label.values.tolist() == layout.labels()


@EVERY
def test_gradients_of_embeddings_and_ablated_tokens_have_newlines(kind: str) -> None:
    model, prompt, layout = setting(kind)
    start = prompt.token_map.image_starts[0]
    gradient = analysis.patch_importance(model, prompt, TARGET, method="grad_x_input")[0]
    ablated = analysis.patch_importance(model, prompt, TARGET, method="token_ablation")[0]
    base, image = log_p(model, prompt), prompt.token_map["image"].tolist()
    for feature in [*some(layout), int(layout.newline_features()[0])]:

        def scaled(by: float, position: int = start + feature) -> float:
            def scale(x: torch.Tensor, hook: Any) -> None:
                x[:, position] *= by

            return log_p(model, prompt, [("hook_embed", scale)])

        def mean(x: torch.Tensor, hook: Any, position: int = start + feature) -> None:
            x[:, position] = x[:, image].mean(1)

        slope = (scaled(1.01) - scaled(0.99)) / 0.02
        assert float(gradient[feature]) == pytest.approx(slope, rel=0.05, abs=2e-3)
        assert float(ablated[feature]) == pytest.approx(base - log_p(model, prompt, [("hook_embed", mean)]), abs=1e-4)
    assert not np.isnan(ablated).any()


# ---------------------------------------------------------------------- pixels


@EVERY
def test_gradients_of_pixels_are_pooled_as_the_cells_are(kind: str) -> None:
    model, prompt, layout = setting(kind)
    found = analysis.patch_importance(model, prompt, TARGET, method="grad_x_input", vision=True)[0]
    pixels = prompt.pixel_values.clone().requires_grad_()
    with torch.enable_grad():
        model(replace(prompt, pixel_values=pixels))[0, -1].log_softmax(-1)[TARGET].backward()
    by_pixel = (pixels.grad * prompt.pixel_values).sum(1)
    for feature in some(layout):
        cell = layout.cell_at(feature)
        patches, weights = (one[cell.row, cell.col] for one in layout.grid(cell.grid).patches())
        parts = [
            weight * float(by_pixel[tile, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].sum())
            for (tile, y, x), weight in zip(patches.tolist(), weights.tolist(), strict=True)
        ]
        assert float(found[feature]) == pytest.approx(sum(parts), rel=1e-3, abs=1e-5)
    assert np.isnan(found[layout.newline_features()]).all()
    assert np.isfinite(found[layout.object_features()]).all()


@EVERY
@pytest.mark.parametrize("vision", [False, True])
def test_grad_cam_has_one_direction_for_all_tiles_of_an_image(kind: str, vision: bool) -> None:
    model, prompt, layout = setting(kind)
    name = f"{'vision.' * vision}blocks.0.hook_resid_pre"
    held = []
    with torch.enable_grad():
        logits = model.run_with_hooks(prompt, fwd_hooks=[(name, lambda x, hook: held.append(x))])
        (gradient,) = torch.autograd.grad(logits[0, -1, TARGET], held)
    first = model.config.vision.n_positions - model.config.vision.n_patches
    where = np.s_[:, first:] if vision else np.s_[0, prompt.token_map["image"].tolist()]
    resid, gradient = held[0][where].detach(), gradient[where]
    by_place = (resid @ gradient.flatten(0, -2).mean(0)).clamp(min=0)
    found = analysis.patch_importance(model, prompt, TARGET, method="grad_cam", vision=vision, layer=0)[0]
    for feature in some(layout):
        cell = layout.cell_at(feature)
        if not vision:
            assert float(found[feature]) == pytest.approx(float(by_place[feature]), rel=1e-3, abs=1e-5)
            continue
        patches, weights = (one[cell.row, cell.col] for one in layout.grid(cell.grid).patches())
        of_tile = by_place.unflatten(1, model.config.vision.patch_grid)
        parts = [float(w * of_tile[tile, y, x]) for (tile, y, x), w in zip(patches.tolist(), weights, strict=True)]
        assert float(found[feature]) == pytest.approx(sum(parts), rel=1e-3, abs=1e-5)
    assert np.isnan(found[layout.newline_features()]).all() == vision
    assert float(np.nanmax(found)) > 1e-4


@EVERY
def test_rollout_goes_on_through_the_tiles(kind: str) -> None:
    model, prompt, layout = setting(kind)
    _, cache_ = model.run_with_cache(prompt, names_filter=["pattern", "vision.blocks.*.attn.hook_pattern"])
    cfg = model.config.vision
    language = [cache_["pattern", i][0].mean(0) for i in range(model.cfg.n_layers)]
    row = rollout(language, 0.5, 0.5)[-1][prompt.token_map["image"].tolist()]
    assembled = torch.zeros(layout.n_features, layout.n_tiles, cfg.n_positions)
    first = cfg.n_positions - cfg.n_patches  # a class token
    for grid in layout.grids:
        patches, weights = grid.patches()
        for r, c in np.ndindex(grid.shape):
            feature = layout.feature_of(r, c, grid.name)
            for (tile, y, x), weight in zip(patches[r, c].tolist(), weights[r, c].tolist(), strict=True):
                assembled[feature, tile, first + y * cfg.patch_grid[1] + x] += weight
    arriving = torch.einsum("f, f t p -> t p", row.float(), assembled)
    through = []
    for tile in range(layout.n_tiles):
        tower = [cache_[f"vision.blocks.{i}.attn.hook_pattern"][tile].mean(0) for i in range(cfg.n_layers_run)]
        through.append(arriving[tile] @ rollout(tower, 0.5, 0.5).float())
    expected = torch.einsum("t p, f t p -> f", torch.stack(through), assembled)
    found = analysis.patch_importance(model, prompt, method="rollout", vision=True)[0]
    cells = layout.object_features()
    np.testing.assert_allclose(found[cells], expected[cells.tolist()], rtol=1e-4, atol=1e-7)


def blanked(kind: str, layout: ImageLayout, pixels: torch.Tensor, feature: int, grids: Any) -> torch.Tensor:
    """Pixels of which those that show a cell's part of the original are 0, found one by one."""
    cell, pixels = layout.cell_at(feature), pixels.clone()
    x0, y0, x1, y1 = layout.grid(cell.grid).boxes[cell.row, cell.col]
    for grid in (layout.grid(name) for name in grids):
        if grid.name == cell.grid:
            for tile, patches in patches_of_cells(layout)[feature].items():
                for y, x in (divmod(patch, grid.columns.patches_per_tile) for patch in patches):
                    pixels[tile, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] = 0
            continue
        size = TILES[kind]
        rows = [v for v in range(grid.rows.n_tiles * size) if y0 <= grid.rows.pixels.to_original(v + 0.5) < y1]
        columns = [u for u in range(grid.columns.n_tiles * size) if x0 <= grid.columns.pixels.to_original(u + 0.5) < x1]
        for v in rows:
            for u in columns:
                tile = grid.first_tile + v // size * grid.columns.n_tiles + u // size
                pixels[tile, :, v % size, u % size] = 0
    return pixels


@EVERY
@pytest.mark.parametrize("grid", ["all", "base", "fine"])
def test_occlusion_takes_a_part_of_the_original_away_in_every_tile_that_shows_it(kind: str, grid: str) -> None:

    model, prompt, layout = setting(kind)
    found = analysis.patch_importance(model, prompt, TARGET, method="occlusion", grid=grid)
    base = log_p(model, prompt)
    for feature in some(layout):
        pixels = blanked(kind, layout, prompt.pixel_values, feature, layout.names if grid == "all" else (grid,))
        lost = base - log_p(model, replace(prompt, pixel_values=pixels))
        assert float(found[0, feature]) == pytest.approx(lost, abs=1e-4)
        assert abs(lost) > 1e-4 or grid != "all"
    assert np.isnan(found[0, layout.newline_features()]).all()
    assert found.attrs.get("grid", "all") == grid


def test_squares_lie_within_one_grid_and_options_are_checked() -> None:
    model, prompt, layout = setting("next")
    pairs = analysis.patch_importance(model, prompt, TARGET, method="token_ablation", window=2)[0]
    assert np.isfinite(pairs).all()
    single = analysis.patch_importance(model, prompt, TARGET, method="token_ablation")[0]
    newlines = layout.newline_features()
    np.testing.assert_allclose(pairs[newlines], single[newlines], atol=1e-6)
    with pytest.raises(InputError, match="window=3; expected 1 to 2"):
        analysis.patch_importance(model, prompt, TARGET, method="occlusion", window=3)
    with pytest.raises(SpanError, match="no grid 'fin'.*base, fine"):
        analysis.patch_importance(model, prompt, TARGET, method="occlusion", grid="fin")


@EVERY
def test_deletion_and_removal_follow_the_order_of_a_map(kind: str) -> None:
    model, prompt, layout = setting(kind)
    values = np.random.default_rng(0).random(layout.n_features)
    values[layout.newline_features()] = 9.0
    values[1] = np.nan
    cells = [f for f in layout.object_features().tolist() if f != 1]
    order = sorted(cells, key=lambda f: -values[f])
    half = round(0.5 * len(order))
    curves = analysis.deletion_curves(model, prompt, {"a": values}, TARGET, shares=(0, 0.5, 1)).probability

    pixels = prompt.pixel_values
    for feature in order[:half]:
        pixels = blanked(kind, layout, pixels, feature, layout.names)
    expected = np.exp(log_p(model, replace(prompt, pixel_values=pixels)))
    assert float(curves.sel(direction="deletion", share=0.5)[0]) == pytest.approx(expected, abs=1e-5)
    tokens = analysis.deletion_curves(
        model, prompt, {"a": values}, TARGET, shares=(0, 2 / (len(order) + 2), 1), where="tokens", directions="deletion"
    ).probability
    start, image = prompt.token_map.image_starts[0], prompt.token_map["image"].tolist()
    first = [start + int(f) for f in layout.newline_features()[:2]]

    def mean(x: torch.Tensor, hook: Any) -> None:
        x[:, first] = x[:, image].mean(1, keepdim=True)

    assert float(tokens[0, 0, 1]) == pytest.approx(np.exp(log_p(model, prompt, [("hook_embed", mean)])), abs=1e-5)
    said = analysis.answer_without(
        model, prompt, TARGET, patches=ImageAxes.of(prompt).labelled(values[None], ("image",))
    )
    assert int(said.n_ranked[-1]) == len(order)
    at_half = analysis.deletion_curves(model, prompt, {"a": values}, TARGET, shares=(0, 4 / len(order), 1)).probability
    assert said.probability[said.n_removed == 4].item() == pytest.approx(float(at_half[0, 0, 1]), abs=1e-5)


# ---------------------------------------------------------------------- pairs


@EVERY
def test_activations_are_patched_cell_by_cell(kind: str) -> None:
    model, clean, layout = setting(kind)
    other = prompt_of(kind, seed=1)
    metric = log_probability(Answer.of(model, "red"))
    chosen = [*some(layout), int(layout.newline_features()[0])]
    embed = analysis.activation_patching(model, clean, other, hook="hook_image_embed", positions=chosen, metric=metric)
    assert embed.dims == ("feature",)
    assert embed.feature.values.tolist() == chosen
    assert embed.label.values.tolist() == [layout.labels()[f] for f in chosen]
    expected = patch_cells(model, clean, other, "hook_image_embed", [(0, f) for f in chosen[:-1]], metric)
    np.testing.assert_allclose(embed[:-1], expected, atol=1e-4)
    assert np.isnan(embed[-1])
    tower = analysis.activation_patching(model, clean, other, hook="vision.resid_mid", positions=chosen, metric=metric)
    assert tower.dims == ("layer", "feature")
    first = model.config.vision.n_positions - model.config.vision.n_patches
    for i, feature in enumerate(chosen[:-1]):
        at = patches_of_cells(layout)[feature]
        index = [(tile, first + patch) for tile, patches in at.items() for patch in patches]
        tiles, rows = (torch.tensor(axis) for axis in zip(*index, strict=True))
        expected = patch_cells(model, clean, other, "vision.blocks.1.hook_resid_mid", [(tiles, rows)], metric)
        assert float(tower[1, i]) == pytest.approx(expected[0], abs=1e-4)
    whole = analysis.activation_patching(model, clean, other, hook="vision.resid_pre", positions="all", metric=metric)
    np.testing.assert_allclose(whole[0], float(whole.attrs["clean"]), atol=1e-4)


@EVERY
def test_patches_that_differ_in_a_pixel(kind: str) -> None:

    _, prompt, layout = setting(kind)
    pixels = prompt.pixel_values.clone()
    pixels[-1, 0, 1, 2] += 1  # in the first patch of the last tile
    pixels[0, 0, -5, 0] += 1
    differs = changed_patches(prompt, replace(prompt, pixel_values=pixels))
    tile = layout.n_tiles - 1
    n_patches = layout.grids[0].columns.patches_per_tile
    expected = [
        feature
        for feature, own in patches_of_cells(layout).items()
        if 0 in own.get(tile, []) or (n_patches - 1) * n_patches in own.get(0, [])
    ]
    assert np.flatnonzero(differs[0]).tolist() == sorted(expected)


# ---------------------------------------------------------------------- several images


def test_images_of_different_shapes_are_filled_up(tmp_path: Any) -> None:
    model = with_processor("next")
    prompt = prompt_of("next", SMALL, TALL)
    longest = max(layout.n_features for layout in prompt.layouts)
    assert prompt.layouts[0].n_features != prompt.layouts[1].n_features
    for method in PATCH_MAPS:
        found = analysis.patch_importance(model, prompt, TARGET, method=method)
        assert found.dims == ("image", "feature")
        assert found.shape == (2, longest)
        for own, layout in zip(found, prompt.layouts, strict=True):
            assert np.isfinite(own[layout.object_features()]).all()
            assert np.isnan(own[layout.n_features :]).all()
            assert own.label[: layout.n_features].values.tolist() == layout.labels()
        assert float(np.nanstd(found)) > 1e-5, method
    results.save(found, tmp_path / "map.safetensors")
    assert results.load(tmp_path / "map.safetensors").identical(found)
    attention = analysis.image_attention(model, prompt)
    sources = analysis.logit_attribution(model, prompt, TARGET, by="source").sum("head")
    patches = analysis.logit_attribution(model, prompt, TARGET, by="patch").sum("head")
    for image in range(2):
        where = prompt.token_map.image(image).tolist()
        n = prompt.layouts[image].n_features
        np.testing.assert_allclose(patches.isel(image=image)[..., :n], sources.isel(source=where), atol=1e-5)
        assert np.isnan(attention[image][..., n:]).all()


@pytest.mark.parametrize("method", ["log_increase", "occlusion", "grad_x_input"])
def test_a_batch_gives_what_each_prompt_gives_alone(method: str) -> None:
    model = with_processor("next")
    images = [drawn(SMALL), drawn(TALL)]
    both = model.prepare(["What color is the star?", "Is this red?"], images)
    together = analysis.patch_importance(model, both, [TARGET, TARGET + 1], method=method)
    assert together.dims == ("prompt", "image", "feature")
    for i, one in enumerate(both):
        alone = analysis.patch_importance(model, one, TARGET + i, method=method)
        n = alone.sizes["feature"]
        np.testing.assert_allclose(together[i, :, :n], alone, atol=2e-5)
        assert together.label[i, 0, :n].values.tolist() == one.layouts[0].labels()
        assert np.isnan(together[i, :, n:]).all()
    stacked = analysis.logit_attribution(model, both, TARGET, by="patch")
    assert stacked.dims == ("prompt", "layer", "head", "feature")


def test_onevisions_prompts_of_several_images_have_rows_and_columns() -> None:
    model = with_processor("onevision")
    prompt = prompt_of("onevision", SMALL, POOLED)
    for method in ("log_increase", "occlusion"):
        found = analysis.patch_importance(model, prompt, TARGET, method=method)
        assert dict(found.sizes) == {"image": 2, "patch_row": 4, "patch_col": 4}


# ---------------------------------------------------------------------- maps and objects


def test_quality_and_signs_leave_out_what_no_cell_shows() -> None:
    model, prompt, layout = setting("next")
    box = (10, 4, 40, 20)
    coverage = layout.fold(layout.box_shares(box))
    occluded = analysis.patch_importance(model, prompt, TARGET, method="occlusion")
    attention = analysis.patch_importance(model, prompt, TARGET, method="attention")
    cells = layout.object_features()
    for found in (occluded, attention):
        quality = map_quality(found, coverage[None])
        scores, is_there = found.values[0, cells], coverage[cells] >= 0.2
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[is_there] for b in scores[~is_there]]
        assert quality.auc.item() == pytest.approx(np.mean(pairs))
        signs = analysis.answer_signs(model, prompt, found, coverage)
        positive = np.clip(scores, 0, None)
        assert signs.mass_on_objects.item() == pytest.approx(
            (positive * coverage[cells]).sum() / positive.sum(), rel=1e-5
        )
        assert signs.map_peak.item() == pytest.approx(scores.max())
        shares = (scores - scores.min()) / (scores - scores.min()).sum()
        entropy = -sum(p * np.log(p) for p in shares if p > 0)
        assert signs.map_entropy.item() == pytest.approx(entropy, rel=1e-5)
