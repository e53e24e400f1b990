"""A sweep is the same edit, made and measured everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import causal_trace
from hooked_llava.editing import EditRequest, Probe, edit_sweep, evaluate_edit, multedit
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor

# Untrained weights: most edits do not reach their target.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")


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
def probes(model) -> list[Probe]:
    return [
        Probe("rewording", "generalisation", model.prepare("Is the star red or blue?"), "red"),
        Probe("others", "specificity", model.prepare("Who made the star?")),
    ]


def test_a_sweep_is_each_edit_measured(model, inputs, request_, probes):
    trace = causal_trace(model, inputs, "the star", corruption="a circle", kinds=("mlp",))
    sweep = edit_sweep(model, request_, probes, trace=trace, clamp=50.0)
    n_layers = model.cfg.n_layers
    assert sweep.position.values.tolist() == ["constraint", "last"]
    edit = multedit(model, request_, layer=0, position="last", clamp=50.0)
    found = evaluate_edit(model, edit, [Probe("own", "efficacy", inputs, "red"), *probes])
    cell = sweep.sel(position="last", layer=0)
    assert float(cell.probability) == pytest.approx(float(found.probability[0]), rel=1e-3)
    assert float(cell.efficacy) == float(found.accuracy[0])
    assert float(cell.generalisation) == float(found.accuracy[1])
    assert float(cell.specificity) == 1 - float(found.accuracy_before[2] - found.accuracy[2])
    star = inputs.token_map.find("the star")[-1]
    effect = trace.indirect_effect.sel(kind="mlp", position=star).values
    np.testing.assert_allclose(sweep.indirect_effect.sel(position="constraint").values[:-1], effect[:-1])
    # From the last layer the constraint does not reach the answer.
    assert np.isnan(sweep.efficacy.sel(position="constraint", layer=n_layers - 1))
    assert np.isfinite(sweep.efficacy.sel(position="last")).all()


def test_sweeps_that_cannot_be(model, inputs, request_):
    with pytest.raises(InputError, match="no positions.*'last'"):
        edit_sweep(model, request_, positions=[])
    trace = causal_trace(model, inputs, "the star", corruption="a circle", kinds=("attn",))
    with pytest.raises(InputError, match="expected 'mlp' at position"):
        edit_sweep(model, request_, trace=trace)
