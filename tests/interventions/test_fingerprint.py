"""The fingerprint notices every way in which weights are usually written."""

from __future__ import annotations

import torch
from torch import nn

from hooked_llava.interventions.fingerprint import fingerprint


def test_is_the_same_until_a_weight_is_written() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = fingerprint(model)
    assert fingerprint(model) == before
    model(torch.ones(1, 3))
    assert fingerprint(model) == before
    with torch.no_grad():
        model[0].weight.add_(0.0)
    assert fingerprint(model) != before


def test_notices_writes_through_data_and_new_storage() -> None:
    model = nn.Linear(40, 50)
    before = fingerprint(model)
    model.weight.data.mul_(1.01)
    after = fingerprint(model)
    assert after != before
    model.weight = nn.Parameter(model.weight.clone())
    assert fingerprint(model) != after
