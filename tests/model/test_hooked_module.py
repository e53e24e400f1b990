"""Functions on hooks: contexts that leave no trace, writes that stay where they belong, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_llava.errors import HookNameError, HookValueError, InputError
from hooked_llava.model.components import HookPoint
from hooked_llava.model.llava import HookedLLaVA
from tests.pairs import Pair, batch, off, pair


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def look(x: Tensor, hook: HookPoint) -> None:
    assert x.isfinite().any()


@pytest.fixture
def models() -> Iterator[Pair]:
    """The shared pair; a test that leaves functions behind fails."""
    shared = pair()
    yield shared
    left = attached(shared.ours)
    shared.ours.reset_hooks(including_permanent=True)
    assert left == 0, "the test leaves functions attached"


def attached(model: HookedLLaVA) -> int:
    """Functions on any hook, by torch's count and by TransformerLens's, which must agree."""
    points = [module for module in model.modules() if isinstance(module, HookPoint)]
    by_torch = sum(len(p._forward_hooks) + len(p._backward_hooks) for p in points)
    assert by_torch == sum(len(p.fwd_hooks) + len(p.bwd_hooks) for p in points)
    return by_torch


# ---------------------------------------------------------------------- contexts


def test_a_context_removes_what_it_added(models: Pair) -> None:
    ours, prompt = models.ours, models.prompt()
    plain = ours(**prompt)
    with ours.hooks([("resid_pre", double)], [("resid_pre", look)]) as same:
        assert same is ours
        assert attached(ours) == 6
        assert not torch.equal(ours(**prompt), plain)
    assert attached(ours) == 0
    assert torch.equal(ours(**prompt), plain)


def test_an_exception_leaves_no_trace(models: Pair) -> None:
    def fail(x: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("from within")

    for run in (models.ours.run_with_hooks, models.ours.run_with_cache):
        with pytest.raises(RuntimeError, match="from within"), models.ours.hooks([("blocks.1.hook_resid_pre", fail)]):
            run(models.prompt())
        assert attached(models.ours) == 0
    with pytest.raises(RuntimeError, match="from within"):
        models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("z", look), ("blocks.1.hook_mlp_out", fail)])
    assert attached(models.ours) == 0
    assert models.ours.context_level == 0


def test_contexts_nest_and_leave_the_users_own_functions(models: Pair) -> None:
    ours, prompt = models.ours, models.prompt()
    ours.add_hook("blocks.0.hook_attn_out", double)
    ours.add_perma_hook("blocks.1.hook_attn_out", double)
    with_own = ours(**prompt)
    with ours.hooks([("hook_embed", double)]):
        outer = ours(**prompt)
        with ours.hooks([("blocks.2.hook_mlp_out", double)]):
            assert attached(ours) == 4
            assert not torch.equal(ours(**prompt), outer)
        assert torch.equal(ours(**prompt), outer)
        ours.run_with_cache(prompt)
        ours.run_with_hooks(prompt, fwd_hooks=[("z", look)])
        assert torch.equal(ours(**prompt), outer)
    assert torch.equal(ours(**prompt), with_own)
    ours.reset_hooks()
    assert attached(ours) == 1, "the permanent one stays"
    ours.reset_hooks(including_permanent=True)
    assert attached(ours) == 0


def test_functions_left_on_purpose_go_with_reset_hooks(models: Pair) -> None:
    with models.ours.hooks([("z", double)], reset_hooks_end=False):
        pass
    models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("hook_embed", double)], reset_hooks_end=False)
    assert attached(models.ours) == 4
    models.ours.reset_hooks()
    assert attached(models.ours) == 0


def test_reset_within_a_context_is_harmless(models: Pair) -> None:
    with models.ours.hooks([("z", double)]):
        models.ours.reset_hooks()
        models.ours.add_hook("hook_embed", double)
    assert attached(models.ours) == 1
    models.ours.reset_hooks()


def test_contexts_can_be_cleared(models: Pair) -> None:
    def remember(x: Tensor, hook: HookPoint) -> None:
        hook.ctx["seen"] = True

    point = models.ours.hook_dict["hook_embed"]
    models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("hook_embed", remember)])
    assert point.ctx == {"seen": True}
    models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("hook_embed", remember)], clear_contexts=True)
    assert point.ctx == {}


@pytest.mark.parametrize("attach", ["hooks", "run_with_hooks", "run_with_cache", "add_hook"])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blocks.0.hook_resid_pots", "Did you mean: blocks.0.hook_resid_post"),
        ("vision.blocks.2.hook_resid_post", r"after block 1.*vision\.blocks\.0\.\.1"),
        ([], "matches no hook"),
        (lambda name: False, "matches no hook"),
    ],
)
def test_names_are_checked_before_anything_is_attached(models: Pair, attach: str, name: Any, match: str) -> None:
    ours, hooks = models.ours, [("hook_embed", double), (name, double)]
    attachers: dict[str, Callable[[], Any]] = {
        "hooks": lambda: ours.hooks(hooks).__enter__(),
        "run_with_hooks": lambda: ours.run_with_hooks(models.prompt(), fwd_hooks=hooks),
        "run_with_cache": lambda: ours.run_with_cache(models.prompt(), names_filter=name),
        "add_hook": lambda: ours.add_hook(name, double),
    }
    with pytest.raises(HookNameError, match=match):
        attachers[attach]()
    assert attached(ours) == 0


def test_on_text_image_hooks_are_refused_and_globs_mean_what_fires(models: Pair) -> None:
    ours, text = models.ours, models.prompt(n_images=0)
    for names in ("vision.hook_out", "projector.*", ["hook_embed", "hook_image_embed"]):
        with pytest.raises(HookNameError, match="fire.*prompt.*image"):
            ours.run_with_hooks(text, fwd_hooks=[(names, double)])
        with pytest.raises(HookNameError, match="fire.*prompt.*image"):
            ours.run_with_cache(text, names_filter=names)
        with (
            ours.hooks([(names, double)]),
            pytest.raises(HookNameError, match=r"function.*'.*'.*no image.*reset_hooks"),
        ):
            ours(text)
    edited = ours.run_with_hooks(text, fwd_hooks=[(lambda name: name.endswith("hook_z"), double)])
    assert torch.equal(edited, ours.run_with_hooks(text, fwd_hooks=[("z", double)]))
    assert torch.equal(ours.run_with_hooks(**text, fwd_hooks=[("*hook_z", double)]), edited)


def test_hooks_beyond_the_layers_that_are_run_are_refused(models: Pair) -> None:
    ours, prompt = models.ours, models.prompt()
    stream = ours(**prompt, stop_at_layer=1)
    with pytest.raises(HookNameError, match="'blocks.2.hook_resid_pre'.*fire"):
        ours.run_with_hooks(prompt, fwd_hooks=[("blocks.2.hook_resid_pre", double)], stop_at_layer=2)
    with pytest.raises(HookNameError, match="'hook_embed'.*fire"):
        ours.run_with_hooks(stream, fwd_hooks=[("hook_embed", double)], start_at_layer=1)
    with pytest.raises(HookNameError, match="'vision.hook_out'.*fire"):
        ours.run_with_cache(stream, names_filter="vision.hook_out", start_at_layer=1)
    assert ours.run_with_hooks(prompt, fwd_hooks=[("resid_pre", double)], stop_at_layer=-1) is not None


def test_backward_functions_that_would_never_run_are_refused(models: Pair) -> None:
    with pytest.raises(InputError, match="bwd_hooks.*run"):
        models.ours.run_with_hooks(models.prompt(), bwd_hooks=[("z", look)])
    seen: list[str] = []
    with models.ours.hooks(bwd_hooks=[("blocks.0.attn.hook_z", lambda g, hook: seen.append(hook.name))]):
        models.ours(**models.prompt(), return_type="loss").backward()
    assert seen == ["blocks.0.attn.hook_z"]


# ---------------------------------------------------------------------- what functions may do


def test_identity_functions_change_nothing(models: Pair) -> None:
    prompt = models.prompt(batch=2)
    plain = models.ours(**prompt)
    fused = [name for name in models.ours.hook_dict if name not in explicit_names(models.ours)]
    for function in (look, lambda x, hook: x.clone(), lambda x, hook: x.mul_(1)):
        assert torch.equal(models.ours.run_with_hooks(prompt, fwd_hooks=[(fused, function)]), plain)
    everything = models.ours.run_with_hooks(prompt, fwd_hooks=[("*", look)])
    assert off(everything, plain) < 1e-5, "step by step, so within rounding"


def explicit_names(model: HookedLLaVA) -> list[str]:
    """Hooks with which attention and norms are computed step by step."""
    return model.hooks_table.resolve("*.hook_attn_scores") + model.hooks_table.resolve(
        ["*.hook_pattern", "*.hook_result", "*.hook_scale", "*.hook_normalized", "*_input"]
    )


IN_PLACE = [
    "hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "vision.hook_pos_embed", "*_input",
    "projector.hook_out", "hook_text_embed", "vision.hook_embed", "vision.blocks.1.hook_resid_post", "*attn.hook_*",
]  # fmt: skip


@pytest.mark.parametrize("names", IN_PLACE)
def test_a_write_in_place_equals_the_same_change_returned(models: Pair, names: str) -> None:
    def in_place(x: Tensor, hook: HookPoint) -> None:
        x[..., -1] = 0.5
        x[-1] *= 1.1

    def returned(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[..., -1] = 0.5
        x[-1] *= 1.1
        return x

    prompt = models.prompt(batch=2)
    written = models.ours.run_with_hooks(prompt, fwd_hooks=[(names, in_place)])
    assert torch.equal(written, models.ours.run_with_hooks(prompt, fwd_hooks=[(names, returned)]))
    assert not torch.equal(written, models.ours(prompt))


NEIGHBOURS = [
    ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"),
    ("blocks.0.hook_resid_pre", "hook_embed"),
    ("hook_image_embed", "projector.hook_out"),
    ("vision.blocks.0.hook_resid_pre", "vision.hook_embed"),
    ("blocks.1.hook_mlp_in", "blocks.1.hook_resid_mid"),
    ("vision.blocks.1.hook_resid_pre", "vision.blocks.0.hook_resid_post"),
]


@pytest.mark.parametrize(("written", "neighbor"), NEIGHBOURS)
@pytest.mark.parametrize("writer_first", [True, False])
def test_a_write_in_place_leaves_the_neighbors_cached_tensor(
    models: Pair, written: str, neighbor: str, writer_first: bool
) -> None:
    ours, prompt = models.ours, models.prompt()
    store: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        store[str(hook.name)] = x

    def zero(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    _, clean = ours.run_with_cache(prompt)
    own = [(written, zero), ([written, neighbor], keep)]
    with ours.hooks(own if writer_first else own[::-1]):
        _, cache = ours.run_with_cache(prompt)
    for held in (cache, store):
        assert torch.equal(held[neighbor], clean[neighbor])
    assert cache[written].eq(0).all(), "attached later, so it sees what was written"
    assert bool(store[written].eq(0).all()) == writer_first


def test_a_write_in_place_to_the_position_embeddings_leaves_the_weights(models: Pair) -> None:
    def fill(x: Tensor, hook: HookPoint) -> None:
        x[0].fill_(3)

    before = models.ours.vision.pos_embed.weight.clone()
    prompt = models.prompt(batch=2)
    with models.ours.hooks([("vision.hook_pos_embed", fill)]):
        _, cache = models.ours.run_with_cache(prompt)
    assert torch.equal(cache["vision.hook_pos_embed"][1], before)
    assert torch.equal(models.ours.vision.pos_embed.weight, before)


@pytest.mark.parametrize("name", ["vision.hook_pos_embed", "hook_text_embed", "vision.hook_patch_embed"])
def test_a_write_to_a_cached_tensor_leaves_the_weights(models: Pair, name: str) -> None:
    prompt = models.prompt()
    plain = models.ours(**prompt)
    _, cache = models.ours.run_with_cache(prompt)
    cache[name].add_(1)
    assert torch.equal(models.ours(**prompt), plain)


def test_a_change_of_one_row_leaves_the_others(models: Pair) -> None:
    def first_row(x: Tensor, hook: HookPoint) -> None:
        x[0].normal_(generator=torch.Generator().manual_seed(0))

    prompt = models.prompt(batch=2)
    plain = models.ours(**prompt)
    for name in CHECKED_BY_DIFFERENCES:
        edited = models.ours.run_with_hooks(prompt, fwd_hooks=[(name, first_row)])
        assert off(edited[1:], plain[1:]) < 1e-5, name
        assert off(edited[0], plain[0]) > 1e-4, name


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x, hook: x[:, :-1], r"blocks.0.attn.hook_z.* shape \(1, 11, 4, 12\).*expected \(1, 12, 4, 12\)"),
        (lambda x, hook: x.half(), "torch.float16; expected"),
        (lambda x, hook: "x", "returned str"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(models: Pair, function: Any, match: str) -> None:
    with pytest.raises(HookValueError, match=match):
        models.ours.run_with_hooks(models.prompt(), fwd_hooks=[(("z", 0), function)])


def test_aliases_reach_the_same_point(models: Pair) -> None:
    edited = models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("blocks.1.hook_q_input", double)])
    same = models.ours.run_with_hooks(models.prompt(), fwd_hooks=[("blocks.1.attn.hook_q_input", double)])
    assert torch.equal(edited, same)


def test_results_can_come_from_another_run(models: Pair) -> None:
    """Patching a run with itself changes nothing; with another run's stream it gives that run's logits."""
    ours, clean, other = models.ours, models.prompt(seed=1), models.prompt(seed=2)
    clean_logits, cache = ours.run_with_cache(clean, names_filter=["resid_pre", "z", "hook_image_embed"])
    for name in ("blocks.1.hook_resid_pre", "blocks.2.attn.hook_z", "hook_image_embed"):
        patched = ours.run_with_hooks(clean, fwd_hooks=[(name, lambda x, hook: cache[hook.name])])
        assert torch.equal(patched, clean_logits)
    moved = ours.run_with_hooks(other, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: cache[hook.name])])
    assert torch.equal(moved, clean_logits)


# ---------------------------------------------------------------------- gradients


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].sum() - logits[:, -1, 8].sum()


CHECKED_BY_DIFFERENCES = [
    "vision.hook_patch_embed", "vision.hook_pos_embed", "vision.blocks.1.attn.hook_pattern", "projector.hook_post",
    "vision.blocks.1.hook_resid_post", "hook_text_embed", "hook_embed", "blocks.1.attn.hook_q_input",
    "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_result", "blocks.1.hook_mlp_in",
    "blocks.1.mlp.hook_pre", "ln_final.hook_scale", "hook_logits",
]  # fmt: skip


def test_cached_gradients_are_those_of_autograd_and_of_finite_differences() -> None:
    models = pair("grouped", torch.float64)
    prompt = batch([models.prompt(n_text=3), models.prompt(n_text=6, n_images=2)], "left")
    logits, cache = models.ours.run_with_cache(prompt, names_filter="*", incl_bwd=True, metric=metric)
    assert not logits.requires_grad
    assert {name.removesuffix("_grad") for name in cache} == set(models.ours.hook_dict)
    generator = torch.Generator().manual_seed(0)
    for name in models.ours.hook_dict:
        gradient, value = cache[f"{name}_grad"], cache[name]
        assert gradient.shape == value.shape, name
        assert gradient.isfinite().all(), name
        if name not in CHECKED_BY_DIFFERENCES:
            continue
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        step = 1e-6
        ends = [
            metric(models.ours.run_with_hooks(prompt, fwd_hooks=[(name, moved(sign * step * direction))]))
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]).item() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def moved(by: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: x + by


def test_gradients_reach_both_sides_and_no_weight(models: Pair) -> None:
    ours = models.ours
    _, cache = ours.run_with_cache(models.prompt(), incl_bwd=True, return_type="loss")
    for name in ("vision.hook_patch_embed", "projector.hook_out", "hook_text_embed", "blocks.0.attn.hook_pattern"):
        assert cache[f"{name}_grad"].abs().sum() > 0, name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in ours.parameters())
    assert all(w.grad is None for w in models.hf.parameters())


def test_gradients_flow_through_a_plain_forward(models: Pair) -> None:
    """A function that only keeps the tensor has one whose gradient can be asked for, as in TransformerLens."""
    kept: dict[str, Tensor] = {}
    names = ["hook_image_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]

    def keep(x: Tensor, hook: HookPoint) -> None:
        x.retain_grad()
        kept[str(hook.name)] = x

    prompt = models.prompt()
    with models.ours.hooks([(names, keep)]):
        logits = models.ours(prompt)
    metric(logits).backward(retain_graph=True)
    retained = [kept[name].grad.clone() for name in names]
    gradients = torch.autograd.grad(metric(logits), [kept[name] for name in names])
    _, cache = models.ours.run_with_cache(prompt, names_filter=names, incl_bwd=True, metric=metric)
    for name, gradient, own in zip(names, gradients, retained, strict=True):
        assert off(gradient, cache[f"{name}_grad"]) < 1e-6
        assert off(own, gradient) < 1e-6
    with torch.no_grad():
        assert not models.ours(prompt).requires_grad


def test_a_forward_with_a_cache_builds_no_graph(models: Pair) -> None:
    logits, cache = models.ours.run_with_cache(models.prompt())
    assert torch.is_grad_enabled()
    assert not logits.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.values())
