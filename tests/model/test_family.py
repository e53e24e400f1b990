"""Every language model with every vision tower: parity with Hugging Face, generation, hooks, loading and saving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hooked_llava.errors import HookNameError
from hooked_llava.loading.sharing import share_weights
from hooked_llava.model.components.block import Block, ParallelBlock
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.pairs import FAMILY, FP32, Pair, assert_same_streams, batch, counted_positions, off, pair

each_of_the_family = pytest.mark.parametrize("name", FAMILY)
each_language = pytest.mark.parametrize("name", [name for name in FAMILY if name.endswith("clip")])
N_NEW = 6


def rows(models: Pair) -> list[dict[str, Tensor]]:
    return [models.prompt(n_images=n, n_text=t, seed=n) for n, t in ((2, 4), (0, 6), (1, 9))]


@each_of_the_family
@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_every_layer_and_the_logits_equal_hugging_face(name: str, n_images: int) -> None:
    models = pair(name)
    prompt = models.prompt(n_images=n_images, batch=2)
    assert_same_streams(models, prompt)
    assert models.ours.verify(models.hf, prompt).ok


@each_of_the_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_hugging_face_and_the_prompt_alone(name: str, side: Any) -> None:
    models = pair(name)
    prompt = batch(rows(models), side)
    assert_same_streams(models, prompt | {"position_ids": counted_positions(prompt["attention_mask"])})
    logits = models.ours(**prompt)
    assert logits.isfinite().all()
    for row, alone, mask in zip(logits, rows(models), prompt["attention_mask"].bool(), strict=True):
        assert off(row[mask], models.ours(**alone)[0]) <= FP32


@each_of_the_family
def test_greedy_generation_is_hugging_faces_token_by_token(name: str) -> None:
    models = pair(name)
    for prompt in (models.prompt(batch=2), batch(rows(models), "left")):
        theirs = models.hf.generate(**prompt, max_new_tokens=N_NEW, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        ours = models.ours.generate(prompt, max_new_tokens=N_NEW, return_type="tokens")
        assert torch.equal(ours, theirs)


@each_of_the_family
def test_every_hook_fires_with_the_shape_of_the_table_and_changes_nothing(name: str) -> None:
    model = pair(name).ours
    prompt = pair(name).prompt(batch=2)
    logits, cache = model.run_with_cache(prompt, names_filter=lambda _: True)
    assert list(cache) != []
    assert set(cache) == set(model.hooks_table.names) == set(model.hook_dict)
    for hook, tensor in cache.items():
        assert tensor.ndim == len(model.hooks_table[hook].axes), hook
    assert off(logits, model(prompt)) <= FP32


@each_of_the_family
def test_a_saved_model_loads_in_transformers_and_here(name: str, tmp_path: Path) -> None:
    models = pair(name)
    prompt = models.prompt()
    models.ours.save_pretrained(tmp_path / "ours")
    again = HookedLLaVA.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(prompt), models.ours(prompt))
    assert again.config == replace(models.ours.config, model_name=again.config.model_name)
    if not models.ours.config.language.unembed_bias:  # transformers' head has none
        theirs, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(theirs(**prompt).logits, models.hf_logits(prompt))
    models.hf.save_pretrained(tmp_path / "theirs")
    assert torch.equal(HookedLLaVA.from_pretrained(tmp_path / "theirs")(prompt), models.ours(prompt))


@each_of_the_family
def test_storage_is_shared(name: str) -> None:
    models = pair(name)
    theirs = {parameter.data_ptr() for parameter in models.hf.parameters()}
    assert {parameter.data_ptr() for parameter in models.ours.parameters()} == theirs


@pytest.mark.parametrize("head", [True, False])
def test_siglips_pooling_head_is_kept_to_be_saved(head: bool, tmp_path: Path) -> None:
    hf = make_hf_model(tower="siglip", vision={"vision_use_head": head})
    model = HookedLLaVA.from_hf(hf)
    model.save_pretrained(tmp_path / "saved")
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
    assert any(".head." in name for name in saved) == head
    assert all(torch.equal(saved[name], tensor) for name, tensor in hf.state_dict().items())
    assert not [name for name in model.hooks_table.names if name.startswith(("vision.ln_p", "vision.head"))]


@pytest.mark.parametrize(("name", "layers"), [("mistral-clip", [0, 1, 2]), ("qwen2-clip", [1, 2])])
def test_windows_limit_the_keys_of_their_layers(name: str, layers: list[int]) -> None:
    model = pair(name).ours
    config = model.config
    window = config.language.window
    prompt = pair(name).prompt()
    logits, cache = model.run_with_cache(prompt, names_filter="pattern")
    for layer in range(3):
        n_seen = (cache["pattern", layer] > 0).sum(-1).max()
        assert n_seen == (window if layer in layers else prompt["input_ids"].shape[1])
    without = HookedLLaVA.build(replace(config, language=replace(config.language, window=None)), device="meta")
    share_weights(without, pair(name).hf, without.config)
    assert off(without(prompt)[:, :window], logits[:, :window]) <= FP32
    assert off(without(prompt)[:, window:], logits[:, window:]) > 0.01
    assert window is not None
    assert model.context(torch.zeros(1, window, model.cfg.d_model)).windowed is None


def test_a_parallel_block_has_no_stream_between_attention_and_mlp() -> None:
    model = pair("phi-siglip").ours
    assert all(isinstance(block, ParallelBlock) for block in model.blocks)
    assert all(isinstance(block, Block) for block in model.vision.blocks)
    _, cache = model.run_with_cache(pair("phi-siglip").prompt())
    for layer in range(3):
        parts = cache["resid_pre", layer] + cache["attn_out", layer] + cache["mlp_out", layer]
        assert torch.allclose(parts, cache["resid_post", layer], atol=1e-5)
    for gone in ("resid_mid", "blocks.1.hook_mlp_in", ("mlp_in", 1), "blocks.*.ln2.*", "ln2.hook_scale"):
        with pytest.raises(HookNameError, match=r"side by side.*resid_pre.*ln1\.hook_normalized"):
            model.run_with_cache(pair("phi-siglip").prompt(), names_filter=gone)
    assert len(model.hooks_table.resolve("vision.resid_mid")) == 3


def test_the_bias_of_the_unembedding_counts() -> None:
    models = pair("phi-clip")
    assert torch.equal(models.ours.b_U, models.hf.lm_head.bias)
    prompt = models.prompt()
    stream = models.ours.run_with_cache(prompt, names_filter="ln_final.hook_normalized")[1]["ln_final.hook_normalized"]
    unbiased = models.ours.ln_final.w * stream + models.ours.ln_final.b
    assert off(unbiased @ models.ours.W_U + models.ours.b_U, models.hf_logits(prompt)) <= FP32
    assert models.ours.b_U.abs().max() > 0.1
