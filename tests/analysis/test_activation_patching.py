"""Activation patching equals a loop over cells with plain hooks and full forward passes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.errors import HookNameError, InputError, SpanError
from hooked_llava.readout.metrics import log_probability, teacher_forced
from tests.oracles.naive_patching import activations, patch_cells
from tests.pairs import as_users_run, pair


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 7] - logits[..., 9]


def prompts(geometry: str = "plain", **options: Any) -> tuple[Any, Any, Any]:
    """A model with a clean and a corrupted prompt: other images and other words in the same places."""
    models = pair(geometry)
    options = {"n_text": 4, **options}
    clean, corrupted = (models.ours.as_inputs(models.prompt(seed=seed, **options)) for seed in (1, 2))
    return models.ours, clean, corrupted


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, np.array(expected).reshape(found.shape), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("hook", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_stream_and_outputs_by_layer_and_position(hook: str, direction: Any) -> None:
    model, clean, corrupted = prompts()
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    found = activation_patching(model, clean, corrupted, hook=hook, metric=metric, direction=direction)
    assert found.dims == ("layer", "position")
    cells = [(0, p) for p in range(base.shape[1])]
    close(found, [patch_cells(model, source, base, f"blocks.{i}.hook_{hook}", cells, metric) for i in range(3)])
    ends = [float(metric(model(inputs)[0, -1]).detach()) for inputs in (clean, corrupted)]
    assert [found.clean, found.corrupted] == pytest.approx(ends, abs=1e-5)
    assert found.label.values.tolist() == base.token_map.labels


@pytest.mark.parametrize("hook", ["z", "q", "k", "v", "result", "rot_k"])
def test_heads_by_layer_position_and_head(hook: str) -> None:
    model, clean, corrupted = prompts("grouped")
    where = [0, 3, clean.shape[1] - 1]
    found = activation_patching(model, clean, corrupted, hook=hook, positions=where, layers=[0, -1], metric=metric)
    n_heads = 2 if hook in ("k", "v", "rot_k") else 6
    kind = "kv_head" if n_heads == 2 else "head"
    assert dict(found.sizes) == {"layer": 2, "position": 3, kind: n_heads}
    assert found.layer.values.tolist() == [0, 2]
    cells = [(0, p, h) for p, h in product(where, range(n_heads))]
    close(found, [patch_cells(model, clean, corrupted, f"blocks.{i}.attn.hook_{hook}", cells, metric) for i in (0, 2)])


def test_all_positions_and_chosen_heads() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, hook="z", positions="all", heads=[1, -1], metric=metric)
    assert found.dims == ("layer", "head")
    assert found["head"].values.tolist() == [1, 3]
    cells = [(0, slice(None), h) for h in (1, 3)]
    close(found, [patch_cells(model, clean, corrupted, f"blocks.{i}.attn.hook_z", cells, metric) for i in range(3)])


def test_all_heads_at_a_span() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, hook="v", positions="image", heads="all", metric=metric)
    image = list(clean.token_map["image"])
    assert found.position.values.tolist() == image
    cells = [(0, p) for p in image]
    close(found, [patch_cells(model, clean, corrupted, f"blocks.{i}.attn.hook_v", cells, metric) for i in range(3)])


def test_pattern_by_query_row_and_head() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, hook="pattern", positions=[5, -1], metric=metric)
    cells = [(0, h, q) for q, h in product((5, clean.shape[1] - 1), range(4))]
    close(
        found, [patch_cells(model, clean, corrupted, f"blocks.{i}.attn.hook_pattern", cells, metric) for i in range(3)]
    )


@pytest.mark.parametrize("geometry", ["plain", "full"])
@pytest.mark.parametrize("hook", ["hook_image_embed", "projector.hook_out", "vision.hook_out"])
def test_image_embeddings_by_patch(geometry: str, hook: str) -> None:
    model, clean, corrupted = prompts(geometry)
    found = activation_patching(model, clean, corrupted, hook=hook, metric=metric)
    assert found.dims == ("patch",)
    assert found.patch_row.values.tolist() == [0, 0, 1, 1]
    assert found.patch_col.values.tolist() == [0, 1, 0, 1]
    first = int(geometry == "full")  # the class token comes first
    close(found, patch_cells(model, clean, corrupted, hook, [(0, p + first) for p in range(4)], metric))


@pytest.mark.parametrize("hook", ["resid_pre", "mlp_out", "z", "pattern"])
def test_vision_tower_by_layer_and_patch(hook: str) -> None:
    model, clean, corrupted = prompts()
    heads = {"heads": [2]} if hook in ("z", "pattern") else {}
    found = activation_patching(model, clean, corrupted, hook=f"vision.{hook}", metric=metric, **heads)
    assert found.dims == ("layer", "patch", "head")[: found.ndim]
    cells = {"z": lambda p: (0, p + 1, 2), "pattern": lambda p: (0, 2, p + 1)}.get(hook, lambda p: (0, p + 1))
    inside = "attn." if heads else ""
    expected = [
        patch_cells(
            model, clean, corrupted, f"vision.blocks.{i}.{inside}hook_{hook}", [cells(p) for p in range(4)], metric
        )
        for i in range(2)
    ]
    close(found, expected)


def test_all_patches_take_the_class_token_along() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, hook="vision.resid_post", positions="all", metric=metric)
    expected = [
        patch_cells(model, clean, corrupted, f"vision.blocks.{i}.hook_resid_post", [(0,)], metric) for i in range(2)
    ]
    close(found, expected)


def test_each_of_several_images() -> None:
    model, clean, corrupted = prompts(n_images=2)
    found = activation_patching(model, clean, corrupted, hook="hook_image_embed", metric=metric)
    assert found.dims == ("image", "patch")
    cells = list(product(range(2), range(4)))
    close(found, patch_cells(model, clean, corrupted, "hook_image_embed", cells, metric))


def test_text_only() -> None:
    model, clean, corrupted = prompts(n_images=0)
    found = activation_patching(model, clean, corrupted, metric=metric)
    cells = [(0, p) for p in range(clean.shape[1])]
    close(found, [patch_cells(model, clean, corrupted, f"blocks.{i}.hook_resid_pre", cells, metric) for i in range(3)])
    with pytest.raises(InputError, match="hook_image_embed.*images.*0"):
        activation_patching(model, clean, corrupted, hook="hook_image_embed", metric=metric)


def test_everything_patched_is_the_other_run() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, positions="all")
    np.testing.assert_allclose(found, found.clean, rtol=1e-4)
    own = [int(model(inputs)[0, -1].argmax()) for inputs in (clean, corrupted)]
    logits = model(clean)[0, -1].detach()
    assert found.clean == pytest.approx(float(logits[own[0]] - logits[own[1]]), abs=1e-5)


def test_pairs_side_by_side() -> None:
    model, clean, corrupted = prompts(batch=2)
    found = activation_patching(model, clean, corrupted, hook="attn_out", metric=metric)
    assert found.dims == ("pair", "layer", "position")
    for i in range(2):
        alone = activation_patching(model, clean[i], corrupted[i], hook="attn_out", metric=metric)
        np.testing.assert_allclose(found[i], alone, rtol=1e-5, atol=1e-5)
        assert found.clean[i] == pytest.approx(alone.clean, abs=1e-5)
    as_list = activation_patching(
        model, [clean[0], clean[1]], [corrupted[0], corrupted[1]], hook="attn_out", metric=metric
    )
    np.testing.assert_allclose(as_list, found, rtol=1e-5, atol=1e-5)
    each = activation_patching(model, clean, corrupted, hook="attn_out", metric=[metric, log_probability(4)])
    alone = activation_patching(model, clean[1], corrupted[1], hook="attn_out", metric=log_probability(4))
    np.testing.assert_allclose(each[1], alone, rtol=1e-5, atol=1e-5)


def test_refuses_prompts_that_do_not_match_and_shows_both() -> None:
    model, clean, _ = prompts()
    _, longer, _ = prompts(n_text=6)
    with pytest.raises(InputError, match=r"(?s)position by position.*clean:.*9 positions.*corrupted:.*11 positions"):
        activation_patching(model, clean, longer, metric=metric)
    with pytest.raises(InputError, match="1 clean.*2 corrupted"):
        activation_patching(model, clean, [clean, clean], metric=metric)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "both"}, InputError, "direction='both'.*'denoise'.*'noise'"),
        ({"heads": [1]}, InputError, "resid_pre.*no heads"),
        ({"hook": "z", "heads": []}, InputError, r"\[\].*heads of blocks\.0\.attn\.hook_z"),
        ({"hook": "z", "heads": [1.5]}, InputError, r"\[1\.5\].*whole numbers"),
        ({"layers": []}, InputError, r"\[\].*layers of resid_pre"),
        ({"layers": [3]}, InputError, r"\[3\].*layers of resid_pre; expected -3\.\.2"),
        ({"hook": "hook_embed", "layers": 1}, HookNameError, "hook_embed.*no layers"),
        ({"hook": "z", "heads": [4]}, InputError, r"\[4\].*heads.*-4\.\.3"),
        ({"positions": [99]}, InputError, r"positions=\[99\].*-9\.\.8"),
        ({"positions": "question"}, SpanError, "span 'question'"),
        (
            {"hook": "hook_image_embed", "positions": "image"},
            InputError,
            "'image'.*hook_image_embed; expected 'each', 'all'",
        ),
        ({"hook": "blocks.*.hook_*_out"}, InputError, r"'blocks\.\*\.hook_\*_out'.*several hooks"),
        ({"hook": "rezid_pre"}, HookNameError, "resid_pre"),
        ({"logit_positions": [1, 2], "metric": None}, InputError, "give metric="),
        (
            {"logit_positions": [-2, -1]},
            InputError,
            r"shape \(2,\).*\(2, 99\).*one number",
        ),
        ({"metric": lambda logits: logits[..., :2]}, InputError, r"shape \(2,\).*\(99,\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, clean, corrupted = prompts()
    with as_users_run(), pytest.raises(error, match=message):
        activation_patching(model, clean, corrupted, **{"metric": metric, **options})


def test_without_a_metric_the_answers_must_differ() -> None:
    model, clean, _ = prompts()
    with pytest.raises(InputError, match=r"same answer .* Give metric="):
        activation_patching(model, clean, clean)


def test_reading_an_answer_of_several_tokens() -> None:
    model, clean, corrupted = prompts()
    forced = [teacher_forced(model, inputs, [8, 9]) for inputs in (clean, corrupted)]
    where = forced[0].positions
    found = activation_patching(
        model,
        forced[0].inputs,
        forced[1].inputs,
        hook="mlp_out",
        positions=[3],
        metric=forced[0].metric,
        logit_positions=where,
    )
    there = activations(model, forced[0].inputs, ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"]

    def overwrite(tensor: torch.Tensor, hook: Any) -> None:
        tensor[:, 3] = there[:, 3]

    logits = model.run_with_hooks(forced[1].inputs, fwd_hooks=[("blocks.1.hook_mlp_out", overwrite)]).detach()
    expected = logits[0, where[0]].log_softmax(-1)[8] + logits[0, where[1]].log_softmax(-1)[9]
    assert float(found.sel(layer=1, position=3)) == pytest.approx(float(expected), abs=1e-4)


def test_a_span_within_a_list_is_patched_as_one() -> None:
    model, clean, corrupted = prompts()
    last = clean.shape[1] - 1
    found = activation_patching(model, clean, corrupted, positions=["image", 1, "text", -1], metric=metric)
    image, text = (clean.token_map[span].tolist() for span in ("image", "text"))
    labels = corrupted.token_map.labels
    assert found.label.values.tolist() == ["image", labels[1], "text", labels[last]]
    assert found.n_positions.values.tolist() == [len(image), 1, len(text), 1]
    assert found.position.values.tolist() == [image[0], 1, text[0], last]
    cells = [(0, image), (0, 1), (0, text), (0, last)]
    close(found, [patch_cells(model, clean, corrupted, f"blocks.{i}.hook_resid_pre", cells, metric) for i in range(3)])
    heads = activation_patching(
        model, clean, corrupted, hook="z", positions=["image", "last"], heads=[2], layers=[1], metric=metric
    )
    cells = [(0, image, 2), (0, last, 2)]
    close(heads, patch_cells(model, clean, corrupted, "blocks.1.attn.hook_z", cells, metric))
    with pytest.raises(SpanError, match="There is no span 'imgae'"):
        activation_patching(model, clean, corrupted, positions=["imgae", 1], metric=metric)


def test_one_layer_may_stand_by_itself() -> None:
    model, clean, corrupted = prompts()
    found = activation_patching(model, clean, corrupted, layers=-1, positions="last", metric=metric)
    assert found.layer.values.tolist() == [2]


def test_the_last_position_of_a_forced_answer_is_the_prompts_own() -> None:
    model, clean, corrupted = prompts()
    forced = [teacher_forced(model, inputs, [8]) for inputs in (clean, corrupted)]
    options = {"metric": forced[0].metric, "logit_positions": forced[0].positions}
    found = activation_patching(model, *(f.inputs for f in forced), positions="last", **options)
    assert found.position.values.tolist() == [clean.shape[1] - 1]
    plain = activation_patching(model, clean, corrupted, positions="last", metric=log_probability(8))
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
    assert float(found.std()) > 0


def test_pairs_that_do_not_stack_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, corrupted = prompts()
    _, *longer = prompts(n_text=6)
    monkeypatch.setattr(type(model), "run_with_cache", None)
    with pytest.raises(InputError, match=r"'position': 9.*'position': 11.* do not stack"):
        activation_patching(model, [clean, longer[0]], [corrupted, longer[1]], metric=metric)
