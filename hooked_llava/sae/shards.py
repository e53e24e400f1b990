"""Activations on disk: shards of safetensors files, and an index in JSON that says what they are of.

A shard is written whole before the index names it, so a fill that was interrupted goes on after the last shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_llava.checks import check_same_work
from hooked_llava.datasets.forwards import Chunk, Rows
from hooked_llava.datasets.prompts import Progress
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.replay.progress import progress_bar
from hooked_llava.sae.shuffle import n_rows
from hooked_llava.storage import read_json, read_tensors, write_json, write_tensors

FORMAT = "hooked_llava.activations.v1"
INDEX = "index.json"
SHARD_SIZE = 2**16
"""Activations of one shard, about: it ends with a forward pass."""


@dataclass
class ShardIndex:
    """What a folder of shards holds: written anew after every shard, so that a fill can go on after the last.

    Attributes:
        folder (Path): Where the shards are, or will be.
        file_format (str): The kind of index and its version.
        about (dict[str, Any]): What they are of, in plain values.
        shards (list[dict[str, Any]]): For each shard its file and what is to be known of it.
        complete (bool): Whether the fill came to its end.
    """

    folder: Path
    file_format: str
    about: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path, file_format: str) -> ShardIndex | None:
        """The index of a folder, None where there is none; raises `CheckpointError` for one of another format."""
        if not (folder / INDEX).is_file():
            return None
        index = read_json(folder / INDEX)
        if index.get("format") != file_format:
            raise CheckpointError(f"{folder / INDEX} holds format {index.get('format')!r}; expected {file_format!r}.")
        return cls(folder, file_format, index["about"], index["shards"], index["complete"])

    def check_about(self, about: dict[str, Any], argument: str, what: str) -> None:
        """Raises `InputError` where the folder, a user's argument, holds something else than is asked for."""
        check_same_work(self.about, about, f"{argument}={str(self.folder)!r}", what)

    def write(self) -> None:
        """The index as a file, whole or not at all."""
        fields = {"format": self.file_format, "about": self.about, "complete": self.complete, "shards": self.shards}
        write_json(self.folder / INDEX, fields)


class ShardCache:
    """A folder of activations, in the order of the data.

    Args:
        folder: where they are, or will be; made if it is not there.
        about: what they are of, in plain values, "hooks" among them; a folder of other activations is refused. One that is
            complete may hold further hooks.
        shard_size: how many activations one file holds, at least.

    Raises `InputError` for a folder that holds other activations.
    """

    def __init__(self, folder: str | os.PathLike[str], about: dict[str, Any], *, shard_size: int = SHARD_SIZE) -> None:
        self.folder, self.shard_size = Path(folder).expanduser(), shard_size
        held = ShardIndex.read(self.folder, FORMAT)
        self.index = held or ShardIndex(self.folder, FORMAT, about)
        if held is not None:
            if held.complete and set(about["hooks"]) <= set(held.about["hooks"]):
                held.about["hooks"] = about["hooks"]  # of the hooks that are there some are read
            held.check_about(about, "cache_dir", "other activations")

    @property
    def shards(self) -> list[dict[str, Any]]:
        """For each shard its file, how many activations it holds, and how far the data were read with it."""
        return self.index.shards

    @property
    def complete(self) -> bool:
        """Whether all activations are there."""
        return self.index.complete

    def fill(self, chunks: Callable[[Progress], Iterator[Chunk]], *, progress: bool = True) -> None:
        """Run what is not there yet, and write it, shard by shard."""
        if self.complete:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.shards[-1]["index_after"] if self.shards else 0
        waiting: list[Rows] = []
        after = Progress(0, done)
        with progress_bar(None, "", shown=progress, desc="activations") as bar:
            for chunk in chunks(after):
                waiting.append(chunk.rows)
                after = chunk.after
                bar.update(n_rows(chunk.rows))
                if sum(map(n_rows, waiting)) >= self.shard_size:
                    self._write(waiting, after)
                    waiting = []
        if sum(map(n_rows, waiting)):
            self._write(waiting, after)
        if not self.shards:
            raise InputError(
                "tokens= names no position in any prompt of the data, so there are no activations to keep."
            )
        self.index.complete = True
        self.index.write()

    def chunks(self, start: Progress, *, seed: int, epochs: int | None) -> Iterator[Chunk]:
        """The shards in a new order in every epoch, from some progress on; here `index` counts shards."""
        for epoch in count(start.epoch) if epochs is None else range(start.epoch, epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.shards)).tolist()
            skipped = start.index if epoch == start.epoch else 0
            for index, number in enumerate(order[skipped:], skipped + 1):
                yield Chunk(self._read(self.shards[number]), Progress(epoch, index))

    def _write(self, waiting: list[Rows], after: Progress) -> None:
        rows = {name: torch.cat([one[name] for one in waiting]) for name in waiting[0]}
        file = f"shard-{len(self.shards):05d}.safetensors"
        write_tensors(self.folder / file, rows, {}, FORMAT)
        self.shards.append({"file": file, "n": n_rows(rows), "index_after": after.index})
        self.index.write()

    def _read(self, shard: dict[str, Any]) -> Rows:
        path = self.folder / shard["file"]
        rows = read_tensors(path, [FORMAT], writer="activation_stream")[0]
        if n_rows(rows) != shard["n"]:
            raise CheckpointError(f"{path} holds {n_rows(rows)} activations; expected {shard['n']}. Remove the folder.")
        return rows
