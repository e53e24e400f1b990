"""`hooked-llava verify`: the same prompt through Hugging Face and through ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.command import command
from hooked_llava.cli.common import load_model
from hooked_llava.cli.options import EMBEDDED_MODEL, Device, DTypeOption
from hooked_llava.cli.terminal import busy, escape, say

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.model.verify import ParityTable

EXIT_DIFFERENT = 1
"""Exit status when the two models differ."""


@command("verify tiny-shapes", "verify llava-hf/llava-1.5-7b-hf --dtype bfloat16")
def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a name on the hub.")
    ] = EMBEDDED_MODEL,
    device: Device = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Run the same prompt through Hugging Face's own class and through ours, and compare every layer.

    The exit status is 0 if all activations are the same, 1 if any differs.
    """
    loaded = load_model(model, device, dtype)
    with busy("comparing with Hugging Face"):
        table = _verify(loaded, model)
    say(escape(str(table)))
    if not table.ok:
        raise typer.Exit(EXIT_DIFFERENT)


def _verify(model: HookedLLaVA, name: str) -> ParityTable:
    import transformers

    from hooked_llava.architecture.llava import llava_kind
    from hooked_llava.loading import resolve
    from hooked_llava.model.verify import verify as compare

    architecture = getattr(transformers, llava_kind(model.config.model_type).architecture)
    hf_model = architecture.from_pretrained(resolve(name), dtype=model.cfg.dtype)
    return compare(model, hf_model.eval().to(model.cfg.device))
