"""The surface that TransformerLens's tools expect: weights, directions, tokens; and those tools, run on images."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig
from transformer_lens.tools.analysis.logit_lens import logit_lens

from hooked_llava.errors import InputError
from hooked_llava.model.components import HookPoint
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from tests.builders import D_VOCAB
from tests.fixtures_processor import make_processor
from tests.pairs import as_users_run, fresh_pair, off, pair

WITH_BIASES = pair("biases")
GROUPED = pair("grouped")


@functools.cache
def talking() -> HookedLLaVA:
    """A model with a processor."""
    return HookedLLaVA.from_hf(pair().hf, processor=make_processor())


# ---------------------------------------------------------------------- weights


def test_it_satisfies_transformer_lenss_protocols() -> None:
    assert isinstance(GROUPED.ours, TransformerLensModel)
    assert isinstance(GROUPED.ours, TransformerLensModelWithWeights)


def test_the_config_answers_what_the_tools_read() -> None:
    cfg = GROUPED.ours.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_model, cfg.d_head) == (3, 6, 2, 48, 8)
    assert (cfg.d_mlp, cfg.d_vocab, cfg.n_ctx, cfg.act_fn, cfg.normalization_type) == (74, D_VOCAB, 256, "silu", "RMS")
    assert (cfg.attn_only, cfg.final_rms, cfg.device, cfg.dtype) == (False, True, torch.device("cpu"), torch.float32)
    assert cfg.vision.n_layers == 3
    assert cfg.model_name == "llava"
    assert not hasattr(cfg, "no_such_field")
    with pytest.raises(AttributeError, match="'n_hedas'.*cfg.vision, cfg.projector.*cfg.language"):
        _ = cfg.n_hedas


def test_the_config_follows_the_model() -> None:
    ours = fresh_pair().ours
    assert ours.to(torch.bfloat16).cfg.dtype == torch.bfloat16
    assert ours.to("meta").cfg.device.type == "meta"


@pytest.mark.parametrize("models", [WITH_BIASES, GROUPED], ids=["biases", "grouped"])
@pytest.mark.parametrize(
    "name", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"]
)
def test_stacked_weights_are_the_layers(models: Any, name: str) -> None:
    stacked = getattr(models.ours, name)
    part = "mlp" if name.endswith(("in", "gate", "out")) else "attn"
    for layer, block in enumerate(models.ours.blocks):
        assert torch.equal(stacked[layer], getattr(getattr(block, part), name))


def test_weights_are_hugging_faces_in_the_other_orientation() -> None:
    ours, hf = GROUPED.ours, GROUPED.hf.model.language_model
    layer = hf.layers[1]
    d_head = ours.cfg.d_head
    for name, theirs, n in (("Q", "q_proj", 6), ("K", "k_proj", 2), ("V", "v_proj", 2)):
        linear = getattr(layer.self_attn, theirs)
        for head in range(n):
            rows = slice(head * d_head, (head + 1) * d_head)
            assert torch.equal(getattr(ours, f"W_{name}")[1, head], linear.weight[rows].T)
            assert torch.equal(getattr(ours, f"b_{name}")[1, head], linear.bias[rows])
    for head in range(6):
        columns = slice(head * d_head, (head + 1) * d_head)
        assert torch.equal(ours.W_O[1, head], layer.self_attn.o_proj.weight[:, columns].T)
    assert torch.equal(ours.W_in[1], layer.mlp.up_proj.weight.T)
    assert torch.equal(ours.W_gate[1], layer.mlp.gate_proj.weight.T)
    assert torch.equal(ours.W_out[1], layer.mlp.down_proj.weight.T)
    for view, theirs in ((ours.W_E, hf.embed_tokens.weight), (ours.W_U.T, GROUPED.hf.lm_head.weight)):
        assert view.data_ptr() == theirs.data_ptr()
        assert torch.equal(view, theirs)
    assert ours.b_U.shape == (D_VOCAB,)
    assert ours.b_U.eq(0).all()


def test_ov_and_qk_are_products_for_every_query_head() -> None:
    ours = GROUPED.ours
    assert tuple(ours.OV.shape) == tuple(ours.QK.shape) == (3, 6, 48, 48)
    for layer in range(3):
        for head in range(6):
            attn, group = ours.blocks[layer].attn, head // 3
            assert off(ours.OV[layer, head].AB, attn.W_V[group] @ attn.W_O[head]) < 1e-5
            assert off(ours.QK[layer, head].AB, attn.W_Q[head] @ attn.W_K[group].T) < 1e-5
    assert ours.OV.svd()[1].shape[:2] == (3, 6)


def test_ov_of_a_head_is_what_it_moves() -> None:
    """A head that looks at one position writes that position's normalized stream times OV."""
    models = pair("plain", torch.float64)
    ours, prompt = models.ours, models.prompt()

    def look_at_three(pattern: Tensor, hook: HookPoint) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(3), pattern.shape[-1]).double().expand_as(pattern)

    with ours.hooks([("blocks.1.attn.hook_pattern", look_at_three)]):
        _, cache = ours.run_with_cache(prompt, names_filter=["result", "normalized"])
    read = cache["blocks.1.ln1.hook_normalized"][0, 3] * ours.blocks[1].ln1.w
    assert off(cache["result", 1][0, -1, 2], ours.OV[1, 2].AB.T @ read) < 1e-10


def test_accumulated_bias() -> None:
    ours = WITH_BIASES.ours
    attn, mlp = ours.b_O, ours.b_out
    assert attn.abs().sum() > 0
    assert mlp.abs().sum() > 0
    assert off(ours.accumulated_bias(2), attn[:2].sum(0) + mlp[:2].sum(0)) < 1e-6
    assert off(ours.accumulated_bias(1, mlp_input=True), attn[:2].sum(0) + mlp[0]) < 1e-6
    assert off(ours.accumulated_bias(3, include_mlp_biases=False), attn.sum(0)) < 1e-6
    assert ours.accumulated_bias(0).eq(0).all()


def test_a_tokens_direction_reads_its_logit_off_the_normalized_stream() -> None:
    ours = GROUPED.ours
    logits, cache = ours.run_with_cache(GROUPED.prompt(), names_filter="ln_final.hook_normalized")
    directions = ours.tokens_to_residual_directions(torch.tensor([[7, 8], [9, 10]]))
    assert directions.shape == (2, 2, 48)
    read = cache["ln_final.hook_normalized"][0, -1] @ directions[1, 0]
    assert read.item() == pytest.approx(logits[0, -1, 9].item(), abs=1e-4)
    assert torch.equal(ours.tokens_to_residual_directions(7), directions[0, 0])


# ---------------------------------------------------------------------- tokens


def test_text_to_tokens_and_back() -> None:
    model = talking()
    tokens = model.to_tokens("What color is the star ?")
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert model.to_string(tokens[0]) == "<s> What color is the star?"
    assert model.to_string(tokens) == ["<s> What color is the star?"]
    assert model.to_string(int(tokens[0, 5])) == "star"
    assert model.to_str_tokens("the star", prepend_bos=False) == ["the", "star"]
    assert model.to_str_tokens(tokens[0, 1:3]) == ["What", "color"]
    assert model.to_tokens("star", prepend_bos=False).tolist() == [[model.to_single_token("star")]]
    assert torch.equal(
        model.tokens_to_residual_directions("star"), model.tokens_to_residual_directions(int(tokens[0, 5]))
    )


def test_several_texts_are_padded() -> None:
    model = talking()
    left, right = (model.to_tokens(["the star", "What is the star"], padding_side=side) for side in ("left", "right"))
    pad = model.config.pad_token_id
    assert left.shape == right.shape
    assert left[0, 0] == right[0, -1] == pad
    with pytest.raises(InputError, match="row.*tokens, got 2"):
        model.to_str_tokens(left)


def test_tokens_of_inputs_as_strings() -> None:
    model = talking()
    one = model.prepare("What color is the star?", images=torch.zeros(3, 16, 16))
    expected = [model.tokenizer.decode([i]) for i in one.input_ids[0].tolist()]
    assert len(expected) == one.shape[1]
    assert expected.count("<image>") == model.config.vision.n_features
    assert model.to_str_tokens(one) == model.to_str_tokens({"input_ids": one.input_ids}) == expected
    two = model.prepare(["What is it?", "What color is the star?"])
    assert [model.to_str_tokens(prompt)[-1] for prompt in two] == ["ASSISTANT:"] * 2
    for several in (two, {"input_ids": two.input_ids}):
        with pytest.raises(InputError, match="row.*tokens, got 2.*row"):
            model.to_str_tokens(several)
    for wrong in (["What", "color"], None, {"pixel_values": one.pixel_values}):
        with as_users_run(), pytest.raises(InputError, match="one text, one row.*one prompt, got"):
            model.to_str_tokens(wrong)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("red star", r"'red star'.*single token.*\['red', 'star'\]"),
        ("zebra", "'zebra'.*vocabulary"),
    ],
)
def test_what_is_not_one_token_is_refused(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        talking().to_single_token(text)


def test_without_a_processor_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"no processor.*processor=.*from_hf.*token ids"):
        pair().ours.to_tokens("star")


# ---------------------------------------------------------------------- TransformerLens's tools, with images


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 8]).mean()


@functools.cache
def clean_and_corrupted() -> tuple[Inputs, Inputs]:
    """The same text with two images, so that a run without the image would show."""
    clean = GROUPED.prompt(seed=1)
    other = clean | {"pixel_values": GROUPED.prompt(seed=2)["pixel_values"]}
    return GROUPED.ours.as_inputs(clean), GROUPED.ours.as_inputs(other)


PATCHES = [
    ("attn_out", patching.get_act_patch_attn_out, ("layer", "pos")),
    ("mlp_out", patching.get_act_patch_mlp_out, ("layer", "pos")),
    ("resid_mid", patching.get_act_patch_resid_mid, ("layer", "pos")),
    ("z", patching.get_act_patch_attn_head_out_all_pos, ("layer", "head")),
    ("q", patching.get_act_patch_attn_head_q_all_pos, ("layer", "head")),
    ("k", patching.get_act_patch_attn_head_k_all_pos, ("layer", "kv_head")),
    ("v", patching.get_act_patch_attn_head_v_all_pos, ("layer", "kv_head")),
    ("pattern", patching.get_act_patch_attn_head_pattern_all_pos, ("layer", "head")),
    ("z", patching.get_act_patch_attn_head_out_by_pos, ("layer", "pos", "head")),
    ("v", patching.get_act_patch_attn_head_v_by_pos, ("layer", "pos", "kv_head")),
]


def test_patching_the_stream_sees_the_image() -> None:
    ours, (clean, corrupted) = GROUPED.ours, clean_and_corrupted()
    _, cache = ours.run_with_cache(clean)
    with torch.no_grad():
        values = patching.get_act_patch_resid_pre(ours, corrupted, cache, metric)
        unpatched, whole = metric(ours(corrupted)).item(), metric(ours(clean)).item()
    assert values.shape == (3, clean.shape[1])
    assert whole != pytest.approx(unpatched, abs=1e-2)
    assert values[0, 0].item() == pytest.approx(unpatched, abs=1e-5), "the text is the same"
    assert (values[0, 1:5] - unpatched).abs().max() > 1e-3, "the image is not"


@pytest.mark.parametrize(("name", "patch", "axes"), PATCHES, ids=[f"{n}-{'-'.join(a)}" for n, _, a in PATCHES])
def test_a_patched_cell_is_the_run_with_that_patch(name: str, patch: Any, axes: tuple[str, ...]) -> None:
    ours, (clean, corrupted) = GROUPED.ours, clean_and_corrupted()
    _, cache = ours.run_with_cache(clean)
    second = 3 if axes[1] == "pos" else 1
    cells = pd.DataFrame([(layer, second, 1)[: len(axes)] for layer in (0, 1)], columns=list(axes))
    with torch.no_grad():
        values = patch(ours, corrupted, cache, metric, index_axis_names=None, index_df=cells)
    for layer, value in enumerate(values.tolist()):

        def by_hand(x: Tensor, hook: HookPoint, layer: int = layer) -> None:
            there = cache[name, layer]
            if name == "pattern" or axes == ("layer", "pos"):
                x[:, second] = there[:, second]
            elif len(axes) == 3:
                x[:, second, 1] = there[:, second, 1]
            else:
                x[:, :, second] = there[:, :, second]

        expected = metric(ours.run_with_hooks(corrupted, fwd_hooks=[((name, layer), by_hand)])).item()
        assert value == pytest.approx(expected, abs=1e-5)
        assert value != pytest.approx(metric(ours(corrupted)).item(), abs=1e-6)


def test_direct_path_patching_runs() -> None:
    ours, (clean, corrupted) = GROUPED.ours, clean_and_corrupted()
    with torch.no_grad():
        caches = [ours.run_with_cache(p)[1] for p in (clean, corrupted)]
        values = patching.get_act_patch_direct_path(
            ours, corrupted, *caches, metric, src_layer=0, src_head=2, component="q", verbose=False
        )
    assert values.shape == (3, 6)
    assert values[0].eq(0).all(), "rows up to the source are placeholders"
    delta = (caches[0]["z", 0] - caches[1]["z", 0])[:, :, 2] @ ours.blocks[0].attn.W_O[2]

    def add(x: Tensor, hook: HookPoint) -> None:
        x[:, :, 4] += delta

    expected = metric(ours.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_q_input", add)]))
    assert values[1, 4].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("granularity", ["node", "edge"])
def test_attribution_patching_runs_on_images(granularity: Any) -> None:
    """First-order effects, against the true effect of replacing one head's output by that of an image close by."""
    models = pair("plain", torch.float64)
    clean, near = models.prompt(seed=1), models.prompt(seed=1)
    near["pixel_values"] = near["pixel_values"] + 1e-5 * torch.randn(near["pixel_values"].shape).double()
    clean, corrupted = models.ours.as_inputs(clean), models.ours.as_inputs(near)
    result = attribution_patch(models.ours, clean, corrupted, metric, EdgeAttributionConfig(granularity=granularity))
    assert all(parameter.grad is None for parameter in models.ours.parameters())
    assert not any(point.has_hooks() for point in models.ours.hook_points())
    if granularity == "node":
        _, cache = models.ours.run_with_cache(clean)
        of_head = [float(s) for node, s in result.node_scores.items() if (node.layer, node.head) == (1, 2)]
        before = metric(models.ours(corrupted))

        def patch(z: Tensor, hook: HookPoint) -> None:
            z[:, :, 2] = cache["z", 1][:, :, 2]

        effect = metric(models.ours.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_z", patch)])) - before
        assert len(of_head) == clean.shape[1]
        assert sum(of_head) == pytest.approx(effect.item(), rel=1e-3)


def test_direct_logit_attribution_sums_to_the_logit() -> None:
    ours, (clean, _) = GROUPED.ours, clean_and_corrupted()
    logits, cache = ours.run_with_cache(clean)
    result = direct_logit_attribution(ours, cache=cache, answer_tokens=7, incorrect_tokens=8)
    assert result.attribution.sum().item() == pytest.approx(metric(logits).item(), abs=1e-4)


def test_transformer_lenss_logit_lens_ends_in_the_models_logits() -> None:
    ours, (clean, _) = GROUPED.ours, clean_and_corrupted()
    logits, cache = ours.run_with_cache(clean)
    for result in (logit_lens(ours, cache=cache), cache.logit_lens()):
        values = result.values if hasattr(result, "values") else result.logits
        assert off(values[-1].flatten(), logits[0, -1]) < 1e-5


def test_setters_do_nothing() -> None:
    ours = GROUPED.ours
    for name in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in", "set_use_attn_in"):
        assert getattr(ours, name)(True) is None
    assert ours.cfg.use_attn_result
    assert ours.cfg.use_split_qkv_input
