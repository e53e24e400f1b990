"""`hooked-llava trace`: where the answer to a constraint comes back when one output is restored, for one or a table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from hooked_llava.cli.command import TypedOptions, as_arguments, command
from hooked_llava.cli.common import PromptOptions, WindowOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output
from hooked_llava.cli.tables import OptionalTable, table_option
from hooked_llava.cli.terminal import escape, needs_figures, say, say_answer, say_where, show_table, shown_steps
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.datasets import StudyRow
    from hooked_llava.experiments.corruptions import Corruption
    from hooked_llava.viz import TracePage

_SEEN = 0.0005  # an effect that three digits show


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
WayOption = Annotated[
    Way | None,
    typer.Option(
        "--corruption",
        help="Without --replace: noise, or the mean embedding. Default: noise; in the table tiny-shapes another shape's name.",
    ),
]
ConstraintTableName = Annotated[str | None, table_option("VQA-Constraints")]


@dataclass(frozen=True, kw_only=True)
class CorruptionOptions:
    """Which words are corrupted, and how."""

    constraints: Constraints = None
    replacements: Replacements = None
    repeat: Repeat = False
    way: WayOption = None

    def checked(self) -> tuple[list[str], Corruption]:
        """The constraints and their corruption; raises `InputError` for options that do not fit each other."""
        words, new = self.constraints or [], self.replacements or []
        if not words:
            raise InputError('There is no constraint; name words of the question: --constraint "this shape".')
        if new and len(new) not in (1, len(words)):
            raise InputError(
                f"--replace is given {len(new)} times and --constraint {len(words)} times; give --replace once for all "
                "constraints, or once for each."
            )
        return words, self.corruption()

    def corruption(self) -> Corruption:
        """What is done to the constraints; raises `InputError` for --repeat without words."""
        from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, Replace

        new = self.replacements or []
        if self.repeat and not new:
            raise InputError("--repeat has nothing to repeat; give words with --replace.")
        if new:
            return Replace(new if len(new) > 1 else new[0], repeat=self.repeat)
        return MeanEmbedding() if self.way is Way.mean else Noise()

    def of_table(self, own: bool) -> Corruption | Callable[[StudyRow], Corruption]:
        """The corruption of every row; of the embedded world's own table by default another shape's name."""
        if len(self.replacements or []) > 1:
            raise InputError("--replace is given several times; the questions of a table have one constraint each.")
        corruption = self.corruption()
        if not own or self.replacements or self.way is not None:
            return corruption
        from hooked_llava.toy.constraint_tables import other_shape

        return other_shape


@dataclass(frozen=True, kw_only=True)
class ConstraintTable(OptionalTable):
    """A table of questions with constraints, and how it is asked."""

    takes: ClassVar[tuple[str, ...]] = ("VQA-Constraints",)
    needs: ClassVar[str] = "It names no constraints, the words of each question that a trace corrupts"

    dataset: ConstraintTableName = None

    def own_rows(self, n: int) -> list[StudyRow]:
        """So many questions of each kind of the embedded world's table with constraints."""
        from hooked_llava.toy.constraint_tables import constraint_rows

        return constraint_rows(n)

    def check_rows(self, rows: Sequence[StudyRow]) -> None:
        """Raise `InputError` for rows without answers, unless all are measured."""
        if not self.every and not any(row.answer for row in rows):
            raise InputError(
                f"The table {self.dataset!r} holds no answers, so that nothing is known to be answered correctly; measure all "
                "of its questions with --all."
            )


@command(
    'trace one-shape "Who made this shape?" --constraint "this shape" --replace "the ring"',
    'trace "Who made the star?" --constraint "the star" --window 3 -o trace.html',
    "trace --dataset tiny-shapes --limit 20 -o traces.html",
    "trace --dataset CONSTRAINTS_FOLDER --images IMAGES --all --replace Paris --repeat --results traces.safetensors "
    "-m llava-hf/llava-1.5-7b-hf --template basu-2024",
)
def trace(
    typed: TypedOptions,
    corrupted: CorruptionOptions,
    windows: WindowOptions,
    table: ConstraintTable,
    prompt: PromptOptions,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("trace.html"),
) -> None:
    """Corrupt words of the question, restore one clean output at a time, and write a page of where the answer returns.

    Several processes share a table: torchrun --nproc-per-node 4 -m hooked_llava trace --dataset ...

    The paper's prompts are those of --template basu-2024; its released code writes --replace Paris --repeat. The released tables
    hold no answers: they need --all.
    """
    check_writable(output)
    if table.given(typed, prompt, "max_new_tokens"):
        typed.refuse(["constraints"], "belongs to one question; a table has constraints of its own.")
        page = _table_page(table, prompt, corrupted, windows)
    else:
        page = _prompt_page(prompt, corrupted, windows, max_new_tokens)
    if page is not None:
        path = page.save(output)
        (_show_study if "means" in page.results else _show)(page)
        say_where(path)


def _prompt_page(
    prompt: PromptOptions, corrupted: CorruptionOptions, windows: WindowOptions, max_new_tokens: int
) -> TracePage:
    words, corruption = corrupted.checked()
    model, inputs = prompt.prepare()
    with needs_figures():
        from hooked_llava.viz.pages.trace import STEPS, trace_page
    options: dict[str, Any] = {"corruption": corruption, "max_new_tokens": max_new_tokens, **as_arguments(windows)}
    with shown_steps(len(STEPS)) as on_step:
        return trace_page(model, inputs, words, on_step=on_step, **options)


def _table_page(
    table: ConstraintTable, prompt: PromptOptions, corrupted: CorruptionOptions, windows: WindowOptions
) -> TracePage | None:
    """The page of a table; of several processes, all of which have the result, the first one's alone."""
    corruption = corrupted.of_table(table.is_own)
    rows, tail = table.questions()
    model = prompt.load()
    with needs_figures():
        from hooked_llava.viz.pages.trace import trace_study_page
    from hooked_llava.analysis import trace_study
    from hooked_llava.machine.processes import is_first_process

    how: dict[str, Any] = {**table.study_options(prompt), **as_arguments(windows), **tail}
    result = trace_study(model, rows, corruption=corruption, **how)
    return trace_study_page(result) if is_first_process() else None


def _show_study(page: TracePage) -> None:
    """Of each kind of question how many answers were lowered, and where each output restores most."""
    from hooked_llava.options.trace_kinds import TRACE_KINDS

    means, best = page.results["means"], page.results["best"]
    say(f"[dim]{escape(page.question)}; {escape(means.corruption)}[/dim]\n")
    rows = []
    for kind in means.kind.values.tolist():
        of_kind = means.sel(kind=kind)
        asked = [escape(kind), f"{int(of_kind.n_lowered)} of {int(of_kind.n)}"]
        for output in best.output.values.tolist():
            rows.append([*asked, TRACE_KINDS[output].name, *_cell(best.sel(kind=kind, output=output))])
            asked = ["", ""]
    numbers = ("lowered", "effect")
    show_table(["kind", "lowered", "restored", "effect", "interval", "at"], rows, right=numbers)


def _cell(best: xr.Dataset) -> tuple[str, str, str]:
    """A mean effect, its interval and its place, as far as there are any."""
    effect, low, high = (float(best.indirect_effect.sel(statistic=end)) for end in ("mean", "low", "high"))
    if effect != effect:
        return "–", "", ""
    return (
        f"{effect:z.2f}",
        f"{low:z.2f} to {high:z.2f}" if low == low else "",
        f"layer {int(best.layer)}, {best.role.item()}",
    )


def _show(page: TracePage) -> None:
    """All runs: the clean one, the corrupted one, and of the restored ones the best of each kind, and of each layer."""
    from hooked_llava.analysis.causal_trace import best_cells, was_lowered
    from hooked_llava.prompt.token_text import visible_token

    found = page.results["trace"]
    say_answer(page.question, page.answer)
    other = escape(found.corrupted_answer.strip() or repr(found.corrupted_answer))
    say(
        f"P({escape(found.answer)}) is {float(found.p_clean):.3f}; corrupted ({escape(found.corruption)}) it is "
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
    """The restored runs: of each layer and kind the best position, if anything comes back there."""
    from hooked_llava.analysis.causal_trace import best_cells
    from hooked_llava.prompt.token_text import visible_token

    rows = {int(layer): [str(layer)] for layer in trace.layer.values}
    for cell in best_cells(trace, by_layer=True):
        place = visible_token(cell.label.values) if float(cell.indirect_effect) >= _SEEN else ""
        rows[int(cell.layer)].append(escape(f"{float(cell.restored):.3f} {place}".rstrip()))
    say(f"{trace.attrs['runs']} runs with one output restored; of each layer the best position:")
    show_table(["layer", *trace.kind.values.tolist()], rows.values(), right=["layer"])
