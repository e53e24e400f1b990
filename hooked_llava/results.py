"""Results are labelled arrays: `xarray` with named axes, and attributes that say how they came about."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA


@dataclass
class Provenance:
    """What a result's attributes say: model, prompt, method, cost."""

    model: str
    prompt: str
    method: dict[str, Any]
    n_forward: int
    _started: float = field(default_factory=time.perf_counter)

    def attrs(self, **more: Any) -> dict[str, Any]:
        """Attributes for an array, with the seconds since the analysis began."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            **self.method,
            "n_forward": self.n_forward,
            "seconds": round(time.perf_counter() - self._started, 4),
            **more,
        }


@contextmanager
def analysis(model: HookedLLaVA, inputs: Inputs, *, n_forward: int, **method: Any) -> Iterator[Provenance]:
    """Run an analysis without gradients, and keep what its result must say about it."""
    prompt = " | ".join(inputs.prompts) if inputs.prompts is not None else f"{tuple(inputs.shape)} token ids"
    with torch.no_grad():
        yield Provenance(model.config.model_name, prompt, method, n_forward)
