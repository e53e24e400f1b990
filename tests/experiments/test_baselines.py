"""Which run is patched, where the metric reads, and what it gives at both ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import metric_with_baselines, read_at, source_and_base
from hooked_llava.readout.metrics import logit_difference, probability
from hooked_llava.replay import Replay
from tests.pairs import pair


def test_denoise_puts_clean_activations_into_the_corrupted_run() -> None:
    assert source_and_base(1, 2, "denoise") == (1, 2)
    assert source_and_base(1, 2, "noise") == (2, 1)


@pytest.mark.parametrize("read", ["last", "image", -2, [0, 3]])
def test_rows_are_read_as_a_replay_shapes_them(read: Any) -> None:
    model = pair().ours
    inputs = model.as_inputs(pair().prompt())
    with torch.no_grad():
        found = read_at(model(inputs), inputs, read)
    torch.testing.assert_close(found, Replay(model, inputs).logits(read), rtol=1e-4, atol=1e-4)


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
