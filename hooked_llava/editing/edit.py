"""An edit: what is added to which weights, why, and how to revert it bit for bit."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_llava.editing import weight_records
from hooked_llava.editing.change import Change
from hooked_llava.editing.request import check_editable
from hooked_llava.editing.weight_records import ActiveEdit
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import WeightsId, check_same_weights
from hooked_llava.storage import bytes_written, read_tensors, write_tensors

_FORMAT = "hooked_llava.edit.v2"
_SAMPLED = "hooked_llava.edit.v1"  # version 0.1: some numbers of each weight in place of hashes
_SAMPLES = "identity"
_PARTS = ("left", "right", "full")


@dataclass(eq=False, repr=False)
class Edit:
    """A change of a model's weights that can be applied, reverted, combined and stored.

    An edited model runs, caches, patches, generates and saves like any other; a `Replay` made before refuses to go on.
    Several edits may be active at once and are reverted in any order: a weight is its kept original plus the sum of the
    active edits, computed in float64 and cast once. The weights are changed in place, so a change reaches whatever shares
    their memory: the Hugging Face model that `from_hf` was given, another view of it, and of tied embeddings both.
    `model.to(...)` and the like are for before an edit is applied or after it is reverted. `active_edits(model)` finds
    an edit whose handle was lost.

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

    Attributes:
        model (HookedLLaVA): The model that it belongs to.
        changes (Mapping[str, Change]): For each weight, by the name of its parameter, what is added to it.
        requests (tuple[Mapping[str, Any], ...]): What was asked for: question, constraint, target, in plain words;
            whether it `landed`, and what is answered with it.
        method (Mapping[str, Any]): How the change was computed.
        active (ActiveEdit): What the weight records know of it.
    """

    model: HookedLLaVA
    changes: Mapping[str, Change]
    requests: tuple[Mapping[str, Any], ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    active: ActiveEdit = field(default_factory=ActiveEdit, init=False)

    def __post_init__(self) -> None:
        check_editable(self.model)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name, change in self.changes.items():
            found = tuple(named[name].shape) if name in named else "no such weight"
            if found != change.shape:
                raise InputError(f"The edit changes {name} of shape {change.shape}; the model has {found}.")
        if len({w.data_ptr() for w in self._weights().values()}) < len(self.changes):
            raise InputError("The edit names one weight twice (tied embeddings are one); add its changes up.")

    def check_model(self, model: HookedLLaVA) -> None:
        """Raise `InputError` for another model object than the edit's own."""
        if self.model is not model:
            raise InputError("The edit belongs to another model object; load it with this one, or pass edit.model.")

    # ------------------------------------------------------------------ applying

    @property
    def is_applied(self) -> bool:
        """Whether it is in place: applied, and not reverted since."""
        return bool(self.active.places)

    @contextmanager
    def applied(self) -> Iterator[Edit]:
        """The edit in place for the time of the block, and reverted at its end, exceptions included.

        If it cannot be reverted after an exception of the block, that is noted on the exception.
        """
        self.apply()
        try:
            yield self
        except BaseException as error:
            try:
                self._revert_if_applied()
            except InputError as failed:
                error.add_note(f"Besides, the edit could not be reverted: {failed}")
            raise
        self._revert_if_applied()

    def _revert_if_applied(self) -> None:
        if self.is_applied:  # the block may have reverted it itself
            self.revert()

    def apply(self) -> Edit:
        """Put the edit in place until `revert`.

        Raises `InputError`, with all weights as they were, if it is active already or a weight's dtype too coarse.
        """
        if moved := self._moved():
            raise InputError(
                f"This edit was applied already when the model was moved or converted (.to(...)), so {moved[0]} holds it "
                "and it would count twice. Load the model and the edit anew, and apply it after moving."
            )
        if self.is_applied:
            raise InputError("This edit is applied already; revert it first, or make a second one.")
        self.active.handle, self.active.about = weakref.ref(self), {"requests": self.requests, "method": self.method}
        weights = self._weights()
        try:
            composed = {
                n: weight_records.with_change(n, weights[n], self.active, change) for n, change in self.changes.items()
            }
            for name, change in self.changes.items():  # all that takes memory comes before the first weight is written
                weight_records.add_change(name, weights[name], self.active, change)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(composed[name])
        except BaseException:
            weight_records.remove(self.active, weights)
            self.active.places.clear()
            raise
        return self

    def check_precision(self) -> None:
        """Raises `InputError` if a weight's dtype is too coarse for the change; applies nothing."""
        for name, weight in self._weights().items():
            weight_records.with_change(name, weight, self.active, self.changes[name])

    def revert(self) -> None:
        """Revert the edit: the weights are bit for bit what they are with the remaining edits, or without any.

        Raises `InputError` if it is not applied, or something else changed the weights meanwhile. If the model was moved or
        converted while it was applied, it is reverted in the memory that it was applied to, if that is still in use
        (by the model that `from_hf` was given), and the error says that the moved weights keep it.
        """
        if not self.is_applied:
            raise InputError("This edit is not applied, so there is nothing to revert.")
        weight_records.check_untouched(self.active)
        weight_records.remove(self.active, self._weights())
        if moved := self._moved():
            raise InputError(
                f"{moved[0]} is not the memory that the edit was applied to: the model was moved or converted (.to(...)) or "
                "its parameter replaced since, and what it has now keeps the edit. Load the model anew; revert edits before "
                "moving it."
            )
        self.active.places.clear()

    def _moved(self) -> list[str]:
        """Weights that no longer lie where they were when the edit was applied."""
        weights = self._weights()
        return [name for name, at in self.active.places.items() if not weight_records.is_at(weights[name], at)]

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
    def first_affected_layer(self) -> int | None:
        """The lowest layer of the language tower that computes something else under the edit; n_layers if only the final norm
        or the unembedding does, None if what enters the first layer is another already.
        """
        memory, n_layers = {weight.data_ptr() for weight in self._weights().values()}, self.model.cfg.n_layers
        every = self.model.named_parameters(remove_duplicate=False)  # tied weights have several names
        layers = [_acts_in(name, n_layers) for name, weight in every if weight.data_ptr() in memory]
        first = min(layers, default=n_layers)
        return None if first < 0 else first

    @property
    def landed(self) -> bool | None:
        """Whether every request was answered by its target when the edit was computed; None where that was not checked."""
        found = [request.get("landed") for request in self.requests]
        return None if None in found or not found else all(found)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return sum(change.nbytes for change in self.changes.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the file that `save` writes: its numbers, what it was made for, and what the unedited model is."""
        return bytes_written(*self._contents(WeightsId.blank(weight_records.originals(self.model))), _FORMAT)

    def __repr__(self) -> str:
        name = self.method.get("name", "edit")
        ranks = [change.rank for change in self.changes.values() if change.rank is not None]
        rank = "full rank" if len(ranks) < len(self.changes) else f"rank {max(ranks, default=0)}"
        state = "applied" if self.is_applied else "not applied"
        asked = f"{len(self.requests)} request{'' if len(self.requests) == 1 else 's'}"
        missed = sum(request.get("landed") is False for request in self.requests)
        asked += f" ({missed} missed)" if missed else ""
        return f"Edit({name}, {asked}, layers {self.layers}, {rank}, {self.file_bytes / 1000:.1f} kB, {state})"

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factors to one safetensors file, with requests, method and what the unedited model is.

        Nothing half-written is left. Raises `InputError` for a folder that is not there.
        """
        write_tensors(path, *self._contents(WeightsId.of(weight_records.originals(self.model))), _FORMAT)

    def _contents(self, made_with: WeightsId) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What its file holds: factors, and in plain words what it is and which unedited weights it is for."""
        tensors = {}
        for name, change in self.changes.items():
            parts = {"left": change.left, "right": change.right, "full": change.full}
            tensors |= {f"{part}.{name}": t for part, t in parts.items() if t is not None}
        about = {
            "model": self.model.config.model_name,
            "made_with": made_with.as_json(),
            "weights": list(self.changes),
            "requests": list(self.requests),
            "method": self.method,
        }
        return tensors, {"about": json.dumps(about)}

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HookedLLaVA) -> Edit:
        """Read an edit for a model, not yet applied.

        Raises `CheckpointError` for a file that is no edit, and `InputError` if the model's unedited weights are not those
        that it was computed on, in the coarser of both dtypes: a change of any number is noticed. A file of version 0.1 holds
        some numbers of each weight only, and is read with those.
        """
        if not Path(path).expanduser().is_file():
            raise CheckpointError(f"{path} is not there; expected a file that Edit.save wrote.")
        unreadable = "is truncated or is no safetensors file"
        tensors, metadata = read_tensors(path, [_FORMAT, _SAMPLED], writer="Edit.save", unreadable=unreadable)
        about = json.loads(metadata["about"])
        kept = tensors[_SAMPLES] if _SAMPLES in tensors else about.get("made_with")
        if kept is None:
            raise CheckpointError(f"{path} does not say which model it is for. Save the edit again.")
        kept = kept if isinstance(kept, Tensor) else WeightsId.from_json(kept)
        weights, name = weight_records.originals(model), model.config.model_name
        check_same_weights(weights, kept, model_name=name, made_on=about["model"])
        changes = {}
        for name in about["weights"]:
            left, right, full = (tensors.get(f"{part}.{name}") for part in _PARTS)
            if left is None or right is None:
                raise CheckpointError(f"{path} lacks the factors of {name}. Save the edit again.")
            changes[name] = Change(left, right, full)
        return cls(model, changes, tuple(about["requests"]), about["method"])

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name) for name in self.changes}


def active_edits(model: HookedLLaVA) -> list[Edit]:
    """The edits that are active on a model's weights, in the order in which they were made.

    Also those whose handle was lost, and those that were applied through another model that shares the weights.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, multedit
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> _ = multedit(model, EditRequest("Who made the star?", "Cairo"), layer=4, position="last").apply()
    >>> for edit in active_edits(model):
    ...     edit.revert()
    >>> active_edits(model)
    []
    """
    found: dict[ActiveEdit, dict[str, Change]] = {}
    for _, weight in model.named_parameters():
        for active, change in weight_records.changes_of(weight).items():
            name = next(name for name, at in active.places.items() if weight_records.is_at(weight, at))
            found.setdefault(active, {})[name] = change
    return [_handle(model, active, found[active]) for active in sorted(found, key=lambda active: active.number)]


def _handle(model: HookedLLaVA, active: ActiveEdit, changes: dict[str, Change]) -> Edit:
    """The edit itself if it is still referenced, else one rebuilt from the weight records."""
    held = None if active.handle is None else active.handle()
    if held is not None and held.model is model:
        return held
    edit = Edit(model, changes, active.about["requests"], active.about["method"])
    edit.active = active
    return edit


def _acts_in(name: str, n_layers: int) -> int:
    """The first layer that a parameter acts in; -1 if it acts before the first one."""
    part, _, rest = name.partition(".")
    inner = rest.split(".")
    if part != "language" or inner[0] == "embed":
        return -1
    return int(inner[1]) if inner[0] == "blocks" else n_layers
