from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor


@pytest.fixture(scope="session")
def model() -> HookedLLaVA:
    """A tiny model with a processor, random weights, and a grid of 4 x 4 patches: read it, do not change it."""
    return HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32))


@pytest.fixture(scope="session")
def wide_image() -> np.ndarray:
    """Twice as wide as high, so that the processor cuts a quarter away on either side."""
    return np.random.default_rng(0).integers(0, 256, (100, 200, 3)).astype(np.uint8)


@pytest.fixture(scope="session")
def inputs(model: HookedLLaVA, wide_image: np.ndarray) -> Inputs:
    return model.prepare("What color is the star?", wide_image)


@pytest.fixture(scope="session")
def text_inputs(model: HookedLLaVA) -> Inputs:
    return model.prepare("Who made the star?")


@pytest.fixture(scope="session")
def tensor_inputs(model: HookedLLaVA, inputs: Inputs) -> Inputs:
    """The same prompt as a Hugging Face processor returns it: without the original image."""
    torch.manual_seed(0)
    return model.as_inputs({"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values})
