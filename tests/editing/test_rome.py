"""ROME with its authors' options is what their code computes, written out on plain forwards of Hugging Face's model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.editing import ROME_RELEASED, EditRequest, generated_contexts, key_covariance, rome
from hooked_llava.editing.contexts import after_contexts
from hooked_llava.editing.request import prepare_request
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.oracles import naive_edit
from tests.pairs import as_users_run

# Random models are searched in with few steps.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")
LAYER, WEIGHT = 1, "language.blocks.1.mlp.down.weight"
QUESTION, SUBJECT = "What color is the star?", "the star"
CONTEXTS = ["The red circle is.", "The star is blue."]


@cache
def pair() -> tuple[Any, HookedLLaVA]:
    hf_model = make_hf_model(image_size=32)
    return hf_model, HookedLLaVA.from_hf(hf_model, make_processor(image_size=32))


def picture() -> Any:
    return np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)


@cache
def covariance() -> Any:
    _, model = pair()
    return key_covariance(
        model, [model.prepare(["Is the star red or blue?", "Who made the ring?"])], LAYER, damping=0.1
    )


def plainly(question: str) -> tuple[dict[str, Tensor], Any]:
    """The prompt that a question makes, as tensors, and where its words are."""
    _, model = pair()
    inputs = model.prepare(question, picture())
    return {"input_ids": inputs.input_ids, "attention_mask": torch.ones_like(inputs.input_ids),
            "pixel_values": inputs.pixel_values}, inputs.token_map  # fmt: skip


@pytest.mark.parametrize(("position", "n_target"), [("constraint", 1), ("last", 2)])
def test_the_released_settings_are_the_released_code(position, n_target):
    hf_model, model = pair()
    target = [17, 4][:n_target]
    prompts, places = [], []
    for question in (QUESTION, *(f"{context} {QUESTION}" for context in CONTEXTS)):
        prompt, words = plainly(question)
        prompts.append(prompt)
        subject = words.find(SUBJECT, occurrence=question.count(SUBJECT) - 1)
        places.append(subject[-1] if position == "constraint" else prompt["input_ids"].shape[1] - 1)
    essence, words = plainly(f"{SUBJECT} is a")
    place = words.find(SUBJECT)[-1] if position == "constraint" else essence["input_ids"].shape[1] - 1
    delta = naive_edit.released_rome_value(hf_model, prompts, places, essence, place, target, LAYER)
    keys = torch.stack(
        [naive_edit.key_and_value(hf_model, *one)[0] for one in zip(prompts, [LAYER] * 3, places, strict=True)]
    )
    moment = covariance().moment
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    before = naive_edit.down_proj(hf_model, LAYER).weight.clone()
    expected = naive_edit.released_rome_weight(before, keys, delta, damped) - before

    request = EditRequest(QUESTION, target, images=picture(), constraint=SUBJECT)
    options = {**ROME_RELEASED, "contexts": CONTEXTS}
    edit = rome(model, request, covariance(), position=position, **options)
    got = edit.changes[WEIGHT].matrix()
    assert float((got - expected).abs().max()) <= 5e-3 * float(expected.abs().max())
    assert edit.requests[0]["delta_norm"] == pytest.approx(float(delta.norm()), rel=2e-3)
    assert edit.requests[0]["prompts"] == [model.prepare(QUESTION, picture()).prompts[0]]
    assert edit.method["contexts"] == CONTEXTS
    assert {name: edit.method[name] for name in ("stop", "stop_loss", "per_token", "kl", "kl_at", "weight_decay")} == {
        name: ROME_RELEASED[name] for name in ("stop", "stop_loss", "per_token", "kl", "kl_at", "weight_decay")
    }


def test_each_option_changes_the_edit_and_the_defaults_do_not():
    _, model = pair()
    request = EditRequest(QUESTION, [17, 4], images=picture(), constraint=SUBJECT)
    how = {"position": "last", "steps": 5, "lr": 0.2}
    plain = rome(model, request, covariance(), **how)
    assert set(plain.method) == {"name", "layer", "position", "lam", "keys", "steps", "lr", "clamp", "weight_decay", "stop",
                                 "n_kept_keys", "seconds"}  # fmt: skip
    reference = plain.changes[WEIGHT].matrix()
    same = rome(model, request, covariance(), **how, keys="plain", kl_at="edited", contexts=[])
    torch.testing.assert_close(same.changes[WEIGHT].matrix(), reference)
    for options in (
        {"contexts": CONTEXTS},
        {"kl": 5.0},
        {"kl": 5.0, "kl_prompt": "Is the {} red?"},
        {"per_token": True, "weight_decay": 1.0},
        {"stop_loss": 1e3},
    ):
        other = rome(model, request, covariance(), **how, **options).changes[WEIGHT].matrix()
        assert float((other - reference).norm()) > 1e-3 * float(reference.norm()), options
    assert not rome(model, request, covariance(), **how, stop_loss=1e3).changes[WEIGHT].matrix().any()


def test_the_edited_token_is_the_same_after_a_context():
    _, model = pair()
    for position in ("constraint", "last", "question"):
        asked = [QUESTION, "Is the star red or blue?"]
        request = EditRequest(asked, "red", images=[picture(), picture()], constraint=SUBJECT)
        prepared = prepare_request(model, request, position)
        longer = after_contexts(model, prepared, CONTEXTS)
        assert len(longer.inputs) == 4
        assert longer.targets == tuple(t for t in prepared.targets for _ in CONTEXTS)
        ids = longer.inputs.input_ids
        for row, place in enumerate(longer.positions):
            own = prepared.inputs.input_ids[row // 2]
            assert ids[row, place] == own[prepared.positions[row // 2]]
            assert longer.from_end[row] == prepared.from_end[row // 2]
            assert len(ids[row]) - int(longer.inputs.token_maps[row].real.start) > len(own)


def test_contexts_are_drawn_from_the_model():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    made = generated_contexts(model)
    assert len(made) == 20
    assert made == generated_contexts(model)
    assert made[:10] != generated_contexts(model, seed=1)[:10]
    words = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in made]
    assert max(words[:10]) <= 6 < max(words[10:]) <= 11  # the final full stop is added
    with pytest.raises(InputError, match="tokens.*1.*more than the 1 of 'The'"):
        generated_contexts(model, [(1, 2)])
    with pytest.raises(InputError, match="number of contexts.*0"):
        generated_contexts(model, [(5, 0)])


def test_what_cannot_be_written_is_refused():
    _, model = pair()
    given = {"target": "red", "constraint": SUBJECT}
    text = EditRequest(QUESTION, images=picture(), **given)
    ids, _ = plainly(QUESTION)
    for request, options, message in (
        (text, {"contexts": "made up"}, "contexts='made up'.*'generated'"),
        (text, {"contexts": ["The red.", " "]}, r"contexts\[1\] is ' '"),
        (text, {"kl": 1.0, "kl_prompt": "is a"}, "kl_prompt='is a'.*{}"),
        (text, {"kl": -1.0}, "kl=-1.0"),
        (text, {"stop_loss": 0.0}, "stop_loss=0.0"),
        (text, {"kl_at": "end"}, "kl_at.*'end'.*'last'.*'edited'"),
        (text, {"keys": "all"}, "keys.*'all'.*'plain'"),
        (EditRequest(QUESTION, "red", images=picture()), {"kl": 1.0}, "kl=.*'USER.*constraint="),
        (EditRequest(ids, 17), {"contexts": CONTEXTS}, "contexts=.*token ids.*text"),
    ):
        with as_users_run(), pytest.raises(InputError, match=message):
            rome(model, request, covariance(), position="last", steps=1, **options)
