"""MultEdit (Basu et al. 2024, arXiv 2406.04236): one MLP is taught to answer a key with another value.

Key k: what the neurons of a layer's MLP are at the constraint's last token (`mlp.hook_post`). Value z*: the MLP's output
there plus a difference, optimised so that the model gives the wanted answer. Update: the smallest change of W_out that maps
k to z*, see `closed_form`. The released code's limit on the difference, 1e-4 of the output's length, leaves the weights
practically as they were; here the limit is `clamp`, 4 by default as in ROME.
"""

from __future__ import annotations

from hooked_llava.editing.edit import Edit
from hooked_llava.editing.layer_choice import Layer
from hooked_llava.editing.request import Requests, ToKeep
from hooked_llava.editing.solved import Keys, solve_edit
from hooked_llava.editing.values import ValueSearch
from hooked_llava.model.llava import HookedLLaVA


def multedit(
    model: HookedLLaVA,
    requests: Requests,
    *,
    layer: Layer = "auto",
    position: str = "auto",
    lam: float = 0.01,
    keys: Keys = "mean",
    keep: ToKeep | None = None,
    clamp: float = 4.0,
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 1e-3,
    stop: float = 0.99,
) -> Edit:
    """An edit of one layer's W_out after which the model answers every request with its target; not yet applied.

    Args:
        model: the model; edits that are active on it stay, and are built upon.
        requests: what to change; several are solved for together.
        layer: the layer to edit; a causal trace of the first request's prompt, or "auto" to make one: the layer whose MLP
            restores most at the position.
        position: whose key is edited: "constraint" (its last token, as in the paper), or the name of a span, such as
            "last", whose last position is taken. "auto" takes of these two the one where the trace's MLPs restore most (in
            `layer`, if that is a number), and "last" for requests without a constraint.
        lam: weight of the update's size against its fit: after the edit the output at a key moves by |k|^2 / (lam + |k|^2)
            of the difference.
        keys: of a request with several prompts, edit their "mean" key, or "each" of their keys ("plain" is for the contexts
            of `rome`, and the mean here).
        keep: prompts whose answers are to stay: their keys (at `position`) keep their output. Requests, whose targets do not
            matter then, or inputs, with a span "constraint" where `position` is that.
        clamp: longest value difference, in lengths of the MLP's own output.
        steps: steps of Adam for the value difference.
        lr: learning rate of Adam.
        weight_decay: weight of the difference's length in the loss.
        stop: probability of the target at which a request is done.

    Implements section 4 of 2406.04236 with targets of any number of tokens. Raises `InputError` and `SpanError`, with the
    weights untouched: a constraint that is not in the question, a target without tokens, a layer out of range or from which
    the position does not reach the answer, a trace that does not say where it is stored, a singular update, a dtype too
    coarse to hold it. Every request is asked again with the edit: its entry of `edit.requests` says whether it `landed` and
    what is answered, and `TargetNotReached` warns where that is not the target.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> edit = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last")
    >>> edit.layers, edit.changes["language.blocks.4.mlp.down.weight"].rank
    ([4], 1)
    """
    search = ValueSearch(steps, lr, clamp, weight_decay, stop)
    return solve_edit(model, requests, layer, position, search, lam=lam, keys=keys, keep=keep)
