"""What the page of an answer is filled with: figures, and tables as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from hooked_llava.analysis.attribution_patching import agreement
from hooked_llava.analysis.head_scores import top_heads
from hooked_llava.analysis.logit_attribution import contribution_sums
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import image_dims
from hooked_llava.viz.figures.answer_strip import answer_strip
from hooked_llava.viz.figures.bars import contribution_bars, neuron_bars
from hooked_llava.viz.figures.by_layer import ablation_curves, storage_curves
from hooked_llava.viz.figures.lens import answer_curve
from hooked_llava.viz.figures.maps import layer_head_map, names_along
from hooked_llava.viz.figures.model_view import as_the_model_sees_it
from hooked_llava.viz.figures.overlay import EACH, patch_overlay, patch_overlays
from hooked_llava.viz.pages.embed import visible
from hooked_llava.viz.pages.parts import about_model, canvas, panel_columns, prompt_tokens, shown_images
from hooked_llava.viz.style import SEQUENTIAL, ColorScale

_PROBABILITY = ColorScale(SEQUENTIAL, 0.0, 1.0)
_BEST_HEADS = 5
_NEURONS = 10


def explanation(model: HookedLLaVA, prompt: Inputs, results: dict[str, Any], n_heads: int) -> dict[str, Any]:
    """The template's variables; `n_heads` is how many heads' attention is drawn."""
    components, processor = results["components"], getattr(model.processor, "image_processor", None)
    images = shown_images(model, prompt)
    return {
        **about_model(model),
        "prompt": prompt_tokens(prompt.token_map),
        "images": images,
        "originals_known": prompt.images is not None,
        "tiled": any(len(layout.grids) > 1 for layout in prompt.layouts),
        "normalised": bool(getattr(processor, "do_normalize", False)),
        "next_tokens": _ranked(results["next_tokens"]),
        "lens_rows": _lens_rows(results["lens"]),
        "scored": components.attrs["answer"],
        "baseline": components.attrs["baseline"],
        "sums": _sums(components, results["heads"]),
        "curve": answer_curve(results["lens"], title=""),
        "bars": contribution_bars(components, title=""),
        "head_map": layer_head_map(results["heads"], title=""),
        "score_map": layer_head_map(results["head_scores"], title=""),
        "best_heads": _best_heads(results["head_scores"]),
        **_by_layer(results),
        "each_image": [
            {
                "number": i + 1,
                "seen": as_the_model_sees_it(prompt, processor, image=i),
                **_attention(results["attention"].isel(image=i), canvas(prompt, images, i), i, n_heads),
                **_maps(results, canvas(prompt, images, i), i),
                "strip": _strip(results.get("answer_maps"), canvas(prompt, images, i), i),
            }
            for i in range(prompt.n_images)
        ],
    }


def _by_layer(results: dict[str, Any]) -> dict[str, Any]:
    """What each layer adds, what can be read in it, and what is lost without its heads."""
    stored, scores = results.get("storage"), results["layer_scores"]
    return {
        "layer_bars": contribution_bars(scores, title=""),
        "neurons": neuron_bars(results["neurons"], n=_NEURONS, title=""),
        "stored": None if stored is None else storage_curves(stored, title=""),
        "rival": None if stored is None else visible(str(stored.attrs["distractor"])),
        "n_stored": 0 if stored is None else stored.sizes["position"],
        "without_layers": ablation_curves(results["without_layers"], title=""),
    }


def looking_heads(attention: xr.DataArray, n: int) -> xr.DataArray:
    """The maps of the n heads that attend most to the image, in that order: an axis panel in place of layer and head."""
    shares = attention.sum(image_dims(attention))
    best = top_heads(shares, min(n, shares.size))
    maps = [attention.sel(layer=layer, head=head, drop=True) for layer, head in best]
    names = [f"layer {layer}, head {head}: {float(shares.sel(layer=layer, head=head)):.0%}" for layer, head in best]
    return xr.concat(maps, xr.DataArray(names, dims="panel", name="panel"), combine_attrs="override")


def _attention(attention: xr.DataArray, drawn_on: Inputs | Image.Image, image: int, n_heads: int) -> dict[str, Any]:
    """Where the last position looks in one image."""
    mean = attention.mean("head", keep_attrs=True)
    share = attention.sum(image_dims(attention))
    columns = panel_columns(attention.sizes["layer"])
    how: dict[str, Any] = {"image": image, "grid": EACH, "title": ""}
    return {
        "by_layer": patch_overlays(drawn_on, mean, columns=columns, **how),
        "by_head": patch_overlays(drawn_on, looking_heads(attention, n_heads), **how),
        "share_map": layer_head_map(share.rename("attention"), title=""),
        "mean_share": f"{float(share.mean()):.0%}",
    }


def _maps(results: dict[str, Any], drawn_on: Inputs | Image.Image, image: int) -> dict[str, Any]:
    """The patch map of one image, occlusion beside it, and whether they agree."""
    maps = {name: results[name].isel(image=image) for name in ("patches", "occlusion") if name in results}
    return {
        "maps": [_map(one, drawn_on, image) for one in maps.values()],
        "agreement": _agreement(*maps.values()) if len(maps) == 2 else None,
    }


def _strip(maps: xr.DataArray | None, drawn_on: Inputs | Image.Image, image: int) -> dict[str, Any] | None:
    """A map of every token of the answer, on one image."""
    if maps is None:
        return None
    method = str(maps.attrs["method"])
    figure = answer_strip(drawn_on, maps, image=image, title="")
    return {"figure": figure, "title": PATCH_MAPS[method].title, "n": maps.sizes["token"]}


def _map(shown: xr.DataArray, drawn_on: Inputs | Image.Image, image: int) -> dict[str, Any]:
    """A patch map as a figure, and what it shows."""
    method, cost, heads = str(shown.attrs["method"]), float(shown.attrs["n_forward"]), shown.attrs.get("heads")
    window = int(shown.attrs.get("window", 1))
    which = f", head {', '.join(heads)}" if isinstance(heads, list) else ""
    squares = f" (squares of {window} x {window} patches; each patch has the mean over those that hold it)"
    return {
        "method": method,
        "title": PATCH_MAPS[method].title + which,
        "figure": patch_overlay(drawn_on, shown, image=image, grid=EACH, title=""),
        "meaning": PATCH_MAPS[method].meaning + (squares if window > 1 else ""),
        "largest": f"{float(shown.max()):.2g}",
        "cost": f"{cost:.0f} forward pass{'' if round(cost) == 1 else 'es'}",
    }


def _agreement(patches: xr.DataArray, occlusion: xr.DataArray) -> str | None:
    """How far the patch map orders the patches as occlusion does; None if one of them is constant."""
    correlation = agreement(occlusion, patches)
    return f"{correlation:.2f}" if np.isfinite(correlation) else None


def _best_heads(scores: xr.DataArray) -> str:
    """The heads with the largest scores in words."""
    heads = top_heads(scores, min(_BEST_HEADS, scores.size))
    return ", ".join(f"{layer}.{head} ({float(scores[layer, head]):+.2f})" for layer, head in heads)


def _ranked(result: xr.Dataset) -> list[dict[str, Any]]:
    """The next tokens with their probability, as text and as the width of a bar in percent."""
    one = result.isel(prompt=0)
    pairs = zip(one["token"].values, one["probability"].values.tolist(), strict=True)
    return [{"token": visible(str(t)), "probability": f"{p:.3f}", "width": f"{100 * p:.1f}"} for t, p in pairs]


def _lens_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """Every layer's most probable words, each with the colors of its cell."""
    one = result.isel(position=0).transpose("layer", "rank", ...)
    rows = []
    for name, words, probabilities in zip(
        names_along(one, "layer"), one["token"].values, one["probability"].values, strict=True
    ):
        cells = [
            {
                "token": visible(str(word)),
                "probability": f"{p:.2f}",
                "background": _hex(_PROBABILITY.rgba(p)),
                "color": _PROBABILITY.ink(p),
            }
            for word, p in zip(words, probabilities.tolist(), strict=True)
        ]
        rows.append({"layer": name, "cells": cells})
    return rows


def _sums(components: xr.DataArray, heads: xr.DataArray) -> dict[str, str]:
    """What the bars add up to, and what the logit is."""
    sums, logit = contribution_sums(components), float(components.attrs["logit"])
    return {
        **{name: f"{sums[name]:+.2f}" for name in ("attention", "mlp", "other")},
        "total": f"{sums['total']:.4f}",
        "logit": f"{logit:.4f}",
        "remainder": f"{abs(logit - sums['total']):.1e}",
        "heads": f"{float(heads.sum()):+.2f}",
    }


def _hex(rgba: tuple[float, float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgba[:3])
