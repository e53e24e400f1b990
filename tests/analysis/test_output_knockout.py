"""Outputs of attention and MLPs taken away, against full forward passes of Hugging Face's model with hooks on its modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import output_knockout
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz import knockout_curves
from tests.oracles.plain_knockout import window_of
from tests.oracles.plain_outputs import without_outputs
from tests.pairs import as_users_run, batch, pair

OUTPUTS = ("attn at question", "mlp at question|last", "mlp at last", "attn at image - object")
AT = {"question": [6, 7, 8], "question|last": [6, 7, 8, 10], "last": [10], "image - object": [1, 3]}
N_LAYERS = 3


def exact() -> Any:
    return pair("grouped", torch.float64)


def asked(given: dict[str, torch.Tensor]) -> Inputs:
    return exact().ours.as_inputs(given).with_spans(question=[6, 7, 8], object=[2, 4])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_equal_to_full_forwards_of_hugging_face(window: int) -> None:
    inputs = asked(exact().prompt(n_text=6))
    given = exact().prompt(n_text=6)
    before = without_outputs(exact().hf, given, "attn", [], [])
    token = int(before.argmax())
    found = output_knockout(exact().ours, inputs, OUTPUTS, window, total=True)
    assert found.output.values.tolist() == list(OUTPUTS)
    for name in OUTPUTS:
        kind, _, span = name.partition(" at ")
        cells = [(window_of(layer, window, N_LAYERS), found.effect.sel(output=name, layer=layer)) for layer in range(3)]
        for layers, effect in [*cells, (range(N_LAYERS), found.total_effect.sel(output=name))]:
            after = without_outputs(exact().hf, given, kind, layers, AT[span])
            p, p_before = (float(logits.softmax(-1)[token]) for logits in (after, before))
            assert float(effect) == pytest.approx(100 * (p - p_before) / p_before, abs=2e-3)
    assert found.n_forward == 1
    assert found.work < found.runs, "each run costs a forward pass at most"


def test_a_batch_and_spans_that_are_missing() -> None:
    ours = exact().ours
    both = ours.as_inputs(batch([exact().prompt(n_text=6), exact().prompt(n_text=4, seed=1)], "right"))
    alone = output_knockout(ours, exact().prompt(n_text=6), ["mlp at last"], 1, metric="log_probability")
    found = output_knockout(ours, both, ["mlp at last", "attn at object"], 1, metric="log_probability", missing="skip")
    np.testing.assert_allclose(found.effect[0, 0], alone.effect[0], atol=1e-9)
    assert np.isnan(found.effect.sel(output="attn at object")).all()
    with pytest.raises(SpanError, match="'object'"):
        output_knockout(ours, both, "attn at object")


def test_the_figure_has_a_curve_for_each_output() -> None:
    found = output_knockout(exact().ours, asked(exact().prompt(n_text=6)), OUTPUTS[:2], 1)
    lines = knockout_curves(found).axes[0].lines[1:]
    for line, values in zip(lines, found.effect.values, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), values)


@pytest.mark.parametrize("wrong", ["question", "resid at question", "attn at ", "attn_out at last", 3])
def test_what_is_no_output_is_refused(wrong: Any) -> None:
    with as_users_run(), pytest.raises(InputError, match=r"outputs=.*'attn at SPAN'"):
        output_knockout(exact().ours, exact().prompt(), [wrong])
    with pytest.raises(InputError, match=r"outputs=\[\].*'mlp at question'"):
        output_knockout(exact().ours, exact().prompt(), [])
