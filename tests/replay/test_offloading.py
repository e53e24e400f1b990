"""Kept runs of whoever makes them go where `offloaded_runs` says: every analysis gives the same, and nothing is left behind."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.editing import EditRequest, keep_prompts, multedit
from hooked_llava.errors import InputError
from hooked_llava.replay import Intervention, Replay, offloaded_runs, replay
from hooked_llava.replay.kept_run import KeptRun
from hooked_llava.replay.offloading import run_keeper
from tests import analyses as family
from tests.machine.test_devices import on_device, prompts
from tests.pretend_device import accelerators

ZEROED = [[Intervention("blocks.1.attn.hook_z", positions="last", zero=True)]]


def tensors(kept: KeptRun) -> list[Tensor]:
    layers = range(kept.model.cfg.n_layers)
    return [*kept.resid.values(), *((part for i in layers for part in kept.kv.layer(i)) if kept.kv else ())]


def place_of(tensor: Tensor) -> str:
    """The device, or "disk" for the pages of a file."""
    name = None if tensor.device.type == "cuda" else tensor.untyped_storage().filename
    return str(tensor.device) if name is None else "disk"


@contextmanager
def noted() -> Iterator[list[tuple[set[str], int, int]]]:
    """Of every Replay that is made inside: where its run lies, what was forecast, and its bytes by storages."""
    found: list[tuple[set[str], int, int]] = []
    keep = replay.keep

    def noting(model: Any, inputs: Any, **options: Any) -> KeptRun:
        kept = keep(model, inputs, **options)
        held = {getattr(x, "held", x).untyped_storage().data_ptr(): x for x in tensors(kept)}
        size = sum(getattr(x, "held", x).untyped_storage().nbytes() for x in held.values())
        found.append(({place_of(x) for x in tensors(kept)}, Replay.forecast(model, inputs), size))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "keep", noting)
        yield found


# ---------------------------------------------------------------------- analyses


def given(name: str) -> tuple[Any, Any, Any]:
    return family.model_of(name), *family.prompts(name)


@pytest.mark.parametrize("name", ["llama-clip", "onevision"])
def test_every_analysis_gives_the_same_with_its_runs_on_disk(name: str, tmp_path: Path) -> None:
    analyses, rerun = family.all_analyses(*given(name)), set(family.patching_analyses(*given(name)))
    for what in [what for what in analyses if "integrated_gradients" in what or what == "deleted tokens"]:
        del analyses[what]  # variants of others
    expected = {what: family.numbers(run()) for what, run in analyses.items()}
    for what, run in analyses.items():
        with noted() as made, offloaded_runs(tmp_path):
            found = family.numbers(run())
        for key, values in expected[what].items():
            assert np.array_equal(found[key], values, equal_nan=True), (what, key)
        for places, forecast, size in made:
            assert places == {"disk"}, what
            assert size == pytest.approx(forecast, rel=0.02), what
        assert made or what not in rerun, f"{what}: no run was kept"
    assert not list(tmp_path.iterdir())


def test_on_an_accelerator_they_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with accelerators():
        there = family.patching_analyses(*prompts("llama-clip", monkeypatch, on_device))
        for what in ("patched heads", "paths", "knockout", "knockout of outputs", "ablated", "occlusion", "without"):
            with noted() as plain:
                expected = family.numbers(there[what]())
            with noted() as made, offloaded_runs(device="cpu"):
                found = family.numbers(there[what]())
            assert {place for places, _, _ in plain for place in places} == {"cuda:0"}, what
            assert {place for places, _, _ in made for place in places} == {"cpu"}, what
            assert [sizes for _, *sizes in made] == [sizes for _, *sizes in plain], what
            for key, values in expected.items():
                assert np.array_equal(found[key], values, equal_nan=True), (what, key)


def test_traces_and_their_branches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    branches: list[set[str]] = []
    branched = replay.branched_run

    def noting(*args: Any) -> KeptRun:
        kept = branched(*args)
        branches.append({place_of(x) for x in tensors(kept)})
        return kept

    monkeypatch.setattr(replay, "branched_run", noting)
    trace = family.patching_analyses(*given("llama-clip"))["trace"]
    expected = family.numbers(trace())
    with offloaded_runs(tmp_path):
        found = family.numbers(trace())
    assert all(np.array_equal(found[key], values, equal_nan=True) for key, values in expected.items())
    assert branches[0] == {"cpu"}
    assert branches[-1] == {"disk"}


# ---------------------------------------------------------------------- edits


@pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
def test_edits_and_kept_prompts(tmp_path: Path) -> None:
    model, clean, other = given("llama-clip")
    request = [EditRequest(clean, "blue"), EditRequest(other, "red")]

    def edited() -> tuple[Tensor, Tensor, set[str]]:
        kept = keep_prompts(model, clean, layers=[1])
        with multedit(model, request, layer=1, position="last").applied():
            return kept.logits(1), kept.before, {place_of(x) for x in kept.kept.resid.values()}

    expected = edited()
    assert expected[2] == {"cpu"}
    with offloaded_runs(tmp_path):
        found = edited()
    assert found[2] == {"disk"}
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# ---------------------------------------------------------------------- the block


def made(**options: Any) -> set[str]:
    one = Replay(family.model_of("llama-clip"), family.prompts("llama-clip")[0], **options)
    one.run(ZEROED, progress=False)
    return {place_of(x) for x in tensors(one.kept)}


def test_blocks_are_nested_and_leave_no_trace(tmp_path: Path) -> None:
    assert made() == {"cpu"}
    with offloaded_runs(tmp_path):
        inside = Replay(family.model_of("llama-clip"), family.prompts("llama-clip")[0])
        with offloaded_runs(device="cpu"):
            assert made() == {"cpu"}
        assert made() == {"disk"}
        with pytest.raises(ZeroDivisionError), offloaded_runs(device="cpu"):
            raise ZeroDivisionError
        assert made() == {"disk"}
        assert made(device="cpu") == {"cpu"}
        assert made(dtype=torch.bfloat16) == {"disk"}
    assert made() == {"cpu"}
    branch = inside.branch(Intervention("hook_embed", positions=[-3], scale=2.0))
    assert {place_of(x) for x in tensors(branch.kept)} == {"disk"}, "as the run that it is branched from"
    with pytest.raises(ZeroDivisionError), offloaded_runs(tmp_path):
        raise ZeroDivisionError
    assert made() == {"cpu"}
    assert not list(tmp_path.iterdir())


def test_it_holds_where_the_folder_is_named_from_and_for_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    places: list[str] = []
    with offloaded_runs("runs"):
        monkeypatch.chdir(tempfile.gettempdir())
        assert place_of(run_keeper()(torch.ones(1))) == "disk"
        other = threading.Thread(target=lambda: places.append(place_of(run_keeper()(torch.ones(1)))))
        other.start()
        other.join()
    assert places == ["cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no place.*offload_folder.*device"),
        ({"offload_folder": ".", "device": "cpu"}, r"device='cpu'.*offload_folder.*one of them"),
        ({"offload_folder": "nowhere"}, r"no folder '.*nowhere'"),
    ],
)
def test_places_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), offloaded_runs(**options):
        raise AssertionError("entered")
