"""Writes the files beside it, as version 0.1 (commit f8ca89f) did: `python -m tests.data.v0_1.write` in that commit.

They are not to be written again: what matters is that later versions read what 0.1 wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors.torch import save_file

from hooked_llava import HookedLLaVA, Inputs
from hooked_llava.analysis import causal_trace, logit_lens
from hooked_llava.datasets import StudyRow, study
from hooked_llava.editing import EditRequest, key_covariance, multedit
from hooked_llava.results.arrays import save
from hooked_llava.toy.gqa_tables import gqa_rows
from tests.compiled import compiled

HERE = Path(__file__).parent
MODEL = "tiny-shapes-seed1"
QUESTION = "Who made the star?"
ROWS = gqa_rows(2, kinds=["ChooseAttr", "QueryAttr"])
BATCH = 2


class Lengths:
    """An analysis that says how long each prompt is; it fails after so many."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.fail_at = fail_at

    def __call__(self, inputs: Inputs, rows: Sequence[StudyRow]) -> xr.DataArray:
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [row.id for row in rows]
        values = np.array([[len(m.real), 2.0 * len(m.real)] for m in inputs.token_maps])
        return xr.DataArray(values, dims=("prompt", "layer"), name="length", attrs={"model": MODEL, "n_forward": 1})


def main() -> None:
    """Every kind of file, and what is in them in plain tensors and words beside."""
    model = HookedLLaVA.from_pretrained(MODEL)
    inputs = model.prepare(QUESTION)
    tensors: dict[str, torch.Tensor] = {}
    words: dict[str, Any] = {}

    _, cache = model.run_with_cache(inputs, names_filter=["resid_post", "pattern"], positions="last")
    cache.save(HERE / "cache.safetensors")
    tensors |= {f"cache {name}": x.clone() for name, x in cache.items()}

    for name, result in (
        ("lens", logit_lens(model, inputs, k=3)),
        ("trace", causal_trace(model, inputs, "the star", corruption="the ring")),
    ):
        save(result, HERE / f"{name}.safetensors")
        for variable in result.data_vars:
            values = result[variable].values
            if values.dtype.kind in "UO":
                words[f"{name} {variable}"] = values.tolist()
            else:
                tensors[f"{name} {variable}"] = torch.tensor(values)
        words[f"{name} dims"] = {str(n): list(map(str, v.dims)) for n, v in result.data_vars.items()}
        words[f"{name} prompt"] = result.attrs["prompt"]

    edit = multedit(model, EditRequest(QUESTION, "Boris"), layer=3, position="last")
    edit.save(HERE / "edit.safetensors")
    with edit.applied():
        tensors["edit logits"] = model(inputs)[0, -1].clone()
    words["edit method"] = edit.method["name"]

    exact = compiled()
    covariance = key_covariance(exact, [exact.ask({(0, 3): "red star"}, "star")], 1, path=HERE / "keys.safetensors")
    tensors["keys moment"] = covariance.moment.clone()
    words["keys n"] = covariance.n_keys

    try:
        study(model, ROWS, Lengths(fail_at=BATCH), out=HERE / "study.safetensors", batch_size=BATCH, progress=False)
    except KeyboardInterrupt:
        words["study asked"] = [row.id for row in ROWS[:BATCH]]
    whole = study(model, ROWS, Lengths(), batch_size=BATCH, progress=False)
    tensors["study length"] = torch.tensor(whole.length.values)

    save_file(tensors, HERE / "expected.safetensors")
    (HERE / "expected.json").write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
