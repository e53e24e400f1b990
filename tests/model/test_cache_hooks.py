"""run_with_cache: which activations, which positions, where, how many bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_llava.errors import HookNameError, InputError, SpanError
from hooked_llava.model.cache import LLaVACache
from hooked_llava.prompt.where import resolve_positions
from tests.pairs import as_users_run, batch, off, pair

MODELS = pair("grouped")
OURS = MODELS.ours
LEFT = batch([MODELS.prompt(n_text=3), MODELS.prompt(n_text=6)], "left")
RIGHT = batch([MODELS.prompt(n_text=3), MODELS.prompt(n_text=6)], "right")
TWO_IMAGES = MODELS.prompt(n_images=2)


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("last", [[7], [10]]),
        ("image", [[1, 2, 3, 4]] * 2),
        (3, [[3]] * 2),
        (-1, [[10]] * 2),
        ([0, -1, 5], [[0, 10, 5]] * 2),
        (slice(2, 4), [[2, 3]] * 2),
        (slice(None), [list(range(11))] * 2),
        (torch.tensor([1, 2]), [[1, 2]] * 2),
        (range(2), [[0, 1]] * 2),
    ],
)
def test_positions_are_resolved_for_each_row(positions: Any, expected: list[list[int]]) -> None:
    with as_users_run():
        assert resolve_positions(positions, OURS.as_inputs(RIGHT)).tolist() == expected


@pytest.mark.parametrize("prompt", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("positions", ["last", "image", [4, 0], -2])
def test_kept_positions_are_those_of_the_whole_cache(prompt: dict[str, Tensor], positions: Any) -> None:
    _, whole = OURS.run_with_cache(prompt, names_filter="*")
    _, kept = OURS.run_with_cache(prompt, names_filter="*", positions=positions)
    index = resolve_positions(positions, OURS.as_inputs(prompt))
    for name in whole:
        if name.startswith(("vision.", "projector.", "hook_image_embed")):
            assert torch.equal(kept[name], whole[name]), name
            continue
        axis = 2 if name.endswith(("scores", "pattern")) else 1
        for row, where in enumerate(index):
            assert torch.equal(kept[name][row], whole[name][row].index_select(axis - 1, where)), name


@pytest.mark.parametrize("options", [{}, {"incl_bwd": True, "return_type": "loss"}, {"positions": "last"}], ids=str)
def test_a_cache_on_disk_is_the_cache(tmp_path: Path, options: dict[str, Any]) -> None:
    _, whole = OURS.run_with_cache(LEFT, names_filter="*", **options)
    _, kept = OURS.run_with_cache(LEFT, names_filter="*", offload_folder=tmp_path, **options)
    assert list(kept) == list(whole)
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    assert not list(tmp_path.iterdir())
    if not options:
        forecast = OURS.cache_size(LEFT, "*")
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == pytest.approx(forecast, rel=0.02)
    kept.save(tmp_path / "file")
    read = LLaVACache.load(tmp_path / "file", OURS)
    assert all(torch.equal(read[name], whole[name]) for name in whole)


def test_where_a_cache_is_kept_is_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"device='cpu'.*offload_folder='.*'.*one of them"):
        OURS.run_with_cache(LEFT, device="cpu", offload_folder=tmp_path)
    with pytest.raises(InputError, match=r"no folder '.*nowhere'"):
        OURS.run_with_cache(LEFT, offload_folder=tmp_path / "nowhere")


def test_gradients_are_cut_to_the_same_positions() -> None:
    options = {"names_filter": ["resid_mid", "pattern"], "incl_bwd": True, "return_type": "loss"}
    _, whole = OURS.run_with_cache(RIGHT, **options)
    _, kept = OURS.run_with_cache(RIGHT, **options, positions="last")
    last = OURS.as_inputs(RIGHT).last
    rows = range(len(last))
    assert torch.equal(kept["blocks.1.hook_resid_mid_grad"][:, 0], whole["blocks.1.hook_resid_mid_grad"][rows, last])
    pattern = whole["blocks.1.attn.hook_pattern_grad"][rows, :, last]
    assert torch.equal(kept["blocks.1.attn.hook_pattern_grad"][:, :, 0], pattern)


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        (11, r"positions=\[11\].*-11\.\.10"),
        ([0, -12], r"positions=\[-12\]"),
        ([], r"positions=\[\].*-11\.\.10"),
        (slice(20, 30), r"positions=slice\(20, 30.*-11\.\.10"),
        ("text", r"Span 'text'.*\[4, 7\] positions.*one at"),
    ],
)
def test_positions_that_are_not_there_are_refused(positions: Any, match: str) -> None:
    for run in (OURS.run_with_cache, OURS.cache_size):
        with pytest.raises(InputError, match=match):
            run(RIGHT, positions=positions)


def test_unknown_spans_are_refused() -> None:
    with pytest.raises(SpanError, match="'imge'. Did you mean: image"):
        OURS.run_with_cache(RIGHT, positions="imge")
    with pytest.raises(SpanError, match="span 'image'.*prompt.*image"):
        OURS.run_with_cache(MODELS.prompt(n_images=0), positions="image")


# ---------------------------------------------------------------------- sizes and places


@pytest.mark.parametrize("positions", [None, "last", [1, 2, 3]])
@pytest.mark.parametrize("names", [None, "*", ["pattern", "vision.hook_out"], ("scale", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forecast_is_the_size_of_the_cache(positions: Any, names: Any, dtype: torch.dtype) -> None:
    ours = pair("grouped", dtype).ours
    prompt = ours.as_inputs(RIGHT)
    _, cache = ours.run_with_cache(prompt, names_filter=names, positions=positions)
    assert ours.cache_size(prompt, names, positions) == sum(t.numel() * t.element_size() for t in cache.values())


@pytest.mark.parametrize("geometry", ["full", "several_layers", "odd", "multi_query"])
def test_the_forecast_is_right_for_every_hook(geometry: str) -> None:
    models = pair(geometry)
    for prompt in (models.prompt(n_images=2, batch=2), models.prompt(n_images=0)):
        prompt = models.ours.as_inputs(prompt)
        _, cache = models.ours.run_with_cache(prompt, names_filter="*")
        for name, tensor in cache.items():
            assert models.ours.cache_size(prompt, name) == tensor.numel() * tensor.element_size(), name


def test_the_forecast_refuses_what_would_not_be_cached() -> None:
    with pytest.raises(HookNameError, match="'vision.hook_out'.*no image"):
        OURS.cache_size(MODELS.prompt(n_images=0), "vision.hook_out")


def test_the_cache_can_be_kept_elsewhere() -> None:
    _, cache = OURS.run_with_cache(LEFT, device="meta", names_filter=["z", "vision.hook_out"])
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}


# ---------------------------------------------------------------------- what a run gives


def test_all_but_the_large_by_default_and_those_when_named() -> None:
    _, default = OURS.run_with_cache(LEFT)
    _, everything = OURS.run_with_cache(LEFT, names_filter="*")
    assert set(everything) == set(OURS.hook_dict)
    assert {name.rpartition("hook_")[2] for name in set(everything) - set(default)} == {
        "result", "q_input", "k_input", "v_input",
    }  # fmt: skip
    assert list(default) == OURS.hooks_table.resolve(None), "in the order in which they fire"


def test_prompts_come_as_keywords_as_a_dict_and_prepared() -> None:
    _, expected = OURS.run_with_cache(OURS.as_inputs(LEFT), names_filter="z")
    for cache in (
        OURS.run_with_cache(LEFT, names_filter="z")[1],
        OURS.run_with_cache(**LEFT, names_filter="z")[1],
        OURS.run_with_cache(LEFT["input_ids"], pixel_values=LEFT["pixel_values"], attention_mask=LEFT["attention_mask"],
                            names_filter="z")[1],
    ):  # fmt: skip
        assert torch.equal(cache["z", 1], expected["z", 1])
    assert torch.equal(OURS.run_with_hooks(**LEFT), OURS.run_with_hooks(LEFT))


def test_left_at_a_layer_only_what_was_run_is_cached() -> None:
    stream, cache = OURS.run_with_cache(LEFT, stop_at_layer=1)
    assert off(stream, OURS(LEFT, stop_at_layer=1)) < 1e-5
    assert torch.equal(stream, cache["resid_post", 0])
    assert "blocks.0.hook_resid_post" in cache
    assert "hook_image_embed" in cache
    assert not any(name.startswith(("blocks.1", "blocks.2", "ln_final", "hook_logits")) for name in cache)
    embedded, below = OURS.run_with_cache(LEFT, stop_at_layer=0)
    assert torch.equal(embedded, below["hook_embed"])
    assert not any(name.startswith("blocks.") for name in below)
    _, named = OURS.run_with_cache(LEFT, names_filter="resid_pre", stop_at_layer=-1)
    assert list(named) == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    with pytest.raises(HookNameError, match="'blocks.1.hook_resid_pre'.*fire"):
        OURS.run_with_cache(LEFT, names_filter="blocks.1.hook_resid_pre", stop_at_layer=1)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_entered_at_a_layer_the_rest_is_cached(layer: int) -> None:
    logits, whole = OURS.run_with_cache(LEFT)
    options = {"start_at_layer": layer, "attention_mask": LEFT["attention_mask"]}
    again, cache = OURS.run_with_cache(whole["resid_pre", layer], **options)
    assert torch.equal(again, logits)
    assert not any(name.startswith(("vision.", "projector.", "hook_text", "hook_image")) for name in cache)
    assert ("hook_embed" in cache) == (layer == 0)
    for name in cache:
        assert torch.equal(cache[name], whole[name]), name
    assert cache[("resid_pre", layer)].shape == whole["resid_pre", layer].shape
    _, one = OURS.run_with_cache(whole["resid_pre", layer], **options, positions=[-1], names_filter="resid_post")
    assert off(one["resid_post", -1], whole["resid_post", -1][:, -1:]) < 1e-5
    with pytest.raises(InputError, match="spans.*positions='last'"):
        OURS.run_with_cache(whole["resid_pre", layer], **options, positions="last")
    with pytest.raises(SpanError, match="no image positions"):
        _ = cache.image


def test_return_types() -> None:
    loss, _ = OURS.run_with_cache(LEFT, return_type="loss", names_filter="z")
    assert torch.equal(loss, OURS(LEFT, return_type="loss"))
    nothing, cache = OURS.run_with_cache(LEFT, return_type=None, names_filter="z")
    assert nothing is None
    assert len(cache) == OURS.cfg.n_layers
    _, plain = OURS.run_with_cache(LEFT, return_cache_object=False, names_filter="z")
    assert type(plain) is dict
    assert isinstance(cache, LLaVACache)


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_the_batch_axis_of_one_prompt_can_go(n_images: int) -> None:
    prompt = MODELS.prompt(n_images=n_images)
    _, with_axis = OURS.run_with_cache(prompt)
    _, without = OURS.run_with_cache(prompt, remove_batch_dim=True)
    assert not without.has_batch_dim
    for name, tensor in without.items():
        on_image_side = name.startswith(("vision.", "projector.", "hook_image_embed"))  # no prompts on their first axis
        assert torch.equal(tensor, with_axis[name] if on_image_side else with_axis[name][0]), name
    with pytest.raises(InputError, match="remove_batch_dim=True needs one prompt, got 2"):
        OURS.run_with_cache(LEFT, remove_batch_dim=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"single number.*got \(2, 11, 99\)"),
        ({"metric": lambda logits: logits[:, -1, 0]}, r"got \(2,\)"),
        ({"return_type": None}, "got NoneType"),
        ({"metric": lambda logits: logits.sum().item()}, "got float"),
    ],
)
def test_gradients_need_one_number(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        OURS.run_with_cache(LEFT, incl_bwd=True, **options)
    assert not any(point.has_hooks() for point in OURS.hook_points())


def test_transformer_lenss_caching_functions_take_our_filters() -> None:
    _, expected = OURS.run_with_cache(LEFT, names_filter="z")
    store, forward, backward = OURS.get_caching_hooks("blocks.*.hook_z", incl_bwd=True)
    with OURS.hooks(forward, backward):
        OURS(LEFT, return_type="loss").backward()
    assert set(store) == {*expected, *(f"{name}_grad" for name in expected)}
    attached = OURS.add_caching_hooks(("z", 1))
    OURS(LEFT)
    OURS.reset_hooks()
    for held in (store, attached):
        assert torch.equal(held["blocks.1.attn.hook_z"], expected["z", 1])
    for add in (OURS.get_caching_hooks, OURS.add_caching_hooks):
        with pytest.raises(HookNameError, match="No hook is called 'patern'"):
            add("patern")


def test_a_metric_without_gradients_is_refused() -> None:
    with pytest.raises(InputError, match="metric=.*incl_bwd=True"):
        OURS.run_with_cache(LEFT, metric=lambda logits: logits.sum())
