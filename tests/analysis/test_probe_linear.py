"""A linear probe reads what is there and nothing else, and its numbers are those of the plain formula."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_llava.analysis import LinearProbe, probe_linear
from hooked_llava.errors import CheckpointError, InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results import save
from hooked_llava.steering import steer
from hooked_llava.toy.gqa_tables import gqa_rows
from tests.known_mechanism import OBJECTS, model_of
from tests.oracles.plain_probe import plain_accuracy, plain_logistic, plain_majority

SHAPES, VERBS = ("star", "ring", "moon"), ("made", "owns", "sells", "likes")


@cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


def asked() -> list[tuple[None, str]]:
    return [(None, f"Who {verb} the {shape}?") for shape, verb in product(SHAPES, VERBS)]


def shapes() -> list[str]:
    return [shape for shape, _ in product(SHAPES, VERBS)]


def vectors(hook: str, tokens: str, pool: str) -> np.ndarray:
    """One vector of each prompt, run by itself."""
    found = []
    for _, question in asked():
        inputs = model().prepare(question)
        at = inputs.token_map.span(tokens).tolist()
        _, cache = model().run_with_cache(inputs, names_filter=hook)
        rows = cache[hook][0].flatten(1)[at].double().numpy()
        found.append(rows.mean(0) if pool == "mean" else rows[-1])
    return np.stack(found)


@pytest.mark.parametrize(("hook", "tokens", "pool"), [(None, "question", "mean"), ("z", "question", "last")])
def test_accuracies_and_weights_are_those_of_the_plain_formula(hook: str | None, tokens: str, pool: Any) -> None:
    probe = probe_linear(model(), asked(), shapes(), hook=hook, tokens=tokens, pool=pool, folds=3, penalty=2.0)
    result = probe.result
    assert result.given.values.tolist() == shapes()
    assert sorted(result.control_label.values) == sorted(shapes())
    assert result.control_label.values.tolist() != shapes()
    layers = result.layer.values.tolist()
    assert layers == list(range(model().cfg.n_layers + (hook is None)))
    folds, labels, control = result.tested_in.values, result.given.values, result.control_label.values
    for layer in layers[1::4]:
        x = vectors(probe.hook(layer), tokens, pool)
        for fold in range(3):
            at = result.sel(layer=layer, fold=fold)
            assert float(at.accuracy) == pytest.approx(plain_accuracy(x, labels, folds, fold, 2.0))
            assert float(at.control) == pytest.approx(plain_accuracy(x, control, folds, fold, 2.0))
            assert float(at.majority) == pytest.approx(plain_majority(labels, folds, fold))
        names, weights, biases = plain_logistic(x, labels, 2.0)
        assert result.label.values.tolist() == names.tolist()
        for name, weight in zip(names, weights, strict=True):
            off = np.abs(probe.direction(layer, name).numpy() - weight).max()
            assert off < 2e-3 * np.abs(weights).max()
        assert probe.predict(torch.from_numpy(x), layer).tolist() == names[(x @ weights.T + biases).argmax(1)].tolist()


@pytest.mark.parametrize("variant", ["direct", "two_hops"])
def test_on_a_known_mechanism_a_color_is_read_where_it_is_and_nowhere_else(variant: Any) -> None:
    """The colour of the ring, by layer and place, follows the route of the mechanism; control labels are never read."""
    known = model_of(variant)
    route = known.mechanism.route("color")
    others = [{(0, 3): f"{a} star", (4, 4): f"{b} cross"} for a, b in product(("red", "blue"), repeat=2)]
    prompts = [
        known.ask({**OBJECTS, **o, (2, 1): f"{color} ring"}, "ring") for color in ("red", "blue") for o in others
    ]
    labels = ["red"] * 4 + ["blue"] * 4
    for place in ("object", "word", "last"):
        result = probe_linear(known, prompts, labels, tokens=place, folds=4).result
        reached = [place == "object" or place in route[: layer + 1] for layer in range(known.cfg.n_layers)]
        final = place in ("object", "last") or place in route
        expected = np.where([*reached, final], 1.0, result.majority.values.mean())
        np.testing.assert_allclose(result.accuracy.mean("fold"), expected)
        assert (result.control.mean("fold") < 1).all()


def test_one_forward_pass_for_each_batch_reads_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = HookedLLaVA.run_with_hooks

    def counted(self: HookedLLaVA, *args: Any, **options: Any) -> Any:
        calls.append(options["stop_at_layer"])
        return run(self, *args, **options)

    monkeypatch.setattr(HookedLLaVA, "run_with_hooks", counted)
    probe = probe_linear(model(), asked(), shapes(), folds=3, prompts_per_forward=5)
    assert calls == [model().cfg.n_layers] * 3  # and no position is unembedded
    assert probe.result.n_forward == 3
    assert (probe.result.n_prompts, probe.result.sizes["layer"]) == (12, model().cfg.n_layers + 1)


def test_rows_of_a_table_bring_labels_spans_and_groups() -> None:
    rows = gqa_rows(8, kinds=["QueryAttr", "ChooseAttr"])
    rows = [row for row in rows if row.objects]
    probe = probe_linear(model(), rows, "kind", tokens="object_word", groups="objects", folds=2)
    result = probe.result
    assert set(result.label.values) == {"QueryAttr", "ChooseAttr"}
    by_group: dict[str, set[int]] = {}
    for row, fold in zip(rows, result.tested_in.values, strict=True):
        by_group.setdefault(str(row.objects), set()).add(int(fold))
    assert all(len(folds) == 1 for folds in by_group.values())


def test_hooks_of_the_vision_tower_are_read_at_the_patches_of_the_image() -> None:
    rows = gqa_rows(8, kinds=["QueryAttr"])
    labels = ["even", "odd"] * 4
    probe = probe_linear(model(), rows, labels, hook="vision.resid_post", tokens="image", folds=2)
    result = probe.result
    assert result.layer.values.tolist() == [0, 1, 2, 3]  # the last layer of the tower is not used, and not computed
    found = []
    for row in rows:
        _, cache = model().run_with_cache(model().prepare(row.question, row.image), names_filter=probe.hook(-1))
        patches = model().config.vision.patches_along("pos")
        found.append(cache[probe.hook(-1)][0, patches.start : patches.stop].double().mean(0).numpy())
    folds, x = result.tested_in.values, np.stack(found)
    for fold in range(2):
        assert float(result.accuracy[-1, fold]) == pytest.approx(plain_accuracy(x, np.array(labels), folds, fold, 1.0))


def test_labels_come_out_of_a_data_frame_too() -> None:
    table = pd.DataFrame({"question": [question for _, question in asked()], "shape": shapes()})
    from_table = probe_linear(model(), table, "shape", folds=3, tokens="question")
    from_list = probe_linear(model(), asked(), shapes(), folds=3, tokens="question")
    assert from_table.result.accuracy.equals(from_list.result.accuracy)


def test_the_control_by_type_gives_all_prompts_of_a_type_one_label() -> None:
    verbs = [verb for _, verb in product(SHAPES, VERBS)]
    result = probe_linear(model(), asked(), verbs, types=shapes(), folds=3).result
    labels = dict(zip(shapes(), result.control_label.values.tolist(), strict=True))
    assert result.control_label.values.tolist() == [labels[shape] for shape in shapes()]
    assert len(set(labels.values())) > 1
    assert result.attrs["control"] == "labels by type"


def test_a_direction_steers_towards_its_label() -> None:
    """On the known mechanism adding the direction of a colour at the last position makes the probe, and the model, say it."""
    known = model_of("direct")
    others = [{(0, 3): f"{a} star", (4, 4): f"{b} cross"} for a, b in product(("red", "blue"), repeat=2)]
    prompts = [
        known.ask({**OBJECTS, **o, (2, 1): f"{color} ring"}, "ring") for color in ("red", "blue") for o in others
    ]
    probe = probe_linear(known, prompts, ["Red"] * 4 + ["Blue"] * 4, folds=2)
    assert torch.equal(probe.direction(4), probe.direction(-2, "Red"))
    assert torch.allclose(probe.direction(4, "Red"), -probe.direction(4, "Blue"))
    said = []
    for strength in (0, 20):
        steering = steer(known, probe.direction(4), hook=probe.hook(4), positions="last", strength=strength)
        said.append(known.generate(prompts[-1], steering=steering))
    assert said == ["Blue", "Red"]


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    probe = probe_linear(model(), asked(), shapes(), folds=3)
    probe.save(tmp_path / "probe")
    again = LinearProbe.load(tmp_path / "probe")
    assert again.result.identical(probe.result)
    assert torch.equal(again.direction(3, "star"), probe.direction(3, "star"))
    save(probe.result.accuracy.assign_attrs(analysis="other"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"'other'.*'probe_linear'"):
        LinearProbe.load(tmp_path / "other")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"labels": ["a", "b"]}, "labels has 2 entries for 12 prompts"),
    ({"labels": ["a"] * 12}, "labels are all 'a'"),
    ({"labels": ["a"] * 11 + ["b"]}, r"\['b'\].*folds=3"),
    ({"labels": "answer"}, "labels='answer'.*StudyRow"),
    ({"types": ["t"] * 12}, "types are all the same"),
    ({"groups": ["g"] * 12}, "1 groups.*folds=3"),
    ({"pool": "first"}, "pool='first'.*'mean'.*'last'"),
    ({"folds": 1}, "folds=1.*at least 2"),
    ({"penalty": 0}, "penalty=0.*above 0"),
    ({"hook": "attn_scores"}, "attn_scores.*vector at every position"),
    ({"hook": "blocks.*.hook_*_out"}, "several kinds"),
    ({"tokens": [3]}, r"tokens=\[3\].*'all'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe_linear(model(), asked(), **{"labels": shapes(), "folds": 3, **options})


def test_a_span_that_a_prompt_does_not_have_and_a_layer_that_is_none_are_refused() -> None:
    with pytest.raises(SpanError, match="object"):
        probe_linear(model(), asked(), shapes(), tokens="object", folds=3)
    probe = probe_linear(model(), asked(), shapes(), folds=3)
    with pytest.raises(InputError, match=r"layer=9.*\[0, 1"):
        probe.direction(9, "star")
    with pytest.raises(InputError, match=r"label=None.*moon, ring, star"):
        probe.direction(2)
    with pytest.raises(InputError, match="label='disc'.*star"):
        probe.direction(2, "disc")
    with pytest.raises(InputError, match="width 3.*128"):
        probe.predict(torch.zeros(1, 3), 2)
