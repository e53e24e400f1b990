"""Path patching equals two passes with plain hooks that freeze everything but the path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis.path_patching import path_patching
from hooked_llava.errors import InputError
from hooked_llava.readout.metrics import teacher_forced
from tests.analysis.test_activation_patching import metric, prompts
from tests.oracles.naive_patching import outputs_of, patch_path
from tests.pairs import as_users_run

RECEIVERS = ["logits", ("mlp", 1), ("mlp", 2), ("q", 2, 3), ("k", 1, 1), ("v", 2, 0)]


def before(sender_layer: int, receiver: Any, senders: str) -> bool:
    if receiver == "logits":
        return True
    return sender_layer < receiver[1] or (sender_layer == receiver[1] and receiver[0] == "mlp" and senders == "heads")


@pytest.mark.parametrize(
    ("senders", "direction", "positions"),
    [("heads", "denoise", None), ("mlps", "noise", None), ("heads", "noise", "image"), ("mlps", "denoise", [2, -1])],
)
def test_equals_freezing_everything_else(senders: Any, direction: Any, positions: Any) -> None:
    model, clean, corrupted = prompts("grouped")
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    chosen = {"receivers": RECEIVERS, "senders": senders, "direction": direction, "positions": positions}
    found = path_patching(model, clean, corrupted, metric=metric, **chosen)
    assert found.dims == ("receiver", "layer", "head")[: found.ndim]
    assert found.receiver.values.tolist() == ["logits", "L1 mlp", "L2 mlp", "L2H3 q", "L1H1 k", "L2H0 v"]
    everywhere = list(range(base.shape[1]))
    where = {None: everywhere, "image": list(base.token_map["image"])}.get(
        positions if positions != [2, -1] else "", [2, -1]
    )
    heads = [None] if senders == "mlps" else [0, 5]
    outputs = [outputs_of(model, inputs) for inputs in (source, base)]
    for r, receiver in enumerate(RECEIVERS):
        for layer in range(model.cfg.n_layers):
            for head in heads:
                cell = found.values[r, layer] if head is None else found.values[r, layer, head]
                if before(layer, receiver, senders):
                    expected = patch_path(model, base, *outputs, (layer, head), receiver, where, metric)
                    assert cell == pytest.approx(expected, rel=1e-4, abs=3e-5)
                else:
                    assert np.isnan(cell)


def test_text_only_and_pairs() -> None:
    model, clean, corrupted = prompts(n_images=0, batch=2)
    found = path_patching(model, clean, corrupted, metric=metric)
    assert found.dims == ("pair", "receiver", "layer", "head")
    alone = path_patching(model, clean[1], corrupted[1], metric=metric)
    np.testing.assert_allclose(found[1], alone, rtol=1e-5, atol=1e-5)
    outputs = [outputs_of(model, inputs[1]) for inputs in (clean, corrupted)]
    expected = patch_path(model, corrupted[1], *outputs, (1, 2), "logits", range(clean.shape[1]), metric)
    assert float(alone.sel(receiver="logits", layer=1, head=2)) == pytest.approx(expected, rel=1e-4, abs=3e-5)


def test_one_receiver_may_stand_by_itself() -> None:
    model, clean, corrupted = prompts()
    listed = path_patching(model, clean, corrupted, receivers=["logits", ("mlp", 1)], senders="mlps", metric=metric)
    for one in ("logits", ("mlp", 1)):
        alone = path_patching(model, clean, corrupted, receivers=one, senders="mlps", metric=metric)
        assert alone.sizes["receiver"] == 1
        np.testing.assert_allclose(alone[0], listed.sel(receiver=alone.receiver[0]), rtol=1e-4, atol=1e-5)


def test_reading_an_answer_of_several_tokens() -> None:
    model, clean, corrupted = prompts()
    forced = [teacher_forced(model, inputs, [8, 9]) for inputs in (clean, corrupted)]
    where, bases = forced[0].positions, [f.inputs for f in forced]
    found = path_patching(
        model, *bases, receivers=["logits", ("q", 2, 1)], metric=forced[0].metric, logit_positions=where
    )
    with torch.no_grad():
        ends = [float(forced[0].metric(model(inputs)[0, where])) for inputs in bases]
    assert [found.clean, found.corrupted] == pytest.approx(ends, abs=1e-4)
    outputs = [outputs_of(model, inputs) for inputs in bases]
    for receiver, name in (("logits", "logits"), (("q", 2, 1), "L2H1 q")):
        expected = patch_path(
            model, bases[1], *outputs, (0, 3), receiver, range(bases[1].shape[1]), forced[0].metric, where
        )
        cell = float(found.sel(receiver=name, layer=0, head=3))
        assert cell == pytest.approx(expected, rel=1e-4, abs=3e-5)


def test_default_metric_is_the_difference_of_the_own_answers() -> None:
    model, clean, corrupted = prompts()
    found = path_patching(model, clean, corrupted, senders="mlps")
    assert found.clean > 0 > found.corrupted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receivers": ["logit"]}, "'logit'.*receiver"),
        ({"receivers": [("q", 1)]}, r"\('q', 1\).*receiver"),
        ({"receivers": [("mlp",)]}, r"\('mlp',\).*receiver"),
        ({"receivers": [("mlp", 1.5)]}, r"\('mlp', 1\.5\).*receiver"),
        ({"receivers": []}, r"receivers=\[\]"),
        ({"receivers": [("q", 3, 0)]}, r"\[3\].*layers.*\('q', 3, 0\)"),
        ({"receivers": [("k", 1, 2)]}, r"\[2\].*heads"),
        ({"senders": "embed"}, "senders='embed'.*'heads'.*'mlps'"),
        ({"direction": "up"}, "direction='up'.*'denoise'.*'noise'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    model, clean, corrupted = prompts("grouped")
    with as_users_run(), pytest.raises(InputError, match=message):
        path_patching(model, clean, corrupted, **{"metric": metric, **options})
