"""A sweep keeps the order of its runs whatever the batches, and can be taken up again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from hooked_llava.errors import HookedLLaVAWarning, InputError
from hooked_llava.replay import Intervention, Replay, sweep
from hooked_llava.replay.layer_pass import LayerPass
from tests.pairs import pair


def runs() -> list[list[Intervention]]:
    places = [(0, 9), (2, 3), (1, 9), (0, 2), (2, 9)]
    return [[], *([Intervention(f"blocks.{i}.hook_attn_out", positions=[p], scale=0.3)] for i, p in places)]


def test_any_batch_size_gives_the_same_rows_in_the_same_order() -> None:
    replay = Replay(pair().ours, pair().prompt())
    whole = replay.run(runs())
    for size in (1, 2, 100):
        torch.testing.assert_close(replay.run(runs(), batch_size=size), whole, rtol=1e-5, atol=1e-5)
    for i, run in enumerate(runs()):
        torch.testing.assert_close(replay.run([run])[0], whole[i], rtol=1e-5, atol=1e-5)


def test_counts_what_is_done_and_does_it_once() -> None:
    replay = Replay(pair().ours, pair().prompt())
    sweep = replay.sweep(runs(), batch_size=2)
    assert sweep.done == 0
    first = sweep.run()
    assert sweep.done == len(runs())
    work = replay.work.token_layers
    assert torch.equal(sweep.run(), first)
    assert replay.work.token_layers == work


def test_no_runs_give_no_rows_and_a_batch_has_at_least_one() -> None:
    replay = Replay(pair().ours, pair().prompt())
    assert replay.run([]).shape == (0, 99)
    with pytest.raises(InputError, match="batch_size=0"):
        replay.run(runs(), batch_size=0)


def test_batches_on_a_cpu_stay_within_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    replay, sizes = Replay(pair().ours, pair().prompt()), []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        sizes.append(len(logits))
        return logits[..., 0]

    whole = replay.run(runs(), metric)
    together = len(sizes)
    assert sizes[0] == 3  # the metric is tried before anything runs
    monkeypatch.setattr(sweep, "_WIDEST_ON_CPU", 1)
    sizes.clear()
    torch.testing.assert_close(replay.run(runs(), metric), whole, rtol=1e-5, atol=1e-5)
    assert sizes[1:] == [1] * len(runs())
    assert together < len(sizes)


def test_work_is_forecast_to_the_token() -> None:
    replay = Replay(pair("grouped").ours, pair("grouped").prompt(batch=2))
    image_side = [[Intervention("vision.blocks.1.hook_mlp_out", zero=True)]]
    everywhere = [[Intervention("blocks.2.hook_mlp_out", mean=True)]]
    planned = replay.sweep([*runs(), *image_side, *everywhere], batch_size=4)
    expected = planned.forecast
    assert replay.work.token_layers == 0  # nothing has run
    planned.run()
    assert replay.work.forwards == pytest.approx(expected, rel=1e-12)
    assert expected > 1


class Memory:
    """In place of `LayerPass.logits`: as many rows as fit, with the work of one that does not fit half done."""

    def __init__(self, fits: int) -> None:
        self.fits, self.asked, self.own = fits, [], LayerPass.logits

    def __get__(self, layer_pass: LayerPass, kind: type) -> Callable[[], torch.Tensor]:
        return functools.partial(self, layer_pass)  # a method, as the function is that it stands for

    def __call__(self, layer_pass: LayerPass) -> torch.Tensor:
        n_rows = len(layer_pass.runs) * len(layer_pass.state.inputs)
        self.asked.append(n_rows)
        if n_rows > self.fits:
            layer_pass.state.work.token_layers += 1e6
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.own(layer_pass)


@pytest.mark.parametrize("batch", [1, 2])
def test_where_memory_runs_out_a_sweep_goes_on_with_half_of_the_rows_and_says_so(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    prompt, many = pair().prompt(batch=batch), [run for run in runs() if run] * 3  # 15 runs
    expected = Replay(pair().ours, prompt).run(many, batch_size=100, progress=False)
    memory = Memory(4 * batch)
    monkeypatch.setattr(LayerPass, "logits", memory)
    replay = Replay(pair().ours, prompt)
    with pytest.warns(HookedLLaVAWarning) as said:
        found = replay.run(many, batch_size=100, progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tried = [n for n in memory.asked if n > memory.fits]
    assert len(said) == len(tried) > 0
    assert f"{tried[0] // batch} at once; going on with {(tried[0] // batch + 1) // 2}" in str(said[0].message)
    assert replay.work.token_layers < 1e6, "what was given up is not counted"
    assert replay.work.runs == len(many) * batch


def test_a_run_that_does_not_fit_by_itself_is_an_error_and_what_was_done_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(2)
    monkeypatch.setattr(LayerPass, "logits", memory)
    planned = Replay(pair().ours, pair().prompt()).sweep(runs(), batch_size=1, progress=False)
    memory.fits = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        planned.run()
    memory.fits = 1
    assert planned.run().shape == (len(runs()), 99)
    assert planned.done == len(runs())
