"""Parity of HookedLLaVA with Hugging Face's LLaVA, layer by layer, and the options of its forward pass."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch

from hooked_llava.errors import CheckpointError, ConfigError, HookNameError, InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.oracles.plain import loss_by_hand
from tests.pairs import (
    FAMILY,
    FP32,
    GEOMETRIES,
    as_users_run,
    assert_as_near_as_theirs,
    assert_same_streams,
    batch,
    counted_positions,
    fresh_pair,
    off,
    pair,
    rounding_errors,
)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_layer_and_the_logits_equal_hugging_face(geometry: str) -> None:
    models = pair(geometry)
    prompt = models.prompt(batch=2)
    assert_same_streams(models, prompt)
    assert off(models.ours(**prompt), models.hf_logits(prompt)) <= FP32


@pytest.mark.parametrize("geometry", ["plain", "grouped", "full"])
@pytest.mark.parametrize("n_images", [0, 3])
def test_text_only_and_several_images(geometry: str, n_images: int) -> None:
    models = pair(geometry)
    assert_same_streams(models, models.prompt(n_images=n_images, seed=1))


def test_the_weights_are_such_that_every_layer_and_the_image_matter() -> None:
    """Otherwise parity would say little."""
    models = pair("deep")
    prompt = models.prompt()
    logits = models.ours(**prompt)
    for path in ("vision.blocks.1", "blocks.3", "blocks.4"):
        for part in ("attn_out", "mlp_out"):
            edited = models.ours.run_with_hooks(**prompt, fwd_hooks=[(f"{path}.hook_{part}", lambda x, hook: 0 * x)])
            assert off(edited[:, -1], logits[:, -1]) > 0.02, (path, part)
    other = prompt | {"pixel_values": prompt["pixel_values"].flip(-1)}
    assert off(models.ours(**other)[:, -1], logits[:, -1]) > 0.02


@pytest.mark.parametrize("geometry", ["plain", "grouped"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_with_different_numbers_of_images(geometry: str, side: Literal["left", "right"]) -> None:
    models = pair(geometry)
    rows = [models.prompt(n_images=n, n_text=t, seed=n) for n, t in ((2, 4), (0, 6), (1, 9))]
    prompt = batch(rows, side)
    assert_same_streams(models, prompt | {"position_ids": counted_positions(prompt["attention_mask"])})
    logits = models.ours(**prompt)
    assert logits.isfinite().all()
    for row, alone, mask in zip(logits, rows, prompt["attention_mask"].bool(), strict=True):
        assert off(row[mask], models.ours(**alone)[0]) <= FP32, "a padded row is not the prompt alone"
    without_positions = models.hf_logits(prompt)
    real = prompt["attention_mask"].bool()
    assert off(logits[real], without_positions[real]) <= FP32, "rotary positions are relative"


def test_masks_may_be_integers_or_bools_or_missing() -> None:
    models = pair()
    prompt = batch([models.prompt(n_text=4), models.prompt(n_text=9)], "left")
    as_bool = prompt | {"attention_mask": prompt["attention_mask"].bool()}
    assert torch.equal(models.ours(**prompt), models.ours(**as_bool))
    whole = models.prompt(batch=2)
    without = {name: t for name, t in whole.items() if name != "attention_mask"}
    assert torch.equal(models.ours(**whole), models.ours(**without))


def test_a_mask_without_padding_is_dropped_for_the_fused_kernel() -> None:
    ours, whole = pair().ours, torch.ones(2, 3, dtype=torch.bool)
    padded = torch.tensor([[True] * 3, [False, True, True]])
    for begin in (torch.zeros(2, 3, ours.cfg.d_model), torch.ones(2, 3, dtype=torch.long)):
        assert ours.request(begin, attention_mask=whole).attention_mask is None
        assert ours.request(begin, attention_mask=padded).attention_mask is not None
    context = ours.context(torch.zeros(2, 3, ours.cfg.d_model))
    assert context.causal
    assert context.allowed is None


@pytest.mark.parametrize("geometry", ["plain", "llama3_rope"])
def test_given_position_ids_are_used(geometry: str) -> None:
    models = pair(geometry)
    prompt = models.prompt(batch=2)
    gaps = torch.randint(1, 5, prompt["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    prompt["position_ids"] = gaps.cumsum(-1)
    assert_same_streams(models, prompt)
    plain = {name: t for name, t in prompt.items() if name != "position_ids"}
    assert off(models.ours(**prompt), models.ours(**plain)) > 1e-3


@pytest.mark.parametrize("geometry", ["grouped", "several_layers", *FAMILY])
def test_bfloat16_is_as_near_to_float32_as_hugging_face_is(geometry: str) -> None:
    found = []
    for seed in range(3):
        exact, rounded = pair(geometry, seed=seed), pair(geometry, torch.bfloat16, seed)
        found.append(rounding_errors(exact.hf, rounded.hf, exact.prompt(batch=2, seed=seed, n_text=20)))
    assert_as_near_as_theirs(found)


LISTENERS = ["attn_scores", "pattern", "result", "q_input", "k_input", "v_input", "normalized", "scale", None]


@pytest.mark.parametrize("names", LISTENERS, ids=str)
@pytest.mark.parametrize("geometry", ["grouped", "biases"])
def test_hooking_changes_no_logit_beyond_rounding(geometry: str, names: str | None) -> None:
    models = pair(geometry)
    prompt = batch([models.prompt(n_text=3), models.prompt(n_text=8, n_images=2)], "left")
    listened = [names, f"vision.{names}"] if names else None
    logits, _ = models.ours.run_with_cache(**prompt, names_filter=listened)
    real = prompt["attention_mask"].bool()
    assert off(logits[real], models.ours(**prompt)[real]) <= FP32


# ---------------------------------------------------------------------- what forward returns


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_mean_over_text_targets(side: Literal["left", "right"]) -> None:
    models = pair()
    prompt = batch([models.prompt(n_images=2, n_text=5), models.prompt(n_images=0, n_text=9)], side)
    expected = loss_by_hand(
        models.ours(**prompt), prompt["input_ids"], prompt["attention_mask"], models.hf.config.image_token_id
    )
    loss = models.ours(**prompt, return_type="loss")
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_text_only_loss_is_hugging_faces() -> None:
    models = pair()
    prompt = models.prompt(n_images=0, batch=2)
    with torch.no_grad():
        expected = models.hf(**prompt, labels=prompt["input_ids"]).loss
    assert models.ours(**prompt, return_type="loss").item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_prompt_without_targets_has_no_loss() -> None:
    models = pair()
    with pytest.raises(InputError, match="no text token .* predict"):
        models.ours(torch.tensor([[7]]), return_type="loss")


def test_nothing_is_returned_for_none_and_unknown_return_types_are_refused() -> None:
    models = pair()
    assert models.ours(**models.prompt(), return_type=None) is None
    with as_users_run(), pytest.raises(InputError, match="return_type='both'.*'logits', 'loss' or None"):
        models.ours(**models.prompt(), return_type="both")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_a_run_is_left_and_entered_at_any_layer(side: Literal["left", "right"], mask_dtype: torch.dtype) -> None:
    models = pair("grouped")
    prompt = batch([models.prompt(n_text=3), models.prompt(n_text=8)], side)
    mask = prompt["attention_mask"].to(mask_dtype)
    logits, cache = models.ours.run_with_cache(**prompt, names_filter=["resid_pre", "resid_post"])
    n_layers = models.ours.cfg.n_layers
    for layer in range(n_layers):
        stream = models.ours(**prompt, stop_at_layer=layer)
        assert torch.equal(stream, cache["resid_pre", layer])
        assert torch.equal(models.ours(stream, start_at_layer=layer, attention_mask=mask), logits)
    assert torch.equal(models.ours(**prompt, stop_at_layer=n_layers), cache["resid_post", n_layers - 1])
    assert torch.equal(models.ours(**prompt, stop_at_layer=-1), cache["resid_pre", -1])
    last = models.ours(cache["resid_post", -1], start_at_layer=n_layers, attention_mask=mask)
    assert torch.equal(last, logits)
    between = models.ours(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2, attention_mask=mask)
    assert torch.equal(between, cache["resid_pre", 2])


def test_a_run_entered_in_the_middle_takes_position_ids() -> None:
    models = pair()
    prompt = models.prompt()
    prompt["position_ids"] = torch.arange(prompt["input_ids"].shape[1])[None] * 3
    logits, cache = models.ours.run_with_cache(**prompt, names_filter="resid_pre")
    entered = models.ours(cache["resid_pre", 1], start_at_layer=1, position_ids=prompt["position_ids"])
    assert torch.equal(entered, logits)


def test_layers_and_streams_that_do_not_fit_are_refused() -> None:
    models = pair()
    prompt = models.prompt()
    stream = models.ours(**prompt, stop_at_layer=1)
    with pytest.raises(InputError, match=r"Layer 4.*-3\.\.3"):
        models.ours(**prompt, stop_at_layer=4)
    with pytest.raises(InputError, match=r"\[batch.*48\].*\(1, 12, 47\)"):
        models.ours(stream[..., :-1], start_at_layer=1)
    with pytest.raises(InputError, match=r"start_at_layer.*\[batch pos 48\].*NoneType"):
        models.ours(start_at_layer=1)
    with pytest.raises(InputError, match="return_type='loss' needs the tokens"):
        models.ours(stream, start_at_layer=1, return_type="loss")
    with pytest.raises(InputError, match="start_at_layer=2.*stop_at_layer=1"):
        models.ours(stream, start_at_layer=2, stop_at_layer=1)
    with pytest.raises(InputError, match="attention_mask has shape"):
        models.ours(stream, start_at_layer=1, attention_mask=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(InputError, match="Both inputs.*and input_ids"):
        models.ours(models.ours.as_inputs(prompt), **prompt)


def test_inputs_come_as_keywords_as_a_dict_as_tensors_and_prepared() -> None:
    models = pair()
    prompt = models.prompt(batch=2)
    logits = models.ours(**prompt)
    prepared = models.ours.as_inputs(prompt)
    assert torch.equal(models.ours(prompt), logits)
    assert torch.equal(models.ours(prepared), logits)
    assert torch.equal(models.ours(prompt["input_ids"], pixel_values=prompt["pixel_values"]), logits)
    text = models.prompt(n_images=0)
    assert torch.equal(models.ours(text["input_ids"]), models.ours(**text))
    assert torch.equal(models.ours(text["input_ids"][0]), models.ours(**text))


def test_image_hooks_are_refused_on_text_only_input() -> None:
    models = pair()
    with models.ours.hooks([("vision.hook_out", lambda x, hook: None)]):
        with pytest.raises(HookNameError, match="'vision.hook_out'.*fire.*prompt.*image"):
            models.ours(**models.prompt(n_images=0))
        models.ours(**models.prompt())


# ---------------------------------------------------------------------- the module itself


def test_from_hf_shares_storage_in_parameters_of_its_own() -> None:
    models = fresh_pair("tied")
    theirs = {w.data_ptr() for w in models.hf.state_dict().values()}
    for name, parameter in models.ours.named_parameters():
        assert parameter.data_ptr() in theirs, name
        assert not parameter.requires_grad, name
    assert models.ours.unembed.weight is models.ours.language.embed.weight
    models.ours.to(torch.float64)
    assert {w.dtype for w in models.hf.state_dict().values()} == {torch.float32}
    prompt = models.prompt()
    assert off(models.ours(**prompt).float(), models.hf_logits(prompt)) < 1e-4


def test_moving_to_another_dtype_keeps_the_rotary_frequencies_exact() -> None:
    models = fresh_pair()
    there_and_back = copy.deepcopy(models.ours).to(torch.bfloat16).to(torch.float32)
    position = torch.arange(200)[None]
    before, after = models.ours.language.rotary, there_and_back.language.rotary
    assert torch.equal(before(position, torch.float32)[0], after(position, torch.float32)[0])


def test_a_copy_has_hooks_of_its_own() -> None:
    models = fresh_pair()
    other = copy.deepcopy(models.ours)
    other.add_hook("hook_embed", lambda x, hook: 0 * x)
    prompt = models.prompt()
    assert off(models.ours(**prompt), models.hf_logits(prompt)) <= FP32
    assert off(other(**prompt), models.hf_logits(prompt)) > 0.1


def test_build_is_without_memory_on_meta_and_in_the_dtype_asked_for() -> None:
    config = pair().ours.config
    assert {p.device.type for p in HookedLLaVA.build(config, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in HookedLLaVA.build(config, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert not any(module.training for module in HookedLLaVA.build(config, device="meta").modules())


def test_saving_needs_a_hugging_face_config(tmp_path: Any) -> None:
    model = HookedLLaVA.build(pair().ours.config)
    with pytest.raises(CheckpointError, match=r"save_pretrained.*hf_config="):
        model.save_pretrained(tmp_path)


def test_another_architecture_is_refused() -> None:
    hf = make_hf_model()
    hf.config.model_type = "llava_nxt"
    with pytest.raises(ConfigError, match="type 'llava_nxt'.*Known: llava"):
        HookedLLaVA.from_hf(hf)


@pytest.mark.parametrize(
    "where", [{"device": "cuda:77"}, {"device": "abacus"}, {"device": "hpu"}, {"device_map": {"": "cuda:77"}}]
)
def test_a_device_that_is_not_there_is_refused_by_name(where: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="(cuda:77|abacus|hpu).*expected cpu"):
        HookedLLaVA.from_pretrained("tiny-shapes", **where)
