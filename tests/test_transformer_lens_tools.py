"""TransformerLens's own tools, with `Inputs` as their tokens, give the same numbers as ours."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformer_lens import SVDInterpreter, patching
from transformer_lens.head_detector import HEAD_NAMES, detect_head
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig
from transformer_lens.tools.analysis.logit_lens import logit_lens as transformer_lens_logit_lens

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.attribution_patching import attribution_patching, edge_attribution
from hooked_llava.analysis.logit_attribution import logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.analysis.path_patching import path_patching
from hooked_llava.readout.metrics import at_last
from tests.pairs import pair

HEAD_TOOLS = [("z", "out"), ("q", "q"), ("k", "k"), ("v", "v"), ("pattern", "pattern")]
"""Our hooks and what TransformerLens's tools call them, in the order of its "every" tools."""


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 7] - logits[..., 9]


@functools.cache
def prompts(geometry: str = "plain") -> tuple[Any, Any, Any]:
    models = pair(geometry)
    clean, corrupted = (models.ours.as_inputs(models.prompt(seed=seed, n_text=2)) for seed in (1, 2))
    return models.ours, clean, corrupted


def theirs(tool: Any, geometry: str = "plain") -> np.ndarray:
    model, clean, corrupted = prompts(geometry)
    _, cache = model.run_with_cache(clean)
    return tool(model, corrupted, cache, at_last(metric)).numpy()


def ours(hook: str, geometry: str = "plain", **options: Any) -> Any:
    model, clean, corrupted = prompts(geometry)
    return activation_patching(model, clean, corrupted, hook=hook, metric=metric, **options)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("hook", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_by_layer_and_position(hook: str) -> None:
    close(ours(hook), theirs(getattr(patching, f"get_act_patch_{hook}")))


@pytest.mark.parametrize(("hook", "tool"), HEAD_TOOLS)
def test_by_layer_and_head(hook: str, tool: str) -> None:
    close(ours(hook, positions="all"), theirs(getattr(patching, f"get_act_patch_attn_head_{tool}_all_pos")))


@pytest.mark.parametrize(("hook", "tool"), HEAD_TOOLS)
def test_by_layer_position_and_head(hook: str, tool: str) -> None:
    expected = theirs(getattr(patching, f"get_act_patch_attn_head_{tool}_by_pos"))
    found = ours(hook).values
    close(found if found.shape == expected.shape else found.swapaxes(1, 2), expected)


def test_key_value_heads_of_a_grouped_model() -> None:
    close(ours("v", "grouped", positions="all"), theirs(patching.get_act_patch_attn_head_v_all_pos, "grouped"))


def test_several_kinds_at_once() -> None:
    expected = theirs(patching.get_act_patch_block_every)
    close(np.stack([ours(hook).values for hook in ("resid_pre", "attn_out", "mlp_out")]), expected)


def test_every_kind_of_head_at_once() -> None:
    """TransformerLens fills up the heads that keys and values of a grouped model do not have with zeros.

    Of a plain model the tests above compare each kind by itself.
    """
    n_heads = prompts("grouped")[0].cfg.n_heads
    all_pos, by_pos = (
        theirs(getattr(patching, f"get_act_patch_attn_head_{way}_every"), "grouped") for way in ("all_pos", "by_pos")
    )
    for index, (hook, _) in enumerate(HEAD_TOOLS):
        found = [ours(hook, "grouped", positions=positions) for positions in ("all", "each")]
        for own, expected in zip(found, (all_pos[index], by_pos[index]), strict=True):
            own = own.transpose(..., own.dims[-1] if "pattern" not in hook else "head").values
            close(own, expected[..., : own.shape[-1]])
            assert own.shape[-1] in (n_heads, prompts("grouped")[0].cfg.n_key_value_heads)
            assert not expected[..., own.shape[-1] :].any()


def test_one_edge_of_the_pattern_at_a_time() -> None:
    """Ours has no cell for a single edge; the tool runs, and an edge that is blocked changes nothing."""
    model, clean, corrupted = prompts()
    _, cache = model.run_with_cache(clean)
    tool, n = patching.get_act_patch_attn_head_pattern_dest_src_pos, clean.shape[1]
    rows = pd.DataFrame([(1, 2, n - 1, 3), (1, 2, 0, n - 1)], columns=["layer", "head_index", "dest_pos", "src_pos"])
    keywords = {k: v for k, v in tool.keywords.items() if k != "index_axis_names"}
    found = tool.func(model, corrupted, cache, at_last(metric), index_df=rows, **keywords)

    def edge(pattern: torch.Tensor, hook: Any) -> None:
        pattern[:, 2, n - 1, 3] = cache["pattern", 1][:, 2, n - 1, 3]

    expected = at_last(metric)(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_pattern", edge)]))
    close(found[0], expected.detach())
    close(found[1], at_last(metric)(model(corrupted)).detach())


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths(component: Any) -> None:
    model, clean, corrupted = prompts()
    caches = [model.run_with_cache(inputs)[1] for inputs in (clean, corrupted)]
    tool = patching.get_act_patch_direct_path
    expected = tool(model, corrupted, *caches, at_last(metric), 0, 3, component, verbose=False)
    receivers = [(component, layer, head) for layer in (1, 2) for head in range(4)]
    found = path_patching(model, clean, corrupted, receivers=receivers, metric=metric)
    close(found.sel(layer=0, head=3).values.reshape(2, 4), expected[1:].detach())


@pytest.mark.parametrize("component", ["q", "v"])
def test_direct_paths_from_all_sources(component: Any) -> None:
    model, clean, corrupted = prompts()
    caches = [model.run_with_cache(inputs)[1] for inputs in (clean, corrupted)]
    tool = patching.get_act_patch_direct_path_all_sources
    expected = tool(model, corrupted, *caches, at_last(metric), component, verbose=False)  # (layer, head, layer, head)
    receivers = [(component, layer, head) for layer in range(3) for head in range(4)]
    found = path_patching(model, clean, corrupted, receivers=receivers, metric=metric)
    found = found.transpose("layer", "head", "receiver").values.reshape(3, 4, 3, 4)
    close(np.nan_to_num(found), expected.detach())
    assert int(np.isfinite(found).sum()) == 4 * 4 * 3


def test_direct_paths_into_grouped_keys_are_refused_by_the_tool() -> None:
    model, clean, corrupted = prompts("grouped")
    caches = [model.run_with_cache(inputs)[1] for inputs in (clean, corrupted)]
    with pytest.raises(ValueError, match="GQA"):
        patching.get_act_patch_direct_path(model, corrupted, *caches, at_last(metric), 0, 3, "k", verbose=False)


def test_integrated_gradients_are_not_there_yet() -> None:
    with pytest.raises(NotImplementedError, match="ig_steps>1"):
        EdgeAttributionConfig(ig_steps=2)


def test_attribution_of_edges_into_grouped_heads_is_refused_by_the_tool() -> None:
    model, clean, corrupted = prompts("grouped")
    with pytest.raises(ValueError, match="GQA"):
        attribution_patch(model, clean, corrupted, at_last(metric), EdgeAttributionConfig(granularity="edge"))


def test_attribution_of_nodes() -> None:
    model, clean, corrupted = prompts()
    result = attribution_patch(model, clean, corrupted, at_last(metric))
    found = attribution_patching(model, clean, corrupted, hooks=["z", "mlp_out", "hook_embed"], metric=metric)
    for node, score in result.node_scores.items():
        if node.kind == "attn_head_out":
            value = found["z"][node.layer, node.position, node.head]
        elif node.kind == "mlp_out":
            value = found["mlp_out"][node.layer, node.position]
        else:
            value = found["hook_embed"][node.position]
        assert float(value) == pytest.approx(float(score), rel=1e-3, abs=1e-4)


def test_attribution_of_edges() -> None:
    model, clean, corrupted = prompts()
    result = attribution_patch(model, clean, corrupted, at_last(metric), EdgeAttributionConfig(granularity="edge"))
    found = edge_attribution(model, clean, corrupted, metric=metric)
    sums: dict[tuple[Any, ...], float] = {}
    for (writer, reader), score in result.edge_scores.items():
        head = "" if reader.head is None else f"H{reader.head}"
        label = "logits" if reader.kind == "logits" else f"L{reader.layer}{head} {reader.kind.split('_')[0]}"
        sums[writer.kind, writer.layer, writer.head, label] = sums.get(
            (writer.kind, writer.layer, writer.head, label), 0.0
        ) + float(score)
    for (kind, layer, head, label), score in sums.items():
        row = found.sel(receiver=label)
        if kind == "attn_head_out":
            value = row.heads[layer, head]
        else:
            value = row.mlps[layer] if kind == "mlp_out" else row.embed
        assert float(value) == pytest.approx(score, rel=1e-3, abs=1e-4)
    n_edges = sum(int(np.isfinite(found[name]).sum()) for name in ("heads", "mlps", "embed"))
    assert n_edges == len(sums)


def test_direct_logit_attribution() -> None:
    model, clean, _ = prompts()
    _, cache = model.run_with_cache(clean)
    result = direct_logit_attribution(model, cache=cache, answer_tokens=7, incorrect_tokens=9)
    found = logit_attribution(model, clean, 7, 9)
    assert float(result.attribution.sum()) == pytest.approx(found.logit, abs=1e-4)
    np.testing.assert_allclose(sorted(result.attribution.flatten().tolist()), sorted(found.values.tolist()), atol=1e-4)


def test_logit_lens() -> None:
    model, clean, _ = prompts()
    _, cache = model.run_with_cache(clean)
    result = transformer_lens_logit_lens(model, cache=cache)
    found = logit_lens(model, clean, k=3)
    assert result.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    top = result.values.reshape(4, -1).softmax(-1).topk(3)
    assert found.token_id.values[:, 0].tolist() == top.indices.tolist()
    np.testing.assert_allclose(found.probability[:, 0], top.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("geometry", ["plain", "grouped", "biases"])
def test_singular_vectors(geometry: str) -> None:
    """The directions that a head or an MLP writes most, as words; of grouped heads each query head has its own."""
    model = pair(geometry).ours
    cfg, interpreter = model.config.language, SVDInterpreter(model)
    for layer, head in ((0, 0), (2, cfg.n_heads - 1)):
        block = model.blocks[layer]
        value = block.attn.W_V[head // (cfg.n_heads // cfg.n_key_value_heads)]
        written = torch.linalg.svd(value @ block.attn.W_O[head])[2]
        read = torch.linalg.svd(block.mlp.W_in.T * block.ln2.w)[2]
        expected = {"OV": written, "w_in": read, "w_out": torch.linalg.svd(block.mlp.W_out)[2]}
        for kind, vectors in expected.items():
            found = interpreter.get_singular_vectors(kind, layer, 3, head_index=head)[:, 0]
            close(found.abs(), (model.W_U.T @ vectors[:3].T).abs())  # the sign of a singular vector is free


def test_weights_under_transformer_lens_names_are_views() -> None:
    model = pair().ours
    weights = model.tl_parameters()
    memory = {parameter.data_ptr() for parameter in model.language.parameters()}
    assert all(weight.data_ptr() in memory for name, weight in weights.items() if ".b_" not in name)
    assert weights["blocks.1.attn.W_V"].shape == (4, 48, 12)


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_head_detector(head: Any, tiny_shapes: Any) -> None:
    """A prompt with an image, and one that is the same as text."""
    text = "USER: Who made the star? Who made the ring? ASSISTANT:"
    as_text = detect_head(tiny_shapes, text, head)
    assert torch.equal(detect_head(tiny_shapes, tiny_shapes.as_inputs(text), head), as_text)
    asked = tiny_shapes.prepare("Who made the star?", Image.new("RGB", (84, 84), "white"))
    _, cache = tiny_shapes.run_with_cache(asked, names_filter="pattern")
    found = detect_head(tiny_shapes, asked, head)
    if head == "previous_token_head":
        for layer in range(tiny_shapes.cfg.n_layers):
            pattern = cache["pattern", layer][0]  # (head, query, key)
            before = pattern.diagonal(-1, 1, 2).sum(-1) / pattern.sum((1, 2))
            close(found[layer], before)
    assert found.isfinite().all()
