"""Files that are written whole or not at all, and tensors with what is to be known of them in one file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_llava.errors import CheckpointError, InputError


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


def on_disk(tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """A copy of a tensor in the pages of a file, which the system brings into memory as they are read; the file goes with it.

    It loses its name before anything is written to it, so nothing half-written stays in the folder. Raises `InputError` where
    there is no such folder, and `OSError` where the disk is full.

    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = on_disk(torch.arange(3), folder)
    ...     kept, list(Path(folder).iterdir())
    (tensor([0, 1, 2]), [])
    """
    check_folder(folder)
    if not tensor.numel():
        return tensor.detach().cpu()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".hooked_llava.") as own:
        path = Path(own, "pages")
        path.touch()
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so here, not when a page is written
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        pages = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return pages.view(tensor.shape).copy_(tensor.detach())


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises `InputError` unless there is such a folder."""
    if not Path(folder).expanduser().is_dir():
        raise InputError(f"There is no folder {os.fspath(folder)!r} to keep tensors in. Make it first.")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file_format: str
) -> None:
    """Write tensors and words that belong to them to one safetensors file; nothing half-written stays.

    `file_format` names the kind of file and its version, for `read_tensors`. Tensors must not share memory. Raises `InputError`
    as `written_whole`.

    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/file", {"a": torch.ones(2)}, {"of": "example"}, "example.v1")
    ...     read_tensors(f"{folder}/file", ["example.v1"], writer="write_tensors")
    ({'a': tensor([1., 1.])}, {'format': 'example.v1', 'of': 'example'})
    """
    _write(path, tensors, {"format": file_format, **metadata})


def read_tensors(
    path: str | os.PathLike[str],
    formats: Sequence[str | None],
    *,
    writer: str,
    unreadable: str = "is not a readable safetensors file",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `write_tensors` wrote; nothing is ever unpickled.

    `formats` are those that the caller reads, the one that is written today first; `writer` is what writes it, for the
    message. Raises `CheckpointError` for a file that is not there or is damaged, and for one of another format.
    """
    tensors, metadata = _read(path, unreadable, f"; expected one that {writer} wrote")
    _check_format(path, metadata, formats, writer)
    return tensors, dict(sorted(metadata.items()))


class TensorFile:
    """A file that `write_tensors` wrote, of which parts are read when they are asked for.

    Args:
        path: the file.
        formats: those that the caller reads, as for `read_tensors`.
        writer: what writes it, for the message.

    Raises `CheckpointError` as `read_tensors`.

    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/file", {"a": torch.arange(9)}, {"of": "example"}, "example.v1")
    ...     file = TensorFile(f"{folder}/file", ["example.v1"], writer="write_tensors")
    ...     file.length("a"), file.part("a", 3, 5), file.metadata["of"]
    (9, tensor([3, 4]), 'example')
    """

    def __init__(self, path: str | os.PathLike[str], formats: Sequence[str | None], *, writer: str) -> None:
        self.path = Path(path).expanduser()
        try:
            self._file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}); expected one that {writer} wrote."
            ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        _check_format(path, self.metadata, formats, writer)

    def length(self, name: str) -> int:
        """How many rows a tensor has."""
        return self._file.get_slice(name).get_shape()[0]

    def part(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The rows of a tensor from `start` up to `stop`, all by default; a copy."""
        return self._file.get_slice(name)[slice(start, stop)]


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors alone to one safetensors file, whole or not at all; raises `InputError` as `written_whole`."""
    _write(path, tensors, None)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, whoever wrote it; raises `CheckpointError` for one that cannot be read."""
    return _read(path, "is not a readable safetensors file")[0]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The named fields of a JSON file; raises `CheckpointError` if it is not there, or holds something else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there; expected a checkpoint folder in Hugging Face format. Check the path."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download or copy it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a JSON {type(fields).__name__}; expected an object of named fields.")
    return fields


def write_json(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write named fields to a JSON file, whole or not at all; raises `InputError` as `written_whole`."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def bytes_written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file_format: str) -> int:
    """Bytes of the file that `write_tensors` would write, without writing it (to within a few).

    >>> import torch
    >>> bytes_written({"a": torch.zeros(2, 2)}, {}, "mine") - 16 < 128
    True
    """
    header: dict[str, Any] = {"__metadata__": {"format": file_format, **metadata}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * -(-length // 8) + end  # the header's length, the header filled up to eights, the numbers


def _check_format(
    path: str | os.PathLike[str], metadata: Mapping[str, str], formats: Sequence[str | None], writer: str
) -> None:
    found = metadata.get("format")
    if found not in formats:
        held = "'no known format'" if found is None else f"format {found!r}"
        raise CheckpointError(f"{path} holds {held}; expected {formats[0]!r}, as {writer} writes.")


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    with written_whole(path) as partial:
        held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(held, partial, metadata=metadata)


def _read(
    path: str | os.PathLike[str], unreadable: str, expected: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} {unreadable} ({error}){expected}.") from error
