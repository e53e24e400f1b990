"""LLaVACache: names, views, files, and TransformerLens's decompositions on it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_llava.errors import CheckpointError, HookNameError, SpanError
from hooked_llava.model.cache import LLaVACache
from tests.pairs import batch, off, pair

SUM = 1e-10
"""Everything here is float64."""
MODELS = pair("biases", torch.float64)
OURS = MODELS.ours
N_LAYERS = OURS.cfg.n_layers
PROMPT = batch([MODELS.prompt(n_text=3), MODELS.prompt(n_text=6, n_images=2, seed=1)], "left")
REAL = PROMPT["attention_mask"].bool()
LOGITS, CACHE = OURS.run_with_cache(PROMPT)
SINGLE = MODELS.prompt()


def with_names(names: Any = None, prompt: Any = PROMPT, **options: Any) -> LLaVACache:
    return OURS.run_with_cache(prompt, names_filter=names, **options)[1]


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
        (("z", 1), "blocks.1.attn.hook_z"),
        (("pattern", -1), "blocks.2.attn.hook_pattern"),
        (("resid_post", -3), "blocks.0.hook_resid_post"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("attn", 0), "blocks.0.attn.hook_pattern"),
        (("mlp_in", 0), "blocks.0.hook_mlp_in"),
        ("embed", "hook_embed"),
        ("q1", "blocks.1.attn.hook_q"),
        ("projector.hook_out", "projector.hook_out"),
        ("vision.blocks.0.hook_resid_pre", "vision.blocks.0.hook_resid_pre"),
    ],
)
def test_names_long_and_short(key: Any, name: str) -> None:
    assert CACHE[key] is CACHE.cache_dict[name]


def test_large_activations_by_any_of_their_names() -> None:
    cache = with_names(["q_input", "result", "vision.k_input"])
    assert cache["q_input", 1] is cache["blocks.1.hook_q_input"] is cache["blocks.1.attn.hook_q_input"]
    assert cache["vision.blocks.0.hook_k_input"].shape[0] == 3
    assert cache.vision["k_input", -1] is cache["vision.blocks.1.attn.hook_k_input"]
    assert cache["result", -1].shape[2] == OURS.cfg.n_heads


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("blocks.0.hook_resid_pots", "hook_resid_pots.*cache.* Did you mean: blocks.0.hook_resid_post"),
        (("result", 0), "'result 0'.*cache.*names_filter"),
        (("pattern", 7), "'pattern 7'.*cache"),
        ("vision.pattern", r"'vision\.pattern'.*cache"),
    ],
)  # fmt: skip
def test_what_was_not_cached_is_refused(key: Any, match: str) -> None:
    with pytest.raises(HookNameError, match=match):
        CACHE[key]
    with pytest.raises(KeyError):
        CACHE[key]


def test_it_is_a_mapping_and_prints_short() -> None:
    assert len(CACHE) == len(list(CACHE)) == len(CACHE.keys())
    assert "hook_embed" in CACHE
    assert "hook_embd" not in CACHE
    assert re.fullmatch(r"LLaVACache\(1 activations, [\d.e-]+ GB\)", repr(with_names("hook_embed")))


# ---------------------------------------------------------------------- views


def test_the_vision_view_has_the_towers_own_names() -> None:
    assert torch.equal(CACHE.vision["pattern", 1], CACHE["vision.blocks.1.attn.hook_pattern"])
    assert torch.equal(CACHE.vision["resid_post", -1], CACHE["vision.blocks.1.hook_resid_post"])
    assert torch.equal(CACHE.vision["hook_out"], CACHE["vision.hook_out"])
    assert set(CACHE.vision) == {name.removeprefix("vision.") for name in CACHE if name.startswith("vision.")}
    with pytest.raises(HookNameError, match=r"vision tower.*'vision\.\*' in names_filter"):
        _ = with_names("z").vision


@pytest.mark.parametrize("view", ["image", "text"])
@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_image_and_text_views_are_cut_to_their_positions(view: str, remove_batch_dim: bool) -> None:
    cache = with_names("*", SINGLE, remove_batch_dim=remove_batch_dim)
    chosen = OURS.as_inputs(SINGLE).token_map[view].tolist()
    cut = getattr(cache, view)
    assert set(cut) == {n for n in cache if not n.startswith(("vision.", "projector.", "hook_image_embed"))}
    for name, tensor in cut.items():
        whole = cache[name]
        if name.endswith(("scores", "pattern")):
            expected = whole[..., chosen]
        else:
            expected = whole[chosen] if remove_batch_dim else whole[:, chosen]
        assert torch.equal(tensor, expected), name
    assert torch.equal(cut["resid_post", -1], cut["blocks.2.hook_resid_post"])
    total = cut.decompose_resid().sum(0)
    assert off(total, cut["resid_post", -1]) < SUM


def test_views_of_gradients() -> None:
    cache = with_names("resid_mid", SINGLE, incl_bwd=True, return_type="loss")
    assert cache.image["blocks.1.hook_resid_mid_grad"].shape[1] == 4


def test_views_need_the_same_positions_in_every_row() -> None:
    with pytest.raises(SpanError, match="image positions.*prompts"):
        _ = CACHE.image
    with pytest.raises(SpanError, match="no text positions.*only some positions"):
        _ = with_names(None, SINGLE, positions="last").text
    assert with_names("z", MODELS.prompt(batch=2)).image["z", 0].shape[1] == 4
    text_only = with_names("z", MODELS.prompt(n_images=0))
    assert torch.equal(text_only.text["z", 0], text_only["z", 0])
    with pytest.raises(SpanError, match="no image positions"):
        _ = text_only.image


# ---------------------------------------------------------------------- files


def test_a_saved_cache_is_read_back_whole(tmp_path: Path) -> None:
    cache = with_names("*", SINGLE, remove_batch_dim=True)
    shared = {tensor.untyped_storage().data_ptr() for tensor in cache.values()}
    assert len(shared) < len(cache), "neighbors share storage, which the file format refuses"
    cache.save(tmp_path / "run.safetensors")
    again = LLaVACache.load(tmp_path / "run.safetensors", OURS)
    assert set(again) == set(cache)
    assert all(torch.equal(again[name], cache[name]) and again[name].dtype == cache[name].dtype for name in cache)
    assert again.has_batch_dim is False
    assert torch.equal(again.image["resid_post", 1], cache.image["resid_post", 1])
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"], "nothing half-written stays"


def test_bfloat16_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = pair("grouped", torch.bfloat16)
    _, cache = models.ours.run_with_cache(models.prompt(), names_filter="z")
    cache.save("z.safetensors")
    assert LLaVACache.load("z.safetensors", models.ours)["z", 0].dtype == torch.bfloat16


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.safetensors"
    with_names("z").save(path)
    before = path.read_bytes()

    def fail(_tensors: Any, filename: str, **_options: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("hooked_llava.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        with_names("*").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(
        CheckpointError, match="other.safetensors holds 'no known format'; expected 'hooked_llava.cache.v1'"
    ):
        LLaVACache.load(tmp_path / "other.safetensors", OURS)
    with pytest.raises(CheckpointError, match="text.safetensors.*file"):
        LLaVACache.load(tmp_path / "text.safetensors", OURS)
    with pytest.raises(CheckpointError, match="not a readable"):
        LLaVACache.load(tmp_path / "missing.safetensors", OURS)


# ---------------------------------------------------------------------- decompositions (TransformerLens's methods)


@pytest.mark.parametrize("remove_batch_dim", [False, True])
@pytest.mark.parametrize("pos_slice", [None, -1, (2, 5)])
def test_streams_and_their_parts(remove_batch_dim: bool, pos_slice: Any) -> None:
    cache = with_names(None, SINGLE, remove_batch_dim=True) if remove_batch_dim else CACHE
    where = slice(*pos_slice) if isinstance(pos_slice, tuple) else slice(None) if pos_slice is None else pos_slice

    def cut(tensor: Tensor) -> Tensor:
        return tensor[..., where, :]

    streams, labels = cache.accumulated_resid(incl_mid=True, pos_slice=pos_slice, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert torch.equal(streams[3], cut(cache["resid_mid", 1]))
    assert torch.equal(streams[-1], cut(cache["resid_post", -1]))
    parts, labels = cache.decompose_resid(pos_slice=pos_slice, return_labels=True)
    assert labels == ["embed", *(f"{i}_{part}" for i in range(N_LAYERS) for part in ("attn_out", "mlp_out"))]
    assert off(parts.sum(0), streams[-1]) < SUM
    assert off(cache.decompose_resid(2, pos_slice=pos_slice).sum(0), cut(cache["resid_pre", 2])) < SUM
    assert off(cache.decompose_resid(1, mlp_input=True, pos_slice=pos_slice).sum(0), cut(cache["resid_mid", 1])) < SUM


def test_the_final_streams_lens_is_the_model() -> None:
    last = CACHE.accumulated_resid(apply_ln=True)[-1]
    assert off((last @ OURS.W_U)[REAL], LOGITS[REAL]) < SUM


@pytest.mark.parametrize("cached", [True, False], ids=["result cached", "result computed"])
@pytest.mark.parametrize("pos_slice", [None, -1])
def test_head_results_sum_to_attention_out_less_its_bias(cached: bool, pos_slice: Any) -> None:
    cache = with_names("*") if cached else with_names()
    heads, labels = cache.stack_head_results(pos_slice=pos_slice, return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(OURS.cfg.n_heads)]
    by_layer = heads.unflatten(0, (N_LAYERS, -1)).sum(1)
    for layer in range(N_LAYERS):
        out = cache["attn_out", layer] - OURS.blocks[layer].attn.b_O
        assert off(by_layer[layer], out if pos_slice is None else out[:, -1]) < SUM
    with_rest = cache.stack_head_results(pos_slice=pos_slice, incl_remainder=True)
    final = cache["resid_post", -1]
    assert off(with_rest.sum(0), final if pos_slice is None else final[:, -1]) < SUM


def test_the_result_that_was_cached_is_the_one_that_is_computed() -> None:
    cached, computed = with_names("*"), with_names()
    computed.stack_head_results()
    for layer in range(N_LAYERS):
        assert off(computed["result", layer], cached["result", layer]) < SUM


@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_attributions_sum_to_the_logit(remove_batch_dim: bool) -> None:
    prompt = SINGLE if remove_batch_dim else PROMPT
    logits, cache = OURS.run_with_cache(prompt, remove_batch_dim=remove_batch_dim)
    logits = logits[0] if remove_batch_dim else logits
    parts = cache.decompose_resid()
    every_position = cache.logit_attrs(parts, 17, has_batch_dim=not remove_batch_dim).sum(0)
    real = REAL if not remove_batch_dim else torch.ones_like(logits[..., 0], dtype=torch.bool)
    assert off(every_position[real], logits[..., 17][real]) < SUM, "image positions included"
    last = cache.decompose_resid(pos_slice=-1)
    difference = cache.logit_attrs(last, 17, 23, pos_slice=-1, has_batch_dim=not remove_batch_dim).sum(0)
    assert off(difference, logits[..., -1, 17] - logits[..., -1, 23]) < SUM


def test_attributions_of_each_rows_own_answer() -> None:
    answers = LOGITS[:, -1].argmax(-1)
    for parts in (CACHE.decompose_resid(pos_slice=-1), CACHE.get_full_resid_decomposition(pos_slice=-1)):
        by_row = CACHE.logit_attrs(parts, answers, pos_slice=-1).sum(0)
        assert off(by_row, LOGITS[range(2), -1, answers]) < SUM
    one_row = CACHE.logit_attrs(CACHE.decompose_resid(), 17, batch_slice=1).sum(0)
    assert off(one_row, LOGITS[1, :, 17]) < SUM


def test_the_norm_is_applied_to_parts_as_to_the_whole() -> None:
    parts = CACHE.apply_ln_to_stack(CACHE.decompose_resid())
    normalized = CACHE["ln_final.hook_normalized"]
    assert off(parts.sum(0)[REAL], normalized[REAL]) < SUM
    into_mlp = CACHE.apply_ln_to_stack(CACHE.decompose_resid(1, mlp_input=True), layer=1, mlp_input=True)
    assert off(into_mlp.sum(0)[REAL], CACHE["blocks.1.ln2.hook_normalized"][REAL]) < SUM


def test_neurons_sum_to_the_mlps_output_less_its_bias() -> None:
    neurons, labels = CACHE.stack_neuron_results(2, pos_slice=-1, return_labels=True)
    assert len(labels) == len(neurons) == 2 * OURS.cfg.d_mlp
    per_layer = neurons.unflatten(0, (2, -1)).sum(1)
    for layer in range(2):
        assert off(per_layer[layer], CACHE["mlp_out", layer][:, -1] - OURS.blocks[layer].mlp.b_out) < SUM
    some = CACHE.stack_neuron_results(2, pos_slice=-1, neuron_slice=(3, 5), incl_remainder=True)
    assert off(some.sum(0), CACHE["resid_post", 1][:, -1]) < SUM


@pytest.mark.parametrize("expand_neurons", [True, False])
@pytest.mark.parametrize(
    ("layer", "mlp_input", "target"), [(None, False, ("resid_post", -1)), (1, True, ("resid_mid", 1))]
)
def test_the_full_decomposition_is_complete(
    expand_neurons: bool, layer: int | None, mlp_input: bool, target: Any
) -> None:
    parts, labels = CACHE.get_full_resid_decomposition(
        layer, mlp_input=mlp_input, expand_neurons=expand_neurons, return_labels=True
    )
    assert labels[-2:] == ["embed", "bias"]
    assert len(parts) == len(labels)
    assert off(parts.sum(0), CACHE[target]) < SUM


def test_the_full_decomposition_projected_onto_an_answer() -> None:
    direction = OURS.tokens_to_residual_directions(17)
    parts = CACHE.get_full_resid_decomposition(apply_ln=True, pos_slice=-1, project_output_onto=direction)
    assert off(parts.sum(0), LOGITS[:, -1, 17]) < SUM


def test_the_vision_towers_decompositions() -> None:
    view, n_run = CACHE.vision, OURS.config.vision.n_layers_run
    parts, labels = view.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    assert off(parts.sum(0), view["resid_post", n_run - 1]) < SUM
    assert off(view.accumulated_resid()[-1], view["resid_post", n_run - 1]) == 0
    heads = view.stack_head_results().unflatten(0, (n_run, -1)).sum(1)
    for layer in range(n_run):
        assert off(heads[layer], view["attn_out", layer] - OURS.vision.blocks[layer].attn.b_O) < SUM
    assert off(view.get_full_resid_decomposition().sum(0), view["resid_post", n_run - 1]) < SUM
    into_mlp = view.decompose_resid(1, mlp_input=True, apply_ln=True)
    assert off(into_mlp.sum(0), view["blocks.1.ln2.hook_normalized"]) < SUM


def test_stacks_slices_and_moves() -> None:
    assert CACHE.stack_activation("pattern").shape[0] == N_LAYERS
    row = CACHE.apply_slice_to_batch_dim(1)
    assert torch.equal(row["resid_post", -1], CACHE["resid_post", -1][1])
    assert copy.copy(with_names("z")).to("meta")["z", 0].device.type == "meta"
