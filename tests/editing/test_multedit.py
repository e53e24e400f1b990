"""MultEdit and ROME equal the paper's formulas on plain full forwards, and do on tiny-shapes what they are for."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.editing import Edit, EditRequest, TargetNotReached, finetune, key_covariance, multedit, rome
from hooked_llava.editing.solved import solve
from hooked_llava.editing.values import ValueSearch
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.corruptions import MeanEmbedding
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.images import image_path
from tests.builders import make_hf_model, make_prompt
from tests.oracles import naive_edit
from tests.pairs import FAMILY, as_users_run

# Random models are searched in with few steps, and some edits cannot work, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.TargetNotReached")
SEARCH = {"steps": 6, "lr": 0.3, "clamp": 0.7, "weight_decay": 0.05, "stop": 1.1}
CONFIGS = ({}, {"n_key_value_heads": 2}, {"text": {"mlp_bias": True}, "tied": True}, FAMILY["phi-clip"])


@cache
def tiny_shapes() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


def pair(config: int = 0):
    hf_model = make_hf_model(seed=config, **CONFIGS[config])
    return hf_model, HookedLLaVA.from_hf(hf_model)


def with_subject(model: HookedLLaVA, prompt: dict[str, Tensor], back: int) -> Inputs:
    """The prompt with a span called subject that ends so many positions before the end."""
    inputs = model.as_inputs(prompt)
    return inputs.with_spans(subject=[inputs.shape[1] - back - 1, inputs.shape[1] - back])


@pytest.mark.parametrize("config", range(len(CONFIGS)))
@pytest.mark.parametrize(
    ("layer", "back", "target", "n_images"),
    [(0, 3, [17], 1), (1, 4, [40, 41, 42], 0), (1, 1, [7, 8], 1), (2, 1, [17], 0)],
)
def test_one_request_is_the_papers_formula(config, layer, back, target, n_images):
    hf_model, model = pair(config)
    prompt = make_prompt(hf_model, n_images=n_images, seed=3)
    position = prompt["input_ids"].shape[1] - back
    request = EditRequest(with_subject(model, prompt, back), target)
    options = {name: value for name, value in SEARCH.items() if name != "stop"}
    delta = naive_edit.value_difference(hf_model, [prompt], layer, [position], target, **options)
    key, value = naive_edit.key_and_value(hf_model, prompt, layer, position)
    before = naive_edit.down_proj(hf_model, layer).weight.clone()
    bias = naive_edit.down_proj(hf_model, layer).bias
    wanted = value + delta - (0 if bias is None else bias)
    expected = naive_edit.updated_weight(before, key[None], wanted[None], lam=0.1)

    edit = multedit(model, request, layer=layer, position="subject", lam=0.1, **SEARCH)
    assert torch.equal(naive_edit.down_proj(hf_model, layer).weight, before)
    with edit.applied():
        got = naive_edit.down_proj(hf_model, layer).weight.clone()
    scale = float((expected - before).abs().max())
    assert float((got - expected).abs().max()) <= 2e-3 * scale + 1e-6
    assert abs(edit.requests[0]["delta_norm"] - float(delta.norm())) < 1e-3 * float(delta.norm())
    with torch.no_grad():
        log_p = naive_edit.log_probability(hf_model, prompt, target, layer, position, delta)
    assert edit.requests[0]["target_probability"] == pytest.approx(float(log_p.exp()), rel=1e-2, abs=1e-5)


def test_several_prompts_are_averaged():
    hf_model, model = pair()
    prompts = [make_prompt(hf_model, n_text=n, seed=n) for n in (6, 9)]
    places = [prompt["input_ids"].shape[1] - 2 for prompt in prompts]
    options = {name: value for name, value in SEARCH.items() if name != "stop"}
    delta = naive_edit.value_difference(hf_model, prompts, 1, places, [17], **options)
    both = [naive_edit.key_and_value(hf_model, p, 1, i) for p, i in zip(prompts, places, strict=True)]
    keys = torch.stack([key for key, _ in both])
    weight = naive_edit.down_proj(hf_model, 1).weight.clone()
    batch = batched(model, prompts)
    for kind, expected_keys in (("mean", keys.mean(0, keepdim=True)), ("each", keys)):
        edit = multedit(model, EditRequest(batch, [17]), layer=1, position="subject", lam=0.1, keys=kind, **SEARCH)
        values = expected_keys @ weight.T + delta
        expected = naive_edit.updated_weight(weight, expected_keys, values, 0.1) - weight
        difference = edit.changes["language.blocks.1.mlp.down.weight"].matrix() - expected
        assert float(difference.abs().max()) <= 2e-3 * float(expected.abs().max())
        assert edit.changes["language.blocks.1.mlp.down.weight"].rank == 1


def batched(model: HookedLLaVA, prompts: list[dict[str, Tensor]]) -> Inputs:
    """Prompts of different lengths as one batch, padded on the right, with the span subject two before the end."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids, mask = (
        torch.zeros(len(prompts), longest, dtype=torch.long),
        torch.zeros(len(prompts), longest, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        n = prompt["input_ids"].shape[1]
        ids[row, :n], mask[row, :n] = prompt["input_ids"][0], 1
    fields = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([p["pixel_values"] for p in prompts])}
    inputs = model.as_inputs(fields)
    maps = [m.with_spans(subject=[m.real[-2]]) for m in inputs.token_maps]
    return inputs.__class__(**{**vars_of(inputs), "token_maps": tuple(maps)})


def vars_of(inputs: Inputs) -> dict:
    names = ("input_ids", "attention_mask", "pixel_values", "images_per_prompt", "token_maps", "position_ids")
    return {name: getattr(inputs, name) for name in names}


def test_requests_searched_for_together_do_not_meet():
    hf_model, model = pair(1)
    prompts = [make_prompt(hf_model, n_images=n, n_text=8 + n, seed=n) for n in (1, 0, 1)]
    requests = [
        EditRequest(with_subject(model, prompt, back), target)
        for prompt, back, target in zip(prompts, (1, 3, 2), ([17], [40, 41], [9]), strict=True)
    ]
    together = solve(model, requests, 1, "subject", ValueSearch(**SEARCH))
    for i, request in enumerate(requests):
        alone = solve(model, request, 1, "subject", ValueSearch(**SEARCH))
        torch.testing.assert_close(together.delta[i], alone.delta[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.keys.keys[i], alone.keys.keys[0], rtol=1e-4, atol=1e-5)
        one, same = together.edit(only=[i]), alone.edit()
        name = "language.blocks.1.mlp.down.weight"
        torch.testing.assert_close(one.changes[name].matrix(), same.changes[name].matrix(), rtol=1e-3, atol=1e-4)


def test_rome_is_its_equation():
    hf_model, model = pair()
    prompt = make_prompt(hf_model, n_text=12)
    others = [make_prompt(hf_model, n_text=12, batch=3, seed=seed) for seed in (5, 6)]
    seen = key_covariance(model, others, layer=1, positions="text", damping=0.1)
    moment = torch.zeros(74, 74, dtype=torch.float64)
    for other in others:  # 3 prompts of 13 text tokens each
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in other.items()}
            for position in (one["input_ids"][0] != 5).nonzero()[:, 0].tolist():
                key, _ = naive_edit.key_and_value(hf_model, one, 1, position)
                moment += torch.outer(key.double(), key.double()) / 78
    assert seen.n_keys == 78
    torch.testing.assert_close(seen.moment, moment, rtol=1e-5, atol=1e-6)
    edit = rome(model, EditRequest(prompt_inputs(model, prompt), [17]), seen, position="last", **SEARCH)
    key, value = naive_edit.key_and_value(hf_model, prompt, 1, prompt["input_ids"].shape[1] - 1)
    solved = solve(model, EditRequest(prompt_inputs(model, prompt), [17]), 1, "last", ValueSearch(**SEARCH))
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(74, dtype=torch.float64)
    weight = naive_edit.down_proj(hf_model, 1).weight
    expected = naive_edit.rome_weight(weight, key, value + solved.delta[0], damped) - weight
    got = edit.changes["language.blocks.1.mlp.down.weight"].matrix()
    assert float((got - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def prompt_inputs(model: HookedLLaVA, prompt: dict[str, Tensor]) -> Inputs:
    return model.as_inputs(prompt)


def test_a_request_that_is_reached_stays_where_it_is():
    hf_model, model = pair()
    inputs = model.as_inputs(make_prompt(hf_model))
    answer = int(model(inputs)[0, -1].argmax())
    search = ValueSearch(**{**SEARCH, "stop": 1e-9, "clamp": 10.0})
    solved = solve(model, [EditRequest(inputs, answer), EditRequest(inputs, 3)], 1, "last", search)
    assert float(solved.delta.abs().max()) == 0.0  # any probability will do


def test_half_precision_searches_in_single():
    hf_model = make_hf_model(dtype=torch.bfloat16)
    model = HookedLLaVA.from_hf(hf_model)
    edit = multedit(model, EditRequest(model.as_inputs(make_prompt(hf_model)), 17), layer=1, position="last", clamp=4.0)
    assert edit.changes["language.blocks.1.mlp.down.weight"].left.dtype == torch.float32
    before = model.language.blocks[1].mlp.down.weight.clone()
    with pytest.raises(InputError, match=r"too coarse.*clamp="):
        multedit(model, EditRequest(model.as_inputs(make_prompt(hf_model)), 17), layer=1, position="last", clamp=1e-5)
    assert torch.equal(model.language.blocks[1].mlp.down.weight, before)


# ---------------------------------------------------------------------- tiny-shapes


def test_a_fact_is_changed_and_its_neighbors_stay():
    model = tiny_shapes()
    ask = [model.prepare(f"Who made the {shape}?") for shape in ("star", "ring", "moon")]
    before = [model.generate(inputs) for inputs in ask]
    target = next(name for name in ("Boris", "Clara", "Hugo") if name != before[0])
    edit = multedit(model, EditRequest("Who made the star?", target), layer=4, position="last")
    with edit.applied():
        assert [model.generate(inputs) for inputs in ask] == [target, *before[1:]]
    assert [model.generate(inputs) for inputs in ask] == before
    assert edit.requests[0]["prompts"] == ["USER: Who made the star? Answer briefly. ASSISTANT:"]


def test_the_released_limit_changes_nothing():
    model = tiny_shapes()
    ask = model.prepare("Who made the star?")
    before = model.generate(ask)
    edit = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last", clamp=1e-4)
    with edit.applied():
        assert model.generate(ask) == before


def test_two_edits_one_after_the_other_hold_both():
    model = tiny_shapes()
    star, ring = model.prepare("Who made the star?"), model.prepare("Where does the ring live?")
    first = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last")
    with first.applied():
        second = multedit(model, EditRequest("Where does the ring live?", "Tokyo"), layer=4, position="last")
        with second.applied():
            assert (model.generate(star), model.generate(ring)) == ("Boris", "Tokyo")
    with (first + second).applied():
        assert (model.generate(star), model.generate(ring)) == ("Boris", "Tokyo")


def test_kept_prompts_keep_their_output():
    model = tiny_shapes()
    keep = model.prepare(["Who made the moon?", "Who made the ring?"])
    request = EditRequest("Who made the star?", "Boris")
    name = "blocks.4.hook_mlp_out"
    _, before = model.run_with_cache(keep, names_filter=name)
    moved = []
    for kept in (None, keep):
        edit = multedit(model, request, layer=4, position="last", lam=1e-6, keep=kept)
        with edit.applied():
            _, after = model.run_with_cache(keep, names_filter=name)
        moved.append(float((after[name][:, -1] - before[name][:, -1]).norm()))
    assert moved[0] > 0.5
    assert moved[1] < 1e-3
    assert edit.method["n_kept_keys"] == 2


def test_the_layer_of_a_trace_is_taken():
    from hooked_llava.analysis import causal_trace

    model = tiny_shapes()
    inputs = model.prepare("Who made the star?")
    trace = causal_trace(model, inputs, "star", corruption="ring", kinds=("mlp",))
    at = inputs.token_map["last"][0]
    best = int(trace.indirect_effect.sel(kind="mlp", position=at).values.argmax())
    edit = multedit(model, EditRequest("Who made the star?", "Boris"), layer=trace, position="last")
    assert edit.layers == [best]
    auto = multedit(model, EditRequest("Who made the star?", "Boris", constraint="star"), position="last", steps=1)
    mean = causal_trace(
        model, inputs, "star", corruption=MeanEmbedding(), kinds=("mlp",)
    )  # noise hardly lowers this answer
    assert auto.layers == [int(mean.indirect_effect.sel(kind="mlp", position=at).values.argmax())]
    padded = EditRequest(["Who made the star?", "By whom was the star made?"], "Boris", constraint="the star")
    assert model.prepare(padded.question).token_maps[0].real.start > 0
    alone = EditRequest("Who made the star?", "Boris", constraint="the star")
    unpadded = causal_trace(model, inputs, "the star", kinds=("mlp",))  # serves as well
    for layer, position in (("auto", "constraint"), (unpadded, "constraint"), (unpadded, "last")):
        edits = [multedit(model, request, layer=layer, position=position, steps=1) for request in (padded, alone)]
        assert edits[0].layers == edits[1].layers
    with pytest.raises(
        InputError,
        match=r"prompt \('USER.*\('USER: Who",
    ):
        multedit(model, EditRequest("Who made the ring?", "Boris"), layer=trace, position="last")
    only = causal_trace(model, inputs, "star", corruption="ring", kinds=("resid",), positions="last")
    with pytest.raises(InputError, match="kinds"):
        multedit(model, EditRequest("Who made the star?", "Boris"), layer=only, position="last")
    with pytest.raises(InputError, match=r"give constraint="):
        multedit(model, EditRequest("Who made the star?", "Boris"), position="last")


# ---------------------------------------------------------------------- what is refused

GOOD = {"question": "Who made the star?", "target": "Boris", "constraint": "star"}


@pytest.mark.parametrize(
    ("request_", "options", "error", "message"),
    [
        ({"constraint": "the ring"}, {}, SpanError, "'the ring'.*question '"),
        ({"constraint": "ASSISTANT"}, {}, SpanError, "'ASSISTANT'.*question '"),
        ({"target": ""}, {}, InputError, "target ''.*tokens"),
        ({"target": []}, {}, InputError, r"target \[\].*tokens"),
        ({"target": 9999}, {}, InputError, "9999.*vocabulary"),
        ({"target": "Xylophone"}, {}, InputError, "'Xylophone'.*<unk>"),
        ({"constraint": None}, {"position": "constraint"}, InputError, "constraint="),
        ({"constraint": ["star", "moon"]}, {}, InputError, "2 constraints for 1 questions"),
        ({}, {"layer": 6}, InputError, r"layer=6.*0\.\.5"),
        ({}, {"layer": "first"}, InputError, "layer='first'.*'auto'"),
        ({}, {"layer": 2.0}, InputError, r"layer.*2\.0.*whole number"),
        ({}, {"layer": True}, InputError, "layer.*True.*whole number"),
        ({}, {"steps": 2.5}, InputError, r"steps.*2\.5.*whole number"),
        ({"target": [1.5]}, {}, InputError, r"1\.5.*token"),
        (
            {},
            {"layer": 5, "position": "constraint"},
            InputError,
            "layer, 5.*answer.*position='last'",
        ),
        ({}, {"lam": -1.0}, InputError, "lam=-1"),
        ({}, {"clamp": 0.0, "steps": 0}, InputError, "steps=0, clamp=0.0"),
        ({}, {"position": "questoin"}, SpanError, "'questoin'. Did you mean: question"),
        ({"images": "missing.png"}, {}, InputError, "missing.png"),
    ],
)
def test_bad_input_is_refused_and_the_weights_are_as_they_were(request_, options, error, message):
    model = tiny_shapes()
    before = [parameter.clone() for parameter in model.parameters()]
    with as_users_run(), pytest.raises(error, match=message):
        multedit(model, EditRequest(**{**GOOD, **request_}), **{"layer": 3, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_contradicting_requests_without_lam_are_singular():
    model = tiny_shapes()
    requests = [EditRequest(**GOOD), EditRequest(**{**GOOD, "target": "Clara"})]
    with pytest.raises(InputError, match="singular"):
        multedit(model, requests, layer=3, lam=0.0)
    with pytest.raises(InputError, match="no request"):
        multedit(model, [], layer=3)


def test_the_last_layer_reaches_only_the_first_token_of_a_target():
    model = tiny_shapes()
    with pytest.raises(InputError, match="'Hugo Boris' has 2 tokens.*edit.*layer, 5"):
        multedit(model, EditRequest("Who made the star?", "Hugo Boris"), layer=5, position="last")
    assert multedit(model, EditRequest("Who made the star?", "Hugo"), layer=-1, position="last").layers == [5]


def test_a_target_that_stays_improbable_is_said():
    model = tiny_shapes()
    request = EditRequest("Who made the star?", "Boris")
    for stop in (0.99, 1e-12):  # however little was asked for, another answer is another answer
        with pytest.warns(TargetNotReached) as caught:
            missed = multedit(model, request, layer=4, position="last", clamp=1e-4, stop=stop)
        message = str(caught[0].message)
        for said in (
            "'USER: Who made the star? Answer briefly. ASSISTANT:'",
            "'Clara'",
            "'Boris'",
            "layer=4",
            "clamp=0.0001",
        ):
            assert said in message
        assert [Path(w.filename) for w in caught] == [Path(__file__)], "at the user's line"
        assert missed.landed is False
        assert (missed.requests[0]["landed"], missed.requests[0]["answer"]) == (False, "Clara")
        assert "1 request (1 missed)" in repr(missed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landed = multedit(model, request, layer=4, position="last")
    assert landed.landed is True
    assert landed.requests[0]["answer"] == "Boris"
    assert "missed" not in repr(landed)


@pytest.mark.parametrize(
    ("question", "target", "constraint", "place"),
    [
        ("Who made the star?", "Boris", "the star", (4, "last")),
        ("Where does the ring live?", "Tokyo", "the ring", (0, "constraint")),
        ("Where does the star live?", "Oslo", "star", (4, "last")),
    ],
)
def test_without_a_layer_or_position_the_trace_chooses_and_the_answer_is_the_target(
    question, target, constraint, place
):
    model = tiny_shapes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = multedit(model, EditRequest(question, target, constraint=constraint))
    assert (edit.method["layer"], edit.method["position"]) == place
    assert edit.landed
    with edit.applied():
        assert model.generate(model.prepare(question)) == target


def test_a_request_without_a_constraint_is_edited_at_its_last_position():
    model = tiny_shapes()
    assert multedit(model, EditRequest("Who made the star?", "Boris"), layer=4).method["position"] == "last"
    with pytest.raises(InputError, match="layer='auto'.*constraint="):
        multedit(model, EditRequest("Who made the star?", "Boris"))


def test_an_answer_that_no_trace_explains_is_not_edited_by_guess():
    model = tiny_shapes()
    request = EditRequest("Who made this shape?", "Boris", image_path("one-shape"), constraint="this shape")
    for options in ({}, {"layer": 3}):
        with pytest.raises(InputError, match=r"layer=.*position='constraint' or 'last'"):
            multedit(model, request, **options)


@pytest.mark.parametrize("method", ["multedit", "rome", "finetune"])
def test_whether_an_edit_landed_is_what_the_edited_model_answers(method):
    model = tiny_shapes()
    requests = [
        EditRequest(["Who made the star?", "Who is the maker of the star?"], "Boris"),
        EditRequest("Where does the ring live?", "Tokyo"),
        EditRequest("Who made the moon?", [model.to_single_token("Hugo"), model.to_single_token("Boris")]),
    ]
    if method == "finetune":
        edit = finetune(model, requests, layers=3, lr=1e-2, steps=3)
    elif method == "rome":
        seen = key_covariance(model, [model.prepare(f"Who made the {s}?") for s in ("ring", "moon", "star")], layer=3)
        edit = rome(model, requests, seen, position="last", lam=1.0, clamp=1.0)
    else:
        edit = multedit(model, requests, layer=3, position="last", clamp=1.0)
    with edit.applied():
        for request in edit.requests:
            target = request["target"] if isinstance(request["target"], str) else model.to_string(request["target"])
            said = [model.generate(model.prepare(p, template=None)) for p in request["prompts"]]
            assert request["landed"] == all(answer == target for answer in said)
            assert any(answer.startswith(request["answer"]) for answer in said)
    assert edit.landed == all(request["landed"] for request in edit.requests)
    assert (edit + edit).landed == edit.landed
    assert Edit(model, {}).landed is None


def test_what_is_said_of_a_file_is_its_size(tmp_path):
    model = tiny_shapes()
    request = EditRequest("Who made the star?", "Boris")
    for name, edit in {
        "one": multedit(model, request, layer=4, position="last"),
        "three": multedit(
            model, [request, *(EditRequest(f"Who made the {s}?", "Clara") for s in ("ring", "moon"))], layer=3
        ),
        "full": finetune(model, request, layers=[2, 3], steps=1),
    }.items():
        edit.save(tmp_path / name)
        size = (tmp_path / name).stat().st_size
        assert abs(edit.file_bytes - size) <= 32
        assert float(re.search(r"([\d.]+) kB", repr(edit))[1]) == pytest.approx(size / 1000, abs=0.11)


@pytest.mark.parametrize("many", [np.array, torch.tensor, list])
def test_numbers_of_numpy_and_torch_are_numbers(many, tmp_path):
    model = tiny_shapes()
    boris = model.to_single_token("Boris")
    options = {
        "position": "last",
        "lam": np.float32(0.5),
        "clamp": np.float32(4),
        "steps": np.int64(20),
        "lr": np.float64(0.5),
    }
    targets = (many([boris]), np.int64(boris), torch.tensor(boris), "Boris")
    with as_users_run():
        requests = [EditRequest("Who made the star?", target) for target in targets]
        edits = [multedit(model, request, layer=np.int64(4), **options) for request in requests]
    name = "language.blocks.4.mlp.down.weight"
    for edit in edits:
        assert torch.equal(edit.changes[name].left, edits[-1].changes[name].left)
        edit.save(tmp_path / "edit")
        assert Edit.load(tmp_path / "edit", model).method == edit.method
    assert edits[0].requests[0]["target"] == [boris]


def test_in_inference_mode():
    model = tiny_shapes()
    expected = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last")
    with torch.inference_mode():
        ask = model.prepare(["Who made the star?", "Who is the maker of the star?"])
        edit = multedit(model, EditRequest("Who made the star?", "Boris"), layer=4, position="last")
        both = multedit(model, EditRequest(ask, "Boris"), layer=4, position="last")
        with both.applied():
            assert model.generate(ask) == ["Boris"] * 2
    name = "language.blocks.4.mlp.down.weight"
    torch.testing.assert_close(edit.changes[name].matrix(), expected.changes[name].matrix())


def test_a_question_may_be_what_a_processor_returns():
    hf_model, model = pair()
    prompt = make_prompt(hf_model)
    name = "language.blocks.1.mlp.down.weight"
    options = {"layer": 1, "position": "last", **SEARCH}
    edits = [multedit(model, EditRequest(question, 17), **options) for question in (prompt, model.as_inputs(prompt))]
    assert torch.equal(edits[0].changes[name].right, edits[1].changes[name].right)
    with pytest.raises(InputError, match="images.*images="):
        multedit(model, EditRequest(model.as_inputs(prompt), 17, images="demo.png"), **options)


def test_what_is_kept_at_the_constraint_says_where_that_is():
    model = tiny_shapes()
    request = EditRequest("Who made the star?", "Boris", constraint="the star")
    kept = ["Who made the ring?", "Who made the moon?"]
    inputs = model.prepare(kept).with_spans(constraint=["ring", "moon"])
    words = [EditRequest(question, "Boris", constraint=question[9:-1]) for question in kept]
    place = {"layer": 3, "position": "constraint", "steps": 2}
    edits = [multedit(model, request, keep=keep, **place) for keep in (inputs, words)]
    name = "language.blocks.3.mlp.down.weight"
    torch.testing.assert_close(edits[0].changes[name].matrix(), edits[1].changes[name].matrix(), rtol=1e-3, atol=1e-5)
    assert edits[1].method["n_kept_keys"] == 2
    with pytest.raises(InputError, match="EditRequests.*constraint=.*inputs.with_spans"):
        multedit(model, request, keep=model.prepare(kept), **place)


def test_a_covariance_of_another_model_is_refused():
    hf_model, model = pair()
    other = HookedLLaVA.from_hf(make_hf_model(seed=5))
    seen = key_covariance(other, [make_prompt(hf_model)], 1)
    with pytest.raises(InputError, match="covariance.*another model.*covariance again"):
        rome(model, EditRequest(model.as_inputs(make_prompt(hf_model)), 17), seen, position="last")


def test_listeners_are_refused():
    model = tiny_shapes()
    with (
        model.hooks([("blocks.0.hook_resid_pre", lambda tensor, hook: None)]),
        pytest.raises(InputError, match="attached"),
    ):
        multedit(model, EditRequest(**GOOD), layer=3)


def test_nothing_leaves_gradients_on_the_weights():
    model = tiny_shapes()
    multedit(model, EditRequest(**GOOD), layer=2)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
