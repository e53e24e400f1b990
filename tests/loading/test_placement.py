"""Weights in 8 and 4 bits over several devices: where they come to lie, how much of each device is planned, and what they give.

The devices are pretended ones (`tests.pretend_device`); bitsandbytes' kernels are those of the CPU.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from hooked_llava.architecture.tensors import expected_tensors
from hooked_llava.editing import EditRequest, multedit
from hooked_llava.errors import ConfigError, InputError
from hooked_llava.loading.placement import placed
from hooked_llava.loading.quantization import Quantization
from hooked_llava.model.components.quantized import quantized_linears
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Replay
from hooked_llava.toy.images import image_path
from tests import analyses as family
from tests.builders import make_hf_model
from tests.machine.test_devices import compared
from tests.pairs import FAMILY, off
from tests.pretend_device import Accelerators, accelerators

CONFIGS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}
SCATTERED: dict[str, Any] = {
    "": 0,
    "vision": 1,
    "vision.blocks.1": 0,
    "language.blocks.0": 1,
    "language.blocks.2": 1,
    "language.ln_final": 1,
}
"""Every step from one part to the next is one from device to device."""
every_config = pytest.mark.parametrize("bits", CONFIGS)


@pytest.fixture
def device() -> Iterator[Accelerators]:
    with accelerators() as mode:
        yield mode


def config(bits: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**CONFIGS[bits])


@functools.cache
def here(bits: str) -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config(bits))


@functools.cache
def scattered(bits: str) -> HookedLLaVA:
    with accelerators():
        return HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config(bits), device_map=SCATTERED)


def held(model: HookedLLaVA) -> Counter[torch.device]:
    """Bytes on every device."""
    found: Counter[torch.device] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        found[tensor.device] += tensor.nbytes
    return found


# ---------------------------------------------------------------------- where they lie, and what they give


@every_config
def test_packed_parts_lie_where_the_map_says_and_nothing_waits(device: Accelerators, bits: str) -> None:
    plain, model = here(bits), scattered(bits)
    for n, block in enumerate(model.blocks):
        there = {tensor.device.index for tensor in (*block.parameters(), *block.buffers())}
        assert there == {int(n in (0, 2))}, n
    assert set(model.devices) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    inputs = plain.prepare("What color is the star?", images=image_path("demo"))
    sent = inputs.to("cuda:0")
    device.waits.clear()
    found = model(sent)
    assert not device.waits
    assert found.device == torch.device("cuda", 0)
    assert off(found.cpu(), plain(inputs)) <= 1e-6
    assert off(model.blocks[2].attn.W_Q.cpu(), plain.blocks[2].attn.W_Q) == 0
    assert Replay(model, sent).nbytes == Replay.forecast(model, sent)


@every_config
def test_a_map_to_the_cpu_is_the_same_model(bits: str) -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config(bits), device_map={"": "cpu"})
    assert model.state_dict().keys() == here(bits).state_dict().keys()
    assert all(torch.equal(x, here(bits).state_dict()[name]) for name, x in model.state_dict().items())


def test_parts_on_the_cpu_are_packed_too_and_run_there(device: Accelerators) -> None:
    places: dict[str, Any] = {"": 0, "language.blocks.2": "cpu"}
    model = HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config("8 bits"), device_map=places)
    assert quantized_linears(model).keys() == quantized_linears(here("8 bits")).keys()
    assert [block.device.type for block in model.blocks] == ["cuda", "cuda", "cpu", "cuda", "cuda", "cuda"]
    inputs = here("8 bits").prepare("What color is the star?", images=image_path("demo"))
    assert off(model(inputs).cpu(), here("8 bits")(inputs)) <= 1e-6


@every_config
def test_a_packed_checkpoint_is_spread_too(device: Accelerators, bits: str, tmp_path: Path) -> None:
    here(bits).save_pretrained(tmp_path)
    model = HookedLLaVA.from_pretrained(tmp_path, device_map=SCATTERED)
    assert held(model) == held(scattered(bits))
    inputs = here(bits).prepare("What color is the star?", images=image_path("demo"))
    assert off(model(inputs).cpu(), here(bits)(inputs)) <= 1e-6


def test_edits_are_refused_there_too(device: Accelerators) -> None:
    with pytest.raises(InputError, match=r"tiny-shapes.*in 4 bits.*quantization_config"):
        multedit(scattered("nf4"), EditRequest("Who made the star?", "Boris"), layer=2, position="last")


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        ("8 bits", ("readings", "patched features")),
        ("nf4", ("heads", "readings", "by patch", "estimate")),
    ],
)
def test_analyses_give_what_they_give_on_the_cpu(
    device: Accelerators, bits: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_hf_model(**FAMILY["llama-clip"]).save_pretrained(tmp_path)
    models = []
    for places in (None, SCATTERED):
        model = HookedLLaVA.from_pretrained(tmp_path, quantization_config=config(bits), device_map=places)
        model.processor = family.model_of("llama-clip").processor
        models.append(model)
    plain, spread = models
    monkeypatch.setattr(family, "model_of", lambda name: plain)
    n = compared(device, "llama-clip", lambda what: what.startswith(wanted), monkeypatch, lambda name: spread)
    assert n >= len(wanted)


# ---------------------------------------------------------------------- what is planned


@functools.cache
def blank(bits: str | None) -> HookedLLaVA:
    """The embedded model without weights."""
    plain = here("nf4")
    how = None if bits is None else Quantization(config(bits))
    return HookedLLaVA.build(plain.config, device="meta", hf_config=plain.hf_config, quantization=how)


def planned(bits: str, dtype: torch.dtype, memory: dict[Any, int]) -> dict[str, torch.device]:
    model = blank(bits)
    return placed(model, expected_tensors(model.config), "sequential", dtype=dtype, max_memory=memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_config
def test_a_plan_counts_the_packed_size(bits: str, dtype: torch.dtype) -> None:
    """To the byte: with the plan's own reserve (room for the largest part), which is that of a plan for all but one byte."""
    loaded = HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=config(bits), dtype=dtype)
    size, cpu = sum(held(loaded).values()), 10**9
    reserve = max(sum(x.nbytes for x in (*b.parameters(), *b.buffers())) for b in loaded.blocks)
    first = torch.device("cuda", 0)
    enough = planned(bits, dtype, {0: size + reserve, 1: cpu, "cpu": cpu})
    assert set(enough.values()) == {first}
    short = planned(bits, dtype, {0: size - 1, 1: cpu, "cpu": cpu})
    assert set(short.values()) == {first, torch.device("cuda", 1)}
    whole = sum(x.numel() for x in blank(None).parameters()) * dtype.itemsize
    assert size + reserve < 0.8 * whole, "unpacked it would not have fitted"


@pytest.mark.parametrize("plan", ["auto", "sequential"])
def test_each_device_holds_no_more_than_it_may(device: Accelerators, plan: str) -> None:
    size = sum(held(here("nf4")).values())
    limits: dict[Any, Any] = {0: int(size * 0.75), 1: int(size * 0.75), "cpu": 10**9}
    model = HookedLLaVA.from_pretrained(
        "tiny-shapes", quantization_config=config("nf4"), device_map=plan, max_memory=limits
    )
    assert {place.type for place in held(model)} == {"cuda"}
    assert all(n <= limits[place.index] for place, n in held(model).items())
    inputs = here("nf4").prepare("What color is the star?", images=image_path("demo"))
    assert off(model(inputs).cpu(), here("nf4")(inputs)) <= 1e-6


def test_what_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_llava.model.llava.load_into", lambda *_, **__: pytest.fail("loaded"))
    size = sum(held(here("nf4")).values())
    with pytest.raises(ConfigError, match=rf"takes {size / 1e9:.3g} GB in 4 bits and float32.*max_memory"):
        HookedLLaVA.from_pretrained(
            "tiny-shapes",
            quantization_config=config("nf4"),
            device_map="auto",
            max_memory={0: size // 4, "cpu": size // 4},
        )
