"""Edits come and go without a trace, in any order, and what is edited is a model like any other."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hooked_llava.editing import Change, Edit, active_edits
from hooked_llava.errors import CheckpointError, InputError, StaleReplayError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import samples
from hooked_llava.replay import Intervention, Replay
from tests.builders import make_hf_model, make_prompt

W = [f"language.blocks.{layer}.mlp.down.weight" for layer in range(3)]


def low_rank(model: HookedLLaVA, *names: str, seed: int = 0, size: float = 0.3, rank: int = 1) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in names:
        n_out, n_in = model.get_parameter(name).shape
        left = size * torch.randn(n_out, rank, generator=generator)
        changes[name] = Change(left, torch.randn(rank, n_in, generator=generator) / n_in**0.5)
    return Edit(model, changes, ({"prompts": ["Who?"], "target": f"number {seed}"},), {"name": "made up", "layer": 0})


def full_rank(model: HookedLLaVA, name: str, seed: int) -> Edit:
    shape = model.get_parameter(name).shape
    return Edit(model, {name: Change.dense(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))})


def fresh(dtype: torch.dtype = torch.float32, **config) -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(dtype=dtype, **config))


def weights(model: HookedLLaVA) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(model: HookedLLaVA, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


MODELS = {dtype: fresh(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}


@pytest.mark.parametrize("dtype", MODELS, ids=str)
@settings(max_examples=25)
@given(moves=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_weights_depend_on_which_edits_are_active_and_on_nothing_else(dtype, moves):
    model = MODELS[dtype]
    before = weights(model)
    edits = [
        low_rank(model, W[0], W[1], seed=1),
        low_rank(model, W[1], W[2], seed=2, rank=3),
        full_rank(model, W[1], 3),
        low_rank(model, W[1], seed=4),
    ]
    active: set[int] = set()
    for move in moves:  # each move applies an edit, or reverts it if it is active
        if move in active:
            edits[move].revert()
        else:
            edits[move].apply()
        active ^= {move}
        for name in W:
            exact = before[name].double()
            for i in sorted(active):
                if name in edits[i].changes:
                    exact = edits[i].changes[name].added_to(exact)
            assert torch.equal(model.get_parameter(name), exact.to(dtype))
    for i in active:
        edits[i].revert()
    assert_same(model, before)


def test_applied_ends_with_its_block_and_with_an_exception():
    model = fresh()
    before, edit = weights(model), low_rank(model, W[1])
    with edit.applied() as same:
        assert same is edit
        assert edit.is_applied
        assert not torch.equal(model.get_parameter(W[1]), before[W[1]])
    assert not edit.is_applied
    assert_same(model, before)
    with pytest.raises(ZeroDivisionError), edit.applied():
        raise ZeroDivisionError
    assert_same(model, before)


def test_the_sum_of_two_edits_is_both():
    model = fresh()
    first, second, third = low_rank(model, W[0], seed=1), low_rank(model, W[0], W[2], seed=2), full_rank(model, W[0], 3)
    with first.applied(), second.applied(), third.applied():
        expected = weights(model)
    both = first + second + third
    with both.applied():
        for name in W:
            torch.testing.assert_close(model.get_parameter(name).detach(), expected[name])
    assert [request["target"] for request in both.requests] == ["number 1", "number 2"]
    assert both.changes[W[2]].rank == 1
    with pytest.raises(InputError, match="different models"):
        first + low_rank(fresh(), W[0])


def test_applying_twice_and_reverting_nothing_are_refused():
    model = fresh()
    edit = low_rank(model, W[0])
    with pytest.raises(InputError, match="not applied"):
        edit.revert()
    with edit.applied(), pytest.raises(InputError, match="applied already"):
        edit.apply()


def test_an_edit_reaches_the_model_that_shares_its_memory():
    hf_model = make_hf_model()
    prompt = make_prompt(hf_model)
    one, other = HookedLLaVA.from_hf(hf_model), HookedLLaVA.from_hf(hf_model)
    with torch.no_grad():
        before = hf_model(**prompt).logits
        first, second = low_rank(one, W[1], seed=1).apply(), low_rank(other, W[1], seed=2).apply()
        assert not torch.equal(hf_model(**prompt).logits, before)
        torch.testing.assert_close(one(prompt), hf_model(**prompt).logits)
        first.revert()  # two views, one book: the second edit stays
        alone = fresh()
        with Edit(alone, second.changes).applied():
            mine = hf_model.model.language_model.layers[1].mlp.down_proj.weight
            assert torch.equal(mine, alone.get_parameter(W[1]))
        second.revert()
        assert torch.equal(hf_model(**prompt).logits, before)


def test_tied_embeddings_change_together():
    model = fresh(tied=True)
    before = weights(model)
    edit = low_rank(model, "language.unembed.weight")
    with edit.applied():
        assert torch.equal(model.language.embed.weight, model.language.unembed.weight)
        assert not torch.equal(model.language.embed.weight, before["language.embed.weight"])
    assert_same(model, before)
    with pytest.raises(InputError, match="one weight twice"):
        low_rank(model, "language.unembed.weight", "language.embed.weight")


def test_a_coarse_dtype_is_said_and_nothing_is_changed():
    model = fresh(torch.bfloat16)
    before = weights(model)
    edit = low_rank(model, W[0], W[1], size=1e-4)
    with pytest.raises(InputError, match="bfloat16 is too coarse.* loses .* %.*float32"):
        edit.apply()
    assert not edit.is_applied
    assert_same(model, before)
    with low_rank(fresh(), W[0], W[1], size=1e-4).applied():
        pass


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="NaN or infinite"):
        Change(torch.tensor([[float("nan")]]), torch.ones(1, 1))


def test_a_weight_that_others_changed_is_not_reverted():
    model = fresh()
    before, edit = weights(model), low_rank(model, W[0]).apply()
    edited = model.get_parameter(W[0]).detach().clone()
    with torch.no_grad():
        model.get_parameter(W[0])[0, 0] += 1.0
    with pytest.raises(InputError, match=f"{W[0]}.*changed.*edit"):
        edit.revert()
    with torch.no_grad():
        model.get_parameter(W[0]).copy_(edited)
    edit.revert()
    assert_same(model, before)


def test_a_model_that_was_moved_is_said():
    model = fresh()
    edit = low_rank(model, W[0]).apply()
    model.to(torch.float64)
    with pytest.raises(InputError, match=r"moved or converted"):
        edit.revert()


def test_a_model_that_was_moved_does_not_get_the_edit_twice():
    hf_model = make_hf_model()
    model = HookedLLaVA.from_hf(hf_model)
    theirs = hf_model.model.language_model.layers[0].mlp.down_proj.weight
    before, edit = theirs.clone(), low_rank(model, W[0]).apply()
    model.to(torch.float64)
    moved = model.get_parameter(W[0]).clone()
    with pytest.raises(InputError, match=r"applied already.*\.to\(.*twice.*anew"):
        edit.apply()
    assert torch.equal(model.get_parameter(W[0]), moved)
    assert edit.is_applied
    for _ in range(2):
        with pytest.raises(InputError, match=r"weight.*moved or converted \(\.to\(.*Load the model anew"):
            edit.revert()
        assert torch.equal(theirs, before)  # the memory that it was applied to is as it was


def test_an_edit_whose_handle_was_lost_is_found():
    hf_model = make_hf_model(tied=True)
    model, other = HookedLLaVA.from_hf(hf_model), HookedLLaVA.from_hf(hf_model)
    before, names = weights(model), (W[1], "language.unembed.weight")
    kept, lost = low_rank(model, W[0], W[1], seed=1).apply(), low_rank(model, *names, seed=2).apply()
    assert active_edits(model) == [kept, lost]
    del lost
    gc.collect()
    first, second = active_edits(model)
    assert first is kept
    assert (second.requests[0]["target"], second.method["name"]) == ("number 2", "made up")
    assert set(second.changes) == set(names)
    assert second.is_applied
    assert [set(edit.changes) for edit in active_edits(other)] == [{W[0], W[1]}, set(names)]
    active_edits(other)[1].revert()
    assert active_edits(model) == [kept]
    kept.revert()
    assert active_edits(model) == active_edits(other) == []
    assert_same(model, before)


def test_weight_records_keep_no_model_alive():
    model = fresh()
    low_rank(model, W[0]).apply()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("others", [False, True])
def test_a_failure_in_the_middle_of_applying_leaves_nothing(fails_at, others, monkeypatch):
    model = fresh()
    if others:
        low_rank(model, *W, seed=9).apply()
    before, edit = weights(model), low_rank(model, *W)
    written = torch.Tensor.copy_
    calls = iter(range(1, 100))

    def fail(self, *arguments):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError("no memory left")
        return written(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    with pytest.raises(torch.OutOfMemoryError):
        edit.apply()
    assert_same(model, before)
    assert not edit.is_applied
    assert len(active_edits(model)) == others
    with edit.applied():
        assert not torch.equal(model.get_parameter(W[2]), before[W[2]])
    assert_same(model, before)


def test_no_original_can_be_kept_and_nothing_is_written(monkeypatch):
    model = fresh()
    before, edit, clone = weights(model), low_rank(model, *W), torch.Tensor.clone
    calls = iter(range(1, 100))

    def fail(self, *arguments, **options):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return clone(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "clone", fail)
    with pytest.raises(torch.OutOfMemoryError):
        edit.apply()
    assert_same(model, before)
    assert active_edits(model) == []


@pytest.mark.parametrize("setting", ["autocast", "matmul precision", "inference mode"])
def test_applying_is_exact_under_any_setting(setting):
    model = fresh()
    before, edit = weights(model), low_rank(model, W[1], rank=8)
    exact = edit.changes[W[1]].added_to(before[W[1]].double()).float()
    settings_ = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "matmul precision": low_matmul_precision,
        "inference mode": torch.inference_mode,
    }
    with settings_[setting]():
        edit.apply()
        written = edit.changes[W[1]].matrix()
    assert torch.equal(model.get_parameter(W[1]), exact)
    assert torch.equal(written, edit.changes[W[1]].matrix())
    edit.revert()
    assert_same(model, before)


@contextmanager
def low_matmul_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_request_that_suffers_most_decides():
    model = fresh(torch.bfloat16)
    n_out, n_in = model.get_parameter(W[1]).shape
    left = torch.randn(n_out, 3)
    left[:, 1] *= 1e-4
    left[:, 2] = 0.0  # nothing is changed there, so nothing can be lost
    right = torch.linalg.qr(torch.randn(n_in, 3))[0].T.contiguous()
    with pytest.raises(InputError, match="bfloat16 is too coarse"):
        Edit(model, {W[1]: Change(left, right)}).apply()
    with Edit(model, {W[1]: Change(left[:, [0, 2]], right[[0, 2]])}).applied():
        pass


def test_single_precision_may_be_too_coarse_as_well():
    edit = low_rank(fresh(), W[0], size=1e-12)
    with pytest.raises(InputError, match="float32.*dtype=torch.float64"):
        edit.apply()
    with low_rank(fresh(torch.float64), W[0], size=1e-12).applied():
        pass


def test_an_exception_in_the_block_is_the_one_that_is_seen():
    model = fresh()
    edit = low_rank(model, W[0])

    def change_and_fail() -> None:
        with edit.applied(), torch.no_grad():
            model.get_parameter(W[0])[0, 0] += 1.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        change_and_fail()
    assert "could not be reverted" in raised.value.__notes__[0]
    assert "changed by something else" in raised.value.__notes__[0]
    with torch.no_grad():
        model.get_parameter(W[0])[0, 0] -= 1.0


def test_a_block_may_revert_its_edit_itself():
    model = fresh()
    before, edit = weights(model), low_rank(model, W[0])

    def revert_and(fail: bool) -> None:
        with edit.applied():
            edit.revert()
            if fail:
                raise ZeroDivisionError

    revert_and(fail=False)
    with pytest.raises(ZeroDivisionError) as raised:
        revert_and(fail=True)
    assert not hasattr(raised.value, "__notes__")
    assert_same(model, before)


def test_a_copy_of_an_edit_is_not_applied():
    model = fresh()
    edit = low_rank(model, W[0]).apply()
    other = copy.deepcopy(edit)
    assert not other.is_applied
    other.apply().revert()
    edit.revert()


def test_weights_must_be_the_models():
    model = fresh()
    with pytest.raises(InputError, match="no such weight"):
        Edit(model, {"language.blocks.9.mlp.down.weight": Change.dense(torch.zeros(2, 2))})
    with pytest.raises(InputError, match=r"\(2, 2\); the model has \(48, 74\)"):
        Edit(model, {W[0]: Change.dense(torch.zeros(2, 2))})


def test_a_replay_notices():
    hf_model = make_hf_model()
    model, prompt = HookedLLaVA.from_hf(hf_model), make_prompt(hf_model)
    run = [Intervention("blocks.2.hook_resid_pre", positions="last", zero=True)]
    replay = Replay(model, prompt)
    with low_rank(model, W[1]).applied():
        with pytest.raises(StaleReplayError):
            replay.run([run])
        during = Replay(model, prompt)

        def zero(tensor, hook):
            tensor[:, -1] = 0.0

        expected = model.run_with_hooks(prompt, fwd_hooks=[("blocks.2.hook_resid_pre", zero)])[0, -1]
        torch.testing.assert_close(during.run([run])[0], expected)
        _, cache = model.run_with_cache(prompt, names_filter="blocks.1.*")
        written = cache["post", 1] @ model.W_out[1]
        torch.testing.assert_close(cache["mlp_out", 1], written)
    with pytest.raises(StaleReplayError):
        during.run([run])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_has_the_edit(dtype, tmp_path):
    model = fresh(dtype)
    prompt = make_prompt(make_hf_model(dtype=dtype))
    edit = low_rank(model, W[1], size=1.0)
    with torch.no_grad(), edit.applied():
        model.save_pretrained(tmp_path / "edited")
        edited = model(prompt)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "edited", dtype=dtype)
    for layer in range(3):
        loaded = plain.model.language_model.layers[layer].mlp.down_proj.weight
        same = torch.equal(loaded, model.get_parameter(W[layer]))
        assert same == (layer != 1)
    with torch.no_grad():
        scale = float(edited.float().abs().max())
        assert (
            float((plain(**prompt).logits - edited).abs().max()) <= (1e-4 if dtype == torch.float32 else 0.05) * scale
        )
        assert float((model(prompt) - edited).abs().max()) > 0.05 * scale


# ---------------------------------------------------------------------- files


def test_a_file_holds_the_factors_and_the_request(tmp_path):
    model = fresh()
    edit = low_rank(model, W[0], W[2], rank=2)
    path = tmp_path / "edit.safetensors"
    with edit.applied():  # what identifies the model are its unedited weights
        edit.save(path)
    assert path.stat().st_size < 25_000
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "usual").unlink()
    with pytest.raises(InputError, match="no folder '.*nowhere'"):
        edit.save(tmp_path / "nowhere" / "edit")
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["requests"] == [{"prompts": ["Who?"], "target": "number 0"}]
    twin = fresh()
    loaded = Edit.load(path, twin)
    assert not loaded.is_applied
    assert loaded.method == edit.method
    with edit.applied(), loaded.applied():
        assert_same(twin, weights(model))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_rank_edit_is_kept_as_its_difference(tmp_path):
    model = fresh()
    edit = full_rank(model, W[1], 3)
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", model)
    assert torch.equal(loaded.changes[W[1]].matrix(), edit.changes[W[1]].matrix())
    assert loaded.changes[W[1]].rank is None


def test_an_edit_loads_with_the_same_weights_in_another_dtype_only(tmp_path):
    edit = low_rank(fresh(), W[0])
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit", fresh(torch.bfloat16)).layers == [0]
    with pytest.raises(InputError, match="edit.*another model.*edit again"):
        Edit.load(tmp_path / "edit", HookedLLaVA.from_hf(make_hf_model(seed=1)))
    with pytest.raises(InputError, match="edit.*another model.*edit again"):
        Edit.load(tmp_path / "edit", fresh(n_layers=2))
    edited = fresh()
    with torch.no_grad():
        edited.get_parameter(W[2])[0, 0] += 1.0
    with pytest.raises(InputError, match="edit.*another model.*edit again"):
        Edit.load(tmp_path / "edit", edited)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_any_one_number_is_noticed(tmp_path, dtype):
    """In every part of the model, and written past torch's count of writes."""
    low_rank(model := fresh(dtype), W[0]).save(tmp_path / "edit")
    for name, weight in model.named_parameters():
        number = weight.data.view(-1)[weight.numel() * 2 // 3 : weight.numel() * 2 // 3 + 1]
        kept = number.clone()
        number.copy_(torch.nextafter(number, number + 1))
        with pytest.raises(InputError, match="edit.*another model.*edit again"):
            Edit.load(tmp_path / "edit", model)
        number.copy_(kept)
        assert name in dict(model.named_parameters())
    Edit.load(tmp_path / "edit", model)


@torch.no_grad()
@pytest.mark.parametrize("made_in", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("used_in", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_edit_stays_loadable_where_a_dtype_holds_what_the_other_does(tmp_path, made_in, used_in):
    """A checkpoint in float32, loaded in two dtypes; and one in bfloat16, which every dtype holds."""
    finest_first = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    coarse, fine = sorted((made_in, used_in), key=finest_first.index, reverse=True)
    low_rank(fresh(made_in), W[0]).save(tmp_path / "edit")
    if (coarse, fine) == (torch.bfloat16, torch.float16):  # each rounds in its own way: not the same numbers
        with pytest.raises(InputError, match="edit.*another model.*edit again"):
            Edit.load(tmp_path / "edit", fresh(used_in))
    else:
        assert Edit.load(tmp_path / "edit", fresh(used_in)).layers == [0]
    other = fresh(used_in)
    other.get_parameter(W[2])[5, 7] *= 1.5
    with pytest.raises(InputError, match="edit.*another model.*edit again"):
        Edit.load(tmp_path / "edit", other)
    rounded = [HookedLLaVA.from_hf(make_hf_model(dtype=torch.bfloat16)).to(dtype) for dtype in (made_in, used_in)]
    low_rank(rounded[0], W[0]).save(tmp_path / "rounded")
    if torch.float16 not in (made_in, used_in):  # which loses the smallest numbers of bfloat16
        assert Edit.load(tmp_path / "rounded", rounded[1]).layers == [0]


def test_a_file_of_version_0_1_is_read_with_the_numbers_that_it_holds(tmp_path):
    edit = low_rank(fresh(), W[0])
    edit.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["made_with"]
    tensors["identity"] = samples(dict(edit.model.named_parameters()))
    metadata = {"format": "hooked_llava.edit.v1", "about": json.dumps(about)}
    save_file(tensors, tmp_path / "old", metadata=metadata)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = Edit.load(tmp_path / "old", fresh(dtype))
        assert torch.equal(loaded.changes[W[0]].matrix(), edit.changes[W[0]].matrix())
    with pytest.raises(InputError, match="edit.*another model.*edit again"):
        Edit.load(tmp_path / "old", HookedLLaVA.from_hf(make_hf_model(seed=1)))
    del tensors["identity"]
    save_file(tensors, tmp_path / "neither", metadata=metadata)
    with pytest.raises(CheckpointError, match="neither.*which model.*Save the edit"):
        Edit.load(tmp_path / "neither", fresh())


def test_other_files_are_refused(tmp_path):
    model = fresh()
    with pytest.raises(CheckpointError, match="is not there"):
        Edit.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Edit.load(tmp_path / "text", model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="format 'pt'; expected 'hooked_llava.edit.v2'"):
        Edit.load(tmp_path / "model" / "model.safetensors", model)


def test_it_says_what_it_is():
    edit = low_rank(fresh(), W[0], W[2])
    assert (
        repr(edit) == f"Edit(made up, 1 request, layers [0, 2], rank 1, {edit.file_bytes / 1000:.1f} kB, not applied)"
    )
