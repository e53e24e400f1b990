"""The logit lens, held against the formula."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hooked_llava.analysis import logit_lens
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from tests.fixtures_processor import make_processor
from tests.pairs import as_users_run, batch, pair

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair("plain", torch.float64).hf, processor=make_processor())


@functools.cache
def prompt() -> Inputs:
    return model().prepare("What color is the star?", images=IMAGE)


def expected(norm: str) -> torch.Tensor:
    """Probabilities [layer pos d_vocab] from Hugging Face's streams."""
    hf = pair("plain", torch.float64).hf
    slow = pair("plain", torch.float64).slow
    seen = slow.run(prompt().input_ids, prompt().pixel_values)
    streams = [seen[f"blocks.{i}.hook_resid_pre"][0] for i in range(3)] + [seen["blocks.2.hook_resid_post"][0]]
    rows = []
    for stream in streams:
        if norm == "final":
            rms = (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            stream = stream / rms * hf.model.language_model.norm.weight
        rows.append((stream @ hf.lm_head.weight.T).softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize("positions", ["last", "image", [0, 3, -1], 2])
def test_words_and_probabilities_by_layer(norm: str, positions: object) -> None:
    read = logit_lens(model(), prompt(), positions=positions, norm=norm, answers=["red", "blue"], k=4)
    where = {"last": prompt().token_map["last"], "image": prompt().token_map["image"], "2": [2]}.get(str(positions))
    where = [0, 3, prompt().shape[1] - 1] if where is None else list(where)
    probabilities = expected(norm)[:, where]
    assert dict(read.sizes) == {"layer": 4, "position": len(where), "rank": 4, "answer": 2}
    assert read.position.values.tolist() == where
    assert read.label.values.tolist() == [prompt().token_map.labels[i] for i in where]
    np.testing.assert_allclose(read.probability, probabilities.topk(4).values, atol=1e-5)
    assert (read.token_id.values == probabilities.topk(4).indices.numpy()).all()
    ids = [model().to_single_token(word) for word in ("red", "blue")]
    np.testing.assert_allclose(read.answer_probability, probabilities[..., ids], atol=1e-5)
    assert read.answer.values.tolist() == ["red", "blue"]
    first = int(read.token_id[0, 0, 0])
    assert read.token.values[0, 0, 0] == (model().tokenizer.decode([first]) or f"#{first}")  # beyond the tokenizer


def test_the_last_layer_is_the_model() -> None:
    read = logit_lens(model(), prompt())
    top = model()(prompt())[0, -1].softmax(-1).topk(5)
    np.testing.assert_allclose(read.probability[-1, 0], top.values.detach(), atol=1e-5)
    assert read.token_id[-1, 0].values.tolist() == top.indices.tolist()
    assert read.attrs["n_forward"] == 1
    assert read.attrs["norm"] == "final"
    assert "star" in read.attrs["prompt"]


def test_without_answers_there_are_none_and_ids_will_do() -> None:
    assert "answer_probability" not in logit_lens(model(), prompt())
    bare = pair().ours
    read = logit_lens(bare, pair().prompt(), answers=[7])
    assert read.answer.values.tolist() == ["#7"]


def test_padding_counts_as_position_but_last_is_real() -> None:
    models = pair()
    padded = models.ours.as_inputs(batch([models.prompt(n_text=3), models.prompt(n_text=9)], "right"))[0]
    read = logit_lens(models.ours, padded)
    assert read.position.item() == padded.last.item() < padded.shape[1] - 1


def test_what_does_not_fit_is_refused() -> None:
    for hook in ("z", "vision.resid_pre", "projector.hook_pre", "blocks.*.hook_*_out"):
        with pytest.raises(InputError, match="hook='.*residual stream.*'attn_out'"):
            logit_lens(model(), prompt(), hook=hook)
    with pytest.raises(InputError, match="positions=.*positions='image'"):
        logit_lens(model(), prompt(), hook="hook_image_embed")
    with pytest.raises(InputError, match="does not know 'zebra'"):
        logit_lens(model(), prompt(), answers=["zebra"])
    with pytest.raises(InputError, match=r"positions=\[99\].*prompt"):
        logit_lens(model(), prompt(), positions=99)
    with as_users_run(), pytest.raises(InputError, match="lens.*int.*TunedLens"):
        logit_lens(model(), prompt(), norm="tuned", lens=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k=0 words; expected 1 to"):
        logit_lens(model(), prompt(), k=0)
    with pytest.raises(SpanError, match="There is no span 'end'"):
        logit_lens(model(), prompt(), positions="end")


@pytest.mark.parametrize("norm", ["final", "frozen", "none"])
@pytest.mark.parametrize("hook", ["mlp_out", "resid_mid", "result"])
def test_any_hook_under_any_norm(hook: str, norm: str) -> None:
    hf, slow = pair("plain", torch.float64).hf, pair("plain", torch.float64).slow
    seen = slow.run(prompt().input_ids, prompt().pixel_values)
    read = logit_lens(model(), prompt(), hook=hook, norm=norm, positions=[2, -1], answers=["red"], k=2)
    assert read.probability.dims == ("layer", "position", *(["head"] if hook == "result" else []), "rank")
    final = seen["blocks.2.hook_resid_post"][0, [2, -1]]
    for layer, name in enumerate(model().hooks_table.resolve(hook)):
        vector = seen[name][0, [2, -1]]
        if norm != "none":
            scaled = (vector if norm == "final" else final).square().mean(-1) + 1e-5
            scaled = scaled if scaled.ndim == vector.ndim - 1 else scaled[:, None]
            vector = vector / scaled.sqrt()[..., None] * hf.model.language_model.norm.weight
        probabilities = (vector @ hf.lm_head.weight.T).softmax(-1)
        np.testing.assert_allclose(read.probability[layer], probabilities.topk(2).values, atol=1e-5)
        answer = probabilities[..., model().to_single_token("red")]
        np.testing.assert_allclose(read.answer_probability[layer][..., 0], answer, atol=1e-5)


def test_image_embeddings_stand_at_their_positions() -> None:
    image = list(prompt().token_map["image"])
    read = logit_lens(model(), prompt(), hook="hook_image_embed", positions=image[1:3])
    merged = logit_lens(model(), prompt(), hook="hook_embed", positions=image[1:3])
    assert read.probability.dims == ("position", "rank")
    np.testing.assert_allclose(read.probability, merged.probability, atol=1e-6)


def test_several_prompts_side_by_side() -> None:
    both = model().prepare(["What color is the star?", "Is it red?"])
    read = logit_lens(model(), both, answers=["red"])
    assert read.probability.dims == ("prompt", "layer", "position", "rank")
    for i, question in enumerate(("What color is the star?", "Is it red?")):
        alone = logit_lens(model(), model().prepare(question), answers=["red"])
        np.testing.assert_allclose(read.probability[i], alone.probability, atol=1e-5)
        np.testing.assert_allclose(read.answer_probability[i], alone.answer_probability, atol=1e-5)
