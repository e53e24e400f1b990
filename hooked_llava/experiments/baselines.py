"""The two baselines that every patching result lies between: the clean and the corrupted run, and the metric of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.directions import Direction
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.metric_names import about_metric
from hooked_llava.readout.metrics import Metric, measured, own_answers, value_of

T = TypeVar("T")


def source_and_base(clean: T, corrupted: T, direction: Direction) -> tuple[T, T]:
    """What activations are taken from and what they are put into; of (source, base) it is (clean, corrupted) again.

    >>> source_and_base("clean", "corrupted", "noise")
    ('corrupted', 'clean')
    """
    return (clean, corrupted) if direction == "denoise" else (corrupted, clean)


def check_metrics(
    model: HookedLLaVA,
    pairs: Sequence[tuple[Inputs, Inputs, Metric | None]],
    logit_positions: PositionsLike,
    *,
    swept: bool = True,
) -> None:
    """Raise `InputError` for a metric that does not give one number a run, tried on zeros before the model is run.

    `swept` if it will be called on many runs at once.
    """
    for prompt, _, metric in pairs:
        at_last = isinstance(logit_positions, str) and logit_positions == "last"
        n_read = [] if at_last else [resolve_positions(logit_positions, prompt).shape[1]]
        zeros = torch.zeros(*n_read, model.config.language.d_vocab, device=model.cfg.device, dtype=model.cfg.dtype)
        if metric is not None:
            value_of(metric, zeros)
        if metric is not None and swept:
            measured(metric, zeros.expand(2 + len(zeros.shape), *zeros.shape).clone(), 1, one_number=True)


def metric_with_baselines(
    model: HookedLLaVA, metric: Metric | None, there: Tensor, here: Tensor, direction: Direction
) -> tuple[Metric, dict[str, Any]]:
    """The metric, by default the logit difference of the two own answers, and attributes that say what it is.

    Its values are `clean` and `corrupted`; `metric`, `answer` and `baseline` say what is measured, see `about_metric`.

    `there` and `here` are the logits of the source and the base run where the metric reads. Raises `InputError` if both
    runs have the same answer and no metric is given, and for a metric that gives more than one number.
    """
    clean, corrupted = source_and_base(there, here, direction)
    metric = own_answers(clean, corrupted, model) if metric is None else metric
    baselines = {"clean": value_of(metric, clean), "corrupted": value_of(metric, corrupted)}
    return metric, baselines | about_metric(model, metric)
