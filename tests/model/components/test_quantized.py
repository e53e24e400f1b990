"""Weights in 8 and 4 bits: what transformers computes with them, what is read from them, and what every analysis makes of them.

bitsandbytes runs on a CPU, so nothing here is skipped.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from hooked_llava.architecture.llava import llava_kind
from hooked_llava.editing import EditRequest, edit_sweep, finetune, key_covariance, multedit, rome
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.loading.embedded import resolve
from hooked_llava.loading.packed import PackedWeight
from hooked_llava.loading.quantization import Quantization
from hooked_llava.model.components.quantized import (
    Linear4Bit,
    Linear8Bit,
    QuantizedLinear,
    quantized_linears,
    stored_state,
)
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import WeightsId, weights_hash, weights_stamp, weights_version
from hooked_llava.replay import Intervention, Replay
from hooked_llava.toy.images import image_path
from tests.analyses import CHOSEN_BY_ITSELF, all_analyses, numbers
from tests.pairs import off

CONFIGS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "8 bits, nothing apart": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True},
}
BOTH = ("8 bits", "nf4")
EIGHT_BITS = 0.02
"""Differences that rounding activations to 8 bits makes of one in float32's last digit, as a share of the largest number."""
BFLOAT = 8 * torch.finfo(torch.bfloat16).eps
"""A few roundings, as `verify` allows."""
CASES = [
    *(("tiny-shapes", bits) for bits in CONFIGS),
    ("tiny-shapes-next", "8 bits"),
    ("tiny-shapes-next", "nf4, nested"),
]
every_case = pytest.mark.parametrize(("name", "bits"), CASES)
both_models = pytest.mark.parametrize(("name", "bits"), [("tiny-shapes", "nf4"), ("tiny-shapes-next", "8 bits")])
both = pytest.mark.parametrize("bits", BOTH)
every_config = pytest.mark.parametrize("bits", CONFIGS)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers' layers in 8 bits log a line in every product that is not in float16."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def config(bits: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**CONFIGS[bits])


@functools.cache
def plain(name: str) -> HookedLLaVA:
    return HookedLLaVA.from_pretrained(name)


@functools.cache
def ours(name: str, bits: str, dtype: torch.dtype = torch.float32) -> HookedLLaVA:
    return HookedLLaVA.from_pretrained(name, quantization_config=config(bits), dtype=dtype)


@functools.cache
def theirs(name: str, bits: str, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers loads it, computing in the dtype that the config names on every CPU."""
    hf = AutoModelForImageTextToText.from_pretrained(resolve(name), quantization_config=config(bits), dtype=dtype)
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf


def asked(model: HookedLLaVA, image: str = "demo", question: str = "What color is the star?") -> Any:
    return model.prepare(question, images=image_path(image))


def hf_logits(hf: Any, inputs: Any) -> Tensor:
    takes = llava_kind(hf.config.model_type).image_fields
    fields = {name: value for name, value in inputs.image_fields.items() if name in takes}
    with torch.no_grad():
        return hf(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask.long(), **fields).logits


# ---------------------------------------------------------------------- the model of transformers


@every_case
def test_the_logits_are_those_of_transformers(name: str, bits: str) -> None:
    model, hf = ours(name, bits), theirs(name, bits)
    inputs = asked(model)
    assert off(model(inputs), hf_logits(hf, inputs)) <= (EIGHT_BITS if "8" in bits else 1e-4)
    assert off(HookedLLaVA.from_hf(hf)(inputs), model(inputs)) <= 1e-6
    assert model.verify(hf, inputs).ok


@both
def test_in_bfloat16_they_are_as_near(bits: str) -> None:
    model, hf = ours("tiny-shapes", bits, torch.bfloat16), theirs("tiny-shapes", bits, torch.bfloat16)
    inputs = asked(model)
    found = model(inputs)
    assert found.dtype == torch.bfloat16
    assert off(found.float(), hf_logits(hf, inputs).float()) <= BFLOAT
    assert model.verify(hf, inputs).ok


@both
def test_what_transformers_computes_on_this_cpu_is_near_too(bits: str) -> None:
    """On a CPU with bfloat16 instructions its layers in 4 bits compute in bfloat16, and rearrange their weights for it."""
    hf = AutoModelForImageTextToText.from_pretrained(resolve("tiny-shapes"), quantization_config=config(bits))
    inputs = asked(ours("tiny-shapes", bits))
    before, logits = HookedLLaVA.from_hf(hf), hf_logits(hf, inputs)
    assert off(before(inputs), logits) <= BFLOAT
    after = HookedLLaVA.from_hf(hf)
    assert off(after(inputs), logits) <= BFLOAT
    assert off(after.blocks[1].attn.W_Q, before.blocks[1].attn.W_Q) <= BFLOAT
    assert off(before(inputs), ours("tiny-shapes", bits)(inputs)) <= 1e-6, "not disturbed by what transformers did"


@every_case
def test_the_same_weights_are_packed_into_the_same_codes(name: str, bits: str) -> None:
    hf = AutoModelForImageTextToText.from_pretrained(resolve(name), quantization_config=config(bits))
    shared, own = HookedLLaVA.from_hf(hf).state_dict(), ours(name, bits).state_dict()
    assert own.keys() == shared.keys()
    for key, tensor in own.items():
        assert torch.equal(tensor, shared[key]), key
        assert tensor.dtype == shared[key].dtype, key
    packed = {type(linear) for linear in quantized_linears(ours(name, bits)).values()}
    assert packed == {Linear8Bit if "8" in bits else Linear4Bit}
    assert type(ours(name, bits).unembed) is nn.Linear


@both
def test_layers_may_be_left_out(bits: str) -> None:
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    given = BitsAndBytesConfig(**CONFIGS[bits], llm_int8_skip_modules=kept)
    model = HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=given)
    paths = list(quantized_linears(model))
    assert len(paths) == 7 * model.cfg.n_layers
    assert all(path.startswith("language.blocks") for path in paths)
    _, cache = model.run_with_cache(asked(model), names_filter="projector.hook_out")
    _, fine = plain("tiny-shapes").run_with_cache(asked(plain("tiny-shapes")), names_filter="projector.hook_out")
    assert torch.equal(cache["projector.hook_out"], fine["projector.hook_out"])


@both
def test_storage_is_shared(bits: str) -> None:
    hf = AutoModelForImageTextToText.from_pretrained(resolve("tiny-shapes"), quantization_config=config(bits))
    model = HookedLLaVA.from_hf(hf)
    linear, layer = model.blocks[0].mlp.up, hf.model.language_model.layers[0].mlp.up_proj
    assert isinstance(linear, Linear8Bit | Linear4Bit)
    assert linear.codes.data_ptr() == layer.weight.data_ptr()
    model.to(torch.bfloat16)
    assert layer.weight.dtype == linear.codes.dtype
    assert hf.dtype == torch.float32


# ---------------------------------------------------------------------- what is kept and what is read


@every_config
def test_weights_are_dequantized_views_in_transformer_lens_orientation(bits: str) -> None:
    model, hf, fine = ours("tiny-shapes", bits), theirs("tiny-shapes", bits), plain("tiny-shapes")
    layer, block = hf.model.language_model.layers[2], model.blocks[2]
    for name, theirs_, own, whole in (
        ("q", layer.self_attn.q_proj, block.attn.W_Q.transpose(1, 2).flatten(0, 1), fine.blocks[2].attn.W_Q),
        ("o", layer.self_attn.o_proj, block.attn.W_O.flatten(0, 1).T, fine.blocks[2].attn.W_O),
        ("in", layer.mlp.up_proj, block.mlp.W_in.T, fine.blocks[2].mlp.W_in),
        ("out", layer.mlp.down_proj, block.mlp.W_out.T, fine.blocks[2].mlp.W_out),
    ):
        eye = torch.eye(theirs_.in_features, requires_grad=True)  # with gradients it multiplies dequantized weights
        product = theirs_(eye[None])[0].detach().T
        assert off(own, product) <= (BFLOAT if "8" in bits or "nested" in bits else 1e-6), name
        assert own.dtype == whole.dtype == torch.float32
    assert block.attn.W_Q.shape == fine.blocks[2].attn.W_Q.shape
    error = off(model.W_in, fine.W_in)
    assert 1e-4 < error < (0.01 if "8" in bits else 0.25)
    assert model.OV[2, 1].AB.shape == (model.cfg.d_model, model.cfg.d_model)
    assert model.tl_parameters()["blocks.2.attn.W_V"].shape == block.attn.W_V.shape


@every_case
def test_a_loaded_model_takes_its_packed_size(name: str, bits: str) -> None:
    model, fine = ours(name, bits), plain(name)
    packed = quantized_linears(model)
    n = sum(linear.in_features * linear.out_features for linear in packed.values())
    kept = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    rest = sum(t.nbytes for path, t in fine.named_parameters() if path.removesuffix(".weight") not in packed)
    rows, blocks = sum(linear.out_features for linear in packed.values()), n / 64
    scales = {"8 bits": 4 * rows, "nf4": 4 * blocks, "fp4": 4 * blocks}.get(bits.split(",", maxsplit=1)[0], 0)
    if "nested" in bits:
        scales = blocks + 4 * sum(1 + 256 + -(-x.in_features * x.out_features // 64 // 256) for x in packed.values())
    levels = 0 if "8" in bits else 4 * 16 * len(packed)
    assert kept == rest + (n if "8" in bits else n // 2) + scales + levels
    assert n > 0.9 * sum(p.numel() for p in fine.parameters())


@every_config
def test_the_packed_size_is_known_without_loading(bits: str) -> None:
    hf_config = plain("tiny-shapes").hf_config
    blank = HookedLLaVA.build(
        plain("tiny-shapes").config, device="meta", hf_config=hf_config, quantization=Quantization(config(bits))
    )
    expected = ours("tiny-shapes", bits).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in blank.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@both
def test_moved_and_cast_the_codes_stay(bits: str) -> None:
    model = copy.deepcopy(ours("tiny-shapes", bits))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coarse = model.to(torch.bfloat16)
    inputs = asked(coarse)
    assert coarse.cfg.dtype == coarse.blocks[0].attn.W_Q.dtype == coarse(inputs).dtype == torch.bfloat16
    for path, linear in quantized_linears(coarse).items():
        for name, tensor in linear.state_dict().items():
            if name != "bias":
                assert torch.equal(tensor, before[f"{path}.{name}"])
                assert tensor.dtype == before[f"{path}.{name}"].dtype
    assert off(coarse(inputs).float(), ours("tiny-shapes", bits)(inputs)) <= 0.1
    assert "bits" in repr(model)
    n_weights = "/".join(repr(model).split())
    assert n_weights.count(f"{sum(p.numel() for p in plain('tiny-shapes').parameters()):,}") == 1


def test_a_packed_weight_of_another_kind_is_refused() -> None:
    eight, four = ours("tiny-shapes", "8 bits").blocks[0].mlp.up, ours("tiny-shapes", "nf4").blocks[0].mlp.up
    down = ours("tiny-shapes", "nf4").blocks[0].mlp.down
    assert isinstance(eight, QuantizedLinear)
    assert isinstance(four, QuantizedLinear)
    assert isinstance(down, QuantizedLinear)
    with pytest.raises(CheckpointError, match=r"\[384, 128\].*int8.*SCB.*uint8"):
        copy.deepcopy(eight).keep_weight(four.packed())
    with pytest.raises(CheckpointError, match=r"\[384, 128\].*quant_state.*SCB"):
        copy.deepcopy(four).keep_weight(eight.packed())
    with pytest.raises(CheckpointError, match=r"\[384, 128\].*\(128, 384\)"):
        copy.deepcopy(four).keep_weight(down.packed())
    short = PackedWeight({**eight.packed().parts, "weight": eight.packed().parts["weight"][:5]}, torch.float32)
    with pytest.raises(CheckpointError, match=r"\[384, 128\].*\(5, 128\)"):
        copy.deepcopy(eight).keep_weight(short)


# ---------------------------------------------------------------------- hooks, Replay, analyses


@both_models
def test_every_hook_fires_and_reading_changes_nothing(name: str, bits: str) -> None:
    model = ours(name, bits)
    inputs = asked(model)
    bare = model(inputs)
    _, cache = model.run_with_cache(inputs, names_filter=list(model.hook_dict))
    assert set(cache) == set(model.hook_dict)
    for hook in [hook.name for hook in model.hooks_table.hooks.values() if hook.layer in (None, 1)]:
        logits, _ = model.run_with_cache(inputs, names_filter=hook)
        assert logits is not None
        near = (
            "pattern" in hook or "scores" in hook or "scale" in hook or "normalized" in hook
        )  # not in one fused kernel
        assert off(logits, bare) <= ((EIGHT_BITS if "8" in bits else 1e-5) if near else 0), hook
    summed = cache["result", 3].sum(2)
    assert off(summed, cache["attn_out", 3]) <= (EIGHT_BITS if "8" in bits else 1e-5)


@both_models
@torch.no_grad()
def test_replay_equals_the_full_run(name: str, bits: str) -> None:
    model = ours(name, bits)
    inputs = asked(model)
    n, d_model = inputs.shape[1], model.cfg.d_model
    push = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    runs = [
        [Intervention(("resid_pre", 2), positions=[n - 4, n - 2], add=push)],
        [Intervention(("z", 1), positions="last", heads=[1], zero=True)],
        [Intervention(("result", 3), positions=[n - 3], zero=True)],
        [Intervention(("q_input", 2), positions=[n - 3], add=push)],
        [Intervention(("mlp_out", 4), positions=[n - 3], zero=True)],
        [Intervention("blocks.1.attn.hook_attn_scores", block=("image", "last"))],
        [Intervention("vision.blocks.0.hook_mlp_out", positions=[1, 2], zero=True)],
        [Intervention("hook_image_embed", positions=[1], zero=True)],
    ]
    fast, plain_ = Replay(model, inputs).run(runs, positions=list(range(n)), progress=False), model(inputs)
    for run, own in zip(runs, fast, strict=True):
        slow = model.run_with_hooks(inputs, fwd_hooks=run)
        assert slow is not None
        assert off(own, slow[0]) <= (EIGHT_BITS if "8" in bits else 1e-5), run
        assert off(slow, plain_) > 1e-3, f"{run} changes nothing"


@both
def test_gradients_are_those_of_the_dequantized_weight(bits: str) -> None:
    linear = ours("tiny-shapes", bits).blocks[1].mlp.up
    x = torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    pull = torch.randn(2, 3, linear.out_features, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((linear(x) * pull).sum(), x)
    assert off(gradient, pull @ linear.weight) <= 1e-5
    assert linear(x[:, :0]).shape == (2, 0, linear.out_features)


def _analyses(model: HookedLLaVA) -> dict[str, Any]:
    prompts = asked(model), asked(model, "five-shapes")
    return all_analyses(model, *prompts)


FROM_SMALL_DIFFERENCES = (
    "trace",
    "ablated",
    "occlusion",
    "signs",
    "map",
    "estimate",
    "deleted",
    "circuit",
    "yes and no",
)
PROBABILITIES = ("lowered_by", "indirect_effect")
SLOW = ("integrated_gradients", "deleted tokens", "paths of MLPs")  # variants of others


@both
@pytest.mark.slow
def test_every_analysis_runs_and_says_what_it_says_of_the_dequantized_model(bits: str) -> None:
    """The same analyses of a plain model whose weights are the dequantized ones; in 8 bits activations are rounded besides."""
    model = ours("tiny-shapes", bits)
    whole = dequantized(model)
    expected = _analyses(whole)
    assert len(expected) > 55
    wrong = {}
    for what, run in _analyses(model).items():
        if any(word in what for word in SLOW):
            continue
        fine = numbers(expected[what]())
        for key, found in numbers(run()).items():
            assert np.isfinite(found).any(), (what, key)
            if (what, key) in CHOSEN_BY_ITSELF:
                continue
            largest = float(np.nanmax(np.abs(fine[key]), initial=0.0)) or 1.0
            difference = float(np.nanmax(np.abs(found - fine[key]), initial=0.0))
            bound = 1e-5 if bits == "nf4" else 0.3 if what.startswith(FROM_SMALL_DIFFERENCES) else 0.15
            if difference > bound * largest and not (key in PROBABILITIES and difference < 1e-3):
                wrong[what, key] = difference, largest
    assert not wrong


def dequantized(model: HookedLLaVA) -> HookedLLaVA:
    """A model of plain linear maps with the dequantized weights."""
    whole = copy.deepcopy(plain("tiny-shapes"))
    for path, linear in quantized_linears(model).items():
        whole.get_submodule(path).weight.data.copy_(linear.weight)
    return whole


# ---------------------------------------------------------------------- identity, edits, files


@both
def test_which_weights_they_are(bits: str) -> None:
    model, fine = ours("tiny-shapes", bits), plain("tiny-shapes")
    again = HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config(bits))
    assert weights_hash(model) == weights_hash(again) != weights_hash(fine)
    assert weights_stamp(model) == weights_stamp(again) != weights_stamp(fine)
    known = WeightsId.of(dict(model.named_parameters()))
    assert known.fits(dict(again.named_parameters()))
    assert not known.fits(dict(fine.named_parameters()))
    linear = again.blocks[0].mlp.up
    assert isinstance(linear, Linear8Bit | Linear4Bit)
    version = weights_version(again)
    linear.codes[0, 0] += 1
    assert weights_version(again) != version
    assert weights_hash(again) != weights_hash(model), "one code changed"
    assert not known.fits(dict(again.named_parameters()))


@both
def test_edits_are_refused_before_anything_is_computed(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fine = ours("tiny-shapes", bits), plain("tiny-shapes")
    request = EditRequest("Who made the star?", "Boris")
    made = multedit(fine, request, layer=4, position="last")
    covariance = key_covariance(fine, [fine.prepare("Who made the star?")], layer=3)

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(HookedLLaVA, "forward", nothing)
    monkeypatch.setattr(HookedLLaVA, "embed", nothing)
    wants = rf"tiny-shapes.*74 matrices.*in {bits[0] if '8' in bits else 4} bits.*quantization_config"
    for edit in (
        lambda: multedit(model, request, layer=4, position="last"),
        lambda: multedit(model, request),
        lambda: rome(model, request, covariance, position="last"),
        lambda: finetune(model, request, layers=4),
        lambda: edit_sweep(model, request, positions=["last"]),
        lambda: key_covariance(model, [request.question], layer=3),
        lambda: type(made)(model, made.changes),
    ):
        with pytest.raises(InputError, match=wants):
            edit()


@every_case
def test_saved_they_load_here_and_in_transformers(name: str, bits: str, tmp_path: Path) -> None:
    model = ours(name, bits)
    model.save_pretrained(tmp_path / "own")
    again = HookedLLaVA.from_pretrained(tmp_path / "own")
    inputs = asked(model)
    assert torch.equal(again(inputs), model(inputs))
    assert weights_hash(again) == weights_hash(model)
    _same(HookedLLaVA.from_hf(AutoModelForImageTextToText.from_pretrained(tmp_path / "own")), model)
    hf = AutoModelForImageTextToText.from_pretrained(resolve(name), quantization_config=config(bits))
    hf.save_pretrained(tmp_path / "theirs")
    loaded = HookedLLaVA.from_pretrained(tmp_path / "theirs")
    _same(loaded, model)
    assert loaded.cfg.dtype == torch.float32
    sizes = sum(tensor.nbytes for tensor in stored_state(model).values())
    on_disk = sum(file.stat().st_size for file in (tmp_path / "own").glob("*.safetensors"))
    assert sizes <= on_disk < 1.1 * sizes


def _same(found: HookedLLaVA, expected: HookedLLaVA) -> None:
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
