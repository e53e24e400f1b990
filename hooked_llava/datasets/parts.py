"""The finished batches of a study: kept in files while it runs, gathered from all its processes, joined to one result."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xarray as xr

from hooked_llava.checks import check_same_work
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.errors import InputError
from hooked_llava.machine.processes import Processes
from hooked_llava.prompt.images import ImageLike, load_image
from hooked_llava.results.arrays import join_attrs, load, save

_WORK = "study_of"


class StudyParts:
    """The finished batches of a study, in files beside its result if it has one.

    Args:
        rows: the table.
        path: file of the result; each finished batch has one of its own in the folder of that name with `.parts` appended.
        fingerprint: a hash of what the study is of, which every file holds.
        work: what the study is of, in plain values, so that a file of another study can be told by what differs.
    """

    def __init__(
        self,
        rows: Sequence[StudyRow],
        path: Path | None = None,
        fingerprint: str = "",
        work: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.rows, self.path, self.fingerprint, self.work = rows, path, fingerprint, work
        self.folder = None if path is None else path.with_name(path.name + ".parts")
        self.place = {row.id: i for i, row in enumerate(rows)}
        self.done: list[xr.Dataset] = []
        self.added: list[xr.Dataset] = []
        self.finished: xr.Dataset | None = None

    @classmethod
    def open(cls, rows: Sequence[StudyRow], path: Path, fingerprint: str, work: Mapping[str, Any]) -> StudyParts:
        """The batches of an earlier run; raises `InputError` if that was another study."""
        parts = cls(rows, path, fingerprint, work)
        assert parts.folder is not None
        if path.is_file():
            parts.finished = parts.mine(load(path), path)
        elif parts.folder.is_dir():
            parts.done = [parts.mine(load(file), parts.folder) for file in sorted(parts.folder.glob("*.safetensors"))]
        return parts

    def mine(self, result: xr.DataArray | xr.Dataset, where: Path) -> xr.Dataset:
        """The result, if it is of this study."""
        if isinstance(result, xr.Dataset) and result.attrs.get("fingerprint") == self.fingerprint:
            return result
        place, what = f"out={str(where)!r}", "another study"
        if _WORK in result.attrs:  # which files of earlier versions do not say
            check_same_work(json.loads(result.attrs[_WORK]), self.work, place, what)
        raise InputError(f"{place} holds {what}. Remove it, or give another place.")

    def left(self) -> list[StudyRow]:
        """The rows of which no finished batch knows, however they were batched."""
        if self.finished is not None:
            return []
        asked = {row_id for part in self.done for row_id in part.attrs["rows"]}
        return [row for row in self.rows if row.id not in asked]

    def check_agreement(self, processes: Processes) -> None:
        """Wait for all processes, none of which has begun; raises `InputError` unless all have the same to do."""
        to_do = json.dumps([self.fingerprint, [row.id for row in self.rows], [row.id for row in self.left()]])
        told = processes.gather_bytes(digest(to_do.encode()).encode())
        if other := [i for i, of_one in enumerate(told) if of_one != told[processes.index]]:
            raise InputError(
                f"Processes {processes.index} and {other[0]} of {processes.n} have different questions to ask; give all the same "
                "rows, weights and settings, and an out= in a folder that all of them see."
            )

    def add(self, batch: Sequence[StudyRow], part: xr.Dataset) -> None:
        """Keep a finished batch."""
        part = part.assign_attrs(rows=[row.id for row in batch])
        if self.folder is not None:
            part = part.assign_attrs({"fingerprint": self.fingerprint, _WORK: json.dumps(self.work)})
            self.folder.mkdir(exist_ok=True)
            save(part, self.folder / f"{self.place[batch[0].id]:06d}.safetensors")
        self.added.append(part)

    def join(self, options: Mapping[str, Any], processes: Processes) -> xr.Dataset:
        """All batches of all processes in the table's order, with how they were asked; written once, if there is a file."""
        done = sorted(
            [*self.done, *_gathered(self.added, processes)], key=lambda part: self.place[part.attrs["rows"][0]]
        )
        found = [part for part in done if "question" in part.dims]
        asked, correct = (_sum(part.attrs[name] for part in done) for name in ("asked", "correct"))
        if not found:
            raise InputError(
                f"None of the {sum(asked.values())} questions was answered correctly, so nothing was measured. "
                "Check template= and tail=, or measure all with only_correct=False."
            )
        known = set.intersection(*(set(part.coords) for part in found))  # parts of earlier versions have fewer
        found = [part.drop_vars(set(part.coords) - known) for part in found]
        try:
            joined = xr.concat(found, dim="question", join="exact", coords="minimal", compat="override")
        except ValueError as error:
            raise InputError(
                f"The results of the batches have different axes ({error}); the analysis must return the same axes for every "
                "batch."
            ) from None
        joined = joined.isel(question=np.argsort([self.place[i] for i in joined["question"].values.tolist()]))
        attrs = join_attrs([part.attrs for part in found], keep_differing=False)
        attrs.pop("rows", None)
        joined = joined.drop_attrs(deep=False).assign_attrs({**attrs, "asked": asked, "correct": correct, **options})
        if self.path is not None and self.folder is not None and processes.index == 0:
            save(joined, self.path)
            shutil.rmtree(self.folder)
        processes.wait()
        return joined


def _gathered(parts: Sequence[xr.Dataset], processes: Processes) -> list[xr.Dataset]:
    """The batches of all processes, sent as the files that they would be."""
    if processes.n == 1:
        return list(parts)
    most = int(processes.most(torch.tensor(len(parts))))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "own")
        for number in range(most):
            if has_one := number < len(parts):
                save(parts[number], own)
            for index, sent in enumerate(processes.gather_bytes(own.read_bytes() if has_one else b"")):
                if sent:
                    file = Path(folder, f"{number}-{index}")  # its own: what is loaded stays mapped to its file
                    file.write_bytes(sent)
                    found.append(load(file))
    return found


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def digest(data: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def image_digest(image: ImageLike, what: str) -> str:
    """A short hash of an image's pixels, and its size; `what` names it in errors."""
    loaded = load_image(image, what)
    return f"{loaded.size} {digest(loaded.tobytes())}"
