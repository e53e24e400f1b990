"""The size of an edit is that of its matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.editing import Edit, EditRequest, multedit, relative_size, size_text
from hooked_llava.editing.change import Change
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor

# Untrained weights: most edits do not reach their target.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
WEIGHT = "language.blocks.1.mlp.down.weight"


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32))


@pytest.fixture(scope="module")
def inputs(model):
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    return model.prepare("What color is the star?", image)


@pytest.fixture(scope="module")
def request_(inputs) -> EditRequest:
    return EditRequest(inputs, "red", constraint="the star")


@pytest.fixture(scope="module")
def edit(model, request_) -> Edit:
    return multedit(model, request_, layer=1, position="last", clamp=50.0)


def test_sizes_are_those_of_the_matrices(model, edit):
    change = edit.changes[WEIGHT]
    weight = model.get_parameter(WEIGHT).detach()
    expected = float(change.matrix().norm() / weight.norm())
    assert relative_size(edit) == pytest.approx(expected, rel=1e-5)
    assert size_text(edit) == f"rank 1, {edit.file_bytes / 1000:.1f} kB, {expected:.2g} of the weights' norm"
    with edit.applied():
        assert relative_size(edit) == pytest.approx(expected, rel=1e-5)
    left, right = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    mixed = Edit(model, {WEIGHT: Change(left, right, torch.randn(weight.shape))})
    assert relative_size(mixed) == pytest.approx(float(mixed.changes[WEIGHT].matrix().norm() / weight.norm()), rel=1e-5)
    assert size_text(mixed).startswith("full rank, ")
    assert relative_size(Edit(model, {})) == 0
