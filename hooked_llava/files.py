"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hooked_llava.errors import InputError


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to; it takes `path`'s place at the end of the block, or is gone if the block fails.

    An older file stays as it was until then. The permissions are those that any new file gets. Raises `InputError` where
    `path` is a folder, or is in one that is not there.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_whole(f"{folder}/a.txt") as partial:
    ...         _ = partial.write_text("all of it")
    ...     [(entry.name, entry.read_text()) for entry in Path(folder).iterdir()]
    [('a.txt', 'all of it')]
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"Nothing can be written to {str(path)!r}, which is a folder; give a file name in it.")
    if not path.parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}. Make it first.")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial, usual = Path(folder, "partial"), Path(folder, "usual")
        yield partial
        usual.touch()
        partial.chmod(usual.stat().st_mode)  # some writers make files that only their owner can read
        partial.replace(path)
