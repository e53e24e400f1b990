"""What a cache and a kept run will take is forecast before they are made: at the true size of 7B and 13B, without its memory.

The models are on torch's device "meta", where tensors have sizes but no numbers: any question about a number would be an error.
"""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.machine.devices import keeper
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay import Replay
from hooked_llava.replay.kept_run import KeptRun, keep

SIZES = {
    "7b": {},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
TOLERANCE = 0.02
GB = 1e9


@functools.cache
def full_size(name: str) -> tuple[HookedLLaVA, Inputs]:
    """LLaVA-1.5 of that size in bfloat16, and a prompt of one image and 44 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    hf_config = LlavaConfig(text_config=LlamaConfig(vocab_size=32064, **SIZES[name]), vision_config=vision)
    model = HookedLLaVA.build(LLaVAConfig.from_hf(hf_config), device="meta", dtype=torch.bfloat16)
    ids = torch.tensor([[1, *[hf_config.image_token_index] * 576, *range(5, 48)]])
    return model, model.as_inputs({"input_ids": ids, "pixel_values": torch.zeros(1, 3, 336, 336)})


@pytest.mark.parametrize("names", [None, "resid_post", "pattern", ["vision.*", "hook_image_embed", "z"]], ids=str)
def test_a_cache_takes_what_was_forecast(names: list[str] | str | None) -> None:
    model, inputs = full_size("7b")
    _, cache = model.run_with_cache(inputs, names_filter=names)
    assert sum(tensor.nbytes for tensor in cache.values()) == pytest.approx(
        model.cache_size(inputs, names), rel=TOLERANCE
    )
    assert model.cache_size(inputs, names) > 0.1 * GB


@pytest.mark.parametrize("name", SIZES)
def test_a_kept_run_takes_what_was_forecast(name: str) -> None:
    """Counted by storages, so that nothing is held twice or hangs on something larger."""
    model, inputs = full_size(name)
    kept = keep(model, inputs)
    held = _storages(kept)
    assert held == pytest.approx(Replay.forecast(model, inputs), rel=TOLERANCE)
    assert held == pytest.approx({"7b": 0.49, "13b": 0.77}[name] * GB, rel=TOLERANCE), (
        "(33 + 64) * 4096 numbers a token"
    )
    half = keep(model, inputs, kept=keeper(dtype=torch.float32))
    assert _storages(half) == pytest.approx(Replay.forecast(model, inputs, dtype=torch.float32), rel=TOLERANCE)


def _storages(kept: KeptRun) -> int:
    assert kept.kv is not None
    tensors = [*kept.resid.values(), *(part for layer in range(len(kept.resid) - 1) for part in kept.kv.layer(layer))]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
