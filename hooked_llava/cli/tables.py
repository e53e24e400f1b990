"""A table of questions in the place of one: which, how much of it, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.cli.command import TypedOptions
from hooked_llava.cli.common import PromptOptions
from hooked_llava.cli.options import at_least
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.datasets import StudyRow

OWN_TABLE = "tiny-shapes"
"""The name under which the embedded world's own table is asked for."""
_DEFAULT_LIMIT = 50


def table_option(files: str) -> Any:
    """The option that names a table; `files` says which released ones it reads."""
    help_ = (
        f"A table instead of one question: one of the released {files} files, the folder they are in, or {OWN_TABLE}."
    )
    return typer.Option(metavar="TABLE", help=help_)


TableName = Annotated[str | None, table_option("GQA or POPE")]
ImageFolder = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the table's images are.")]
Limit = Annotated[int | None, at_least(1, help="Questions of each kind. Default: all; of tiny-shapes 50.")]
Every = Annotated[bool, typer.Option("--all", help="Also measure questions that are answered wrongly.")]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the table's result in this file; an interrupted run goes on from it."),
]
BatchSize = Annotated[int, at_least(1, help="Questions of a table at once.")]


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """A table of questions, and how it is asked."""

    dataset: TableName = None
    images: ImageFolder = None
    limit: Limit = None
    every: Every = False
    results: Results = None
    batch_size: BatchSize = 8

    def given(self, typed: TypedOptions, prompt: PromptOptions, *of_one_question: str) -> bool:
        """Whether a table is asked for; raises `InputError` for options that belong to one question, or to a table alone."""
        if self.dataset is None:
            of_tables = [field.name for field in fields(self)]
            typed.refuse(of_tables, "belongs to a table of questions; give one with --dataset.")
            return False
        if prompt.first is not None:
            raise InputError(
                f"--dataset {self.dataset} brings its own questions; leave {prompt.first!r} out, or --dataset."
            )
        typed.refuse(["no_image", *of_one_question], "belongs to one question; leave it out, or --dataset.")
        return True

    @property
    def is_own(self) -> bool:
        """Whether it is the embedded world's own table; a file of its name comes before it."""
        return self.dataset == OWN_TABLE and not Path(OWN_TABLE).exists()

    def rows(
        self, read: Callable[..., list[StudyRow]], drawn: Callable[[int], list[StudyRow]], tail: str
    ) -> tuple[list[StudyRow], dict[str, str]]:
        """The table's questions, and what `datasets.study` must know of it: the instruction that follows each.

        Args:
            read: makes rows of a file's or folder's name, with `limit=`.
            drawn: makes so many rows of each kind of the embedded world's own table.
            tail: the instruction that the paper's prompts end with.
        """
        table, images = str(self.dataset), self.images
        if self.is_own:
            if images is not None:
                raise InputError(f"--images belongs to a table that names its images; {OWN_TABLE} draws its own.")
            return drawn(self.limit or _DEFAULT_LIMIT), {}
        found = read(table, limit=self.limit)
        if images is None:
            raise InputError(f"The table {table!r} names its images; say where they are with --images FOLDER.")
        if not images.is_dir():
            raise InputError(
                f"--images {images}: there is no such folder; give the one that the table's images are in."
            )
        return found, {"tail": tail}

    def questions(self) -> tuple[list[StudyRow], dict[str, str]]:
        """Rows of the released GQA tables of Zhang et al., of POPE's files, or of the embedded world's own table."""
        from hooked_llava.datasets import GQA_TAIL, POPE_TAIL, read_gqa, read_pope
        from hooked_llava.datasets.pope import is_pope
        from hooked_llava.toy.gqa_tables import gqa_rows

        pope = is_pope(str(self.dataset))
        return self.rows(read_pope if pope else read_gqa, gqa_rows, POPE_TAIL if pope else GQA_TAIL)

    def study_options(self, prompt: PromptOptions) -> dict[str, Any]:
        """Arguments of `datasets.study`."""
        return {
            "images": self.images,
            "out": self.results,
            "only_correct": not self.every,
            "batch_size": self.batch_size,
            "template": prompt.template_name,
        }
