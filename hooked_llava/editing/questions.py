"""What is answered to each question without an edit and with it, where `evaluate_edit` averages over a probe's questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from torch import Tensor

from hooked_llava.editing.edit import Edit
from hooked_llava.editing.evaluate import Probe, ask_probes, averaged, edited_questions
from hooked_llava.editing.magnitude import MAX_ANSWER
from hooked_llava.editing.prompts import KeptPrompts
from hooked_llava.editing.roles import PROBE_ROLES
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.question import question_text
from hooked_llava.readout.vocabulary import decode_text, decode_tokens
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import Provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

_TOP = 5


def ask_questions(
    model: HookedLLaVA, edit: Edit, probes: Sequence[Probe], *, max_new_tokens: int = MAX_ANSWER
) -> dict[str, Any]:
    """Every question of the probes, asked without the edit and with it.

    Returns `probes`, what `evaluate_edit` gives; `questions`, a dataset
    [question] with text, probe, role, answers and measures of each; and `answers`, probabilities [state, token] of first
    tokens of the first question's answer: that before the edit, the expected one, and what else is most probable in either
    state; coordinates `rest` [state], what all `n_rest` other tokens have together, and `rest_largest` [state], what one of
    them has at most. Raises as `evaluate_edit`, and `InputError` for `KeptPrompts`, which have no words to show.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, multedit
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> question = model.prepare("Who made the star?")
    >>> edit = multedit(model, EditRequest(question, "Boris"), layer=3, position="last")
    >>> found = ask_questions(model, edit, [Probe("itself", "efficacy", question, "Boris")])["questions"]
    >>> found.before.values.tolist(), found.after.values.tolist()
    (['Clara'], ['Boris'])
    """
    asked = [(probe, prompt) for probe in probes for prompt in probe_prompts(model, probe)]
    made = Provenance.of("evaluate_edit", model, edited_questions(edit), method=dict(edit.method))
    found = ask_probes(model, edit, probes, max_new_tokens=max_new_tokens)
    made.n_forward = sum(one.n_forward for one in found)
    probed = averaged(found, made)
    said = [one.said(model) for one in found]
    each = {name: torch.cat([one.measures()[name] for one in found]) for name in found[0].measures()}
    wanted = [[i for i in row if i >= 0] for one in found for row in one.expected[..., 0].tolist()]
    columns = {
        "text": [question_text(prompt) for _, prompt in asked],
        "probe": [probe.name for probe, _ in asked],
        "role": [probe.role for probe, _ in asked],
        "expected": [decode_text(model, ids) for ids in wanted],
        "before": [text for before, _ in said for text in before],
        "after": [text for _, after in said for text in after],
        "changed": each["changed"].bool().cpu().numpy(),
        "as_expected_before": each["accuracy_before"].bool().cpu().numpy(),
        "as_expected": each["accuracy"].bool().cpu().numpy(),
        **{name: to_numpy(x) for name, x in each.items() if name in ("probability_before", "probability", "kl")},
        **{name: to_numpy(x) for name, x in each.items() if "magnitude" in name},
    }
    questions = xr.Dataset({name: ("question", values) for name, values in columns.items()}, attrs=probed.attrs)
    own = found[0]
    first = _first_tokens(model, own.before[0, 0], own.after[0, 0], own.expected[0, 0, 0])
    return {"answers": first, "probes": probed, "questions": questions}


def most_probable_others(answers: xr.DataArray, state: str, n: int = 3) -> xr.DataArray:
    """Of `answers` in a state, the n most probable tokens besides the answer before and the target, in that order."""
    others = answers.isel(token=slice(answers.attrs["n_followed"], None)).sel(state=state)
    return others.isel(token=others.argsort().values[::-1][:n])


def probe_prompts(model: HookedLLaVA, probe: Probe) -> Inputs:
    """A probe's prompts as the model takes them; raises `InputError` for kept ones."""
    if isinstance(probe.prompts, KeptPrompts):
        raise InputError(
            f"Probe {probe.name!r} holds kept prompts, which have no words to show; give the prompts themselves."
        )
    return model.as_inputs(probe.prompts)


def missed(questions: xr.Dataset) -> list[bool]:
    """Of each of `ask_questions`' questions whether the edit does not do what it should: change its answer, or leave it.

    >>> data = {"role": ["efficacy", "locality"], "as_expected": [False, True], "changed": [True, True]}
    >>> missed(xr.Dataset({name: ("question", values) for name, values in data.items()}))
    [True, True]
    """
    columns = (questions[name].values.tolist() for name in ("role", "as_expected", "changed"))
    return [
        not right if PROBE_ROLES[role].to_change else changed for role, right, changed in zip(*columns, strict=True)
    ]


def _first_tokens(model: HookedLLaVA, before: Tensor, after: Tensor, target: Tensor) -> xr.DataArray:
    p = torch.stack([before, after]).float().softmax(-1)
    top = p.topk(min(_TOP, p.shape[-1]), dim=-1).indices.flatten().tolist()
    ids = list(dict.fromkeys([int(before.argmax()), int(target), *top]))
    names = decode_tokens(model, torch.tensor(ids))
    others = p.clone()
    others[:, ids] = 0
    rest = {"rest": ("state", to_numpy(others.sum(-1))), "rest_largest": ("state", to_numpy(others.amax(-1)))}
    coords = {"state": ["before", "after"], "token": names, "token_id": ("token", ids), **rest}
    found = xr.DataArray(to_numpy(p[:, ids]), dims=("state", "token"), coords=coords, name="probability")
    return found.assign_attrs(n_followed=len({ids[0], int(target)}), n_rest=p.shape[-1] - len(ids))
