"""`hooked-llava trace`: where the answer to a constraint comes back when one output is restored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.command import as_arguments, command
from hooked_llava.cli.common import PromptOptions, WindowOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output
from hooked_llava.cli.terminal import escape, needs_figures, say, say_answer, say_where, show_table, shown_steps
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.experiments.corruptions import Corruption
    from hooked_llava.viz import TracePage


class Way(StrEnum):
    """What the constraint's embeddings are corrupted by where no words replace it."""

    noise = "noise"
    mean = "mean"


Constraints = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint", "-c", metavar="WORDS", help="Words of the question that are corrupted; may be repeated."
    ),
]
Replacements = Annotated[
    list[str] | None,
    typer.Option(
        "--replace",
        metavar="WORDS",
        help="Replace the constraint by these, of as many tokens; once for all, or for each.",
    ),
]
Repeat = Annotated[
    bool, typer.Option("--repeat", help="Write the first token of --replace at each of the constraint's tokens.")
]
WayOption = Annotated[Way, typer.Option("--corruption", help="Without --replace: noise, or the mean embedding.")]


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions:
    """Which words are corrupted, and how."""

    constraints: Constraints = None
    replacements: Replacements = None
    repeat: Repeat = False
    way: WayOption = Way.noise

    def checked(self) -> tuple[list[str], Corruption]:
        """The constraints and their corruption; raises `InputError` for options that do not fit each other."""
        from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, Replace

        words, new = self.constraints or [], self.replacements or []
        if not words:
            raise InputError('There is no constraint; name words of the question: --constraint "this shape".')
        if self.repeat and not new:
            raise InputError("--repeat has nothing to repeat; give words with --replace.")
        if new and len(new) not in (1, len(words)):
            raise InputError(
                f"--replace is given {len(new)} times and --constraint {len(words)} times; give --replace once for all "
                "constraints, or once for each."
            )
        if new:
            return words, Replace(new if len(new) > 1 else new[0], repeat=self.repeat)
        return words, Noise() if self.way is Way.noise else MeanEmbedding()


@command(
    'trace one-shape "Who made this shape?" --constraint "this shape" --replace "the ring"',
    'trace "Who made the star?" --constraint "the star" --window 3 -o trace.html',
)
def trace(
    corrupted: CorruptionOptions,
    windows: WindowOptions,
    prompt: PromptOptions,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("trace.html"),
) -> None:
    """Corrupt words of the question, restore one clean output at a time, and write a page of where the answer returns."""
    words, corruption = corrupted.checked()
    check_writable(output)
    model, inputs = prompt.prepare()
    with needs_figures():
        from hooked_llava.viz.pages.trace import STEPS, trace_page
    options: dict[str, Any] = {"corruption": corruption, "max_new_tokens": max_new_tokens, **as_arguments(windows)}
    with shown_steps(len(STEPS)) as on_step:
        page = trace_page(model, inputs, words, on_step=on_step, **options)
    path = page.save(output)
    _show(prompt.question, page)
    say_where(path)


def _show(question: str, page: TracePage) -> None:
    """All runs: the clean one, the corrupted one, and of the restored ones the best of each kind, and of each layer."""
    from hooked_llava.analysis.causal_trace import best_cells, was_lowered
    from hooked_llava.prompt.token_text import visible_token

    found = page.results["trace"]
    say_answer(question, page.answer)
    other = escape(found.corrupted_answer.strip() or repr(found.corrupted_answer))
    say(
        f"P({escape(found.answer)}) is {float(found.p_clean):.3f}; {escape(found.corruption)}, it is "
        f"{float(found.p_corrupted):.3f}, and the model says {other}."
    )
    if not was_lowered(found):
        say("[bold]The corruption does not lower the answer[/bold]: there is nothing to restore.")
    rows = []
    for cell in best_cells(found):
        tied = f", and {int(cell.n_tied)} other{'' if cell.n_tied == 1 else 's'} as much" if cell.n_tied else ""
        place = f"{visible_token(cell.label.values)} ({cell.role.values}){tied}"
        rows.append([str(cell.kind.values), str(int(cell.layer)), escape(place), f"{float(cell.restored):.3f}"])
    show_table(["restored", "best layer", "at", "probability"], rows, right=["best layer", "probability"])
    _show_layers(found)


def _show_layers(trace: xr.Dataset) -> None:
    """The restored runs: of each layer and kind the best position."""
    from hooked_llava.analysis.causal_trace import best_cells
    from hooked_llava.prompt.token_text import visible_token

    rows = {int(layer): [str(layer)] for layer in trace.layer.values}
    for cell in best_cells(trace, by_layer=True):
        rows[int(cell.layer)].append(escape(f"{float(cell.restored):.3f} {visible_token(cell.label.values)}"))
    say(f"{trace.attrs['runs']} runs with one output restored; of each layer the best position:")
    show_table(["layer", *trace.kind.values.tolist()], rows.values(), right=["layer"])
