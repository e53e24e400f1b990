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

    An older file stays as it was until then. The permissions are those that any new file gets. Raises `InputError` for a
    folder, a folder that is not there, and whatever the system refuses.

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
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder, path.name)  # made in a folder that only we can enter, but as any new file is made
            yield partial
            partial.replace(path)
    except OSError as error:
        raise InputError(
            f"The file cannot be written to {str(path)!r} ({error.strerror or error}); choose another place."
        ) from error
