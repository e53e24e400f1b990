"""Image sinks: the two ratios by loops over the slow model's activations, planted sinks, and what is left out."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import results
from hooked_llava.analysis import answer_maps, image_attention, patch_importance, sink_positions
from hooked_llava.errors import InputError
from hooked_llava.viz import sink_scatter
from tests.known_mechanism import OBJECTS, model_of
from tests.pairs import batch, pair
from tests.tiled import drawn, with_processor


def exact() -> Any:
    return pair("odd", torch.float64)


def ratios_by_hand(models: Any, prompt: dict[str, torch.Tensor], layer: int) -> tuple[list[float], list[float]]:
    """Norms over their median, and attention over its mean, of every patch."""
    seen, token_map = models.slow.run(**prompt), models.ours.as_inputs(prompt).token_map
    patches = list(token_map.patches())
    norms = [float((seen[f"blocks.{layer}.hook_resid_pre"][0, p] ** 2).sum() ** 0.5) for p in patches]
    pattern = seen[f"blocks.{layer}.attn.hook_pattern"][0]
    queries = range(max(patches) + 1, prompt["input_ids"].shape[1])
    looked = [float(sum(pattern[:, q, p].mean() for q in queries)) for p in patches]
    return [x / statistics.median(norms) for x in norms], [x * len(patches) / sum(looked) for x in looked]


def test_ratios_and_the_criterion_are_those_of_the_definition() -> None:
    models, prompt = exact(), exact().prompt()
    found = sink_positions(models.ours, prompt, norm=1.1, attention=1.02)
    expected = np.zeros(9, dtype=bool)
    for layer in range(3):
        norms, attention = ratios_by_hand(models, prompt, layer)
        np.testing.assert_allclose(found.norm.sel(layer=layer).values.ravel(), norms, rtol=1e-5)
        np.testing.assert_allclose(found.attention.sel(layer=layer).values.ravel(), attention, rtol=1e-5)
        expected |= (np.array(norms) >= 1.1) & (np.array(attention) >= 1.02)
    assert found.sink.values.ravel().tolist() == expected.tolist()
    assert 0 < expected.sum() < 9
    patches = list(models.ours.as_inputs(prompt).token_map.patches())
    assert found.positions == [p for p, sink in zip(patches, expected, strict=True) if sink]


def planted(model: Any, place: int, *, size: float = 50.0, looked_at: bool = True) -> Any:
    """Hooks by which layer 1 has a large residual stream at a position, and all its heads look there."""

    def enlarge(resid: torch.Tensor, hook: Any) -> None:
        resid[:, place] *= size

    def look(pattern: torch.Tensor, hook: Any) -> None:
        pattern *= 0.1
        pattern[..., place] += 0.9

    hooks = [("blocks.1.hook_resid_pre", enlarge)] + [("blocks.1.attn.hook_pattern", look)] * looked_at
    return model.hooks(hooks)


def test_a_planted_sink_is_found_and_a_large_or_an_attended_patch_alone_is_none() -> None:
    models, prompt = exact(), exact().prompt()
    place = list(models.ours.as_inputs(prompt).token_map.patches())[4]
    assert sink_positions(models.ours, prompt).positions == []
    for size, looked_at, sinks in ((50.0, True, [place]), (50.0, False, []), (1.0, True, [])):
        with planted(models.ours, place, size=size, looked_at=looked_at):
            found = sink_positions(models.ours, prompt)
        assert found.positions == sinks
        assert found.sink.values.ravel().nonzero()[0].tolist() == [4] * len(sinks)


def test_what_is_looked_at_for_its_color_is_no_sink() -> None:
    model = model_of("direct")
    found = sink_positions(model, model.ask(OBJECTS, "ring"))
    place = found.attention.max("layer")[0].values
    assert int(place.argmax()) == 2 * 5 + 1
    assert float(place.max()) > 1.2
    assert found.positions == []
    np.testing.assert_allclose(found.norm, 1.0, atol=1e-5)


def test_maps_leave_sinks_out() -> None:
    models, prompt = exact(), exact().prompt()
    place = list(models.ours.as_inputs(prompt).token_map.patches())[4]
    draw: dict[str, Any] = {
        "map": lambda **how: patch_importance(models.ours, prompt, 7, method="attention", **how),
        "relevancy": lambda **how: patch_importance(models.ours, prompt, 7, method="relevancy", **how),
        "attention": lambda **how: image_attention(models.ours, prompt, **how),
        "tokens": lambda **how: answer_maps(models.ours, prompt, [7, 9], **how),
    }
    with planted(models.ours, place):
        for name, one in draw.items():
            whole, rest = one(), one(without_sinks=True)
            assert whole.dims == rest.dims, name
            missing = np.isnan(rest.values.reshape(-1, 9))
            assert missing[:, 4].all()
            assert missing.sum() == len(missing)
            np.testing.assert_array_equal(rest.values[~np.isnan(rest.values)], whole.values[~np.isnan(rest.values)])
            assert rest.left_out == [place]
            assert rest.n_forward == pytest.approx(whole.n_forward + 1)


def test_it_costs_one_pass_and_prompts_of_a_batch_are_as_alone(tmp_path: Any) -> None:
    models, counted = exact(), []
    alone = [models.prompt(n_text=6), models.prompt(n_text=4, seed=1)]
    with models.ours.hooks([("blocks.0.hook_resid_pre", lambda x, hook: counted.append(1))]):
        together = sink_positions(models.ours, batch(alone, "left"), norm=1.1, attention=1.02)
    assert len(counted) == together.n_forward == 1
    for i, prompt in enumerate(alone):
        one = sink_positions(models.ours, prompt, norm=1.1, attention=1.02)
        for name in ("norm", "attention", "sink"):
            np.testing.assert_allclose(together[name].sel(prompt=i), one[name], atol=1e-5)
    results.save(together, tmp_path / "sinks.safetensors")
    xr.testing.assert_identical(results.load(tmp_path / "sinks.safetensors"), together)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_images_of_several_grids(kind: str) -> None:
    model = with_processor(kind)
    prompt = model.prepare("What color is the star?", drawn((50, 170)))
    place = prompt.token_map.image_starts[0] + 2
    with planted(model, place):
        found = sink_positions(model, prompt)
    assert found.positions == [place]
    assert found.sink[0].values.nonzero()[0].tolist() == [2]


def test_a_dot_stands_for_each_position_and_sinks_are_named() -> None:
    models, prompt = exact(), exact().prompt()
    place = list(models.ours.as_inputs(prompt).token_map.patches())[4]
    with planted(models.ours, place):
        found = sink_positions(models.ours, prompt)
    axes = sink_scatter(found).axes[0]
    others, sinks = (np.asarray(dots.get_offsets()) for dots in axes.collections)
    assert (len(others), len(sinks)) == (8, 1)
    at_sink = found.isel(image=0, patch_row=1, patch_col=1).sel(layer=1)
    np.testing.assert_allclose(sinks[0], [at_sink.norm, at_sink.attention])
    assert [text.get_text() for text in axes.texts] == [str(place)]
    with pytest.raises(InputError, match="sink_positions"):
        sink_scatter(xr.Dataset({"norm": found.norm}))


def test_what_does_not_fit_is_refused() -> None:
    models = exact()
    with pytest.raises(InputError, match="norm=0.*at least 1"):
        sink_positions(models.ours, models.prompt(), norm=0)
    with pytest.raises(InputError, match=r"images.*prompts have \d"):
        sink_positions(models.ours, models.prompt(n_images=0))
