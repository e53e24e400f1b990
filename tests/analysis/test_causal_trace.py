"""Causal tracing equals full forward passes with plain hooks; windows, roles, corruptions, and what must be exactly 0."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava.analysis.causal_trace import best_cells, by_role, causal_trace
from hooked_llava.analysis.studies.trace import average_traces
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, OtherImage, Replace
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.metrics import log_probability, teacher_forced
from hooked_llava.results.arrays import load, save
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.oracles.naive_trace import embeddings, trace_naively
from tests.pairs import as_users_run

KINDS = ("mlp", "attn", "resid")
QUESTION = "What color is this star ?"


def model_with(n_key_value_heads: int) -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(n_layers=4, n_key_value_heads=n_key_value_heads), make_processor())


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return model_with(2)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def prompt(model: HookedLLaVA, image: np.ndarray) -> Any:
    return model.prepare(QUESTION, image)


def expected(model: Any, prompt: Any, corrupted: torch.Tensor, trace: xr.Dataset, windows: list[range]) -> np.ndarray:
    """P(clean answer) with each cell restored, cell by cell."""
    cells = [(k, w, int(p)) for k in trace.kind.values for w in windows for p in trace.position.values]
    clean, broken, rows = trace_naively(model, prompt, corrupted, cells)
    answer = int(clean.argmax())
    assert float(trace.p_clean) == pytest.approx(float(clean.softmax(-1)[answer]), abs=1e-5)
    assert float(trace.p_corrupted) == pytest.approx(float(broken.softmax(-1)[answer]), abs=1e-5)
    return rows.softmax(-1)[:, answer].reshape(trace.restored.shape).numpy()


def single(model: Any) -> list[range]:
    return [range(i, i + 1) for i in range(model.cfg.n_layers)]


def reworded(model: Any, prompt: Any, old: str, new: list[str]) -> torch.Tensor:
    """Embeddings of the prompt with other words, from the ids alone."""
    ids = prompt.input_ids.clone()
    for position, word in zip(prompt.token_map.find(old), new, strict=True):
        ids[0, position] = model.to_single_token(word)
    whole = embeddings(model, prompt).clone()
    changed = ids != prompt.input_ids
    whole[changed] = model.W_E[ids[changed]]
    return whole


@pytest.mark.parametrize("n_key_value_heads", [4, 2])
def test_every_cell_equals_a_full_forward_with_plain_hooks(n_key_value_heads: int, image: np.ndarray) -> None:
    model = model_with(n_key_value_heads)
    prompt = model.prepare(QUESTION, image)
    trace = causal_trace(model, prompt, "this star", corruption="the circle")
    assert trace.restored.dims == ("kind", "layer", "position")
    assert trace.kind.values.tolist() == list(KINDS)
    first = prompt.token_map["image"][-1]
    assert trace.position.values.tolist() == list(range(first, prompt.shape[1]))
    found = expected(model, prompt, reworded(model, prompt, "this star", ["the", "circle"]), trace, single(model))
    np.testing.assert_allclose(trace.restored, found, atol=2e-5)
    np.testing.assert_allclose(trace.indirect_effect, found - float(trace.p_corrupted), atol=2e-5)
    assert float(abs(trace.indirect_effect).max()) > 1e-3


@pytest.mark.parametrize(
    ("reading", "window", "windows"),
    [
        ("centered", 2, [range(1), range(2), range(1, 3), range(2, 4)]),
        ("centered", 3, [range(2), range(3), range(1, 4), range(2, 4)]),
        ("released", 1, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ("released", 2, [range(3), range(4), range(4), range(1, 4)]),
    ],
)
def test_windows_hold_the_layers_that_were_asked_for(
    model: Any, prompt: Any, reading: Any, window: int, windows: list[range]
) -> None:
    where = [*prompt.token_map.find("star"), prompt.shape[1] - 1]
    trace = causal_trace(
        model, prompt, "star", corruption="circle", window=window, window_reading=reading, positions=where
    )
    corrupted = reworded(model, prompt, "star", ["circle"])
    np.testing.assert_allclose(trace.restored, expected(model, prompt, corrupted, trace, windows), atol=2e-5)


@pytest.mark.parametrize("corruption", ["the circle", Noise(std=1.0, seed=3)])
def test_an_answer_of_several_tokens_is_followed_as_a_whole(model: Any, prompt: Any, corruption: Any) -> None:
    """Held against full forward passes of the prompt with the answer; `last` stays the prompt's last position."""
    forced = teacher_forced(model, prompt, "red star")
    ids, last = forced.inputs.input_ids[0, -2:].tolist(), prompt.shape[1] - 1
    where = [*prompt.token_map["question"], last, last + 1]
    options = {"corruption": corruption, "positions": where}
    trace = causal_trace(model, forced.inputs, "this star", **options)
    corrupted = embeddings(model, forced.inputs).clone()
    if isinstance(corruption, str):
        for position, word in zip(prompt.token_map.find("this star"), ("the", "circle"), strict=True):
            corrupted[0, position] = model.W_E[model.to_single_token(word)]
    else:
        noise = torch.randn(2, model.cfg.d_model, generator=torch.Generator().manual_seed(3))
        corrupted[0, prompt.token_map.find("this star").tolist()] += noise
    cells = [(k, w, p) for k in KINDS for w in single(model) for p in where]
    clean, broken, rows = trace_naively(model, forced.inputs, corrupted, cells, read=forced.positions)

    def p_of(logits: torch.Tensor) -> torch.Tensor:
        p = logits.double().softmax(-1)
        return p[..., 0, ids[0]] * p[..., 1, ids[1]]

    assert float(trace.p_clean) == pytest.approx(float(p_of(clean)), rel=1e-4)
    assert float(trace.p_corrupted) == pytest.approx(float(p_of(broken)), rel=1e-4)
    scale = float(p_of(clean))
    np.testing.assert_allclose(trace.restored / scale, p_of(rows).reshape(trace.restored.shape) / scale, atol=1e-3)
    assert float(abs(trace.indirect_effect.sel(position=last + 1)).max()) > 0, "the second token is read there"
    assert trace.role.values[-2:].tolist() == ["last", "answer"]
    assert (trace.attrs["last"], trace.attrs["measured"]) == (last, "whole answer")
    assert (trace.attrs["answer"], trace.attrs["answer_tokens"]) == ("red star", ["red", "star"])
    asked = causal_trace(model, prompt, "this star", answer="red star", **options)
    np.testing.assert_allclose(asked.restored, trace.restored, atol=1e-9)
    log_p = causal_trace(model, forced.inputs, "this star", metric=forced.metric, **options)
    np.testing.assert_allclose(np.exp(log_p.restored) / scale, trace.restored / scale, atol=1e-3)
    usual = causal_trace(model, forced.inputs, "this star", corruption=corruption, kinds=("mlp",))
    assert usual.position.values[-1] == last


def test_an_answer_of_one_token_is_followed_as_before(model: Any, prompt: Any) -> None:
    own = causal_trace(model, prompt, "this star", corruption="the circle")
    assert own.attrs["measured"] == "first token"
    token = int(model(prompt)[0, -1].argmax())
    for same in (
        causal_trace(model, prompt, "this star", corruption="the circle", answer=token),
        causal_trace(model, teacher_forced(model, prompt, token).inputs, "this star", corruption="the circle"),
    ):
        np.testing.assert_allclose(same.restored, own.restored, atol=1e-6)
        assert same.attrs["measured"] == "whole answer"
    with pytest.raises(InputError, match="answer='red'"):
        causal_trace(model, teacher_forced(model, prompt, "red").inputs, "this star", answer="red")


def test_noise_is_averaged_over_its_draws(model: Any, prompt: Any) -> None:
    where = prompt.token_map.find("this star").tolist()
    options = {"positions": where, "kinds": ("mlp", "resid")}
    both = causal_trace(model, prompt, where, corruption=Noise(std=1.0, seed=3, samples=2), **options)
    each = [causal_trace(model, prompt, where, corruption=Noise(std=1.0, seed=s), **options) for s in (3, 4)]
    np.testing.assert_allclose(both.restored, (each[0].restored + each[1].restored) / 2, atol=1e-6)
    assert both.runs == 2 * each[0].runs
    noise = torch.randn(2, model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    corrupted = embeddings(model, prompt).clone()
    corrupted[0, where] += noise
    found = expected(model, prompt, corrupted, each[0], single(model))
    np.testing.assert_allclose(each[0].restored, found, atol=2e-5)


def test_mean_embedding(model: Any, prompt: Any) -> None:
    where = prompt.token_map.find("star").tolist()
    trace = causal_trace(model, prompt, "star", corruption=MeanEmbedding(), positions=where)
    corrupted = embeddings(model, prompt).clone()
    corrupted[0, where] = model.W_E.mean(0)
    np.testing.assert_allclose(trace.restored, expected(model, prompt, corrupted, trace, single(model)), atol=2e-5)


def test_another_image_changes_the_image_and_not_the_words(model: Any, prompt: Any, image: np.ndarray) -> None:
    other = 255 - image
    where = [*prompt.token_map["image"][:2], prompt.shape[1] - 1]
    trace = causal_trace(model, prompt, "star", corruption=OtherImage(other), positions=where)
    corrupted = embeddings(model, model.prepare(QUESTION, other))
    np.testing.assert_allclose(trace.restored, expected(model, prompt, corrupted, trace, single(model)), atol=2e-5)
    assert trace.attrs["n_forward"] == 2
    assert float(abs(trace.indirect_effect.isel(position=0)).max()) > 0


def test_several_constraints_are_corrupted_together(model: Any, prompt: Any) -> None:
    trace = causal_trace(model, prompt, ["color", "this star"], corruption=Replace(["shape", "the circle"]))
    corrupted = reworded(model, prompt, "this star", ["the", "circle"])
    corrupted[0, prompt.token_map.find("color")] = model.W_E[model.to_single_token("shape")]
    np.testing.assert_allclose(trace.restored, expected(model, prompt, corrupted, trace, single(model)), atol=2e-5)
    assert trace.constraint_positions == [prompt.token_map.find(c).tolist() for c in ("color", "this star")]
    at = trace.constraint_index.values
    assert at[trace.role.values == "constraint last"].tolist() == [0, 1]
    assert trace.role.values[at == -1][0] == "image"


def test_without_an_image(model: Any) -> None:
    prompt = model.prepare("Who made the star ?")
    trace = causal_trace(model, prompt, "star", corruption="circle")
    assert trace.position.values.tolist() == list(range(prompt.shape[1]))
    corrupted = reworded(model, prompt, "star", ["circle"])
    np.testing.assert_allclose(trace.restored, expected(model, prompt, corrupted, trace, single(model)), atol=2e-5)


def test_another_metric_and_some_layers(model: Any, prompt: Any) -> None:
    metric = log_probability(7)
    trace = causal_trace(
        model, prompt, "star", corruption="circle", kinds="resid", layers=[1, -1], positions="last", metric=metric
    )
    assert trace.layer.values.tolist() == [1, 3]
    cells = [("resid", [layer], prompt.shape[1] - 1) for layer in (1, 3)]
    clean, broken, rows = trace_naively(model, prompt, reworded(model, prompt, "star", ["circle"]), cells)
    np.testing.assert_allclose(trace.restored.values.ravel(), metric(rows), atol=1e-5)
    assert [trace.clean, trace.corrupted] == pytest.approx([float(metric(clean)), float(metric(broken))], abs=1e-5)
    assert float(trace.p_clean) == pytest.approx(float(clean.softmax(-1).max()), abs=1e-5)


def test_before_the_first_change_nothing_is_run_and_the_effect_is_exactly_0(model: Any, prompt: Any) -> None:
    star = prompt.token_map.find("star")[0]
    trace = causal_trace(model, prompt, "this star", corruption="this circle", positions=range(prompt.shape[1]))
    before = trace.position.values < star  # "this" stays as it was
    assert (trace.indirect_effect.values[..., before] == 0).all()
    n_after, n_layers = prompt.shape[1] - star, model.cfg.n_layers
    assert trace.runs == len(KINDS) * (n_after * n_layers - (n_after - 1))  # from the last layer, only the last reads
    assert trace.corrupted_label.values[star] == "circle"


def test_no_corruption_has_no_effect_and_is_reported(model: Any, prompt: Any) -> None:
    trace = causal_trace(model, prompt, "star", corruption="star")
    assert (trace.indirect_effect == 0).all()
    assert (float(trace.lowered_by), trace.runs) == (0.0, 0)
    lowered = trace.copy().assign(lowered_by=0.5)
    lowered["indirect_effect"] = lowered.indirect_effect + 0.25
    mean = average_traces([trace, lowered])
    assert (mean.left_out, mean.left_out_drops) == (1, [0.0])
    np.testing.assert_allclose(mean.indirect_effect, 0.25)
    with pytest.raises(InputError, match=r"the 2.*by 0.1.*0\)"):
        average_traces([trace, trace])


def test_the_whole_stream_restored_at_the_end_is_the_clean_run(model: Any, prompt: Any) -> None:
    trace = causal_trace(model, prompt, "this star", corruption="the circle", kinds=["resid"], positions="last")
    assert float(trace.restored.sel(kind="resid", layer=3).squeeze()) == pytest.approx(float(trace.p_clean), abs=1e-6)


def test_roles_and_their_averages(model: Any, prompt: Any) -> None:
    prompt = model.prepare(QUESTION, prompt.images[0], template="tiny-shapes")
    trace = causal_trace(model, prompt, "color is this", corruption="the red star")
    roles = dict(zip(trace.label.values.tolist(), trace.role.values.tolist(), strict=True))
    assert roles["What"] == "before"
    assert [roles[w] for w in ("color", "is", "this")] == [f"constraint {w}" for w in ("first", "middle", "last")]
    assert [roles[w] for w in ("star", "?")] == ["rest of question"] * 2
    assert trace.role.values[0] == "image"
    assert trace.role.values[-1] == "last"
    assert "rest" in roles.values()
    assert trace.constraint_last == prompt.token_map.find("this")[0]
    means = by_role(trace)
    rest = trace.indirect_effect.values[..., trace.role.values == "rest of question"].mean(-1)
    np.testing.assert_allclose(means.indirect_effect.sel(role="rest of question"), rest)
    assert int(means.n_positions.sum()) == trace.sizes["position"]


def test_average_over_questions_with_intervals() -> None:
    def made(value: float, roles: list[str]) -> xr.Dataset:
        data = np.full((1, 2, len(roles)), value)
        coords = {"kind": ["mlp"], "layer": [0, 1], "position": range(len(roles)), "role": ("position", roles)}
        dims = ("kind", "layer", "position")
        attrs = {"model": "m", "corruption": "c", "window": 1, "window_reading": "centered"}
        costs = {"n_forward": 1, "seconds": 0.5, "runs": 3, "work": 0.25}
        ends = {"p_clean": 0.9, "p_corrupted": 0.1, "lowered_by": 8 / 9}
        return xr.Dataset({"indirect_effect": (dims, data), "restored": (dims, data), **ends}, coords, attrs | costs)

    both, short = ["constraint first", "constraint last"], ["constraint last"]
    mean = average_traces([made(1.0, both), made(3.0, both), made(8.0, short)])
    assert mean.role.values.tolist() == both
    assert mean.n.values.tolist() == [2, 3]
    np.testing.assert_allclose(mean.indirect_effect[0, 0], [2.0, 4.0])
    # Of three values drawn with replacement each is drawn thrice in one of 27 cases, which is more than 2.5 %.
    assert [float(end.isel(kind=0, layer=0).sel(role="constraint last")) for end in (mean.low, mean.high)] == [1.0, 8.0]
    assert mean.attrs["work"] == 0.75
    assert np.isnan(average_traces([made(1.0, both)]).low).all()


def test_saved_and_loaded(model: Any, prompt: Any, tmp_path: Any) -> None:
    trace = causal_trace(model, prompt, "star", corruption="circle", positions="last")
    save(trace, tmp_path / "trace.safetensors")
    xr.testing.assert_identical(load(tmp_path / "trace.safetensors"), trace)


def test_the_work_at_the_size_of_a_real_prompt() -> None:
    """620 positions, 8 layers: every position behind the image x 3 kinds x all layers for at most 12 forwards."""
    hf = make_hf_model(
        image_size=192, n_layers=8, n_vision_layers=1, vision_feature_layer=-1, d_model=16, d_mlp=43,
        text={"max_position_embeddings": 700},
    )  # fmt: skip
    model = HookedLLaVA.from_hf(hf)
    ids = torch.randint(6, 99, (1, 620), generator=torch.Generator().manual_seed(0))
    ids[0, 1:577] = 5
    prompt = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 192, 192)}
    trace = causal_trace(model, prompt, [586, 587], corruption=Noise())
    assert trace.position.values.tolist() == list(range(576, 620))
    assert trace.runs == 3 * (34 * 8 - 33)
    assert trace.attrs["n_forward"] == 1
    assert trace.work <= 12
    assert trace.runs / trace.work > 60


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"constraint": "square"}, SpanError, "'square'.*question"),
        ({"constraint": []}, InputError, r"constraint.*\[\]"),
        ({"constraint": [99]}, InputError, r"positions \[99\].*prompt; expected 0 to"),
        ({"corruption": "the red circle"}, InputError, "'the red circle'.*3 tokens.*'this star' 2"),
        ({"corruption": Replace(["a b", "c d"])}, InputError, "2 replacements for 1 constraints"),
        ({"corruption": Noise(samples=0)}, InputError, "samples=0"),
        ({"corruption": 3}, InputError, r"corruption=3.*words.*Noise\("),
        ({"kinds": ["mlps"]}, InputError, r"kinds=\('mlps',\).*'mlp', 'attn', 'resid'"),
        ({"window": 0}, InputError, "window=0"),
        ({"window": 99}, InputError, "window=99.*1 to 7"),
        ({"window_reading": "wide"}, InputError, "window_reading='wide'.*'centered'.*'released'"),
        ({"layers": [4]}, InputError, r"4.*layers"),
        ({"positions": [99]}, InputError, r"positions=\[99\].*-13\.\.12"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Any, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with as_users_run(), pytest.raises(error, match=message):
        causal_trace(model, prompt, **{"constraint": "this star", "corruption": "the circle", **options})


def test_several_prompts_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="causal_trace.*one prompt, got 2"):
        causal_trace(model, model.prepare(["Who ?", "What ?"]), "Who")


@torch.no_grad()
def test_half_precision() -> None:
    """As far from single precision as plain bfloat16 forwards with hooks are, and no further.

    Roundings differ from cell to cell and from processor to processor; over several images they are alike.
    """
    model = HookedLLaVA.from_hf(make_hf_model(dtype=torch.bfloat16), make_processor())
    wide = copy.deepcopy(model).to(torch.float32)
    ours, theirs = [], []
    for seed in range(4):
        image = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        prompt = model.prepare(QUESTION, image)
        where = prompt.token_map["question"]
        options = {"kinds": ("mlp", "attn"), "layers": [0, 1], "positions": where}
        trace = causal_trace(model, prompt, "star", corruption="circle", **options)
        assert trace.restored.dtype == np.float64
        answer = int(model(prompt)[0, -1].argmax())
        exact = _restored_naively(wide, image, trace, answer)
        ours.append((trace.restored.values - exact) / exact.max())
        theirs.append((_restored_naively(model, image, trace, answer) - exact) / exact.max())
    ours, theirs = (float(np.sqrt(np.square(errors).mean())) for errors in (ours, theirs))
    assert ours <= 1.5 * theirs
    assert ours < 0.05


def _restored_naively(model: HookedLLaVA, image: np.ndarray, trace: Any, answer: int) -> np.ndarray:
    """P(answer) in every cell of a trace, each from a full forward pass with hooks."""
    prompt = model.prepare(QUESTION, image)
    windows = [range(i, i + 1) for i in trace.layer.values.tolist()]
    cells = [(k, w, int(p)) for k in trace.kind.values for w in windows for p in trace.position.values]
    _, _, rows = trace_naively(model, prompt, reworded(model, prompt, "star", ["circle"]), cells)
    return rows.float().softmax(-1)[:, answer].reshape(trace.restored.shape).numpy()


def test_averages_are_of_like_traces_only(model: Any, prompt: Any) -> None:
    def trace(**options: Any) -> xr.Dataset:
        return causal_trace(model, prompt, "star", **{"corruption": "circle", "positions": "last", **options})

    for options, message in (
        ({"layers": [1, 2]}, r"layers.*\[0, 1, 2, 3\] and \[1, 2\]"),
        ({"kinds": ["mlp"]}, r"kinds.*\['mlp', 'attn', 'resid'\] and \['mlp'\]"),
        ({"window": 3}, "differ in window: '1' and '3'"),
        ({"corruption": Noise()}, "corruption_kind: '.*words' and .noise of"),
        ({"metric": log_probability(3)}, "differ in units"),
    ):
        with pytest.raises(InputError, match=message):
            average_traces([trace(), trace(**options)], min_drop=-1.0)
    with pytest.raises(InputError, match="differ in model"):
        average_traces([trace(), trace().assign_attrs(model="another")], min_drop=-1.0)
    mean = average_traces([trace(), trace(corruption="square")], min_drop=-1.0)
    assert mean.corruption == "replaced by other words"
    assert average_traces([trace(), trace()], min_drop=-1.0).corruption == "replaced by 'circle'"


def test_the_best_cells_restore_most(model: Any, prompt: Any) -> None:
    trace = causal_trace(model, prompt, "star", corruption="circle")
    cells = best_cells(trace)
    assert [str(cell.kind.values) for cell in cells] == list(KINDS)
    for cell in cells:
        effects = trace.indirect_effect.sel(kind=str(cell.kind.values))
        assert float(cell.indirect_effect) == float(effects.max())
        assert float(effects.sel(layer=int(cell.layer), position=int(cell.position))) == float(effects.max())
        assert int(cell.n_tied) == int((effects >= 0.999 * effects.max()).sum()) - 1


def test_ties_are_counted_on_chosen_layers_too(model: Any, prompt: Any) -> None:
    trace = causal_trace(model, prompt, "star", corruption="circle", kinds=["resid"]).isel(layer=[2, 0])
    trace["indirect_effect"] = trace.indirect_effect.transpose("position", "kind", "layer") * 0 + 0.25
    trace["indirect_effect"][{"layer": 1, "position": 1}] = 0.2
    (cell,) = best_cells(trace)
    assert int(cell.n_tied) == trace.indirect_effect.size - 2
    assert int(cell.layer) == 2


def test_a_metric_gives_one_number(model: Any, prompt: Any) -> None:
    with as_users_run(), pytest.raises(InputError, match=r"returned shape \(99,\) .* expected one"):
        causal_trace(model, prompt, "star", corruption="circle", metric=lambda logits: logits)
