"""Means over a reference, of whatever kind it is given, against means taken by hand; and means that do nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava import analysis
from hooked_llava.errors import HookNameError, InputError, SpanError
from hooked_llava.experiments.pairs import mean_embedding
from hooked_llava.replay import Intervention, Replay, reference_means
from tests.pairs import batch as padded
from tests.pairs import pair
from tests.replay.test_replay import model_of, prompts

MODEL = model_of(0)
BASE = prompts(MODEL, 0, batch=1, n_images=1, padding="none")
Z = "blocks.1.attn.hook_z"


def reference(side: Any = "left") -> Any:
    """Three prompts of different lengths."""
    rows = [pair().prompt(n_text=n, seed=n) for n in (4, 7, 9)]
    return MODEL.as_inputs(padded(rows, side))


def by_hand(inputs: Any, name: str, where: str | None) -> torch.Tensor:
    """The mean over every prompt's positions, one prompt run at a time without padding."""
    rows = []
    for prompt in inputs:
        real = prompt.attention_mask[0]
        alone = MODEL.as_inputs({"input_ids": prompt.input_ids[:, real], "pixel_values": prompt.pixel_values})
        cached = MODEL.run_with_cache(alone, names_filter=name)[1][name]
        if name.startswith(("vision.", "projector.", "hook_image")):
            rows.append(cached.flatten(0, 1))
        else:
            rows.append(cached[0, list(alone.token_map.real if where is None else alone.token_map[where])])
    return torch.cat(rows).mean(0)


def run(change: Intervention) -> torch.Tensor:
    return Replay(MODEL, BASE).run([[change]])[0]


PLACES = [
    (Z, "last"),
    (Z, "image"),
    ("hook_embed", "text"),
    ("blocks.2.mlp.hook_post", "text-last"),
    ("hook_embed", None),
]


@pytest.mark.parametrize(("name", "where"), PLACES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_reference_gives_the_mean(name: str, where: str | None, side: str) -> None:
    others = reference(side)
    expected = by_hand(others, name, where)
    cache = MODEL.run_with_cache(others, names_filter=name)[1]
    kinds: dict[str, Any] = {
        "inputs": others,
        "processor's dict": {
            "input_ids": others.input_ids,
            "attention_mask": others.attention_mask,
            "pixel_values": others.pixel_values,
        },
        "batches": [others[:1], others[1:]],
        "cache": cache,
        "replay": Replay(MODEL, others),
    }
    if where == "last":
        kinds["cache of these positions"] = MODEL.run_with_cache(others, names_filter=name, positions="last")[1]
    wanted = run(Intervention(name, positions=where, value=expected[None]))
    for kind, given in kinds.items():
        (found,) = reference_means(MODEL, given, [(name, where)])
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5, msg=kind)
        change = Intervention(name, positions=where, mean_of=given)
        torch.testing.assert_close(run(change), wanted, rtol=1e-4, atol=1e-4, msg=kind)
    full = MODEL.run_with_hooks(BASE, fwd_hooks=[Intervention(name, positions=where, mean_of=others)])
    assert full is not None
    torch.testing.assert_close(full[0, -1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vision.blocks.0.hook_resid_post", "projector.hook_out", "hook_image_embed"])
def test_images(name: str) -> None:
    others = prompts(MODEL, 0, batch=3, n_images=1, padding="none")
    (found,) = reference_means(MODEL, others, [(name, None)])
    torch.testing.assert_close(found[0], by_hand(others, name, None), rtol=1e-4, atol=1e-5)
    cache = MODEL.run_with_cache(others, names_filter=name)[1]
    torch.testing.assert_close(reference_means(MODEL, cache, [(name, None)])[0], found)
    two = prompts(MODEL, 0, batch=2, n_images=2, padding="none")
    held = MODEL.run_with_cache(two, names_filter=name)[1][name]
    expected = held[1::2].flatten(0, 1).mean(0)
    torch.testing.assert_close(reference_means(MODEL, two, [(name, None, 1)])[0][0], expected, rtol=1e-4, atol=1e-5)


def test_heads_and_neurons_are_cut_out_of_the_mean() -> None:
    others = reference()
    mean = by_hand(others, Z, "last")  # (head, d_head)
    wanted = run(Intervention(Z, positions="last", heads=[3, 1], value=mean[[3, 1]][None]))
    tensors: list[Any] = [mean, mean[None], mean.numpy(), mean[[3, 1]], mean[[3, 1]][None]]
    for given in [others, *tensors]:
        found = run(Intervention(Z, positions="last", heads=[3, -3], mean_of=given))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    name = "blocks.2.mlp.hook_post"
    mean = by_hand(others, name, "text")
    wanted = run(Intervention(name, positions="text", neurons=[5, 8], value=mean[[5, 8]]))
    for given in (others, mean):
        found = run(Intervention(name, positions="text", neurons=[5, 8], mean_of=given))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_ablating_heads_and_mean_embeddings_take_the_same_means() -> None:
    others = reference()
    base = prompts(MODEL, 0, batch=2, n_images=1, padding="none")
    lost = analysis.ablate_heads(MODEL, base, [(1, 2)], 7, reference=others).log_probability.sel(set="heads")
    change = Intervention(("z", 1), positions="last", heads=[2], mean_of=others)
    found = Replay(MODEL, base).run([[change]]).log_softmax(-1)[0, :, 7]
    np.testing.assert_allclose(lost.values, found.numpy(), rtol=1e-4)
    for kind in (Replay(MODEL, others), MODEL.run_with_cache(others, names_filter="z")[1]):
        again = analysis.ablate_heads(MODEL, base, [(1, 2)], 7, reference=kind).log_probability.sel(set="heads")
        np.testing.assert_allclose(again.values, lost.values, rtol=1e-4)
    embedding = mean_embedding(MODEL, "text", reference=others)
    torch.testing.assert_close(embedding.value, by_hand(others, "hook_embed", "text"), rtol=1e-4, atol=1e-5)


def test_a_reference_is_run_once_for_all_runs_that_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    others, passes = reference(), []
    embed = type(MODEL).embed
    monkeypatch.setattr(type(MODEL), "embed", lambda self, inputs: passes.append(inputs) or embed(self, inputs))
    replay = Replay(MODEL, BASE)
    passes.clear()
    runs = [
        [Intervention(("z", layer), positions="last", heads=[h], mean_of=others)]
        for layer in range(3)
        for h in range(4)
    ]
    found = replay.run(runs)
    assert len(passes) == 1
    assert found.unique(dim=0).shape[0] == len(runs)


def test_a_branch_is_its_own_reference() -> None:
    replay = Replay(MODEL, reference())
    branch = replay.branch(Intervention("hook_embed", positions="text", scale=0.5))
    means = [reference_means(MODEL, kept, [(Z, "last")])[0] for kept in (replay, branch)]
    assert not torch.allclose(*means)
    with pytest.raises(InputError, match=r"hook_\w+ .*image.*model\.run_with_hooks"):
        reference_means(MODEL, replay, [("hook_image_embed", None)])


# ---------------------------------------------------------------------- what does nothing, or is not there


@pytest.mark.parametrize("action", ["mean", "position_mean"])
@pytest.mark.parametrize(
    ("hook", "where"),
    [(Z, "last"), (Z, 3), (Z, [3, 3]), (Z, "image & last|last"), ("hook_embed", slice(2, 3)), ("hook_image_embed", 2)],
)
def test_a_mean_over_one_position_is_refused(action: str, hook: str, where: Any) -> None:
    change = Intervention(hook, positions=where, **{action: True})
    for call in (lambda: run(change), lambda: MODEL.run_with_hooks(BASE, fwd_hooks=[change])):
        with pytest.raises(InputError, match=r"position_mean.*nothing would change.*mean_of="):
            call()


def test_the_prompt_with_one_position_is_named() -> None:
    two = prompts(MODEL, 0, batch=2, n_images=1, padding="none").with_spans(word=[[5, 6], [6]])
    with pytest.raises(InputError, match="6 in prompt 1"):
        Replay(MODEL, two).run([[Intervention(Z, positions="word", mean=True)]])


def test_a_mean_over_several_positions_still_works() -> None:
    cache = MODEL.run_with_cache(BASE, names_filter=Z)[1][Z][0]
    image = list(BASE.token_map["image"])
    wanted = run(Intervention(Z, positions="image", value=cache[image].mean(0, keepdim=True)))
    for action in ("mean", "position_mean"):
        torch.testing.assert_close(run(Intervention(Z, positions="image", **{action: True})), wanted)


def test_references_that_do_not_hold_it() -> None:
    others = reference()
    cache = MODEL.run_with_cache(others, names_filter=Z)[1]
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (BASE, {"positions": "last"}, InputError, r"1 activations.*value="),
        (cache, {"hook": ("z", 2)}, HookNameError, r"blocks\.2\.attn\.hook_z"),
        (cache, {"positions": "imge"}, SpanError, "span 'imge'"),
        (others, {"positions": "question"}, SpanError, "span 'question'"),
        (dict(cache.items()), {"positions": "last"}, InputError, r"'last'.*by number"),
        (torch.zeros(7), {}, InputError, r"shape \(7,\).*shape \(12, 4, 12\)"),
        (
            {"hook": torch.zeros(1)},
            {},
            HookNameError,
            r"mean_of=.*blocks\.\d\.attn\.hook_z|hold.*blocks\.\d\.attn\.hook_z",
        ),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            run(Intervention(options.pop("hook", Z), **({"positions": None} | options), mean_of=given))
    plain = dict(MODEL.run_with_cache(BASE, names_filter=Z)[1].items())
    expected = plain[Z][0, 3:5].mean(0)
    torch.testing.assert_close(reference_means(MODEL, plain, [(Z, [3, 4])])[0][0], expected, rtol=1e-5, atol=1e-6)
