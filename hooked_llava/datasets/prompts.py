"""Images and prompts out of whatever holds them: a table, a folder, a data set, an iterator.

They come in an order that the seed decides, from any progress on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hooked_llava.checks import as_index, whole_number
from hooked_llava.datasets.rows import SUFFIXES, StudyRow, image_files, row_file, row_image
from hooked_llava.errors import InputError, a_type
from hooked_llava.prompt.images import load_image
from hooked_llava.prompt.inputs import Inputs

_DIGITS = 16
_IMAGE = "image"
"""The usual column of images; entries without it are text."""


class Progress(NamedTuple):
    """How far a source has been read.

    Attributes:
        epoch (int): How often it was read to its end.
        index (int): How many entries of this epoch were read.
    """

    epoch: int
    index: int


class PromptRow(NamedTuple):
    """One prompt of the data.

    Attributes:
        row (int): Its number in the data.
        question (str): What is asked; "" where the prompt is prepared already.
        images (list[Any]): Its images.
        prepared (Any): Inputs, or what a processor returned, if the data hold those.
        files (Sequence[Path | None]): Where its images are on disk; None for those that the data hold themselves.
        asked (StudyRow | None): The row of a table whose question is asked as it stands there, with the spans that it brings.
    """

    row: int
    question: str
    images: list[Any]
    prepared: Any = None
    files: Sequence[Path | None] = ()
    asked: StudyRow | None = None


@dataclass(frozen=True)
class DataOptions:
    """How prompts are read out of the data.

    Attributes:
        prompt (str | None): The prompt of every image, for data that are images only.
        columns (tuple[str, str]): Where the image and the question stand in tables and dicts.
        images (str | Path | None): The folder of images that the data name.
        part (tuple[int, int]): (i, n): every n-th prompt, from the i-th on.
    """

    prompt: str | None = None
    columns: tuple[str, str] = (_IMAGE, "question")
    images: str | Path | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not isinstance(self.part, (tuple, list)) or len(self.part) != 2:
            raise InputError(f"part={self.part!r}; expected (i, n): every n-th prompt, from the i-th on.")
        as_index(self.part[0], whole_number(self.part[1], "part[1]", least=1), "part[0]", from_end=False)


class PromptSource:
    """The prompts of some data, epoch after epoch.

    What has a length and is read by number is shuffled anew in every epoch, by the seed; anything else comes in its own order.
    Raises `InputError` for data of no known kind, for none at all, and for an iterator that is to be read more than once.
    """

    def __init__(self, data: Any, options: DataOptions, *, seed: int, epochs: int | None) -> None:
        self.data, self.options, self.seed, self.epochs = _opened(data, options), options, seed, epochs
        self.n_rows: int | None = len(self.data) if _is_table(self.data) else None
        if self.n_rows == 0:
            raise InputError("data holds no prompts; give at least one.")
        if self.n_rows is None and epochs != 1 and iter(self.data) is self.data:
            raise InputError(
                f"epochs={epochs}, and data is an iterator, which can be read once only; give epochs=1, or a list or data set."
            )

    def rows(self, start: Progress, *, shuffled: bool = True) -> Iterator[tuple[PromptRow, Progress]]:
        """The prompts from some progress on, each with the progress after it."""
        for epoch in count(start.epoch) if self.epochs is None else range(start.epoch, self.epochs):
            skipped = start.index if epoch == start.epoch else 0
            n = skipped
            for n, (row, entry) in enumerate(self._epoch(epoch, skipped, shuffled=shuffled), skipped + 1):
                yield self._prompt(row, entry), Progress(epoch, n)
            if n == 0:
                raise InputError("data holds no prompts; give at least one.")

    def first_digest(self) -> str | None:
        """A hash of the first prompt's words and the pixels of its images; None where entries are not read by number."""
        if self.n_rows is None:
            return None
        row = next(self.rows(Progress(0, 0), shuffled=False))[0]
        found = hashlib.sha256(row.question.encode())
        if row.prepared is not None:
            ids = row.prepared.input_ids if isinstance(row.prepared, Inputs) else row.prepared["input_ids"]
            found.update(np.asarray(ids).tobytes())
        for image in row.images:
            found.update(load_image(image).tobytes())
        return found.hexdigest()[:_DIGITS]

    def _epoch(self, epoch: int, skipped: int, *, shuffled: bool) -> Iterator[tuple[int, Any]]:
        first, step = self.options.part
        if self.n_rows is None:
            yield from islice(enumerate(self.data), first + skipped * step, None, step)
            return
        order = np.arange(self.n_rows)
        if shuffled:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        for row in order[first::step][skipped:].tolist():
            yield row, _read(self.data, row)

    def _prompt(self, row: int, entry: Any) -> PromptRow:
        """An entry of the data as a prompt; raises `InputError` for one of no known kind."""
        image_column, question_column = self.options.columns
        if isinstance(entry, Inputs) or (isinstance(entry, Mapping) and "input_ids" in entry):
            return PromptRow(row, "", [], entry)
        if isinstance(entry, StudyRow):
            folder = self.options.images
            images, files = [*_listed(row_image(entry, folder))], _listed(row_file(entry, folder))
            asked = entry if self.options.prompt is None else None
            return PromptRow(
                row, self._question(row, entry.question), images, None, files or [None] * len(images), asked
            )
        if isinstance(entry, Mapping):
            needed = [] if self.options.prompt is not None else [question_column]
            needed += [] if image_column == _IMAGE else [image_column]  # named, so there should be one
            if missing := [column for column in needed if column not in entry]:
                raise InputError(
                    f"Entry {row} of data has {', '.join(map(repr, entry))} and no {missing[0]!r}; name the columns of image "
                    "and question, as columns=('image', 'question')."
                )
            image, question = entry.get(image_column), entry.get(question_column)
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            image, question = entry
        elif self.options.prompt is not None:
            image, question = entry, None
        else:
            raise InputError(
                f"Entry {row} of data is {a_type(entry)}; expected a pair (image, question), a dict, or Inputs. For "
                "images alone give prompt=, the question that is asked about each."
            )
        images = [self._placed(one) for one in _listed(image)]
        files = [Path(one) if isinstance(one, (str, Path)) else None for one in images]
        return PromptRow(row, self._question(row, question), images, files=files)

    def _question(self, row: int, question: Any) -> str:
        question = question if self.options.prompt is None else self.options.prompt
        if not isinstance(question, str):
            raise InputError(
                f"The question of entry {row} of data is {a_type(question)}; expected text, in the second place "
                "of a pair or in the column that columns= names second."
            )
        return question

    def _placed(self, image: Any) -> Any:
        """An image, its path below the folder of images."""
        inside = isinstance(image, (str, Path)) and self.options.images is not None
        return Path(self.options.images or "", image) if inside else image


def _opened(data: Any, options: DataOptions) -> Any:
    """The data, a folder as the list of its images."""
    if isinstance(data, Inputs):
        return list(data)
    if isinstance(data, (str, os.PathLike)):
        if options.prompt is None:
            raise InputError(f"data={os.fspath(data)!r} is a folder of images; give prompt=, what is asked about each.")
        if not (found := image_files(data)):
            raise InputError(f"data={str(data)!r} holds no images ({', '.join(SUFFIXES)}); check the path.")
        return found
    if not _is_table(data) and not isinstance(data, Iterable):
        raise InputError(
            f"data is {a_type(data)}; expected a table, a folder, a data set, or an iterable of (image, question)."
        )
    return data


def _is_table(data: Any) -> bool:
    """Whether its entries are read by number."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Mapping)


def _read(data: Any, row: int) -> Any:
    if hasattr(data, "iloc"):  # a DataFrame; of one row pandas would make all cells of one type
        return {str(name): _cell(data[name].iloc[row]) for name in data.columns}
    return data[row]


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _listed(image: Any) -> Sequence[Any]:
    if image is None:
        return []
    return image if isinstance(image, (list, tuple)) else [image]
