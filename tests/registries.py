"""What tests of the registries share: a table that is put back, and the command's help with another table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

_Entry = TypeVar("_Entry")


@contextmanager
def put_back(table: dict[str, _Entry]) -> Iterator[dict[str, _Entry]]:
    """The table, which is as it was after the block, order included."""
    before = dict(table)
    try:
        yield table
    finally:
        table.clear()
        table.update(before)


def help_after(command: str, change: str) -> str:
    """A command's help in a process of its own, after these lines of Python; nothing heavy may be loaded."""
    code = f"""
import sys
{change}
from hooked_llava.cli import app
app([{command!r}, "--help"], standalone_mode=False)
assert "torch" not in sys.modules
"""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
