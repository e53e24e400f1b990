"""One question of a table, and how such rows become inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_llava.errors import InputError, SpanError
from hooked_llava.geometry import Number
from hooked_llava.inputs import TEMPLATE_TAIL
from hooked_llava.pictures import Picture, load_picture
from hooked_llava.positions import Positions
from hooked_llava.templates import DEFAULT

if TYPE_CHECKING:
    from PIL import Image

    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA
    from hooked_llava.token_map import TokenMap

PixelBox = tuple[Number, Number, Number, Number]
"""(x0, y0, x1, y1) in the pixels of the original picture, x1 and y1 exclusive."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings that are tried where a row names its picture without one."""


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One question of a table, with its answer, its picture, and what is known about it.

    >>> StudyRow(id="1", question="What color is the star?", answer="Red").kind
    ''
    """

    id: str
    """What the row is called in its table; each of its own."""
    question: str
    """The question, without any template."""
    answer: str
    """The right answer."""
    picture: Picture | None = None
    """A file name below the table's folder of pictures (its ending may be left out), a picture, or None."""
    false_option: str = ""
    """The other option that the question names, or the answer that would be wrong; "" where there is none."""
    kind: str = ""
    """Kind of question, such as "ChooseAttr"; results are averaged by it."""
    objects: tuple[str, ...] = ()
    """Names of the objects that the question is about."""
    boxes: tuple[PixelBox, ...] = ()
    """Where they are; those that are not there have none."""
    size: tuple[int, int] | None = None
    """Width and height of the picture in which the boxes were drawn, if they are known."""
    constraint: str = ""
    """Words of the question that the answer depends on (Basu et al. 2406.04236); they become the span `constraint`."""
    answer_prefix: str = ""
    """How the answer begins, already written."""


def prepare_rows(
    model: HookedLLaVA,
    rows: Sequence[StudyRow],
    images: str | Path | None = None,
    *,
    template: Any = DEFAULT,
    tail: str | None = TEMPLATE_TAIL,
    coverage: Number = 0,
) -> Inputs:
    """Rows of one table as a batch of prompts, with the spans `object` and `constraint` where a row has them.

    Args:
        model: the model.
        rows: all with the same `answer_prefix`.
        images: folder of the pictures that rows name.
        template: as for `model.prepare`.
        tail: as for `model.prepare`.
        coverage: share of a patch that the objects' boxes must cover for it to be one of `object`; 0 takes every patch
            that they touch, as Zhang et al. (2411.18620) do.

    A prompt has no span `object` where its row has no box that the model sees. Raises `InputError` for pictures that
    are not there or have another size than the boxes, and `SpanError` for constraints that are not in the question.

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
    pictures = [row_picture(row, images) for row in rows]
    inputs = model.prepare(
        [row.question for row in rows],
        pictures if any(p is not None for p in pictures) else None,
        template=template,
        tail=tail,
        answer_prefix=prefixes.pop(),
    )
    maps = tuple(_with_spans(m, row, coverage) for m, row in zip(inputs.token_maps, rows, strict=True))
    return replace(inputs, token_maps=maps)


def row_picture(row: StudyRow, images: str | Path | None = None) -> Image.Image | None:
    """A row's picture, opened; raises `InputError` if it is not in the folder, or not of the size of the row's boxes."""
    if row.picture is None:
        return None
    picture = row.picture
    if isinstance(picture, (str, Path)):
        picture = _find(row, Path(picture), images)
    opened = load_picture(picture, f"The picture of row {row.id}")
    if row.size is not None and row.boxes and opened.size != tuple(row.size):
        raise InputError(
            f"The picture of row {row.id} is {opened.size[0]} x {opened.size[1]} pixels, and its boxes were drawn in "
            f"{row.size[0]} x {row.size[1]}; use the original pictures."
        )
    return opened


def _find(row: StudyRow, name: Path, images: str | Path | None) -> Path:
    if images is None:
        if name.is_file():
            return name
        raise InputError(f"Row {row.id} names its picture, {str(name)!r}; give the folder it is in as images=.")
    folder = Path(images)
    tried = [folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise InputError(
            f"Row {row.id} needs the picture {str(name)!r}, which is not in {str(folder)!r} "
            f"(as it is, or with {', '.join(SUFFIXES)}); check images=."
        )
    return found


def _with_spans(token_map: TokenMap, row: StudyRow, coverage: Number) -> TokenMap:
    seen = Positions()
    for box in row.boxes:
        if token_map.outside(box) < 1:  # the processor's crop may have cut it away
            with suppress(SpanError):  # too small for the coverage
                seen |= token_map.box_to_patches(box, coverage=coverage)
    if seen:
        token_map = token_map.with_spans(object=seen)
    if row.constraint:
        asked = token_map.words is not None and "question" in token_map.words.parts
        found = token_map.find(row.constraint, within="question" if asked else None)
        token_map = token_map.with_spans(constraint=found)
    return token_map
