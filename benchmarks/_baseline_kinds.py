"""Cases of kinds: every analysis on every kind of prompt, every geometry, TransformerLens's tools, the embedded world."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_editing import shown
from benchmarks._baseline_names import (
    GEOMETRIES,
    Answer,
    at_last,
    compiled,
    constraint_rows,
    edit_table,
    expected_tensors,
    logit_difference,
    make_hf_model,
    make_prompt,
)
from benchmarks._baseline_subjects import SOME, Subject, named
from hooked_llava import HookedLLaVA, Inputs, analysis
from hooked_llava.editing import EditRequest, multedit

_KINDS = [*SOME, "seed0-float64", "several_layers_full-float64"]


def _analyses(s: Subject, prompt: Inputs) -> dict[str, Callable[[], Any]]:
    """Each analysis of these prompts; those that do not take them say so."""
    model, token = s.model, s.answers[0]
    return {
        "lens": lambda: analysis.logit_lens(model, prompt, k=2, answers=[token]),
        "parts": lambda: analysis.logit_attribution(model, prompt, token),
        "sources": lambda: analysis.logit_attribution(model, prompt, token, by="source").sum("head"),
        "patches": lambda: analysis.logit_attribution(model, prompt, token, by="patch").sum("head"),
        "next": lambda: analysis.next_tokens(model, prompt, k=3),
        "attention": lambda: analysis.image_attention(model, prompt).mean("head"),
        "heads": lambda: analysis.head_scores(model, prompt, token),
        "positions": lambda: analysis.position_scores(model, prompt, token, heads=2),
        "map": lambda: analysis.patch_importance(model, prompt, token),
        "gradient map": lambda: analysis.patch_importance(model, prompt, token, method="grad_x_input"),
        "rollout": lambda: analysis.patch_importance(model, prompt, method="rollout"),
        "ablated tokens": lambda: analysis.patch_importance(model, prompt, method="token_ablation"),
        "readings": lambda: analysis.head_readings(model, prompt, 1, 1, token, k=2),
        "stored": lambda: analysis.information_storage(model, prompt, *s.answers, top=3),
        "ablated": lambda: analysis.ablate_heads(model, prompt, [(0, 1), (1, 0)], replace="zero"),
        "flow": lambda: analysis.attention_knockout(
            model, prompt, ["image->last", "question->last"], 1, missing="skip"
        ),
        "curve": lambda: analysis.answer_probability(model, prompt, token),
        "trace": lambda: analysis.causal_trace(
            model, prompt, s.constraint, corruption=s.instead, kinds=["mlp", "resid"]
        ),
        "messages": lambda: analysis.attention_contribution(model, prompt, s.constraint),
        "edit": lambda: shown(multedit(model, EditRequest(prompt, s.answers[1]), layer=1, position="last", steps=3)),
        "said": lambda: model.generate(prompt, max_new_tokens=3),
    }


@on(_KINDS, quick=["grouped-float64"])
def right_padded(s: Subject) -> Made:
    return _analyses(s, s.batch(padding_side="right"))


@on(_KINDS, quick=["grouped-float64"])
def of_two_images(s: Subject) -> Made:
    return _analyses(s, s.two_images)


@on(_KINDS, quick=["grouped-float64"])
def of_text(s: Subject) -> Made:
    return _analyses(s, s.text)


@on(_KINDS)
def mixed(s: Subject) -> Made:
    """A batch of one prompt with two images and one with none, as tensors."""
    two, none = s.two_images, s.text
    width = two.shape[1] - none.shape[1]
    pad = s.model.config.pad_token_id or 0
    ids = torch.cat([two.input_ids, torch.nn.functional.pad(none.input_ids, (width, 0), value=pad)])
    mask = torch.cat([two.attention_mask, torch.nn.functional.pad(none.attention_mask, (width, 0), value=False)])
    fields = {"input_ids": ids, "attention_mask": mask, "pixel_values": two.pixel_values}
    prompts = s.model.as_inputs(fields)
    return {"prompts": str(prompts), "logits": s.model(prompts)[:, -1], **_analyses(s, prompts)}


@once(quick=True)
def geometries() -> Made:
    """Logits of every variant of the architecture, of a model without a processor, with and without an image."""
    return {name: lambda name=name: _geometry(name) for name in GEOMETRIES}


def _geometry(name: str) -> dict[str, Any]:
    hf = make_hf_model(0, dtype=torch.float64, **GEOMETRIES[name])
    model = HookedLLaVA.from_hf(hf)
    image, text = make_prompt(hf, batch=2), make_prompt(hf, n_images=0)
    _, cache = model.run_with_cache(image)
    return {
        "tensors": [f"{n} {shape}" for n, shape in expected_tensors(model.config).items()],
        "hooks": [f"{n} {list(x.shape)}" for n, x in cache.items()],
        "image": model(image)[:, -2:],
        "text": model(text)[:, -2:],
        "said": model.generate(image, max_new_tokens=3, stop_at_eos=False, return_type="tokens"),
        "heads": lambda: analysis.head_scores(model, make_prompt(hf)),
        "map": lambda: analysis.patch_importance(model, make_prompt(hf), method="relevancy"),
    }


@on(named(("seed1", "direct", "grouped")), quick=["grouped-float64"])
def transformer_lens_tools(s: Subject) -> Made:
    model = s.model
    metric = at_last(logit_difference(*(Answer.of(model, answer) for answer in s.answers)))
    _, cache = model.run_with_cache(s.one)
    return {
        "heads": lambda: patching.get_act_patch_attn_head_out_all_pos(model, s.other, cache, metric),
        "patterns": lambda: patching.get_act_patch_attn_head_pattern_all_pos(model, s.other, cache, metric),
        "attribution": lambda: _scores(attribution_patch(model, s.one, s.other, metric)),
        "direct": lambda: direct_logit_attribution(model, cache=cache, answer_tokens=7, incorrect_tokens=9).attribution,
    }


def _scores(result: Any) -> list[Any]:
    return [
        [str(node) for node in result.node_scores],
        torch.stack([torch.as_tensor(x) for x in result.node_scores.values()]),
    ]


# ---------------------------------------------------------------------- the embedded world


@once(quick=True)
def world() -> Made:
    """What is drawn from seeds: scenes, tables of facts and of constraints."""
    from hooked_llava import toy

    rng = np.random.default_rng(3)
    scenes = [toy.sample_scene(rng) for _ in range(4)]
    asked = [toy.ask(kind, scene, rng) for scene in scenes for kind in toy.KINDS]
    table = edit_table(n_images=2)
    first = scenes[0].objects[0]
    return {
        "scenes": [[(o.shape, o.color, o.pattern, o.box) for o in scene.objects] for scene in scenes],
        "pixels": [scene.pixels[::6, ::6] for scene in scenes],
        "recolored": toy.recolor(scenes[0], first.shape, "red" if first.color != "red" else "blue").pixels[::6, ::6],
        "asked": [None if q is None else [q.text, q.answer, toy.format_prompt(q)] for q in asked],
        "facts": {" ".join(key): value for key, value in toy.fact_table().items()},
        "edits": [
            [c.relation, c.shape, c.answer, c.target, [(p.name, p.rows) for p in c.probes]] for c in table.cases[::9]
        ],
        "constraints": [[r.id, r.question, r.constraint, r.answer] for r in constraint_rows(2)],
        "mechanisms": [repr(compiled(variant).mechanism) for variant in ("direct", "two_hops")],
    }
