"""Cases of edits, and of what they change."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks._baseline_cases import Made, on
from benchmarks._baseline_subjects import EDITED, Subject
from hooked_llava import HookedLLaVA, analysis
from hooked_llava.editing import (
    Edit,
    EditRequest,
    Probe,
    active_edits,
    evaluate_edit,
    finetune,
    keep_prompts,
    key_covariance,
    multedit,
    rome,
    sequential_edits,
    summary,
)

_QUICK = ["grouped-float64"]


def request(s: Subject) -> EditRequest:
    """The question about the image, to be answered otherwise."""
    return EditRequest(s.question, s.answers[1], images=s.images[0], constraint=s.constraint)


def shown(edit: Edit) -> dict[str, Any]:
    """An edit's factors and what it says of itself."""
    factors = {name: [change.left, change.right, change.rank] for name, change in edit.changes.items()}
    method = {name: value for name, value in edit.method.items() if name != "seconds"}
    return {
        "repr": repr(edit),
        "factors": factors,
        "method": method,
        "requests": [dict(r) for r in edit.requests],
        "bytes": edit.nbytes,
    }


def _logits(model: HookedLLaVA, edit: Edit, s: Subject) -> dict[str, Any]:
    """Before, with the edit, and after it has been taken back."""
    weights = {name: p.clone() for name, p in model.named_parameters() if name in edit.changes}
    before = model(s.one)[0, -1]
    with edit.applied():
        during, said, active = model(s.one)[0, -1], model.generate(s.one, max_new_tokens=3), len(active_edits(model))
    same = all(torch.equal(weights[name], model.get_parameter(name)) for name in weights)
    return {"before": before, "during": during, "said": said, "active": active, "reverted": same}


@on(EDITED, quick=_QUICK)
def mult_edit(s: Subject) -> Made:
    model, last = s.model, {"position": "last", "layer": s.model.cfg.n_layers - 2}
    edit = multedit(model, request(s), **last)
    two = EditRequest(list(s.questions), s.answers[1], images=list(s.images))
    several = [EditRequest(s.text_question, s.answers[0]), EditRequest(s.one, s.answers[1])]
    return {
        "last": shown(edit),
        "logits": _logits(model, edit, s),
        "constraint": lambda: shown(multedit(model, request(s), layer=0)),
        "traced": lambda: shown(multedit(model, request(s))),
        "averaged": lambda: shown(multedit(model, two, **last)),
        "each": lambda: shown(multedit(model, two, keys="each", **last)),
        "together": lambda: shown(multedit(model, several, **last)),
        "keep": lambda: shown(multedit(model, request(s), keep=s.other, lam=0.1, **last)),
        "released": lambda: shown(multedit(model, request(s), clamp=1e-4, steps=3, **last)),
        "two tokens": lambda: shown(multedit(model, EditRequest(s.one, " ".join(s.answers)), **last)),
    }


@on(EDITED, quick=_QUICK)
def rome_edit(s: Subject) -> Made:
    model, layer = s.model, s.model.cfg.n_layers - 2
    covariance = key_covariance(model, [s.batch(), s.text], layer)
    edit = rome(model, request(s), covariance, position="last")
    return {
        "moment": [covariance.moment.sum(0), covariance.n_keys, covariance.damping],
        "all positions": lambda: key_covariance(model, [s.one], layer, positions="image").moment.sum(0),
        "edit": shown(edit),
        "logits": _logits(model, edit, s),
        "damped": lambda: shown(rome(model, request(s), covariance, position="last", lam=0.1, steps=5)),
    }


@on([*EDITED, "direct-float64"], quick=_QUICK)
def fine_tuned(s: Subject) -> Made:
    model = s.model
    edit = finetune(model, request(s), layers=[1], steps=4)
    return {
        "edit": shown(edit) | {"factors": {name: c.matrix().sum(0) for name, c in edit.changes.items()}},
        "logits": _logits(model, edit, s),
        "bounded": lambda: _logits(model, finetune(model, request(s), layers=1, steps=3, max_change=0.01), s),
        "all": lambda: _logits(model, finetune(model, request(s), layers="all", weights="all", steps=2), s),
    }


@on(EDITED, quick=_QUICK)
def evaluated(s: Subject) -> Made:
    model, last = s.model, {"position": "last", "layer": s.model.cfg.n_layers - 2}
    edit, second = (
        multedit(model, request(s), **last),
        multedit(model, EditRequest(s.text_question, s.answers[0]), **last),
    )
    target = s.answers[1]
    probes = [
        Probe("own", "efficacy", s.one, target),
        Probe("words", "generalisation", s.batch(), [target, target]),
        Probe("other image", "specificity", s.other),
        Probe("kept", "locality", keep_prompts(model, s.text, [0])),
    ]
    found = evaluate_edit(model, edit, probes)
    with edit.applied(), second.applied():
        both, order = model(s.one)[0, -1], [repr(one) for one in active_edits(model)]
        first_back = analysis.next_tokens(model, s.one, k=3)
    requests = [EditRequest(s.one, s.answers[1]), EditRequest(s.text_question, s.answers[0])]

    def make(model: HookedLLaVA, request: EditRequest) -> Edit:
        return multedit(model, request, **last)

    def measure(n: int) -> dict[str, float]:
        return {"p": float(model(s.one)[0, -1].softmax(-1).max())}

    return {
        "found": found,
        "summary": summary(found),
        "both": [both, order, first_back],
        "after": model(s.one)[0, -1],
        "sequence": lambda: sequential_edits(model, requests, make, measure, at=(1, 2)),
    }
