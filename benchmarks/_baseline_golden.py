"""Cases of the small recording in tests/data/baseline: values alone, without what results say of themselves."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

from benchmarks._baseline_cases import Made, on
from benchmarks._baseline_editing import request
from benchmarks._baseline_names import Answer, Intervention, Replay, logit_difference, teacher_forced
from benchmarks._baseline_subjects import Subject
from hooked_llava import analysis
from hooked_llava.editing import multedit

_ON = ["grouped-float64"]


def _values(result: Any) -> Any:
    """The numbers and words of a result, by name if it is a dataset."""
    return (
        {name: array.values for name, array in result.data_vars.items()}
        if hasattr(result, "data_vars")
        else result.values
    )


@on(_ON, quick=_ON)
def model(s: Subject) -> Made:
    prompts = {"one": s.one, "left": s.batch(), "right": s.batch(padding_side="right"), "text": s.text}
    return {
        "hooks": list(s.model.hook_dict),
        "logits": {name: s.model(prompt)[:, -1] for name, prompt in prompts.items()},
        "loss": s.model(s.one, return_type="loss"),
        "said": {name: s.model.generate(prompt, max_new_tokens=4) for name, prompt in prompts.items()},
        "drawn": s.model.generate(s.one, 6, do_sample=True, temperature=2.0, seed=1, stop_at_eos=False),
        "labels": [list(m.labels) for m in s.batch().token_maps],
        "spans": {name: list(where) for name, where in s.one.token_map.spans.items()},
    }


@on(_ON, quick=_ON)
def read(s: Subject) -> Made:
    """What is read from one run."""
    lens = analysis.logit_lens(s.model, s.one, k=3)
    ways = ("component", "head", "neuron", "patch")
    return {
        "lens": [lens.token.values, lens.probability.values],
        "parts": {by: _values(analysis.logit_attribution(s.model, s.one, s.answers[0], by=by)) for by in ways},
        "heads": _values(analysis.head_scores(s.model, s.batch(), s.answers[0])),
        "positions": analysis.position_scores(s.model, s.one, heads=2).score.values,
        "map": {m: _values(analysis.patch_importance(s.model, s.one, method=m)) for m in ("log_increase", "relevancy")},
        "curve": _values(analysis.answer_probability(s.model, s.one, s.answers[0])),
    }


@on(_ON, quick=_ON)
def changed(s: Subject) -> Made:
    """What interventions do, and what that costs."""
    model, pair = s.model, (s.one, s.other)
    metric = logit_difference(*(Answer.of(model, answer) for answer in s.answers))
    replay, forced = Replay(model, s.batch()), teacher_forced(model, s.one, " ".join(s.answers))
    runs = [[Intervention("blocks.1.attn.hook_z", positions="last", heads=[h], zero=True)] for h in range(3)]
    runs += [[Intervention("blocks.0.attn.hook_attn_scores", block=("image", "last"))], []]
    patched = analysis.activation_patching(model, *pair, positions="question", metric=metric)
    flow = analysis.attention_knockout(model, s.one, ["image->last", "question->last"], 1, total=True)
    trace = analysis.causal_trace(model, s.one, s.constraint, corruption=s.instead)
    return {
        "runs": replay.run(runs),
        "work": [replay.work.token_layers, replay.work.forwards],
        "forced": forced.metric(Replay(model, forced.inputs).logits(forced.positions)),
        "patched": [patched.values, patched.work, patched.runs],
        "estimate": _values(analysis.attribution_patching(model, *pair, metric=metric)),
        "paths": _values(analysis.path_patching(model, *pair, metric=metric)),
        "flow": [flow.effect.values, flow.total_effect.values, flow.n_forward, flow.work],
        "trace": [trace.indirect_effect.values, trace.restored.values, trace.work, trace.runs],
    }


@on(_ON, quick=_ON)
def edited(s: Subject) -> Made:
    edit = multedit(s.model, request(s), layer=1, position="last")
    with edit.applied():
        during = s.model(s.one)[0, -1]
    return {
        "weights": list(edit.changes),
        "change": [change.matrix() for change in edit.changes.values()],
        "during": during,
        "after": s.model(s.one)[0, -1],
    }
