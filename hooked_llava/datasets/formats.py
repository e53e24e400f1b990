"""The released tables of questions, by name: how a file of each is known, how it is read, and how its questions are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hooked_llava.datasets.gqa import GQA_KINDS, GQA_TAIL, is_gqa, read_gqa
from hooked_llava.datasets.pope import POPE_KINDS, POPE_TAIL, is_pope, read_pope
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.vqa_constraints import (
    CONSTRAINT_KINDS,
    CONSTRAINTS_TAIL,
    is_vqa_constraints,
    read_vqa_constraints,
)
from hooked_llava.errors import InputError
from hooked_llava.options.markdown import markdown_rows

Read = Callable[[str | Path, int | None], tuple[list[StudyRow], str]]
"""From a file or folder and a limit to its rows, and what is to be said of how they were read; "" for nothing."""


@dataclass(frozen=True)
class TableFormat:
    """One format of released tables; its name is its key in `TABLE_FORMATS`.

    Attributes:
        kinds (tuple[str, ...]): The kinds of questions that it has.
        file (str): What a file of it is, in words.
        is_one (Callable[[str | Path], bool]): Whether a file, or one in a folder, is of this format.
        read (Read): Its reader, with the limit by kind of question.
        tail (str): The instruction that the paper puts after each question.
    """

    kinds: tuple[str, ...]
    file: str
    is_one: Callable[[str | Path], bool]
    read: Read
    tail: str


def _read_constraints(path: str | Path, limit: int | None) -> tuple[list[StudyRow], str]:
    table = read_vqa_constraints(path, limit=limit)
    return table.rows, str(table)


TABLE_FORMATS = {
    "GQA": TableFormat(
        GQA_KINDS,
        "CSV with the columns type_structural and type_semantic",
        is_gqa,
        lambda path, limit: (read_gqa(path, limit=limit), ""),
        GQA_TAIL,
    ),
    "POPE": TableFormat(
        POPE_KINDS,
        "a JSON object a line, with question_id, image, text and label",
        is_pope,
        lambda path, limit: (read_pope(path, limit=limit), ""),
        POPE_TAIL,
    ),
    "VQA-Constraints": TableFormat(
        CONSTRAINT_KINDS,
        "CSV with the columns question, main_entity and image_url",
        is_vqa_constraints,
        _read_constraints,
        CONSTRAINTS_TAIL,
    ),
}
"""By the names under which messages and commands speak of them."""


def markdown_table(formats: Mapping[str, TableFormat] = TABLE_FORMATS) -> str:
    """The formats as a table for the documentation.

    >>> markdown_table().splitlines()[0]
    '| table | kinds of question | a file is |'
    """
    rows = [(name, ", ".join(one.kinds), one.file) for name, one in formats.items()]
    return markdown_rows(("table", "kinds of question", "a file is"), rows)


def table_format(
    path: str | Path, takes: Iterable[str] = tuple(TABLE_FORMATS), *, needs: str = "", own: str = ""
) -> TableFormat:
    """The format of a file, or of the tables in a folder, known by what they hold.

    Args:
        path: a file, or a folder with released files.
        takes: the names of the formats that are expected; of a folder with several, the first of them.
        needs: why others are not, as a sentence for the error.
        own: another table that is taken, for the error.

    Raises `InputError` for a path that is not there, and for a table of another format or of none.

    >>> import tempfile
    >>> from hooked_llava.toy.pope_tables import write_pope
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table_format(write_pope(folder, n=1)).kinds
    ('random', 'popular', 'adversarial')
    """
    takes = tuple(takes)
    found = next((name for name in (*takes, *TABLE_FORMATS) if TABLE_FORMATS[name].is_one(path)), None)
    if found in takes:
        return TABLE_FORMATS[found]
    if not Path(path).exists():
        what = "is no file and no folder"
    else:
        what = "holds no table that is known" if found is None else f"is a table of {found}. {needs}".rstrip(" .")
    expected = " or ".join(
        f"{name} ({', '.join(one.kinds)}; {one.file})" for name, one in TABLE_FORMATS.items() if name in takes
    )
    others = f"{own}, or " if own else ""
    raise InputError(f"{str(path)!r} {what}; give {others}a released file, or the folder they are in, of {expected}.")
