"""Draws the figures of the documentation from the embedded model: `python docs/figures.py` writes docs/figures/.

The images of the report and of the gallery need chromium on the PATH and are left as they are without it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from hooked_llava import HookedLLaVA, Intervention, Replay, viz
from hooked_llava.analysis import (
    activation_patching,
    answer_maps,
    answer_probability,
    attention_knockout,
    causal_trace,
    edge_attribution,
    faithfulness_curve,
    knockout_study,
    lens_kl,
    logit_lens,
    output_knockout,
    patch_importance,
    patchscope,
    pope_study,
    probe_linear,
    sink_positions,
    trace_means,
    trace_study,
    train_tuned_lens,
)
from hooked_llava.datasets import by_kind, pope_scores
from hooked_llava.editing import EditRequest, multedit
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape
from hooked_llava.toy.gqa_tables import gqa_rows
from hooked_llava.toy.images import RECOLORED, SEEDS, image_path, image_scene
from hooked_llava.toy.pope_tables import pope_rows
from hooked_llava.toy.wide_scenes import sample_wide_scene

FOLDER = Path(__file__).parent / "figures"
QUESTION = "What color is the star?"
LIVE, KEPT, CHANGED, LINE = "#e3a64a", "#dfe3e8", "#c2452d", "#5b6470"


def save(figure: Figure, name: str) -> None:
    """A figure as a small PNG file."""
    figure.savefig(FOLDER / name, dpi=110, bbox_inches="tight")
    plt.close(figure)


def answers(model: HookedLLaVA) -> None:
    """One figure for each question of docs/questions."""
    clean, blue = (model.prepare(QUESTION, images=image_path(name)) for name in ("demo", "demo-blue-star"))
    fact = model.prepare("Who made this shape?", images=image_path("one-shape"))
    maps = [
        patch_importance(model, clean, heads=4)[0].rename("log increase, 4 heads"),
        patch_importance(model, clean, method="attention")[0].rename("attention, all heads"),
        patch_importance(model, clean, method="occlusion", window=2)[0].rename("occlusion, 2 x 2 patches"),
        patch_importance(model, clean, method="relevancy")[0].rename("relevancy"),
        patch_importance(model, clean, method="tam")[0].rename("token activation map"),
        patch_importance(model, clean, method="grad_cam", vision=True)[0].rename("Grad-CAM, vision tower"),
    ]
    side_by_side = xr.concat(
        [map_.rename("share of the largest") / float(map_.max()) for map_ in maps], "method", combine_attrs="drop"
    )
    white = model.prepare(QUESTION, images=Image.new("RGB", (64, 64), "white"))
    middle = white.token_map.patch_to_position(4, 4)
    into = {"target": white, "target_position": middle, "target_layer": 0, "max_new_tokens": 1}
    said = patchscope(model, clean, positions="image", layers=2, **into)
    save(viz.patch_words(clean, said, layer=2), "patchscope.png")
    save(viz.patch_words(clean, logit_lens(model, clean, positions="image"), layer=3), "patch-words.png")
    save(
        viz.patch_overlays(clean, side_by_side.assign_coords(method=[map_.name for map_ in maps]), columns=3),
        "patches.png",
    )
    best = patch_importance(model, clean)[0]
    save(viz.patch_overlay(clean, best, display="paper"), "paper-display.png")
    save(viz.sink_scatter(sink_positions(model, clean)), "sinks.png")
    save(viz.answer_strip(clean, answer_maps(model, clean, "Orange star", heads="all")), "answer-strip.png")
    edges = ["image->last", "question->last", "image->question", "image->question|rest|last"]
    save(viz.knockout_curves(attention_knockout(model, clean, edges, window=3)), "travel.png")
    save(viz.trace_maps(causal_trace(model, fact, "this shape", corruption="the ring"), fact), "trace.png")
    save(viz.plot_patching(activation_patching(model, clean, blue), clean, unfold=True), "patching.png")
    by_name = {"EAP": edge_attribution(model, clean, blue), "EAP-IG": edge_attribution(model, clean, blue, steps=8)}
    curve = faithfulness_curve(model, clean, blue, by_name, [0, 10, 30, 100, 300, 1000, 3000])
    save(viz.faithfulness_curves(curve), "circuit.png")
    edit = multedit(model, EditRequest(fact, "Boris", constraint="this shape"), layer=3, position="last")
    save(viz.answer_shift(viz.edit_page(model, fact, edit).results["answers"]), "edit.png")


def flow(model: HookedLLaVA) -> None:
    """What docs/questions/travel.md shows of edges, outputs, factors, temperatures and readings by layer."""
    inputs = model.prepare(QUESTION, images=image_path("demo"))
    rows = gqa_rows(10, kinds=["ChooseAttr", "QueryAttr"])
    words = ["true_option->last", "false_option->last", "object_word->last"]
    named = by_kind(knockout_study(model, rows, words, window=2)).sel(kind=["ChooseAttr", "QueryAttr"])
    save(viz.knockout_curves(named), "words.png")
    outputs = ["attn at question", "mlp at question", "attn at last", "mlp at last"]
    save(viz.knockout_curves(output_knockout(model, inputs, outputs, 1)), "outputs.png")
    factors, edges = [1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0], ["question->last", "image->question|rest|last"]
    weighted = [attention_knockout(model, inputs, edges, "all", factor=factor).effect for factor in factors]
    along = xr.concat(weighted, pd.Index(factors, name="factor"), combine_attrs="drop_conflicts")
    save(viz.value_curves(along, "factor", title="Attention along an edge, weighted in all layers"), "factors.png")
    save(viz.value_curves(softened(model, inputs), "temperature", title="P(Orange), scores divided"), "temperature.png")
    save(viz.probability_curves(answer_probability(model, inputs, "orange"), norm="released"), "released.png")


def softened(model: HookedLLaVA, inputs: Inputs) -> xr.DataArray:
    """P(Orange) with the scores of all heads of a layer divided by a temperature, [heads, temperature]."""
    temperatures = [1, 2, 4, 8, 16]
    n_layers = model.cfg.n_layers
    runs = [[Intervention(("attn_scores", layer), temperature=t)] for layer in range(n_layers) for t in temperatures]
    p = Replay(model, inputs).run(runs).softmax(-1)[:, model.to_single_token("Orange")].reshape(n_layers, -1)
    coords = {"heads": [f"layer {layer}" for layer in range(n_layers)], "temperature": temperatures}
    return xr.DataArray(p, coords, name="probability")


def tables(model: HookedLLaVA) -> None:
    """Traces of a table by role and layer, and many edits, as benchmarks/results has them."""
    means = trace_means(trace_study(model, constraint_rows(6, kinds=["Known", "OK-VQA"]), corruption=other_shape))
    save(viz.role_curves(means), "trace-study.png")
    checkpoints = json.loads((FOLDER.parents[1] / "benchmarks/results/editing.json").read_text())["checkpoints"]
    ways = [way for way in next(iter(checkpoints.values()))["sequence"] if way != "cases"]
    for measure, label in (("efficacy", "efficacy"), ("specificity_drop", "questions lost elsewhere, points")):
        found = [
            [[row[measure] for row in one["sequence"][way]] for way in ways] for one in checkpoints.values()
        ]  # [checkpoint, way, n]
        each = np.array(found)
        statistics = np.stack([each.mean(0), each.min(0), each.max(0)], -1)
        n = [row["n"] for row in next(iter(checkpoints.values()))["sequence"][ways[0]]]
        names = [way if "MEMIT" in way or "ROME" in way else f"MultEdit, {way}" for way in ways]
        coords = {"way": names, "facts edited": n, "statistic": ["mean", "low", "high"]}
        held = xr.DataArray(statistics, coords, ("way", "facts edited", "statistic"), name=label)
        save(viz.value_curves(held, "facts edited", title=""), f"many-edits-{measure.partition('_')[0]}.png")


def models() -> None:
    """The same edges in two embedded models, as docs/questions/travel.md has them."""
    rows, edges = gqa_rows(12, kinds=["QueryAttr"]), ["question->last", "image->question|rest|last"]
    names = ("tiny-shapes", "tiny-shapes-next")
    results = {name: knockout_study(HookedLLaVA.from_pretrained(name), rows, edges, 2) for name in names}
    save(viz.knockout_models(results), "models.png")


def hallucination() -> None:
    """What docs/howto/hallucination.md asks `tiny-shapes-next`."""
    study = pope_study(HookedLLaVA.from_pretrained("tiny-shapes-next"), pope_rows(20))
    save(viz.pope_bars(pope_scores(study, n_boot=1000)), "pope.png")


def layers(model: HookedLLaVA) -> None:
    """What probes and lenses read from each layer."""
    rows = gqa_rows(48, kinds=["QueryAttr"])
    save(viz.probe_curves(probe_linear(model, rows, "answer", folds=4).result), "probe.png")
    tuned = train_tuned_lens(model, gqa_rows(16, seed=1), steps=100)
    save(viz.lens_curves(lens_kl(model, gqa_rows(4), lens=tuned)), "lenses.png")


def world() -> None:
    """The bundled images of `tiny-shapes`, enlarged."""
    names = (*SEEDS, *RECOLORED)
    figure, axes = plt.subplots(1, len(names), figsize=(2 * len(names), 2.3))
    for axis, name in zip(axes, names, strict=True):
        axis.imshow(Image.open(image_path(name)).convert("RGB"), interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    save(figure, "world.png")


def world_next() -> None:
    """The bundled wide image and some others of the world of `tiny-shapes-next`, all on one scale."""
    rng = np.random.default_rng(4)
    images = [image_scene("wide").render(), *(sample_wide_scene(rng).render() for _ in range(5))]
    widths = [image.width for image in images]
    figure, axes = plt.subplots(1, len(images), figsize=(12, 3.4), width_ratios=widths)
    for axis, image in zip(axes, images, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.axis("off")
    save(figure, "world-next.png")


def replay() -> None:
    """How Replay enters a kept run: the cone that one change can reach."""
    n_layers, n_positions, layer, position = 6, 12, 2, 8
    figure, axis = plt.subplots(figsize=(8.2, 4.0))
    for row in range(n_layers):
        for column in range(n_positions):
            reached = row >= layer and column >= position
            here = (row, column) == (layer, position)
            color = CHANGED if here else LIVE if reached else KEPT
            axis.add_patch(Rectangle((column + 0.06, row + 0.08), 0.88, 0.84, facecolor=color, edgecolor="white"))
    for x, width, text in ((0, 2, "system"), (2, 5, "image"), (7, 3, "question"), (10, 2, "rest, last")):
        axis.add_patch(
            FancyBboxPatch((x + 0.1, -0.62), width - 0.2, 0.38, boxstyle="round,pad=0.02", fc="white", ec=LINE, lw=0.8)
        )
        axis.text(x + width / 2, -0.43, text, ha="center", va="center", fontsize=8, color=LINE)
    axis.annotate("logits", (n_positions - 0.5, n_layers + 0.55), ha="center", fontsize=9, color=LINE)
    arrow = {"arrowstyle": "->", "color": LINE, "lw": 1.0}
    axis.annotate("", (n_positions - 0.5, n_layers + 0.5), (n_positions - 0.5, n_layers), arrowprops=arrow)
    axis.annotate("", (position + 0.1, 4.5), (5.5, 4.5), arrowprops=arrow)
    kept = {
        "ha": "center",
        "va": "center",
        "fontsize": 8,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 2},
    }
    axis.text(3.0, 4.5, "keys and values of earlier\npositions: read from the kept run", **kept)
    axis.text(6.0, 0.95, "kept run: computed once", **kept)
    notes = (
        (layer + 0.5, "the change: one activation\nat layer 2, position 8", CHANGED),
        (layer + 2.5, "what it can reach:\ncomputed again", "#9a6a17"),
        (layer - 1.0, "below: nothing differs,\nnothing is computed", LINE),
    )
    for y, text, color in notes:
        axis.text(n_positions + 0.35, y, text, va="center", fontsize=8.5, color=color)
    axis.text(-0.3, n_layers / 2, "layers", rotation=90, ha="center", va="center", fontsize=9, color=LINE)
    axis.text(n_positions / 2, -0.95, "positions", ha="center", va="center", fontsize=9, color=LINE)
    axis.set_xlim(-0.6, n_positions + 4.4)
    axis.set_ylim(-1.15, n_layers + 0.9)
    axis.axis("off")
    figure.savefig(FOLDER / "replay.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def report(model: HookedLLaVA) -> None:
    """The report's first sections in three columns, as a browser shows them."""
    body = "max-width: none; margin: 30px; height: 1700px; columns: 3; column-gap: 60px; column-fill: auto"
    columns = f"<style>body {{ {body} }}</style>"
    page = viz.explain(model, model.prepare(QUESTION, images=image_path("demo")))
    screenshot(page.html.replace("</head>", f"{columns}</head>"), (2460, 1760), "report.png")


def gallery() -> None:
    """The first cards of `hooked-llava sae explain`, the best explained first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hooked_llava", "sae", "explain", "--out", f"{folder}/features"]
        subprocess.run(command, check=True, capture_output=True)
        screenshot((Path(folder) / "features/gallery.html").read_text(encoding="utf-8"), (1380, 900), "gallery.png")


def screenshot(html: str, size: tuple[int, int], name: str) -> None:
    """A page as a browser shows it, half as large."""
    browser = shutil.which("chromium")
    if browser is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "page.html", Path(folder) / "page.png"
        page.write_text(html, encoding="utf-8")
        window = f"--window-size={size[0]},{size[1]}"
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=3000", window]
        subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
        image = Image.open(shot).convert("RGB")
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        half.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


def main() -> None:
    """Draw all figures."""
    mpl.rcParams["svg.hashsalt"] = "hooked_llava"
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    replay()
    world()
    world_next()
    answers(model)
    flow(model)
    tables(model)
    models()
    hallucination()
    layers(model)
    report(model)
    gallery()


if __name__ == "__main__":
    main()
