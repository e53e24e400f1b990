"""What the report's template is filled with: figures as embedded SVG, tables as plain values."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from hooked_llava.analysis.attribution_patching import agreement
from hooked_llava.analysis.head_scores import top_heads
from hooked_llava.analysis.logit_attribution import contribution_sums
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.question import question_text
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.prompt.token_text import visible_token
from hooked_llava.viz.figures.bars import contribution_bars
from hooked_llava.viz.figures.lens import answer_curve
from hooked_llava.viz.figures.maps import layer_head_map, names_along
from hooked_llava.viz.figures.overlay import as_the_model_sees_it, model_view, patch_overlay, patch_overlays
from hooked_llava.viz.style import SEQUENTIAL, ColorScale, Plot

_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")
_THUMBNAIL = 480  # pixels
_PROBABILITY = ColorScale(SEQUENTIAL, 0.0, 1.0)
_BEST_HEADS = 5
visible = partial(visible_token, signs=True)
_METHODS = {
    "log_increase": "Log-probability increase",
    "attention": "Mean attention",
    "grad_x_input": "Gradient × input",
    "integrated_gradients": "Integrated gradients",
    "rollout": "Attention rollout",
    "relevancy": "Relevancy",
    "occlusion": "Occlusion",
    "token_ablation": "Ablated image tokens",
}
_MEANING = {
    "log_increase": "how much likelier the answer becomes when what one head (the one with the largest score above) "
    "brings from a patch is added to the stream entering its layer, S(A v W_O | x), read with the final norm's scale "
    "held (Yu & Ananiadou, arXiv 2411.10950)",
    "attention": "attention from the last position, averaged over all heads of all layers; it knows nothing of the answer",
    "grad_x_input": "gradient of log P times the image embedding, to first order what the embedding adds",
    "integrated_gradients": "the gradient of log P averaged on the line from the picture's mean embedding to each "
    "patch's own, times their difference (arXiv 1703.01365)",
    "rollout": "attention multiplied through all layers, the residual stream counted as attention to oneself "
    "(arXiv 2005.00928); it knows nothing of the answer",
    "relevancy": "attention times its gradient, where positive, accumulated through all layers (arXiv 2103.15679)",
    "occlusion": "what log P loses when a patch is painted grey in the picture, and the model is run again",
    "token_ablation": "what log P loses when a patch's image embedding is replaced by the picture's mean embedding",
}


@dataclass(frozen=True)
class Page:
    """Everything that a page is made from."""

    model: HookedLLaVA
    inputs: Inputs
    answer: str
    """What the model said."""
    results: dict[str, Any]
    """Labelled arrays by name, as in `Report.results`."""
    n_heads: int
    """How many heads' attention is drawn."""
    provenance: dict[str, str]
    """What the footer says."""


def build_page(page: Page) -> dict[str, Any]:
    """The template's variables."""
    token_map = page.inputs.token_map
    results = page.results
    components = results["components"]
    return {
        "question": question_text(page.inputs),
        "answer": page.answer,
        "model_name": page.model.cfg.model_name or "the model",
        "n_layers": page.model.cfg.n_layers,
        "n_heads": page.model.cfg.n_heads,
        "prompt": prompt_tokens(token_map),
        "next_tokens": _ranked(results["next_tokens"]),
        "lens_rows": _lens_rows(results["lens"]),
        "scored": components.attrs["answer"],
        "baseline": components.attrs["baseline"],
        "sums": _sums(components, results["heads"]),
        "curve": figure_uri(answer_curve(results["lens"], title="")),
        "bars": figure_uri(contribution_bars(components, title="")),
        "head_map": figure_uri(layer_head_map(results["heads"], title="")),
        "score_map": figure_uri(layer_head_map(results["head_scores"], title="")),
        "best_heads": _best_heads(results["head_scores"]),
        "pictures": [_picture(page, image) for image in range(page.inputs.n_images)],
        "provenance": page.provenance,
    }


def figure_uri(figure: Figure) -> str:
    """A figure as a data URI, for the `src` of an image."""
    assert isinstance(figure, Plot)
    svg = _PNG.sub(_smaller, figure.to_svg())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def picture_uri(pixels: Image.Image) -> str:
    """A picture as a data URI, made smaller where it is large."""
    shown = pixels.copy()
    shown.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _smaller(png: re.Match[str]) -> str:
    """An embedded PNG, or the same as JPEG where that is much smaller: photographs, many times on one page."""
    data = base64.b64decode(png[1])
    with Image.open(io.BytesIO(data)) as picture:
        if "A" in picture.mode and picture.getchannel("A").getextrema() != (255, 255):
            return png[0]
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="JPEG", quality=88)
    if 2 * len(buffer.getvalue()) > len(data):
        return png[0]
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def prompt_tokens(token_map: TokenMap) -> list[dict[str, str]]:
    """The prompt's tokens with the span of each; a picture's positions are one entry, padding is left out."""
    spans = token_map.spans
    entries, position = [], token_map.real.start
    while position < token_map.real.stop:
        span = next(
            (n for n in ("last", "question", "image", "system", "rest") if position in spans.get(n, ())), "rest"
        )
        if span == "image":
            image = token_map.image_starts.index(position)
            name = f"picture {image}" if token_map.n_images > 1 else "picture"
            entries.append({"text": f"{name}, {token_map.n_features} positions", "span": span})
            position += token_map.n_features
            continue
        entries.append({"text": visible(token_map.labels[position]), "span": span})
        position += 1
    return entries


def looking_heads(attention: xr.DataArray, n: int) -> xr.DataArray:
    """The maps [panel, patch_row, patch_col] of the n heads that attend most to the picture, in that order."""
    flat = attention.stack(panel=("layer", "head")).transpose("panel", "patch_row", "patch_col")
    shares = flat.sum(("patch_row", "patch_col")).values
    order = np.argsort(-shares, kind="stable")[:n]
    pairs = [flat["panel"].values[i] for i in order]
    names = [f"layer {layer}, head {head}: {shares[i]:.0%}" for i, (layer, head) in zip(order, pairs, strict=True)]
    kept = flat.isel(panel=order).drop_vars(["panel", "layer", "head"])
    return kept.assign_coords(panel=names)


def _picture(page: Page, image: int) -> dict[str, Any]:
    """One picture's figures."""
    inputs = page.inputs
    image_processor = getattr(page.model.processor, "image_processor", None)
    attention = page.results["attention"].isel(image=image)
    mean = attention.mean("head").assign_attrs(attention.attrs)
    share = attention.sum(("patch_row", "patch_col"))
    # Without the originals the patches are drawn on what the model sees.
    view = Image.fromarray((255 * model_view(inputs, image_processor, image=image)).round().astype(np.uint8))
    canvas: Any = view if inputs.images is None else inputs
    columns = 4 if page.model.cfg.n_layers <= 16 else 8
    return {
        "number": image + 1,
        "thumbnail": picture_uri(view if inputs.images is None else inputs.images[image]),
        "small": max(view.size) <= _THUMBNAIL // 3,
        "seen": figure_uri(as_the_model_sees_it(inputs, image_processor, image=image)),
        "normalised": bool(getattr(image_processor, "do_normalize", False)),
        "original_known": inputs.images is not None,
        "by_layer": figure_uri(patch_overlays(canvas, mean, image=image, columns=columns, title="")),
        "by_head": figure_uri(patch_overlays(canvas, looking_heads(attention, page.n_heads), image=image, title="")),
        "share_map": figure_uri(layer_head_map(share.rename("attention"), title="")),
        "mean_share": f"{float(share.mean()):.0%}",
        "maps": [_map(page.results[name], canvas, image) for name in ("patches", "occlusion") if name in page.results],
        "agreement": _agreement(page.results, image),
    }


def _map(maps: xr.DataArray, canvas: Any, image: int) -> dict[str, str]:
    """A patch map as a figure, and what it shows."""
    name, cost, shown = str(maps.attrs["method"]), float(maps.attrs["n_forward"]), maps.isel(image=image)
    heads, window = maps.attrs.get("heads"), int(maps.attrs.get("window", 1))
    which = f", head {', '.join(heads)}" if isinstance(heads, list) else ""
    squares = f" (squares of {window} x {window} patches; each patch has the mean over those that hold it)"
    return {
        "title": _METHODS[name] + which,
        "figure": figure_uri(patch_overlay(canvas, shown, image=image, title="")),
        "meaning": _MEANING[name] + (squares if window > 1 else ""),
        "largest": f"{float(shown.max()):.2g}",
        "cost": f"{cost:.0f} forward pass{'' if round(cost) == 1 else 'es'}",
    }


def _agreement(results: dict[str, Any], image: int) -> str | None:
    """How far the patch map orders the patches as occlusion does; None if one of them is missing or constant."""
    if "occlusion" not in results:
        return None
    correlation = agreement(results["occlusion"].isel(image=image), results["patches"].isel(image=image))
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
    """Every layer's most probable words, each with the colours of its cell."""
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
