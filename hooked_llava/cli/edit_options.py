"""What `hooked-llava edit` takes about the edit itself: what to change, where and how."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.command import as_arguments
from hooked_llava.cli.common import WindowOptions
from hooked_llava.errors import InputError
from hooked_llava.options.edit_methods import EDIT_METHODS, EditMethod
from hooked_llava.options.edit_places import AUTO, EDIT_LAYERS, EDIT_POSITIONS

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.editing import EditRequest
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

# Where edits of the embedded world's facts take best, see benchmarks/editing.py.
EMBEDDED_LAYER, EMBEDDED_POSITION = 3, "last"

Method = StrEnum("Method", list(EDIT_METHODS))
Target = Annotated[str | None, typer.Option("--target", "-t", metavar="WORDS", help="What the model is to answer.")]
ConstraintWords = Annotated[
    str | None,
    typer.Option("--constraint", "-c", metavar="WORDS", help="Words of the question that the fact is about."),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help=f"The layer whose MLP is edited; {AUTO}: {EDIT_LAYERS[AUTO]}. Default: {AUTO}; in the embedded models, at "
        f"position last, {EMBEDDED_LAYER}, where edits carry over best to other images and words, and change hardly anything "
        "else.",
    ),
]
Position = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="; ".join(f"{name}: {meaning}" for name, meaning in EDIT_POSITIONS.items())
        + "; or a span, such as last or question, whose last "
        f"token it is. Default: {AUTO}; in the embedded models {EMBEDDED_POSITION}, since hardly any edit at the constraint "
        "reaches the answer there.",
    ),
]
MethodOption = Annotated[
    Method, typer.Option(help="; ".join(f"{name}: {one.meaning}" for name, one in EDIT_METHODS.items()) + ".")
]
Lambda = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Weight of the update's size against its fit. Default: 0.01; 0 for rome; 100 for memit."
    ),
]
Clamp = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Longest change of the MLP's output, in lengths of that output; for memit of the residual stream. Default: 4; 0.75 "
        "for memit. MultEdit's released 1e-4 changes nothing.",
    ),
]
Covariance = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="For rome and memit: the file that key_covariance wrote for the layer; for memit one for each layer, the option "
        "repeated. The embedded models do without: their own questions are taken.",
    ),
]
NLayers = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="For memit: how many layers share the change; --layer is the last of them."),
]
ReplaceBy = Annotated[
    str | None,
    typer.Option("--replace", metavar="WORDS", help="The trace replaces the constraint by these, of as many tokens."),
]


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """What is to be changed, where, and how."""

    target: Target = None
    constraint: ConstraintWords = None
    layer: Layer = None
    position: Position = None
    method: MethodOption = Method.multedit
    lam: Lambda = None
    clamp: Clamp = None
    covariance: Covariance = None
    n_layers: NLayers = 3
    replace: ReplaceBy = None

    @property
    def entry(self) -> EditMethod:
        """The method's entry in the table."""
        return EDIT_METHODS[self.method.value]

    def place(self, embedded: bool) -> tuple[int | str, str]:
        """The layer and the position, by default those that suit an embedded model; either may be "auto"."""
        position = self.position or (EMBEDDED_POSITION if embedded else AUTO)
        if self.layer is None and embedded and position == EMBEDDED_POSITION:
            return EMBEDDED_LAYER, position
        layer = self.layer or AUTO
        try:
            return (layer if layer == AUTO else int(layer)), position
        except ValueError:
            raise InputError(f"--layer {layer} is no layer; expected a number, or auto.") from None

    def numbers(self) -> dict[str, float]:
        """The numbers of the update, where they are not left to the method."""
        return {name: x for name, x in (("clamp", self.clamp), ("lam", self.lam)) if x is not None}

    @property
    def is_spread(self) -> bool:
        """Whether several layers share the change."""
        return "n_layers" in self.entry.options

    def layers(self, last: int) -> list[int]:
        """The layers that are edited."""
        return list(range(max(0, last + 1 - self.n_layers), last + 1)) if self.is_spread else [last]

    def request(self, inputs: Inputs) -> EditRequest:
        """What is to be changed, of a prompt."""
        from hooked_llava.editing import EditRequest

        return EditRequest(inputs, self.target or "", constraint=self.constraint)

    def trace(self, model: HookedLLaVA, inputs: Inputs, windows: WindowOptions) -> xr.Dataset:
        """Which MLPs restore the answer when the constraint is corrupted."""
        from hooked_llava.editing.layer_choice import lowering_trace
        from hooked_llava.experiments.corruptions import Replace

        how: dict[str, Any] = {} if self.replace is None else {"corruptions": [Replace(self.replace)]}
        return lowering_trace(model, inputs, self.constraint or "", kinds=("mlp",), **how, **as_arguments(windows))
