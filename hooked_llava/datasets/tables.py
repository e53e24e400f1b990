"""CSV tables as the papers released them, and as spreadsheets and other programs save them again."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hooked_llava.checks import one_of, whole_number
from hooked_llava.errors import HookedLLaVAWarning, InputError, warn_user

_DELIMITERS = ",;\t"
_MARKED = (
    # The longer mark first: UTF-32's begins with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FALLBACK = "cp1252"
_WHOLE = re.compile(r"([+-]?\d+)[.,]0*")


@dataclass(frozen=True)
class Table:
    """The cells of a CSV file as text.

    Attributes:
        columns (tuple[str, ...]): Names of the columns.
        rows (list[dict[str, str]]): For each line its cells by column; "" where there is none.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, str]]


def released_files(path: str | Path, kinds: Iterable[str], names: Mapping[str, str]) -> list[Path]:
    """The file itself, or those in a folder that hold questions of these kinds; `names` says how each kind's is called.

    Raises `InputError` for unknown kinds, and where there is no such file.
    """
    path = Path(path)
    wanted = [names[one_of(kind, names, "kinds", says=f"There is no kind {kind!r}.")] for kind in kinds]
    files = [path] if path.is_file() else [path / name for name in wanted if (path / name).is_file()]
    if not files:
        what = "is no file and no folder" if not path.is_dir() else f"holds none of {', '.join(names.values())}"
        raise InputError(f"{str(path)!r} {what}; give one of the released CSV files, or the folder they are in.")
    return files


def has_columns(path: str | Path, columns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether a CSV file, or one of these names in a folder, has these columns.

    >>> has_columns("nowhere", ["question"], ["mine.csv"])
    False
    """
    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    return any(set(columns) <= _columns(file) for file in files)


def _columns(file: Path) -> set[str]:
    try:
        return set(read_table(file, limit=1).columns)
    except InputError:
        return set()


def read_table(file: Path, *, encoding: str | None = None, limit: int | None = None) -> Table:
    """The cells of a CSV file, separated by commas, semicolons or tabs; lines without anything are left out.

    Args:
        file: the file.
        encoding: of its text; by default what the file's byte order mark says, else UTF-8, else Windows-1252 with a warning.
        limit: lines to read, at least 1; all by default.

    Raises `InputError` for what cannot be read as text, and for a limit below 1.
    """
    if limit is not None:
        whole_number(limit, "limit", least=1, of=" questions of each kind", expected="at least 1, or None for all")
    try:
        text = _decoded(file, encoding).lstrip()
        header = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
        columns = tuple(name.strip() for name in reader.fieldnames or ())
        reader.fieldnames = columns
        rows = list(islice(_filled(reader), limit))
    except (OSError, UnicodeError, LookupError, csv.Error) as error:
        raise InputError(
            f"{str(file)!r} cannot be read as a table ({error}); expected a CSV file in UTF-8, or name its encoding=."
        ) from error
    return Table(columns, rows)


def whole(text: str) -> int:
    """A whole number, also where a program wrote it as 64.0 or 64,0; raises `ValueError` for anything else.

    >>> whole(" 64"), whole("64.0"), whole("64,0")
    (64, 64, 64)
    """
    return int(plain_id(text))


def number(text: str) -> int | float:
    """A number, whole where it can be; raises `ValueError` for anything else.

    >>> number("64.0"), number("12,5")
    (64, 12.5)
    """
    value = float(text.strip().replace(",", "."))
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number of pixels")
    return int(value) if value.is_integer() else value


def plain_id(text: str) -> str:
    """A name that may be a number, without the fraction that a program has given it: 2391275.0 is 2391275.

    >>> plain_id("2391275.0"), plain_id("07339448"), plain_id("COCO_1.0.jpg")
    ('2391275', '07339448', 'COCO_1.0.jpg')
    """
    found = _WHOLE.fullmatch(text.strip())
    return found.group(1) if found else text.strip()


def _decoded(file: Path, encoding: str | None) -> str:
    data = file.read_bytes()
    encoding = encoding or next((name for mark, name in _MARKED if data.startswith(mark)), None)
    if encoding:
        return data.decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode(_FALLBACK)
        warn_user(
            f"{str(file)!r} is not in UTF-8 and was read as Windows-1252; if its words look wrong, name its encoding=.",
            HookedLLaVAWarning,
        )
        return text


def _filled(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    for row in rows:
        # Cells beyond the last column come as a list under None.
        cells = {name: value for name, value in row.items() if isinstance(value, str)}
        if any(value.strip() for value in cells.values()):
            yield cells
