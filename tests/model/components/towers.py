"""Small tower configs and modules with weights that matter, for tests of single components."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.sizes import TowerConfig
from tests.builders import randomise, tiny_hf_config

_CONFIG = LLaVAConfig.from_hf(tiny_hf_config(n_heads=6, n_key_value_heads=2))
LANGUAGE: TowerConfig = _CONFIG.language
VISION: TowerConfig = _CONFIG.vision


def tower(base: TowerConfig, **fields: Any) -> TowerConfig:
    return replace(base, **fields)


def with_weights(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    randomise(module, seed)
    return module.to(dtype).requires_grad_(False).eval()
