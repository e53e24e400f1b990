from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny untrained model on disk, as a user would have one."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / f"{name}.png")
    return folder
