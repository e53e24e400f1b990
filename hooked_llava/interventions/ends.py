"""The two ends that every patching result lies between: the clean and the corrupted run, and the metric of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from jaxtyping import Float
from torch import Tensor

from hooked_llava.caching import Positions, resolve_positions
from hooked_llava.interventions.pairs import Direction
from hooked_llava.metrics import Metric, own_answers, value_of

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA

T = TypeVar("T")


def source_and_base(clean: T, corrupted: T, direction: Direction) -> tuple[T, T]:
    """What activations are taken from and what they are put into; of (source, base) it is (clean, corrupted) again.

    >>> source_and_base("clean", "corrupted", "noise")
    ('corrupted', 'clean')
    """
    return (clean, corrupted) if direction == "denoise" else (corrupted, clean)


def read_at(
    rows: Float[Tensor, "1 pos d"], inputs: Inputs, read: Positions
) -> Float[Tensor, " d"] | Float[Tensor, "position d"]:
    """The rows of one prompt where a metric reads: one for "last", otherwise as many as positions, as `Replay` has them.

    Raises `InputError` or `SpanError` for positions that are not there.
    """
    found = rows[0, resolve_positions(read, inputs)[0].to(rows.device)]
    return found[0] if isinstance(read, str) and read == "last" else found


def scored(
    model: HookedLLaVA, metric: Metric | None, there: Tensor, here: Tensor, direction: Direction
) -> tuple[Metric, dict[str, float]]:
    """The metric, by default the logit difference of the two own answers, and its value as `clean` and `corrupted`.

    `there` and `here` are the logits of the source and the base run where the metric reads. Raises `InputError` if both
    runs have the same answer and no metric is given, and for a metric that gives more than one number.
    """
    clean, corrupted = source_and_base(there, here, direction)
    metric = metric or own_answers(clean, corrupted, model)
    return metric, {"clean": value_of(metric, clean), "corrupted": value_of(metric, corrupted)}
