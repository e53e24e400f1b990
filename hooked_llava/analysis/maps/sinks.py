"""Which image positions are attended for their size, and not for what they show?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import finite_number
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.hook_point import reads_only
from hooked_llava.model.requirements import check_supported
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import unwrap_single
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.image_axes import ImageAxes, take_each
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Measured = Float[np.ndarray, "layer prompt image place"]


def sink_positions(model: HookedLLaVA, inputs: Any, *, norm: float = 5.0, attention: float = 5.0) -> xr.Dataset:
    """Which positions of the images are sinks: `sink` [image, patch_row, patch_col]; several prompts give a first axis prompt.

    A position p of an image is a sink if in one layer both hold:

    - |x(p)| >= `norm` * median of |x| over the image, where x is the residual stream that enters the layer
    - a(p) >= `attention` * mean of a over the image, where a is the attention from the text after the images, the mean over
      its positions and over heads

    A large norm alone marks the registers of Darcet et al. (arXiv 2309.16588), attention alone also what is looked at for what it
    shows. Kang et al. (arXiv 2503.03321) find visual sinks by dimensions of the residual stream that are known for each language
    model; this needs none. The variables `norm` and `attention` [layer, image, ...] are the two ratios. For images of several
    grids [..., feature], newlines included: see `results.image_axes`. The attribute `positions` lists the sinks' positions in
    the prompt. One forward pass. Raises `InputError` for prompts without images, or thresholds below 1.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = sink_positions(model, model.prepare("What color is the star?", images=image_path("demo")))
    >>> found.positions, f"{float(found.norm.max()):.1f} times the median"
    ([], '2.4 times the median')
    """
    for name, value in (("norm", norm), ("attention", attention)):
        finite_number(value, name, least=1.0)
    prompts = model.as_inputs(inputs)
    check_supported("sink_positions", model, prompts)
    axes = ImageAxes.of(prompts)
    where = axes.positions_of_all(prompts)
    with provenance("sink_positions", model, prompts, n_forward=1, norm=norm, attention=attention) as made:
        ratios = _ratios(model, prompts, where)
        how: dict[str, Any] = {"layouts": prompts.layouts, "coords": {"layer": range(model.cfg.n_layers)}}
        arrays = {name: axes.labelled(own, ("layer", "prompt", "image"), **how) for name, own in ratios.items()}
        arrays["sink"] = ((arrays["norm"] >= norm) & (arrays["attention"] >= attention)).any("layer")
        is_sink = arrays["sink"].values.reshape(len(prompts), -1)
        places = to_numpy(where).reshape(len(prompts), -1)
        found = [sorted(row[own].tolist()) for row, own in zip(places, is_sink, strict=True)]
        result = xr.Dataset(arrays, attrs=made.attrs(positions=unwrap_single(found)))
        return result if len(prompts) > 1 else result.isel(prompt=0, drop=True)


def without_sinks_of(result: xr.DataArray, sinks: xr.Dataset) -> xr.DataArray:
    """A result by place of images with the sinks' numbers left out, which are NaN then; attribute `left_out`."""
    attrs = result.attrs | {"left_out": sinks.attrs["positions"]}
    attrs["n_forward"] = attrs["n_forward"] + sinks.attrs["n_forward"]
    return result.where(~sinks["sink"]).assign_attrs(attrs)


@torch.no_grad()
def _ratios(model: HookedLLaVA, prompts: Inputs, where: Int[Tensor, "prompt image place"]) -> dict[str, Measured]:
    """Norms by the image's median and attention by its mean, at every place in every layer."""
    queries = torch.zeros(prompts.shape)
    for row, token_map in zip(queries, prompts.token_maps, strict=True):
        end = max(max(image) for image in token_map.image_ranges)
        row[[p for p in token_map["text"] if p > end] or [token_map["last"][0]]] = 1.0
    queries = queries / queries.sum(-1, keepdim=True)
    norms: list[Tensor] = []
    looked: list[Tensor] = []

    @reads_only
    def keep_norm(resid: Tensor, hook: Any) -> None:
        norms.append(take_each(resid.float().norm(dim=-1).to(prompts.device), where))

    @reads_only
    def keep_attention(pattern: Tensor, hook: Any) -> None:
        mean = to_device(queries, pattern.device)[:, None] @ pattern.float().mean(1)
        looked.append(take_each(mean[:, 0].to(prompts.device), where))

    hooks = [
        (model.hooks_table.resolve("resid_pre"), keep_norm),
        (model.hooks_table.resolve("pattern"), keep_attention),
    ]
    model.run_with_hooks(prompts, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    by_norm, by_attention = (to_numpy(torch.stack(own)) for own in (norms, looked))
    return {
        "norm": by_norm / np.nanmedian(by_norm, -1, keepdims=True),
        "attention": by_attention / np.nanmean(by_attention, -1, keepdims=True),
    }
