"""Where facts come back on the embedded models, over many questions: `python -m benchmarks.causal_trace_study`.

For every checkpoint: traces of held-out fact questions asked by image ("this shape") and by name ("the star"), under
four corruptions; mean indirect effect by kind, layer and role with 95% intervals, over the questions whose answer the
corruption lowers; agreement between corruptions and between checkpoints; how the messages from the image lie beside
the trace; and attention contributions as predictors of wrong answers, beside confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import attention_contribution, best_effects, error_auroc, trace_means, trace_study
from hooked_llava.datasets.rows import StudyRow, prepare_rows
from hooked_llava.experiments.corruptions import Corruption, MeanEmbedding, Noise, Replace
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape
from hooked_llava.toy.evaluate import embedded, held_out

KINDS = {"by image": "Known", "by name": "OK-VQA"}
Corrupting = Callable[[StudyRow], Corruption]
CORRUPTIONS: dict[str, Corrupting] = {
    "another shape's name": lambda row: Replace(other_shape(row)),
    "noise": lambda row: Noise(seed=len(row.question)),
    "mean embedding": lambda row: MeanEmbedding(),
    "one word everywhere": lambda row: Replace("Paris", repeat=True),
}
"""How the constraint is corrupted; the last is what the released code does."""
WINDOWS = {
    "1": (1, "centered"),
    "3": (3, "centered"),
    "1 as released": (1, "released"),
    "3 as released": (3, "released"),
}
BEST = ("best MLP", "best attention", "best residual stream")
_BATCH, _RIGHT_FOR_EACH, _MOST_RIGHT = 32, 10, 300

Measured = dict[str, Any]


def summary(model: HookedLLaVA, rows: Sequence[StudyRow], corrupt: Corrupting, **options: Any) -> Measured:
    """Mean effects with intervals over the questions that are answered correctly; only counts where nothing is lowered."""
    study = trace_study(model, rows, corruption=corrupt, progress=False, **options)
    drops = [round(drop, 4) for drop in study.lowered_by.values.tolist()]
    means = trace_means(study).isel(kind=0)
    counts = {"traced": len(drops), "left_out": len(drops) - int(means.n_lowered), "lowered_by": drops}
    counts["lowered"] = np.round(means.lowered.values, 4).tolist()
    if not int(means.n_lowered):
        return counts
    best = best_effects(means)
    return {
        **counts,
        "work_per_trace": study.work / len(drops),
        "roles": means.role.values.tolist(),
        "n": means.n_counted.values.tolist(),
        "kinds": means.output.values.tolist(),
        **{name: np.round(values.values, 4).tolist() for name, values in _named(means).items()},
        "best": {output: best_cell(best.sel(output=output)) for output in best.output.values.tolist()},
    }


def best_cell(cell: xr.Dataset) -> Measured:
    """A largest mean effect in plain values."""
    numbers = {name: round(float(value), 4) for name, value in _named(cell).items()}
    return {"layer": int(cell.layer), "role": str(cell.role.values), **numbers}


def _named(means: xr.Dataset) -> dict[str, xr.DataArray]:
    """Mean effects and the ends of their intervals, by the names that they have in the report."""
    ends = {"indirect_effect": "mean", "low": "low", "high": "high"}
    return {name: means.indirect_effect.sel(statistic=end) for name, end in ends.items()}


def agreement(first: Measured, second: Measured) -> float | None:
    """Correlation of two tables of mean effects, over kinds, layers and the roles that both have."""
    if "roles" not in first or "roles" not in second:
        return None
    roles = [role for role in first["roles"] if role in second["roles"]]
    one, other = (
        np.array(table["indirect_effect"])[..., [table["roles"].index(role) for role in roles]].ravel()
        for table in (first, second)
    )
    return round(float(np.corrcoef(one, other)[0, 1]), 3)


def messages(model: HookedLLaVA, rows: Sequence[StudyRow]) -> Measured:
    """Norm of what goes from the image to the constraint, by layer, and its shares on the object and the last row."""
    norms, on_object, last_row, object_share = [], [], [], []
    for row in rows:
        inputs = prepare_rows(model, [row], coverage=0.2)
        found = attention_contribution(model, inputs, row.constraint).image_to_constraint.values[:, 0]
        patches = inputs.token_map.patches().tolist()
        inside = np.isin(patches, list(inputs.token_map["object"])).reshape(found.shape[1:])
        total = found.sum((1, 2))
        norms.append(total)
        on_object.append(found[:, inside].sum(1) / total)
        last_row.append(found[:, -1].sum(1) / total)
        object_share.append(inside.mean())
    means = {"norm": norms, "share_on_object": on_object, "share_of_last_row": last_row}
    uniform = {"uniform_share_on_object": float(np.mean(object_share)), "uniform_share_of_last_row": 1 / found.shape[1]}
    return {name: np.round(np.mean(values, 0), 4).tolist() for name, values in means.items()} | uniform


def errors(model: HookedLLaVA, n: int, kind: str = "choose_rel") -> Measured:
    """AUROC of confidence and of contributions for wrong answers, with bootstrap intervals."""
    examples = held_out(kind, n, seed=4_000_037)
    right: list[bool] = []
    for start_at in range(0, n, _BATCH):
        batch = examples[start_at : start_at + _BATCH]
        prompts = model.prepare(
            [e.question.text for e in batch], [e.scene.render() for e in batch if e.scene is not None]
        )
        said = model(prompts)[torch.arange(len(batch)), prompts.last].argmax(-1).tolist()
        right += [token == model.to_single_token(e.question.answer) for token, e in zip(said, batch, strict=True)]
    wrong = [i for i, ok in enumerate(right) if not ok]
    kept = [i for i, ok in enumerate(right) if ok][: max(_MOST_RIGHT, _RIGHT_FOR_EACH * len(wrong))]
    scores: dict[str, list[float]] = {}
    for i in [*wrong, *kept]:
        for name, value in _scores(model, examples[i]).items():
            scores.setdefault(name, []).append(value)
    answers = {"kind": kind, "asked": n, "wrong": len(wrong), "right_measured": len(kept)}
    if not wrong:
        return answers
    correct = np.array([False] * len(wrong) + [True] * len(kept))
    return answers | {"auroc": {name: _interval(np.array(values), correct) for name, values in scores.items()}}


def _scores(model: HookedLLaVA, example: Any) -> dict[str, float]:
    question = example.question
    inputs = model.prepare(question.text, example.scene.render())
    found = attention_contribution(model, inputs, list(question.objects))
    to_last = found.constraint_to_last.max("source").values
    to_constraint = found.image_to_constraint.sum(("image", "patch_row", "patch_col")).values
    middle = [len(to_last) // 2 - 1, len(to_last) // 2]
    named = {f"constraint to last, layer {i}": float(value) for i, value in enumerate(to_last)}
    named |= {f"image to constraint, layer {i}": float(value) for i, value in enumerate(to_constraint)}
    return {"confidence": found.confidence, "constraint to last, middle layers": float(to_last[middle].mean()), **named}


def _interval(scores: np.ndarray, correct: np.ndarray, n_boot: int = 200) -> list[float]:
    """AUROC, and the 2.5% and 97.5% quantiles over resampled answers of either kind."""
    rng = np.random.default_rng(0)
    right, wrong = np.flatnonzero(correct), np.flatnonzero(~correct)
    drawn = []
    for _ in range(n_boot):
        chosen = np.concatenate([rng.choice(right, len(right)), rng.choice(wrong, len(wrong))])
        drawn.append(error_auroc(scores[chosen], correct[chosen]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [round(error_auroc(scores, correct), 3), round(float(low), 3), round(float(high), 3)]


def study(model: HookedLLaVA, n: int, n_asked: int) -> Measured:
    """Everything about one checkpoint."""
    result: Measured = {}
    for label, kind in KINDS.items():
        rows = constraint_rows(n, kinds=[kind])
        by_corruption = {name: summary(model, rows, corrupt) for name, corrupt in CORRUPTIONS.items()}
        first = next(iter(CORRUPTIONS))
        windows = {
            name: summary(model, rows, CORRUPTIONS[first], window=width, window_reading=reading)
            for name, (width, reading) in WINDOWS.items()
            if width > 1
        }
        result[label] = {
            "corruptions": by_corruption,
            "windows": windows,
            "agreement": {name: agreement(by_corruption[first], of) for name, of in by_corruption.items()},
        }
        if kind == KINDS["by image"]:  # asked by name, the shape need not be in the image
            result[label]["messages"] = messages(model, rows)
    result["errors"] = errors(model, n_asked)
    return result


def tables(measured: dict[str, Measured]) -> str:
    """Best cells by corruption, and predictors of wrong answers."""
    cells: dict[str, list[str]] = {}
    for checkpoint, found in measured.items():
        for label in KINDS:
            for name, of in found[label]["corruptions"].items():
                agrees = found[label]["agreement"][name]
                cells[f"{checkpoint}, {label}, {name}"] = [
                    lowered_words(of),
                    *(cell_words(of["best"][kind]) if "best" in of else "-" for kind in ("mlp", "attn", "resid")),
                    "-" if agrees is None else f"{agrees:.2f}",
                ]
    columns = ["lowered", *BEST, "agrees with the first"]
    predictors = {
        f"{checkpoint}, {name}": [f"{a:.2f} ({low:.2f} to {high:.2f})"]
        for checkpoint, found in measured.items()
        for name, (a, low, high) in found["errors"].get("auroc", {}).items()
        if name in ("confidence", "constraint to last, middle layers")
    }
    return f"{markdown(columns, cells, 'trace')}\n\n{markdown(['AUROC'], predictors, 'wrong answers')}"


def lowered_words(of: Measured) -> str:
    """How many answers are lowered, and the interval of their share."""
    count = f"{of['traced'] - of['left_out']} of {of['traced']}"
    return f"{count} ({of['lowered'][1]:.0%} to {of['lowered'][2]:.0%})" if "lowered" in of else count


def cell_words(best: Measured) -> str:
    """A largest mean effect with its interval, if it has one, and its place."""
    if best["indirect_effect"] != best["indirect_effect"]:
        return "-"
    interval = f" ({best['low']:.2f} to {best['high']:.2f})" if best["low"] == best["low"] else ""
    return f"{best['indirect_effect']:.2f}{interval} layer {best['layer']}, {best['role']}"


def between_checkpoints(measured: dict[str, Measured]) -> dict[str, float | None]:
    """Agreement of the mean effects of each checkpoint with those of the first."""
    first, *others = measured
    name = next(iter(CORRUPTIONS))
    return {
        f"{first} and {other}, {label}": agreement(*(measured[c][label]["corruptions"][name] for c in (first, other)))
        for other in others
        for label in KINDS
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=100, help="questions of each kind and corruption (default 100)")
    parser.add_argument("--asked", type=int, default=800, help="questions among which wrong answers are sought")
    parser.add_argument("--checkpoints", nargs="+", default=[folder.name for folder in embedded()])
    options = start(parser, argv)
    if options.quick:
        options.n, options.asked, options.checkpoints = 1, 16, options.checkpoints[:1]
    measured: dict[str, Measured] = {}
    for checkpoint in options.checkpoints:
        measured[checkpoint] = study(HookedLLaVA.from_pretrained(f"tiny-shapes-{checkpoint}"), options.n, options.asked)
    print(f"\n{tables(measured)}")
    checkpoints = between_checkpoints(measured)
    path = write("causal_trace_study", options, n=options.n, checkpoints=measured, agreement_of_checkpoints=checkpoints)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
