"""A model whose parts lie on two accelerators gives what it gives on one, and waits for neither.

`tests.pretend_device` stands in for them: it refuses every operation on tensors of both.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import expected_tensors
from hooked_llava.editing import EditRequest, key_covariance, key_covariances, memit, multedit, rome
from hooked_llava.editing.finetune import finetune
from hooked_llava.editing.weight_records import WeightRecord, is_at
from hooked_llava.errors import ConfigError
from hooked_llava.loading import supported
from hooked_llava.loading.placement import placed
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Intervention, Replay
from hooked_llava.sae import SAEConfig, SparseAutoencoder
from tests import analyses as family
from tests.builders import make_hf_model, tiny_hf_config
from tests.machine.test_devices import VERSION, compared, padded, runs
from tests.pairs import FAMILY, off
from tests.pretend_device import Accelerators, OnDevice, accelerators

PLAIN = family.model_of  # which a test may put another in the place of
TWO = {torch.device("cuda", 0), torch.device("cuda", 1)}
HALVES = {
    "": "cuda:0",
    "language.blocks.1": "cuda:1",
    "language.blocks.2": "cuda:1",
    "language.ln_final": "cuda:1",
    "language.unembed": "cuda:1",
}
"""As accelerate plans it."""
SCATTERED = {
    "": "cuda:0",
    "vision": "cuda:1",
    "vision.blocks.1": "cuda:0",
    "image_newline": "cuda:1",
    "language.blocks.0": "cuda:1",
    "language.blocks.2": "cuda:1",
    "language.ln_final": "cuda:1",
}
"""Every step from one part to the next is one from device to device."""


@pytest.fixture
def device() -> Iterator[Accelerators]:
    with accelerators() as mode:
        yield mode


def spread(model: HookedLLaVA, places: dict[str, str]) -> HookedLLaVA:
    """A copy whose parts lie on several devices."""
    moved = copy.deepcopy(model)
    names = [name for name, _ in moved.named_parameters()]
    for name, place in placed(moved, names, _existing(places, names), dtype=torch.float32).items():
        owner, _, leaf = name.rpartition(".")
        setattr(moved.get_submodule(owner), leaf, torch.nn.Parameter(moved.get_parameter(name).to(place), False))
    if moved.config.language.tied_embeddings:
        moved.language.unembed.weight = moved.language.embed.weight
    return moved


def _existing(places: dict[str, str], names: list[str]) -> dict[str, str]:
    return {part: place for part, place in places.items() if any(name.startswith(part) for name in names)}


@functools.cache
def halved(name: str) -> HookedLLaVA:
    with accelerators():
        return spread(PLAIN(name), HALVES)


@functools.cache
def scattered(name: str) -> HookedLLaVA:
    with accelerators():
        return spread(PLAIN(name), SCATTERED)


def same(found: Any, expected: Any, what: str = "") -> None:
    assert off(torch.as_tensor(found).detach().cpu(), torch.as_tensor(expected).detach()) <= 1e-5, what


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize(
    ("name", "places"), [("llama-clip", scattered), ("onevision", scattered), ("phi-siglip", halved)]
)
def test_a_forward_pass_goes_from_device_to_device_without_waiting(
    device: Accelerators, name: str, places: Callable[[str], HookedLLaVA], batch: str
) -> None:
    plain, model = family.model_of(name), places(name)
    assert set(model.devices) == TWO
    assert model.cfg.device == torch.device("cuda", 0)
    inputs = family.prompts(name)[0] if batch == "one" else padded(name)
    there = inputs.to("cuda:0")
    for what, run in runs(model).items():
        device.waits.clear()
        found = run(there)
        assert not device.waits, what
        if isinstance(found, Tensor):
            assert found.device == torch.device("cuda", 0), what
            same(found, runs(plain)[what](inputs), what)


def test_nothing_is_moved_that_need_not_be(device: Accelerators) -> None:
    there = family.prompts("llama-clip")[0].to("cuda:0")
    model = halved("llama-clip")
    device.moves = 0
    model(there)
    assert device.moves == 4  # the residual stream, cosine and sine of the positions; and the logits back
    device.moves = 0
    model.run_with_cache(there, names_filter="resid_post")
    assert device.moves == 4 + 2
    whole, there = spread(family.model_of("llama-clip"), {"": "cuda:1"}), there.to("cuda:1")
    device.moves = 0
    whole.run_with_cache(there, names_filter="*")
    assert device.moves == 0


def test_generation_and_its_cache(device: Accelerators) -> None:
    plain, model = family.model_of("llama-clip"), scattered("llama-clip")
    inputs = padded("llama-clip")
    there = inputs.to("cuda:0")
    asked: dict[str, Any] = {
        "stop_at_eos": False,
        "return_type": "tokens",
        "return_cache": True,
        "names_filter": ["z", "pattern"],
    }
    device.waits.clear()
    found, cache = model.generate(there, 4, **asked)
    assert device.waits == {("read", "model/generation.py:_Stop.after"): 4}
    expected, expected_cache = plain.generate(inputs, 4, **asked)
    assert found.tolist() == expected.tolist()
    for name in expected_cache:
        same(cache[name], expected_cache[name], name)


def test_a_replay_with_changes_everywhere(device: Accelerators) -> None:
    plain, model = family.model_of("llama-clip"), scattered("llama-clip")
    inputs = padded("llama-clip")
    n = inputs.shape[1]
    hooks = [hook for hook in model.hooks_table.hooks.values() if hook.layer in (None, 1, 2)]
    changes = [[family.change_at(plain, hook, inputs)] for hook in hooks]
    there = inputs.to("cuda:0")
    device.waits.clear()
    replay = Replay(model, there)
    assert device.waits == {("read", VERSION): 1}
    device.waits.clear()
    found = replay.run(changes, positions=[n - 3, n - 1], progress=False)
    assert device.waits == {("read", VERSION): 1}
    plain_replay = Replay(plain, inputs)
    for own, expected, hook in zip(
        found, plain_replay.run(changes, positions=[n - 3, n - 1], progress=False), hooks, strict=True
    ):
        same(own, expected, hook.name)
    assert [replay.kept.resid[layer].device.index for layer in range(4)] == [0, 1, 0, 1]
    assert replay.nbytes == plain_replay.nbytes == Replay.forecast(model, there)
    change = Intervention("hook_embed", positions=[n - 4], scale=2.0)
    same(replay.branch(change).logits(), plain_replay.branch(change).logits())


def test_transformer_lens_methods_of_a_cache(device: Accelerators) -> None:
    found, expected = (
        [
            *(cache.accumulated_resid(3, apply_ln=True), cache.decompose_resid(3), cache.stack_head_results(3)),
            *(cache.stack_neuron_results(2), cache.get_full_resid_decomposition(3), cache.vision.decompose_resid(1)),
            *(cache.logit_attrs(cast("Tensor", cache.decompose_resid(3)), tokens=5), model.W_Q, model.b_O, model.W_out),
            *(model.accumulated_bias(3), model.tokens_to_residual_directions(7)),
        ]
        for model in (scattered("phi-siglip"), family.model_of("phi-siglip"))
        for cache in [model.run_with_cache(family.prompts("phi-siglip")[0])[1]]
    )
    for n, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert own.device == torch.device("cuda", 0)
        same(own, other, str(n))


@pytest.mark.parametrize("place", ["cuda:0", "cuda:1"])
def test_an_autoencoder_may_lie_on_either(device: Accelerators, place: str) -> None:
    plain, model = family.model_of("llama-clip"), scattered("llama-clip")
    inputs = family.prompts("llama-clip")[0]
    for layer in (0, 1):
        cfg = SAEConfig(d_in=48, d_sae=96, k=8, hook=f"blocks.{layer}.hook_resid_post")
        results = []
        for one, where in ((model, place), (plain, "cpu")):
            sae = SparseAutoencoder(cfg).reset(seed=0).to(where)
            with one.attach_sae(sae, keep_error=False):
                spliced = one(inputs)
            with one.attach_sae(sae):
                _, cache = one.run_with_cache(inputs, names_filter=["sae_acts", "sae_error"])
                change = Intervention("sae_acts", positions=[-2], features=[3], value=2.0)
                results.append([spliced, *cache.values(), Replay(one, inputs).run([change], progress=False)])
        for found, expected in zip(*results, strict=True):
            same(found, expected)


# ---------------------------------------------------------------------- analyses and edits


def test_every_analysis_gives_the_same(device: Accelerators, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ("integrated_gradients", "deleted tokens", "paths of MLPs")  # variants of others
    n = compared(device, "llama-clip", lambda what: not any(word in what for word in slow), monkeypatch, scattered)
    assert n > 50


def test_maps_of_tiles(device: Accelerators, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = ("map", "by patch", "attention")
    again = ("occlusion", "sinks", "answer maps", "circuit", "traces", "deleted patches")
    wanted = lambda w: w.startswith((*maps, *again)) and "integrated" not in w  # noqa: E731
    assert compared(device, "onevision", wanted, monkeypatch, scattered) > 11


def weight_at(model: HookedLLaVA, record: WeightRecord) -> Tensor:
    """The memory of what stands in for a device cannot be looked up by itself."""
    return next(parameter for parameter in model.parameters() if is_at(parameter, record.place))


def edited_logits(model: HookedLLaVA, method: str) -> Tensor:
    clean, other = (model.as_inputs(one) for one in family.prompts("llama-clip"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if method == "multedit":
        edit = multedit(model, [EditRequest(clean, "blue"), EditRequest(other, "red")], layer=2, position="last")
    elif method == "rome":
        edit = rome(
            model, EditRequest(clean, "blue"), key_covariance(model, [clean, other], layer=1), position="last", lam=0.1
        )
    elif method == "memit":
        kept = key_covariances(model, [clean, other], [0, 1])
        edit = memit(model, [EditRequest(clean, "blue"), EditRequest(other, "red")], kept, position="last", lam=0.1)
    else:
        edit = finetune(model, EditRequest(clean, "blue"), layers=[1, 2], steps=3)
    with edit.applied():
        logits = model(clean)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    return logits


@pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
@pytest.mark.parametrize("method", ["multedit", "rome", "memit", "finetune"])
def test_edits_and_their_revert(device: Accelerators, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scattered("llama-clip")
    expected = edited_logits(copy.deepcopy(family.model_of("llama-clip")), method)

    monkeypatch.setattr(WeightRecord, "weight", lambda self: weight_at(model, self))
    assert off(edited_logits(model, method).cpu(), expected) <= 1e-4


@pytest.mark.filterwarnings("ignore::hooked_llava.editing.values.TargetNotReached")
def test_a_search_reads_once_where_its_prompts_are_edited(
    device: Accelerators, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scattered("llama-clip")
    monkeypatch.setattr(WeightRecord, "weight", lambda self: weight_at(model, self))
    device.waits.clear()
    edited_logits(model, "multedit")
    asked = [device.waits["read", f"editing/rows.py:Rows.{what}"] for what in ("start", "n_requests")]
    assert max(asked) <= 2, "once for each of the two batches of prompts"


# ---------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("checkpoint")
    make_hf_model(**FAMILY["llama-clip"]).save_pretrained(path)
    return path


def test_weights_are_loaded_to_the_devices_of_a_map(device: Accelerators, folder: Any) -> None:
    model = HookedLLaVA.from_pretrained(folder, device_map=HALVES)
    assert {name: parameter.device.index for name, parameter in model.named_parameters()} == {
        name: int(name.startswith(("language.blocks.1", "language.blocks.2", "language.ln_final", "language.unembed")))
        for name in model.state_dict()
    }
    inputs = family.prompts("llama-clip")[0]
    same(model(inputs), HookedLLaVA.from_pretrained(folder)(inputs))
    same(model.to("cpu")(inputs), HookedLLaVA.from_pretrained(folder)(inputs))
    assert model.devices == (torch.device("cpu"),)


def test_blocks_may_run_on_the_cpu(device: Accelerators, folder: Any) -> None:
    model = HookedLLaVA.from_pretrained(folder, device_map={"": 0, "language.blocks.2": "cpu"})
    assert [block.device.type for block in model.blocks] == ["cuda", "cuda", "cpu"]
    inputs = family.prompts("llama-clip")[0]
    same(model(inputs), HookedLLaVA.from_pretrained(folder)(inputs))


@pytest.mark.parametrize("plan", ["auto", "balanced", "sequential"])
def test_accelerate_plans_whole_blocks(plan: str) -> None:
    config = LLaVAConfig.from_hf(tiny_hf_config(n_layers=6, n_vision_layers=4))
    model = HookedLLaVA.build(config, device="meta")
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    found = placed(
        model,
        expected_tensors(config),
        plan,
        dtype=torch.float32,
        max_memory={0: int(size * 0.7), 1: size, "cpu": size},
    )
    assert set(found.values()) == TWO
    for layer in range(6):
        assert len({place for name, place in found.items() if f"language.blocks.{layer}." in name}) == 1
    half = placed(
        model, expected_tensors(config), plan, dtype=torch.bfloat16, max_memory={0: size, 1: size, "cpu": size}
    )
    assert plan != "sequential" or set(half.values()) == {torch.device("cuda", 0)}
    with pytest.raises(ConfigError, match=rf"device_map='{plan}'.*float32.*max_memory"):
        placed(model, expected_tensors(config), plan, dtype=torch.float32, max_memory={0: size // 4, "cpu": size // 4})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "language.blocks.1.attn": 1}, r"'language\.blocks\.1' on several devices \(cuda:0, cuda:1\)"),
        ({"": 0, "language.blocks.9": 1}, r"'language\.blocks\.9'.*no such part.*language\.blocks\.0"),
        ({"vision": 0, "projector": 0}, r"no device for 'language\.embed\.weight'"),
        ({"": 0, "language.blocks.2": "disk"}, r"'language\.blocks\.2' on 'disk'.*cannot be run"),
        ({"": "meta"}, r"'all' on 'meta'"),
        ("blanced", r"device_map='blanced'.*balanced"),
    ],
)
def test_maps_that_do_not_fit_are_refused(folder: Any, device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HookedLLaVA.from_pretrained(folder, device_map=device_map)


def test_device_and_device_map_are_not_given_together(folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:1'.*device_map='auto'"):
        HookedLLaVA.from_pretrained(folder, device="cuda:1", device_map="auto")
    assert HookedLLaVA.from_pretrained(folder, device_map="cpu").devices == (torch.device("cpu"),)


def test_a_model_that_accelerate_has_spread_is_shared_where_it_lies(
    device: Accelerators, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_or_not = [kind for kind in supported.MODULES if kind.found is not supported._no_tensor]
    monkeypatch.setattr(supported, "MODULES", plain_or_not)  # what stands in for a device has tensors of its own kind
    hf_model = make_hf_model(**FAMILY["llama-clip"])
    plain = HookedLLaVA.from_hf(copy.deepcopy(hf_model))
    language = hf_model.model.language_model
    for part in (
        hf_model.model.vision_tower,
        hf_model.model.multi_modal_projector,
        language.embed_tokens,
        language.layers[0],
    ):
        part.to("cuda:0")
    for part in (language.layers[1:], language.norm, hf_model.lm_head):
        part.to("cuda:1")
    model = HookedLLaVA.from_hf(hf_model)
    assert [block.device.index for block in model.blocks] == [0, 1, 1]
    theirs = language.layers[2].mlp.up_proj.weight
    assert isinstance(theirs.data, OnDevice)
    assert model.blocks[2].mlp.up.weight.data_ptr() == theirs.data_ptr()
    fields = {
        "input_ids": family.prompts("llama-clip")[0].input_ids,
        "pixel_values": family.prompts("llama-clip")[0].pixel_values,
    }
    same(model(fields), plain(fields))
    language.layers[1].mlp.to("cuda:0")
    with pytest.raises(ConfigError, match=r"'language\.blocks\.1' on several devices"):
        HookedLLaVA.from_hf(hf_model)
