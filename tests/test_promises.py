"""Promises of the design that span modules: every hook fires, has the shape that the table says, and does what it says.

The judge is `tests.oracles.slow_llava`, a forward pass written from the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_llava.model.components import HookPoint
from tests.pairs import Pair, batch, off, pair

EXACT = 1e-6
"""Both sides compute in float64, but for the rotary angles."""
GEOMETRY = "grouped"


@functools.cache
def models() -> Pair:
    return pair(GEOMETRY, torch.float64)


@functools.cache
def padded_prompt() -> dict[str, Tensor]:
    """Two rows, padded on the left, with one and two images."""
    rows = [models().prompt(n_text=3), models().prompt(n_text=6, n_images=2, seed=1)]
    prompt = batch(rows, "left")
    assert not prompt["attention_mask"].all()
    return prompt


def sizes() -> dict[str, int]:
    """The axes of the table in numbers, from Hugging Face's config."""
    text, vision = models().hf.config.text_config, models().hf.config.vision_config
    batch_size, n_positions = padded_prompt()["input_ids"].shape
    return {
        "batch": batch_size, "pos": n_positions, "query": n_positions, "key": n_positions, "d_model": text.hidden_size,
        "head": text.num_attention_heads, "kv_head": text.num_key_value_heads, "d_mlp": text.intermediate_size,
        "d_head": text.hidden_size // text.num_attention_heads, "d_vocab": text.vocab_size, "1": 1,
        "image": 3, "tile": 3, "patch": 4, "feature": 4, "d_features": vision.hidden_size,
    }  # fmt: skip


def vision_sizes() -> dict[str, int]:
    vision = models().hf.config.vision_config
    return sizes() | {
        "pos": 5, "query": 5, "key": 5, "d_model": vision.hidden_size, "head": vision.num_attention_heads,
        "kv_head": vision.num_attention_heads, "d_mlp": vision.intermediate_size,
        "d_head": vision.hidden_size // vision.num_attention_heads,
    }  # fmt: skip


# ---------------------------------------------------------------------- every name fires


def test_the_hooks_of_the_model_are_the_table_and_no_others() -> None:
    ours = models().ours
    assert list(ours.hook_dict) == ours.hooks_table.names
    assert all(point.name == name for name, point in ours.hook_dict.items())
    elsewhere = [
        path
        for path, module in ours.named_modules()
        if isinstance(module, HookPoint) and path.removeprefix("language.") not in ours.hook_dict
    ]
    n_run = ours.config.vision.n_layers_run
    not_run = tuple(f"vision.blocks.{i}." for i in range(n_run, ours.config.vision.n_layers))
    assert elsewhere
    assert all(path.startswith((*not_run, "vision.ln_post.")) for path in elsewhere)


def test_every_hook_fires_once_with_the_tables_shape_and_the_oracles_values() -> None:
    ours = models().ours
    fired: list[str] = []
    with ours.hooks([("*", lambda tensor, hook: fired.append(hook.name))]):
        _, cache = ours.run_with_cache(**padded_prompt(), names_filter="*")
    assert fired == ours.hooks_table.names, "each once, in the order of the table"
    expected = models().slow.run(**padded_prompt())
    assert set(cache.keys()) == set(expected)
    for name in ours.hook_dict:
        n = vision_sizes() if name.startswith("vision.") else sizes()
        assert tuple(cache[name].shape) == tuple(n[axis] for axis in ours.hooks_table[name].axes), name
        assert torch.equal(cache[name] == -torch.inf, expected[name] == -torch.inf), name
        finite = expected[name].isfinite()
        assert off(cache[name][finite], expected[name][finite]) < EXACT, name


@pytest.mark.parametrize("geometry", ["full", "several_layers", "odd", "biases", "activations", "tied"])
def test_every_activation_is_the_oracles_in_other_geometries(geometry: str) -> None:
    others = pair(geometry, torch.float64)
    prompt = others.prompt(n_images=2)
    expected = others.slow.run(**prompt)
    _, cache = others.ours.run_with_cache(**prompt, names_filter="*")
    assert set(cache.keys()) == set(expected)
    for name, tensor in expected.items():
        finite = tensor.isfinite()
        assert off(cache[name][finite], tensor[finite]) < EXACT, name


def test_on_text_every_language_hook_fires() -> None:
    prompt = models().prompt(n_images=0)
    _, cache = models().ours.run_with_cache(**prompt, names_filter="*")
    expected = models().slow.run(**prompt)
    assert set(cache.keys()) == set(expected)


# ---------------------------------------------------------------------- edits do what they should


def edit_of(name: str) -> Callable[[Tensor], Tensor]:
    """Something different at every entry; a scale stays positive and a blocked edge blocked."""

    def edit(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name)), dtype=tensor.dtype)
        if name.endswith(("hook_scale", "hook_pattern")):
            return tensor * (0.5 + noise)
        return tensor + (noise - 0.3)

    return edit


def layer_one_and_what_is_not_in_blocks() -> list[str]:
    names = models().ours.hooks_table.names
    return [name for name in names if "blocks." not in name or "blocks.1." in name]


@pytest.mark.parametrize("name", layer_one_and_what_is_not_in_blocks())
def test_an_edit_changes_what_the_formulas_say(name: str) -> None:
    ours, edit = models().ours, edit_of(name)
    plain = ours(**padded_prompt())
    expected = models().slow.run(**padded_prompt(), edits={name: edit})
    with ours.hooks([(name, lambda tensor, hook: edit(tensor))]):
        logits, cache = ours.run_with_cache(**padded_prompt(), names_filter=["resid_post", "vision.resid_post"])
    real = padded_prompt()["attention_mask"].bool()
    assert off(logits[real], expected["hook_logits"][real]) < EXACT
    for other in cache:
        assert off(cache[other], expected[other]) < EXACT, other
    assert off(logits[real], plain[real]) > 1e-3, "the edit has no effect"


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z", "vision.blocks.0.hook_mlp_out", "blocks.2.attn.hook_k"])
def test_an_edit_with_everything_hooked_changes_the_same(name: str) -> None:
    """The explicit path through scores and results instead of the fused one."""
    ours, edit = models().ours, edit_of(name)
    expected = models().slow.run(**padded_prompt(), edits={name: edit})
    with ours.hooks([(name, lambda tensor, hook: edit(tensor))]):
        _, cache = ours.run_with_cache(**padded_prompt(), names_filter="*")
    for other, tensor in expected.items():
        finite = tensor.isfinite()
        assert off(cache[other][finite], tensor[finite]) < EXACT, other


def test_several_edits_at_once() -> None:
    names = ["hook_embed", "blocks.0.attn.hook_k_input", "blocks.1.attn.hook_attn_scores", "vision.hook_out"]
    hooks = [(name, lambda tensor, hook: edit_of(hook.name)(tensor)) for name in names]
    logits = models().ours.run_with_hooks(padded_prompt(), fwd_hooks=hooks)
    expected = models().slow.run(**padded_prompt(), edits={name: edit_of(name) for name in names})
    real = padded_prompt()["attention_mask"].bool()
    assert off(logits[real], expected["hook_logits"][real]) < EXACT


EVERYTHING_BUT_LARGE = None


def run(names_filter: Any, *hooks: Any) -> Any:
    with models().ours.hooks(list(hooks)):
        return models().ours.run_with_cache(**padded_prompt(), names_filter=names_filter)[1]


def test_mlp_in_reaches_only_the_mlp() -> None:
    before = run(EVERYTHING_BUT_LARGE)
    after = run(EVERYTHING_BUT_LARGE, ("blocks.1.hook_mlp_in", lambda x, hook: 2 * x + 1))
    for name in ("hook_attn_out", "hook_resid_mid", "attn.hook_z"):
        assert torch.equal(after[f"blocks.1.{name}"], before[f"blocks.1.{name}"]), name
    assert not torch.equal(after["mlp_out", 1], before["mlp_out", 1])
    assert torch.equal(after["resid_post", 1], after["resid_mid", 1] + after["mlp_out", 1])


@pytest.mark.parametrize("letter", ["q", "k", "v"])
@pytest.mark.parametrize("tower", ["", "vision."])
def test_an_input_of_one_head_reaches_only_that_heads_queries_keys_or_values(letter: str, tower: str) -> None:
    def edit(x: Tensor, hook: HookPoint) -> None:
        x[:, :, 1] += torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)

    layer = f"{tower}blocks.1."
    before = run(f"{layer}*")
    after = run(f"{layer}*", (f"{layer}attn.hook_{letter}_input", edit))
    for other in "qkv":
        a, b = after[f"{layer}attn.hook_{other}"], before[f"{layer}attn.hook_{other}"]
        if other != letter:
            assert torch.equal(a, b), other
        else:
            assert off(a[:, :, 1], b[:, :, 1]) > 0.01
            assert torch.equal(a[:, :, 0], b[:, :, 0])
            assert torch.equal(a[:, :, 2:], b[:, :, 2:])
    assert torch.equal(after[f"{layer}hook_resid_pre"], before[f"{layer}hook_resid_pre"])
    assert torch.equal(after[f"{layer}ln1.hook_normalized"], before[f"{layer}ln1.hook_normalized"])


def test_blocked_edges_leave_the_pattern_and_the_rest_sums_to_one() -> None:
    def block(scores: Tensor, hook: HookPoint) -> None:
        scores[:, 2, -1, 4:7] = -torch.inf

    before, after = run("pattern"), run("pattern", ("blocks.0.attn.hook_attn_scores", block))
    kept = before["pattern", 0].clone()
    kept[:, 2, -1, 4:7] = 0
    expected = kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)
    assert off(after["pattern", 0], expected) < 1e-12
    assert torch.equal(after["pattern", 0][:, 2, -1, 4:7], torch.zeros(2, 3, dtype=torch.float64))


def test_a_query_with_every_edge_blocked_attends_to_nothing() -> None:
    def block(scores: Tensor, hook: HookPoint) -> Tensor:
        scores[:, 1, -1] = -torch.inf
        return scores

    after = run(["pattern", "z", "logits"], ("blocks.1.attn.hook_attn_scores", block))
    assert after["pattern", 1][:, 1, -1].eq(0).all()
    assert after["z", 1][:, -1, 1].eq(0).all()
    assert after["hook_logits"].isfinite().all()


def test_queries_of_padding_have_pattern_and_z_zero() -> None:
    padding = ~padded_prompt()["attention_mask"].bool()
    explicit = run(["pattern", "z"])
    fused = run(["z"])
    for layer in range(models().ours.cfg.n_layers):
        assert explicit["pattern", layer].transpose(1, 2)[padding].eq(0).all()
        assert explicit["z", layer][padding].eq(0).all()
        assert fused["z", layer][padding].eq(0).all()
        real = explicit["pattern", layer].transpose(1, 2)[~padding]
        torch.testing.assert_close(real.sum(-1), torch.ones_like(real[..., 0]))


def test_an_edit_at_image_positions_of_the_embedding_changes_the_answer() -> None:
    prompt = models().ours.as_inputs(padded_prompt())

    def edit(x: Tensor, hook: HookPoint) -> None:
        x[prompt.image_mask] *= -1

    edited = models().ours.run_with_hooks(prompt, fwd_hooks=[("hook_embed", edit)])
    assert off(edited[:, -1], models().ours(prompt)[:, -1]) > 1e-3


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize("geometry", ["grouped", "biases", "several_layers"])
def test_the_stream_is_the_sum_of_its_parts(geometry: str) -> None:
    others = pair(geometry, torch.float64)
    prompt = batch([others.prompt(n_text=3), others.prompt(n_text=6, n_images=2)], "left")
    _, cache = others.ours.run_with_cache(**prompt, names_filter="*")
    for tower, n_layers in (("", others.ours.cfg.n_layers), ("vision.", others.ours.config.vision.n_layers_run)):
        total = cache[f"{tower}hook_embed"].clone()
        assert torch.equal(total, cache[f"{tower}blocks.0.hook_resid_pre"])
        for layer in range(n_layers):
            block = f"{tower}blocks.{layer}."
            result = cache[f"{block}attn.hook_result"].sum(2)
            blocks = others.ours.vision.blocks if tower else others.ours.blocks
            assert off(result + blocks[layer].attn.b_O, cache[f"{block}hook_attn_out"]) < 1e-12, "heads"
            neurons = cache[f"{block}mlp.hook_post"] @ blocks[layer].mlp.W_out + blocks[layer].mlp.b_out
            assert off(neurons, cache[f"{block}hook_mlp_out"]) < 1e-12, "neurons"
            total = total + cache[f"{block}hook_attn_out"] + cache[f"{block}hook_mlp_out"]
            assert off(total, cache[f"{block}hook_resid_post"]) < 1e-12


def test_image_embeddings_stand_at_the_image_positions_in_order() -> None:
    prompt = models().ours.as_inputs(padded_prompt())
    _, cache = models().ours.run_with_cache(prompt)
    assert torch.equal(cache["hook_embed"][prompt.image_mask], cache["hook_image_embed"].flatten(0, 1))
    assert torch.equal(cache["hook_embed"][~prompt.image_mask], cache["hook_text_embed"][~prompt.image_mask])
    assert torch.equal(cache["hook_image_embed"], cache["projector.hook_out"])
