"""HookPoint: a function works on a private copy, and what it returns is checked."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_llava.errors import HookValueError
from hooked_llava.model.components import HookPoint, reads_only, start_graph


def point(*functions: Any, direction: Any = "fwd") -> HookPoint:
    made = HookPoint()
    made.name = "blocks.0.hook_resid_post"
    for function in functions:
        made.add_hook(function, direction)
    return made


def plus_one_in_place(x: Tensor, hook: HookPoint) -> None:
    x += 1


def test_without_functions_it_is_the_identity_and_nobody_listens() -> None:
    x = torch.randn(2, 3)
    empty = point()
    assert empty(x) is x
    assert not empty.hooked
    assert point(plus_one_in_place).hooked
    assert point(plus_one_in_place, direction="bwd").hooked


def test_a_write_in_place_takes_effect_and_leaves_what_was_given_alone() -> None:
    x = torch.zeros(2, 3)
    out = point(plus_one_in_place)(x)
    assert out.eq(1).all()
    assert x.eq(0).all()


def test_functions_follow_one_another() -> None:
    x = torch.zeros(2)
    out = point(plus_one_in_place, lambda t, hook: 3 * t, plus_one_in_place)(x)
    assert out.tolist() == [4, 4]


@pytest.mark.parametrize(
    "write",
    [
        lambda x, hook: x[:, 1].fill_(5),
        lambda x, hook: x.view(-1)[1:2].fill_(5),
        lambda x, hook: x.index_fill_(1, torch.tensor([1]), 5),
        lambda x, hook: torch.nn.init.constant_(x, 5),
    ],
)
def test_writes_through_views_are_seen(write: Any) -> None:
    def function(x: Tensor, hook: HookPoint) -> None:
        write(x, hook)

    out = point(function)(torch.zeros(1, 3))
    assert out[0, 1] == 5


def test_a_function_that_reads_gives_back_the_tensor_itself() -> None:
    x = torch.randn(3)
    assert point(lambda t, hook: None)(x) is x
    assert point(lambda t, hook: t)(x).equal(x)


def test_a_reader_is_given_no_copy() -> None:
    seen: list[Tensor] = []
    x = torch.randn(3)
    point(reads_only(lambda t, hook: seen.append(t)))(x)
    assert seen[0] is x


def test_rows_of_an_expanded_tensor_are_written_apart() -> None:
    def first_row(x: Tensor, hook: HookPoint) -> None:
        x[0] = 7

    out = point(first_row)(torch.zeros(1, 4).expand(3, 4))
    assert out.tolist() == [[7] * 4, [0] * 4, [0] * 4]


def test_in_inference_mode_writes_take_effect_too() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
        assert point(plus_one_in_place)(x).eq(1).all()
        assert x.eq(0).all()


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x, hook: x[:1], r"on blocks.0.hook_resid_post returned .* shape \(1, 3\) and torch.float32; expected"),
        (lambda x, hook: x.double(), "torch.float64; expected .* and torch.float32"),
        (lambda x, hook: x.mean(), r"shape \(\)"),
        (lambda x, hook: 3.0, r"returned float; expected.*shape \(2, 3\), or None"),
        (lambda x, hook: (x,), "returned tuple"),
        (lambda x, hook: x.to("meta"), "on meta; expected.*on cpu"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(function: Any, match: str) -> None:
    with pytest.raises(HookValueError, match=match):
        point(function)(torch.zeros(2, 3))


def test_a_function_is_given_the_point_and_partials_and_objects_will_do() -> None:
    class Scale:
        def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
            assert hook.name == "blocks.0.hook_resid_post"
            hook.ctx["seen"] = True
            return 2 * x

    def add(x: Tensor, hook: HookPoint, by: float) -> Tensor:
        return x + by

    made = point(Scale(), functools.partial(add, by=3))
    assert made(torch.ones(1)).item() == 5
    assert made.ctx == {"seen": True}


def test_the_handle_holds_the_users_own_function() -> None:
    made = point(plus_one_in_place)
    assert made.fwd_hooks[0].user_hook is plus_one_in_place
    made.remove_hooks()
    assert not made.hooked


def test_backward_functions_read_and_replace_gradients() -> None:
    grads: list[Tensor] = []
    x = torch.ones(3, requires_grad=True)
    point(lambda g, hook: grads.append(g), direction="bwd")(x).pow(2).sum().backward()
    assert grads[0].tolist() == [2, 2, 2]
    y = torch.ones(3, requires_grad=True)
    point(lambda g, hook: 10 * g, direction="bwd")(y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [10, 10, 10]


def test_a_graph_starts_only_where_gradients_are_wanted() -> None:
    assert start_graph(torch.ones(1)).requires_grad
    with torch.no_grad():
        assert not start_graph(torch.ones(1)).requires_grad
    computed = torch.ones(1, requires_grad=True) * 2
    assert start_graph(computed) is computed


def test_a_point_without_functions_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(point())).name == "blocks.0.hook_resid_post"
