"""Does an edit change the fact, its other wordings and images, and nothing else? `python -m benchmarks.editing`.

The hundred facts of the embedded world are edited one by one in every embedded checkpoint and asked again: the same
question, other images, the shape in other colors and at other places, other words, by name; other shapes, other
relations, colors, unrelated questions. Contestants are MultEdit and ROME, three kinds of fine-tuning, the released clamp,
and a random key. Besides: every layer, every lambda, many edits one after the other and together, and whether the causal
trace says which layer to edit. Settings were chosen on ten facts of one checkpoint with images that are not asked about
here. The result file is written after every part, and what it holds already is not measured again.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._edit_methods import (
    CHOSEN_ON,
    LAYER,
    SPREAD,
    Bench,
    Method,
    baselines,
    lambda_sweep,
    layer_sweep,
    methods,
    other_case,
    search_of,
    seconds_alone,
    spread_search_of,
)
from benchmarks._measure import arguments, markdown, result_path, start, write
from hooked_llava.analysis.causal_trace import LOWERED, causal_trace, was_lowered
from hooked_llava.editing import Edit, EditRequest, multedit, sequential_edits
from hooked_llava.experiments.corruptions import OtherImage
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.map_quality import rank_correlation
from hooked_llava.toy.edit_tables import THIS, edit_table

CHECKPOINTS = ("tiny-shapes-seed0", "tiny-shapes-seed1", "tiny-shapes-seed2")
SEQUENCE = (1, 2, 5, 10, 20, 50)
ASKED = ("other images", "other colors", "other places", "other words", "by name")
STAY = ("other shapes", "other shapes, by name", "other relations", "other relations, by name", "colors")
COLUMNS = ["efficacy", *ASKED, "specificity drop, points", "KL elsewhere", "s for one edit alone", "edits"]
TIMED = 3
"""Cases whose edit is made once more by itself, to be timed."""
Found = dict[str, Any]
Rows = list[dict[str, float]]


def run_methods(bench: Bench, found: Found, contestants: dict[str, Method], cases: Sequence[int], save: Any) -> None:
    """Every contestant's edits of the cases, measured; parts that are there already are left."""
    for name, method in contestants.items():
        if [row["case"] for row in found.get(name, [])] == list(cases):
            continue
        began = time.perf_counter()
        edits = method(bench, cases)
        rows = [bench.measure(case, edit) for case, edit in zip(cases, edits, strict=True)]
        for row in rows[:TIMED]:
            row["seconds_alone"] = seconds_alone(method, bench, row["case"])
        found[name] = rows
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
        save()


def run_sequence(bench: Bench, cases: Sequence[int], found: Found, save: Callable[[], None]) -> None:
    """Facts edited one after the other, and as many together; ways that are there already are left."""
    if len(cases) > len(found.get("cases", [])):
        found.clear()
        found["cases"] = list(cases)
    order = [int(i) for i in np.random.default_rng(0).permutation(cases)]
    at = [n for n in SEQUENCE if n <= len(order)]
    for way, run in SEQUENCE_WAYS.items():
        if way not in found:
            found[way] = run(bench, order[: at[-1]], at)
            print(f"  {way}: {found[way][-1]}", flush=True)
            save()


def one_by_one(bench: Bench, order: Sequence[int], at: Sequence[int]) -> Rows:
    """MultEdit, each edit computed on the model that the earlier ones left."""
    requests = [bench.request(case, n_images=2, by_name=True) for case in order]

    def make(model: HookedLLaVA, request: EditRequest) -> Edit:
        return multedit(model, request, layer=LAYER, position="last")

    def measure(n: int) -> dict[str, float]:
        return _held(bench, order[:n])

    after = sequential_edits(bench.model, requests, make, measure, at=at)
    return [{**{str(name): float(values.sel(n_edits=n)) for name, values in after.items()}, "n": n} for n in at]


def together(bench: Bench, order: Sequence[int], at: Sequence[int], **options: Any) -> Rows:
    """As many facts in one closed form of one layer."""
    search = search_of(bench, order, LAYER, "last", n_images=2, by_name=True)
    return [_under(bench, search.edit(only=range(n), **options), order[:n]) for n in at]


def rome_together(bench: Bench, order: Sequence[int], at: Sequence[int]) -> Rows:
    """The same, smallness measured by the key covariance."""
    return together(bench, order, at, name="rome", covariance=bench.covariance, lam=0.0)


def memit_together(bench: Bench, order: Sequence[int], at: Sequence[int], **options: Any) -> Rows:
    """As many facts, the change spread over several layers."""
    search = spread_search_of(bench, order, SPREAD, **options)
    return [_under(bench, search.edit(only=range(n)), order[:n]) for n in at]


SEQUENCE_WAYS: dict[str, Callable[[Bench, Sequence[int], Sequence[int]], Rows]] = {
    "one after the other": one_by_one,
    "together": together,
    "ROME, together": rome_together,
    "MEMIT, together": memit_together,
    "MEMIT with clamp 4, together": functools.partial(memit_together, clamp=4.0),
}
"""How many facts are edited: MultEdit unless said otherwise."""


def _under(bench: Bench, edit: Edit, edited: Sequence[int]) -> dict[str, float]:
    with edit.applied():
        return _held(bench, edited, min(edit.layers)) | {"n": len(edited)}


def _held(bench: Bench, edited: Sequence[int], layer: int = LAYER) -> dict[str, float]:
    """Under the edits that are active: how the edited facts are answered, and how far the other answers dropped."""
    facts = {(bench.table.cases[case].relation, bench.table.cases[case].shape) for case in edited}
    hits: dict[str, list[float]] = {"efficacy": [], "generalisation": []}
    stay: dict[str, dict[int, str]] = {"images": {}, "words": {}}
    for case in edited:
        for probe in bench.table.cases[case].probes:
            if probe.role in hits:
                prompts = bench.pools[probe.pool][probe.rows]
                hits[probe.role].append(_right(bench, prompts.logits(layer), probe.expected))
            elif probe.role == "specificity":
                examples = bench.table.images if probe.pool == "images" else bench.table.words
                asked = [(examples[row].question.relation, examples[row].question.objects[:1]) for row in probe.rows]
                kept = [(relation, shape[0]) not in facts for relation, shape in asked]
                stay[probe.pool] |= {r: e for r, e, k in zip(probe.rows, probe.expected, kept, strict=True) if k}
    before, after = [], []
    for pool, rows in stay.items():
        prompts, answers = bench.pools[pool][list(rows)], list(rows.values())
        before += [_right(bench, prompts.before, answers)] * len(rows)
        after += [_right(bench, prompts.logits(layer), answers)] * len(rows)
    means = {name: statistics.fmean(values) for name, values in hits.items()}
    return means | {"specificity_drop": 100 * (statistics.fmean(before) - statistics.fmean(after))}


def _right(bench: Bench, logits: Any, answers: Sequence[str]) -> float:
    ids = [bench.model.to_single_token(answer) for answer in answers]
    return float(np.mean(logits.argmax(-1).cpu().numpy() == np.array(ids)))


def run_trace(bench: Bench, cases: Sequence[int]) -> Found:
    """Mean indirect effect of every layer's MLP at both positions, the image exchanged for another shape's.

    Cases whose answer that does not lower have nothing to restore, and are left out.
    """
    effects: dict[str, list[list[float]]] = {"last": [], "constraint": []}
    drops = []
    for case in cases:
        trace, places = _trace(bench, case)
        drops.append(float(trace.lowered_by))
        if was_lowered(trace):
            for name, at in places.items():
                effects[name].append(trace.indirect_effect.sel(kind="mlp", position=at).values.tolist())
    left_out = [case for case, drop in zip(cases, drops, strict=True) if drop < LOWERED]
    means = {name: [round(float(x), 6) for x in np.mean(rows, axis=0)] for name, rows in effects.items() if rows}
    lowered = round(float(np.mean(drops)), 4)
    return {"cases": list(cases), "left_out": left_out, "lowered_by": lowered, "indirect_effect": means}


def _trace(bench: Bench, case: int) -> tuple[Any, dict[str, int]]:
    """A case's trace at the positions that are edited."""
    example, other = bench.table.cases[case].requests[0], other_case(bench.table, case).requests[0]
    assert example.scene is not None
    assert other.scene is not None
    inputs = bench.model.prepare(example.prompt, example.scene.render(), template=None)
    places = {"last": inputs.token_map["last"][-1], "constraint": inputs.token_map.find(THIS)[-1]}
    corruption = OtherImage(other.scene.render())
    options = {"kinds": ("mlp",), "positions": list(places.values())}
    return causal_trace(bench.model, inputs, THIS, corruption=corruption, **options), places


# ---------------------------------------------------------------------- tables


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95% interval over facts."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.fmean(values), 1.96 * spread / len(values) ** 0.5


def rows_of(results: Found, part: str, name: str, *, without: Sequence[int] = ()) -> list[dict[str, Any]]:
    """All checkpoints' edits by one contestant."""
    parts = [found.get(part, {}).get(name, []) for found in results.values()]
    return [row for rows in parts for row in rows if row["case"] not in without]


def method_table(results: Found, part: str, *, corner: str, without: Sequence[int] = ()) -> str:
    """Means with 95% intervals over facts and checkpoints, a row for each contestant."""
    names = list(dict.fromkeys(name for found in results.values() for name in found.get(part, {})))
    table = {}
    for name in names:
        rows = rows_of(results, part, name, without=without)
        if not rows:
            continue
        columns: list[list[float]] = [[row["efficacy"] for row in rows]]
        columns += [[row["accuracy"][asked] for row in rows] for asked in ASKED]
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_half(values)) for values in columns]
        drop, half = mean_and_half([row["specificity_drop"] for row in rows])
        cells.append(f"{round(drop, 1) + 0.0:.1f} ± {half:.1f}")  # no minus before a zero
        cells.append(f"{statistics.fmean(row['locality_kl'] for row in rows):.3f}")
        seconds = [row["seconds_alone"] for row in rows if "seconds_alone" in row]
        cells.append(f"{statistics.median(seconds):.3f}" if seconds else "-")
        table[name] = [*cells, str(len(rows))]
    return markdown(COLUMNS, table, corner)


def sequence_table(results: Found) -> str:
    """Means over checkpoints by number of edits, with the least and the most among them."""
    table = {}
    for way in SEQUENCE_WAYS:
        parts = [found["sequence"][way] for found in results.values() if way in found.get("sequence", {})]
        for n in dict.fromkeys(row["n"] for rows in parts for row in rows):
            same = [row for rows in parts for row in rows if row["n"] == n]
            names = ("efficacy", "generalisation", "specificity_drop")
            named = way if way[0].isupper() else f"MultEdit, {way}"
            table[f"{named}, {n}"] = [_with_range([row[name] for row in same]) for name in names]
    return markdown(["efficacy", "generalisation", "specificity drop, points"], table, "edits")


def _with_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def layer_cells(found: Found) -> list[dict[str, Any]]:
    """For each layer and position the trace's indirect effect and the edits' success."""
    cells = []
    for name, rows in found["layers"].items():
        position, layer = name.split()
        efficacy = statistics.fmean(row["efficacy"] for row in rows)
        general = statistics.fmean(row["generalisation"] for row in rows)
        specific = 1 - statistics.fmean(row["specificity_drop"] for row in rows) / 100
        score = 0.0 if min(efficacy, general, specific) <= 0 else 3 / (1 / efficacy + 1 / general + 1 / specific)
        effect = found["trace"]["indirect_effect"][position][int(layer)]
        cells.append({"position": position, "layer": int(layer), "indirect_effect": effect, "efficacy": efficacy}
                     | {"generalisation": general, "score": score})  # fmt: skip
    return cells


def correlations(results: Found) -> dict[str, dict[str, float | None]]:
    """Rank correlation of indirect effect and success, over the layers of each position and over all cells."""
    found: dict[str, dict[str, float | None]] = {}
    for checkpoint, parts in results.items():
        if "layers" not in parts or not parts.get("trace", {}).get("indirect_effect"):
            continue
        n, left_out = len(parts["trace"]["cases"]), len(parts["trace"]["left_out"])
        traced = f"{n - left_out} of {n} facts traced"
        cells = layer_cells(parts)
        for where in ("last", "constraint", "all"):
            chosen = [cell for cell in cells if where in (cell["position"], "all")]
            effect = [cell["indirect_effect"] for cell in chosen]
            name = f"{checkpoint}, {'all cells' if where == 'all' else f'position {where}'} ({traced})"
            found[name] = {
                success: _correlation(effect, [cell[success] for cell in chosen])
                for success in ("efficacy", "generalisation", "score")
            }
    return found


def correlation_table(found: dict[str, dict[str, float | None]]) -> str:
    """Spearman's rank correlations."""
    columns = ["efficacy", "generalisation", "score"]
    rows = {name: ["-" if row[c] is None else f"{row[c]:.2f}" for c in columns] for name, row in found.items()}
    return markdown(columns, rows, "trace's indirect effect against")


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None where one side does not vary."""
    found = rank_correlation(a, b)
    return None if np.isnan(found) else round(found, 4)


def tables(report: Found) -> dict[str, str]:
    """All tables of a result file."""
    results = report["checkpoints"]
    made = {
        "methods": method_table(results, "methods", corner=f"layer {LAYER}"),
        "unseen": method_table(
            {k: v for k, v in results.items() if k == "tiny-shapes-seed1"},
            "methods",
            corner="seed 1, facts that settings were not chosen on",
            without=CHOSEN_ON,
        ),
        "layers": method_table(results, "layers", corner="MultEdit by position and layer"),
        "lambda": method_table(results, "lambda", corner="MultEdit by lambda"),
        "sequence": sequence_table(results),
        "trace": correlation_table(correlations(results)),
    }
    return {name: table for name, table in made.items() if table.count("\n") > 1}


def spread(n: int, n_cases: int) -> list[int]:
    """n facts spread evenly over relations and shapes."""
    return sorted({int(i) * 37 % n_cases for i in np.arange(min(n, n_cases))})


def measure_checkpoint(name: str, found: Found, options: Any, save: Callable[[], None]) -> None:
    """All parts of one checkpoint."""
    table = edit_table()
    n = len(table.cases)
    cases, some, few = (spread(k, n) for k in (options.facts, options.baseline_facts, options.sweep_facts))
    began = time.perf_counter()
    bench = Bench.of(name, table, sorted({*cases, *some, *few}))
    print(f"{name}: {len(bench.pools['images'])} questions with an image, {len(bench.pools['words'])} without, "
          f"kept in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    run_methods(bench, found.setdefault("methods", {}), methods(), cases, save)
    run_methods(bench, found["methods"], baselines(), some, save)
    run_methods(bench, found.setdefault("layers", {}), layer_sweep(bench.model.cfg.n_layers), few, save)
    run_methods(bench, found.setdefault("lambda", {}), lambda_sweep(), few, save)
    if found.get("trace", {}).get("cases") != few:
        found["trace"] = run_trace(bench, few)
        save()
    run_sequence(bench, cases, found.setdefault("sequence", {}), save)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=1)
    parser.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), help="embedded models")
    parser.add_argument("--facts", type=int, default=100, help="facts that MultEdit and ROME edit (default 100)")
    parser.add_argument("--baseline-facts", type=int, default=40, help="facts that fine-tuning edits (default 40)")
    parser.add_argument("--sweep-facts", type=int, default=20, help="facts for layers, lambdas and trace (default 20)")
    options = start(parser, argv)
    if options.quick:
        options.facts, options.baseline_facts, options.sweep_facts = 2, 1, 1
        options.checkpoints = options.checkpoints[1:2] or options.checkpoints
    path: Path = result_path("editing", options)
    found: Found = json.loads(path.read_text(encoding="utf-8"))["checkpoints"] if path.is_file() else {}
    for name in options.checkpoints:
        measure_checkpoint(name, found.setdefault(name, {}), options, lambda: _write(options, found))
    _write(options, found)
    for table in tables({"checkpoints": found}).values():
        print(f"\n{table}")
    print(f"\nwritten to {path}")


def _write(options: Any, found: Found) -> None:
    write("editing", options, checkpoints=found, correlations=correlations(found), chosen_on=list(CHOSEN_ON))


if __name__ == "__main__":
    main()
