"""The same word means the same everywhere: positions, heads, layers, edges and hooks, in every function that takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import analysis as do
from hooked_llava.datasets import StudyRow
from hooked_llava.editing import EditRequest, finetune, key_covariance, multedit, rome
from hooked_llava.experiments.pairs import gaussian_noise, mean_embedding
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.metrics import Answer, probability
from hooked_llava.replay import Intervention, Replay
from hooked_llava.viz.figures.knockout import knockout_curves
from tests.pairs import as_users_run

# edits of a few steps need not succeed here
pytestmark = pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
Call = Callable[[Any], Any]


@cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


@cache
def prompt() -> Any:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return model().prepare("What color is the star?", images=image)


@cache
def text(shape: str = "star") -> Any:
    return model().prepare(f"Who made the {shape}?")


def red() -> Any:
    return probability(Answer.of(model(), "Red"))


def plain(found: Any) -> Any:
    """Numbers that can be compared."""
    if isinstance(found, xr.Dataset):
        return {name: plain(array) for name, array in found.data_vars.items()}
    if isinstance(found, xr.DataArray):
        return found.values
    if isinstance(found, Intervention):
        return [found.hook, plain(found.value if found.value is not None else found.add), placed(found)]
    if isinstance(found, torch.Tensor):
        return found.detach().numpy()
    return found


def placed(intervention: Intervention) -> Any:
    return Replay(model(), text()).run([[intervention]]).numpy()


def same(call: Call, spellings: list[Any]) -> None:
    with as_users_run():
        first, *others = [plain(call(spelling)) for spelling in spellings]
    for other, spelling in zip(others, spellings[1:], strict=True):
        np.testing.assert_equal(other, first, err_msg=f"{spelling!r} against {spellings[0]!r}")


# ---------------------------------------------------------------------- positions


def cached(p: Any) -> Any:
    return model().run_with_cache(text(), names_filter=("resid_post", 0), positions=p)[1]["resid_post", 0]


def patching(**options: Any) -> Any:
    return do.activation_patching(model(), text(), text("ring"), hook="hook_embed", metric=red(), **options)


POSITIONS: dict[str, Call] = {
    "run_with_cache": cached,
    "cache_size": lambda p: model().cache_size(text(), "pattern", positions=p),
    "Replay.logits": lambda p: Replay(model(), text()).logits(p),
    "Replay.run": lambda p: Replay(model(), text()).run([[Intervention(("z", 1), zero=True)]], positions=p),
    "Intervention": lambda p: placed(Intervention(("z", 1), positions=p, zero=True)),
    "Intervention.block": lambda p: placed(Intervention(("attn_scores", 1), block=(p, "last"))),
    "gaussian_noise": lambda p: gaussian_noise(model(), text(), p),
    "mean_embedding": lambda p: mean_embedding(model(), p, reference=text()),
    "activation_patching": lambda p: patching(positions=p),
    "activation_patching read": lambda p: do.activation_patching(
        model(),
        text(),
        text("ring"),
        hook="hook_embed",
        metric=lambda x: x[..., 5].sum(-1),
        logit_positions=p,
        positions="last",
    ),
    "attribution_patching read": lambda p: do.attribution_patching(
        model(), text(), text("ring"), hooks="mlp_out", metric=lambda x: x[..., 5].sum(-1), logit_positions=p
    ),
    "path_patching": lambda p: do.path_patching(
        model(), text(), text("ring"), senders="mlps", metric=red(), positions=p
    ),
    "causal_trace": lambda p: do.causal_trace(
        model(), text(), "star", corruption="ring", kinds="mlp", layers=[2], positions=p
    ),
    "attention_knockout": lambda p: do.attention_knockout(model(), text(), [(p, "last")], "all"),
    "logit_lens": lambda p: do.logit_lens(model(), text(), positions=p),
    "position_scores": lambda p: do.position_scores(model(), text(), positions=p),
    "patchscope": lambda p: do.patchscope(
        model(), text(), positions=p, layers=1, target=text("ring"), max_new_tokens=1
    ),
    "heads_by_attention": lambda p: do.heads_by_attention(model(), text(), p),
    "information_storage": lambda p: do.information_storage(model(), text(), "star", "ring", positions=p),
    "head_readings": lambda p: do.head_readings(model(), text(), 3, 2, positions=p),
    "attention_to_object": lambda p: do.attention_to_object(model(), text(), text("ring"), p),
    "key_covariance": lambda p: key_covariance(model(), [text()], 1, positions=p).moment,
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name: str) -> None:
    where = (text().token_map["question"] | text().token_map["last"]).tolist()
    joined = ["question|last", "question | last", "text & question|last", "question|rest|last - rest"]
    numbered = [where, tuple(where), np.array(where), torch.tensor(where), [p - text().shape[1] for p in where]]
    same(POSITIONS[name], [*joined, *numbered])


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("wrong", ["question|imge", "imge", [99], [1.5], [True, False]])
def test_positions_that_are_none(name: str, wrong: Any) -> None:
    with as_users_run(), pytest.raises((KeyError, ValueError), match=r"imge|99|1\.5|True"):
        POSITIONS[name](wrong)


ONE_POSITION: dict[str, Call] = {
    "logit_attribution": lambda p: do.logit_attribution(model(), text(), position=p),
    "image_attention": lambda p: do.image_attention(model(), prompt(), position=p),
}


@pytest.mark.parametrize("name", ["logit_attribution", "image_attention"])
def test_one_position(name: str) -> None:
    n = (prompt() if name == "image_attention" else text()).shape[1]
    same(ONE_POSITION[name], ["last", "last&text", "text&last", n - 1, -1, np.int64(-1), torch.tensor(n - 1), [-1]])


def test_an_edits_position() -> None:
    edit = lambda p: multedit(model(), FACT, layer=2, position=p, steps=1).requests[0]["target_probability"]  # noqa: E731
    same(edit, ["last", "last&text", "rest&last|last"])


# ---------------------------------------------------------------------- heads and layers

HEADS: dict[str, Call] = {
    "position_scores": lambda h: do.position_scores(model(), text(), heads=h),
    "information_storage": lambda h: do.information_storage(model(), text(), "star", "ring", heads=h, positions="last"),
    "attention_to_object": lambda h: do.attention_to_object(model(), text(), text("ring"), "question", heads=h),
    "ablate_heads": lambda h: do.ablate_heads(model(), text(), h, replace="zero"),
    "ablate_heads by name": lambda h: do.ablate_heads(model(), text(), {"mine": h}, replace="zero"),
    "patch_importance": lambda h: do.patch_importance(model(), prompt(), heads=h),
    "head_readings": lambda h: [do.head_readings(model(), text(), layer, head, top=2) for layer, head in h],
}


@pytest.mark.parametrize("name", HEADS)
def test_layer_and_head_pairs(name: str) -> None:
    n_layers, n_heads = model().cfg.n_layers, model().cfg.n_heads
    pairs = [(n_layers - 1, 1), (0, n_heads - 2)]
    spellings: list[Any] = [pairs, [(-1, 1), (-n_layers, -2)], [(-1, 1 - n_heads), (0, -2)], np.array(pairs)]
    if name != "head_readings":
        spellings.append([torch.tensor(pair) for pair in pairs])
    same(lambda h: plain_list(HEADS[name](h)), spellings)
    for wrong in ([(n_layers, 0)], [(-n_layers - 1, 0)], [(0, n_heads)], [(0.5, 1)]):
        with as_users_run(), pytest.raises(ValueError, match=r"heads|head"):
            HEADS[name](wrong)


def plain_list(found: Any) -> Any:
    return [plain(one) for one in found] if isinstance(found, list) else plain(found)


def patching_at(layers: Any) -> Any:
    pair = (model(), text(), text("ring"))
    return do.activation_patching(*pair, layers=layers, positions="last", metric=red())


FACT = EditRequest("Who made the star?", "Boris")
LAYERS: dict[str, Call] = {
    "activation_patching": patching_at,
    "causal_trace": lambda at: do.causal_trace(model(), text(), "star", corruption="ring", layers=at, kinds="mlp"),
    "attention_knockout": lambda at: do.attention_knockout(model(), text(), "question->last", centers=at),
    "finetune": lambda at: finetune(model(), FACT, layers=at, steps=1).layers,
}
ONE_LAYER: dict[str, Call] = {
    "key_covariance": lambda at: key_covariance(model(), [text()], at).moment,
    "multedit": lambda at: multedit(model(), [FACT], layer=at, position="last").method["layer"],
    "rome": lambda at: rome(model(), FACT, key_covariance(model(), [text()], at), position="last").method["layer"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    n = model().cfg.n_layers
    same(LAYERS[name], [[n - 1], [-1], -1, n - 1, np.int64(-1), torch.tensor([n - 1])])
    for wrong in (n, [-n - 1], [1.5], []):
        with as_users_run(), pytest.raises(ValueError, match="layers"):
            LAYERS[name](wrong)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_one_layer(name: str) -> None:
    same(ONE_LAYER[name], [model().cfg.n_layers - 2, -2, np.int64(-2)])


# ---------------------------------------------------------------------- edges

EDGES = ["question->last", ("question", "last"), ["question->last"], [("question", "last")], (("question", "last"),)]


def test_edges() -> None:
    named = {"question->last": ("question", "last")}
    same(lambda e: do.attention_knockout(model(), text(), e, 3), [*EDGES, named])
    row = StudyRow(id="1", question="Who made the star?", answer="?", kind="fact")
    same(lambda e: do.knockout_study(model(), [row], e, only_correct=False, total=False), [*EDGES, named])
    same(lambda e: placed(Intervention(("attn_scores", 2), block=e)), ["question->last", ("question", "last")])
    weighted = lambda e: placed(Intervention(("attn_scores", 2), reweight=e, factor=2.0))  # noqa: E731
    same(weighted, ["question->last", ("question", "last")])
    result = do.attention_knockout(model(), text(), ["system->last", "question->last"], 3)
    drawn = lambda e: [line.get_ydata() for line in knockout_curves(result, edges=e).axes[0].lines]  # noqa: E731
    same(drawn, [*EDGES, named])


# ---------------------------------------------------------------------- hooks

Z = ["blocks.2.attn.hook_z", ("z", 2), ("hook_z", 2), ("z", -4), ("z", 2, "attn"), ("z", 2, "a"), ("attn.z", 2), "z2"]
EMBED = ["hook_embed", "embed", ("embed", None), ("hook_embed",)]
HOOKS: dict[str, Call] = {
    "run_with_cache": lambda h: next(iter(model().run_with_cache(text(), names_filter=h)[1].values())),
    "Intervention": lambda h: placed(Intervention(h, positions="last", scale=0.5)),
    "run_with_hooks": lambda h: model().run_with_hooks(text(), fwd_hooks=[(h, lambda t, hook: 0.5 * t)]),
    "activation_patching": lambda h: do.activation_patching(
        model(), text(), text("ring"), hook=h, positions="last", metric=red()
    ),
    "attribution_patching": lambda h: next(
        iter(do.attribution_patching(model(), text(), text("ring"), hooks=h, metric=red()).values())
    ),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("spellings", [Z, EMBED], ids=["z", "embed"])
def test_hooks(name: str, spellings: list[Any]) -> None:
    same(HOOKS[name], spellings)


def test_a_stream_is_read_under_any_spelling() -> None:
    names: list[Any] = ["blocks.2.hook_mlp_out", ("mlp_out", 2), ("mlp_out", -4), ("mlp_out", 2, "b")]
    same(lambda h: do.logit_lens(model(), text(), hook=h), names)


def test_what_a_cache_understands_an_intervention_does() -> None:
    """Every name and layer that TransformerLens's get_act_name puts together."""
    _, kept = model().run_with_cache(prompt(), names_filter="*")
    table, layer = model().hooks_table, 3
    spellings: list[Any] = ["k3", "pre3", "z3", "scale3ln1", "normalized3ln2", "scale", "normalized", "embed", "logits"]
    spellings += [
        ("scale", None),
        ("normalized", layer, "ln1"),
        ("attn", layer),
        ("attn_logits", layer),
        ("key", layer),
    ]
    spellings += [("mlp_pre", layer), ("mlp_post", layer), ("pre", layer, "m"), ("resid_mid", layer, "blocks")]
    for name, hook in table.hooks.items():
        if hook.tower == "language" and (at := hook.layer) is not None:
            part, _, short = hook.site.rpartition("hook_")
            kind = part.rstrip(".")
            spellings += [(short, at, kind or None), (short, at - table.config.language.n_layers, kind or None)]
        spellings += [name, *(alias.replace("{i}", "3") for alias in hook.spec.aliases)]
    for spelling in spellings:
        if isinstance(spelling, str) and spelling.startswith("vision.blocks.") and spelling not in kept:
            continue  # an alias of a block of the vision tower that is not run
        assert torch.equal(kept[table.one(spelling)], kept[spelling]), spelling
