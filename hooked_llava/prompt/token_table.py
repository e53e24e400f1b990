"""A prompt as text: its tokens in columns, images and padding collapsed, the spans drawn under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.token_text import visible_token

_MARGIN = "  "
_LINE = "─"
_DIVIDING = ("system", "image", "question", "rest", "last")
"""The spans that divide a prompt, besides `text`, which says nothing that they do not."""


@dataclass(frozen=True)
class _Column:
    positions: range
    token: str

    @property
    def head(self) -> str:
        """The position, or the first and last of several."""
        return str(self.positions[0]) if len(self.positions) == 1 else f"{self.positions[0]}..{self.positions[-1]}"


def format_table(
    tokens: Sequence[str], real: range, images: Sequence[range], spans: Mapping[str, Positions], width: int
) -> str:
    """Lines of at most `width` characters: positions, tokens, the spans that divide the prompt, and those inside them.

    A line is longer only where a single token is.

    >>> spans = {"system": Positions([0]), "image": Positions([1, 2]), "last": Positions([3])}
    >>> print(format_table(["<s>", "<image>", "<image>", "?"], range(4), [range(1, 3)], spans, 80))
      0       1..2        3
      <s>     <image> x2  ?
      system  image─────  last
    """
    columns = _columns(tokens, (range(real.start), *images, range(real.stop, len(tokens))))
    lines = _span_lines(spans, images)
    marks = [[_mark(column, line) for column in columns] for line in lines]
    widths = [_column_width(index, column, marks) for index, column in enumerate(columns)]
    blocks = []
    for first, stop in _wrap(widths, width - len(_MARGIN)):
        here, sizes = columns[first:stop], widths[first:stop]
        block = [_row([c.head for c in here], sizes), _row([c.token for c in here], sizes)]
        rows = (_draw(marks_of_line[first:stop], sizes) for marks_of_line in marks)
        blocks.append("\n".join([*block, *(row for row in rows if row.strip())]))
    return "\n\n".join(blocks)


def _columns(tokens: Sequence[str], collapsed: Sequence[range]) -> list[_Column]:
    """One column a token; all positions of one image, and all padding on one side, share one."""
    stops = {positions.start: positions.stop for positions in collapsed if positions}
    columns, position = [], 0
    while position < len(tokens):
        stop = stops.get(position, position + 1)
        count = f" x{stop - position}" if stop - position > 1 else ""
        columns.append(_Column(range(position, stop), visible_token(tokens[position]) + count))
        position = stop
    return columns


def _span_lines(spans: Mapping[str, Positions], images: Sequence[range]) -> list[dict[str, Positions]]:
    """The spans that divide the prompt in one line, every further one in the first line with room for it."""
    lines = [{name: spans[name] for name in _DIVIDING if name in spans}]
    if len(images) > 1:
        lines[0].pop("image")
        lines[0] |= {f"image {i}": Positions(positions) for i, positions in enumerate(images)}
    inner: list[dict[str, Positions]] = []
    for name, positions in spans.items():
        if name in (*_DIVIDING, "text"):
            continue
        free = (line for line in inner if all(positions.isdisjoint(other) for other in line.values()))
        line = next(free, None)
        if line is None:
            line = {}
            inner.append(line)
        line[name] = positions
    return lines + inner


def _mark(column: _Column, line: dict[str, Positions]) -> str:
    """The name of the span that a column belongs to, or nothing."""
    return next((name for name, positions in line.items() if column.positions[0] in positions), "")


def _column_width(index: int, column: _Column, marks: list[list[str]]) -> int:
    """Wide enough for position and token, and for the name of every span that begins here."""
    begins = [line[index] for line in marks if index == 0 or line[index - 1] != line[index]]
    return max(len(column.head), len(column.token), *(len(name) for name in begins)) + len(_MARGIN)


def _wrap(widths: list[int], width: int) -> list[tuple[int, int]]:
    """First and last column (exclusive) of every block of lines."""
    blocks, first, used = [], 0, 0
    for index, size in enumerate(widths):
        if used and used + size - len(_MARGIN) > width:
            blocks.append((first, index))
            first, used = index, 0
        used += size
    return [*blocks, (first, len(widths))]


def _row(cells: list[str], sizes: list[int]) -> str:
    return (_MARGIN + "".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True))).rstrip()


def _draw(names: list[str], sizes: list[int]) -> str:
    """Span names, each followed by a line as far as its span reaches."""
    row, index = _MARGIN, 0
    while index < len(names):
        stop = index + 1
        while stop < len(names) and names[stop] == names[index]:
            stop += 1
        size = sum(sizes[index:stop])
        name = names[index][: size - len(_MARGIN)]  # a span that goes on in the next block may have little room there
        row += (name.ljust(size - len(_MARGIN), _LINE) if name else "").ljust(size)
        index = stop
    return row.rstrip()
