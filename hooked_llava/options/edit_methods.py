"""The ways to compute an edit: for each its function, its name, the arguments that the command gives it, and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from hooked_llava.options.markdown import code_list, markdown_rows


@dataclass(frozen=True, kw_only=True)
class EditMethod:
    """One method of editing; its name is its key in `EDIT_METHODS`, in `edit.method`, and on the command line.

    Attributes:
        function (str): Where the function is, as module:name. It takes the model, requests and `options`.
        meaning (str): What it is, as the command's help and the documentation say it.
        explanation (str): What it did to the weights, as a page says it.
        options (tuple[str, ...]): Its arguments that the command can give.
    """

    function: str
    meaning: str
    explanation: str
    options: tuple[str, ...]

    def compute(self, *args: Any, **options: Any) -> Any:
        """Call the function, which is imported now."""
        return resolve_name(self.function)(*args, **options)


REVERTS = "All other weights are as they were, and the edit can be reverted bit for bit."
"""Said of every edit on its page."""
_CLOSED_FORM = (
    "The MLP's output at the edited position gets a difference that was searched for by gradient descent so that the target "
    "becomes probable; the update is the smallest change of the MLP's output matrix W_out that gives this difference to the "
    "neurons' activations there (the key), up to λ{}."
)
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
