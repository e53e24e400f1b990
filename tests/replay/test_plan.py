"""Where a run enters, and which runs share a pass."""

from __future__ import annotations

import pytest

from hooked_llava.replay.binding import bind
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.plan import PlannedRun, batches, first_positions, plan_run
from hooked_llava.replay.state import Work
from tests.pairs import batch as batch_of
from tests.pairs import pair


def plan(*interventions: Intervention) -> PlannedRun:
    model, inputs = pair().ours, pair().ours.as_inputs(pair().prompt())
    bound = [bind(one, model, inputs) for one in interventions]
    return plan_run(0, bound, inputs, model.cfg.n_layers)


@pytest.mark.parametrize(
    ("hook", "entry"),
    [
        ("hook_embed", 0),
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.1.attn.hook_z", 1),
        ("blocks.1.hook_resid_post", 2),
        ("blocks.2.hook_resid_post", 3),
        ("ln_final.hook_scale", 3),
    ],
)
def test_enters_at_the_first_layer_that_must_run_again(hook: str, entry: int) -> None:
    run = plan(Intervention(hook, positions=[6, 8], zero=True))
    assert (run.first_layer, run.start, run.changes) == (entry, 6, True)


def test_several_interventions_enter_where_the_first_does() -> None:
    late, early = (Intervention(f"blocks.{i}.hook_mlp_out", positions=[9 - i], zero=True) for i in (2, 1))
    assert (plan(late, early).first_layer, plan(late, early).start) == (1, 7)
    image = Intervention("vision.blocks.1.hook_mlp_out", zero=True)
    assert (plan(late, image).first_layer, plan(late, image).start) == (0, 1)  # the image begins at position 1


def test_a_run_that_changes_nothing_enters_nowhere() -> None:
    nothing = plan(Intervention("blocks.0.attn.hook_attn_scores", block=([], "last")))
    assert (nothing.start, nothing.changes, plan().changes) == (None, False, False)


def test_an_image_that_a_prompt_lacks_has_no_first_position() -> None:
    model = pair().ours
    inputs = model.as_inputs(batch_of([pair().prompt(n_images=2), pair().prompt()], "left"))

    def firsts(image: int | None) -> list[int]:
        return first_positions(inputs, bind(Intervention("vision.hook_out", image=image, zero=True), model, inputs))

    starts = [token_map.image_starts for token_map in inputs.token_maps]
    assert sorted(firsts(None)) == sorted([*starts[0], *starts[1]])
    assert firsts(1) == [starts[0][1]]


def test_batches_hold_every_changing_run_once_and_are_no_larger_than_allowed() -> None:
    starts = [3, None, 500, 500, 3, 200, 500]
    runs = [PlannedRun(i, (), (), i % 3, start) for i, start in enumerate(starts)]
    found = list(batches(runs, 600, 2))
    assert sorted(run.index for batch in found for run in batch) == [0, 2, 3, 4, 5, 6]
    assert max(map(len, found)) == 2
    for batch in found:
        assert len({run.start for run in batch}) == 1
        assert [run.first_layer for run in batch] == sorted(run.first_layer for run in batch)


def test_neighboring_starts_go_together() -> None:
    runs = [PlannedRun(i, (), (), 0, 590 + i) for i in range(4)]
    assert [len(batch) for batch in batches(runs, 600, 10)] == [4]


def test_work_is_counted_in_token_layers() -> None:
    work = Work(n_layers=4, n_positions=10, token_layers=20.0, runs=2)
    assert (work.forwards, work.share) == (0.5, 0.25)
    assert Work(4, 10).share == 0.0
