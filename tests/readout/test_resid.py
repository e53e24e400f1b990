"""Logits where the answer is read: equal to the whole run's, with only these positions unembedded."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.logit_attribution import By, logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.prompt.where import resolve_positions
from hooked_llava.readout.lens import Lens
from hooked_llava.readout.resid import logits_and_activations, logits_at, next_token_logits, resid_by_layer
from tests.pairs import off, pair

MODELS = pair("grouped", torch.float64)
OURS = MODELS.ours
N_LAYERS = OURS.cfg.n_layers


@pytest.fixture
def unembedded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and positions that are unembedded, [run, position], call by call as they are made."""
    seen: list[tuple[int, int]] = []
    unembed = OURS.language.unembed.forward

    def counted(rows: Tensor) -> Tensor:
        seen.append((int(rows.shape[:-2].numel()), rows.shape[-2]))
        return unembed(rows)

    monkeypatch.setattr(OURS.language.unembed, "forward", counted)
    return seen


@pytest.mark.parametrize("where", ["last", "image", -2, [0, 3]])
def test_logits_are_those_of_the_whole_run(where: Any) -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    index = resolve_positions(where, inputs)
    expected = OURS(inputs)[:, index[0]]
    assert off(logits_at(OURS, OURS(inputs, stop_at_layer=N_LAYERS), index), expected) < 1e-12


def test_only_what_is_read_is_unembedded(unembedded: list[tuple[int, int]]) -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    next_token_logits(OURS, inputs)
    for name in ("blocks.0.attn.hook_z", "ln_final.hook_scale", "hook_logits"):
        logits_and_activations(OURS, inputs, inputs.last[:, None], ["blocks.1.hook_resid_mid", name])
    assert [positions for _, positions in unembedded] == [1, 1, 1, inputs.shape[1]], "all only where they are asked for"


@pytest.mark.parametrize("by", get_args(By))
def test_logit_attribution_unembeds_one_position(by: By, unembedded: list[tuple[int, int]]) -> None:
    logit_attribution(OURS, MODELS.prompt(), 4, by=by)
    assert unembedded == [(1, 1)]


@pytest.mark.parametrize("where", ["last", [3, -1]])
@pytest.mark.parametrize(
    ("hook", "layered"), [("z", True), ("vision.resid_pre", True), ("ln_final.hook_normalized", False)]
)
def test_patching_unembeds_what_its_metric_reads(
    hook: str, layered: bool, where: Any, unembedded: list[tuple[int, int]]
) -> None:
    clean, corrupted = MODELS.prompt(seed=1), MODELS.prompt(seed=2)
    metric = lambda logits: logits[..., 4].sum(-1) if where != "last" else logits[..., 4]  # noqa: E731
    layers = [1] if layered else None
    found = activation_patching(OURS, clean, corrupted, hook=hook, layers=layers, metric=metric, logit_positions=where)
    n_read = 1 if where == "last" else len(where)
    assert {positions for _, positions in unembedded} == {n_read}
    runs = sum(rows for rows, _ in unembedded)
    assert runs <= found.runs + 3, "each run, the source, and the base for the metric and for runs that change nothing"


@pytest.mark.parametrize("norm", get_args(Lens))
def test_the_run_that_a_lens_reads_unembeds_nothing(norm: Lens, unembedded: list[tuple[int, int]]) -> None:
    logit_lens(OURS, MODELS.prompt(), norm=norm, positions=[3, -1], k=2)
    assert unembedded == [], "a lens multiplies what it shows itself"


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "ln_final.hook_normalized", "hook_logits"])
def test_activations_come_with_the_logits(name: str) -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    index = resolve_positions([1, 4], inputs)
    logits, held = logits_and_activations(OURS, inputs, index, [name])
    whole, cache = OURS.run_with_cache(inputs, names_filter=name)
    assert off(held[name], cache[name]) < 1e-12
    assert off(logits, whole[:, [1, 4]]) < 1e-12


def test_the_residual_stream_of_every_layer() -> None:
    inputs = OURS.as_inputs(MODELS.prompt())
    _, cache = OURS.run_with_cache(inputs, names_filter=["resid_pre", "resid_post"])
    expected = torch.stack([*(cache["resid_pre", i] for i in range(N_LAYERS)), cache["resid_post", -1]])
    assert off(resid_by_layer(OURS, inputs, torch.tensor([[2, 5]])), expected[:, :, [2, 5]]) < 1e-12
