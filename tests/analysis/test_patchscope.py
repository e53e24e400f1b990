"""Patchscopes, held against full forward passes of Hugging Face's model, and on models whose mechanism is known."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import patchscope
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.viz import lens_table
from tests.analyses import model_of as family_model
from tests.analyses import prompts as family_prompts
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.known_mechanism import OBJECTS, VARIANTS, model_of, places
from tests.oracles.naive_patchscope import continued, entering, patched
from tests.pairs import as_users_run, pair
from tests.patch_world import UNKNOWN

LAYERS, POSITIONS = [0, 2, 3], [2, 7, -1]


@pytest.mark.parametrize("name", ["plain", "grouped", "mistral-clip"])
@pytest.mark.parametrize(("at", "where"), [(None, "last"), (1, 8), (0, 3), (3, "last")])
def test_equal_to_full_forwards_of_hugging_face(name: str, at: int | None, where: Any) -> None:
    models = pair(name)
    source, target = models.prompt(seed=0), models.prompt(seed=1, n_text=9)
    n, n_target = source["input_ids"].shape[1], target["input_ids"].shape[1]
    layers = LAYERS if at is None else [0, 3]
    options: dict[str, Any] = {"layers": layers, "positions": POSITIONS, "target": target, "target_layer": at}
    found = patchscope(models.ours, source, target_position=where, max_new_tokens=3, k=4, batch_size=4, **options)
    place = n_target - 1 if where == "last" else where
    plain = models.hf_logits(target)[0, -1].softmax(-1)
    for layer in layers:
        for column, position in enumerate(POSITIONS):
            vector = entering(models.hf, source, layer)[position % n]
            to = layer if at is None else at
            p = patched(models.hf, target, to, place, vector).softmax(-1)
            cell = found.sel(layer=layer).isel(position=column)
            assert cell.token_id.values.tolist() == p.topk(4).indices.tolist()
            np.testing.assert_allclose(cell.probability.values, p.topk(4).values, atol=1e-5)
            np.testing.assert_allclose(cell.unpatched.values, plain[p.topk(4).indices], atol=1e-5)
            said = continued(models.hf, target, 3, to, place, vector)
            assert str(cell["text"].values) == " ".join(f"#{token}" for token in said)


def test_first_tokens_cost_what_the_sweep_can_reach() -> None:
    ours = pair("plain").ours
    source, target = pair("plain").prompt(), pair("plain").prompt(seed=1, n_text=9)
    found = patchscope(ours, source, positions="image", target=target, max_new_tokens=1)
    n_runs, n_layers, n = 12, 3, target["input_ids"].shape[1]
    assert (found.runs, found.n_forward, found.generated) == (n_runs, 2, 0)
    assert found.work <= 4 * (3 + 2 + 1) / (n_layers * n)  # one position through the blocks from its own on
    longer = patchscope(ours, source, positions="image", target=target, max_new_tokens=2)
    assert (longer.generated, longer.work) == (n_runs + 1, found.work)
    assert longer.probability.equals(found.probability)


@pytest.mark.parametrize("reading", VARIANTS)
@pytest.mark.parametrize("source", VARIANTS)
def test_a_patch_is_seen_where_the_mechanism_reads_it(source: str, reading: str) -> None:
    """Ring's patch says its color in an image without a ring, as long as it comes before the head that finds shapes."""
    model, reader = model_of(source), model_of(reading)  # the same residual stream, read by other heads
    asked, at = model.ask(OBJECTS, "ring"), places(model)
    target = reader.ask({(0, 3): "red star"}, "ring")
    match = next(hop.layer for hop in reader.mechanism.hops if hop.name == "match")
    positions = [at["object"], at["object"] + 1, at["word"]]
    for layer in range(reader.cfg.n_layers):
        how: dict[str, Any] = {"target": target, "target_layer": layer, "target_position": at["object"]}
        other = {} if source == reading else {"target_model": reader}
        found = patchscope(model, asked, positions=positions[:2], layers=[0], max_new_tokens=2, **how, **other)
        expected = ["Blue" if layer <= match else UNKNOWN, UNKNOWN]
        assert found["text"].values.tolist() == [expected]
        assert found.unpatched_text == UNKNOWN
        assert found.token.values[0, :, 0].tolist() == expected


def test_a_mapping_leads_to_another_width() -> None:
    models, wide = pair("plain"), make_hf_model(seed=3, d_model=64)
    reader = HookedLLaVA.from_hf(wide)
    source, target = models.prompt(), models.prompt(seed=1)
    own, wanted = models.ours.cfg.d_model, 64
    linear = torch.nn.Linear(own, wanted)
    how: dict[str, Any] = {"layers": [1], "target": target, "target_model": reader, "max_new_tokens": 1, "k": 3}
    found = patchscope(models.ours, source, mapping=linear, **how)
    vector = linear(entering(models.hf, source, 1)[-1])
    p = patched(wide, target, 1, target["input_ids"].shape[1] - 1, vector).softmax(-1)
    np.testing.assert_allclose(found.probability.values[0, 0], p.topk(3).values.detach(), atol=1e-5)
    pair_of = (linear.weight.detach(), linear.bias.detach())
    same = patchscope(models.ours, source, mapping=pair_of, **how)
    np.testing.assert_allclose(found.probability.values, same.probability.values, atol=1e-6)
    for mapping, message in (
        (None, r"d_model=48.*d_model=64.*mapping=.*48, 64"),
        (pair_of[::-1], r"\(64,\), \(64, 48\).*expected \[\(64, 48\), \(64,\)\]"),
        (torch.nn.Linear(own, 7), r"\(1, 7\).*expected \(1, 64\)"),
        (torch.nn.Linear(7, 64), r"mapping=.*\(1, 48\)"),
        (3, "mapping=3"),
    ):
        with as_users_run(), pytest.raises(InputError, match=message):
            patchscope(models.ours, source, mapping=mapping, **how)


@pytest.mark.parametrize("name", ["phi-clip", "llava_next", "onevision"])
def test_patches_of_any_layout_are_read(name: str) -> None:
    model, (source, target) = family_model(name), family_prompts(name)
    positions = source.token_map["image"].tolist()[:: max(1, len(source.token_map["image"]) // 3)]
    at = target.token_map["image"][1]
    found = patchscope(
        model, source, positions=positions, layers=[1], target=target, target_position=at, max_new_tokens=2
    )
    vectors = model.run_with_cache(source, names_filter=("resid_pre", 1))[1]["resid_pre", 1][0, positions]
    for column, vector in enumerate(vectors):

        def put(resid: torch.Tensor, hook: Any, vector: torch.Tensor = vector) -> torch.Tensor:
            return torch.cat([resid[:, :at], vector[None, None], resid[:, at + 1 :]], 1)

        logits = model.run_with_hooks(target, fwd_hooks=[(("resid_pre", 1), put)])[0, -1]
        p = logits.detach().softmax(-1).topk(5)
        np.testing.assert_allclose(found.probability.values[0, column], p.values, atol=1e-5)


@cache
def speaking() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair("plain").hf, processor=make_processor())


def test_the_identity_prompt_where_the_tokenizer_can_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = speaking()
    source = model.prepare("What color is the star?")
    with pytest.raises(InputError, match=r"'cat->cat; 1135->1135; hello->hello; \?->'.*target="):
        patchscope(model, source)
    for module in ("analysis.patchscope", "model.requirements"):
        monkeypatch.setattr(importlib.import_module(f"hooked_llava.{module}"), "IDENTITY", "red red blue blue ? red")
    found = patchscope(model, source, max_new_tokens=1)
    named = model.prepare("red red blue blue ? red", template=None)
    how: dict[str, Any] = {"target": named, "target_position": named.token_map.find("?"), "max_new_tokens": 1}
    assert found.identical(found.assign_attrs(patchscope(model, source, **how).attrs | {"seconds": found.seconds}))


def test_what_does_not_fit_is_refused_before_anything_is_run() -> None:
    model = speaking()
    source, target = model.prepare("What color is the star?"), model.prepare("red red blue")
    for options, message in (
        ({"target_position": [1, 2]}, r"target_position=\[1, 2\].*2 positions"),
        ({"target_position": 1, "target_layer": 3}, "layer 3 of the target's 3 at position 1"),
        ({"target_position": 1, "layers": [0, 3]}, "layer 3 of the target's 3 at position 1"),
        ({"target_layer": 9}, r"target_layer.*9"),
        ({"layers": 4}, r"\[4\].*layers"),
        ({"k": 1000}, "k=1000"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(InputError, match=message):
            patchscope(model, source, target=target, **options)
    with pytest.raises(SpanError, match="imge"):
        patchscope(model, source, target=target, positions="imge")
    with pytest.raises(InputError, match="patchscope.*got 2"):
        patchscope(model, model.prepare(["What color is the star?", "What color is the ring?"]), target=target)


def test_its_figure_is_the_table_of_words() -> None:
    model = speaking()
    source, target = model.prepare("What color is the star?"), model.prepare("red red blue")
    found = patchscope(model, source, positions=[1, 2], target=target, max_new_tokens=1)
    axes = lens_table(found).axes[0]
    assert axes.get_title(loc="left").startswith("Patchscope: most probable words by position")
    assert len(axes.texts) == 6
