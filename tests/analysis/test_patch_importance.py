"""Patch maps: each method against its definition, by loops over whole matrices and full forward passes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import results
from hooked_llava.analysis import head_scores, image_attention, patch_importance, top_heads
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.oracles.naive_scores import NaiveScores, rollout
from tests.oracles.plain_outputs import grad_cam
from tests.pairs import as_users_run, batch, pair

METHODS: dict[str, dict[str, Any]] = {
    "log_increase": {"method": "log_increase"},
    "log_increase_all": {"method": "log_increase", "heads": "all"},
    "attention": {"method": "attention"},
    "attention_best": {"method": "attention", "heads": 2},
    "grad_x_input": {"method": "grad_x_input"},
    "grad_x_pixels": {"method": "grad_x_input", "vision": True},
    "integrated_gradients": {"method": "integrated_gradients", "steps": 3},
    "rollout": {"method": "rollout", "vision": True},
    "relevancy": {"method": "relevancy", "vision": True},
    "grad_cam": {"method": "grad_cam"},
    "grad_cam_patches": {"method": "grad_cam", "vision": True, "layer": 0},
    "occlusion": {"method": "occlusion"},
    "token_ablation": {"method": "token_ablation"},
}


def exact(geometry: str = "grouped") -> Any:
    return pair(geometry, torch.float64)


@functools.cache
def seen(geometry: str) -> dict[str, torch.Tensor]:
    return exact(geometry).slow.run(**exact(geometry).prompt())


def token_map(geometry: str) -> Any:
    models = exact(geometry)
    return models.ours.as_inputs(models.prompt()).token_map


def log_p(models: Any, prompt: dict[str, torch.Tensor], token: int, hooks: Any = ()) -> float:
    with torch.no_grad():
        return models.ours.run_with_hooks(prompt, fwd_hooks=list(hooks))[0, -1].log_softmax(-1)[token].item()


@pytest.mark.parametrize("geometry", ["grouped", "full"])
def test_log_increase_is_the_score_of_each_patchs_message(geometry: str) -> None:
    models, patches = exact(geometry), token_map(geometry).patches()
    by_hand = NaiveScores(models.hf, seen(geometry), 7)
    best = top_heads(head_scores(models.ours, models.prompt(), 7), 2)
    maps = {k: patch_importance(models.ours, models.prompt(), 7, heads=k) for k in (1, 2, "all")}
    one, two = ([by_hand.position(*pair, key) for key in patches] for pair in best)
    np.testing.assert_allclose(maps[1].values.ravel(), one, atol=1e-6)
    np.testing.assert_allclose(maps[2].values.ravel(), np.add(one, two), atol=1e-6)
    layers = [sum(by_hand.position_of_layer(layer, key) for layer in range(3)) for key in patches]
    np.testing.assert_allclose(maps["all"].values.ravel(), layers, atol=1e-6)
    assert maps[1].dims == ("image", "patch_row", "patch_col")
    assert maps[2].heads == [f"{layer}.{head}" for layer, head in best]
    assert (maps[1].target, maps[1].n_forward) == ("#7", 1)
    chosen = patch_importance(models.ours, models.prompt(), 7, heads=best[::-1])
    np.testing.assert_allclose(chosen, maps[2], atol=1e-9)


def test_attention_is_the_pattern_of_all_or_of_the_best_heads() -> None:
    models = exact()
    whole = image_attention(models.ours, models.prompt())
    mean = patch_importance(models.ours, models.prompt(), 7, method="attention")
    np.testing.assert_allclose(mean, whole.mean(("layer", "head")), atol=1e-7)
    best = top_heads(head_scores(models.ours, models.prompt(), 7), 1)[0]
    top = patch_importance(models.ours, models.prompt(), 7, method="attention", heads=1)
    np.testing.assert_allclose(top, whole.sel(layer=best[0], head=best[1]), atol=1e-7)


def test_gradient_times_input_is_the_derivative_of_scaling_an_embedding() -> None:
    models = exact()
    found = patch_importance(models.ours, models.prompt(), 7, method="grad_x_input").values.ravel()
    for i, position in enumerate(token_map("grouped").patches()):

        def scaled(by: float, position: int = position) -> float:
            def scale(x: torch.Tensor, hook: Any) -> None:
                x[:, position] *= by

            return log_p(models, models.prompt(), 7, [("hook_embed", scale)])

        assert found[i] == pytest.approx((scaled(1 + 1e-4) - scaled(1 - 1e-4)) / 2e-4, rel=1e-3, abs=1e-5)


def test_gradient_times_pixels_is_the_derivative_of_scaling_a_patch() -> None:
    models, prompt = exact(), exact().prompt()
    found = patch_importance(models.ours, prompt, 7, method="grad_x_input", vision=True)

    def scaled(by: float) -> float:
        pixels = prompt["pixel_values"].clone()
        pixels[..., 8:, :8] *= by  # the patch in row 1, column 0
        return log_p(models, prompt | {"pixel_values": pixels}, 7)

    expected = (scaled(1 + 1e-4) - scaled(1 - 1e-4)) / 2e-4
    assert found[0, 1, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("vision", [False, True])
def test_integrated_gradients_sum_to_what_the_image_adds(vision: bool) -> None:
    models, prompt = exact(), exact().prompt()
    prompt["pixel_values"] *= 0.02  # on a longer path a random vision tower needs hundreds of steps
    found = patch_importance(models.ours, prompt, 7, method="integrated_gradients", steps=40, vision=vision)
    image = list(token_map("grouped")["image"])

    def without(x: torch.Tensor, hook: Any) -> None:
        x[:, image] = x[:, image].mean(1, keepdim=True)

    if vision:
        baseline = log_p(models, prompt | {"pixel_values": prompt["pixel_values"] * 0}, 7)
    else:
        baseline = log_p(models, prompt, 7, [("hook_embed", without)])
    assert found.sum().item() == pytest.approx(log_p(models, prompt, 7) - baseline, rel=0.01)
    assert (found.n_forward, found.n_backward) == (40, 40)


def test_gradients_of_a_model_in_half_precision_are_added_up_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum stops growing where a summand is less than half of its last place: here after 256 steps."""
    from hooked_llava.analysis.maps import gradients

    half = pair("grouped", torch.bfloat16)
    inputs = half.ours.as_inputs(half.prompt())

    def constant(log_p: Any, at: torch.Tensor, ids: Any) -> Any:
        assert at.dtype == torch.bfloat16
        return torch.ones_like(at), ids

    monkeypatch.setattr(gradients, "_gradient", constant)
    read, ids = inputs.last[:, None], torch.tensor([[[7]]])
    found, _ = gradients.integrated_gradients(half.ours, inputs, read, ids, steps=400, vision=True)
    expected = gradients.sum_pixels(half.ours, inputs.pixel_values.float())[:, None].flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("geometry", ["grouped", "full"])
def test_rollout_is_the_product_of_whole_matrices(geometry: str) -> None:
    models = exact(geometry)
    language = [seen(geometry)[f"blocks.{i}.attn.hook_pattern"][0].mean(0) for i in range(3)]
    n_run = models.ours.config.vision.n_layers_run
    tower = [seen(geometry)[f"vision.blocks.{i}.attn.hook_pattern"][0].mean(0) for i in range(n_run)]
    row = rollout(language, 0.5, 0.5)[-1]
    found = patch_importance(models.ours, models.prompt(), 7, method="rollout")
    np.testing.assert_allclose(found.values.ravel(), row[list(token_map(geometry).patches())], atol=1e-6)
    features = row[list(token_map(geometry)["image"])]
    if not token_map(geometry).layout().class_token:
        features = torch.cat([features.new_zeros(1), features])
    expected = (features @ rollout(tower, 0.5, 0.5))[1:]
    through = patch_importance(models.ours, models.prompt(), 7, method="rollout", vision=True)
    np.testing.assert_allclose(through.values.ravel(), expected, atol=1e-6)


def test_relevancy_weighs_patterns_by_their_gradients() -> None:
    """Each layer's gradient by a backward pass of its own; then products of whole matrices."""
    models, prompt = exact(), exact().prompt()
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    flows = []
    for name in names:
        pattern = seen("grouped")[name][0]
        leaves = []

        def swap(x: torch.Tensor, hook: Any, leaves: list = leaves) -> torch.Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            logits = models.ours.run_with_hooks(prompt, fwd_hooks=[(name, swap)])
            logits[0, -1, 7].backward()
        flows.append((leaves[0].grad[0] * pattern).clamp(min=0).mean(0).double())
    row = rollout(flows, 1.0, 1.0)[-1]
    found = patch_importance(models.ours, prompt, 7, method="relevancy")
    np.testing.assert_allclose(found.values.ravel(), row[list(token_map("grouped").patches())], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("geometry", "vision", "layer"),
    [("grouped", False, 1), ("full", False, None), ("grouped", True, None), ("several_layers_full", True, 0)],
)
def test_grad_cam_weighs_dimensions_by_their_mean_gradient(geometry: str, vision: bool, layer: int | None) -> None:
    """The gradient by a backward pass from a leaf that takes the place of the residual stream; then sums by hand."""
    models, prompt = exact(geometry), exact(geometry).prompt()
    last = (models.ours.config.vision.n_layers_run if vision else 3) - 1
    name = f"{'vision.' * vision}blocks.{last if layer is None else layer}.hook_resid_pre"
    leaf = seen(geometry)[name].clone().requires_grad_()
    with torch.enable_grad():
        models.ours.run_with_hooks(prompt, fwd_hooks=[(name, lambda x, hook: leaf)])[0, -1, 7].backward()
    assert leaf.grad is not None
    places = list(range(1, 5)) if vision else list(token_map(geometry).patches())
    expected = []
    for place in places:
        total = 0.0
        for channel in range(leaf.shape[-1]):
            weight = sum(float(leaf.grad[0, p, channel]) for p in places) / len(places)
            total += weight * float(leaf.detach()[0, place, channel])
        expected.append(max(total, 0.0))
    found = patch_importance(models.ours, prompt, 7, method="grad_cam", vision=vision, layer=layer)
    np.testing.assert_allclose(found.values.ravel(), expected, rtol=1e-4, atol=1e-6)
    if not vision:
        theirs = grad_cam(models.hf, prompt, last if layer is None else layer, 7, places)
        np.testing.assert_allclose(found.values.ravel(), theirs, rtol=1e-3, atol=1e-5)
    assert max(expected) > 1e-4
    assert (found.layer, found.n_forward, found.n_backward) == (last if layer is None else layer, 1, 1)


def test_grad_cam_costs_one_pass_forward_and_one_back() -> None:
    models, passes = exact(), []
    with models.ours.hooks([("blocks.0.hook_resid_pre", lambda x, hook: passes.append(1))]):
        patch_importance(models.ours, models.prompt(), 7, method="grad_cam")
    assert len(passes) == 1


@pytest.mark.parametrize("window", [1, 2])
def test_occlusion_blanks_patches_in_the_image(window: int) -> None:
    models, prompt = exact("odd"), exact("odd").prompt()
    (grid, _), size = models.ours.config.vision.patch_grid, models.ours.config.vision.patch_size
    total, times = np.zeros((grid, grid)), np.zeros((grid, grid))
    for row in range(grid - window + 1):
        for column in range(grid - window + 1):
            pixels = prompt["pixel_values"].clone()
            pixels[..., row * size : (row + window) * size, column * size : (column + window) * size] = 0
            lost = log_p(models, prompt, 7) - log_p(models, prompt | {"pixel_values": pixels}, 7)
            total[row : row + window, column : column + window] += lost
            times[row : row + window, column : column + window] += 1
    found = patch_importance(models.ours, prompt, 7, method="occlusion", window=window)
    np.testing.assert_allclose(found[0], total / times, atol=1e-6)
    runs = (grid - window + 1) ** 2
    assert 1 + runs * 0.7 < found.n_forward < 1 + runs  # the last block computes one position, all others all


def test_token_ablation_replaces_image_embeddings() -> None:
    models, prompt = exact("full"), exact("full").prompt()
    where = token_map("full")
    found = patch_importance(models.ours, prompt, 7, method="token_ablation").values.ravel()
    given = patch_importance(models.ours, prompt, 7, method="token_ablation", fill=torch.zeros(48)).values.ravel()
    for i, position in enumerate(where.patches()):

        def mean(x: torch.Tensor, hook: Any, position: int = position) -> None:
            x[:, position] = x[:, list(where["image"])].mean(1)

        def zero(x: torch.Tensor, hook: Any, position: int = position) -> None:
            x[:, position] = 0

        base = log_p(models, prompt, 7)
        assert found[i] == pytest.approx(base - log_p(models, prompt, 7, [("hook_embed", mean)]), abs=1e-6)
        assert given[i] == pytest.approx(base - log_p(models, prompt, 7, [("hook_embed", zero)]), abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_gives_what_each_prompt_gives_alone(name: str, tmp_path: Any) -> None:
    models = exact()
    alone = [models.prompt(n_text=6), models.prompt(n_text=4, seed=1)]
    together = patch_importance(models.ours, batch(alone, "left"), [7, 8], **METHODS[name])
    assert together.dims == ("prompt", "image", "patch_row", "patch_col")
    for i, prompt in enumerate(alone):
        one = patch_importance(models.ours, prompt, 7 + i, **METHODS[name])
        np.testing.assert_allclose(together.sel(prompt=i), one, atol=1e-6)
        assert np.ptp(one.values) > 1e-5
    results.save(together, tmp_path / "map.safetensors")
    xr.testing.assert_identical(results.load(tmp_path / "map.safetensors"), together)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in models.ours.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_models_own_answer_is_the_default(name: str) -> None:
    models = exact()
    own = int(models.ours(models.prompt())[0, -1].argmax())
    found = patch_importance(models.ours, models.prompt(), **METHODS[name])
    np.testing.assert_allclose(found, patch_importance(models.ours, models.prompt(), own, **METHODS[name]), atol=1e-9)
    assert found.target == ("any" if name == "rollout" else f"#{own}")


@pytest.mark.parametrize("name", ["log_increase", "attention", "grad_x_input", "relevancy", "grad_cam", "occlusion"])
def test_several_images_and_several_tokens(name: str) -> None:
    model = HookedLLaVA.from_hf(pair().hf, processor=make_processor())
    inputs = model.prepare("What color is the star?", images=[torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    found = patch_importance(model, inputs, "red star", **METHODS[name])
    assert dict(found.sizes) == {"image": 2, "patch_row": 2, "patch_col": 2}
    assert found.target == "red star"
    single = patch_importance(model, inputs, "red", **METHODS[name])
    assert abs(found - single).max() > 1e-6


def test_a_map_is_drawn_on_its_image() -> None:
    from hooked_llava import viz

    model = HookedLLaVA.from_hf(pair().hf, processor=make_processor())
    inputs = model.prepare("What color is the star?", images=torch.rand(3, 16, 16))
    figure = viz.patch_overlay(inputs, importance := patch_importance(model, inputs))
    answer = f" for '{importance.target}'" if importance.target else ""  # a token of random weights may spell nothing
    assert figure.axes[0].get_title("left") == "Log-probability increase" + answer
    assert "log-probability increase" in "".join(axes.get_ylabel() for axes in figure.axes)


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    models = exact()
    monkeypatch.setattr(models.ours.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"images.*prompts have \d"):
        patch_importance(models.ours, models.prompt(n_images=0), 7)
    with pytest.raises(InputError, match="method='.*option steps.*takes heads"):
        patch_importance(models.ours, models.prompt(), 7, steps=3)
    with pytest.raises(InputError, match="method='.*option heads, window.*takes vision"):
        patch_importance(models.ours, models.prompt(), 7, method="rollout", heads=2, window=2)
    with as_users_run(), pytest.raises(InputError, match="method='saliency'; expected one of log_increase"):
        patch_importance(models.ours, models.prompt(), 7, method="saliency")
    with pytest.raises(InputError, match="window=3; expected 1 to 2"):
        patch_importance(models.ours, models.prompt(), 7, method="occlusion", window=3)
    with pytest.raises(InputError, match="steps=0.*at least 1"):
        patch_importance(models.ours, models.prompt(), 7, method="integrated_gradients", steps=0)
    with pytest.raises(InputError, match=r"layer=3.*-3\.\.2"):
        patch_importance(models.ours, models.prompt(), 7, method="grad_cam", layer=3)
    with pytest.raises(InputError, match="method='.*option layer.*takes vision"):
        patch_importance(models.ours, models.prompt(), 7, method="relevancy", layer=1)
    for heads in (2.0, True):
        for method in ("log_increase", "attention"):
            with as_users_run(), pytest.raises(InputError, match=f"heads={heads}.*whole number"):
                patch_importance(models.ours, models.prompt(), 7, method=method, heads=heads)
    with pytest.raises(InputError, match=r"heads \[\(.*\)\]; expected"):
        patch_importance(models.ours, models.prompt(), 7, heads=[(0, 99)])
