"""What a head carries from one position to another: o = A v W_O.

Attention's output is a sum of such outputs over heads and keys (Elhage et al. 2021), less its bias. Yu & Ananiadou
(arXiv 2411.10950) score each of them alone; attention contributions (Basu et al., arXiv 2406.04236) add up their heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def head_outputs(
    model: HookedLLaVA,
    layer: int,
    pattern: Float[Tensor, "*batch head query key"],
    value: Float[Tensor, "*batch key kv_head d_head"],
    *,
    heads: Sequence[int] | None = None,
) -> Float[Tensor, "*batch one_head query key d_model"]:
    """What every head writes at every query from every key, A v W_O, in float32 at least.

    Args:
        model: the model whose output weights are used; its hooks do not fire.
        layer: block of the language tower.
        pattern: `hook_pattern` of all heads, cut to the queries that are wanted.
        value: `hook_v`; with grouped queries each is read by several heads.
        heads: heads whose outputs are wanted; all by default.

    The sum over keys is the head's `hook_result`; over heads too, `hook_attn_out` less the output bias. Raises
    `InputError` for a layer or head that is not there.

    >>> import torch
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> _, cache = model.run_with_cache(model.prepare("Who made the star?"), names_filter=["pattern", "v", "attn_out"])
    >>> each = head_outputs(model, 3, cache["pattern", 3], cache["v", 3])
    >>> torch.allclose(each.sum((1, 3)), cache["attn_out", 3], atol=1e-4)
    True
    """
    wanted = to_device(_heads(model, heads), value.device)
    per_head = _each_head(model, layer, value)[..., wanted, :]  # (*batch, key, head, d_head)
    written = einsum("... k h d, h d m -> ... h k m", per_head, _output(model, layer, per_head)[wanted])
    return pattern[..., wanted, :, :].to(written.dtype)[..., None] * written[..., None, :, :]


def summed_head_outputs(
    model: HookedLLaVA,
    layer: int,
    pattern: Float[Tensor, "*batch head query key"],
    value: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch query key d_model"]:
    """What all heads of a layer together carry from every key to every query; one matrix product, no head axis held.

    Arguments as for `head_outputs`. Raises `InputError` for a layer that is not there.

    >>> import torch
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> _, cache = model.run_with_cache(model.prepare("Who made the star?"), names_filter=["pattern", "v"], remove_batch_dim=True)
    >>> each = head_outputs(model, 3, cache["pattern", 3], cache["v", 3])
    >>> torch.allclose(summed_head_outputs(model, 3, cache["pattern", 3], cache["v", 3]), each.sum(0), atol=1e-4)
    True
    """
    per_head = _each_head(model, layer, value)  # (*batch, key, head, d_head)
    averaged = einsum("... h q k, ... k h d -> ... q k h d", pattern.to(per_head.dtype), per_head)
    return averaged.flatten(-2) @ _output(model, layer, per_head).flatten(0, 1)


def head_outputs_along(
    model: HookedLLaVA,
    layer: int,
    pattern: Float[Tensor, "*batch head query key"],
    value: Float[Tensor, "*batch key kv_head d_head"],
    direction: Float[Tensor, " d_model"],
) -> Float[Tensor, "*batch head query key"]:
    """The part of every output along one direction, A v W_O . direction, without an output being made.

    Arguments as for `head_outputs`. Raises `InputError` for a layer that is not there.

    >>> import torch
    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> _, cache = model.run_with_cache(model.prepare("Who made the star?"), names_filter=["pattern", "v"], remove_batch_dim=True)
    >>> word = model.tokens_to_residual_directions(model.to_single_token("Red"))
    >>> each = head_outputs(model, 3, cache["pattern", 3], cache["v", 3])
    >>> torch.allclose(head_outputs_along(model, 3, cache["pattern", 3], cache["v", 3], word), each @ word, atol=1e-4)
    True
    """
    per_head = _each_head(model, layer, value)  # (*batch, key, head, d_head)
    reading = _output(model, layer, per_head) @ direction.to(per_head.dtype)  # (head, d_head)
    along = einsum("... k h d, h d -> ... h k", per_head, reading)
    return pattern.to(along.dtype) * along[..., None, :]


def _each_head(
    model: HookedLLaVA, layer: int, value: Float[Tensor, "*batch key kv_head d_head"]
) -> Float[Tensor, "*batch key head d_head"]:
    """The value that every query head reads, in float32 at least."""
    cfg = model.config.language
    as_indices(layer, cfg.n_layers, "layers")
    return at_least_float32(value).repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=-2)


def _output(model: HookedLLaVA, layer: int, like: Tensor) -> Float[Tensor, "head d_head d_model"]:
    return model.blocks[layer].attn.W_O.to(like)


def _heads(model: HookedLLaVA, heads: Sequence[int] | None) -> list[int]:
    n_heads = model.config.language.n_heads
    return list(range(n_heads)) if heads is None else as_indices(heads, n_heads, "heads")
