"""Which edits are active on a weight, and what the weight was before them.

A weight is its kept original plus the sum of its active edits, computed in float64 (which neither autocast nor TF32
touches) and cast once, with the edits in the order in which they were made. So it depends only on which edits are active,
not on the order of applying and reverting them; with the last one gone it is the original, bit for bit.

There is one record for each tensor's memory, not for each model: a weight that several models share (`from_hf`) or that
stands for two (tied embeddings) has one original and one sum. Records hold no model, so that they keep none alive.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_llava.editing.change import Change
from hooked_llava.errors import InputError

Place = tuple[StorageWeakRef, int, tuple[int, ...]]
"""Where a tensor lies: its storage, the offset in it, and the shape. The weak reference frees the memory, but keeps its address
from being reused by another storage."""
_MOST_LOST = 0.5
_numbers = itertools.count()


@dataclass(eq=False)
class ActiveEdit:
    """An edit as the weight records know it.

    Attributes:
        number (int): Edits are added up in the order of their numbers.
        places (dict[str, Place]): For each weight, by its name, the memory that was changed; empty while the edit is
            not applied.
        about (dict[str, Any]): What else makes up the edit, should its handle be lost.
        handle (ReferenceType[Any] | None): The edit itself, as long as it is referenced elsewhere.
    """

    number: int = field(default_factory=lambda: next(_numbers))
    places: dict[str, Place] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    handle: ReferenceType[Any] | None = None

    def __reduce__(self) -> tuple[type[ActiveEdit], tuple[()]]:
        return ActiveEdit, ()  # a copy of an edit is another one, and is not applied


@dataclass
class WeightRecord:
    """One weight: its original, and the changes that are active on it.

    Attributes:
        original (Float[Tensor, "..."]): The weight before any edit; once an edit is active, a copy.
        place (Place): The memory that the weight lies in.
        changes (dict[ActiveEdit, Change]): What each active edit adds to it.
    """

    original: Float[Tensor, "..."]
    place: Place
    changes: dict[ActiveEdit, Change] = field(default_factory=dict)

    def composed(self, changes: Mapping[ActiveEdit, Change]) -> tuple[Tensor, Tensor]:
        """Original plus changes: exactly (in float64), and as the weight would hold it."""
        exact = self.original.to(torch.float64)
        for edit in sorted(changes, key=lambda edit: edit.number):
            exact = changes[edit].added_to(exact)
        return exact, exact.to(self.original.dtype)

    def weight(self) -> Tensor:
        """The memory itself."""
        storage, offset, shape = self.place
        storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)  # noqa: SLF001 (there is no other way)
        empty = torch.empty(0, dtype=self.original.dtype, device=self.original.device)
        return empty.set_(storage, offset, shape, self.original.stride())  # type: ignore[call-overload]


_records: dict[Place, WeightRecord] = {}


def original(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight without its active edits: the kept original, or the weight itself."""
    return _record_of(weight).original


def originals(module: torch.nn.Module) -> dict[str, Tensor]:
    """All of a module's weights without their active edits, by name; no copies."""
    return {name: original(parameter.detach()) for name, parameter in module.named_parameters()}


def changes_of(weight: Float[Tensor, "..."]) -> Mapping[ActiveEdit, Change]:
    """The changes that are active on a weight."""
    return _record_of(weight).changes


def all_active(module: torch.nn.Module) -> frozenset[ActiveEdit]:
    """All edits that are active on a module's weights."""
    return frozenset(edit for parameter in module.parameters() for edit in changes_of(parameter))


def with_change(name: str, weight: Float[Tensor, "out in"], edit: ActiveEdit, change: Change) -> Tensor:
    """What the weight would be with one more change, without writing it.

    Raises `InputError` if the weight's dtype is too coarse to hold the change.
    """
    record = _record_of(weight)
    exact, cast = record.composed({**record.changes, edit: change})
    lost = change.lost(cast.to(exact.dtype) - exact)
    if lost > _MOST_LOST:
        dtype = str(weight.dtype).removeprefix("torch.")
        wider = "float32" if weight.dtype.itemsize < torch.float32.itemsize else "float64"
        raise InputError(
            f"{dtype} is too coarse for this update: rounding loses {100 * min(lost, 1):.0f} % of what it does to {name}. "
            f"Nothing was changed. Load the model with dtype=torch.{wider}, or ask for a larger change (a larger clamp=, a "
            "smaller lam=)."
        )
    return cast


def add_change(name: str, weight: Float[Tensor, "out in"], edit: ActiveEdit, change: Change) -> None:
    """Keep the original, and note the change as active; the weight itself is not written."""
    record = _record_of(weight)
    if not record.changes:
        record.original = weight.detach().clone()
    record.changes[edit] = change
    _records[record.place] = record
    edit.places[name] = record.place


def check_untouched(edit: ActiveEdit) -> None:
    """Raises `InputError` if something else changed a weight on which an edit is active."""
    for name, record in _records_with(edit).items():
        if not torch.equal(record.weight(), record.composed(record.changes)[1]):
            raise InputError(
                f"{name} was changed by something else while the edit was active; reverting would undo that as well. Take "
                "that change back first."
            )


@torch.no_grad()
def remove(edit: ActiveEdit, weights: Mapping[str, Tensor]) -> None:
    """Revert an edit wherever it is active: a weight becomes the original with the remaining edits.

    The model's own `weights` are written where they are still that memory, so that their version counters change.
    """
    for name, record in _records_with(edit).items():
        weight = weights[name] if is_at(weights[name], record.place) else record.weight()
        weight.copy_(record.composed({e: c for e, c in record.changes.items() if e is not edit})[1])
        del record.changes[edit]
        if not record.changes:
            del _records[record.place]


def is_at(weight: Tensor, at: Place) -> bool:
    """Whether a weight lies in that memory."""
    return _place(weight) == at


def _place(weight: Tensor) -> Place:
    return StorageWeakRef(weight.untyped_storage()), int(weight.storage_offset()), tuple(weight.shape)


def _records_with(edit: ActiveEdit) -> dict[str, WeightRecord]:
    """Records of the weights that an edit is active on, by the weight's name."""
    _forget_freed_memory()
    found = {name: _records.get(at) for name, at in edit.places.items()}
    return {name: record for name, record in found.items() if record is not None and edit in record.changes}


def _record_of(weight: Tensor) -> WeightRecord:
    """The weight's record, or an empty one."""
    _forget_freed_memory()
    at = _place(weight)
    return _records.get(at) or WeightRecord(weight.detach(), at)


def _forget_freed_memory() -> None:
    for at in [at for at, record in _records.items() if record.place[0].expired()]:
        del _records[at]
