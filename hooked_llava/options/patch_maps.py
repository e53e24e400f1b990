"""The ways to draw a patch map: for each its function, its name, what it is called and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from hooked_llava.options.markdown import code_list, markdown_rows
from hooked_llava.options.needs import Need


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """One method of `patch_importance`; its name is its key in `PATCH_MAPS`, and on the command line.

    Attributes:
        function (str): Where the function is that draws it, as module:name. It takes the model, prompts, a target and
            `options`.
        title (str): What it is called above a figure.
        meaning (str): What it shows, as the page and the documentation say it.
        units (str): Units of its numbers.
        options (tuple[str, ...]): The arguments of `patch_importance` that it takes.
        needs (tuple[Need, ...]): What it needs of the model and of the prompts.
        one_prompt (bool): Whether it runs one prompt at a time.
        takes_cache (bool): Whether it also takes an `AnswerCache` of prompts that were run before.
    """

    function: str
    title: str
    meaning: str
    units: str
    options: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ("images_alike",)
    one_prompt: bool = False
    takes_cache: bool = False

    def draw(self, *args: Any, **options: Any) -> Any:
        """Call the function, which is imported now."""
        function: Callable[..., Any] = resolve_name(self.function)
        return function(*args, **options)


_HERE = "hooked_llava.analysis.maps.methods:"
_NATS = "change of log P (nats)"

PATCH_MAPS: dict[str, PatchMap] = {
    "log_increase": PatchMap(
        function=_HERE + "log_increase",
        title="Log-probability increase",
        meaning="how much likelier the answer becomes when what one head (the one with the largest score) brings "
        "from a patch is added to the residual stream entering its layer, S(A v W_O | x), read with the final norm's scale "
        "held (Yu & Ananiadou, arXiv 2411.10950)",
        units="log-probability increase (nats)",
        options=("heads",),
        takes_cache=True,
    ),
    "attention": PatchMap(
        function=_HERE + "attention",
        title="Mean attention",
        meaning="attention from the last position, averaged over all heads of all layers; it knows nothing of the answer",
        units="attention",
        options=("heads",),
        takes_cache=True,
    ),
    "grad_x_input": PatchMap(
        function=_HERE + "grad_x_input",
        title="Gradient × input",
        meaning="gradient of log P times the image embedding, to first order what the embedding adds",
        units=_NATS,
        options=("vision",),
    ),
    "integrated_gradients": PatchMap(
        function=_HERE + "integrated_gradients",
        title="Integrated gradients",
        meaning="the gradient of log P averaged on the line from the image's mean embedding to each patch's own, times "
        "their difference (arXiv 1703.01365)",
        units=_NATS,
        options=("steps", "vision"),
    ),
    "rollout": PatchMap(
        function=_HERE + "rollout",
        title="Attention rollout",
        meaning="attention multiplied through all layers, the residual stream counted as attention to oneself "
        "(arXiv 2005.00928); it knows nothing of the answer",
        units="attention rollout",
        options=("vision",),
    ),
    "relevancy": PatchMap(
        function=_HERE + "relevancy",
        title="Relevancy",
        meaning="attention times its gradient, where positive, accumulated through all layers (arXiv 2103.15679)",
        units="relevancy",
        options=("vision",),
    ),
    "grad_cam": PatchMap(
        function=_HERE + "grad_cam",
        title="Grad-CAM",
        meaning="the residual stream entering a layer, along the gradient of the answer's logit averaged over the image, "
        "where positive (arXiv 1610.02391)",
        units="logit",
        options=("layer", "vision"),
    ),
    "tam": PatchMap(
        function=_HERE + "tam",
        title="Token activation map",
        meaning="the logit of the answer's token read at every patch, less what earlier words of question and answer "
        "say there, where positive, denoised (arXiv 2506.23270)",
        units="logit",
        takes_cache=True,
    ),
    "occlusion": PatchMap(
        function=_HERE + "occlusion",
        title="Occlusion",
        meaning="what log P loses when a patch is painted grey in the image, and the model is run again",
        units=_NATS,
        options=("window", "grid"),
        needs=("images_alike", "no_functions"),
        one_prompt=True,
    ),
    "token_ablation": PatchMap(
        function=_HERE + "token_ablation",
        title="Ablated image tokens",
        meaning="what log P loses when a patch's image embedding is replaced by the image's mean embedding",
        units=_NATS,
        options=("window", "fill"),
        needs=("images_alike", "no_functions"),
        one_prompt=True,
    ),
}
"""By the name that `patch_importance(method=)` and `hooked-llava explain --patches` take."""


def markdown_table(methods: Mapping[str, PatchMap] = PATCH_MAPS) -> str:
    """The methods as a table for the documentation.

    >>> markdown_table().splitlines()[7].startswith("| `relevancy` | Relevancy |")
    True
    """
    rows = [(f"`{name}`", one.title, code_list(one.options), one.meaning) for name, one in methods.items()]
    return markdown_rows(("method", "called", "options", "shows"), rows)
