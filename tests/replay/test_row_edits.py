"""Edits of many rows become one hook function, which leaves the batch it is given alone."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.model.components import HookPoint
from hooked_llava.replay.binding import bind
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.row_edits import RowEdit, edit_function, edited
from tests.pairs import pair


def edits_at(offset: int | dict[int, int]) -> tuple[list[RowEdit], torch.Tensor]:
    model, inputs = pair().ours, pair().ours.as_inputs(pair().prompt())
    zero = bind(Intervention("blocks.1.hook_mlp_out", positions=[5, 7], zero=True), model, inputs)
    double = bind(Intervention("blocks.1.hook_mlp_out", positions=[6], scale=2.0), model, inputs)
    return [RowEdit(0, 0, zero, offset), RowEdit(2, 0, double, offset)], torch.ones(3, 4, 48)


def test_each_row_gets_its_own_change_and_the_given_batch_none() -> None:
    edits, batch = edits_at(4)
    changed = edit_function(edits)(batch, hook=HookPoint())
    expected = torch.ones(3, 4, 48)
    expected[0, [1, 3]] = 0
    expected[2, 2] = 2
    assert torch.equal(changed, expected)
    assert torch.equal(batch, torch.ones(3, 4, 48))


def test_a_table_leaves_out_positions_that_a_row_does_not_hold() -> None:
    edits, batch = edits_at({7: 0, 9: 1})
    changed = edit_function(edits)(batch, hook=HookPoint())
    assert (changed[0, 0] == 0).all()
    assert changed[0, 1:].eq(1).all()
    assert changed[1:].eq(1).all()


def test_hooks_are_gone_after_the_block_exceptions_included() -> None:
    model, (edits, _) = pair().ours, edits_at(0)
    with edited(model, edits):
        assert model.hook_dict["blocks.1.hook_mlp_out"].hooked
    assert not any(point.hooked for point in model.hook_dict.values())
    with pytest.raises(ZeroDivisionError), edited(model, edits):
        _ = 1 / 0
    assert not any(point.hooked for point in model.hook_dict.values())
