"""Does an edit do what it was asked for? Every request is asked again with it, before it is returned."""

from __future__ import annotations

from typing import Any

import torch

from hooked_llava.editing import weight_records
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.rows import Rows
from hooked_llava.editing.values import TargetNotReached
from hooked_llava.errors import warn_user
from hooked_llava.readout.answer import answer_is_said, said_until_wrong
from hooked_llava.readout.vocabulary import decode_text


@torch.no_grad()
def check_landed(edit: Edit, rows: Rows) -> Edit:
    """The edit, whose requests now say whether it `landed` (every prompt is answered by the target) and what is answered.

    The weights are not touched: the blocks run with those that the edit would write. Warns with `TargetNotReached` of the
    requests that missed. Raises `InputError` if a weight's dtype is too coarse for the change.
    """
    rows = rows.without_contexts()
    named = {name: edit.model.get_parameter(name) for name in edit.changes}
    changed = {n: weight_records.with_change(n, named[n], edit.active, change) for n, change in edit.changes.items()}
    logits = rows.logits_with(changed, min(edit.layers))  # (row, read, d_vocab)
    best, right = logits.argmax(-1), answer_is_said(logits, rows.ids)  # (row, read), (row)
    probability = rows.mean(rows.log_probability(logits).exp()).tolist()
    found = []
    for i, request in enumerate(edit.requests):
        own = (rows.request == i).nonzero()[:, 0]
        shown = own[right[own].long().argmin()]  # the first prompt that is missed, if any is
        answer = decode_text(rows.kept.model, said_until_wrong(best[shown], rows.ids[shown]))
        landed = bool(right[own].all())
        found.append({**request, "landed": landed, "answer": answer})
        if not landed:
            warn_user(_missed(edit, found[-1], int(shown - own[0]), probability[i]), TargetNotReached)
    edit.requests = tuple(found)
    return edit


def _missed(edit: Edit, request: dict[str, Any], prompt: int, probability: float) -> str:
    method = edit.method
    at = {
        key: method[key]
        for key in ("layer", "layers", "position", "clamp", "lam", "max_change", "steps")
        if key in method
    }
    return (
        f"With the edit {request['prompts'][prompt]!r} is answered by {request['answer']!r} and not by {request['target']!r} "
        f"(P {probability:.2g}). It was made at {', '.join(f'{key}={value!r}' for key, value in at.items())}: try another "
        "layer or position (edit_sweep in hooked_llava.editing tries them all), a larger limit on the change, or more steps."
    )
