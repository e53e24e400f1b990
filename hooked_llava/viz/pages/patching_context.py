"""What the template of a patching report is filled with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from hooked_llava.analysis.attribution_patching import agreement
from hooked_llava.analysis.deciding_places import deciding_places
from hooked_llava.experiments.pairs import changed_patches
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.directions import Direction
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.question import question_text
from hooked_llava.results.arrays import recovered
from hooked_llava.viz.figures.maps import layer_head_map
from hooked_llava.viz.figures.overlay import EACH, patch_overlays
from hooked_llava.viz.figures.patching import by_patch
from hooked_llava.viz.figures.positions import layer_position_maps
from hooked_llava.viz.pages.parts import about_model, canvas, panel_columns, prompt_tokens, shown_images

_N_HEADS = 5  # named below the map
_STREAM = ("resid_pre", "attn_out", "mlp_out")


def where_the_difference_lies(
    model: HookedLLaVA,
    pair: tuple[Inputs, Inputs],
    followed: Sequence[str],
    direction: Direction,
    results: dict[str, Any],
) -> dict[str, Any]:
    """The template's variables.

    `pair` is the clean and the corrupted prompt, `followed` the two tokens whose logits are compared.
    """
    clean, corrupted = pair
    shares = {name: recovered(result) for name, result in results.items()}
    base = clean if direction == "noise" else corrupted
    images = [shown_images(model, prompt) for prompt in pair]
    return {
        **about_model(model),
        "other_question": question_text(corrupted),
        "same_words": bool((clean.input_ids == corrupted.input_ids).all()),
        "prompt": prompt_tokens(clean.token_map),
        "followed": followed,
        "ends": [f"{results['heads'].attrs[name]:+.2f}" for name in ("clean", "corrupted")],
        "denoise": direction == "denoise",
        "changed": _changed(pair) if clean.n_images else "",
        "tiled": any(len(layout.grids) > 1 for layout in clean.layouts),
        "stream_map": layer_position_maps({hook: shares[hook] for hook in _STREAM}, base),
        "found": deciding_places(shares["resid_pre"]),
        "head_map": layer_head_map(shares["heads"], title=""),
        "heads": _largest_heads(shares["heads"], float(shares["heads"].attrs["neutral"])),
        "each_image": [
            {
                "number": i + 1,
                "clean": images[0][i],
                "corrupted": images[1][i],
                **_by_patch(shares, base, canvas(clean, images[0], i), i),
            }
            for i in range(clean.n_images)
        ],
        "exact_patches": "patches" in shares,
        "exact_layers": "patches" in shares and shares["patches"].sizes["layer"] > 1,
        "agreements": _agreements(shares),
    }


def _changed(pair: tuple[Inputs, Inputs]) -> str:
    n_patches = sum(layout.n_cells for layout in pair[0].layouts)
    return f"{int(changed_patches(*pair).sum())} of {n_patches}"


def _largest_heads(heads: xr.DataArray, neutral: float) -> list[str]:
    flat = heads.squeeze("position", drop=True).stack(place=("layer", "head"))
    farthest = np.argsort(-np.abs(flat.values - neutral), kind="stable")[:_N_HEADS]  # many may be equally far
    places = flat["place"].values[farthest]
    return [f"layer {layer}, head {head}: {float(flat.sel(place=(layer, head))):.2f}" for layer, head in places]


def _by_patch(shares: dict[str, Any], base: Inputs, drawn_on: Inputs | Image.Image, image: int) -> dict[str, Any]:
    """One image's figures: its patches exact and estimated, and its positions layer by layer."""
    resid_pre = by_patch(shares["estimate"]["resid_pre"], base, image=image)
    panels = {"attribution": resid_pre.sel(layer=0, drop=True)}
    if "patches" in shares:
        exact = by_patch(shares["patches"], base, image=image)
        panels = {"measured": exact.sel(layer=0, drop=True), **panels}
        resid_pre = exact if exact.sizes["layer"] > 1 else resid_pre
    ways = xr.DataArray(list(panels), dims="way", name="way")
    both = xr.concat(list(panels.values()), ways, combine_attrs="override")
    columns = panel_columns(resid_pre.sizes["layer"])
    how: dict[str, Any] = {"image": image, "grid": EACH, "title": ""}
    return {
        "patches": patch_overlays(drawn_on, both.rename("recovered"), **how),
        "by_layer": patch_overlays(drawn_on, resid_pre.rename("recovered"), columns=columns, **how),
    }


def _agreements(shares: dict[str, Any]) -> list[dict[str, str]]:
    """Spearman's correlation of every exact map with its estimate."""
    estimate = shares["estimate"]
    named: list[tuple[str, xr.DataArray, xr.DataArray]] = []
    for hook in _STREAM:
        exact = shares[hook]
        if "n_positions" in exact.coords:
            exact = exact.sel(position=exact["n_positions"] == 1)
        named.append((f"{hook}, layer x token", exact, estimate[hook]))
    named.append(("z at the last position, layer x head", shares["heads"], estimate["z"]))
    if "patches" in shares:
        for layer in (0, None) if shares["patches"].sizes["layer"] > 1 else (0,):
            exact = shares["patches"] if layer is None else shares["patches"].sel(layer=[layer])
            named.append(
                (f"resid_pre, {'layer x patch' if layer is None else 'layer 0, patch'}", exact, estimate["resid_pre"])
            )
    return [
        {"map": name, "cells": str(exact.size), "agreement": f"{agreement(exact, other):.2f}"}
        for name, exact, other in named
    ]
