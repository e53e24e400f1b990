from __future__ import annotations

import pytest

from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32))
