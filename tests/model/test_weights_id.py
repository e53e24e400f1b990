"""The version notices how weights are usually written; the hash notices any change, and knows them wherever they are."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from hooked_llava.errors import InputError
from hooked_llava.model import weights_id
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import (
    WeightsId,
    check_same_weights,
    same_samples,
    sample,
    samples,
    weights_hash,
    weights_version,
)
from tests.builders import make_hf_model
from tests.pairs import fresh_pair

CODE = (
    "from hooked_llava import HookedLLaVA; from hooked_llava.model.weights_id import weights_hash; import torch; "
    "torch.set_num_threads(2); print(weights_hash(HookedLLaVA.from_pretrained('tiny-shapes')))"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


# --- the version


def test_the_version_is_the_same_until_a_weight_is_written() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = weights_version(model)
    assert weights_version(model) == before
    model(torch.ones(1, 3))
    assert weights_version(model) == before
    with torch.no_grad():
        model[0].weight.add_(0.0)
    assert weights_version(model) != before


def test_the_version_notices_writes_through_data_and_new_storage() -> None:
    model = nn.Linear(40, 50)
    before = weights_version(model)
    model.weight.data.mul_(1.01)
    after = weights_version(model)
    assert after != before
    model.weight = nn.Parameter(model.weight.clone())
    assert weights_version(model) != after


def test_samples_lie_in_columns_and_rows_all_over_the_matrix() -> None:
    cells = sample(torch.arange(256 * 1024).view(256, 1024).double(), 32).long()
    for places, n in ((cells % 1024, 1024), (cells // 1024, 256)):
        assert len(places.unique()) == 32
        assert int(places.sort().values.diff().max()) < n / 8
    assert sample(torch.arange(5.0), 32).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert (sample(torch.tensor(3.0), 4).tolist(), sample(torch.zeros(0), 4).tolist()) == ([3.0], [])


def test_the_version_notices_what_is_written_beside_the_first_column_through_data() -> None:
    model = nn.Linear(64, 64)
    before = weights_version(model)
    model.weight.data[:, 1:].add_(1.0)
    assert weights_version(model) != before


# --- the hash


def by_the_formula(named: dict[str, Tensor]) -> str:
    """sum of bits * (2 i + 1) over pieces of 2^22 numbers, in Python's whole numbers; as version 0.1 made it."""
    digest = hashlib.sha256()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in named.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        bits = weight.detach().reshape(-1).view(kinds[weight.element_size()]).tolist()
        for start in range(0, max(len(bits), 1), 2**22):
            total = sum(bit * (2 * i + 1) for i, bit in enumerate(bits[start : start + 2**22]))
            digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_is_that_of_version_0_1(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-finished studies hold it. In blocks of any size, since those only save time."""
    weights = {
        "a": torch.randn(7, 300, dtype=dtype),
        "none": torch.zeros(0, dtype=dtype),
        "b": -torch.rand(5).to(dtype),
    }
    expected = by_the_formula(weights)
    for block in (1, 64, 2**16):
        monkeypatch.setattr(weights_id, "_BLOCK", block)
        assert weights_hash(weights) == expected


def test_several_pieces_and_blocks() -> None:
    weights = {"long": torch.randn(2**22 + 3 * 2**16 + 5)}
    assert weights_hash(weights) == by_the_formula(weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_made_for_a_device_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    bits = [weights_id._bits(torch.randn(size).to(dtype)) for size in (0, 1, 2**16 + 9, 3 * 2**16)]
    odd = torch.arange(1, 2**17, 2)
    expected = [sum(weights_id._block_sums(piece, odd)) % 2**64 for piece in bits]
    assert [total % 2**64 for total in weights_id._sums_at_once(bits)] == expected


@torch.no_grad()
def test_every_change_of_a_weight_is_noticed() -> None:
    model = fresh_pair().ours
    before = weights_hash(model)
    assert weights_hash(model) == before
    weight = model.blocks[1].mlp.W_out
    kept = weight.clone()
    weight[3, 2] = torch.nextafter(weight[3, 2], weight[3, 2] + 1)
    assert weights_hash(model) != before, "the smallest change of one number"
    weight.copy_(kept[torch.randperm(len(kept))])
    assert weights_hash(model) != before, "the same numbers in other places"
    weight.copy_(-kept)
    assert weights_hash(model) != before, "signs only"
    weight.data.copy_(kept)
    assert weights_hash(model) == before


def test_names_and_shapes_count() -> None:
    weight = torch.randn(6, 4)
    hashes = {weights_hash({"a": weight}), weights_hash({"b": weight}), weights_hash({"a": weight.view(4, 6)})}
    assert len(hashes) == 3


def test_equal_weights_in_another_process_and_elsewhere_in_memory(tiny_shapes: HookedLLaVA) -> None:
    said = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert said.strip() == weights_hash(tiny_shapes)
    assert weights_hash(HookedLLaVA.from_pretrained("tiny-shapes")) == weights_hash(tiny_shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_another_model(dtype: torch.dtype) -> None:
    hf = make_hf_model()
    before = weights_hash(HookedLLaVA.from_hf(hf))
    assert weights_hash(HookedLLaVA.from_hf(hf.to(dtype))) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_of_rounded_weights_is_that_of_weights_in_that_dtype(dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(9, 11, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    assert weights_hash(weights, dtype) == weights_hash({name: weight.to(dtype) for name, weight in weights.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_on_an_accelerator(dtype: torch.dtype) -> None:
    weights = {"long": torch.randn(2**22 + 77).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    there = {name: weight.to("cuda") for name, weight in weights.items()}
    for rounded in (None, torch.bfloat16):
        assert weights_hash(there, rounded) == weights_hash(weights, rounded)


# --- what a file carries


def cast(weights: dict[str, Tensor], **dtypes: torch.dtype) -> dict[str, Tensor]:
    return {name: weights[name].to(dtype, copy=True) for name, dtype in dtypes.items()}


def test_weights_fit_in_the_coarser_of_both_dtypes() -> None:
    fine = {"a": torch.randn(40, 50, dtype=torch.float64), "b": torch.randn(8, dtype=torch.float64)}
    for made_in in DTYPES:
        kept = WeightsId.from_json(WeightsId.of(cast(fine, a=made_in, b=made_in)).as_json())
        for used_in in DTYPES:
            used = cast(fine, a=used_in, b=used_in)
            assert kept.fits(used) == ({made_in, used_in} != {torch.float16, torch.bfloat16})
            used["a"][3, 3] *= 1.1
            assert not kept.fits(used)


def test_weights_of_mixed_dtypes() -> None:
    fine = {"a": torch.randn(40, 50), "b": torch.randn(8)}
    single, half = torch.float32, torch.bfloat16
    mixed = cast(fine, a=half, b=single)
    kept = WeightsId.of(mixed)
    assert kept.fits(mixed)
    assert kept.fits(fine)
    assert kept.fits(cast(fine, a=half, b=half))
    assert not kept.fits(cast(fine, a=single, b=half))
    assert WeightsId.of(fine).fits(mixed)
    mixed["b"][2] += 0.5
    assert not kept.fits(mixed)
    assert not WeightsId.of(fine).fits(mixed)


def test_only_the_one_hash_that_is_asked_for_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.randn(4, 4)}
    kept, asked = WeightsId.of(weights), []
    monkeypatch.setattr(weights_id, "weights_hash", lambda weights, dtype=None: asked.append(dtype))
    kept.fits(weights)
    kept.fits(cast(weights, a=torch.bfloat16))
    assert asked == [None, torch.bfloat16]


@torch.no_grad()
def test_samples_of_version_0_1() -> None:
    """Some numbers of each weight: columns other than the first count, and other dtypes are compared in the coarser."""
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    weights = dict(model.named_parameters())
    kept = samples(weights)
    assert same_samples(samples(weights), kept)
    assert same_samples(kept.bfloat16(), kept)
    model.get_parameter("language.blocks.2.attn.query.weight")[:, 1:] += 1.0  # as wide as a power of two
    assert not same_samples(samples(weights), kept)


@torch.no_grad()
@pytest.mark.parametrize("make", [WeightsId.of, samples])
def test_other_weights_are_refused_with_what_to_do(make) -> None:
    model = nn.Linear(4, 4)
    weights = dict(model.named_parameters())
    kept = make(weights)
    check_same_weights(weights, kept, model_name="mine")
    model.weight += 1
    message = r"thing.*another model \('it'\).*'mine'.*the thing again"
    with pytest.raises(InputError, match=message):
        check_same_weights(weights, kept, model_name="mine", made_on="it", what="thing")
