from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava.analysis.answer_without import answer_without, decisive_removal, leads_from
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(image_size=32), make_processor(image_size=32))


@pytest.fixture(scope="module")
def inputs(model) -> Inputs:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    return model.prepare("What color is the star?", image)


def zeroed(model, inputs, heads, patches):
    """The last logits of a whole run with the same zeros written by plain hooks."""

    def heads_off(layer):
        def write(z, hook):
            for at, head in heads:
                if at == layer:
                    z[:, -1, head] = 0
            return z

        return write

    def patches_off(embed, hook):
        embed[:, patches] = 0
        return embed

    hooks = [(f"blocks.{layer}.attn.hook_z", heads_off(layer)) for layer in range(model.cfg.n_layers)]
    hooks += [("vision.hook_patch_embed", patches_off)] if patches else []
    return model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1].detach()


def test_removals_equal_whole_runs_with_zeros(model, inputs):
    heads = [(1, 0), (0, 1), (1, 1)]
    grid = np.arange(16, dtype=float).reshape(1, 4, 4)
    patches = xr.DataArray(grid, dims=("image", "patch_row", "patch_col"))
    said = answer_without(model, inputs, 5, heads=heads, patches=patches)
    assert said.removed.values.tolist() == ["nothing", *["heads"] * 3, *["patches"] * 5]
    assert said.n_removed.values.tolist() == [0, 1, 2, 3, 1, 2, 4, 8, 16]
    assert said.n_ranked.values.tolist() == [0, 3, 3, 3, *[16] * 5]
    for i, (removed, n) in enumerate(zip(said.removed.values, said.n_removed.values, strict=True)):
        off = heads[:n] if removed == "heads" else []
        blank = list(range(16 - n, 16)) if removed == "patches" else []
        p = zeroed(model, inputs, off, blank).float().softmax(-1)
        assert float(said.probability[i]) == pytest.approx(float(p[5]), abs=1e-5)
        assert int(said.token_id[i]) == int(p.argmax())


def test_the_fewest_that_change_the_answer_are_found():
    data = {"token_id": [7, 7, 3, 3, 7], "removed": ["nothing", "heads", "heads", "heads", "patches"]}
    said = xr.Dataset({name: ("run", values) for name, values in data.items()})
    found = decisive_removal(said.assign(n_removed=("run", [0, 1, 2, 4, 1])), "heads")
    assert found is not None
    assert int(found.n_removed) == 2
    assert decisive_removal(said.assign(n_removed=("run", [0, 1, 2, 4, 1])), "patches") is None


def test_an_answer_leads_from_where_it_stays_first():
    ids = torch.tensor([[7, 4], [4, 7], [7, 4], [7, 4]])[:, None]
    lens = xr.Dataset({"token_id": (("layer", "position", "rank"), ids.numpy())})
    assert leads_from(lens, 7) == 2
    assert leads_from(lens, 4) is None


def test_several_prompts_and_absent_heads_are_refused(model, inputs):
    with pytest.raises(InputError, match=r"one prompt.*2"):
        answer_without(model, model.prepare(["What?", "Who?"]), 5)
    with pytest.raises(InputError, match=r"9"):
        answer_without(model, inputs, 5, heads=[(9, 0)])
