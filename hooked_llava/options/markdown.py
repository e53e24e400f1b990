"""Tables of options for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown_rows(["name", "meaning"], [["`a`", "the first"]]))
    | name | meaning |
    |---|---|
    | `a` | the first |
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def code_list(names: Iterable[str]) -> str:
    """Names as code, separated by commas.

    >>> code_list(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{name}`" for name in names)
