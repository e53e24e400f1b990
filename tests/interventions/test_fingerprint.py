"""The fingerprint notices every way in which weights are usually written."""

from __future__ import annotations

import torch
from torch import nn

from hooked_llava.interventions.fingerprint import fingerprint, sample


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


def test_samples_lie_in_columns_and_rows_all_over_the_matrix() -> None:
    cells = sample(torch.arange(256 * 1024).view(256, 1024).double(), 32).long()
    for places, n in ((cells % 1024, 1024), (cells // 1024, 256)):
        assert len(places.unique()) == 32
        assert int(places.sort().values.diff().max()) < n / 8
    assert sample(torch.arange(5.0), 32).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert (sample(torch.tensor(3.0), 4).tolist(), sample(torch.zeros(0), 4).tolist()) == ([3.0], [])


def test_notices_what_is_written_beside_the_first_column_through_data() -> None:
    model = nn.Linear(64, 64)
    before = fingerprint(model)
    model.weight.data[:, 1:].add_(1.0)
    assert fingerprint(model) != before
