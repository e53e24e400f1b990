"""ROME (Meng et al. 2022, arXiv 2202.05262): as MultEdit, with keys measured against what keys usually look like."""

from __future__ import annotations

from hooked_llava.editing.contexts import ESSENCE, Contexts
from hooked_llava.editing.covariance import KeyCovariance
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.request import Requests, ToKeep, check_editable
from hooked_llava.editing.solved import Keys, solve_edit
from hooked_llava.editing.values import KlAt, ValueSearch
from hooked_llava.model.llava import HookedLLaVA


def rome(
    model: HookedLLaVA,
    requests: Requests,
    covariance: KeyCovariance,
    *,
    position: str = "auto",
    lam: float = 0.0,
    keys: Keys = "mean",
    keep: ToKeep | None = None,
    contexts: Contexts = (),
    clamp: float = 4.0,
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 1e-3,
    stop: float | None = 0.99,
    stop_loss: float | None = None,
    per_token: bool = False,
    kl: float = 0.0,
    kl_prompt: str = ESSENCE,
    kl_at: KlAt = "last",
) -> Edit:
    """An edit of one layer's W_out along corrected keys C^-1 k: other keys, alike in what all share, feel it less.

    Args:
        model: the model; edits that are active on it stay, and are built upon.
        requests: what to change; several are solved for together.
        covariance: from `key_covariance`, which says what layer is edited: C of equation 2 of 2202.05262.
        position: as in `multedit`; the paper edits the subject's last token, "constraint" here.
        lam: as in `multedit`; 0 in equation 2, where the fit is exact.
        keys: the "mean" key of prompts and contexts gets the difference (equations 2 and 3), "each" key, or "plain": along the
            mean, scaled so that the key without context gets it, as in the released code.
        keep: prompts whose answers are to stay, as in `multedit`.
        contexts: texts before the question to average key and loss over, x_j of equations 3 and 4a; "generated" makes some.
        clamp: longest value difference, in lengths of the MLP's output without context; only in the released code.
        steps: steps of Adam at most; the released code evaluates the loss 20 times, the last time without a step.
        lr: learning rate of Adam.
        weight_decay: weight of |difference| / |output|^2 in the loss, which the released code adds to equation 4.
        stop: probability of the target in all prompts at which a request is done; or None.
        stop_loss: loss below which it is done: the released code's rule, at 0.05.
        per_token: mean of -log P over the target's tokens, as in the released code, in place of their sum, equation 4a.
        kl: weight of KL(with the difference || without) of what follows the essence prompt, equation 4b; 0.0625 in the code.
        kl_prompt: the essence prompt, p' of equation 4b, with {} for the constraint; it stands in the question's place.
        kl_at: read it at the prompt's "last" position, equation 4b, or at the "edited" one, as the released code does.

    The defaults are MultEdit's search; `**ROME_RELEASED` is the authors' way. Raises as `multedit`, and `InputError` where
    contexts or essence cannot be written: no text of the question, no images but pixel values, no constraint.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import ROME_RELEASED, EditRequest, key_covariance
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> seen = key_covariance(model, [model.prepare(["Who made the ring?", "Who made the moon?"])], layer=4)
    >>> request = EditRequest("Who made the star?", "Boris", constraint="the star")
    >>> len(rome(model, request, seen, position="last", **ROME_RELEASED).method["contexts"])
    20
    """
    check_editable(model)
    covariance.check_model(model)
    search = ValueSearch(steps, lr, clamp, weight_decay, stop, stop_loss, per_token, kl, kl_prompt, kl_at)
    how = {"name": "rome", "lam": lam, "keys": keys, "keep": keep, "covariance": covariance, "contexts": contexts}
    return solve_edit(model, requests, covariance.layer, position, search, **how)
