"""The model set by hand is what it says it is: its answers, its streams, its heads, and nothing besides."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

from hooked_llava.errors import InputError
from hooked_llava.readout.metrics import Answer, logit_difference
from tests.compiled import CompiledLLaVA, compiled
from tests.pairs import as_users_run
from tests.patch_world import (
    COLORS,
    GRID,
    PATCH_SIZE,
    SHAPES,
    UNKNOWN,
    image,
    questions,
    sample_objects,
)

OBJECTS = {(0, 3): "red star", (2, 1): "blue ring", (4, 4): "green cross"}
VARIANTS = ("direct", "two_hops")


@pytest.fixture(scope="module", params=VARIANTS)
def model(request) -> CompiledLLaVA:
    return compiled(request.param)


def first_words(model, asked, images) -> list[str]:
    inputs = model.prepare(asked, images)
    logits = model(inputs)[torch.arange(len(asked)), inputs.last]
    return [model.to_string(token) for token in logits.argmax(-1)]


@pytest.mark.parametrize("seed", range(4))
def test_every_question_is_answered(model, seed):
    objects = sample_objects(np.random.default_rng(seed))
    asked = questions(objects)
    shown = [image(objects)] * len(asked)
    assert first_words(model, [q.text for q in asked], shown) == [q.answer for q in asked]


def test_every_shape_is_read_in_every_color_and_place(model):
    asked, shown, answers = [], [], []
    for number, (shape, color) in enumerate((s, c) for s in SHAPES for c in COLORS):
        asked.append(f"What color is the {shape}?")
        shown.append(image({divmod(number % GRID**2, GRID): f"{color} {shape}"}))
        answers.append(color.capitalize())
    assert first_words(model, asked, shown) == answers


def test_the_answer_is_one_word_and_the_shape_may_be_absent(model):
    assert model.generate(model.ask(OBJECTS, "ring")) == "Blue"
    assert model.generate(model.ask(OBJECTS, "circle", phrasing=1)) == UNKNOWN
    assert model.generate(model.prepare("What color is the ring?")) == UNKNOWN  # no image at all


def test_plain_transformers_gives_the_same_logits(model, tmp_path):
    logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "checkpoint")
    hf_model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").eval()
    inputs = model.prepare([q.text for q in questions(OBJECTS)], [image(OBJECTS)] * len(questions(OBJECTS)))
    given = {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}
    with torch.no_grad():
        theirs = hf_model(**given, attention_mask=inputs.attention_mask.long()).logits
    real = inputs.attention_mask
    assert torch.allclose(model(inputs)[real], theirs[real], atol=1e-5)
    loaded = CompiledLLaVA.from_pretrained(tmp_path / "checkpoint")
    assert loaded.generate(loaded.ask(OBJECTS, "star")) == "Red"


def test_the_stream_holds_one_value_in_each_slot_at_every_layer_and_position(model):
    _, cache = model.run_with_cache(model.ask(OBJECTS, "ring"), names_filter=["resid_pre", "resid_post"])
    states = torch.cat(list(cache.values()))
    exact = states.round()
    assert set(exact.unique().tolist()) == {0.0, 1.0}
    assert (states - exact)[exact == 0].abs().max() < 1e-6  # nothing leaks where nothing is
    assert (states - exact).abs().max() < 1e-5
    assert exact.sum(-1).unique().tolist() == [6.0]


def test_the_norms_change_nothing(model):
    _, cache = model.run_with_cache(model.ask(OBJECTS, "ring"), names_filter=["resid_pre", "ln1.hook_normalized"])
    for layer, block in enumerate(model.blocks):
        read = cache[f"blocks.{layer}.ln1.hook_normalized"] * block.ln1.weight
        assert torch.allclose(read, cache["resid_pre", layer], atol=1e-5)


def test_each_head_of_the_mechanism_looks_at_one_place_only(model):
    inputs = model.ask(OBJECTS, "ring")
    _, cache = model.run_with_cache(inputs, names_filter="pattern", remove_batch_dim=True)
    for hop in model.mechanism.hops:
        reader, read = inputs.token_map[hop.target][0], inputs.token_map[hop.source][0]
        expected = torch.zeros(inputs.shape[1], inputs.shape[1])
        expected[:, 0] = 1.0  # everybody else looks at the beginning
        expected[reader] = torch.eye(inputs.shape[1])[read]
        assert torch.equal(cache["pattern", hop.layer][hop.head], expected)


def test_if_the_shape_is_absent_the_match_looks_at_the_beginning(model):
    inputs = model.ask(OBJECTS, "circle")
    _, cache = model.run_with_cache(inputs, names_filter="pattern", remove_batch_dim=True)
    match = next(hop for hop in model.mechanism.hops if hop.name == "match")
    assert cache["pattern", match.layer][match.head][inputs.token_map[match.target][0], 0] == 1


def test_everything_else_writes_nothing(model):
    inputs = model.ask(OBJECTS, "ring")
    _, cache = model.run_with_cache(inputs, names_filter=["result", "mlp_out"], remove_batch_dim=True)
    written = torch.stack(
        [cache["result", layer] for layer in range(model.cfg.n_layers)]
    )  # (layer, pos, head, d_model)
    places = written.abs().sum(-1).transpose(1, 2).nonzero().tolist()
    assert places == [[hop.layer, hop.head, inputs.token_map[hop.target][0]] for hop in model.mechanism.hops]
    assert all(not cache["mlp_out", layer].any() for layer in range(model.cfg.n_layers))
    _, seen = model.run_with_cache(inputs, names_filter="vision.*")
    assert torch.equal(seen["vision.hook_out"], seen["vision.hook_embed"][:, 1:])


def test_one_hidden_unit_of_the_projector_fires_for_each_shape_and_color(model):
    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    shown = [image({(1, 2): name}) for name in names]
    _, cache = model.run_with_cache(
        model.prepare(["What color is the star?"] * len(names), shown), names_filter="projector.hook_post"
    )
    post = cache["projector.hook_post"].unflatten(1, (GRID, GRID))[..., : len(names)]  # (image, row, column, unit)
    at_object = post[:, 1, 2]
    assert torch.allclose(at_object, torch.diag(at_object.diagonal()), atol=0)
    assert torch.allclose(at_object.diagonal(), torch.tensor(16.0), atol=1e-4)
    post[:, 1, 2] = 0
    assert not post.any()


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_uniform_patch_is_blank_whatever_its_color(model, level):
    pixels = np.array(image(OBJECTS))
    pixels[:PATCH_SIZE, 3 * PATCH_SIZE : 4 * PATCH_SIZE] = (level, 255 - level, 40)  # where the star was
    assert first_words(model, ["What color is the star?", "What color is the ring?"], [pixels, pixels]) == [
        UNKNOWN,
        "Blue",
    ]


def test_it_works_in_bfloat16(model):
    half = compiled(model.mechanism.variant).to(torch.bfloat16)
    asked = questions(OBJECTS)
    assert first_words(half, [q.text for q in asked], [image(OBJECTS)] * len(asked)) == [q.answer for q in asked]


@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_attention_gives_the_same_answers_and_has_gradients(variant):
    soft = compiled(variant, sharpness=4.0)
    asked = questions(OBJECTS)
    assert first_words(soft, [q.text for q in asked], [image(OBJECTS)] * len(asked)) == [q.answer for q in asked]
    difference = logit_difference(Answer.of(soft, "Blue"), Answer.of(soft, UNKNOWN))
    for model, flows in ((soft, True), (compiled(variant), False)):
        inputs = model.ask(OBJECTS, "ring")
        match = next(hop for hop in model.mechanism.hops if hop.name == "match")
        name = f"blocks.{match.layer}.attn.hook_q"
        _, cache = model.run_with_cache(
            inputs, names_filter=name, incl_bwd=True, metric=lambda logits: difference(logits[0, -1]).sum()
        )
        assert bool(cache[f"{name}_grad"].any()) is flows


def test_building_it_twice_gives_the_same_weights(model):
    again = compiled(model.mechanism.variant)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_mechanism_as_data():
    direct, two_hops = (compiled(variant).mechanism for variant in VARIANTS)
    assert direct.heads == [(1, 2), (3, 0)]
    assert direct.edges == {"question->last": 1, "image->last": 3}
    assert direct.route("shape") == ["word", "word", "last", "last", "last"]
    assert two_hops.heads == [(1, 1), (3, 3)]
    assert two_hops.edges == {"image->question": 1, "question->last": 3}
    assert two_hops.route("shape") == ["word", "word", "word", "word", "last"]
    assert two_hops.route("color") == ["object", "object", "word", "word", "last"]


def test_spans_of_a_question(model):
    inputs = model.ask(OBJECTS, "ring", phrasing=1)
    token_map = inputs.token_map
    assert token_map.words is not None
    assert token_map.labels[token_map["word"][0]] == "ring"
    assert token_map.position_to_patch(token_map["object"][0]) == (0, 2, 1)
    assert "object" not in model.ask(OBJECTS, "circle").token_map


def test_what_is_not_of_this_world_is_refused(model):
    with (
        as_users_run(),
        pytest.raises(InputError, match="variant 'three_hops'.*two_hops"),
    ):
        compiled("three_hops")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape='heart', phrasing=0"):
        model.ask(OBJECTS, "heart")
    with pytest.raises(InputError, match=r"phrasing=2; expected .* and 0 to 1"):
        model.ask(OBJECTS, "star", phrasing=2)
