"""Cases of every public analysis but patching, and of the metrics."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_names import (
    Answer,
    MeanEmbedding,
    Noise,
    OtherImage,
    Replace,
    at_last,
    average_precision,
    bootstrap,
    cache_answer,
    find_constraints,
    from_transformer_lens,
    kl_divergence,
    log_probability,
    logit_difference,
    map_quality,
    mean_intervals,
    own_answers,
    probability,
    rank,
    relative_change,
    roc_auc,
    teacher_forced,
    was_lowered,
)
from benchmarks._baseline_subjects import ALL, QUICK, SOME, Subject, subject, with_boxes
from hooked_llava import Replay, analysis

_MAPS = (
    "log_increase",
    "attention",
    "grad_x_input",
    "integrated_gradients",
    "rollout",
    "relevancy",
    "occlusion",
    "token_ablation",
)


@on(ALL, quick=QUICK)
def logit_lens(s: Subject) -> Made:
    several = {"positions": "question", "norm": "none", "answers": list(s.answers), "k": 2}
    return {
        "last": lambda: analysis.logit_lens(s.model, s.one),
        "several": lambda: analysis.logit_lens(s.model, s.one, **several),
        "batch": lambda: analysis.logit_lens(s.model, s.batch(), answers=list(s.answers)),
        "mlp": lambda: analysis.logit_lens(s.model, s.batch(padding_side="right"), hook="mlp_out", k=3),
    }


@on(ALL, quick=QUICK)
def logit_attribution(s: Subject) -> Made:
    ways = ("component", "layer", "head", "neuron", "source", "patch")
    found = {by: lambda by=by: analysis.logit_attribution(s.model, s.one, by=by) for by in ways}
    found["difference"] = lambda: analysis.logit_attribution(s.model, s.batch(), *s.answers, by="head")
    return found


@on(ALL, quick=QUICK)
def next_tokens(s: Subject) -> Made:
    return {
        "batch": lambda: analysis.next_tokens(s.model, s.batch(), k=3),
        "one": analysis.next_tokens(s.model, s.one, k=5),
    }


@on(ALL, quick=QUICK)
def image_attention(s: Subject) -> Made:
    return {
        "one": lambda: analysis.image_attention(s.model, s.one),
        "batch": lambda: analysis.image_attention(s.model, s.batch()),
        "before": lambda: analysis.image_attention(s.model, s.one, position=-2),
        "by_attention": lambda: analysis.heads_by_attention(s.model, s.batch()),
    }


@on(ALL, quick=QUICK)
def scores(s: Subject) -> Made:
    """Log-probability increases of layers, heads and positions."""
    model = s.model
    heads = analysis.head_scores(model, s.one)
    best = analysis.top_heads(heads, 4)
    return {
        "heads": heads,
        "best": best,
        "overlap": lambda: analysis.head_overlap(
            best, analysis.top_heads(analysis.heads_by_attention(model, s.one), 4)
        ),
        "layers": lambda: analysis.layer_scores(model, s.one, s.answers[0]),
        "positions": lambda: analysis.position_scores(model, s.one, heads=2),
        "image": lambda: analysis.position_scores(model, s.one, s.answers[0], heads="all", positions="image"),
        "batch": lambda: analysis.head_scores(model, s.batch(), list(s.answers)),
        "right": lambda: analysis.head_scores(model, s.batch(padding_side="right")),
    }


@on(ALL, quick=QUICK)
def scores_of_several_tokens(s: Subject) -> Made:
    """Answers of two tokens, and of several spellings."""
    two = " ".join(s.answers)
    decision = cache_answer(s.model, s.one, two)
    spelled = Answer.of(s.model, s.answers[0], variants=True)
    return {
        "decision": [decision.names, decision.logit_positions, decision.target, decision.scale],
        "streams": torch.stack(decision.resid)[..., ::4],
        "heads": lambda: analysis.head_scores(s.model, s.one, two),
        "spelled": lambda: analysis.head_scores(s.model, s.one, spelled),
        "map": lambda: analysis.patch_importance(s.model, s.batch(), two),
        "curves": lambda: analysis.answer_probability(s.model, s.one, two),
    }


@on(ALL, quick=["direct-float64"])
def patch_importance(s: Subject) -> Made:
    found = {method: lambda method=method: analysis.patch_importance(s.model, s.one, method=method) for method in _MAPS}
    found["heads"] = lambda: analysis.patch_importance(s.model, s.one, heads=3)
    found["all"] = lambda: analysis.patch_importance(s.model, s.batch(), heads="all")
    found["vision"] = lambda: analysis.patch_importance(
        s.model, s.one, s.answers[1], method="grad_x_input", vision=True
    )
    found["wide"] = lambda: analysis.patch_importance(s.model, s.one, method="occlusion", window=2)
    return found


@on(SOME)
def patch_importance_through_vision(s: Subject) -> Made:
    options: dict[str, dict[str, Any]] = {"rollout": {}, "relevancy": {}, "integrated_gradients": {"steps": 4}}
    return {
        method: lambda method=method: analysis.patch_importance(
            s.model, s.one, method=method, vision=True, **options[method]
        )
        for method in options
    }


@on(ALL, quick=QUICK)
def readings(s: Subject) -> Made:
    """What heads find and send, and where words are stored."""
    model = s.model
    stored = analysis.information_storage(model, s.one, *s.answers, positions="image", top=5)
    cosine = lambda: analysis.head_readings(model, s.one, 0, 1, space="cosine", top=2, k=2)  # noqa: E731
    return {
        "cosine": None if s.has_ties else cosine,
        "head": lambda: analysis.head_readings(model, s.one, 1, 2),
        "embed": lambda: analysis.head_readings(
            model, s.one, 1, 0, s.answers[0], positions="question", space="embed", k=3
        ),
        "stored": stored,
        "everywhere": lambda: analysis.information_storage(
            model, s.batch(), *s.answers, heads=2, spaces=["unembed", "cosine"]
        ),
        "rank": analysis.reciprocal_rank(stored, dim=("position",)),
        "object": lambda: analysis.attention_to_object(model, s.one, s.other, [3, 4]),
        "pairs": lambda: analysis.attention_to_object(model, s.one, s.other, "image", heads=[(0, 1), (1, 2)]),
    }


@on(ALL, quick=QUICK)
def ablation(s: Subject) -> Made:
    model = s.model
    sets = analysis.nested_sets("best", analysis.top_heads(analysis.head_scores(model, s.one), 8), (2, 4, 8))
    drawn = analysis.random_heads(model, seed=1)
    return {
        "zero": lambda: analysis.ablate_heads(model, s.one, sets, replace="zero"),
        "mean": lambda: analysis.ablate_heads(model, s.batch(), {"drawn": drawn[:3]}, reference=s.batch()),
        "drawn": drawn,
    }


@on(SOME, quick=["direct-float64"])
def signs_and_curves(s: Subject) -> Made:
    """What a map is worth."""
    grid = s.model.config.vision.patch_grid[0]
    coverage = np.zeros((grid, grid))
    coverage[0, 1] = coverage[1, 1] = 1.0
    both = analysis.patch_importance(s.model, s.batch())
    maps = {"importance": both.values[0].reshape(grid, grid), "rows": np.arange(grid * grid).reshape(grid, grid)}
    signs = analysis.answer_signs(s.model, s.batch(), both, np.stack([coverage] * 2))
    flat = both.values.reshape(2, grid, grid)
    return {
        "curves": lambda: analysis.deletion_curves(s.model, s.one, maps, shares=(0.0, 0.2, 0.5, 1.0)),
        "tokens": lambda: analysis.deletion_curves(
            s.model, s.one, maps, s.answers[0], where="tokens", shares=(0, 0.5, 1)
        ),
        "signs": signs,
        "predicted": lambda: analysis.predict_wrong(signs, [True, False]),
        "quality": map_quality(flat, np.stack([coverage] * 2), np.stack([np.flipud(coverage)] * 2)),
    }


# ---------------------------------------------------------------------- flow


@on(ALL, quick=QUICK)
def knockout(s: Subject) -> Made:
    model, prompt = s.model, with_boxes(s.one)
    edges = [
        "image->last",
        "question->last",
        "image->question|rest",
        "last->last",
        "question-last->last",
        "other->last",
    ]
    metric = {"metric": "logit_difference", "answer": s.answers[0], "baseline": s.answers[1]}
    flow = analysis.attention_knockout(model, prompt, [*edges, "object->last", "random->last"], 1, total=True, seed=3)
    return {
        "flow": flow,
        "summary": lambda: analysis.flow_summary(flow),
        "default": lambda: analysis.attention_knockout(model, s.one),
        "batch": lambda: analysis.attention_knockout(model, s.batch(), edges[:2], "all", **metric),
        "named": lambda: analysis.attention_knockout(
            model, s.one, {"mine": ([2, 3], "last")}, 3, metric="log_probability"
        ),
        "centers": lambda: analysis.attention_knockout(
            model, s.one, edges[:1], 2, centers=[0, 2], metric="probability"
        ),
        "missing": lambda: analysis.attention_knockout(model, s.one, ["object->last"], 1, missing="skip"),
    }


@on(ALL, quick=QUICK)
def answer_probability(s: Subject) -> Made:
    return {
        "one": lambda: analysis.answer_probability(s.model, s.one),
        "batch": lambda: analysis.answer_probability(s.model, s.batch(), list(s.answers), s.answers[1]),
    }


# ---------------------------------------------------------------------- traces


@on(ALL, quick=QUICK)
def causal_trace(s: Subject) -> Made:
    model = s.model
    trace = analysis.causal_trace(model, s.one, s.constraint, corruption=s.instead)
    return {
        "trace": trace,
        "lowered": was_lowered(trace),
        "best": analysis.best_cells(trace),
        "roles": analysis.by_role(trace),
    }


@on(SOME, quick=["direct-float64"])
def corruptions(s: Subject) -> Made:
    model, token = s.model, s.model.to_single_token(s.answers[0])
    kinds: dict[str, Any] = {
        "noise": Noise(seed=2, samples=2),
        "small noise": Noise(std=0.1),
        "mean": MeanEmbedding(),
        "repeated": Replace(s.instead, repeat=True),
        "image": OtherImage(s.images[1]),
    }
    found: dict[str, Any] = {
        name: lambda corruption=corruption: analysis.causal_trace(
            model, s.one, s.constraint, corruption=corruption, kinds=("mlp",)
        )
        for name, corruption in kinds.items()
    }
    wide = {"window": 2, "layers": [0, 1], "positions": "question", "metric": log_probability(token)}
    found["windows"] = lambda: analysis.causal_trace(model, s.one, s.constraint, corruption=s.instead, **wide)
    released = {"window": 1, "window_reading": "released", "kinds": ["resid"]}
    found["released"] = lambda: analysis.causal_trace(model, s.one, s.constraint, corruption=s.instead, **released)
    two = [analysis.causal_trace(model, s.one, s.constraint, corruption=Noise(seed=seed)) for seed in (0, 1)]
    found["average"] = lambda: analysis.average_traces(two, min_drop=-1.0)
    found["text"] = lambda: analysis.causal_trace(model, s.text, [4], corruption=MeanEmbedding())
    return {**found, "places": [p.tolist() for p in find_constraints(s.one.token_map, [s.constraint])]}


@on(ALL, quick=QUICK)
def contributions(s: Subject) -> Made:
    model = s.model
    return {
        "norm": lambda: analysis.attention_contribution(model, s.one, s.constraint),
        "logit": lambda: analysis.attention_contribution(
            model, s.one, s.constraint, measure="logit", answer=s.answers[0]
        ),
        "heads": lambda: analysis.attention_contribution(model, s.one, s.constraint, by_head=True),
        "auroc": lambda: analysis.error_auroc([0.2, 0.4, 0.4, 0.9], [False, True, False, True]),
    }


# ---------------------------------------------------------------------- metrics


@on(ALL, quick=QUICK)
def metrics(s: Subject) -> Made:
    model = s.model
    logits = model(s.batch())[:, -1]
    word, other = (Answer.of(model, answer) for answer in s.answers)
    every = Answer.of(model, s.answers[0], variants=True)
    forced = teacher_forced(model, s.one, " ".join(s.answers))
    kept = Replay(model, forced.inputs)
    theirs = from_transformer_lens(lambda logits: logits[:, -1, 7].mean() - logits[:, -1, 8].mean())
    return {
        "answers": [word.text, word.ids, every.ids],
        "log_probability": log_probability(every)(logits),
        "probability": probability(word)(logits),
        "logit_difference": logit_difference(word, other)(logits),
        "rank": rank(word)(logits),
        "kl": kl_divergence(logits[0])(logits),
        "relative": relative_change(word, logits[0])(logits),
        "own": own_answers(logits[0], torch.roll(logits[0], 1), model)(logits),
        "at_last": at_last(probability(word), s.batch(padding_side="right"))(model(s.batch(padding_side="right"))),
        "theirs": theirs(logits),
        "forced": [forced.positions, forced.inputs.input_ids, forced.metric(kept.logits(forced.positions))],
    }


@once(quick=True)
def statistics() -> Made:
    rng = np.random.default_rng(0)
    values, positive = rng.normal(size=(3, 20)), rng.random((3, 20)) < 0.3
    return {
        "auc": roc_auc(values, positive),
        "precision": average_precision(values, positive),
        "bootstrap": bootstrap(values[0]),
        "median": bootstrap(values[0], lambda x: float(np.median(x)), n=100, level=0.8, seed=3),
        "intervals": mean_intervals(values, n=100, seed=1),
    }


@once(quick=True)
def refused() -> Made:
    """What is said of arguments that do not fit."""
    s = subject("grouped-float64")
    model = s.model
    calls = {
        "hook": lambda: model.run_with_cache(s.one, names_filter="blocks.*.hook_resid_prae"),
        "span": lambda: s.one.token_map["middle"],
        "word": lambda: s.one.token_map.find("square"),
        "lens": lambda: analysis.logit_lens(model, s.one, positions="middle"),
        "edge": lambda: analysis.attention_knockout(model, s.one, ["last->image"]),
        "metric": lambda: analysis.attention_knockout(model, s.one, metric="nothing"),
        "method": lambda: analysis.patch_importance(model, s.one, method="nothing"),
        "head": lambda: analysis.head_readings(model, s.one, 99, 0),
        "constraint": lambda: analysis.causal_trace(model, s.one, "square"),
        "images": lambda: model.prepare("What?", [s.images[0], 7]),
        "target": lambda: analysis.head_scores(model, s.one, "zzz"),
        "pair": lambda: analysis.activation_patching(model, s.one, s.text),
        "layer": lambda: analysis.activation_patching(model, s.one, s.other, layers=[99]),
    }
    return {name: _said(call) for name, call in calls.items()}


def _said(call: Any) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 (whatever it is)
        return f"{type(error).__name__}: {error}"
    return "nothing"
