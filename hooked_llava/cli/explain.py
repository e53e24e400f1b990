"""`hooked-llava explain`: a page that shows how an answer came about."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hooked_llava.cli.command import as_arguments, command
from hooked_llava.cli.common import PromptOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output, Top
from hooked_llava.cli.terminal import needs_figures, say_sentences, say_where, show_answer, shown_steps
from hooked_llava.options.patch_maps import PATCH_MAPS

PatchMethod = StrEnum("PatchMethod", list(PATCH_MAPS))
Answer = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Explain the logit of this token. Default: the model's own first token."),
]
Versus = Annotated[
    str | None,
    typer.Option(
        "--versus",
        metavar="TOKEN",
        help="Explain why the answer and not this token: the difference of their logits.",
    ),
]
Patches = Annotated[
    PatchMethod, typer.Option(metavar="METHOD", help=f"How the patch map is made: {', '.join(PatchMethod)}.")
]
WithOcclusion = Annotated[
    bool | None,
    typer.Option(
        "--occlusion/--no-occlusion",
        help="Draw occlusion beside the patch map. It runs the model about once for each patch. Default: up to 256 patches.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Arguments of `viz.explain`."""

    answer: Answer = None
    baseline: Versus = None
    patches: Patches = PatchMethod.log_increase
    occlusion: WithOcclusion = None
    k: Top = 5
    max_new_tokens: MaxNewTokens = 20


@command(
    'explain demo "What color is the star?" -o report.html',
    'explain demo "What color is the star?" --versus White',
    'explain demo "What color is the star?" --patches relevancy',
)
def explain(options: ExplainOptions, prompt: PromptOptions, output: Output = Path("report.html")) -> None:
    """Print the answer, and write a page that shows how the model came to it: one HTML file that needs no network."""
    check_writable(output)
    model, inputs = prompt.prepare()
    with needs_figures():
        from hooked_llava.viz.pages.explain import STEPS
        from hooked_llava.viz.pages.explain import explain as explained
    with shown_steps(len(STEPS)) as on_step:
        page = explained(model, inputs, on_step=on_step, **as_arguments(options))
    path = page.save(output)
    show_answer(prompt.question, page.answer, page.results["next_tokens"])
    say_sentences(page.summary)
    say_where(path)
