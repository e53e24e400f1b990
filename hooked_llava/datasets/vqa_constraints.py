"""VQA-Constraints: the three tables of questions with their constraints that Basu et al. (arXiv 2406.04236) released.

Each question comes with the words that its answer must fit, such as "this building". The tables hold no answers; the
images are those of COCO's val2014 for OK-VQA, and photographs named by what they show for the other two.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.tables import has_columns, plain_id, read_table, released_files
from hooked_llava.errors import InputError
from hooked_llava.prompt.token_text import word_borders

CONSTRAINTS_TAIL = "Answer in a few words."
"""The instruction that the paper puts after each question; `model.prepare(..., template="basu-2024")` writes it."""
FILES = {"OK-VQA": "okvqa.csv", "Movies": "multimodal_movies.csv", "Known": "multimodal_known.csv"}
"""Kind of question -> name of the released file."""
SUBJECTS = {"Movies": "director", "Known": "subject"}
"""Kind of question -> column that says what the image shows."""
CONSTRAINT_KINDS = tuple(FILES)
"""The three tables."""
_ASKED = ("question", "main_entity", "image_url")


@dataclass(frozen=True)
class Unplaced:
    """A row whose constraint is not at one place of its question.

    Attributes:
        id (str): What the row would be called.
        question (str): The question.
        constraint (str): The words as the table has them.
        why (str): What is wrong, in words.
    """

    id: str
    question: str
    constraint: str
    why: str


@dataclass(frozen=True)
class ConstraintTable:
    """Questions whose constraint was found, and those where it was not.

    Attributes:
        rows (list[StudyRow]): Each with its `constraint` as it stands in the question, capitals included.
        unplaced (list[Unplaced]): The rows whose constraint was not found in the question.
        adjusted (int): Rows that were placed only without regard to capitals or to punctuation around the words.
    """

    rows: list[StudyRow]
    unplaced: list[Unplaced] = field(default_factory=list)
    adjusted: int = 0

    def __str__(self) -> str:
        reasons: dict[str, int] = {}
        for row in self.unplaced:
            reasons[row.why] = reasons.get(row.why, 0) + 1
        said = "; ".join(f"{n} {why}" for why, n in reasons.items())
        placed = f"{len(self.rows)} questions ({self.adjusted} placed with other capitals or punctuation)"
        return placed + (f"; {len(self.unplaced)} not placed: {said}" if said else "")


def read_vqa_constraints(
    path: str | Path,
    *,
    kinds: Iterable[str] | None = None,
    limit: int | None = None,
    encoding: str | None = None,
) -> ConstraintTable:
    """The questions of one released CSV file, or of all that are in a folder, with the words their answer depends on.

    A row's `image` is the last part of its `image_url`, `objects` what the image shows where the table says it, and
    `answer` is empty but for tables with a column `answer`, which the released ones lack. Rows whose words do not stand
    at exactly one place of the question are reported as `unplaced`.

    Args:
        path: a file, or a folder with some of the three files under their released names.
        kinds: kinds of question to read (`CONSTRAINT_KINDS`); all that are there by default.
        limit: rows of each file, the first ones, at least 1; all by default.
        encoding: of the files' text; by default by its byte order mark, else UTF-8, else Windows-1252 with a warning.

    Tables that another program has saved again are read too, as by `read_gqa`. Raises `InputError` for a file that is not
    there, cannot be read or lacks columns, for unknown kinds, and for a limit below 1.

    >>> import tempfile
    >>> from hooked_llava.toy.constraint_tables import write_constraints
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = read_vqa_constraints(write_constraints(folder, n=2), kinds=["Known"])
    >>> len(table.rows), table.rows[0].constraint, table.unplaced
    (2, 'this shape', [])
    """
    wanted = CONSTRAINT_KINDS if kinds is None else tuple(kinds)
    files = released_files(path, wanted, FILES)
    tables = [_read(file, limit, encoding) for file in files]
    return ConstraintTable(
        [row for table in tables for row in table.rows if row.kind in wanted],
        [row for table in tables for row in table.unplaced],
        sum(table.adjusted for table in tables),
    )


def is_vqa_constraints(path: str | Path) -> bool:
    """Whether this is a table of questions with constraints, by its columns, or a folder that holds one under its released name.

    >>> is_vqa_constraints("nowhere")
    False
    """
    return has_columns(path, _ASKED, FILES.values())


def place_constraint(question: str, words: str) -> tuple[str | None, str]:
    """The constraint as it stands in the question, and how it was found or why not.

    Tried as it is, then without regard to capitals, then without punctuation around it ("This software," in the released
    tables); whole words only, without regard to spaces around them, and only where they stand once.

    >>> place_constraint("What is this made of?", "This,")
    ('this', 'capitals or punctuation')
    >>> place_constraint("Is this that?", "this hat")
    (None, 'not in the question')
    """
    words = words.strip()
    plain = words.strip(string.punctuation + string.whitespace)
    loosely = "capitals or punctuation"
    for tried, flags, how in ((words, 0, "as it is"), (words, re.IGNORECASE, loosely), (plain, re.IGNORECASE, loosely)):
        found = _places(question, tried, flags)
        if len(found) == 1:
            return found[0], how
        if found:
            return None, "several times in the question"
    return None, "not in the question"


def _places(question: str, words: str, flags: int = 0) -> list[str]:
    before, after = word_borders(words)
    pattern = before + r"\s+".join(map(re.escape, words.split())) + after
    return [match.group() for match in re.finditer(pattern, question, flags)] if words.strip() else []


def _read(file: Path, limit: int | None, encoding: str | None) -> ConstraintTable:
    rows, unplaced, adjusted = [], [], 0
    table = read_table(file, encoding=encoding, limit=limit)
    kind = _kind(table.columns, file)
    for place, cells in enumerate(table.rows):
        # The released tables number their rows in a column without a name, which pandas calls so.
        row_id = f"{kind}-{plain_id(cells.get('') or cells.get('Unnamed: 0') or '') or place}"
        if broken := [name for name in _ASKED if not cells[name].strip()]:
            unplaced.append(Unplaced(row_id, cells["question"], "", f"without {', '.join(broken)}"))
            continue
        placed, how = place_constraint(cells["question"], cells["main_entity"])
        if placed is None:
            unplaced.append(Unplaced(row_id, cells["question"], cells["main_entity"], how))
            continue
        adjusted += how != "as it is"
        rows.append(_row(row_id, kind, cells, placed))
    return ConstraintTable(rows, unplaced, adjusted)


def _kind(columns: Sequence[str], file: Path) -> str:
    """The kind whose file has these columns."""
    if missing := [name for name in _ASKED if name not in columns]:
        raise InputError(
            f"{str(file)!r} lacks the columns {missing}; expected {', '.join(_ASKED)} (it has {list(columns)})."
        )
    return next((kind for kind, subject in SUBJECTS.items() if subject in columns), "OK-VQA")


def _row(row_id: str, kind: str, cells: dict[str, str], placed: str) -> StudyRow:
    subject = (cells.get(SUBJECTS[kind]) or "") if kind in SUBJECTS else ""
    return StudyRow(
        id=row_id,
        question=cells["question"],
        answer=cells.get("answer") or "",
        image=cells["image_url"].rsplit("/", maxsplit=1)[-1],
        kind=kind,
        objects=(subject,) if subject else (),
        constraint=placed,
    )
