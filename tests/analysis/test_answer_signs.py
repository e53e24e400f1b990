"""Signs of a wrong answer: each number by hand, and how well they tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava.analysis import answer_signs, predict_wrong
from hooked_llava.errors import InputError
from tests.pairs import batch, pair


def test_each_sign_is_what_it_says() -> None:
    models = pair("grouped", torch.float64)
    prompts = batch([models.prompt(), models.prompt(n_text=4, seed=1)], "right")
    maps = np.array([[[3.0, 1.0], [-1.0, 1.0]], [[0.0, 0.0], [0.0, -2.0]]])
    covered = np.array([[[1.0, 0.5], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    signs = answer_signs(models.ours, prompts, maps[:, None], covered)
    assert signs.mass_on_objects.values.tolist() == [(3 + 0.5) / 5, 0.0]
    assert signs.map_peak.values.tolist() == [3.0, 0.0]
    shares = np.array([4, 2, 2]) / 8
    assert signs.map_entropy[0].item() == pytest.approx(-(shares * np.log(shares)).sum())
    assert signs.map_entropy[1].item() == pytest.approx(np.log(3))
    for i, alone in enumerate([models.prompt(), models.prompt(n_text=4, seed=1)]):
        p = models.ours(alone)[0, -1].softmax(-1)
        assert signs.confidence[i].item() == pytest.approx(p.max().item(), abs=1e-9)
        assert signs.entropy[i].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-9)


def test_each_sign_is_turned_to_mean_wrong() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.4])
    signs = xr.Dataset(dict.fromkeys(("confidence", "entropy", "map_peak"), ("prompt", values)))
    found = predict_wrong(signs, [True, True, False, False])
    assert found.to_series().to_dict() == {"confidence": 1.0, "entropy": 0.0, "map_peak": 1.0}
    assert (found.n, found.n_wrong) == (4, 2)
    assert np.isnan(predict_wrong(signs, [False] * 4)).all()


def test_what_does_not_fit_is_refused() -> None:
    models = pair("grouped", torch.float64)
    with pytest.raises(InputError, match="1 prompts, 2 maps and 1 coverages"):
        answer_signs(models.ours, models.prompt(), np.zeros((2, 2, 2)), np.zeros((2, 2)))
    signs = xr.Dataset({"confidence": ("prompt", [0.1, 0.2])})
    with pytest.raises(InputError, match="of 2 prompts"):
        predict_wrong(signs, [True])
