"""The update solves what it says it solves, without ever inverting a matrix of the weight's size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.editing.closed_form import closed_form
from hooked_llava.errors import InputError
from tests.oracles.naive_edit import rome_weight, updated_weight

N_OUT, N_IN = 7, 11


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int) -> torch.Tensor:
    samples = random(40, N_IN, seed=seed)
    return samples.T @ samples / 40


@settings(max_examples=30)
@given(
    n=st.integers(1, 5), lam=st.sampled_from([1e-3, 0.01, 1.0, 100.0]), metric=st.booleans(), seed=st.integers(0, 99)
)
def test_it_is_the_dense_solution(n, lam, metric, seed):
    weight, keys, delta = (
        random(N_OUT, N_IN, seed=seed),
        random(n, N_IN, seed=seed + 1),
        random(n, N_OUT, seed=seed + 2),
    )
    c = covariance(seed + 3) if metric else None
    corrected = None if c is None else keys @ torch.linalg.inv(c)
    change = closed_form(keys, torch.arange(n), delta, lam=lam, corrected=corrected)
    expected = updated_weight(weight, keys, keys @ weight.T + delta, lam, c)
    torch.testing.assert_close(weight + change.matrix(), expected, rtol=1e-7, atol=1e-9)
    assert change.rank == n


@settings(max_examples=20)
@given(n_kept=st.integers(1, 4), lam=st.sampled_from([1e-3, 1.0]), seed=st.integers(0, 99))
def test_kept_keys_are_requests_for_no_difference(n_kept, lam, seed):
    weight, keys, delta = (
        random(N_OUT, N_IN, seed=seed),
        random(2, N_IN, seed=seed + 1),
        random(2, N_OUT, seed=seed + 2),
    )
    kept = random(n_kept, N_IN, seed=seed + 3)
    change = closed_form(keys, torch.arange(2), delta, lam=lam, kept=kept)
    every = torch.cat([keys, kept])
    values = every @ weight.T + torch.cat([delta, torch.zeros(n_kept, N_OUT, dtype=torch.float64)])
    torch.testing.assert_close(
        weight + change.matrix(), updated_weight(weight, every, values, lam), rtol=1e-7, atol=1e-9
    )
    assert change.rank == 2


def test_keys_of_one_request_share_its_difference():
    weight, keys, delta = random(N_OUT, N_IN, seed=0), random(3, N_IN, seed=1), random(2, N_OUT, seed=2)
    owner = torch.tensor([0, 1, 0])
    change = closed_form(keys, owner, delta, lam=0.5)
    expected = updated_weight(weight, keys, keys @ weight.T + delta[owner], 0.5)
    torch.testing.assert_close(weight + change.matrix(), expected, rtol=1e-7, atol=1e-9)
    assert change.rank == 2


def test_one_key_is_the_rank_one_form():
    key, delta = random(1, N_IN, seed=1), random(1, N_OUT, seed=2)
    change = closed_form(key, torch.tensor([0]), delta, lam=0.3)
    torch.testing.assert_close(change.matrix(), torch.outer(delta[0], key[0]) / (0.3 + key[0] @ key[0]))
    share = key[0] @ key[0] / (0.3 + key[0] @ key[0])
    torch.testing.assert_close(change.matrix() @ key[0], share * delta[0])


def test_what_is_orthogonal_to_the_key_does_not_feel_it():
    key, delta = random(1, N_IN, seed=1), random(1, N_OUT, seed=2)
    other = random(N_IN, seed=3)
    other -= (other @ key[0]) / (key[0] @ key[0]) * key[0]
    change = closed_form(key, torch.tensor([0]), delta, lam=0.01)
    assert float((change.matrix() @ other).abs().max()) < 1e-12


def test_without_a_limit_on_its_size_it_is_rome():
    weight, key, delta, c = (
        random(N_OUT, N_IN, seed=0),
        random(1, N_IN, seed=1),
        random(1, N_OUT, seed=2),
        covariance(3),
    )
    corrected = key @ torch.linalg.inv(c)
    change = closed_form(key, torch.tensor([0]), delta, lam=0.0, corrected=corrected)
    expected = rome_weight(weight, key[0], weight @ key[0] + delta[0], c)
    torch.testing.assert_close(weight + change.matrix(), expected)


def test_a_large_lam_does_nothing():
    key, delta = random(1, N_IN, seed=1), random(1, N_OUT, seed=2)
    assert float(closed_form(key, torch.tensor([0]), delta, lam=1e12).matrix().abs().max()) < 1e-10


def test_dependent_keys_need_a_lam():
    key, delta = random(1, N_IN, seed=1), random(2, N_OUT, seed=2)
    keys = torch.cat([key, 2 * key])
    with pytest.raises(InputError, match=r"singular.*lam=0.*Raise lam"):
        closed_form(keys, torch.arange(2), delta, lam=0.0)
    closed_form(keys, torch.arange(2), delta, lam=0.01)
    with pytest.raises(InputError, match="singular"):
        closed_form(0 * key, torch.tensor([0]), delta[:1], lam=0.0)
    with pytest.raises(InputError, match="lam=-1"):
        closed_form(key, torch.tensor([0]), delta[:1], lam=-1.0)
    with pytest.raises(InputError, match="lam=nan"):
        closed_form(key, torch.tensor([0]), delta[:1], lam=float("nan"))
