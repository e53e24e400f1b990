"""`hooked-llava pope`: whether a model says that objects are there which are not, over a table of questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from hooked_llava.cli.command import command
from hooked_llava.cli.common import ModelOptions, check_writable
from hooked_llava.cli.options import Output
from hooked_llava.cli.tables import TableOptions, table_option
from hooked_llava.cli.terminal import escape, needs_figures, say, say_where, show_table

if TYPE_CHECKING:
    from hooked_llava.datasets import StudyRow
    from hooked_llava.viz import PopePage

PopeTableName = Annotated[str, table_option("POPE", instead="")]


@dataclass(frozen=True, kw_only=True)
class PopeTable(TableOptions):
    """A table of questions whether an object is there, and how it is asked."""

    takes: ClassVar[tuple[str, ...]] = ("POPE",)
    needs: ClassVar[str] = "Its questions do not ask whether an object is there"

    dataset: PopeTableName = field()

    def own_rows(self, n: int) -> list[StudyRow]:
        """So many questions of each kind whether a shape is there."""
        from hooked_llava.toy.pope_tables import pope_rows

        return pope_rows(n)


@command(
    "pope --dataset tiny-shapes --limit 20",
    "pope --dataset POPE_FOLDER --images COCO_VAL2014 --results pope.safetensors -m llava-hf/llava-1.5-7b-hf "
    "--template vicuna-v1",
)
def pope(table: PopeTable, model_options: ModelOptions, output: Output = Path("pope.html")) -> None:
    """Ask whether objects are there, half of which are not (POPE), and write a page of the scores and the log odds of Yes.

    Several processes share a table: torchrun --nproc-per-node 4 -m hooked_llava pope --dataset ...
    """
    check_writable(output)
    rows, tail = table.questions()
    model = model_options.load()
    with needs_figures():
        from hooked_llava.viz.pages.pope import pope_page
    from hooked_llava.analysis import pope_study
    from hooked_llava.machine.processes import is_first_process

    result = pope_study(model, rows, **table.study_options(model_options), **tail)
    if is_first_process():
        page = pope_page(result)
        path = page.save(output)
        _show(page)
        say_where(path)


def _show(page: PopePage) -> None:
    """The scores of each kind of question, and how sure the model is of Yes where the object is there and where it is not."""
    from hooked_llava.viz.figures.pope import POPE_LABELS, POPE_SCORES

    scores = page.results["scores"].sel(statistic="mean")
    say(f"[dim]{escape(page.question)}[/dim]\n")
    rows = []
    for kind in scores.kind.values.tolist():
        of_kind = scores.sel(kind=kind)
        odds = (float(of_kind.log_odds.sel(label=label)) for label in POPE_LABELS)
        rows.append(
            [escape(kind), *(_shown(float(of_kind[name])) for name in POPE_SCORES), *map("{:+z.1f}".format, odds)]
        )
    numbers = [*POPE_SCORES.values(), *(f"log odds: {where}" for where in POPE_LABELS.values())]
    show_table(["kind", *numbers], rows, right=numbers, whole=["kind"])


def _shown(share: float) -> str:
    """A share; a dash for one of nothing."""
    return "–" if share != share else f"{share:.3f}"
