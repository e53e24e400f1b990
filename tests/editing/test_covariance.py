"""A layer's key covariance is summed once, kept in a file, and given to no other model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hooked_llava.editing import EditRequest, KeyCovariance, key_covariance, rome
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import samples
from tests.builders import make_hf_model, make_prompt
from tests.pairs import as_users_run


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model())


def prompts(n: int = 2):
    hf_model = make_hf_model()
    return [make_prompt(hf_model, batch=2, seed=seed) for seed in range(n)]


def test_batches_are_summed_as_one(model):
    whole = {name: torch.cat([one[name] for one in prompts()]) for name in prompts()[0]}
    apart, together = key_covariance(model, iter(prompts()), 1), key_covariance(model, [whole], 1)
    assert apart.n_keys == together.n_keys
    # keys are float32, and a batch of another size is summed in another order
    torch.testing.assert_close(apart.moment, together.moment, rtol=1e-4, atol=1e-5 * float(together.moment.abs().max()))
    assert apart.moment.dtype == torch.float64


def test_correcting_is_multiplying_with_the_inverse(model):
    seen = key_covariance(model, prompts(), 1, damping=0.2)
    keys = torch.randn(3, 74)
    damped = seen.moment + 0.2 * seen.moment.diagonal().mean() * torch.eye(74, dtype=torch.float64)
    torch.testing.assert_close(seen.correct(keys), keys.double() @ torch.linalg.inv(damped))


def test_a_file_is_read_instead_of_running(model, tmp_path):
    path = tmp_path / "layer1"
    made = key_covariance(model, prompts(), 1, path=path)

    def never():
        raise AssertionError("the prompts were run again")
        yield

    again = key_covariance(model, never(), 1, path=path)
    assert torch.equal(again.moment, made.moment)
    assert (again.n_keys, again.layer) == (made.n_keys, 1)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="layer 1.*positions='text'.*layer 2"):
        key_covariance(model, never(), 2, path=path)
    with pytest.raises(InputError, match="positions='text'.*layer 1.*positions='image'.*path"):
        key_covariance(model, never(), 1, positions="image", path=path)
    other = HookedLLaVA.from_hf(make_hf_model(seed=1))
    with pytest.raises(InputError, match="covariance.*another model.*covariance again"):
        again.save(path, other)
    with pytest.raises(InputError, match="another model"):
        key_covariance(other, never(), 1, path=path)


@torch.no_grad()
def test_a_change_of_one_number_is_noticed_in_memory_and_in_the_file(tmp_path):
    changed = HookedLLaVA.from_hf(make_hf_model())
    made = key_covariance(changed, prompts(), 1, path=tmp_path / "file")
    KeyCovariance.load(tmp_path / "file", changed)
    for name in ("vision.blocks.1.mlp.up.weight", "language.blocks.2.attn.query.weight"):
        number = changed.get_parameter(name).data[3:4, 5]
        number += 0.1
        with pytest.raises(InputError, match="covariance.*another model.*covariance again"):
            KeyCovariance.load(tmp_path / "file", changed)
        number -= 0.1
        KeyCovariance.load(tmp_path / "file", HookedLLaVA.from_hf(make_hf_model())).check_model(changed)
    made.check_model(changed)


def test_a_file_of_version_0_1_is_read_with_the_numbers_that_it_holds(model, tmp_path):
    made = key_covariance(model, prompts(), 1)
    tensors = {"moment": made.moment, "identity": samples(dict(model.named_parameters()))}
    about = {"format": "hooked_llava.key_covariance.v1", "layer": "1", "n_keys": str(made.n_keys), "positions": "text"}
    save_file(tensors, tmp_path / "old", metadata=about)
    assert torch.equal(KeyCovariance.load(tmp_path / "old", model).moment, made.moment)
    with pytest.raises(InputError, match="another model"):
        KeyCovariance.load(tmp_path / "old", HookedLLaVA.from_hf(make_hf_model(seed=1)))


def test_a_file_can_be_read_by_others_and_needs_a_folder(model, tmp_path):
    with as_users_run():
        made = key_covariance(model, prompts(), np.int64(1), path=tmp_path / "layer1")
    assert made.layer == 1
    (tmp_path / "usual").touch()
    assert (tmp_path / "layer1").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(InputError, match="no folder '.*nowhere'"):
        made.save(tmp_path / "nowhere" / "layer1", model)


def test_what_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="no prompts"):
        key_covariance(model, [], 1)
    with pytest.raises(InputError, match="3.*layers"):
        key_covariance(model, prompts(), 3)
    with pytest.raises(CheckpointError, match="missing, truncated"):
        KeyCovariance.load(tmp_path / "none", model)
    singular = KeyCovariance(1, torch.zeros(74, 74, dtype=torch.float64), 1)
    with pytest.raises(InputError, match="singular.*damping="):
        singular.correct(torch.ones(1, 74))
    request = EditRequest(model.as_inputs(prompts()[0])[0], 17)
    with pytest.raises(InputError, match="singular.*damping="):
        rome(model, request, singular, position="last")
    with pytest.raises(InputError, match="layer 7 with 74 neurons"):
        rome(model, request, KeyCovariance(7, singular.moment, 1), position="last")
