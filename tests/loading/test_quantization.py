"""Quantization configs that are taken, and those that are refused with what was given and what to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig

from hooked_llava.errors import CheckpointError, ConfigError
from hooked_llava.loading import quantization
from hooked_llava.loading.packed import by_weight, is_bitsandbytes, packed_layers, part_of
from hooked_llava.loading.quantization import Quantization
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, tiny_hf_config

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
REFUSED: dict[str, tuple[Any, str]] = {
    "another method": (GPTQConfig(bits=4, dataset=["text"]), r"GPTQConfig\(.*BitsAndBytesConfig.*quantized from"),
    "another method's fields": ({"quant_method": "awq", "bits": 4}, r"awq.*BitsAndBytesConfig.*quantized from"),
    "no bits": (BitsAndBytesConfig(), r"load_in_8bit=False and load_in_4bit=False.*leave it out"),
    "both": ({"load_in_8bit": True, "load_in_4bit": True}, r"load_in_4bit.*only one.*BitsAndBytesConfig"),
    "main weights": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True),
        r"llm_int8_has_fp16_weight=True.*without it",
    ),
    "parts of the CPU unpacked": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True),
        r"llm_int8_enable_fp32_cpu_offload=True.*llm_int8_skip_modules",
    ),
    "a word": ("8bit", r"'8bit'.*BitsAndBytesConfig"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_configs_that_are_refused(what: str) -> None:
    given, message = REFUSED[what]
    with pytest.raises(ConfigError, match=rf"quantization_config.*{message}|{message}"):
        HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=given)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"load_in_8bit.*bitsandbytes.*pip install 'hooked_llava\[quantized\]'"):
        HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=EIGHT)
    assert importlib.util.find_spec("bitsandbytes") is not None, "make test installs it, so that nothing is skipped"


def test_an_embedding_that_is_the_unembedding_is_not_quantized() -> None:
    hf_model = make_hf_model(tied=True)
    model = HookedLLaVA.from_hf(hf_model)
    kept = Quantization(EIGHT).names(hf_model.config, model.config)
    assert "language.unembed.weight" not in kept
    everything = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*llm_int8_skip_modules"):
        Quantization(everything).names(hf_model.config, model.config)


def test_a_quantized_checkpoint_is_not_quantized_again_and_damage_is_named(tmp_path: Path) -> None:
    HookedLLaVA.from_pretrained("tiny-shapes", quantization_config=EIGHT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_8bit"]) == ("bitsandbytes", True)
    with pytest.raises(ConfigError, match=r"load_in_8bit.*already.*Leave it out"):
        HookedLLaVA.from_pretrained(tmp_path, quantization_config=EIGHT)
    state = load_file(tmp_path / "model.safetensors")
    scales = next(name for name in state if name.endswith("up_proj.SCB"))
    save_file({**state, scales: state[scales] * torch.inf}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{scales}.*infinite"):
        HookedLLaVA.from_pretrained(tmp_path)
    del state[scales]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"SCB"):
        HookedLLaVA.from_pretrained(tmp_path)


def test_parts_of_packed_weights_by_their_names() -> None:
    names = [
        "a.weight",
        "a.SCB",
        "a.weight_format",
        "b.weight",
        "b.weight.absmax",
        "b.weight.quant_state.bitsandbytes__nf4",
    ]
    assert by_weight((name, len(name)) for name in names) == {
        "a.weight": {"SCB": 5, "weight_format": 15},
        "b.weight": {"weight.absmax": 15, "weight.quant_state.bitsandbytes__nf4": 38},
    }
    assert part_of("a.bias") is None
    assert not packed_layers(nn.Linear(2, 2))
    assert is_bitsandbytes(EIGHT)
    assert not is_bitsandbytes(tiny_hf_config().to_dict())
