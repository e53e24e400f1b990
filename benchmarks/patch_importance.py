"""Do patch maps lie on the object that is asked about? `python -m benchmarks.patch_importance` (some minutes a checkpoint).

Held-out images of the embedded world, where the queried object's patches are known, under every method of
`patch_importance` and every embedded checkpoint: AUC, average precision, pointing game, IoU at the object's size,
specificity against the other objects, rank correlation with occlusion, deletion and insertion, the same maps under a
question about another object, seconds and forward passes; the log-probability increase against mean attention, paired;
and signs of wrong answers. Maps are kept under out/, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from benchmarks import _answer_signs
from benchmarks._maps import COSTLY, METHODS, RANDOM, SINGLE_PATCHES, Case, answers, batches, cases, maps_of, prepared
from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import agreement, deletion_curves
from hooked_llava.analysis.answer_signs import SIGNS
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.map_quality import MEASURES, bootstrap, map_quality
from hooked_llava.toy.evaluate import embedded

KIND = "query_color"
OCCLUSION = "occlusion, 2 x 2 patches"
INCREASE, ATTENTION = "log increase, best head", "attention, mean of all heads"
COMPARED = ("log increase, best head", "log increase, best 4 heads", "log increase, all heads")
SHARES = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
FEW, FEWER = 4, 10  # part of the costly images for single patches; part of all for curves and other questions
_COLUMNS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "pointing": "pointing",
    "iou": "IoU",
    "specificity": "against other objects",
    "other_question": "AUC, other question",
    "occlusion": "rank correlation with occlusion",
    "deletion": "deletion (low is good)",
    "insertion": "insertion",
}

Rows = dict[str, dict[str, Any]]


def measure(model: HookedLLaVA, checkpoint: str, some: Sequence[Case], costly: int, folder: Path) -> Rows:
    """Every number of every method for each image."""
    few, fewer = some[: max(2, costly // FEW)], some[: max(2, len(some) // FEWER)]
    names = [*METHODS, RANDOM]
    maps = {}
    for name in tqdm(names, desc=checkpoint, leave=False):
        images = few if SINGLE_PATCHES in name else some[:costly] if name.startswith(COSTLY) else some
        maps[name] = maps_of(model, images, name, folder / _file(checkpoint, name, len(images)))
    rows: Rows = {}
    for name, of in maps.items():
        own = some[: len(of)]
        quality = map_quality(of, np.stack([c.coverage for c in own]), np.stack([c.others for c in own]))
        rows[name] = {measure: quality[measure].values for measure in MEASURES}
        rows[name] |= {key: of.attrs[key] for key in ("forwards", "backwards")}
        rows[name]["milliseconds"] = 1000 * of.attrs["seconds"] / len(of)
        rows[name]["occlusion"] = correlations(of, maps[OCCLUSION])
        if SINGLE_PATCHES not in name:
            other = maps_of(model, fewer, name, folder / _file(checkpoint, f"{name}, other", len(fewer)), other=True)
            asked = map_quality(other, np.stack([c.coverage for c in fewer]))
            rows[name]["other_question"] = asked.auc.values
    for way, areas in curves(model, fewer, maps).items():
        for name, values in areas.items():
            rows[name][way] = values
    return rows


def correlations(maps: xr.DataArray, reference: xr.DataArray) -> np.ndarray:
    """Spearman's rank correlation of each map with the reference's."""
    return np.array([agreement(a, b) for a, b in zip(maps, reference, strict=False)])


def curves(model: HookedLLaVA, some: Sequence[Case], maps: Mapping[str, xr.DataArray]) -> dict[str, Any]:
    """Area under deletion and insertion curves of every map of some images."""
    areas: list[xr.DataArray] = []
    for i, case in enumerate(tqdm(some, desc="deletion and insertion", leave=False)):
        own = {name: of.values[i] for name, of in maps.items()}
        areas.append(deletion_curves(model, prepared(model, [case]), own, shares=SHARES).area)
    joined = xr.concat(areas, "prompt")
    return {
        way: {name: joined.sel(direction=way, map=name).values for name in maps} for way in ("deletion", "insertion")
    }


def summary(rows: Rows) -> Rows:
    """Means with intervals."""
    found: Rows = {}
    for name, row in rows.items():
        found[name] = {"images": len(row["auc"])}
        for key, values in row.items():
            if isinstance(values, np.ndarray):
                found[name][key] = [round(x, 4) for x in bootstrap(values)]
            else:
                found[name][key] = round(float(values), 3)
    return found


def pooled(each: Mapping[str, Rows]) -> Rows:
    """Every number's mean over the checkpoints, image by image.

    All checkpoints see the same images, so that intervals over images are taken of these means: three measurements of
    one image are not three images.
    """
    first = next(iter(each.values()))
    return {
        name: {key: _mean([rows[name][key] for rows in each.values()]) for key in row} for name, row in first.items()
    }


def _mean(values: Sequence[Any]) -> Any:
    """Of what there is; NaN where there is nothing."""
    table = np.asarray(values, dtype=float)
    there = np.isfinite(table).sum(0)
    mean = np.where(there, np.nansum(table, 0) / np.maximum(there, 1), np.nan)
    return mean if mean.ndim else float(mean)


def compared(rows: Rows) -> dict[str, Any]:
    """Difference of AUC and of the other measures to mean attention, image by image."""
    return {
        name: {m: [round(x, 4) for x in bootstrap(rows[name][m] - rows[ATTENTION][m])] for m in MEASURES}
        for name in COMPARED
    }


def table(summaries: Rows, corner: str) -> str:
    """Means, with half of the interval's width for the AUC."""
    cells = {}
    for name, row in summaries.items():
        mean, low, high = row["auc"]
        values = [str(row["images"]), f"{mean:.3f} ± {(high - low) / 2:.3f}"]
        values += [f"{row[key][0]:.3f}" if key in row else "-" for key in _COLUMNS if key != "auc"]
        passes = f"{row['forwards']:.0f}" + (f" + {row['backwards']:.0f} backward" if row["backwards"] else "")
        cells[name] = [*values, passes, f"{row['milliseconds']:.0f}"]
    return markdown(["images", *_COLUMNS.values(), "forward passes", "ms"], cells, corner)


def comparison_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Differences to mean attention with their intervals."""
    cells = {
        f"{name}, {checkpoint}": [f"{v[0]:+.3f} ({v[1]:+.3f} to {v[2]:+.3f})" for v in row.values()]
        for checkpoint, of in found.items()
        for name, row in of.items()
    }
    return markdown([_COLUMNS[m] for m in MEASURES], cells, "less mean attention, image by image")


def signs_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """AUROC of every sign for a wrong answer."""
    cells = {}
    for checkpoint, of in found.items():
        for name, row in of.items():
            values = [f"{row[s][0]:.2f} ({row[s][1]:.2f} to {row[s][2]:.2f})" if s in row else "-" for s in SIGNS]
            cells[f"{name}, {checkpoint}"] = [f"{row['wrong']} of {row['n']}", *values]
    return markdown(["wrong", *(s.replace("_", " ") for s in SIGNS)], cells, "AUROC for a wrong answer")


def _file(checkpoint: str, name: str, n: int) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return f"{checkpoint}.{plain}.{n}.safetensors"


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repetitions=1)
    parser.add_argument("--n", type=int, default=500, help="images (default 500)")
    parser.add_argument("--costly", type=int, default=200, help="images for methods of many passes (default 200)")
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", default=embedded(), help="folders; all embedded by default"
    )
    parser.add_argument("--partial", type=Path, default=Path("out/patch_importance"), help="where maps are kept")
    options = start(parser, argv)
    if options.quick:
        options.n, options.checkpoints = min(options.n, 4), options.checkpoints[:1]
        options.partial = options.partial / "quick"
    options.costly = min(options.costly, options.n)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    some = cases(KIND, options.n)
    rows: dict[str, Rows] = {}
    signs: dict[str, Any] = {}
    right: dict[str, float] = {}
    for folder in options.checkpoints:
        model = HookedLLaVA.from_pretrained(folder)
        said = [answer for batch in batches(some) for answer in answers(model, prepared(model, batch))]
        right[folder.name] = float(np.mean([a == c.example.question.answer for a, c in zip(said, some, strict=True)]))
        rows[folder.name] = measure(model, folder.name, some, options.costly, options.partial)
        signs[folder.name] = _answer_signs.measure(model, options.n)
        print(f"\n{table(summary(rows[folder.name]), folder.name)}", flush=True)
    summaries = {"all": summary(pooled(rows))} | {name: summary(of) for name, of in rows.items()}
    against = {"all": compared(pooled(rows))} | {name: compared(of) for name, of in rows.items()}
    print(f"\n{table(summaries['all'], 'all checkpoints')}")
    print(f"\n{comparison_table(against)}\n\n{signs_table(signs)}")
    path = write(
        "patch_importance",
        options,
        question=KIND,
        images=options.n,
        accuracy=right,
        checkpoints=summaries,
        against_mean_attention=against,
        answer_signs=signs,
    )
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
