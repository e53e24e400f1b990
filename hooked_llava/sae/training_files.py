"""Checkpoints of a training run, from which it goes on as if it had not stopped.

A step's files are written first, each whole; then `latest.json` names the step, and older files are removed. A run that is
killed at any time leaves a `latest.json` whose files are all there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_llava.checks import check_same_work
from hooked_llava.machine.processes import Processes
from hooked_llava.storage import read_json, read_tensors, write_json, write_tensors

FORMAT = "hooked_llava.sae_training.v1"
LATEST = "latest.json"
_TRAINER, _STREAM = "trainer", "stream"


class Checkpoints:
    """A folder with the state of a run: of the trainer once, of the stream for every process.

    Args:
        folder: where; made if it is not there.
        about: what the run is of, in plain values; a folder of another run is refused.
        processes: those that train together.

    Raises `InputError` for a folder of another run, or of another number of processes.
    """

    def __init__(self, folder: str | os.PathLike[str], about: dict[str, Any], processes: Processes) -> None:
        self.folder, self.processes = Path(folder).expanduser(), processes
        self.about = json.loads(json.dumps({**about, "processes": processes.n}))
        self.step: int | None = None
        if (self.folder / LATEST).is_file():
            latest = read_json(self.folder / LATEST)
            check_same_work(latest["about"], self.about, f"checkpoint_dir={str(self.folder)!r}", "another run")
            self.step = latest["step"]

    def load(self) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The state of the trainer, and of this process's stream if it has one; None where nothing was saved."""
        if self.step is None:
            return None
        stream = self._file(self.step, f"{_STREAM}-{self.processes.index}")
        return _read(self._file(self.step, _TRAINER)), _read(stream) if stream.is_file() else None

    def save(self, step: int, trainer: dict[str, Any], stream: dict[str, Any] | None) -> None:
        """Write the state after a step, and remove that of earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.processes.index == 0:
            _write(self._file(step, _TRAINER), trainer)
        if stream is not None:
            _write(self._file(step, f"{_STREAM}-{self.processes.index}"), stream)
        self.processes.wait()
        if self.processes.index == 0:
            write_json(self.folder / LATEST, {"about": self.about, "step": step})
            for old in set(self.folder.glob("step-*.safetensors")) - set(self.folder.glob(f"step-{step:08d}.*")):
                old.unlink()
        self.step = step
        self.processes.wait()

    def _file(self, step: int, what: str) -> Path:
        return self.folder / f"step-{step:08d}.{what}.safetensors"


def _write(path: Path, state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    write_tensors(path, tensors, {"state": json.dumps(plain)}, FORMAT)


def _without_tensors(state: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The plain values of a nested state; its tensors are put aside under their paths."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{path}{name}"] = value
        else:
            plain[str(name)] = _without_tensors(value, f"{path}{name}/", tensors) if isinstance(value, dict) else value
    return plain


def _read(path: Path) -> dict[str, Any]:
    tensors, metadata = read_tensors(path, [FORMAT], writer="train_sae")
    state = json.loads(metadata["state"])
    for name, tensor in tensors.items():
        *above, last = name.split("/")
        within = state
        for part in above:
            within = within[part]
        within[last] = tensor
    return state
