"""What to keep of a forward pass: its bytes, and the functions that keep it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.architecture.hooks import HookTable
from hooked_llava.machine.devices import keeper, to_device
from hooked_llava.model.cache import CachedModel
from hooked_llava.model.components.hook_point import HookPoint, reads_only
from hooked_llava.prompt.inputs import Inputs


def taking(index: Int[Tensor, "batch n_positions"]) -> Callable[[Tensor, int], Tensor]:
    """A function that copies a tensor at some positions along an axis; each row of the batch (axis 0) has its own.

    `index` is on the CPU; it is sent to a device once, however many tensors are cut there.
    """
    shared = bool((index == index[:1]).all())
    sent: dict[torch.device, Tensor] = {}

    def take(tensor: Tensor, axis: int) -> Tensor:
        if tensor.device not in sent:
            sent[tensor.device] = to_device(index[0] if shared else index, tensor.device)
        where = sent[tensor.device]
        if shared:
            return tensor.index_select(axis, where)
        return torch.stack([row.index_select(axis - 1, own) for row, own in zip(tensor, where, strict=True)])

    return take


def shared_spans(inputs: Inputs) -> dict[str, Int[Tensor, " n_positions"]]:
    """Image and text positions, where the rows of the batch have them and all have the same."""
    spans = {}
    for name in ("image", "text"):
        rows = {token_map.spans.get(name) for token_map in inputs.token_maps}
        if len(rows) == 1 and (row := rows.pop()) is not None:
            spans[name] = row.tensor()
    return spans


def caching_hook(
    store: dict[str, Tensor],
    model: CachedModel,
    index: Int[Tensor, "batch n_positions"] | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
    *,
    suffix: str = "",
) -> Callable[..., None]:
    """A hook function that puts what it sees into `store` under the hook's name; `index` is on the CPU.

    `keep` says where it is kept; by default on the model's first device, wherever its blocks lie, so that layers can be stacked.
    """
    take, table = None if index is None else taking(index), model.hooks_table
    keep = keeper(model.cfg.device) if keep is None else keep

    @reads_only
    def save(tensor: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        kept, place = tensor.detach(), table[hook.name]
        if take is not None and place.position_axis is not None and not place.on_image_side:
            kept = take(kept, place.position_axis)
        store[hook.name + suffix] = keep(kept)

    return save


def axis_sizes(table: HookTable, name: str, inputs: Inputs, n_kept: int | None = None) -> dict[str, int]:
    """Length of every axis that a hook's tensor may have, with `n_kept` sequence positions kept in the language tower."""
    config, hook = table.config, table[name]
    n_positions = config.vision.n_positions if hook.on_image_side else n_kept or inputs.shape[1]
    return {
        "batch": len(inputs),
        "image": inputs.n_images,
        "tile": sum(map(len, inputs.tiles)),
        "pos": n_positions,
        "query": n_positions,
        "key": config.vision.n_positions if hook.on_image_side else inputs.shape[1],
        "patch": config.vision.n_patches,
        "feature": config.vision.n_features if hook.by_tile else max((o.n_features for o in inputs.layouts), default=0),
        **widths(table, name),
    }


def widths(table: HookTable, name: str) -> dict[str, int]:
    """Length of every axis of a hook's tensor that no prompt changes."""
    config, tower = table.config, table.tower(table[name])
    return {
        "head": tower.n_heads,
        "kv_head": tower.n_key_value_heads,
        "d_head": tower.d_head,
        "d_model": tower.d_model,
        "d_mlp": tower.d_mlp,
        "d_features": config.vision.d_features,
        "d_vocab": config.language.d_vocab,
        "d_sae": table.d_sae.get(name.rpartition(".")[0], 0),
        "1": 1,
    }


def tensor_bytes(table: HookTable, name: str, inputs: Inputs, n_kept: int, dtype: torch.dtype) -> int:
    """Bytes of one activation, with `n_kept` sequence positions kept in the language tower."""
    sizes, axes = axis_sizes(table, name, inputs, n_kept), table[name].axes
    is_scale = axes[-1] == "1"  # statistics are taken in float32 at least
    itemsize = (torch.promote_types(dtype, torch.float32) if is_scale else dtype).itemsize
    return math.prod(sizes[axis] for axis in axes) * itemsize
