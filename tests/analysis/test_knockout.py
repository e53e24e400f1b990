"""Attention knockout, held against full forward passes of Hugging Face's model with masked scores."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import attention_knockout, flow_summary, knockout_study
from hooked_llava.datasets import by_kind
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.edges import edges_of, marked
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.metrics import teacher_forced
from hooked_llava.replay import Replay
from hooked_llava.results.arrays import load, save
from tests.builders import make_hf_model, make_prompt
from tests.oracles.plain_knockout import appended, knocked_out, log_probability, relative_change, window_of
from tests.pairs import batch, pair

# <s> image image image image text | question question question | rest | last
QUESTION, OBJECT = [6, 7, 8], [2, 4]
SPANS = {"image": [1, 2, 3, 4], "question": QUESTION, "rest": [9], "last": [10]}
EDGES = {
    "question->last": (SPANS["question"], SPANS["last"]),
    "image->last": (SPANS["image"], SPANS["last"]),
    "last->last": (SPANS["last"], SPANS["last"]),
    "image->question": (SPANS["image"], SPANS["question"]),
    "object->question": (OBJECT, SPANS["question"]),
    "other->question": ([1, 3], SPANS["question"]),
    "question|rest->last": ([6, 7, 8, 9], SPANS["last"]),
    "image-object->question|rest|last": ([1, 3], [6, 7, 8, 9, 10]),
}


@functools.cache
def prompt(seed: int = 0, n_text: int = 6) -> dict[str, torch.Tensor]:
    return pair("plain").prompt(seed=seed, n_text=n_text)


def prepared(ours: HookedLLaVA, given: dict[str, torch.Tensor], shift: int = 0) -> Inputs:
    where = {"question": [p + shift for p in QUESTION], "object": [p + shift for p in OBJECT]}
    return ours.as_inputs(given).with_spans(**where)


@functools.cache
def deep(name: str) -> Any:
    hf = make_hf_model(n_layers=5, **({"n_heads": 6, "n_key_value_heads": 2} if name == "grouped" else {}))
    return hf, HookedLLaVA.from_hf(hf)


@pytest.mark.parametrize("name", ["plain", "grouped"])
@pytest.mark.parametrize("window", [1, 3, 4])
def test_equal_to_full_forwards_of_hugging_face_with_masked_scores(name: str, window: int) -> None:
    hf, ours = deep(name)
    given = make_prompt(hf, n_text=6)
    inputs = prepared(ours, given)
    assert inputs.token_map["rest"] == [5, 9]  # the line end behind the image is template as well
    edges = EDGES | {
        "question|rest->last": ([5, 6, 7, 8, 9], [10]),
        "image-object->question|rest|last": ([1, 3], range(5, 11)),
    }
    result = attention_knockout(ours, inputs, list(edges), window)
    before = knocked_out(hf, given, [], [], [])
    for edge, (source, target) in edges.items():
        for layer in range(5):
            after = knocked_out(hf, given, window_of(layer, window, 5), source, list(target))
            cell = result.sel(edge=edge, layer=layer)
            assert float(cell.effect) == pytest.approx(relative_change(before, after), abs=2e-3)
            assert float(cell.answer_kept) == float(after.argmax() == before.argmax())
    assert float(result.base) == pytest.approx(before.softmax(-1).max().item(), abs=1e-6)


def test_other_metrics_are_given_as_their_change() -> None:
    hf, ours = deep("plain")
    given = make_prompt(hf, n_text=6)
    inputs, edges = prepared(ours, given), ["image->question", "question->last"]
    before = knocked_out(hf, given, [], [], [])
    answer, other = 20, 31

    def measures(x: torch.Tensor) -> dict[str, float]:
        p = x.softmax(-1)[answer].item()
        return {"probability": p, "log_probability": np.log(p), "logit_difference": (x[answer] - x[other]).item()}

    for metric, base in measures(before).items():
        extra = {"baseline": other} if metric == "logit_difference" else {}
        result = attention_knockout(ours, inputs, edges, 2, answer=answer, metric=metric, centers=[3, -5], **extra)
        assert result.layer.values.tolist() == [3, 0]
        assert float(result.base) == pytest.approx(base, abs=1e-5)
        for edge in edges:
            for layer in (3, 0):
                after = knocked_out(hf, given, window_of(layer, 2, 5), *EDGES[edge])
                assert float(result.effect.sel(edge=edge, layer=layer)) == pytest.approx(
                    measures(after)[metric] - base, abs=1e-4
                )
    mine = attention_knockout(ours, inputs, edges, 2, metric=lambda x: x[..., answer], centers=[3])
    after = knocked_out(hf, given, window_of(3, 2, 5), *EDGES[edges[0]])
    assert float(mine.effect[0, 0]) == pytest.approx((after[answer] - before[answer]).item(), abs=1e-4)
    assert mine.attrs["metric"] == "custom"


@pytest.mark.parametrize("name", ["plain", "grouped"])
@pytest.mark.parametrize("factor", [0.4, 5.0])
def test_a_factor_multiplies_the_pattern_and_its_rows_are_normalised_again(name: str, factor: float) -> None:
    hf, ours = deep(name)
    given = make_prompt(hf, n_text=6)
    inputs, edges = prepared(ours, given), ["image->question", "question->last"]
    result = attention_knockout(ours, inputs, edges, 2, factor=factor)
    blocked = attention_knockout(ours, inputs, edges, 2)
    assert result.attrs["factor"] == factor
    assert "factor" not in blocked.attrs
    assert result.attrs["work"] == blocked.attrs["work"] < 3.0  # of ten runs
    before = knocked_out(hf, given, [], [], [])
    for edge in edges:
        for layer in range(5):
            after = knocked_out(hf, given, window_of(layer, 2, 5), *EDGES[edge], factor=factor)
            expected = relative_change(before, after)
            assert float(result.effect.sel(edge=edge, layer=layer)) == pytest.approx(expected, abs=2e-3)
            assert abs(expected) > 1e-3 or layer > 3
    assert attention_knockout(ours, inputs, edges, 2, factor=0).equals(blocked)
    with pytest.raises(InputError, match=r"factor=-1.*at least 0"):
        attention_knockout(ours, inputs, edges, factor=-1)


WHOLE = [20, 31, 7]  # three tokens: predicted at 10, 11 and 12
PREDICTING = [10, 11, 12]
OF_WHOLE = {
    "question->last": (QUESTION, PREDICTING),
    "image->question": ([1, 2, 3, 4], QUESTION),
    "last->last": (PREDICTING, PREDICTING),
    "question|rest->last": ([5, 6, 7, 8, 9], PREDICTING),
    "question->answer": (QUESTION, [11, 12, 13]),
}


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_an_answer_of_several_tokens_is_measured_as_a_whole(name: str) -> None:
    """`last` is every position that predicts one of its tokens: full forward passes of the prompt with the answer."""
    hf, ours = deep(name)
    given = make_prompt(hf, n_text=6)
    longer = appended(given, WHOLE)
    inputs = prepared(ours, given)
    before = knocked_out(hf, longer, [], [], [], PREDICTING)
    base = log_probability(before, WHOLE)
    for metric in ("log_probability", "relative_change", "probability"):
        result = attention_knockout(ours, inputs, list(OF_WHOLE), 2, answer=[WHOLE], metric=metric, total=True)
        for edge, ends in OF_WHOLE.items():
            for layer in (*range(5), None):
                window = range(5) if layer is None else window_of(layer, 2, 5)
                logits = knocked_out(hf, longer, window, *ends, PREDICTING)
                log_p = log_probability(logits, WHOLE)
                cell = result.sel(edge=edge, **({} if layer is None else {"layer": layer}))
                effect, kept = (
                    (cell.effect, cell.answer_kept)
                    if layer is not None
                    else (
                        cell.total_effect,
                        cell.total_answer_kept,
                    )
                )
                expected = {
                    "log_probability": log_p - base,
                    "relative_change": 100 * np.expm1(log_p - base),
                    "probability": np.exp(log_p) - np.exp(base),
                }[metric]
                assert float(effect) == pytest.approx(expected, rel=2e-3, abs=1e-5)
                assert bool(kept) == (logits.argmax(-1).tolist() == WHOLE)
        assert result.attrs["measured"] == "whole answer"
        assert result.attrs["answer_tokens"] == [f"#{i}" for i in WHOLE]
        assert result.attrs["last_is"] == "the positions that predict the answer's tokens"
        assert result.attrs["n_forward"] == 1


def test_inputs_with_an_answer_are_measured_on_it() -> None:
    hf, ours = deep("plain")
    inputs = prepared(ours, make_prompt(hf, n_text=6))
    forced = teacher_forced(ours, inputs, WHOLE)
    expected = attention_knockout(ours, inputs, list(OF_WHOLE), 2, answer=[WHOLE], metric="log_probability")
    for metric in ("log_probability", forced.metric):
        found = attention_knockout(ours, forced.inputs, list(OF_WHOLE), 2, metric=metric)
        np.testing.assert_allclose(found.effect, expected.effect, atol=1e-5)
        assert found.attrs["answer_tokens"] == expected.attrs["answer_tokens"]
    with pytest.raises(InputError, match="answer=7"):
        attention_knockout(ours, forced.inputs, ["question->last"], answer=7)
    only = {"question->the prompt's last": (QUESTION, forced.inputs.token_map["last"])}
    there = knocked_out(hf, appended(make_prompt(hf, n_text=6), WHOLE), range(5), QUESTION, [10], PREDICTING)
    found = attention_knockout(ours, forced.inputs, only, "all", metric="log_probability")
    assert float(found.base + found.effect[0]) == pytest.approx(log_probability(there, WHOLE), abs=1e-4)


def test_one_token_as_a_whole_is_the_first_token() -> None:
    hf, ours = deep("plain")
    inputs, edges = prepared(ours, make_prompt(hf, n_text=6)), ["question->last", "last->last"]
    alone = attention_knockout(ours, inputs, edges, 2, answer=20)
    np.testing.assert_allclose(
        attention_knockout(ours, inputs, edges, 2, answer=[[20]]).effect, alone.effect, atol=1e-4
    )
    forced = attention_knockout(ours, teacher_forced(ours, inputs, 20).inputs, edges, 2)
    np.testing.assert_allclose(forced.effect, alone.effect, rtol=1e-3, atol=1e-3)
    assert alone.attrs["measured"] == "whole answer"
    own = attention_knockout(ours, inputs, edges, 2)
    assert own.attrs["measured"] == "first token"


def test_answers_of_different_lengths_in_a_batch() -> None:
    ours = pair("grouped").ours
    singles = [pair("grouped").prompt(seed=seed, n_text=n) for seed, n in ((0, 6), (1, 9), (2, 7))]
    joined = ours.as_inputs(batch(singles, "right"))
    marks = [[m.real.start + p for p in QUESTION] for m in joined.token_maps]
    things = [[m.real.start + p for p in OBJECT] for m in joined.token_maps]
    edges, answers = ["image->question", "question->last", "object->last", "last->last"], [[7, 9], 8, [20, 31, 8]]
    together = attention_knockout(ours, joined.with_spans(question=marks, object=things), edges, 2, answer=answers)
    for row, single in enumerate(singles):
        alone = attention_knockout(ours, prepared(ours, single), edges, 2, answer=[answers[row]])
        for name in alone.data_vars:
            np.testing.assert_allclose(together[name][row], alone[name], atol=5e-3, err_msg=str(name))
    assert together.attrs["answer_tokens"] == [["#7", "#9"], ["#8"], ["#20", "#31", "#8"]]


def test_logits_of_several_tokens_have_no_difference() -> None:
    hf, ours = deep("plain")
    inputs = prepared(ours, make_prompt(hf, n_text=6))
    for answer, baseline in (([WHOLE], 7), (7, [WHOLE])):
        with pytest.raises(InputError, match="logit_difference.*#20 #31 #7.*token ids"):
            attention_knockout(
                ours, inputs, ["question->last"], answer=answer, baseline=baseline, metric="logit_difference"
            )


def test_all_layers_at_once() -> None:
    hf, ours = deep("plain")
    given = make_prompt(hf, n_text=6)
    inputs, edges = prepared(ours, given), ["image->question", "question->last"]
    every = attention_knockout(ours, inputs, edges, "all")
    both = attention_knockout(ours, inputs, edges, 1, total=True)
    assert every.effect.dims == both.total_effect.dims == ("edge",)
    np.testing.assert_allclose(every.effect, both.total_effect, atol=1e-3)
    np.testing.assert_array_equal(every.answer_kept, both.total_answer_kept)
    before = knocked_out(hf, given, [], [], [])
    for edge in edges:
        after = knocked_out(hf, given, range(5), *EDGES[edge])
        assert float(every.effect.sel(edge=edge)) == pytest.approx(relative_change(before, after), abs=2e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(side: str) -> None:
    ours = pair("grouped").ours
    singles = [pair("grouped").prompt(seed=seed, n_text=n) for seed, n in ((0, 6), (1, 9), (2, 7))]
    joined = ours.as_inputs(batch(singles, side))
    marks = [[m.real.start + p for p in QUESTION] for m in joined.token_maps]
    things = [[m.real.start + p for p in OBJECT] for m in joined.token_maps]
    edges = ["image->question", "question|rest->last", "object->question", "random->question", "last->last"]
    together = attention_knockout(ours, joined.with_spans(question=marks, object=things), edges, 2, total=True)
    assert together.effect.dims == ("prompt", "edge", "layer")
    for row, single in enumerate(singles):
        alone = attention_knockout(ours, prepared(ours, single), edges, 2, total=True)
        for name in alone.data_vars:
            np.testing.assert_allclose(together[name][row], alone[name], atol=5e-3, err_msg=str(name))


def test_what_the_answer_is_can_differ_from_prompt_to_prompt() -> None:
    ours = pair("plain").ours
    joined = ours.as_inputs(batch([prompt(0), prompt(1)], "left"))
    result = attention_knockout(ours, joined, ["rest->last"], 1, answer=[7, 8])
    logits = ours(joined)[:, -1].softmax(-1).detach()
    np.testing.assert_allclose(result.base, [logits[0, 7], logits[1, 8]], rtol=1e-4)
    of_numpy = attention_knockout(ours, joined, ["rest->last"], 1, answer=np.array([7, 8]))
    of_torch = attention_knockout(ours, joined, ["rest->last"], 1, answer=[torch.tensor(7), np.int64(8)])
    for same in (of_numpy, of_torch):
        np.testing.assert_array_equal(same.base, result.base)
    for one in (np.int64(7), torch.tensor(7)):
        np.testing.assert_allclose(
            attention_knockout(ours, joined, ["rest->last"], 1, answer=one).base[0], result.base[0]
        )
    own = attention_knockout(ours, joined, ["rest->last"], 1)
    assert own.attrs["answer"] == [f"#{int(i)}" for i in logits.argmax(-1)]


def test_an_edge_that_reaches_nothing_changes_nothing_and_one_without_ends_is_refused() -> None:
    ours = pair("plain").ours
    inputs = prepared(ours, prompt())
    for edge in (([], "last"), ("image", [])):
        with pytest.raises(SpanError, match="'nothing'.*positions"):
            attention_knockout(ours, inputs, {"nothing": edge}, 3)
    # In the last layer only the last position still feeds the answer.
    late = attention_knockout(ours, inputs, ["image->question", "image->last"], 1, centers=[-1])
    assert float(late.effect.sel(edge="image->question")[0]) == 0
    assert float(late.effect.sel(edge="image->last")[0]) != 0


def test_the_released_grouping_leaks_through_the_rest_of_the_prompt() -> None:
    """With question and last position cut off from the image in every layer, the image still decides the logits."""
    ours = pair("plain").ours
    edges = edges_of(["image->question|last", "image->text", "image->question|rest|last"])
    logits = []
    for image in (0, 1):
        given = prompt() | {"pixel_values": prompt(image)["pixel_values"]}
        with_ends, _ = marked(prepared(ours, given), edges)
        replay = Replay(ours, with_ends)
        logits.append(replay.run([edge.weighted(range(ours.cfg.n_layers)) for edge in edges]))
        result = attention_knockout(ours, prepared(ours, given), [e.name for e in edges], "all")
        assert float(result.effect[0]) != float(result.effect[1])
    released, closed, named = (logits[0] - logits[1]).abs().amax(-1).tolist()
    assert released > 1e-2
    assert closed < 1e-5
    assert named < 1e-5


def test_the_object_and_as_many_random_patches(tiny_shapes: HookedLLaVA) -> None:
    from hooked_llava.toy.gqa_tables import gqa_rows

    row = gqa_rows(1, kinds=["QueryAttr"])[0]
    asked = tiny_shapes.prepare(row.question, row.image)
    edges = ["object->question", "other->question", "random->question", "image->question"]
    result = attention_knockout(tiny_shapes, asked.with_boxes(object=row.boxes), edges, "all")
    same = attention_knockout(tiny_shapes, asked.with_boxes(object=row.boxes), edges, "all")
    assert result.effect.equals(same.effect)
    other = attention_knockout(tiny_shapes, asked.with_boxes(object=row.boxes), edges, "all", seed=1)
    assert float(other.effect[2]) != float(result.effect[2])
    np.testing.assert_array_equal(other.effect[[0, 1, 3]], result.effect[[0, 1, 3]])
    with pytest.raises(SpanError, match=r"no span 'object', which 'random' needs.*with_boxes"):
        attention_knockout(tiny_shapes, asked, edges[2:])


def test_edges_that_a_prompt_does_not_have_can_be_left_out(tiny_shapes: HookedLLaVA) -> None:
    text = tiny_shapes.prepare("Who made the star?")
    result = attention_knockout(tiny_shapes, text, ["image->last", "question->last"], missing="skip", total=True)
    assert np.isnan(result.effect[0]).all()
    assert np.isnan(result.total_effect[0])
    assert np.isfinite(result.effect[1]).all()
    with pytest.raises(SpanError, match="no span 'image'"):
        attention_knockout(tiny_shapes, text, ["image->last"])
    for misspelt in ("iamge->last", "question->lsat"):
        with pytest.raises(SpanError, match="names the span '.*'.*Did you mean"):
            attention_knockout(tiny_shapes, text, [misspelt], missing="skip")
    own = text.with_spans(mine=[3])
    assert np.isfinite(attention_knockout(tiny_shapes, own, ["mine->last"], missing="skip").effect).all()


def test_six_edges_at_620_positions_cost_two_forwards() -> None:
    """The paper's geometry in everything but width: 24 x 24 patches, 8 layers; work does not depend on the width."""
    hf = make_hf_model(
        image_size=48, patch_size=2, n_layers=8, d_model=16, n_heads=2, n_key_value_heads=2, d_mlp=43, d_vision=16,
        d_vision_mlp=16, n_vision_layers=2, text={"max_position_embeddings": 1024},
    )  # fmt: skip
    ours = HookedLLaVA.from_hf(hf)
    inputs = ours.as_inputs(make_prompt(hf, n_text=42))
    n = inputs.shape[1]
    assert n >= 619
    # USER: <image> question (13 tokens) instruction (11) ASSISTANT: (5), as LLaVA's tokenizer has them
    inputs = inputs.with_spans(question=range(n - 29, n - 16), object=range(100, 160))
    edges = [*(e for e in EDGES if "|" not in e)]
    assert len(edges) == 6
    for window in (None, 1, 3, 7, 9):
        result = attention_knockout(ours, inputs, edges, window)
        assert result.attrs["runs"] == 48
        assert result.attrs["n_forward"] + result.attrs["work"] <= 2.0


def test_bfloat16_and_files(tmp_path: Any) -> None:
    ours = pair("plain", torch.bfloat16).ours
    given = prompt() | {"pixel_values": prompt()["pixel_values"].bfloat16()}
    result = attention_knockout(ours, prepared(ours, given), ["image->question", "question->last"], 1, total=True)
    exact = attention_knockout(
        pair("plain").ours, prepared(pair("plain").ours, prompt()), ["image->question", "question->last"], 1
    )
    np.testing.assert_allclose(result.effect, exact.effect, atol=6)  # percent, of effects up to 70
    assert result.effect.attrs["units"] == "% of the answer's probability"
    save(result, tmp_path / "r.safetensors")
    assert load(tmp_path / "r.safetensors").equals(result)
    assert not any(parameter.grad is not None for parameter in ours.parameters())


def test_a_study_by_kind_as_numbers(tiny_shapes: HookedLLaVA, tmp_path: Any) -> None:
    from hooked_llava.toy.gqa_tables import gqa_rows

    rows = gqa_rows(2, kinds=["ChooseAttr", "LogicalObj"])
    result = knockout_study(tiny_shapes, rows, ["image->question", "object->question"], 3, out=tmp_path / "flow")
    assert result.effect.dims == ("question", "edge", "layer")
    alone = attention_knockout(
        tiny_shapes,
        tiny_shapes.prepare(rows[0].question, rows[0].image).with_boxes(object=rows[0].boxes),
        ["image->question", "object->question"],
        3,
        total=True,
    )
    for name in ("effect", "total_effect"):
        np.testing.assert_allclose(result[name].sel(question=rows[0].id), alone[name], atol=1e-2)
    summary = flow_summary(by_kind(result))
    assert summary.depth.dims == ("kind", "edge")
    assert (summary.depth <= by_kind(result).effect.sel(statistic="mean").min("layer") + 1e-9).all()
    with pytest.raises(InputError, match="holds another study"):
        knockout_study(tiny_shapes, rows, ["image->question", "object->question"], 1, out=tmp_path / "flow")


def test_an_edge_of_the_same_name_between_other_spans_is_another_study(tiny_shapes: HookedLLaVA, tmp_path: Any) -> None:
    from hooked_llava.toy.gqa_tables import gqa_rows

    rows, how = gqa_rows(1, kinds=["QueryAttr"]), {"out": tmp_path / "flow", "window": "all", "total": False}
    mine = knockout_study(tiny_shapes, rows, {"mine": ("image", "last")}, **how)
    for edges, further in (
        ({"mine": ("question", "last")}, {}),
        ({"mine": ("image", "last")}, {"metric": "probability"}),
    ):
        with pytest.raises(InputError, match="holds another study"):
            knockout_study(tiny_shapes, rows, edges, **how, **further)
    assert knockout_study(tiny_shapes, rows, {"mine": ("image", "last")}, **how).equals(mine)


def test_a_study_of_another_metric(tiny_shapes: HookedLLaVA) -> None:
    from hooked_llava.toy.gqa_tables import gqa_rows

    rows = gqa_rows(1, kinds=["QueryAttr"])
    percent, shares = (
        knockout_study(tiny_shapes, rows, ["image->question"], 1, metric=metric)
        for metric in ("relative_change", "probability")
    )
    np.testing.assert_allclose(shares.effect, percent.effect / 100 * percent.base, atol=1e-5)
    assert shares.effect.attrs["units"] == "probability"


@pytest.mark.parametrize(
    ("edges", "options", "error", "message"),
    [
        (["questoin->last"], {}, SpanError, "span 'questoin'.*Did you mean: question"),
        (["image->question|rset"], {}, SpanError, "span 'rset'.*Did you mean: rest"),
        ({"mine": ([3, 4], "last")}, {}, InputError, r"'mine'.*by number \(\[3, 4\]\)"),
        ({"mine": ("image", 7)}, {}, InputError, r"'mine'.*by number \(7\)"),
        (["image->last"], {"window": 0}, InputError, "window=0.*number of layers"),
        (
            ["image->last"],
            {"metric": "logit_difference"},
            InputError,
            "metric='logit_difference'.*relative_change, probability",
        ),
    ],
)
def test_what_does_not_fit_a_study_is_said_before_anything_is_asked(
    tiny_shapes: HookedLLaVA, monkeypatch: Any, edges: Any, options: Any, error: Any, message: str
) -> None:
    from hooked_llava.toy.gqa_tables import gqa_rows

    monkeypatch.setattr(tiny_shapes.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        knockout_study(tiny_shapes, gqa_rows(1, kinds=["QueryAttr"]), edges, **options)


def test_curves_as_numbers() -> None:
    import xarray as xr

    curves = xr.DataArray(
        [[0.0, -1, -6, -10, -4, 0, -5], [1.0, 2, 3, 4, 5, 6, 7], [np.nan] * 7],
        dims=("edge", "layer"),
        coords={"layer": range(10, 17), "edge": ["a", "b", "c"]},
    )
    found = flow_summary(curves)
    assert [float(v[0]) for v in found.values()] == [13, -10, 2, 2]
    assert np.isnan(found.peak_layer[1])  # what only rises has none
    assert [float(v[1]) for v in found.values()][1:] == [1, 0, 0]
    assert all(np.isnan(v[2]) for v in found.values())
    assert np.isnan(flow_summary(curves, least=11.0).peak_layer[0])
    tiny = (curves / 20).assign_attrs(units="% of the answer's probability")
    assert flow_summary(tiny).half_width.values[:2].tolist() == [0, 0]  # half a percent is nothing
    with pytest.raises(InputError, match="edge.*layer.*layer"):
        flow_summary(curves[0])


@pytest.mark.parametrize(
    ("edges", "options", "message"),
    [
        (["last->question"], {}, "edge 'last->question'.*source.*after.*target"),
        (["question"], {}, "'question' is no edge"),
        (("image", "text", "last"), {}, "'image' is no edge"),
        (["image->last", "image->last"], {}, "'image->last'.*twice"),
        (["image->last"], {"window": 0}, "window=0.*number of layers"),
        (["image->last"], {"window": 99}, "window=99.*1 to 5.*'all'"),
        (["image->last"], {"window": 1.5}, r"window=1\.5.*number of layers"),
        (["image->last"], {"window": "all", "centers": [1]}, "window='all'.*centers="),
        (["image->last"], {"centers": [9]}, r"9.*layers.*2"),
        (["image->last"], {"metric": "kl"}, "metric='kl'; expected relative_change"),
        (["image->last"], {"metric": "logit_difference"}, "metric='logit_difference' without baseline="),
        (["image->last"], {"baseline": 3}, "metric='relative_change' with baseline="),
        (["image->last"], {"answer": [1, 2]}, "answer=.*2 answers for 1 prompts"),
        (["image->last"], {"answer": 2.0}, r"answer=2\.0.*word.*token id"),
        (["image->last"], {"missing": "ignore"}, "missing='ignore'.*'raise'.*'skip'"),
        ({"mine": ([99], "last")}, {}, r"positions=\[99\]"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(edges: Any, options: dict[str, Any], message: str) -> None:
    from tests.pairs import as_users_run

    ours = pair("plain").ours
    with as_users_run(), pytest.raises(InputError, match=message):
        attention_knockout(ours, prepared(ours, prompt()), edges, **options)


def test_unknown_spans_are_named() -> None:
    ours = pair("plain").ours
    with pytest.raises(SpanError, match="span 'questoin'. Did you mean: question"):
        attention_knockout(ours, prepared(ours, prompt()), ["questoin->last"])


@pytest.mark.parametrize("name", ["plain", "grouped"])
@pytest.mark.parametrize("at", [0, 7, 10])
@torch.no_grad()
def test_a_position_with_every_key_blocked_attends_to_nothing(name: str, at: int) -> None:
    _, ours = deep(name)
    inputs = ours.as_inputs(make_prompt(deep(name)[0], n_text=6))
    answer = int(ours(inputs)[0, -1].argmax())
    found = attention_knockout(ours, inputs, [(range(at + 1), [at])], "all", answer=answer, metric="log_probability")

    def run(hook: str, replace: Any) -> float:
        logits = ours.run_with_hooks(inputs, fwd_hooks=[(hook, replace)])
        return float(logits[0, -1].log_softmax(-1)[answer])

    def nothing(z: torch.Tensor, hook: Any) -> None:
        z[:, at] = 0.0

    def uniform(pattern: torch.Tensor, hook: Any) -> None:
        pattern[:, :, at] = 1 / pattern.shape[-1]

    base = float(ours(inputs)[0, -1].log_softmax(-1)[answer])
    assert float(found.base) == pytest.approx(base, abs=1e-5)
    effect, released = (run(hook, fill) - base for hook, fill in (("z", nothing), ("pattern", uniform)))
    assert float(found.effect[0]) == pytest.approx(effect, abs=1e-4)
    assert abs(effect - released) > 1e-2, "the released code's uniform row is another intervention"
