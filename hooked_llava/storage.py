"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

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


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that would hold these, without writing it (to within a few).

    >>> import torch
    >>> safetensors_bytes({"a": torch.zeros(2, 2)}, {"format": "mine"}) - 16 < 128
    True
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * -(-length // 8) + end  # the header's length, the header filled up to eights, the numbers
