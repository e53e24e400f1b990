from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_llava.errors import SpanError
from hooked_llava.prompt.positions import PatchPositions, Positions, format_runs

SETS = st.sets(st.integers(0, 40))


@given(SETS, SETS, SETS)
def test_operators_are_those_of_sets(a: set[int], b: set[int], c: set[int]) -> None:
    x, y, z = Positions(a), Positions(b), Positions(c)
    assert x | y == sorted(a | b)
    assert x & y == sorted(a & b)
    assert x - y == sorted(a - b)
    assert x ^ y == sorted(a ^ b)
    assert x - (y | z) == (x - y) & (x - z)
    assert (x | y) & z == (x & z) | (y & z)
    assert x.isdisjoint(y) == a.isdisjoint(b)


@given(SETS, SETS)
def test_the_other_side_may_be_any_iterable(a: set[int], b: set[int]) -> None:
    assert list(b) | Positions(a) == Positions(a) | iter(b)
    assert list(b) - Positions(a) == Positions(b) - a
    assert list(b) & Positions(a) == Positions(a) & list(b)


def test_is_a_sequence_that_equals_a_list() -> None:
    positions = Positions([7, 3, 3, 5])
    assert positions == [3, 5, 7]
    assert positions == (3, 5, 7)
    assert positions == range(3, 8, 2)
    assert positions != [7, 5, 3]
    assert positions != "357"
    assert positions[0] == 3
    assert positions[-1] == 7
    assert positions[1:] == Positions([5, 7])
    assert isinstance(positions[1:], Positions)
    assert 5 in positions
    assert 4 not in positions
    assert hash(positions) == hash(Positions([3, 5, 7]))
    assert not Positions()


def test_indexes_tensors_and_arrays() -> None:
    positions = Positions([2, 0])
    values = torch.arange(12).view(1, 3, 4)
    assert torch.equal(values[0, positions], values[0, [0, 2]])
    assert torch.equal(values[:, positions.tensor()], values[:, [0, 2]])
    assert np.arange(5)[positions].tolist() == [0, 2]
    assert positions.tensor().dtype == torch.int64
    assert positions.tolist() == [0, 2]


def test_takes_numpy_and_torch_ints() -> None:
    assert Positions(np.array([2, 1])) == [1, 2]
    assert Positions(torch.tensor([2, 1])) == [1, 2]


@pytest.mark.parametrize("item", [-1, 1.0, True, "3"])
def test_refuses_what_is_no_position(item: object) -> None:
    with pytest.raises(SpanError, match=f"{item!r}.*position.*from 0"):
        Positions([item])


def test_shows_runs() -> None:
    assert repr(Positions([1, 2, 3, 9])) == "Positions(1..3, 9)"
    assert format_runs([]) == ""


def test_patch_positions_carry_the_share_outside_and_operators_drop_it() -> None:
    patches = PatchPositions([4, 5], outside=0.25)
    assert patches == [4, 5]
    assert repr(patches) == "PatchPositions(4..5; 25% outside)"
    assert repr(PatchPositions([4, 5])) == "PatchPositions(4..5)"
    assert type(patches | [9]) is Positions
