"""Files that version 0.1 wrote are read with the values that it wrote, or refused by their version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hooked_llava import HookedLLaVA, HookedLLaVAError, LLaVACache
from hooked_llava.datasets import study
from hooked_llava.editing import Edit, KeyCovariance
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import load
from tests.compiled import compiled
from tests.data.v0_1.write import BATCH, HERE, MODEL, QUESTION, ROWS, Lengths

REFUSED: set[str] = set()
"""Files of 0.1 that this version no longer reads."""
TENSORS = load_file(HERE / "expected.safetensors")
WORDS = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained(MODEL)


def read(name: str, reader: Callable[[], Any]) -> Any:
    """What the reader gives; the test ends here for a file that is refused as it should be."""
    if name not in REFUSED:
        return reader()
    with pytest.raises(HookedLLaVAError, match=r"0\.1|v1"):
        reader()
    pytest.skip(f"{name} of 0.1 is refused by its version")


def test_a_cache(model: HookedLLaVA) -> None:
    cache = read("cache", lambda: LLaVACache.load(HERE / "cache.safetensors", model))
    written = {name.removeprefix("cache "): x for name, x in TENSORS.items() if name.startswith("cache ")}
    assert set(cache) == set(written)
    assert all(torch.equal(cache[name], written[name]) for name in written)
    assert torch.equal(cache["resid_post", 2], written["blocks.2.hook_resid_post"])


@pytest.mark.parametrize("name", ["lens", "trace"])
def test_results(name: str) -> None:
    result = read(name, lambda: load(HERE / f"{name}.safetensors"))
    assert {str(n): list(v.dims) for n, v in result.data_vars.items()} == WORDS[f"{name} dims"]
    for variable, values in result.data_vars.items():
        key = f"{name} {variable}"
        if key in WORDS:
            assert values.values.tolist() == WORDS[key]
        else:
            assert np.array_equal(values.values, TENSORS[key].numpy(), equal_nan=True)
    assert result.attrs["prompt"] == WORDS[f"{name} prompt"]


def test_an_edit(model: HookedLLaVA) -> None:
    edit = read("edit", lambda: Edit.load(HERE / "edit.safetensors", model))
    assert edit.method["name"] == WORDS["edit method"]
    with edit.applied():
        logits = model(model.prepare(QUESTION))[0, -1]
    torch.testing.assert_close(logits, TENSORS["edit logits"], rtol=1e-4, atol=1e-4)


def test_a_covariance_of_keys() -> None:
    covariance = read("keys", lambda: KeyCovariance.load(HERE / "keys.safetensors", compiled()))
    assert torch.equal(covariance.moment, TENSORS["keys moment"])
    assert covariance.n_keys == WORDS["keys n"]


def test_a_half_finished_study_is_gone_on_with(model: HookedLLaVA, tmp_path: Path) -> None:
    out = tmp_path / "study.safetensors"
    shutil.copytree(HERE / "study.safetensors.parts", tmp_path / "study.safetensors.parts")
    rest = Lengths()
    whole = read("study", lambda: study(model, ROWS, rest, out=out, batch_size=BATCH, progress=False))
    assert rest.asked == [row.id for row in ROWS if row.id not in WORDS["study asked"]]
    assert whole.question.values.tolist() == [row.id for row in ROWS]
    assert np.array_equal(whole.length.values, TENSORS["study length"].numpy())


def test_another_study_is_refused_without_naming_what_its_file_does_not_say(model: HookedLLaVA, tmp_path: Path) -> None:
    out = tmp_path / "study.safetensors"
    shutil.copytree(HERE / "study.safetensors.parts", tmp_path / "study.safetensors.parts")
    with pytest.raises(InputError, match=r"study\.safetensors") as refused:
        study(model, ROWS, Lengths(), out=out, tail=None)
    assert "None" not in str(refused.value)
