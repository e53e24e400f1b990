"""What a call costs in forward passes, by the multiplications that torch counts: nothing that the library counts itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """As torch counts the kernels of an accelerator; it leaves out the one of the CPU."""
    return sdpa_flop_count(query, key, value)


_KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


def multiplications(call: Callable[[], Any]) -> int:
    """Of all matrix products and convolutions while it runs, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=_KERNELS) as counted:
        call()
    return counted.get_total_flops() // 2


def forwards(call: Callable[[], Any], model: HookedLLaVA, inputs: Inputs) -> float:
    """Multiplications of a call over those of one forward pass of these inputs, with all logits."""
    return multiplications(call) / multiplications(lambda: model(inputs))
