"""Which edits are active on a weight, and what the weight was before them.

A weight is its kept original plus the sum of its active edits, computed in float64 (which neither autocast nor TF32
touches) and cast once, with the edits in the order in which they were made. So it depends only on which edits are active,
not on the order of applying and reverting them; with the last one gone it is the original, bit for bit.

The book is kept for each piece of memory, not for each model: a weight that several models share (`from_hf`) or that
stands for two (tied embeddings) has one original and one sum. It holds no model, so that it keeps none alive.
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
"""A piece of memory: its storage, where in it, and the shape. The reference keeps no memory, but its address, from being
taken for another's."""
_MOST_LOST = 0.5
_numbers = itertools.count()


@dataclass(eq=False)
class Entry:
    """An edit as the books know it."""

    number: int = field(default_factory=lambda: next(_numbers))
    """Edits are added up in the order of their numbers."""
    places: dict[str, Place] = field(default_factory=dict)
    """For each weight, by its name, the memory that was changed; empty while the edit is not applied."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else makes up the edit, should its handle be lost."""
    handle: ReferenceType[Any] | None = None
    """The edit itself, as long as somebody holds it."""

    def __reduce__(self) -> tuple[type[Entry], tuple[()]]:
        return Entry, ()  # a copy of an edit is another one, and is not applied


@dataclass
class Ledger:
    """The book of one weight."""

    original: Float[Tensor, "..."]
    """The weight before any edit; once an edit is active, a copy."""
    place: Place
    """The memory that the weight lies in."""
    active: dict[Entry, Change] = field(default_factory=dict)
    """Active changes."""

    def composed(self, changes: Mapping[Entry, Change]) -> tuple[Tensor, Tensor]:
        """Original plus changes: exactly (in float64), and as the weight would hold it."""
        exact = self.original.to(torch.float64)
        for entry in sorted(changes, key=lambda entry: entry.number):
            exact = changes[entry].added_to(exact)
        return exact, exact.to(self.original.dtype)

    def weight(self) -> Tensor:
        """The memory itself."""
        storage, offset, shape = self.place
        storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)  # noqa: SLF001 (there is no other way)
        empty = torch.empty(0, dtype=self.original.dtype, device=self.original.device)
        return empty.set_(storage, offset, shape, self.original.stride())  # type: ignore[call-overload]


_ledgers: dict[Place, Ledger] = {}


def original(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight without its active edits: the kept original, or the weight itself."""
    return _open(weight).original


def originals(module: torch.nn.Module) -> dict[str, Tensor]:
    """All of a module's weights without their active edits, by name; no copies."""
    return {name: original(parameter.detach()) for name, parameter in module.named_parameters()}


def changes_of(weight: Float[Tensor, "..."]) -> Mapping[Entry, Change]:
    """The changes that are active on a weight."""
    return _open(weight).active


def all_active(module: torch.nn.Module) -> frozenset[Entry]:
    """All edits that are active on a module's weights."""
    return frozenset(entry for parameter in module.parameters() for entry in changes_of(parameter))


def with_change(name: str, weight: Float[Tensor, "out in"], entry: Entry, change: Change) -> Tensor:
    """What the weight would be with one more change, without writing it.

    Raises `InputError` if the weight's dtype is too coarse to hold the change.
    """
    ledger = _open(weight)
    exact, cast = ledger.composed({**ledger.active, entry: change})
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


def book(name: str, weight: Float[Tensor, "out in"], entry: Entry, change: Change) -> None:
    """Keep the original, and note the change as active; the weight itself is not written."""
    ledger = _open(weight)
    if not ledger.active:
        ledger.original = weight.detach().clone()
    ledger.active[entry] = change
    _ledgers[ledger.place] = ledger
    entry.places[name] = ledger.place


def check_untouched(entry: Entry) -> None:
    """Raises `InputError` if something else changed a weight on which an edit is active."""
    for name, ledger in _books(entry).items():
        if not torch.equal(ledger.weight(), ledger.composed(ledger.active)[1]):
            raise InputError(
                f"{name} was changed by something else while the edit was active; reverting would undo that as well. Take "
                "that change back first."
            )


@torch.no_grad()
def remove(entry: Entry, weights: Mapping[str, Tensor]) -> None:
    """Take an edit back wherever it is active: a weight is the original with what remains.

    Written is through the model's own `weights` where they still lie there, so that whoever watches these notices.
    """
    for name, ledger in _books(entry).items():
        weight = weights[name] if is_at(weights[name], ledger.place) else ledger.weight()
        weight.copy_(ledger.composed({e: c for e, c in ledger.active.items() if e is not entry})[1])
        del ledger.active[entry]
        if not ledger.active:
            del _ledgers[ledger.place]


def is_at(weight: Tensor, at: Place) -> bool:
    """Whether a weight lies in that memory."""
    return _place(weight) == at


def _place(weight: Tensor) -> Place:
    return StorageWeakRef(weight.untyped_storage()), weight.storage_offset(), tuple(weight.shape)


def _books(entry: Entry) -> dict[str, Ledger]:
    """Books in which an edit is active, by the weight's name; those of memory that is gone are closed."""
    _close_expired()
    found = {name: _ledgers.get(at) for name, at in entry.places.items()}
    return {name: ledger for name, ledger in found.items() if ledger is not None and entry in ledger.active}


def _open(weight: Tensor) -> Ledger:
    """The weight's book, or an empty one."""
    _close_expired()
    at = _place(weight)
    return _ledgers.get(at) or Ledger(weight.detach(), at)


def _close_expired() -> None:
    for at in [at for at, ledger in _ledgers.items() if ledger.place[0].expired()]:
        del _ledgers[at]
