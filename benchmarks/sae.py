"""What a sparse autoencoder of an embedded model is worth: `python -m benchmarks.sae [--model tiny-shapes-next]`.

It reads what enters the language model at the image's positions, where the text reads the image from. FVU and dead share
against width and k; the answers' cross-entropy that is recovered, beside mean ablation and a random dictionary; how well the
best feature tells a color or a shape, beside neurons, raw dimensions, PCA and a random dictionary; steering toward each color;
attribution by gradient against exact. Intervals are over three seeds of the autoencoder, over labels, or over prompts, as said.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks._feature_labels import (
    COVERAGE,
    HOOK,
    LABELS,
    Patches,
    acts,
    contestants,
    patches,
    random_dictionary,
    selected_precision,
    unexplained,
)
from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.datasets.rows import StudyRow, prepare_rows
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.map_quality import bootstrap
from hooked_llava.sae.attribution import feature_attribution
from hooked_llava.sae.autoencoder import SparseAutoencoder
from hooked_llava.sae.files import load_sae
from hooked_llava.sae.splice import loss_recovered
from hooked_llava.sae.stream import activation_stream
from hooked_llava.sae.train import train_sae
from hooked_llava.sae.trainer import StepRecord
from hooked_llava.steering.sweep import steering_sweep
from hooked_llava.toy.evaluate import Example, held_out, prepare_examples
from hooked_llava.toy.feature_tables import ANSWERED_KINDS, HELD_OUT_SEED, feature_rows
from hooked_llava.toy.scenes import COLOR_NAMES

SHIPPED = "tiny-shapes"
"""The model for which an autoencoder comes with the package."""
OURS, RANDOM = "features", "random dictionary"
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
CLEAR = 0.5  # probability that a color must reach, and its control must not
_TYPICAL = 95  # percentile of a feature's activations that strength 1 sets it to

Measured = dict[str, Any]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        model (str): The model, and the world that its images come from.
        images (int): Images that the autoencoders are trained on.
        steps (int): Steps of training.
        batch (int): Activations in a step.
        sizes (tuple[tuple[int, int], ...]): Widths and k; the first is trained with every seed, the others with the first.
        seeds (int): Seeds of the autoencoder.
        labelled (int): Images that units are chosen on, and as many others that they are measured on.
        asked (int): Held-out prompts whose cross-entropy is measured.
        colors (tuple[str, ...]): Colors that are steered to.
        steered (int): Prompts that are steered to each of them, but for those that have it.
        attributed (int): Prompts whose answers are attributed.
        top (int): Features at tokens that are measured exactly in each.
    """

    model: str = SHIPPED
    images: int = 4000
    steps: int = 400
    batch: int = 2048
    sizes: tuple[tuple[int, int], ...] = ((128, 8), (64, 8), (256, 8), (512, 8), (128, 4), (128, 16))
    seeds: int = 3
    labelled: int = 150
    asked: int = 64
    colors: tuple[str, ...] = COLOR_NAMES
    steered: int = 8
    attributed: int = 8
    top: int = 100


SETTINGS = {
    SHIPPED: Settings(),
    "tiny-shapes-next": Settings("tiny-shapes-next", images=1600, sizes=((256, 8), (128, 8), (512, 8)), labelled=100),
}
QUICK = Settings(SHIPPED, 8, 6, 64, ((32, 4), (16, 4)), 2, 6, 2, ("red", "blue"), 2, 1, 5)


def trained(
    model: HookedLLaVA, rows: Sequence[StudyRow], settings: Settings, size: tuple[int, int], seed: int, folder: str
) -> tuple[SparseAutoencoder, StepRecord]:
    """An autoencoder, and the record of its last step."""
    records: list[StepRecord] = []
    buffer = max(settings.batch, min(2**15, 64 * settings.images))
    how: dict[str, Any] = {"tokens": "image", "epochs": None, "cache_dir": folder, "progress": False, "seed": seed}
    stream = activation_stream(model, HOOK, rows, batch_size=settings.batch, buffer=buffer, **how)
    options = {"steps": settings.steps, "lr": 2e-3, "dead_after": 200_000, "seed": seed, "progress": False}
    sae = train_sae(stream, *size, on_step=records.append, **options)  # type: ignore[arg-type]
    stream.close()
    return sae, records[-1]


def quality(model: HookedLLaVA, sae: SparseAutoencoder, rows: Sequence[StudyRow], test: Patches) -> Measured:
    """FVU on other images, and what the answers to other questions lose."""
    batches = [prepare_rows(model, rows[i : i + 16]) for i in range(0, len(rows), 16)]
    kept = loss_recovered(model, sae, batches, [row.answer for row in rows], tokens="image")
    return {"fvu": unexplained(sae, test.resid), "recovered": kept.recovered, **asdict(kept)}


def precisions(
    saes: Sequence[SparseAutoencoder], selection: Patches, test: Patches
) -> tuple[dict[str, list[list[float]]], np.ndarray]:
    """Average precision by label of every contestant, a row for each seed; and the first autoencoder's best features."""
    both = (selection, test)
    ours = [selected_precision(selection, test, [acts(sae, one.resid) for one in both]) for sae in saes]
    found = {OURS: [precision.tolist() for _, precision in ours]}
    size = saes[0].cfg
    others = contestants(selection, test, size.d_sae, size.k or 1, seed=100)
    for name, units in others.items():
        found[name] = [selected_precision(selection, test, units)[1].tolist()]
    for seed in range(101, 100 + len(saes)):
        again = random_dictionary(selection.resid.mean(0), size.d_sae, size.k or 1, seed)
        units = [acts(again, one.resid) for one in both]
        found[RANDOM].append(selected_precision(selection, test, units)[1].tolist())
    return found, ours[0][0]


def steering(
    model: HookedLLaVA,
    sae: SparseAutoencoder,
    best: np.ndarray,
    selection: Patches,
    examples: Sequence[Example],
    colors: Sequence[str] = COLOR_NAMES,
) -> Measured:
    """The probability of each color by strength of its best feature at the object's patches, beside the controls.

    The best features of the other colors are set to 0, at every strength, and in the random control too.
    """
    active = acts(sae, selection.resid)
    of_color = {color: int(best[LABELS.index(color)]) for color in COLOR_NAMES}
    found: Measured = {}
    for color in colors:
        feature = of_color[color]
        values = active[active[:, feature] > 0, feature]
        typical = float(np.percentile(values, _TYPICAL)) if len(values) else 1.0
        features = dict.fromkeys(of_color.values(), 0.0) | {feature: typical}
        curves = []
        for example in [one for one in examples if one.question.answer.lower() != color]:
            inputs = prepare_examples(model, [example])
            assert example.scene is not None
            asked = example.scene.find(example.question.objects[0])
            assert asked is not None
            at = list(inputs.token_map.mask_to_patches(asked.mask, coverage=COVERAGE))
            sweep = steering_sweep(model, inputs, features, STRENGTHS, answer=color.capitalize(), sae=sae, positions=at)
            curves.append(np.exp(sweep.log_probability.values))
        if curves:
            mean = np.mean(curves, axis=0)
            found[color] = {
                "feature": feature,
                "value": typical,
                "prompts": len(curves),
                **dict(zip(sweep.steered_by.values.tolist(), mean.tolist(), strict=True)),
            }
    return found


def attribution(model: HookedLLaVA, sae: SparseAutoencoder, examples: Sequence[Example], top: int) -> Measured:
    """Rank correlation of the gradient with exact attribution among the largest by gradient, and the passes of both."""
    correlations, costs, exact_costs = [], [], []
    for example in examples:
        inputs = prepare_examples(model, [example])
        answer = example.question.answer
        cheap = feature_attribution(model, sae, inputs, answer)
        exact = feature_attribution(model, sae, inputs, answer, method="exact", top=top)
        correlations.append(exact.rank_correlation)
        costs.append([cheap.n_forward, cheap.n_backward])
        exact_costs.append(exact.n_forward + exact.work + 2 * exact.n_backward)
    forward, backward = np.mean(costs, axis=0).tolist()
    return {
        "rank_correlation": bootstrap(correlations),
        "each": correlations,
        "n_forward": forward,
        "n_backward": backward,
        "forwards": forward + 2 * backward,
        "exact_forwards": float(np.mean(exact_costs)),
    }


def shipped(model: HookedLLaVA, asked: Sequence[StudyRow], test: Patches) -> Measured:
    """The same of the autoencoder that comes with the package."""
    sae = load_sae(SHIPPED)
    return {"dead": sae.cfg.training["dead"], "l0": sae.cfg.training["l0"], **quality(model, sae, asked, test)}


def measure(settings: Settings) -> Measured:
    """Everything, for one model."""
    begin = time.perf_counter()
    name = settings.model
    model = HookedLLaVA.from_pretrained(name)
    rows = feature_rows(settings.images, world=name)
    asked = feature_rows(settings.asked, seed=HELD_OUT_SEED, kinds=ANSWERED_KINDS, world=name)
    labelled = held_out("query_color", 2 * settings.labelled, world=name)
    selection, test = patches(model, labelled[: settings.labelled]), patches(model, labelled[settings.labelled :])
    saes: list[SparseAutoencoder] = []
    sizes: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in settings.sizes:
            for seed in range(settings.seeds if size == settings.sizes[0] else 1):
                sae, record = trained(model, rows, settings, size, seed, folder)
                row = {"dead": record.dead, "l0": record.l0, **quality(model, sae, asked, test)}
                sizes.setdefault(f"{size[0]}, {size[1]}", []).append(row)
                print(f"width {size[0]}, k {size[1]}, seed {seed}: {row['fvu']:.3f}", flush=True)
                saes += [sae] if size == settings.sizes[0] else []
    width, k = settings.sizes[0]
    by_chance = quality(model, random_dictionary(selection.resid.mean(0), width, k, 100), asked, test)
    precision, best = precisions(saes, selection, test)
    questions = held_out("query_color", settings.steered + settings.attributed, HELD_OUT_SEED, world=name)
    return {
        "sizes": sizes,
        "random": by_chance,
        "shipped": shipped(model, asked, test) if name == SHIPPED else None,
        "precision": precision,
        "steering": steering(model, saes[0], best, selection, questions[: settings.steered], settings.colors),
        "attribution": attribution(model, saes[0], questions[settings.steered :], settings.top),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def interval(values: Interval, digits: int = 3) -> str:
    """A mean with the ends of its interval."""
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return mean if low == high else f"{mean} ({low} to {high})"


def sizes_table(report: Measured) -> str:
    """FVU, dead share and what the answers keep, by width and k."""
    further = {} if report["shipped"] is None else {"in the package": [report["shipped"]]}
    further["random dictionary"] = [report["random"]]
    rows = {}
    for name, found in (report["sizes"] | further).items():
        columns = ("fvu", "recovered", "spliced", "answers_kept")
        fvu, *kept = (interval(bootstrap([one[key] for one in found])) for key in columns)
        dead = interval(bootstrap([one["dead"] for one in found])) if "dead" in found[0] else "-"
        rows[name] = [fvu, dead, *kept]
    first = report["random"]
    rows["mean of all activations"] = [
        "1",
        "-",
        "0",
        f"{first['mean_ablated']:.3f}",
        f"{first['answers_kept_mean']:.3f}",
    ]
    rows["nothing replaced"] = ["-", "-", "1", f"{first['clean']:.4f}", "1"]
    return markdown(["FVU", "dead", "recovered", "cross-entropy", "answers kept"], rows, "width, k")


def precision_table(report: Measured) -> str:
    """Mean average precision over labels, and for how many labels the features are better."""
    mean = {name: np.mean(rows, axis=0) for name, rows in report["precision"].items()}
    n_colors, rows = len(COLOR_NAMES), {}
    for name, values in mean.items():
        parts = (values[:n_colors], values[n_colors:])
        wins, less = "-", "-"
        if name != OURS:
            wins = f"{int((mean[OURS] > values).sum())} of {len(values)}"
            less = interval(bootstrap(mean[OURS] - values))
        rows[name] = [*(interval(bootstrap(part)) for part in parts), less, wins]
    ahead = np.all([mean[OURS] > values for name, values in mean.items() if name != OURS], axis=0)
    rows["all of these"] = ["-", "-", "-", f"{int(ahead.sum())} of {len(ahead)}"]
    return markdown(["colors", "shapes", "features are better by", "for so many labels"], rows, "average precision")


def is_clear(curves: Mapping[str, Any]) -> bool:
    """Whether the color reaches `CLEAR`, more with more strength up to there, and no control does."""
    steered = np.array(curves["steered"])
    reached = np.flatnonzero(steered >= CLEAR)
    if not len(reached) or bool((np.diff(steered[: reached[0] + 1]) < 0).any()):
        return False
    return all(max(curves[control]) < CLEAR for control in ("random_feature", "random_direction"))


def steering_table(report: Measured) -> str:
    """The probability of each color by strength."""
    columns = [*(f"strength {s:g}" for s in STRENGTHS), "random feature, at most", "random direction, at most", "clear"]
    rows = {}
    for color, curves in report["steering"].items():
        controls = [f"{max(curves[control]):.2f}" for control in ("random_feature", "random_direction")]
        rows[f"{color} (feature {curves['feature']})"] = [
            *(f"{p:.2f}" for p in curves["steered"]),
            *controls,
            "yes" if is_clear(curves) else "no",
        ]
    return markdown(columns, rows, "probability of")


def attribution_table(report: Measured) -> str:
    """Agreement of the two methods, and their cost in forward passes, a backward pass counted as two."""
    found = report["attribution"]
    row = [interval(found["rank_correlation"]), f"{found['forwards']:.1f}", f"{found['exact_forwards']:.1f}"]
    columns = ["rank correlation", "by gradient, in forwards", "exact, in forwards"]
    return markdown(columns, {f"{len(found['each'])} prompts": row}, "attribution")


def tables(report: Measured) -> list[str]:
    """All tables, in the order of the page."""
    return [made(report) for made in (sizes_table, precision_table, steering_table, attribution_table)]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=list(SETTINGS), default=SHIPPED, help=f"the model (default {SHIPPED})")
    options = start(parser, argv)
    settings = replace(QUICK, model=options.model) if options.quick else SETTINGS[options.model]
    report = measure(settings)
    print("\n\n".join(tables(report)))
    name = "sae" if options.model == SHIPPED else f"sae-{options.model}"
    write(name, options, settings=asdict(settings), hook=HOOK, model=options.model, labels=LABELS, **report)


if __name__ == "__main__":
    main()
