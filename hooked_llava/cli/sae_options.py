"""Which autoencoder is used: options that the commands of `sae` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.terminal import busy

if TYPE_CHECKING:
    from hooked_llava.sae import SparseAutoencoder

SAEFolder = Annotated[
    str,
    typer.Option(
        "--sae",
        metavar="NAME",
        help="The autoencoder: tiny-shapes, which comes with the package, a folder, or a name on the hub.",
    ),
]
Hookpoint = Annotated[str | None, typer.Option(metavar="FOLDER", help="The folder inside it, where it has several.")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="Take an autoencoder of a model of another name.")]


@dataclass(frozen=True, kw_only=True)
class SAEOptions:
    """Which autoencoder is used."""

    sae: SAEFolder = "tiny-shapes"
    hookpoint: Hookpoint = None
    any_model: AnyModel = False

    def load(self, device: object) -> SparseAutoencoder:
        """The autoencoder, on a device."""
        with busy(f"loading {self.sae}"):
            from hooked_llava.sae import load_sae

            return load_sae(self.sae, self.hookpoint, device=str(device))
