"""Which weights are these? A stamp of some numbers, at hardly any cost, and a hash of every number.

Both are the same in every process and on every device. Results carry the stamp; files that work with one model only carry
the hash, and the hashes of the weights rounded to coarser dtypes, so that what was made in float32 is known again on the
same checkpoint in bfloat16 (`WeightsId`). Within a process a kept run asks for the version of the weights, which notices
that they were written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from hooked_llava.errors import InputError

Weights: TypeAlias = Mapping[str, Tensor]
"""Weights by their names, as `dict(model.named_parameters())`."""
Version: TypeAlias = tuple[tuple[tuple[int, int], ...], bytes]

_VERSION_SAMPLES = 32
_SAMPLES = 16
_GOLDEN = 0.6180339887498949
_PIECE = 2**22  # numbers that one sum of the hash is of; another size gives other hashes
_BLOCK = 2**16  # numbers at once on a CPU, so that they stay in its cache
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COARSE_TO_FINE = ("bfloat16", "float16", "float32", "float64")
_OWN = "own"
_DIGITS, _STAMP_DIGITS = 16, 12


# --- the version, within a process


@torch.no_grad()
def weights_version(model: nn.Module) -> Version:
    """Every parameter's storage and count of in-place writes, and some entries of each; for one process.

    The count misses writes through `.data`, the entries miss writes that leave them alone; together they notice any
    edit made in the usual ways, and any that changes a matrix as a whole.

    >>> model = nn.Linear(3, 2)
    >>> before = weights_version(model)
    >>> _ = nn.init.zeros_(model.bias)
    >>> weights_version(model) == before
    False
    """
    marks, samples = [], []
    for parameter in model.parameters():
        marks.append((parameter.data_ptr(), parameter._version))
        samples.append(sample(parameter, _VERSION_SAMPLES).float())
    # Fetched at once, since a device answers slowly; bit by bit, since NaN equals nothing.
    return tuple(marks), _joined(samples).cpu().numpy().tobytes()


def sample(weight: Shaped[Tensor, "..."], n: int) -> Shaped[Tensor, " sample"]:
    """n entries of a weight (or all, if it has fewer), from rows and columns all over it.

    >>> sample(torch.arange(64).float().view(8, 8), 4)
    tensor([ 0., 41., 18., 59.])
    """
    flat = weight.detach().reshape(-1)
    return flat[_places(flat.numel(), n, flat.device)]


@lru_cache(maxsize=256)
def _places(size: int, n: int, device: torch.device) -> Int[Tensor, " sample"]:
    """Steps of the golden ratio, by a number of entries that shares no factor with the size and so with no row's length."""
    step = max(1, round(_GOLDEN * size))
    while math.gcd(step, size) > 1:
        step += 1
    return torch.arange(min(n, size), device=device) * step % max(1, size)


# --- the stamp


@torch.no_grad()
def weights_stamp(model: nn.Module) -> str:
    """A short hash of some entries of every weight, the same in every process and on every device.

    It tells models and edited weights apart at hardly any cost; that the weights are the same it does not prove.

    >>> first, second = (nn.Linear(3, 2) for _ in range(2))
    >>> weights_stamp(first) == weights_stamp(first) != weights_stamp(second)
    True
    """
    entries = samples(dict(model.named_parameters()))
    return hashlib.sha256(entries.float().numpy().tobytes()).hexdigest()[:_STAMP_DIGITS]


@torch.no_grad()
def samples(weights: Weights) -> Float[Tensor, " sample"]:
    """Some numbers of every weight: what files of version 0.1 carry, and what tells weights apart within a process."""
    return _joined([sample(weight, _SAMPLES) for weight in weights.values()]).cpu()


def _joined(samples: Iterable[Shaped[Tensor, " _"]]) -> Float[Tensor, " sample"]:
    """Samples one after the other, on the first one's device: those of each device are joined before they are moved."""
    parts = [torch.cat(list(held)) for _, held in groupby(samples, lambda part: part.device)]
    return torch.cat([part.to(parts[0].device) for part in parts])


# --- the hash


@torch.no_grad()
def weights_hash(weights: nn.Module | Weights, dtype: torch.dtype | None = None) -> str:
    """A hash of every weight's name, shape, dtype and content, the same in every process and on every device.

    With `dtype`, of the weights rounded to it; the codes of weights in 8 or 4 bits are never rounded. The numbers' bits are
    added up as integers, each times an odd number of its own: unlike a sum of floats that does not depend on the order in
    which threads add, a change of any one number changes it, and weights that change places do not cancel.

    >>> first, second = (nn.Linear(3, 2) for _ in range(2))
    >>> weights_hash(first) == weights_hash(first) != weights_hash(second)
    True
    """
    named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, weight in named.items():
        rounded = dtype if weight.is_floating_point() else None
        digest.update(f"{name} {tuple(weight.shape)} {rounded or weight.dtype}\n".encode())
        for total in _sums(weight.detach().reshape(-1), rounded):
            digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()[:_DIGITS]


def _sums(weight: Shaped[Tensor, " number"], dtype: torch.dtype | None) -> list[int]:
    """For each piece of a weight its bits, weighted by odd numbers and summed, up to multiples of 2^64."""
    pieces = (_bits(piece if dtype is None else piece.to(dtype)) for piece in weight.split(_PIECE))
    if weight.device.type == "cpu":
        odd = torch.arange(1, 2 * _BLOCK, 2)
        return [sum(_block_sums(piece, odd)) for piece in pieces]
    return _sums_at_once(pieces)


def _sums_at_once(pieces: Iterable[Int[Tensor, " _"]]) -> list[int]:
    """As on a CPU, for a device, which answers slowly: each piece in one go, and all sums fetched together."""
    sums = [(piece.long() * (2 * torch.arange(len(piece), device=piece.device) + 1)).sum() for piece in pieces]
    return torch.stack(sums).tolist()


def _block_sums(piece: Int[Tensor, " number"], odd: Int[Tensor, " odd"]) -> Iterator[int]:
    for start, block in enumerate(piece.split(_BLOCK)):
        integers = block.long()
        yield int(integers @ odd[: len(integers)]) + 2 * start * _BLOCK * int(integers.sum())


def _bits(numbers: Shaped[Tensor, " number"]) -> Int[Tensor, " number"]:
    return numbers.view(_BITS[numbers.element_size()])


# --- what a file carries


@dataclass(frozen=True)
class WeightsId:
    """Which weights something was made with, for its file: their hash, and the hashes of what coarser dtypes hold of them.

    Attributes:
        dtypes (tuple[str, ...]): The dtypes of weights in floating point; as a rule one.
        hashes (Mapping[str, str]): By dtype, the hash of the weights rounded to it; "own" as they are.
    """

    dtypes: tuple[str, ...]
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, weights: Weights) -> WeightsId:
        """Of these weights.

        >>> WeightsId.of({"bias": torch.zeros(2, dtype=torch.float16)}).hashes.keys()
        dict_keys(['own', 'bfloat16'])
        """
        blank = cls.blank(weights)
        kinds = {name: None if name == _OWN else getattr(torch, name) for name in blank.hashes}
        return cls(blank.dtypes, {name: weights_hash(weights, kind) for name, kind in kinds.items()})

    @classmethod
    def blank(cls, weights: Weights) -> WeightsId:
        """As long as that of these weights, with no hash made; it fits none."""
        dtypes = _dtypes(weights)
        coarser = _COARSE_TO_FINE[: max(map(_COARSE_TO_FINE.index, dtypes))]
        return cls(dtypes, dict.fromkeys((_OWN, *coarser), _DIGITS * "0"))

    def fits(self, weights: Weights) -> bool:
        """Whether these are the same weights, in the coarser of both dtypes; only the one hash that is needed is made."""
        dtypes = _dtypes(weights)
        if dtypes == self.dtypes:
            return weights_hash(weights) == self.hashes[_OWN]
        coarsest = min((*dtypes, *self.dtypes), key=_COARSE_TO_FINE.index)
        kept = self.hashes[_OWN if self.dtypes == (coarsest,) else coarsest]
        return weights_hash(weights, getattr(torch, coarsest)) == kept

    def as_json(self) -> dict[str, Any]:
        """As plain lists and words."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WeightsId:
        """From what `as_json` gave."""
        return cls(tuple(fields["dtypes"]), dict(fields["hashes"]))


def _dtypes(weights: Weights) -> tuple[str, ...]:
    found = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def same_samples(mine: Float[Tensor, " sample"], kept: Float[Tensor, " any_sample"]) -> bool:
    """Whether two samples are of the same weights, in the coarser of both dtypes."""
    dtypes = (str(numbers.dtype).removeprefix("torch.") for numbers in (mine, kept))
    coarser = getattr(torch, min(dtypes, key=_COARSE_TO_FINE.index))
    return mine.shape == kept.shape and torch.equal(mine.to(coarser), kept.to(coarser))


def check_same_weights(
    weights: Weights,
    kept: WeightsId | Float[Tensor, " sample"],
    *,
    model_name: str,
    made_on: str = "",
    what: str = "edit",
) -> None:
    """Raises `InputError` unless weights are those that something was made with; samples are those of a file of 0.1."""
    same = kept.fits(weights) if isinstance(kept, WeightsId) else same_samples(samples(weights), kept)
    if not same:
        raise InputError(
            f"The {what} was computed on another model{made_on and f' ({made_on!r})'}: the unedited weights of "
            f"{model_name!r} differ from those that it was made with. Use it with the model that it was made for, or make the "
            f"{what} again."
        )
