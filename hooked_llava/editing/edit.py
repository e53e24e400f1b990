"""An edit: what is added to which weights, why, and how to take it back bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_llava.editing import ledger
from hooked_llava.editing.change import Change
from hooked_llava.editing.identity import check_same_model, identity
from hooked_llava.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

_FORMAT = "hooked_llava.edit.v1"
_IDENTITY = "identity"
_PARTS = ("left", "right", "full")
_numbers = itertools.count()


@dataclass(eq=False, repr=False)
class Edit:
    """A change of a model's weights that can be applied, taken back, combined and stored.

    An edited model runs, caches, patches, generates and saves like any other; a `Replay` made before refuses to go on.
    Several edits may be active at once and are reverted in any order: a weight is its kept original plus the sum of the
    active edits, computed in float32 and cast once. The weights are changed in place, so a change reaches whatever shares
    their memory: the Hugging Face model that `from_hf` was given, another view of it, and of tied embeddings both.
    `model.to(...)` and the like are for before an edit is applied or after it is reverted.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, multedit
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> question = model.prepare("Who made the star?")
    >>> before = model.generate(question)
    >>> edit = multedit(model, EditRequest("Who made the star?", "Cairo"), layer=4, position="last")
    >>> with edit.applied():
    ...     model.generate(question)
    'Cairo'
    >>> model.generate(question) == before
    True
    """

    model: HookedLLaVA
    """The model that it belongs to."""
    changes: Mapping[str, Change]
    """For each weight, by the name of its parameter, what is added to it."""
    requests: tuple[Mapping[str, Any], ...] = ()
    """What was asked for: question, constraint, target, in plain words."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """How the change was computed."""
    number: int = field(default_factory=lambda: next(_numbers), init=False)

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name, change in self.changes.items():
            found = tuple(named[name].shape) if name in named else "no such weight"
            if found != change.shape:
                raise InputError(f"The edit changes {name} of shape {change.shape}; the model has {found}.")
        if len({self._weight(name).data_ptr() for name in self.changes}) < len(self.changes):
            raise InputError("The edit names one weight twice (tied embeddings are one); add its changes up.")

    # ------------------------------------------------------------------ applying

    @property
    def is_applied(self) -> bool:
        """Whether it is active on the model's weights."""
        return any(self.number in ledger.active(self._weight(name)) for name in self.changes)

    @contextmanager
    def applied(self) -> Iterator[Edit]:
        """The edit in place for the time of the block, and taken back at its end, exceptions included."""
        self.apply()
        try:
            yield self
        finally:
            self.revert()

    def apply(self) -> Edit:
        """Put the edit in place until `revert`.

        Raises `InputError`, with all weights as they were, if it is active already or a weight's dtype too coarse.
        """
        if self.is_applied:
            raise InputError("This edit is applied already; revert it first, or make a second one.")
        composed = {
            name: ledger.with_change(name, self._weight(name), self.number, change)
            for name, change in self.changes.items()
        }
        for name, change in self.changes.items():
            ledger.add(self._weight(name), self.number, change, composed[name])
        return self

    def check_precision(self) -> None:
        """Raises `InputError` if a weight's dtype is too coarse for the change; applies nothing."""
        for name, change in self.changes.items():
            ledger.with_change(name, self._weight(name), self.number, change)

    def revert(self) -> None:
        """Take the edit back: the weights are bit for bit what they are with the remaining edits, or without any.

        Raises `InputError` if it is not active, or something else changed the weights meanwhile.
        """
        if not self.is_applied:
            raise InputError(
                "This edit is not applied, so there is nothing to revert; or the model was moved or converted "
                "(.to(...)) while it was, in which case load the model anew."
            )
        for name in self.changes:
            ledger.check_untouched(name, self._weight(name), self.number)
        for name in self.changes:
            ledger.remove(self._weight(name), self.number)

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one; raises `InputError` for edits of different models."""
        if other.model is not self.model:
            raise InputError("The edits belong to different models; load both with the same one.")
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = changes[name] + change if name in changes else change
        method = {"name": "sum", "parts": [dict(self.method), dict(other.method)]}
        return Edit(self.model, changes, (*self.requests, *other.requests), method)

    # ------------------------------------------------------------------ what it is

    @property
    def layers(self) -> list[int]:
        """Layers of the language tower whose weights it changes."""
        parts = (name.split(".") for name in self.changes)
        return sorted({int(p[2]) for p in parts if p[:2] == ["language", "blocks"]})

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return sum(change.nbytes for change in self.changes.values())

    def __repr__(self) -> str:
        name = self.method.get("name", "edit")
        ranks = {change.rank for change in self.changes.values()}
        rank = "full rank" if None in ranks else f"rank {max(ranks, default=0)}"
        state = "applied" if self.is_applied else "not applied"
        asked = f"{len(self.requests)} request{'' if len(self.requests) == 1 else 's'}"
        return f"Edit({name}, {asked}, layers {self.layers}, {rank}, {self.nbytes / 1000:.1f} kB, {state})"

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factors to one safetensors file, with requests, method and what the unedited model is.

        Nothing half-written stays behind.
        """
        path = Path(path)
        tensors = {_IDENTITY: identity(self.model)}
        for name, change in self.changes.items():
            parts = {"left": change.left, "right": change.right, "full": change.full}
            tensors |= {f"{part}.{name}": t.contiguous().cpu() for part, t in parts.items() if t is not None}
        about = {
            "model": self.model.config.model_name,
            "weights": list(self.changes),
            "requests": list(self.requests),
            "method": self.method,
        }
        metadata = {"format": _FORMAT, "about": json.dumps(about)}
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, partial, metadata=metadata)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HookedLLaVA) -> Edit:
        """Read an edit for a model, not yet applied.

        Raises `CheckpointError` for a file that is no edit, and `InputError` if the model's unedited weights are not those
        that it was computed on.
        """
        about, tensors = _read(Path(path))
        if _IDENTITY not in tensors:
            raise CheckpointError(f"{path} does not say which model it is for. Save the edit again.")
        check_same_model(model, tensors[_IDENTITY], about["model"])
        changes = {}
        for name in about["weights"]:
            left, right, full = (tensors.get(f"{part}.{name}") for part in _PARTS)
            if left is None or right is None:
                raise CheckpointError(f"{path} lacks the factors of {name}. Save the edit again.")
            changes[name] = Change(left, right, full)
        return cls(model, changes, tuple(about["requests"]), about["method"])

    def _weight(self, name: str) -> Tensor:
        return self.model.get_parameter(name)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; expected a file that Edit.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or is no safetensors file ({error}).") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is of format {metadata.get('format')!r}; expected {_FORMAT!r}, as Edit.save writes."
        )
    return json.loads(metadata["about"]), tensors
