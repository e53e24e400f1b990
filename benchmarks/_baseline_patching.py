"""Cases of Replay, of patching, and of the pairs of prompts that are patched."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import torch

from benchmarks._baseline_cases import Made, on
from benchmarks._baseline_names import (
    Answer,
    Intervention,
    Replay,
    blank_image,
    centered_window,
    gaussian_noise,
    logit_difference,
    mean_embedding,
    other_image,
    other_question,
    paper_width,
    recovered,
    released_window,
    span_positions,
    swapped_objects,
    teacher_forced,
    without_object,
)
from benchmarks._baseline_subjects import ALL, QUICK, SOME, Subject, with_boxes
from hooked_llava import analysis

_QUICK = ["grouped-float64"]
_MOST_CELLS = 8  # positions in the maps of every position, which would take long otherwise


def _metric(s: Subject) -> Any:
    return logit_difference(*(Answer.of(s.model, answer) for answer in s.answers))


# ---------------------------------------------------------------------- replay


@on(ALL, quick=QUICK)
def replay(s: Subject) -> Made:
    """Every kind of change, read and counted in every way."""
    model, middle = s.model, s.model.cfg.n_layers // 2
    again = Replay(model, s.one)
    z = f"blocks.{middle}.attn.hook_z"
    runs = [
        [],
        [Intervention(z, positions="last", heads=[1], zero=True)],
        [Intervention(f"blocks.{middle}.hook_resid_pre", positions="question", scale=0.5)],
        [Intervention(f"blocks.{middle}.mlp.hook_post", neurons=[0, 3], add=1.0)],
        [Intervention(f"blocks.{middle}.attn.hook_pattern", positions="last", heads=0, fn=lambda x: x.flip(-1))],
        [Intervention(f"blocks.{middle}.attn.hook_attn_scores", block=("image", "last"))],
        [Intervention(z, positions="question", mean=True)],
        [Intervention("hook_embed", positions=[3], value=torch.ones(model.cfg.d_model))],
        [Intervention("hook_image_embed", positions=[0, 2], zero=True), Intervention(z, positions=-1, scale=2.0)],
        [Intervention("vision.blocks.0.hook_resid_post", positions=[1], zero=True)],
        [Intervention("projector.hook_post", scale=0.9)],
        [Intervention("blocks.0.attn.hook_k", positions="image", zero=True)],
    ]
    planned = again.sweep(runs)
    found = {
        "runs": [repr(run) for run in runs],
        "kept": again.logits("question"),
        "logits": again.run(runs),
        "small batches": again.run(runs, batch_size=2),
        "metric": again.run(runs, _metric(s)),
        "elsewhere": again.run(runs[:5], positions="question")[..., ::3],
        "forecast": planned.forecast,
        "work": [again.work.token_layers, again.work.forwards, again.work.runs, again.work.share],
        "bytes": [again.nbytes, Replay.forecast(model, s.one), Replay.forecast(model, s.batch(), dtype=torch.bfloat16)],
        "share": again.key_value_share,
    }
    logits, caches = again.run_with_cache(runs[:3], ["resid_post", "pattern"])
    return {
        **found,
        "cached": logits,
        "caches": [{name: x[..., -1, ::4] for name, x in cache.items()} for cache in caches],
    }


@on(ALL, quick=_QUICK)
def every_hook(s: Subject) -> Made:
    """One run for each hook of a layer of each tower: each is changed where it can be."""
    model, again = s.model, Replay(s.model, s.one)
    names = [name for name in model.hooks_table.names if ".blocks." not in name or "vision.blocks.1." in name]
    names = [name for name in names if not name.startswith("blocks.") or name.startswith("blocks.1.")]

    def run(name: str) -> Any:
        return lambda: again.run([[Intervention(name, scale=0.7)]])

    return {name: run(name) for name in names}


@on(ALL, quick=_QUICK)
def replay_of_a_batch(s: Subject) -> Made:
    """Padded on either side, branched, kept in another precision, and text alone."""
    model = s.model
    found: dict[str, Any] = {}
    change = [[Intervention("blocks.1.hook_resid_pre", positions="last", scale=0.5)], []]
    for name, prompt in (("left", s.batch()), ("right", s.batch(padding_side="right")), ("text", s.text)):
        again = Replay(model, prompt)
        elsewhere = lambda again=again: again.run(change, positions=[3, 4])  # noqa: E731
        found[name] = [again.run(change), elsewhere, again.work.token_layers]
    again = Replay(model, s.one)
    other = again.branch(Intervention("hook_embed", positions="question", scale=0.5))
    found["branch"] = [other.logits(), other.run(change), again.work.token_layers]
    found["coarse"] = Replay(model, s.one, dtype=torch.bfloat16).run(change) if s.name.endswith("bfloat16") else None
    found["two images"] = lambda: Replay(model, s.two_images).run(
        [[Intervention("hook_image_embed", image=1, scale=0.5)]]
    )
    return found


# ---------------------------------------------------------------------- patching


@on(ALL, quick=_QUICK)
def activation_patching(s: Subject) -> Made:
    model, pair, metric = s.model, (s.one, s.other), _metric(s)
    hooks = ("resid_pre", "attn_out", "mlp_out", "resid_mid", "z", "q", "k", "v", "pattern", "mlp.hook_post")
    found: dict[str, Any] = {
        hook: lambda hook=hook: analysis.activation_patching(model, *pair, hook=hook, positions="last", metric=metric)
        for hook in hooks
    }
    text = s.one.token_map["question"].tolist()[:_MOST_CELLS]
    spans = {"positions": ["image", "question", "last"], "metric": metric}
    forced = teacher_forced(model, s.one, " ".join(s.answers))
    found |= {
        "own answers": lambda: analysis.activation_patching(model, *pair, positions="last"),
        "positions": lambda: analysis.activation_patching(model, *pair, positions=text, metric=metric),
        "spans": lambda: analysis.activation_patching(model, *pair, **spans),
        "noise": lambda: analysis.activation_patching(model, *pair, positions="last", metric=metric, direction="noise"),
        "heads": lambda: analysis.activation_patching(model, *pair, hook="z", positions="all", metric=metric),
        "all heads": lambda: analysis.activation_patching(
            model, *pair, hook="z", positions="last", heads="all", metric=metric
        ),
        "layers": lambda: analysis.activation_patching(model, *pair, layers=[0, -1], positions="last", metric=metric),
        "vision": lambda: analysis.activation_patching(
            model, *pair, hook="vision.resid_post", positions="all", metric=metric
        ),
        "pairs": lambda: analysis.activation_patching(
            model, [pair[0]] * 2, [pair[1]] * 2, positions="last", metric=metric
        ),
        "forced": lambda: analysis.activation_patching(
            model,
            forced.inputs,
            teacher_forced(model, s.other, " ".join(s.answers)).inputs,
            positions="last",
            metric=forced.metric,
            logit_positions=forced.positions,
        ),
    }
    found["recovered"] = lambda: recovered(found["positions"]())
    return found


@on(ALL, quick=_QUICK)
def attribution_patching(s: Subject) -> Made:
    model, pair, metric = s.model, (s.one, s.other), _metric(s)
    hooks = ["z", "q", "k", "v", "mlp.hook_post"]
    estimate = analysis.attribution_patching(model, *pair, hooks=["resid_pre"], metric=metric)
    exact = analysis.activation_patching(model, *pair, positions="last", metric=metric)
    return {
        "default": lambda: analysis.attribution_patching(model, *pair, metric=metric),
        "every": lambda: analysis.attribution_patching(model, *pair, hooks=hooks, metric=metric).sum("position"),
        "steps": lambda: analysis.attribution_patching(model, *pair, metric=metric, steps=3, direction="noise"),
        "recovered": lambda: recovered(estimate),
        "agreement": lambda: analysis.agreement(exact, estimate["resid_pre"].sel(position=exact.position)),
    }


@on(ALL, quick=_QUICK)
def paths(s: Subject) -> Made:
    model, pair, metric = s.model, (s.one, s.other), _metric(s)
    receivers = ["logits", ("mlp", 1), ("q", 1, 0), ("v", 2, 1)]
    return {
        "default": lambda: analysis.path_patching(model, *pair, metric=metric),
        "receivers": lambda: analysis.path_patching(model, *pair, receivers=receivers, metric=metric, positions="last"),
        "mlps": lambda: analysis.path_patching(model, *pair, senders="mlps", metric=metric, direction="noise"),
        "edges": lambda: analysis.edge_attribution(model, *pair, metric=metric),
        "averaged edges": lambda: analysis.edge_attribution(model, *pair, metric=metric, steps=2, direction="noise"),
    }


# ---------------------------------------------------------------------- pairs


@on(SOME, quick=_QUICK)
def pairs(s: Subject) -> Made:
    """Prompts and embeddings that differ in one thing, and what is drawn for them."""
    model = s.model
    width, height = s.images[0].size
    box, other = (
        (0, 0, width // 4, height // 4),
        (width // 2, height // 2, width // 2 + width // 4, height // 2 + height // 4),
    )
    pool = model.prepare([s.question] * 2, list(s.images))
    asked = [s.question, s.question.replace("color", "shape"), s.questions[1]]
    noise = gaussian_noise(model, s.one, "question", seed=5)
    return {
        "blank": lambda: blank_image(model, s.batch()).pixel_values[:, :, ::5, ::5],
        "without": lambda: without_object(model, s.one, box).pixel_values[:, :, ::3, ::3],
        "swapped": lambda: swapped_objects(model, s.one, box, other).pixel_values[:, :, ::3, ::3],
        "drawn image": lambda: other_image(model, s.one, pool, seed=1).pixel_values[:, :, ::5, ::5],
        "drawn question": lambda: other_question(model, s.one, asked, seed=1).prompts,
        "noise": [noise, noise.add, gaussian_noise(model, s.one, [2], std=0.1).add],
        "mean": lambda: mean_embedding(model, "question").value,
        "mean of others": lambda: mean_embedding(model, "question", reference=s.batch()).value,
    }


@on(SOME, quick=_QUICK)
def spans(s: Subject) -> Made:
    """Expressions of spans, windows of layers."""
    token_map = with_boxes(s.one).token_map
    words = ("image", "question|last", "image-object", "question&text", "other", "random", "system", "rest", "text")
    windows = {f"{c} of {w}": list(centered_window(c, w, 8)) for c in (0, 3, 7) for w in (1, 2, 3, 9)}
    released = {f"{c} of {w}": list(released_window(c, w, 8)) for c in (0, 3, 7) for w in (1, 2, 3)}
    return {
        "spans": {word: lambda word=word: span_positions(token_map, word, seed=2).tolist() for word in words},
        "windows": windows,
        "released": released,
        "widths": [paper_width(n) for n in (3, 6, 32, 40, 80)],
    }
