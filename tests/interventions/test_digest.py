"""The digest of weights: the same for the same weights wherever they are, another for any other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hooked_llava.interventions.digest import weights_digest
from hooked_llava.model import HookedLLaVA
from tests.builders import make_hf_model
from tests.pairs import fresh_pair

CODE = (
    "from hooked_llava import HookedLLaVA; from hooked_llava.interventions.digest import weights_digest; import torch; "
    "torch.set_num_threads(2); print(weights_digest(HookedLLaVA.from_pretrained('tiny-shapes')))"
)


def test_every_change_of_a_weight_is_noticed() -> None:
    model = fresh_pair().ours
    before = weights_digest(model)
    assert weights_digest(model) == before
    weight = model.blocks[1].mlp.W_out
    kept = weight.clone()
    with torch.no_grad():
        weight[3, 2] = torch.nextafter(weight[3, 2], weight[3, 2] + 1)
        assert weights_digest(model) != before, "the smallest change of one number"
        weight.copy_(kept[torch.randperm(len(kept))])
        assert weights_digest(model) != before, "the same numbers in other places"
        weight.data.copy_(kept)
        assert weights_digest(model) == before


def test_equal_weights_in_another_process_and_elsewhere_in_memory(tiny_shapes: HookedLLaVA) -> None:
    said = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert said.strip() == weights_digest(tiny_shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_another_model(dtype: torch.dtype) -> None:
    hf = make_hf_model()
    digest = weights_digest(HookedLLaVA.from_hf(hf))
    assert weights_digest(HookedLLaVA.from_hf(hf.to(dtype))) != digest
