"""Mechanistic interpretability of LLaVA models: every activation named, cached, patched and explained.

Names are imported when they are first used, so that `hooked-llava --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_llava.architecture.config import LLaVAConfig
    from hooked_llava.errors import (
        CheckpointError,
        ConfigError,
        HookedLLaVAError,
        HookNameError,
        HookValueError,
        InputError,
        SpanError,
        StaleReplayError,
    )
    from hooked_llava.model.cache import LLaVACache
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.token_map import TokenMap
    from hooked_llava.replay import Intervention, Replay

__version__ = "0.2.0"
"""The version of this library; setup.cfg reads it from here."""

_HOMES = {
    "HookedLLaVA": "model.llava",
    "Inputs": "prompt.inputs",
    "TokenMap": "prompt.token_map",
    "LLaVACache": "model.cache",
    "Intervention": "replay",
    "Replay": "replay",
    "LLaVAConfig": "architecture.config",
    "HookedLLaVAError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "HookNameError": "errors",
    "HookValueError": "errors",
    "InputError": "errors",
    "SpanError": "errors",
    "StaleReplayError": "errors",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "HookNameError",
    "HookValueError",
    "HookedLLaVA",
    "HookedLLaVAError",
    "InputError",
    "Inputs",
    "Intervention",
    "LLaVACache",
    "LLaVAConfig",
    "Replay",
    "SpanError",
    "StaleReplayError",
    "TokenMap",
    "__version__",
]


_MODULES = {"metrics": "readout.metrics"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"hooked_llava.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(import_module(f"hooked_llava.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hooked_llava' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
