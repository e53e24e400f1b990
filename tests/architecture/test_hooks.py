"""The table of hooks, and how filters find their names in it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.utilities import get_act_name

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hook_specs import markdown_table
from hooked_llava.architecture.hooks import HookTable
from hooked_llava.errors import HookNameError
from tests.builders import tiny_hf_config
from tests.pairs import as_users_run

N_LAYERS, N_RUN, N_VISION = 3, 2, 3
CONFIG = LLaVAConfig.from_hf(tiny_hf_config(n_layers=N_LAYERS, n_vision_layers=N_VISION))
TABLE = HookTable(CONFIG)
SPECS = {hook.spec for hook in TABLE.hooks.values()}


def refused(names_filter: Any, match: str, **options: Any) -> None:
    with as_users_run(), pytest.raises(HookNameError, match=match):
        TABLE.resolve(names_filter, **options)


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("hook_embed", ["hook_embed"]),
        ("embed", ["hook_embed"]),
        ("blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"]),
        ("blocks.*.hook_resid_post", [f"blocks.{i}.hook_resid_post" for i in range(N_LAYERS)]),
        ("blocks.[01].hook_resid_post", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]),
        ("blocks.?.attn.hook_z", [f"blocks.{i}.attn.hook_z" for i in range(N_LAYERS)]),
        ("pattern", [f"blocks.{i}.attn.hook_pattern" for i in range(N_LAYERS)]),
        ("hook_pattern", [f"blocks.{i}.attn.hook_pattern" for i in range(N_LAYERS)]),
        ("attn", [f"blocks.{i}.attn.hook_pattern" for i in range(N_LAYERS)]),
        ("mlp.post", [f"blocks.{i}.mlp.hook_post" for i in range(N_LAYERS)]),
        ("post", ["projector.hook_post", *(f"blocks.{i}.mlp.hook_post" for i in range(N_LAYERS))]),
        ("vision.pattern", [f"vision.blocks.{i}.attn.hook_pattern" for i in range(N_RUN)]),
        ("vision.out", ["vision.hook_out"]),
        ("logits", ["hook_logits"]),
        (("pattern", 1), ["blocks.1.attn.hook_pattern"]),
        (("pattern", -1), ["blocks.2.attn.hook_pattern"]),
        (("vision.pattern", -1), ["vision.blocks.1.attn.hook_pattern"]),
        (("post", 0), ["blocks.0.mlp.hook_post"]),
        (("scale", 1, "ln2"), ["blocks.1.ln2.hook_scale"]),
        (("blocks.*.hook_resid_*", 0), [f"blocks.0.hook_resid_{place}" for place in ("pre", "mid", "post")]),
        (("embed",), ["hook_embed"]),
        (("embed", None), ["hook_embed"]),
        ("blocks.1.hook_q_input", ["blocks.1.attn.hook_q_input"]),
        ("vision.blocks.0.hook_v_input", ["vision.blocks.0.attn.hook_v_input"]),
        ("q_input", [f"blocks.{i}.attn.hook_q_input" for i in range(N_LAYERS)]),
        ("blocks.*.hook_k_input", [f"blocks.{i}.attn.hook_k_input" for i in range(N_LAYERS)]),
        (["resid_post", ("z", 0), "hook_embed"], None),
        (lambda name: name.endswith("resid_mid") and name.startswith("blocks.0"), ["blocks.0.hook_resid_mid"]),
        ({"hook_embed", "hook_logits"}, ["hook_embed", "hook_logits"]),
    ],
)  # fmt: skip
def test_filters_find_what_they_mean(names_filter: Any, expected: list[str] | None) -> None:
    found = TABLE.resolve(names_filter)
    if expected is None:
        expected = ["hook_embed", "blocks.0.attn.hook_z", *(f"blocks.{i}.hook_resid_post" for i in range(N_LAYERS))]
        expected = [name for name in TABLE.names if name in expected]
    assert found == expected, "in the order in which they fire"


def test_without_a_filter_everything_but_the_large() -> None:
    found = TABLE.resolve(None)
    left_out = [name for name in TABLE.names if name not in found]
    assert {name.rpartition("hook_")[2] for name in left_out} == {"result", "q_input", "k_input", "v_input"}
    assert TABLE.resolve("*") == TABLE.names, "what is named is had"


@pytest.mark.parametrize("name", [n for n in TABLE.names if n.startswith("blocks.1.")])
def test_the_language_towers_names_are_transformer_lenss(name: str) -> None:
    short, layer_type = name.rpartition("hook_")[2], {"ln1": "ln1", "ln2": "ln2"}.get(name.split(".")[2])
    theirs = get_act_name(short, 1, layer_type)
    assert TABLE.aliases.get(theirs, theirs) == name


@pytest.mark.parametrize(
    ("names_filter", "match"),
    [
        ("blocks.0.hook_resid_pst", "'blocks.0.hook_resid_pst'. Did you mean: blocks.0.hook_resid_post"),
        ("paterns", r"'paterns'. Did you mean: pattern.*model.hook_dict.*\d+ names"),
        ("blocks.7.hook_resid_post", "'blocks.7.hook_resid_post'. Did you mean"),
        ("nothing.*.like_it", r"'nothing.\*.like_it'"),
        (["hook_embed", "hook_embd"], "'hook_embd'. Did you mean: hook_embed"),
        (("patern", 1), "hook.*'patern'"),
        (("pattern", 3), r"Layer 3.*'pattern'; expected -3\.\.2"),
        (("pattern", -4), r"Layer -4.*'pattern'; expected -3\.\.2"),
        (("vision.pattern", 2), r"Layer 2.*'vision\.pattern'; expected -2\.\.1"),
        (("logits", 1), "'logits'.*no layers.*layer 1"),
        (("hook_embed", "hook_logits"), r"\('hook_embed', 'hook_logits'\).*\(short name, layer\).*list"),
        ((), r"\(\).*\(short name, layer\)"),
        ("vision.blocks.2.hook_resid_post",
         r"after block 1.*block 2.*vision\.blocks\.0\.\.1"),
        ("vision.blocks.3.hook_resid_post", "'vision.blocks.3.hook_resid_post'. Did you mean"),
        ("vision.ln_post.hook_scale", "'vision.ln_post.hook_scale'.*post norm"),
        ([], "filter.*no hook"),
        (lambda name: False, "filter.*no hook"),
        (["hook_embed", 3], "filter.*3 of type int.*names, globs"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_with_a_suggestion(names_filter: Any, match: str) -> None:
    refused(names_filter, match)


def test_without_an_image_the_image_side_does_not_fire() -> None:
    text_only = TABLE.resolve("*", with_image=False)
    assert text_only == [n for n in TABLE.names if not n.startswith(("vision.", "projector.", "hook_image"))]
    assert TABLE.resolve("post", with_image=False) == [f"blocks.{i}.mlp.hook_post" for i in range(N_LAYERS)]
    assert TABLE.resolve(lambda name: True, with_image=False) == text_only
    for name in ("vision.hook_out", "projector.*", "image_embed", "vision.pattern", ["hook_embed", "vision.pattern"]):
        refused(name, "Hook '.*no image.*Give an image", with_image=False)
    refused(lambda name: name.startswith("vision"), "filter.*no hook", with_image=False)


def test_outside_the_layers_of_a_run_nothing_fires() -> None:
    entered_and_left = TABLE.resolve("*", stages=range(1, 2))
    assert entered_and_left == [n for n in TABLE.names if n.startswith("blocks.1.")]
    left = TABLE.resolve(None, stages=range(-2, 1))
    assert left[-1] == "blocks.0.hook_resid_post"
    assert "hook_embed" in left
    assert "vision.hook_out" in left
    assert TABLE.resolve("resid_pre", stages=range(1, 4)) == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert TABLE.resolve("scale", stages=range(3, 4)) == ["ln_final.hook_scale"]
    for name in ("blocks.2.hook_resid_pre", "hook_logits", ["resid_pre", "ln_final.hook_scale"]):
        refused(name, "start_at_layer.*stop_at_layer", stages=range(-2, 2))
    refused("hook_embed", "'hook_embed'.*start_at_layer", stages=range(1, 4))
    assert TABLE.resolve("*embed", stages=range(-1, 1)) == ["hook_embed"], "a stream entering block 0"


def test_no_vision_block_is_run_when_the_projector_reads_the_embedding() -> None:
    table = HookTable(LLaVAConfig.from_hf(tiny_hf_config(vision_feature_layer=0)))
    assert not [name for name in table.names if name.startswith("vision.blocks")]
    with pytest.raises(HookNameError, match="Hook 'vision.*embedding.*no block"):
        table.resolve("vision.blocks.0.hook_resid_post")
    with pytest.raises(HookNameError, match="out of range|No hook is called"):
        table.resolve(("vision.resid_post", 0))


@settings(max_examples=40)
@given(st.lists(st.sampled_from(TABLE.names), min_size=1))
def test_any_list_of_names_comes_back_once_each_and_in_order(names: list[str]) -> None:
    found = TABLE.resolve(names)
    assert sorted(found) == sorted(set(names))
    assert [TABLE.names.index(name) for name in found] == sorted(TABLE.names.index(name) for name in found)


@settings(max_examples=60)
@given(st.text(max_size=12))
def test_any_text_is_a_hook_or_a_hook_name_error(text: str) -> None:
    try:
        found = TABLE.resolve(text)
    except HookNameError as error:
        message = str(error)
        assert message.startswith("No hook is called")
    else:
        assert set(found) <= set(TABLE.names)


def test_every_row_of_the_table_says_what_it_is() -> None:
    for spec in SPECS:
        assert spec.meaning
        assert spec.name.rpartition(".")[2].startswith("hook_")
        assert ("{i}" in spec.name) == ("blocks." in spec.name)
    assert len(set(TABLE.names)) == len(TABLE.names)
    assert not set(TABLE.aliases) & set(TABLE.names)
    assert TABLE["blocks.0.hook_q_input"] is TABLE["blocks.0.attn.hook_q_input"]


def test_the_markdown_table_holds_every_row() -> None:
    rows = markdown_table(CONFIG).splitlines()
    assert len(rows) == 2 + len(SPECS)
    row = "| `blocks.{i}.attn.hook_q_input` (also `blocks.{i}.hook_q_input`) | [batch pos head d_model] |"
    assert any(line.startswith(row) and line.endswith("cached when named |") for line in rows)
    assert inspect.getdoc(markdown_table)


@pytest.mark.parametrize(
    ("name", "tower", "layer", "site", "stage", "on_image_side"),
    [
        ("vision.hook_embed", "vision", None, "hook_embed", -2, True),
        ("vision.blocks.1.attn.hook_z", "vision", 1, "attn.hook_z", -2, True),
        ("projector.hook_out", "projector", None, "hook_out", -2, True),
        ("hook_image_embed", "language", None, "hook_image_embed", -2, True),
        ("hook_text_embed", "language", None, "hook_text_embed", -2, False),
        ("hook_embed", "language", None, "hook_embed", -1, False),
        ("blocks.2.ln1.hook_scale", "language", 2, "ln1.hook_scale", 2, False),
        ("ln_final.hook_scale", "language", None, "ln_final.hook_scale", N_LAYERS, False),
        ("hook_logits", "language", None, "hook_logits", N_LAYERS, False),
    ],
)  # fmt: skip
def test_a_hook_says_where_it_is(
    name: str, tower: str, layer: int | None, site: str, stage: int, on_image_side: bool
) -> None:
    hook = TABLE[name]
    assert (hook.name, hook.tower, hook.layer, hook.site, hook.stage) == (name, tower, layer, site, stage)
    assert hook.on_image_side == on_image_side
    assert TABLE.tower(hook) is (CONFIG.vision if tower == "vision" else CONFIG.language)


def test_names_are_built_from_short_name_and_layer() -> None:
    for hook in TABLE.hooks.values():
        if hook.layer is not None and hook.site.rpartition("hook_")[2] not in ("scale", "normalized"):
            short = ("vision." if hook.tower == "vision" else "") + hook.site.rpartition("hook_")[2]
            n_layers = TABLE.tower(hook).n_layers_run
            assert TABLE.name(short, hook.layer) == TABLE.name(short, hook.layer - n_layers) == hook.name


def test_the_table_follows_the_config() -> None:
    """A tower without a gate and rotary positions has no hooks of them, whichever tower it is."""
    plain = replace(CONFIG.language, gated_mlp=False, rotary=None)
    names = HookTable(replace(CONFIG, language=plain)).names
    gone = [name for name in TABLE.names if name not in names]
    assert {name.rpartition("hook_")[2] for name in gone} == {"rot_q", "rot_k", "pre_linear"}
    assert names == [name for name in TABLE.names if name not in gone]
    gated = HookTable(replace(CONFIG, vision=replace(CONFIG.vision, gated_mlp=True)))
    assert "vision.blocks.0.mlp.hook_pre_linear" in gated.names


def test_position_axes() -> None:
    axes = {name: TABLE[name].position_axis for name in TABLE.names}
    assert axes["blocks.0.attn.hook_pattern"] == 2
    assert axes["blocks.0.attn.hook_rot_q"] == 1
    assert axes["hook_logits"] == 1
    assert None not in axes.values()
