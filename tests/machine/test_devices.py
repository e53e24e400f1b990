"""On an accelerator: nothing is computed on the wrong device, and the forward pass never waits.

There is none here: `tests.pretend_device` stands in for it. Its numbers are right, so whole analyses run, and give what they
give on the CPU. What only a real one shows is not tested: speed, memory, and kernels that round differently.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hooked_llava.datasets import forwards
from hooked_llava.datasets.prefetch import prefetched
from hooked_llava.machine.devices import keeper, to_device
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Intervention, Replay
from hooked_llava.replay.kept_run import KeptRun, keep
from tests import analyses as family
from tests.pairs import off
from tests.pretend_device import Accelerators, OnDevice, accelerators

MODELS = ["llama-clip", "phi-siglip", "onevision"]
VERSION = "model/weights_id.py:weights_version"
ALLOWED = {
    # At the end: the result, and words for its tokens.
    "results/arrays.py:to_numpy",
    "results/arrays.py:word_variables",
    "results/image_axes.py:ImageAxes.of_patches",
    "readout/vocabulary.py:decode_tokens",
    "readout/answer.py:AnswerReading.with_ids",
    "analysis/answer_signs.py:answer_signs",
    "analysis/answer_without.py:answer_without",
    "analysis/attention_contribution.py:attention_contribution",
    "analysis/causal_trace.py:_about",
    "analysis/head_ablation.py:ablate_heads",
    "analysis/image_attention.py:image_attention",
    "analysis/information_storage.py:_one_prompt",
    "analysis/logit_attribution.py:_one_prompt",
    "analysis/logit_lens.py:_one_prompt",
    "analysis/maps/grad_cam.py:grad_cam",
    "analysis/maps/token_activation.py:_without_context",
    "analysis/maps/occlusion.py:_means",
    "analysis/head_scores.py:layer_scores.<locals>.<listcomp>",
    # Of each forward pass over data, and of each step of training: once.
    "analysis/probe_linear.py:_activations",
    "analysis/tuned_lens.py:_divergences",
    "analysis/tuned_lens.py:_train",
    # Answers that are generated: once a token, and their words.
    "model/generation.py:_Stop.after",
    "model/generation.py:_texts",
    # A prompt with its answer appended is put together on the CPU.
    "prompt/inputs.py:Inputs.to",
    # Once: where two prompts differ.
    "analysis/circuits.py:_one_pair",
    # Once: what a metric gives for an unchanged run; which weights these are.
    "readout/metrics.py:value_of",
    "model/weights_id.py:samples",
    VERSION,
    # Between two rounds of a search: whether it may end.
    "analysis/neuron_scores.py:_best_of_layer",
    "analysis/neuron_scores.py:_settled",
    # Between two phases: the heads and positions of the first that the second is about.
    "analysis/maps/scores.py:best_heads",
    "analysis/maps/scores.py:best_positions",
}
"""Where an analysis may read from the device, by function."""


@pytest.fixture
def device() -> Iterator[Accelerators]:
    with accelerators() as mode:
        yield mode


@functools.cache
def on_device(name: str) -> HookedLLaVA:
    with accelerators():
        return copy.deepcopy(family.model_of(name)).to("cuda:0")


def prompts(
    name: str, monkeypatch: pytest.MonkeyPatch, model_of: Callable[[str], HookedLLaVA]
) -> tuple[HookedLLaVA, Any, Any]:
    model = model_of(name)  # made from what it then takes the place of
    monkeypatch.setattr(family, "model_of", model_of)
    return model, *family.prompts(name)


def padded(name: str) -> Any:
    model = family.model_of(name)
    if name == "onevision":
        texts = ["What is the star?", "Who made it, and when was that?"]
        images = [[family.image(i, family.TILED[name][1])] for i in range(2)]
        return model.prepare([f"USER: <image>\n{text} ASSISTANT:" for text in texts], images=images, template=None)
    return model.as_inputs(family.left_padded([family.prompts(name)[0], family.prompt(name, "Who?", 2)]))


# ---------------------------------------------------------------------- what stands in for the accelerator


def test_what_stands_in_for_an_accelerator_notices_what_one_does(device: Accelerators) -> None:
    x = torch.tensor([1.0, -2.0], device="cuda:0")
    assert isinstance(x, OnDevice)
    assert x.device == torch.device("cuda:0")
    assert (x + 1).device == x.device
    assert device.waits == {("upload", "the test"): 1}
    device.waits.clear()
    sent = torch.ones(2).to("cuda:0", non_blocking=True)
    moved = sent.to("cuda:1")
    assert ((x + sent).abs().sum() * 2).device == x.device
    assert moved.device == torch.device("cuda:1")
    assert not device.waits
    for mixed in (lambda: x + torch.ones(2), lambda: x @ moved, lambda: torch.cat([x, torch.ones(2)])):
        with pytest.raises(RuntimeError, match=r"two devices.*cuda:0"):
            mixed()
    reads: list[Callable[[], Any]] = [
        *(lambda: bool(x[0] > 0), x[0].item, x.tolist, x.cpu, x.nonzero, lambda: x[x > 0]),
        *(lambda: x.masked_select(x > 0), lambda: torch.equal(x, x), lambda: torch.multinomial(x.abs(), 1)),
    ]
    for n, read in enumerate(reads, 1):
        read()
        assert device.waits["read", "the test"] == n
    _ = x[[0, 1]]
    assert device.waits["upload", "the test"] == 1
    leaf = torch.ones(2, 3, device="cuda:0", requires_grad=True)
    (gradient,) = torch.autograd.grad((leaf[to_device([0], "cuda:0")] * 3).sum(), leaf)
    assert gradient.tolist() == [[3, 3, 3], [0, 0, 0]]


@pytest.mark.parametrize("numbers", [[3, 5], [], (1.5,), torch.arange(4), torch.ones(2, 2)])
def test_numbers_are_sent_without_waiting(device: Accelerators, numbers: Any) -> None:
    found = to_device(numbers, "cuda:1")
    assert found.device == torch.device("cuda:1")
    assert not device.waits
    expected = numbers if isinstance(numbers, torch.Tensor) else torch.tensor(numbers)
    assert found.tolist() == expected.tolist()
    assert found.dtype == (torch.int64 if numbers == [] else expected.dtype)
    device.waits.clear()
    assert to_device(found, "cpu", torch.float16).dtype == torch.float16
    assert device.waits["read", "the test"] == 1, "back on the CPU numbers must be there before they are read"


# ---------------------------------------------------------------------- the model


def runs(model: HookedLLaVA) -> dict[str, Callable[[Any], Any]]:
    change = Intervention("blocks.1.hook_resid_pre", positions=[1, 3], add=torch.ones(model.cfg.d_model))
    edge = Intervention("blocks.1.attn.hook_attn_scores", block=([1, 2], "last"))
    everywhere = Intervention("blocks.0.hook_mlp_out", add=torch.ones(model.cfg.d_model))
    return {
        "forward": model,
        "loss": lambda inputs: model(inputs, return_type="loss"),
        "cache of everything": lambda inputs: model.run_with_cache(inputs, names_filter=list(model.hook_dict)),
        "cache of a position": lambda inputs: model.run_with_cache(inputs, names_filter="*", positions="last"),
        "functions": lambda inputs: model.run_with_hooks(inputs, fwd_hooks=[("resid_pre", lambda x: x + 1)]),
        "interventions": lambda inputs: model.run_with_hooks(inputs, fwd_hooks=[change, edge, everywhere]),
        "entered in the middle": lambda inputs: model(model(inputs, stop_at_layer=1), start_at_layer=1),
        "backward": lambda inputs: model.run_with_cache(inputs, incl_bwd=True, return_type="loss"),
    }


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_between_the_prompt_and_the_logits_nothing_waits(device: Accelerators, name: str, batch: str) -> None:
    plain, model = family.model_of(name), on_device(name)
    inputs = family.prompts(name)[0] if batch == "one" else padded(name)
    there = inputs.to("cuda:0")
    for what, run in runs(model).items():
        device.waits.clear()
        found = run(there)
        assert not device.waits, what
        if isinstance(found, torch.Tensor):
            assert isinstance(found, OnDevice), what
            assert off(found.detach().cpu(), runs(plain)[what](inputs).detach()) <= 1e-5, what


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"stop_strings": "zzz"}], ids=str)
def test_generation_reads_once_for_every_token(device: Accelerators, options: dict[str, Any]) -> None:
    plain, model = family.model_of("llama-clip"), on_device("llama-clip")
    inputs = padded("llama-clip")
    device.waits.clear()
    there = inputs.to("cuda:0")
    device.waits.clear()
    asked = {"stop_at_eos": False, "return_type": "tokens", **options}
    found = model.generate(there, 4, **asked)
    reads = 8 if "stop_strings" in options else 4  # for stop strings the tokens, besides whether all rows have ended
    assert device.waits == {("read", "model/generation.py:_Stop.after"): reads}
    if "do_sample" not in options:
        assert found.tolist() == plain.generate(inputs, 4, **asked).tolist()


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_asks_once_whether_the_weights_are_the_same(device: Accelerators, name: str, batch: str) -> None:
    plain, model = family.model_of(name), on_device(name)
    inputs = family.prompts(name)[0] if batch == "one" else padded(name)
    changes = [[Intervention(("resid_pre", layer), positions="last", zero=True)] for layer in range(model.cfg.n_layers)]
    changes += [
        [Intervention(("z", 1), positions=[2, 5], heads=[1], add=torch.ones(model.cfg.d_head))],
        [Intervention("hook_image_embed", positions=[1], zero=True)],
        [Intervention("vision.blocks.0.hook_mlp_out", zero=True)],
        [Intervention("blocks.1.attn.hook_attn_scores", block=("image", "last"))],
        [Intervention("blocks.1.attn.hook_pattern", positions=[3, 4], position_mean=True)],
        [],
    ]
    there = inputs.to("cuda:0")
    device.waits.clear()
    replay = Replay(model, there)
    assert device.waits == {("read", VERSION): 1}
    device.waits.clear()
    found = replay.run(changes, positions=[-3, -1], progress=False)
    assert device.waits == {("read", VERSION): 1}
    assert off(found.cpu(), Replay(plain, inputs).run(changes, positions=[-3, -1], progress=False)) <= 1e-5


def alive_at_the_end(model: HookedLLaVA, run: Callable[[], Any]) -> list[int]:
    """The layers whose residual stream still lies on the device when that of the last one is computed."""
    seen: dict[int, StorageWeakRef] = {}
    alive: list[int] = []

    def note(module: Any, args: Any, out: Tensor) -> None:
        assert isinstance(out, OnDevice)
        seen[module.attn.layer] = StorageWeakRef(out.held.untyped_storage())
        if module is model.blocks[-1]:
            gc.collect()
            alive.extend(layer for layer, numbers in seen.items() if not numbers.expired())

    handles = [block.register_forward_hook(note) for block in model.blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return alive


@pytest.mark.parametrize("kept", ["there", "cpu", "disk"])
def test_what_is_kept_elsewhere_leaves_the_device_while_running(device: Accelerators, kept: str, tmp_path: Any) -> None:
    model, there = on_device("llama-clip"), family.prompts("llama-clip")[0].to("cuda:0")
    where: dict[str, Any] = {"there": {}, "cpu": {"device": "cpu"}, "disk": {"offload_folder": tmp_path}}[kept]
    last = model.cfg.n_layers - 1
    expected = list(range(last + 1)) if kept == "there" else [last - 1, last]  # what enters and what leaves it
    cached: list[Any] = []
    run = lambda: cached.append(model.run_with_cache(there, names_filter="resid_post", **where)[1])  # noqa: E731
    assert alive_at_the_end(model, run) == expected
    assert {tensor.device.type for tensor in cached[0].values()} == {"cuda" if kept == "there" else "cpu"}
    keys: list[StorageWeakRef] = []
    append = KVCache.append

    def noted(self: KVCache, layer: int, *both: Tensor) -> Any:
        all_k, all_v = append(self, layer, *both)
        assert isinstance(all_k, OnDevice)
        keys.append(StorageWeakRef(all_k.held.untyped_storage()))
        if layer == last:
            assert sum(not one.expired() for one in keys) == (last + 1 if kept == "there" else 1)
        return all_k, all_v

    held: list[KeptRun] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "append", noted)
        assert alive_at_the_end(model, lambda: held.append(keep(model, there, kept=keeper(**where)))) == expected
    assert len(keys) == last + 1
    assert held[0].kv is not None
    places = {x.device.type for x in (*held[0].resid.values(), *held[0].kv.layer(last))}
    assert places == {"cuda" if kept == "there" else "cpu"}
    runs = [[Intervention("blocks.1.attn.hook_z", positions=[4], zero=True)]]
    plain = Replay(family.model_of("llama-clip"), family.prompts("llama-clip")[0]).run(runs, progress=False)
    found = Replay(model, there, **where).run(runs, progress=False)
    assert off(found.cpu(), plain) <= 1e-5


# ---------------------------------------------------------------------- analyses


def compared(
    device: Accelerators,
    name: str,
    wanted: Callable[[str], bool],
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[[str], HookedLLaVA] = on_device,
) -> int:
    """Each analysis gives what it gives on the CPU, sends without waiting, and reads where it may; how many there were."""
    here = family.all_analyses(*_given(name))
    given = prompts(name, monkeypatch, model_of)
    at_once = functools.partial(prefetched, ahead=0)  # in this thread, which alone knows the device
    monkeypatch.setattr(forwards, "prefetched", lambda make, ahead: at_once(make))
    there = family.all_analyses(*given)
    compared = [what for what in here if wanted(what)]
    for what in compared:
        device.waits.clear()
        found = family.numbers(there[what]())
        assert {kind for kind, _ in device.waits} <= {"read"}, (what, device.waits)
        assert {place for _, place in device.waits} <= ALLOWED, what
        for key, expected in family.numbers(here[what]()).items():
            scale = max(1.0, float(np.nanmax(np.abs(expected), initial=0.0)))
            assert np.allclose(found[key], expected, atol=2e-5 * scale, rtol=0, equal_nan=True), (what, key)
    return len(compared)


def _given(name: str) -> tuple[HookedLLaVA, Any, Any]:
    return family.model_of(name), *family.prompts(name)


def test_every_analysis_runs_there_and_gives_the_same(device: Accelerators, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ("integrated_gradients", "deleted tokens", "paths of MLPs")  # variants of others
    n = compared(device, "llama-clip", lambda what: not any(word in what for word in slow), monkeypatch)
    assert n > 50


def test_maps_of_tiles_are_drawn_there_too(device: Accelerators, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = ("map", "by patch", "attention")
    again = ("occlusion", "sinks", "answer maps", "circuit", "traces", "deleted patches")
    wanted = lambda w: w.startswith((*maps, *again)) and "integrated" not in w  # noqa: E731
    assert compared(device, "onevision", wanted, monkeypatch) > 11
