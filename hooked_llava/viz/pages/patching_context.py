"""What the template of a patching report is filled with."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from hooked_llava.analysis.attribution_patching import agreement
from hooked_llava.analysis.deciding_places import deciding_places
from hooked_llava.analysis.head_scores import top_heads
from hooked_llava.experiments.pairs import Direction, changed_patches
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.question import question_text
from hooked_llava.results.arrays import recovered
from hooked_llava.viz.figures.maps import layer_head_map, layer_position_maps
from hooked_llava.viz.figures.overlay import model_view, patch_overlays
from hooked_llava.viz.figures.patching import by_patch
from hooked_llava.viz.pages.explain_context import figure_uri, picture_uri, prompt_tokens, visible
from hooked_llava.viz.pages.page import provenance

_N_HEADS = 5  # named below the map
_STREAM = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True)
class PatchingPage:
    """Everything that a page is made from."""

    model: HookedLLaVA
    pair: tuple[Inputs, Inputs]
    """The clean and the corrupted prompt."""
    answers: tuple[str, str]
    """What the model says to each."""
    followed: tuple[str, str]
    """The tokens whose logits are compared."""
    direction: Direction
    results: dict[str, Any]
    """Labelled arrays by name, as in `PatchingReport.results`."""
    n_decoded: int
    """Tokens that were generated, each a forward pass."""
    started: float
    """When the work began, as `perf_counter` says."""


def build_patching_page(page: PatchingPage) -> dict[str, Any]:
    """The template's variables."""
    clean, corrupted = page.pair
    shares = {name: recovered(result) for name, result in page.results.items()}
    stream = {hook: shares[hook] for hook in _STREAM}
    base = clean if page.direction == "noise" else corrupted
    answer, baseline = (visible(word) for word in page.followed)
    return {
        "question": question_text(clean),
        "other_question": question_text(corrupted),
        "same_words": bool((clean.input_ids == corrupted.input_ids).all()),
        "answers": page.answers,
        "model_name": page.model.cfg.model_name or "the model",
        "n_layers": page.model.cfg.n_layers,
        "n_heads": page.model.cfg.n_heads,
        "prompt": prompt_tokens(clean.token_map),
        "token": answer,
        "baseline": baseline,
        "ends": [f"{page.results['heads'].attrs[name]:+.2f}" for name in ("clean", "corrupted")],
        "denoise": page.direction == "denoise",
        "thumbnails": [_thumbnails(page, image) for image in range(clean.n_images)],
        "changed": _changed_patches(page) if clean.n_images else "",
        "stream_map": figure_uri(layer_position_maps(stream, base)),
        "found": _found(shares, clean.n_images),
        "head_map": figure_uri(layer_head_map(shares["heads"], title="")),
        "heads": _largest_heads(shares["heads"], float(shares["heads"].attrs["neutral"])),
        "pictures": [_picture(page, shares, base, image) for image in range(clean.n_images)],
        "exact_patches": "patches" in shares,
        "exact_layers": "patches" in shares and shares["patches"].sizes["layer"] > 1,
        "agreements": _agreements(page, shares),
        **_cost(page),
    }


def _thumbnails(page: PatchingPage, image: int) -> list[dict[str, Any]]:
    """The clean and the corrupted picture."""
    return [{"uri": picture_uri(shown), "small": max(shown.size) <= 160} for shown in _originals(page, image)]


def _originals(page: PatchingPage, image: int) -> list[Image.Image]:
    """The pictures as they were given or, where that is not known, as the model sees them."""
    processor = getattr(page.model.processor, "image_processor", None)
    shown = []
    for inputs in page.pair:
        if inputs.images is not None:
            shown.append(inputs.images[image])
        else:
            view = model_view(inputs, processor, image=image)
            shown.append(Image.fromarray((255 * view).round().astype(np.uint8)))
    return shown


def _changed_patches(page: PatchingPage) -> str:
    """How many patches differ in a pixel."""
    differs = changed_patches(*page.pair)
    return f"{int(differs.sum())} of {differs.size}"


def _found(shares: dict[str, Any], n_images: int) -> list[str]:
    """The map of the stream in sentences: where does one place alone decide?"""
    found = deciding_places(shares["resid_pre"])
    said = [
        "At no layer does the stream at the last position decide more than half by itself."
        if found.last_from is None
        else f"From layer {found.last_from} on, the stream at the last position alone decides more than half."
    ]
    if n_images:
        what = "the picture" if n_images == 1 else "the pictures"
        said.append(
            f"At no layer do the positions of {what} decide more than half."
            if found.image_until is None
            else f"Up to layer {found.image_until}, all positions of {what} together decide more than half."
        )
    if found.best is not None:
        n = found.best.attrs["n_tied"]
        tied = f" (and {n} other cell{'s' if n > 1 else ''} as much)" if n else ""
        said.append(
            f"Of the other words, “{visible(str(found.best['label'].item()))}” decides most: {float(found.best):.2f}, "
            f"entering layer {int(found.best['layer'])}{tied}."
        )
    return said


def _largest_heads(heads: xr.DataArray, neutral: float) -> list[str]:
    heads = heads.squeeze("position", drop=True)
    farthest = top_heads(abs(heads - neutral), min(_N_HEADS, heads.size))
    return [f"layer {layer}, head {head}: {float(heads.sel(layer=layer, head=head)):.2f}" for layer, head in farthest]


def _picture(page: PatchingPage, shares: dict[str, Any], base: Inputs, image: int) -> dict[str, Any]:
    """One picture's figures: its patches exact and estimated, and its positions layer by layer."""
    clean = page.pair[0]
    canvas: Any = clean if clean.images is not None else _originals(page, image)[0]
    stream = by_patch(shares["estimate"]["resid_pre"], base, image=image)
    panels = {"attribution": stream.sel(layer=0, drop=True)}
    if "patches" in shares:
        exact = by_patch(shares["patches"], base, image=image)
        panels = {"measured": exact.sel(layer=0, drop=True), **panels}
        stream = exact if exact.sizes["layer"] > 1 else stream
    both = xr.concat(
        list(panels.values()), xr.DataArray(list(panels), dims="way", name="way"), combine_attrs="override"
    )
    columns = 4 if page.model.cfg.n_layers <= 16 else 8
    return {
        "number": image + 1,
        "patches": figure_uri(patch_overlays(canvas, both.rename("recovered"), image=image, title="")),
        "by_layer": figure_uri(
            patch_overlays(canvas, stream.rename("recovered"), image=image, columns=columns, title="")
        ),
    }


def _agreements(page: PatchingPage, shares: dict[str, Any]) -> list[dict[str, str]]:
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


def _cost(page: PatchingPage) -> dict[str, Any]:
    """What was run, and the footer that says so."""
    swept = [result for name, result in page.results.items() if name != "estimate"]
    runs, work = (sum(result.attrs[name] for result in swept) for name in ("runs", "work"))
    n_forward = page.n_decoded + sum(result.attrs["n_forward"] for result in page.results.values())
    seconds = perf_counter() - page.started
    cost = (
        f"{runs} interventions, re-run for the work of {work:.1f} forward passes; besides, {n_forward} forward passes and "
        f"1 backward pass; {seconds:.1f} s"
    )
    about = provenance(page.model, page.pair[0], cost)
    if page.pair[1].prompts and page.pair[1].prompts != page.pair[0].prompts:
        about = {**about, "Corrupted": page.pair[1].prompts[0]}
    return {"runs": runs, "work": f"{work:.1f}", "provenance": about}
