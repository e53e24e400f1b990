"""A tuned lens trains as the package's formula does, and reads what the model will say."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.analysis import TunedLens, lens_kl, logit_lens, train_tuned_lens
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.viz.figures.lens import lens_title
from tests.fixtures_processor import make_processor
from tests.known_mechanism import OBJECTS, model_of
from tests.oracles.plain_lens import PlainTunedLens, plain_kl, plain_training
from tests.pairs import pair

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair("plain", torch.float64).hf, processor=make_processor())


def prompts() -> list[Any]:
    questions = ("What color is the star?", "Is it red?", "What color is the star?")
    return [model().prepare(question, images=IMAGE if i != 1 else None) for i, question in enumerate(questions)]


def streams(inputs: Any) -> list[Tensor]:
    """What enters every layer and leaves the last at text positions, as the slow model computes it."""
    seen = pair("plain", torch.float64).slow.run(inputs.input_ids, inputs.pixel_values)
    names = [*(f"blocks.{i}.hook_resid_pre" for i in range(3)), "blocks.2.hook_resid_post"]
    return [seen[name][0, inputs.token_map["text"].tolist()] for name in names]


def plain() -> PlainTunedLens:
    hf = pair("plain", torch.float64).hf
    return PlainTunedLens(3, hf.model.language_model.norm.weight, model().cfg.eps, hf.lm_head.weight)


def drawn() -> TunedLens:
    d_model = model().cfg.d_model
    return TunedLens(torch.randn(3, d_model, d_model) / 10, torch.randn(3, d_model))


def count_forwards(of: HookedLLaVA, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    run = type(of).run_with_hooks

    def counted(self: HookedLLaVA, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return run(self, *args, **options)

    monkeypatch.setattr(type(of), "run_with_hooks", counted)
    return calls


def test_training_is_that_of_the_formula_and_costs_one_forward_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    (only, *_) = prompts()
    how: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1e-2}
    expected = plain()
    measured = plain_training(expected, [streams(only)] * 4, **how)
    calls = count_forwards(model(), monkeypatch)
    tuned = train_tuned_lens(model(), [only], steps=4, progress=False, **how)
    assert len(calls) == tuned.training["n_forward"] == 4
    assert all(float(a) < float(b) for a, b in zip(measured[-1], measured[0], strict=True))
    for layer, translator in enumerate(expected.translators):
        np.testing.assert_allclose(tuned.weight[layer], translator.weight.detach(), atol=1e-6)
        np.testing.assert_allclose(tuned.bias[layer], translator.bias.detach(), atol=1e-6)
    np.testing.assert_allclose(tuned.training["kl"], measured[-1], atol=1e-5)


def test_the_models_own_weights_get_no_gradients() -> None:
    before = model().W_U.clone()
    weight = model().unembed.weight
    weight.requires_grad_(True)
    try:
        train_tuned_lens(model(), prompts()[:1], steps=1, progress=False)
        assert weight.grad is None
    finally:
        weight.requires_grad_(False)
    assert torch.equal(model().W_U, before)


def test_divergences_are_means_over_positions_and_cost_one_forward_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = drawn()
    calls = count_forwards(model(), monkeypatch)
    found = lens_kl(model(), prompts(), lens=lens)
    assert len(calls) == found.n_forward == 3
    oracle = plain().set(lens.weight, lens.bias)
    joined = [torch.cat(rows) for rows in zip(*map(streams, prompts()), strict=True)]
    final = oracle(joined[-1], 3)
    rows = {"none": [h @ oracle.unembed.T for h in joined], "final": [oracle(h, 3) for h in joined]}
    rows["tuned"] = [oracle(h, layer) for layer, h in enumerate(joined)]
    for norm, read in rows.items():
        np.testing.assert_allclose(found.sel(norm=norm), [plain_kl(final, x).item() for x in read], atol=1e-6)
    assert found.n_positions == len(joined[0])


def test_logit_lens_reads_by_it() -> None:
    lens, (inputs, *_) = drawn(), prompts()
    oracle = plain().set(lens.weight, lens.bias)
    read = logit_lens(model(), inputs, norm="tuned", lens=lens, positions="text", answers=["red"], k=3)
    for layer, hidden in enumerate(streams(inputs)):
        probabilities = oracle(hidden, layer).softmax(-1)
        np.testing.assert_allclose(read.probability[layer], probabilities.topk(3).values.detach(), atol=1e-5)
        red = probabilities[:, model().to_single_token("red")].detach()
        np.testing.assert_allclose(read.answer_probability[layer, :, 0], red, atol=1e-5)
    assert (read.norm, read.n_forward) == ("tuned", 1)
    assert lens_title(read) == "Logit lens, tuned"


def test_on_a_known_mechanism_it_reads_the_answer_where_it_is_written_and_not_before() -> None:
    """The colour is at the last position from layer 4 on; earlier the best a lens can say is how often each answer comes."""
    direct = model_of("direct")
    colors = ("red", "blue", "green")
    asked = [direct.ask({**OBJECTS, (2, 1): f"{color} ring"}, "ring") for color in colors]
    tuned = train_tuned_lens(direct, asked, tokens="last", steps=60, lr=0.05, weight_decay=0.0, progress=False)
    far = lens_kl(direct, asked, lens=tuned, tokens="last").sel(norm="tuned")
    entropy = np.log(len(colors))
    np.testing.assert_allclose(far[:4], entropy, atol=0.05)
    assert float(far[4]) < 0.05
    assert float(far[5]) == pytest.approx(0, abs=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    (inputs, *_) = prompts()
    lens = TunedLens.identity(model())
    with pytest.raises(InputError, match="norm='tuned' and no lens.*train_tuned_lens"):
        logit_lens(model(), inputs, norm="tuned")
    with pytest.raises(InputError, match=r"norm='final' and lens=TunedLens.*'tuned'"):
        logit_lens(model(), inputs, lens=lens)
    with pytest.raises(InputError, match=r"norm='tuned'.*hook='mlp_out'"):
        logit_lens(model(), inputs, norm="tuned", lens=lens, hook="mlp_out")
    wrong = TunedLens(lens.weight[:1], lens.bias[:1], "other")
    with pytest.raises(InputError, match=r"1 layers.*'other'.*3"):
        logit_lens(model(), inputs, norm="tuned", lens=wrong)
    with pytest.raises(InputError, match=r"1 layers.*'other'.*3"):
        lens_kl(model(), [inputs], lens=wrong)
    with pytest.raises(InputError, match=r"steps=0.*at least 1"):
        train_tuned_lens(model(), [inputs], steps=0)
    with pytest.raises(InputError, match="lr=nan"):
        train_tuned_lens(model(), [inputs], lr=float("nan"))
    with pytest.raises(InputError, match=r"tokens=\[3\].*'all'"):
        train_tuned_lens(model(), [inputs], tokens=[3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="epochs=None.*iterator"):
        train_tuned_lens(model(), iter([inputs]))
