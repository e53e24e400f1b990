"""Activations on disk: shards of safetensors files, and an index in JSON that says what they are of.

A shard is written whole before the index names it, so a fill that was interrupted goes on after the last shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_llava.checks import first_difference
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.replay.progress import progress_bar
from hooked_llava.sae.forwards import Chunk
from hooked_llava.sae.prompts import Progress
from hooked_llava.sae.shuffle import Rows, n_rows
from hooked_llava.storage import read_json, read_tensors, write_json, write_tensors

FORMAT = "hooked_llava.activations.v1"
INDEX = "index.json"
SHARD_SIZE = 2**16
"""Activations of one shard, about: it ends with a forward pass."""


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
        self.folder, self.about, self.shard_size = Path(folder).expanduser(), about, shard_size
        self.shards: list[dict[str, Any]] = []
        self.complete = False
        if (self.folder / INDEX).is_file():
            self._read_index()

    def _read_index(self) -> None:
        index = read_json(self.folder / INDEX)
        if index.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder / INDEX} holds format {index.get('format')!r}; expected {FORMAT!r}.")
        held = index["about"]
        if index["complete"] and set(self.about["hooks"]) <= set(held["hooks"]):
            held = {**held, "hooks": self.about["hooks"]}  # of the hooks that are there some are read
        if (name := first_difference(held, self.about)) is not None:
            raise InputError(
                f"cache_dir={str(self.folder)!r} holds activations of another {name}: {held.get(name)!r}, and "
                f"{self.about[name]!r} is asked for. Remove it, or give another folder."
            )
        self.shards, self.complete = index["shards"], index["complete"]

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
        self.complete = True
        self._write_index()

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
        self._write_index()

    def _write_index(self) -> None:
        index = {"format": FORMAT, "about": self.about, "complete": self.complete, "shards": self.shards}
        write_json(self.folder / INDEX, index)

    def _read(self, shard: dict[str, Any]) -> Rows:
        path = self.folder / shard["file"]
        rows = read_tensors(path, [FORMAT], writer="activation_stream")[0]
        if n_rows(rows) != shard["n"]:
            raise CheckpointError(f"{path} holds {n_rows(rows)} activations; expected {shard['n']}. Remove the folder.")
        return rows
