"""Replay equals the full run with the same hooks, for every hook, any positions, any batch."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from hooked_llava.errors import HookNameError, InputError, StaleReplayError
from hooked_llava.model.cache_hooks import axis_sizes
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Intervention, Replay
from tests.builders import make_hf_model, make_prompt
from tests.oracles.naive_interventions import run_naively
from tests.pairs import FAMILY

CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"n_key_value_heads": 2},
    {"n_key_value_heads": 1, "attention_bias": True},
    {"vision_feature_layer": [-2, -1]},
    {"select_strategy": "full"},
    FAMILY["mistral-clip"],
    FAMILY["qwen2-siglip"],
    FAMILY["phi-clip"],
)
IMAGE_SIDE = ("vision.", "projector.", "hook_image_embed")


@cache
def hf_model_of(config: int) -> LlavaForConditionalGeneration:
    return make_hf_model(seed=config, **CONFIGS[config])


@cache
def model_of(config: int) -> HookedLLaVA:
    return HookedLLaVA.from_hf(hf_model_of(config))


def prompts(
    model: HookedLLaVA, config: int, *, batch: int, n_images: int, padding: str, lead: int = 0, unequal: bool = False
) -> Any:
    """A batch whose rows have paddings of different lengths, `lead` words before the images, and maybe unequally many."""
    fields = make_prompt(hf_model_of(config), batch=batch, n_images=n_images, seed=batch)
    if unequal and batch > 1 and n_images > 1:  # the first prompt's last image becomes words
        ids = fields["input_ids"]
        image = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
        ids[0, image[len(image) // n_images * (n_images - 1) :]] = 9
        fields["pixel_values"] = torch.cat([fields["pixel_values"][: n_images - 1], fields["pixel_values"][n_images:]])
    if lead:
        ids = fields["input_ids"]
        fields["input_ids"] = torch.cat([ids[:, :1], ids[:, -lead:], ids[:, 1:]], dim=1)
        fields["attention_mask"] = torch.ones_like(fields["input_ids"])
    if padding != "none" and batch > 1:
        width = fields["input_ids"].shape[1] + batch - 1
        ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.long)
        for row in range(batch):
            shift = row if padding == "left" else 0
            ids[row, shift : shift + fields["input_ids"].shape[1]] = fields["input_ids"][row]
            mask[row, shift : shift + fields["input_ids"].shape[1]] = 1
        fields |= {"input_ids": ids, "attention_mask": mask}
    return model.as_inputs(fields)


def random_intervention(model: HookedLLaVA, inputs: Any, name: str, rng: random.Random) -> Intervention:
    """Any action that the hook can take, at random positions and heads."""
    spec, n = model.hooks_table[name], inputs.shape[1]
    where: dict[str, Any] = {}
    if name.startswith(IMAGE_SIDE):
        where["positions"] = rng.choice([None, 0, rng.sample(range(4), 2)])
        where["image"] = rng.choice([None, 0])
    else:
        where["positions"] = rng.choice([None, rng.randrange(n), sorted(rng.sample(range(n), 3)), "last", "text"])
    if "head" in spec.axes:
        where["heads"] = rng.choice([None, 1, [0, 3]])
    if "d_mlp" in spec.axes:
        where["neurons"] = rng.choice([None, [3, 5, 8]])
    if name.endswith("attn_scores") and not name.startswith("vision."):
        if rng.random() < 0.25:
            return Intervention(name, temperature=rng.choice([0.5, 2.0]), **where)
        where.pop("positions")
        edge = (
            rng.choice(["image" if inputs.n_images else "rest", "text", [0, 1, 2]]),
            rng.choice(["last", [n - 2, n - 1], "text", []]),
        )
        weighted = [{"block": edge}, {"reweight": edge, "factor": rng.choice([0.0, 0.3, 4.0])}]
        return Intervention(name, **rng.choice(weighted), **where)
    actions: list[dict[str, Any]] = [{"scale": 0.5}, {"scale": 1.7}]
    if not name.endswith("hook_scale"):
        actions += [{"zero": True}, {"fn": lambda t: 0.5 * t.flip(-1)}]
        if where["positions"] is None or isinstance(where["positions"], list) or where["positions"] == "text":
            actions += [{"mean": True}]
    if name.endswith("attn_scores"):
        actions += [{"temperature": 0.5}, {"temperature": 2.0}]
    if "key" not in spec.axes and spec.axes[-1] != "1":
        d = 3 if where.get("neurons") else axis_sizes(model.hooks_table, name, inputs)[spec.axes[-1]]
        vector = torch.randn(d, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
        actions += [{"value": vector}, {"add": vector}]
    return Intervention(name, **where, **rng.choice(actions))


def largest_error(
    model: HookedLLaVA, inputs: Any, runs: list[list[Intervention]], batch_size: int | None, *, everywhere: bool = False
) -> float:
    """Difference between Replay and the naive runs at the last real positions, or all real ones, relative to the logits."""
    where: Any = list(range(inputs.shape[1])) if everywhere else "last"
    quick = Replay(model, inputs).run(runs, positions=where, batch_size=batch_size)
    quick = quick[:, None] if len(inputs) == 1 else quick
    slow = run_naively(model, inputs, runs)
    if everywhere:
        quick, slow = quick[:, inputs.attention_mask], slow[:, inputs.attention_mask]
    else:
        slow = slow[:, torch.arange(len(inputs)), inputs.last]
    scale = slow.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-3)
    return ((quick - slow).abs() / scale).max().item()


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    config=st.integers(0, len(CONFIGS) - 1),
    batch=st.integers(1, 3),
    n_images=st.integers(1, 2),
    padding=st.sampled_from(["none", "left", "right"]),
    lead=st.integers(0, 2),
    unequal=st.booleans(),
    everywhere=st.booleans(),
    batch_size=st.sampled_from([None, 2, 5]),
    seed=st.integers(0, 10**6),
)
def test_several_interventions_at_random_hooks(
    config: int,
    batch: int,
    n_images: int,
    padding: str,
    lead: int,
    unequal: bool,
    everywhere: bool,
    batch_size: int | None,
    seed: int,
) -> None:
    model, rng = model_of(config), random.Random(seed)
    shape: dict[str, Any] = {"batch": batch, "n_images": n_images, "padding": padding}
    inputs = prompts(model, config, **shape, lead=lead, unequal=unequal)
    names = model.hooks_table.names
    runs = [
        [random_intervention(model, inputs, rng.choice(names), rng) for _ in range(rng.randint(1, 3))] for _ in range(5)
    ]
    assert largest_error(model, inputs, runs, batch_size, everywhere=everywhere) < 1e-5


def test_what_mixes_positions_sees_placeholders_before_the_merge() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=2, n_images=1, padding="left")
    changes: list[dict[str, Any]] = [{"mean": True}, {"positions": [3, 8], "mean": True}, {"fn": lambda t: t.flip(0)}]
    assert largest_error(model, inputs, [[Intervention("hook_text_embed", **c)] for c in changes], None) < 1e-5


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_every_hook(padding: str) -> None:
    model, rng = model_of(1), random.Random(7)
    inputs = prompts(model, 1, batch=2, n_images=1, padding=padding)
    runs = [[random_intervention(model, inputs, name, rng)] for name in model.hooks_table.names]
    assert largest_error(model, inputs, runs, None) < 1e-5


def test_text_only() -> None:
    model, rng = model_of(0), random.Random(3)
    inputs = prompts(model, 0, batch=1, n_images=0, padding="none")
    names = [name for name in model.hooks_table.names if not name.startswith(IMAGE_SIDE)]
    runs = [[random_intervention(model, inputs, name, rng)] for name in names]
    assert largest_error(model, inputs, runs, None) < 1e-5


def test_logits_at_every_position() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    runs = [
        [Intervention("blocks.1.hook_mlp_out", positions=[6], zero=True)],
        [Intervention("ln_final.hook_scale", scale=2.0)],
    ]
    everywhere = list(range(inputs.shape[1]))
    found = Replay(model, inputs).run(runs, positions=everywhere)
    torch.testing.assert_close(found, run_naively(model, inputs, runs)[:, 0], rtol=1e-5, atol=1e-5)


def test_runs_that_change_nothing_give_the_kept_logits_bit_for_bit() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    replay = Replay(model, inputs)
    nothing = [
        [],
        [Intervention("blocks.0.attn.hook_attn_scores", block=("image", []))],
        [Intervention("blocks.0.attn.hook_attn_scores", reweight=("image", "last"), factor=1.0)],
        [Intervention("vision.blocks.0.attn.hook_attn_scores", temperature=1)],
    ]
    assert torch.equal(replay.run(nothing), replay.logits().expand(4, -1))
    assert replay.work.token_layers == 0


def test_patching_a_run_with_itself_changes_nothing() -> None:
    model = model_of(2)
    inputs = prompts(model, 2, batch=1, n_images=1, padding="none")
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: not name.startswith(IMAGE_SIDE))
    names = [name for name in cache if not name.startswith(IMAGE_SIDE) and not name.endswith("attn_scores")]
    replay = Replay(model, inputs)
    found = replay.run([[Intervention(name, value=cache[name][0])] for name in names])
    torch.testing.assert_close(found, replay.logits().expand(len(names), -1), rtol=1e-5, atol=1e-5)


def test_one_token_per_layer_for_a_change_at_the_last_position() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    replay = Replay(model, inputs)
    replay.run([[Intervention(("blocks.1.attn.hook_z"), positions="last", zero=True)]])
    assert replay.work.token_layers == model.cfg.n_layers - 1
    assert replay.work.share == (model.cfg.n_layers - 1) / (model.cfg.n_layers * inputs.shape[1])


def test_a_metric_is_taken_of_each_run() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=2, n_images=1, padding="left")
    runs = [[Intervention("blocks.0.hook_attn_out", positions="last", scale=s)] for s in (0.0, 0.5, 1.5)]
    replay = Replay(model, inputs)
    logits = replay.run(runs)
    assert torch.equal(replay.run(runs, lambda x: x[..., 4] - x[..., 9]), logits[..., 4] - logits[..., 9])


def test_recomputed_activations_are_returned() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    run = [Intervention("blocks.1.hook_resid_pre", positions=[7], zero=True)]
    logits, caches = Replay(model, inputs).run_with_cache([run], ["resid_mid", "ln_final.hook_scale"])
    hooks = [("blocks.1.hook_resid_pre", lambda t, hook: torch.cat([t[:, :7], t[:, 7:8] * 0, t[:, 8:]], 1))]
    with model.hooks(hooks):
        full, cache = model.run_with_cache(inputs, names_filter="resid_mid")
    torch.testing.assert_close(logits[0], full[0, -1], rtol=1e-5, atol=1e-5)
    assert set(caches[0]) == {"blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid", "ln_final.hook_scale"}
    torch.testing.assert_close(caches[0]["blocks.1.hook_resid_mid"], cache["resid_mid", 1][:, 7:], rtol=1e-5, atol=1e-5)


def test_embeddings_are_recorded_and_the_image_side_is_refused() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=2, n_images=1, padding="none")
    replay = Replay(model, inputs)
    _, (seen,) = replay.run_with_cache([[Intervention("hook_embed", positions=3, zero=True)]], "hook_embed")
    assert seen["hook_embed"].shape == (2, inputs.shape[1] - 3, model.cfg.d_model)
    assert not seen["hook_embed"][:, 0].any()
    assert torch.equal(seen["hook_embed"][:, 1:], replay.kept.entering(0, 4))
    assert replay.work.share > 0
    with pytest.raises(InputError, match="fires.*image.*model.run_with_hooks"):
        replay.run_with_cache([[]], "vision.resid_pre")
    assert replay.run_with_cache([], "hook_embed")[1] == []


def test_images_are_kept_as_they_were() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    replay, run = Replay(model, inputs), [[Intervention("vision.blocks.0.hook_mlp_out", scale=0.5)]]
    expected = Replay(model, inputs).run(run)
    inputs.pixel_values.zero_()  # the tower is run when somebody first changes something in it
    assert torch.equal(replay.run(run), expected)


def test_refuses_to_run_once_weights_have_changed() -> None:
    model = HookedLLaVA.from_hf(make_hf_model(seed=9))
    replay = Replay(model, prompts(model, 0, batch=1, n_images=1, padding="none"))
    weight = model.blocks[1].mlp.down.weight
    kept = weight.clone()
    weight.data.mul_(1.5)  # .data does not count as a write; the entries tell
    with pytest.raises(StaleReplayError, match="weights have changed"):
        replay.run([[]])
    weight.data.copy_(kept)
    assert replay.run([[]]).shape[0] == 1
    with torch.no_grad():
        weight.add_(0.0)  # a counted write, even of the same numbers
    with pytest.raises(StaleReplayError, match="Make a new Replay"):
        replay.run([[]])


def test_refuses_to_run_while_others_listen() -> None:
    model = HookedLLaVA.from_hf(make_hf_model(seed=9))
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    replay = Replay(model, inputs)
    with model.hooks([("blocks.0.hook_resid_pre", lambda t, hook: None)]):
        with pytest.raises(StaleReplayError, match="blocks.0.hook_resid_pre"):
            replay.run([[]])
        with pytest.raises(InputError, match="reset_hooks"):
            Replay(model, inputs)
    replay.run([[]])
    for attach in (
        model.blocks[1].mlp.register_forward_hook(lambda *_: None),
        model.hook_dict["blocks.0.hook_resid_pre"].register_forward_pre_hook(lambda *_: None),
    ):
        with pytest.raises(StaleReplayError, match="Functions are attached to"):
            replay.run([[]])
        attach.remove()
    replay.run([[]])


def test_a_weight_that_is_no_number_is_no_change() -> None:
    model = HookedLLaVA.from_hf(make_hf_model(seed=9))
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.fill_(float("nan"))
    assert Replay(model, prompts(model, 0, batch=1, n_images=1, padding="none")).run([[]]).shape[0] == 1


def test_keeps_what_was_forecast_and_survives_hooks_that_write_in_place() -> None:
    model = model_of(1)
    inputs = prompts(model, 1, batch=2, n_images=1, padding="none")
    replay = Replay(model, inputs)
    assert replay.nbytes == Replay.forecast(model, inputs)
    before = [stream.clone() for stream in replay.kept.resid.values()]
    replay.run([[Intervention(f"blocks.{i}.hook_resid_pre", fn=lambda t: t.mul_(0.0))] for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(before, replay.kept.resid.values(), strict=True))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_run_kept_on_disk_gives_the_same(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = model_of(0)
    inputs = prompts(model, 1, batch=2, n_images=1, padding="left")
    whole, kept = Replay(model, inputs), Replay(model, inputs, offload_folder=tmp_path, dtype=dtype)
    assert not list(tmp_path.iterdir())
    assert kept.nbytes == Replay.forecast(model, inputs, dtype=dtype)
    if dtype is None:
        held = {x.untyped_storage().data_ptr() for x in (*kept.kept.resid.values(), *kept.kept.kv.layer(1))}
        assert len(held) == model.cfg.n_layers + 2  # no storage is shared with another
    run = [
        [Intervention("blocks.1.attn.hook_z", positions="last", zero=True)],
        [Intervention("vision.blocks.0.hook_mlp_out", zero=True)],
    ]
    torch.testing.assert_close(kept.run(run), whole.run(run), rtol=1e-5, atol=1e-5)
    change = Intervention("hook_embed", positions=[-3], scale=2.0)
    branch = kept.branch(change)
    torch.testing.assert_close(branch.run(run[:1]), whole.branch(change).run(run[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.run(run), whole.run(run), rtol=1e-5, atol=1e-5)  # the branch wrote to none of it
    assert branch.nbytes == kept.nbytes
    assert not list(tmp_path.iterdir())


def test_half_precision_keeps_half_as_much_and_stays_close() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    whole, half = Replay(model, inputs), Replay(model, inputs, dtype=torch.bfloat16)
    assert half.nbytes * 2 == whole.nbytes
    with pytest.raises(InputError, match=r"dtype=torch\.int.*floating point.*torch\.bfloat16"):
        Replay(model, inputs, dtype=torch.int8)
    run = [[Intervention("blocks.1.hook_mlp_out", positions="last", zero=True)]]
    assert (half.run(run) - whole.run(run)).abs().max() < 0.05 * whole.run(run).abs().max()


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        ({"hook": "blocks.0.hook_resid_prae", "zero": True}, HookNameError, "Did you mean: blocks.0.hook_resid_pre"),
        ({"hook": "resid_pre", "zero": True}, InputError, "'resid_pre' means 3 hooks"),
        ({"hook": "blocks.0.hook_mlp_out", "zero": True, "positions": [99]}, InputError, r"positions=\[99\]"),
        (
            {"hook": "blocks.0.attn.hook_z", "zero": True, "heads": 4},
            InputError,
            r"heads=\[4\].*'blocks\.0\.attn\.hook_z'.*-4\.\.3",
        ),
        ({"hook": "blocks.0.hook_mlp_out", "zero": True, "heads": 0}, InputError, "blocks.0.hook_mlp_out.*no heads"),
        ({"hook": "blocks.0.hook_mlp_out", "block": ("image", "last")}, InputError, "attn_scores"),
        ({"hook": "blocks.0.hook_mlp_out", "value": torch.zeros(7)}, InputError, r"shape \(7,\).*shape \(12, 48\)"),
        (
            {"hook": "blocks.0.hook_mlp_out", "zero": True, "image": 0},
            InputError,
            "image=.*image side.*'blocks.0.hook_mlp_out'",
        ),
        ({"hook": "hook_image_embed", "zero": True, "positions": "last"}, InputError, "patch indices"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_computed(
    run: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = model_of(0)
    replay = Replay(model, prompts(model, 0, batch=1, n_images=1, padding="none"))
    with pytest.raises(error, match=message):
        replay.run([[Intervention(**run)]])
    assert replay.work.token_layers == 0


def test_an_interrupted_sweep_goes_on_where_it_stopped() -> None:
    model = model_of(0)
    inputs = prompts(model, 0, batch=1, n_images=1, padding="none")
    replay = Replay(model, inputs)
    calls = []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits[..., 0]

    runs = [[Intervention("blocks.0.hook_mlp_out", positions=[p], zero=True)] for p in range(inputs.shape[1])]
    sweep = replay.sweep(runs, metric, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    done, work = sweep.done, replay.work.token_layers
    assert 0 < done < len(runs)
    values = sweep.run()
    assert sweep.done == len(runs)
    assert replay.work.token_layers < 2 * work + 3 * inputs.shape[1] * len(runs)
    assert torch.equal(values, Replay(model, inputs).run(runs, batch_size=2)[:, 0])


def test_a_metric_that_fails_loses_no_run() -> None:
    model = model_of(0)
    replay = Replay(model, prompts(model, 0, batch=1, n_images=1, padding="none"))
    runs = [[Intervention("blocks.0.hook_mlp_out", positions="last", scale=s)] for s in (0.0, 0.5, 1.5)]
    sweep = replay.sweep(runs, lambda logits: logits[:2, 0])
    for _ in range(2):
        with pytest.raises(InputError, match=r"shape \(2,\).*shape \(3, 99\).*\(3,\)"):
            sweep.run()
    assert replay.work.token_layers == 0
    with pytest.raises(InputError, match="returned float"):
        replay.run(runs, lambda logits: 1.0)  # type: ignore[arg-type,return-value]
