"""Every tool of TransformerLens that takes a model is run on ours, or named with the reason: none is forgotten.

`test_transformer_lens_tools` and `test_tl_protocol` compare what tools find with our own analyses and with runs by hand. Here
each is run once, with an image where it takes a prompt as tokens, and the image must change what it finds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.transformer_lens_tools import CANNOT, RUNS, WITHOUT_IMAGE, discovered

DOCS = Path(__file__).parent.parent / "docs"


def test_no_tool_is_forgotten() -> None:
    """A tool that a new version of TransformerLens brings must be run, or its reason told."""
    assert set(discovered()) == {*RUNS, *CANNOT}
    assert not {*RUNS} & {*CANNOT}


def numbers(found: Any) -> np.ndarray:
    return np.asarray(found.detach() if isinstance(found, Tensor) else found, dtype=np.float64).ravel()


@pytest.mark.parametrize("name", sorted(RUNS))
def test_it_runs(name: str) -> None:
    found = numbers(RUNS[name](1, 2))
    assert np.isfinite(found).all()
    if name not in WITHOUT_IMAGE:
        other = numbers(RUNS[name](3, 2))
        assert found.shape == other.shape
        assert np.abs(found - other).max() > 1e-5, "another image, another result"


@pytest.mark.parametrize("name", sorted(CANNOT))
def test_it_says_why_it_cannot(name: str) -> None:
    call, error, says = CANNOT[name]
    with pytest.raises(error, match=says):
        call()


def test_the_documentation_has_the_count_and_the_reasons() -> None:
    page = " ".join((DOCS / "howto/from-transformerlens.md").read_text(encoding="utf-8").split())
    assert f"{len(RUNS)} of {len(RUNS) + len(CANNOT)}" in page
    assert f"{len(RUNS) - len(WITHOUT_IMAGE)} of them with images" in page
    for name in CANNOT:
        assert re.search(rf"{name.rpartition('.')[2]}` [|o]", page), name
