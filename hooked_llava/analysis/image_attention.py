"""Where in the image does a position look?

Attention says what a head reads from, not what it makes of it, and not that the answer depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from hooked_llava.analysis.maps.sinks import sink_positions, without_sinks_of
from hooked_llava.errors import InputError
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.prompt.where import resolve_positions
from hooked_llava.results.image_axes import ImageAxes, take
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def image_attention(
    model: HookedLLaVA, inputs: Any, *, position: int | str = "last", without_sinks: bool = False
) -> xr.DataArray:
    """Attention of every head from one position to every patch, [image, layer, head, patch_row, patch_col].

    For images of several grids [image, layer, head, feature], newlines included: see `results.image_axes`.

    The numbers are `hook_pattern` itself: a head's row sums to 1 over all keys, so what is missing went to text.
    `without_sinks` leaves out (NaN) what `sink_positions` finds, in one more forward pass.
    Raises `InputError` for several prompts or positions, or a prompt without an image.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> image = torch.zeros(3, model.config.vision.image_size, model.config.vision.image_size)
    >>> maps = image_attention(model, model.prepare("What color is the star?", images=image))
    >>> (maps.sizes["patch_row"], maps.sizes["patch_col"]) == model.config.vision.patch_grid
    True
    """
    prompt = supported_inputs("image_attention", model, inputs)
    axes = ImageAxes.of(prompt)
    where = resolve_positions(position, prompt)[0].tolist()
    if len(where) != 1:
        raise InputError(f"position={position!r} means {len(where)} positions; expected one, such as 'last'.")
    with provenance("image_attention", model, prompt, n_forward=1, position=where[0]) as made:
        _, cache = model.run_with_cache(
            prompt, names_filter="pattern", positions=where, stop_at_layer=model.cfg.n_layers, remove_batch_dim=True
        )
        names = (model.hooks_table.name("pattern", i) for i in range(model.cfg.n_layers))
        pattern = torch.stack([cache[name][:, 0] for name in names])  # (layer, head, key)
        maps = take(pattern, axes.positions(prompt.token_map)).movedim(-2, 0)  # (image, layer, head, place)
        found = axes.labelled(
            maps.float().cpu().numpy(),
            ("image", "layer", "head"),
            coords={"layer": range(model.cfg.n_layers), "head": range(model.cfg.n_heads)},
            name="attention",
            attrs=made.attrs(),
        )
    return without_sinks_of(found, sink_positions(model, prompt)) if without_sinks else found
