"""Which run is patched, where the metric reads, and what it gives at both ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import metric_with_baselines, source_and_base
from hooked_llava.readout.metrics import logit_difference, probability
from tests.pairs import pair


def test_denoise_puts_clean_activations_into_the_corrupted_run() -> None:
    assert source_and_base(1, 2, "denoise") == (1, 2)
    assert source_and_base(1, 2, "noise") == (2, 1)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_metric_of_both_ends(direction: Any) -> None:
    clean, corrupted = torch.eye(5)[1], torch.eye(5)[3]
    there, here = source_and_base(clean, corrupted, direction)
    metric, baselines = metric_with_baselines(pair().ours, None, there, here, direction)
    assert (baselines["clean"], baselines["corrupted"]) == (1.0, -1.0)
    assert (baselines["metric"], baselines["answer_ids"], baselines["baseline_ids"]) == ("logit_difference", [1], [3])
    assert float(metric(clean)) == float(logit_difference(1, 3)(clean))
    own = probability(1)
    assert metric_with_baselines(pair().ours, own, there, here, direction)[0] is own
    with pytest.raises(InputError, match="same answer"):
        metric_with_baselines(pair().ours, None, there, there, direction)
