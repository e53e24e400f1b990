"""One question of a table, and how such rows become inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from hooked_llava.architecture.boxes import checked_box
from hooked_llava.architecture.image_axis import Number
from hooked_llava.datasets.row_words import word_spans
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.images import ImageLike, load_image, upright_size
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.prepare import TEMPLATE_TAIL, TemplateLike
from hooked_llava.prompt.templates import DEFAULT

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.token_map import TokenMap

PixelBox = tuple[Number, Number, Number, Number]
"""(x0, y0, x1, y1) in the pixels of the original image, x1 and y1 exclusive."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings that are tried where a row names its image without one."""


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One question of a table, with its answer, its image, and what is known about it.

    >>> StudyRow(id="1", question="What color is the star?", answer="Red").kind
    ''

    Attributes:
        id (str): What the row is called in its table; each of its own.
        question (str): The question, without any template.
        answer (str): The right answer.
        image (ImageLike | None): A file name below the table's folder of images (its ending may be left out), an image,
            or None.
        false_option (str): The other option that the question names, or the answer that would be wrong; "" where there
            is none.
        true_option (str): The right option as the question names it, where that is not the answer itself.
        kind (str): Kind of question, such as "ChooseAttr"; results are averaged by it.
        objects (tuple[str, ...]): Names of the objects that the question is about.
        boxes (tuple[PixelBox, ...]): Where they are; those that are not there have none.
        size (tuple[int, int] | None): Width and height of the image in which the boxes were drawn, if they are known.
        constraint (str): Words of the question that the answer depends on (Basu et al. 2406.04236); they become the
            span `constraint`.
        constraint_occurrence (int | None): Which of several places the constraint is meant at, counted from 0; None
            where it stands only once.
        answer_prefix (str): How the answer begins, already written.
    """

    id: str
    question: str
    answer: str
    image: ImageLike | None = None
    false_option: str = ""
    true_option: str = ""
    kind: str = ""
    objects: tuple[str, ...] = ()
    boxes: tuple[PixelBox, ...] = ()
    size: tuple[int, int] | None = None
    constraint: str = ""
    constraint_occurrence: int | None = None
    answer_prefix: str = ""

    @property
    def options(self) -> tuple[str, str] | None:
        """The true and the false option as the question names them, if it names two."""
        return (self.true_option or self.answer, self.false_option) if self.false_option else None


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and the folders inside it, sorted; none where there is no such folder.

    >>> image_files("nowhere")
    []
    """
    folder = Path(folder)
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def prepare_rows(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    images: str | Path | None = None,
    *,
    template: TemplateLike = DEFAULT,
    tail: str | None = TEMPLATE_TAIL,
    coverage: Number = 0,
) -> Inputs:
    """Rows of one table as a batch of prompts, with the spans `object` and `constraint` where a row has them.

    Args:
        model: the model.
        rows: all with the same `answer_prefix`.
        images: folder of the images that rows name.
        template: as for `model.prepare`.
        tail: as for `model.prepare`.
        coverage: share of a patch that the objects' boxes must cover for it to be one of `object`; 0 takes every patch
            that they touch. Zhang et al. (2411.18620) draw the boxes in red, let the image processor resize the drawing
            (bicubic), and ask for one pixel of a patch that is still exactly red: patches that a box only grazes are not
            theirs, and 0 may take one more at each side of a box.

    Where the question names them, the spans `true_option` and `false_option` are its two options (on either side of "or"), and
    `object_word` every place of its objects' names, in the plural too; see `datasets.row_words`.
    A prompt has no span `object` where its row has no box that the model sees; `boxes_lost` counts those that it does not.
    Raises `InputError` for images that are not there or have another size than the boxes, and `SpanError` for what is
    no box, and for constraints that are not in the question; each names the row.

    >>> from hooked_llava import HookedLLaVA
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Red", constraint="the star")
    >>> inputs = prepare_rows(HookedLLaVA.from_pretrained("tiny-shapes"), [row])
    >>> [inputs.token_map.labels[p] for p in inputs.token_map["constraint"]]
    ['the', 'star']
    """
    if not 0 <= coverage <= 1:
        raise InputError(f"coverage={coverage} is not a share of a patch's area; expected 0 to 1.")
    prefixes = {row.answer_prefix for row in rows}
    if len(prefixes) != 1:
        raise InputError(
            f"The {len(rows)} rows begin their answers differently ({sorted(prefixes)}); prepare each apart."
        )
    for row in rows:
        _check_boxes(row)
    opened = [row_image(row, images) for row in rows]
    inputs = model.prepare(
        [row.question for row in rows],
        opened if any(p is not None for p in opened) else None,
        template=template,
        tail=tail,
        answer_prefix=prefixes.pop(),
    )
    return with_row_spans(inputs, rows, coverage)


def with_row_spans(inputs: Inputs, rows: Sequence[StudyRow], coverage: Number = 0) -> Inputs:
    """Prompts with the spans that their rows bring, as `prepare_rows` names them; raises `SpanError` as it does."""
    maps = tuple(inputs.each(lambda m, row: _with_spans(m, row, coverage), inputs.token_maps, rows))
    return replace(inputs, token_maps=maps)


def boxes_lost(inputs: Inputs, rows: Sequence[StudyRow], coverage: Number = 0) -> list[int]:
    """For each row how many of its boxes no patch shows: cut away by the processor's crop, or too small for `coverage`.

    >>> from hooked_llava import HookedLLaVA
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Red")
    >>> boxes_lost(prepare_rows(HookedLLaVA.from_pretrained("tiny-shapes"), [row]), [row])
    [0]
    """
    return [
        sum(not _patches(token_map, box, coverage) for box in row.boxes)
        for token_map, row in zip(inputs.token_maps, rows, strict=True)
    ]


def check_rows(rows: Sequence[StudyRow], images: str | Path | None = None) -> None:
    """What can be known of images and boxes before anything runs: that they are there, and fit.

    Of most images' files only the beginning is read (of a PNG all, which may say at its end how it is turned).
    Raises `InputError` and `SpanError`, which name the row.
    """
    for row in rows:
        _check_boxes(row)
        if row.image is None:
            continue
        found = _located(row, images)
        if row.boxes and row.size is not None:
            _check_size(row, _size(row, found))


def row_image(row: StudyRow, images: str | Path | None = None) -> Image.Image | None:
    """A row's image, opened; raises `InputError` if it is not in the folder, or not of the size of the row's boxes."""
    if row.image is None:
        return None
    opened = load_image(_located(row, images), _name(row))
    _check_size(row, opened.size)
    return opened


def row_file(row: StudyRow, images: str | Path | None = None) -> Path | None:
    """The file of a row's image; None where the row holds the image itself, or has none. Raises `InputError` as `row_image`.

    >>> row_file(StudyRow(id="1", question="Who made the star?", answer="Red")) is None
    True
    """
    found = _located(row, images)
    return found if isinstance(found, Path) else None


def _name(row: StudyRow) -> str:
    return f"The image of row {row.id}"


def _located(row: StudyRow, images: str | Path | None) -> ImageLike | None:
    """A row's image, or the path where it is."""
    return _find(row, Path(row.image), images) if isinstance(row.image, (str, Path)) else row.image


def _size(row: StudyRow, image: ImageLike | None) -> tuple[int, int]:
    """Width and height of the upright image, without decoding it where that is possible."""
    if isinstance(image, Path):
        with suppress(OSError), Image.open(image) as opened:
            return upright_size(opened)
    return load_image(image, _name(row)).size


def _check_size(row: StudyRow, size: tuple[int, int]) -> None:
    if row.boxes and row.size is not None and size != tuple(row.size):
        raise InputError(
            f"{_name(row)} is {size[0]} x {size[1]} pixels, and its boxes were drawn in {row.size[0]} x {row.size[1]}; "
            "use the original images."
        )


def _check_boxes(row: StudyRow) -> None:
    if row.boxes and row.image is None:
        raise InputError(f"Row {row.id} has boxes and no image; give the image they are drawn in.")
    with naming_row(row):
        for box in row.boxes:
            checked_box(box)


@contextmanager
def naming_row(row: StudyRow) -> Iterator[None]:
    """What does not fit a row is said with the row's name."""
    try:
        yield
    except (InputError, SpanError) as error:
        raise type(error)(f"Row {row.id}: {error}") from None


def _find(row: StudyRow, name: Path, images: str | Path | None) -> Path:
    if images is None:
        if name.is_file():
            return name
        raise InputError(f"Row {row.id} names its image, {str(name)!r}; give the folder it is in as images=.")
    folder = Path(images)
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {str(folder)!r}, in which row {row.id} should find its image {str(name)!r}; check images=."
        )
    tried = [folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise InputError(
            f"Row {row.id} needs the image {str(name)!r}, which is not in {str(folder)!r} "
            f"(as it is, or with {', '.join(SUFFIXES)}); check images=."
        )
    return found


def _with_spans(token_map: TokenMap, row: StudyRow, coverage: Number) -> TokenMap:
    seen = Positions()
    for box in row.boxes:
        seen |= _patches(token_map, box, coverage)
    if seen:
        token_map = token_map.with_spans(object=seen)
    token_map = token_map.with_spans(**word_spans(token_map, row.options, row.objects))
    if row.constraint:
        asked = token_map.words is not None and "question" in token_map.words.parts
        with naming_row(row):
            found = token_map.find(
                row.constraint,
                occurrence=row.constraint_occurrence,
                within="question" if asked else None,
                advice="choose one with the row's constraint_occurrence=, or take in more of the words around it",
            )
        token_map = token_map.with_spans(constraint=found)
    return token_map


def _patches(token_map: TokenMap, box: PixelBox, coverage: Number) -> Positions:
    """The patches under a box; none if the processor's crop has cut it away, or it is too small for the coverage."""
    if token_map.outside(box) < 1:
        with suppress(SpanError):
            return token_map.box_to_patches(box, coverage=coverage)
    return Positions()
