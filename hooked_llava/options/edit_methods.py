"""The ways to compute an edit: for each its function, its name, the arguments that the command gives it, and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from hooked_llava.options.markdown import code_list, markdown_rows


@dataclass(frozen=True, kw_only=True)
class EditMethod:
    """One method of editing; its name is its key in `EDIT_METHODS` and on the command line.

    `edit.method` says the name of the function, and `settings` where they are not its defaults.

    Attributes:
        function (str): Where the function is, as module:name. It takes the model, requests and `options`.
        meaning (str): What it is, as the command's help and the documentation say it.
        explanation (str): What it did to the weights, as a page says it.
        options (tuple[str, ...]): Its arguments that the command can give.
        settings (Mapping[str, Any]): Its arguments that this entry sets.
    """

    function: str
    meaning: str
    explanation: str
    options: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def compute(self, *args: Any, **options: Any) -> Any:
        """Call the function, which is imported now."""
        return resolve_name(self.function)(*args, **{**self.settings, **options})


REVERTS = "All other weights are as they were, and the edit can be reverted bit for bit."
"""Said of every edit on its page."""
_CLOSED_FORM = (
    "The MLP's output at the edited position gets a difference that was searched for by gradient descent so that the target "
    "becomes probable; the update is the smallest change of the MLP's output matrix W_out that gives this difference to the "
    "neurons' activations there (the key), up to λ{}."
)
ROME_RELEASED: Mapping[str, Any] = {
    "contexts": "generated",
    "keys": "plain",
    "clamp": 4.0,
    "steps": 19,
    "lr": 0.5,
    "weight_decay": 0.5,
    "stop": None,
    "stop_loss": 0.05,
    "per_token": True,
    "kl": 0.0625,
    "kl_at": "edited",
}
"""How ROME's authors run it, as arguments of `rome`: their released code with its settings for GPT-2 XL. Its 20 evaluations of
the loss make 19 steps."""
EDIT_METHODS: dict[str, EditMethod] = {
    "multedit": EditMethod(
        function="hooked_llava.editing.multedit:multedit",
        meaning="the smallest change of one MLP's output matrix that gives the key the wanted value (Basu et al., arXiv "
        "2406.04236)",
        explanation=_CLOSED_FORM.format(""),
        options=("layer", "position", "lam", "clamp", "keep"),
    ),
    "rome": EditMethod(
        function="hooked_llava.editing.rome:rome",
        meaning="the same, with smallness measured by what keys usually look like, a key covariance (Meng et al., arXiv "
        "2202.05262)",
        explanation=_CLOSED_FORM.format("; how small a change is, is measured on what keys usually look like"),
        options=("covariance", "position", "lam", "clamp", "keep"),
    ),
    "rome-released": EditMethod(
        function="hooked_llava.editing.rome:rome",
        meaning="rome as its authors run it: key and loss averaged over generated contexts, what is said of the constraint kept "
        "by a KL term, weight decay, a stop at a loss",
        explanation=_CLOSED_FORM.format("; how small a change is, is measured on what keys usually look like"),
        options=("covariance", "position", "lam", "clamp", "keep"),
        settings=ROME_RELEASED,
    ),
    "memit": EditMethod(
        function="hooked_llava.editing.memit:memit",
        meaning="the change spread over the MLPs of several layers, each taking its share of what is still missing, with a key "
        "covariance for each (Meng et al., arXiv 2210.07229)",
        explanation="The residual stream that leaves the last of the edited layers at the edited position gets a difference that "
        "was searched for by gradient descent so that the target becomes probable. Layer after layer, from the lowest, the MLP's "
        "output matrix W_out takes an equal share of what is still missing, by the change that is smallest on what keys usually "
        "look like, weighted by λ.",
        options=("covariance", "position", "lam", "clamp", "n_layers"),
    ),
    "finetune": EditMethod(
        function="hooked_llava.editing.finetune:finetune",
        meaning="gradient descent on the MLP's output matrix itself, to compare with",
        explanation="The weights named above were changed by gradient descent until the target was probable.",
        options=("layers",),
    ),
}
"""By the name that `edit.method` says and `hooked-llava edit --method` takes."""


def markdown_table(methods: Mapping[str, EditMethod] = EDIT_METHODS) -> str:
    """The methods as a table for the documentation.

    >>> markdown_table().splitlines()[2].startswith("| `multedit` | `layer`, `position`, ")
    True
    """
    rows = [(f"`{name}`", code_list(one.options), one.meaning) for name, one in methods.items()]
    return markdown_rows(("method", "options of the command", "computes"), rows)
