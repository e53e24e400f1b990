"""What is read from which grid, and which maps find it? `python -m benchmarks.tiles` (about four hours).

Held-out images of `tiny-shapes-next`, whose objects are known: accuracy of every kind of question as it is, with the base
grid blanked and with the tiles blanked. Then, of questions that are answered right: patch maps of every method, read from
the base grid, the tiles and both together in pixels of the image, against the object that is the answer and against the one
that the question only passes through; the same under a question about another object; deletion and insertion; attention
knockout of the grids and of the passed-through object; one tile's pixels taken from an image in which the answer's object
is another; and activation patching between these two images, by layer.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks._maps import METHODS, RANDOM, SINGLE_PATCHES, Asked, answers, batches
from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import activation_patching, attention_knockout, deletion_curves, patch_importance
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.arrays import recovered
from hooked_llava.results.map_quality import bootstrap, roc_auc
from hooked_llava.toy.evaluate import EVALUATED, Example, held_out, prepare_examples
from hooked_llava.toy.objects import COLOR_NAMES, SHAPES, SceneObject
from hooked_llava.toy.scenes import Scene, recolor, replace_object
from hooked_llava.toy.wide_model import layout_of

NAME = "tiny-shapes-next"
KINDS = ("query_color", "query_small", "query_beside", "query_same")
READINGS = {"base": "base", "tiles": "fine", "together": "all"}
EDGES = ("base->last", "fine->last", "base->question", "fine->question", "fine-newlines->question", "passed->question",
         "passed->last", "seen->question", "seen->last")  # fmt: skip
SHARES = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_EVERY = 2  # pixels of which one is ranked, along both axes
_COSTLY = ("occlusion", "token ablation")

Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Case(Asked):
    """A question and its objects: the one that is the answer, and the one that is named if that is another."""

    answer: SceneObject
    passed: SceneObject | None


def cases(kind: str, n: int) -> list[Case]:
    """The first held-out questions of a kind whose answer is one object."""
    found = []
    for example in held_out(kind, n, world=NAME):
        assert example.scene is not None
        (seen,) = example.question.answer_boxes
        answer = next(o for o in example.scene.objects if o.box == seen)
        named = example.scene.find(example.question.objects[0])
        found.append(Case(example, answer, None if named is answer else named))
    return found


def answered(model: HookedLLaVA, some: Sequence[Case]) -> list[Case]:
    """Those that the model answers as they should be."""
    found = []
    for batch in batches(some):
        said = answers(model, prepare_examples(model, [case.example for case in batch]))
        found += [case for case, answer in zip(batch, said, strict=True) if answer == case.example.question.answer]
    return found


def blanked(inputs: Inputs, grid: str) -> Inputs:
    """The same prompts with every pixel of a grid in the processor's mean color."""
    assert inputs.pixel_values is not None
    pixels = inputs.pixel_values.clone()
    for tiles in inputs.tiles:
        first, stop = (tiles.start, tiles.start + 1) if grid == "base" else (tiles.start + 1, tiles.stop)
        pixels[first:stop] = 0.0
    return replace(inputs, pixel_values=pixels)


def accuracy(model: HookedLLaVA, n: int) -> dict[str, dict[str, float]]:
    """Share of right answers by kind: as it is, without the base grid, without the tiles; and of the commonest answer."""
    found: dict[str, dict[str, float]] = {}
    for kind in tqdm(EVALUATED[NAME], desc="accuracy", leave=False):
        right = defaultdict[str, list[bool]](list)
        examples = held_out(kind, n, world=NAME)
        for batch in batches(examples):
            images = [None if e.scene is None else e.scene.render() for e in batch]
            inputs = model.prepare([e.prompt for e in batch], images, template=None)  # some begin the answer
            shown = {"as it is": inputs}
            if inputs.pixel_values is not None:
                shown |= {"base blanked": blanked(inputs, "base"), "tiles blanked": blanked(inputs, "fine")}
            for name, own in shown.items():
                right[name] += [a == e.question.answer for a, e in zip(answers(model, own), batch, strict=True)]
        truth = [e.question.answer for e in examples]
        commonest = max(truth.count(answer) for answer in set(truth)) / n
        found[kind] = {name: float(np.mean(values)) for name, values in right.items()} | {"commonest": commonest}
    return found


def guesses(n: int) -> dict[str, float]:
    """How often the color (or shape) of any object of the image would be right."""
    by_kind = {}
    for kind in KINDS:
        shares = [
            np.mean([answer_of(kind, o) == answer_of(kind, c.answer) for o in c.scene.objects]) for c in cases(kind, n)
        ]
        by_kind[kind] = float(np.mean(shares))
    return by_kind


def answer_of(kind: str, one: SceneObject) -> str:
    """The answer where it is this object that is asked about."""
    return (one.shape if kind == "query_same" else one.color).capitalize()


def maps(model: HookedLLaVA, kind: str, some: Sequence[Case], costly: int) -> Measured:
    """AUC in pixels of every method, reading and target, one number for each image."""
    found: Measured = {name: defaultdict(list) for name in (*METHODS, RANDOM)}
    for i, case in enumerate(tqdm(some, desc=kind, leave=False)):
        inputs = prepare_examples(model, [case.example])
        layout = inputs.token_maps[0].layout(0)
        for name in found:
            if name.startswith(_COSTLY) and (i >= costly or SINGLE_PATCHES in name):
                continue
            values = map_values(model, inputs, name, seed=i)
            for reading, grid in READINGS.items():
                drawn = layout.draw(values, grid)
                for target, one in (("answer", case.answer), ("passed through", case.passed)):
                    if one is not None:
                        found[name][f"{reading}, {target}"].append(pixel_auc(drawn, one.mask))
            if i < costly and (other := about_another(case)) is not None:
                drawn = layout.draw(map_values(model, prepare_examples(model, [other]), name, seed=i))
                found[name]["together, asked about another"].append(pixel_auc(drawn, case.answer.mask))
    return found


def about_another(case: Case) -> Example | None:
    """The same question about another object that questions can name, or None."""
    named = case.example.question.objects[0]
    others = [o.shape for o in case.scene.named if o.shape != named and o is not case.answer]
    if not others:
        return None
    text = case.example.question.text.replace(named, others[0])
    return replace(case.example, question=replace(case.example.question, text=text))


def map_values(model: HookedLLaVA, inputs: Inputs, name: str, *, seed: int) -> np.ndarray:
    """One map by feature; newlines, and what a method does not measure, are NaN."""
    layout = inputs.token_maps[0].layout(0)
    values = np.full(layout.n_features, np.nan)
    cells = layout.object_features()
    if name == RANDOM:
        values[cells] = np.random.default_rng(seed).random(len(cells))
    else:
        values[cells] = patch_importance(model, inputs, **METHODS[name]).values.reshape(-1)[cells]
    return values


def pixel_auc(drawn: np.ndarray, mask: np.ndarray) -> float:
    """Chance that a pixel of the object scores higher than another one that the map covers."""
    scores, covered = (a[::_EVERY, ::_EVERY].reshape(1, -1) for a in (drawn, mask))
    return float(roc_auc(np.nan_to_num(scores), covered, among=~np.isnan(scores))[0])


def curves(model: HookedLLaVA, some: Sequence[Case]) -> Measured:
    """Area under deletion and insertion curves of every cheap method, one number for each image."""
    found: Measured = {}
    for i, case in enumerate(tqdm(some, desc="deletion and insertion", leave=False)):
        inputs = prepare_examples(model, [case.example])
        names = [name for name in (*METHODS, RANDOM) if not name.startswith(_COSTLY)]
        own = {name: map_values(model, inputs, name, seed=i) for name in names}
        area = deletion_curves(model, inputs, own, shares=SHARES).area
        for name in names:
            for way in ("deletion", "insertion"):
                found.setdefault(name, defaultdict(list))[way].append(area.sel(direction=way, map=name).item())
    return found


def knockout(model: HookedLLaVA, some: Sequence[Case]) -> Measured:
    """Change of P(answer) in percent, and whether it is kept, where an edge is blocked in all layers."""
    found: Measured = defaultdict(lambda: defaultdict(list))
    for case in tqdm(some, desc="knockout", leave=False):
        inputs = prepare_examples(model, [case.example])
        passed = case.passed or case.answer
        inputs = inputs.with_boxes(seen=[case.answer.box], passed=[passed.box])
        edges = [e for e in EDGES if case.passed is not None or "passed" not in e]
        result = attention_knockout(model, inputs, edges, window="all")
        for edge in edges:
            found[edge]["effect"].append(result.effect.sel(edge=edge).item())
            found[edge]["kept"].append(float(result.answer_kept.sel(edge=edge).all()))
    return found


def with_another_answer(case: Case) -> tuple[Scene, str] | None:
    """The image with the answer's object in another color, or as another shape, and the answer then."""
    one, scene, kind = case.answer, case.scene, case.example.question.kind
    if one not in scene.unique:
        return None
    if kind != "query_same":
        new = COLOR_NAMES[(COLOR_NAMES.index(one.color) + 3) % len(COLOR_NAMES)]
        return recolor(scene, one.shape, new), new.capitalize()
    absent = [shape for shape in SHAPES if scene.find(shape) is None]
    return (replace_object(scene, one.shape, absent[0]), absent[0].capitalize()) if absent else None


def tile_patching(model: HookedLLaVA, some: Sequence[Case]) -> Measured:
    """Which tiles carry the answer: each is taken from the image in which it is another.

    `follows`: the answer becomes the new one. Tiles are told apart by whether they show the object.
    """
    found: Measured = defaultdict(lambda: defaultdict(list))
    for case in tqdm(some, desc="tile patching", leave=False):
        if (changed := with_another_answer(case)) is None:
            continue
        scene, new = changed
        clean, other = (prepare_examples(model, [replace(case.example, scene=s)]) for s in (case.scene, scene))
        assert clean.pixel_values is not None
        assert other.pixel_values is not None
        kinds = tiles_of(case)
        mixed = []
        for tile in range(len(kinds)):
            pixels = clean.pixel_values.clone()
            pixels[tile] = other.pixel_values[tile]
            mixed.append(replace(clean, pixel_values=pixels))
        for kind, inputs in zip([*kinds, "all"], [*mixed, other], strict=True):
            found[kind]["follows"].append(float(answers(model, inputs)[0] == new))
    return found


def deciding_layers(model: HookedLLaVA, some: Sequence[Case]) -> Measured:
    """Where the answer is carried at each layer: the residual stream of one place taken back from the image as it is.

    Shares of the logit difference of the two answers, in the run with the other image, that come back.
    """
    found: Measured = defaultdict(lambda: defaultdict(list))
    for case in tqdm(some, desc="layers", leave=False):
        if (changed := with_another_answer(case)) is None:
            continue
        boxes: dict[str, Any] = {"seen": [case.answer.box]}
        boxes |= {} if case.passed is None else {"passed": [case.passed.box]}
        clean, other = (
            prepare_examples(model, [replace(case.example, scene=s)]).with_boxes(**boxes)
            for s in (case.scene, changed[0])
        )
        if answers(model, clean) == answers(model, other):
            continue
        places = [*boxes, "image", "question", "last"]
        shares = recovered(activation_patching(model, clean, other, hook="resid_pre", positions=places))
        for layer in shares["layer"].values.tolist():
            for place, share in zip(places, shares.sel(layer=layer).values.tolist(), strict=True):
                found[f"layer {layer}"][place].append(share)
    return found


def tiles_of(case: Case) -> list[str]:
    """Of the base tile and each fine one: what it is to the object."""
    footprint = layout_of(case.scene.size).patch_footprint(case.answer.box)
    shown = footprint.max(axis=(1, 2)).tolist()
    return ["base", *("a tile that shows the object" if share > 0 else "another tile" for share in shown[1:])]


def intervals(measured: Measured) -> dict[str, dict[str, list[float]]]:
    """Means with 95 % intervals over images, and how many there are."""
    return {
        name: {key: [*(round(x, 4) for x in bootstrap(values)), len(values)] for key, values in row.items() if values}
        for name, row in measured.items()
        if any(row.values())
    }


def table(found: dict[str, dict[str, list[float]]], corner: str) -> str:
    """Means with half of their interval's width."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    cells = {
        name: [f"{row[c][0]:.3f} ± {(row[c][2] - row[c][1]) / 2:.3f}" if c in row else "-" for c in columns]
        for name, row in found.items()
    }
    return markdown(columns, cells, corner)


def accuracy_table(found: dict[str, dict[str, float]]) -> str:
    columns = ["commonest", "as it is", "base blanked", "tiles blanked"]
    cells = {k: [f"{row[c]:.3f}" if c in row else "-" for c in columns] for k, row in found.items()}
    return markdown(["always the commonest answer", *columns[1:]], cells, "question")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repetitions=1)
    parser.add_argument("--n", type=int, default=300, help="images for each kind of question (default 300)")
    parser.add_argument("--costly", type=int, help="images for what takes many passes (default: all)")
    parser.add_argument("--checkpoint", default=NAME, help="name or folder")
    options = start(parser, argv)
    if options.quick:
        options.n, options.costly = 1, 0
    options.costly = options.n if options.costly is None else options.costly
    return options


def tables(report: dict[str, Any]) -> list[str]:
    """The tables of a page from what was measured."""
    kinds = [kind for kind in KINDS if kind in report]
    made = [accuracy_table(report["accuracy"])]
    made += [table(found, f"{kind}: {part}") for kind in kinds for part, found in report[kind].items()]
    return made


def apart(report: dict[str, Any]) -> list[str]:
    """How well each method's map finds the object that is the answer, and the one that is only passed through."""
    columns = {
        f"{kind}, {target}": (kind, f"together, {target}")
        for kind in KINDS
        for target in ("answer", "passed through")
        if any(f"together, {target}" in row for row in report.get(kind, {}).get("patch maps", {}).values())
    }
    methods = report[KINDS[0]]["patch maps"]
    found = {m: {name: report[k]["patch maps"][m][key] for name, (k, key) in columns.items()} for m in methods}
    return [table(found, "AUC in pixels, base grid and tiles together")]


def main(argv: Sequence[str] | None = None) -> None:
    options = options_of(argv)
    model = HookedLLaVA.from_pretrained(options.checkpoint)
    report: dict[str, Any] = {"accuracy": accuracy(model, max(1, options.n // 2)), "guesses": guesses(options.n)}
    for kind in KINDS[:1] if options.quick else KINDS:
        some = answered(model, cases(kind, options.n))
        few = some[: max(1, options.costly)]
        report[kind] = {
            "patch maps": intervals(maps(model, kind, some, options.costly)),
            "deletion and insertion": intervals(curves(model, few)),
            "knockout": intervals(knockout(model, some)),
            "tiles of another image": intervals(tile_patching(model, few)),
            "patched by layer": intervals(deciding_layers(model, few)),
        }
        path = write("tiles", options, n=options.n, costly=options.costly, **report)  # what is done is not lost
    print("\n\n".join(tables(report)))
    print(path)


if __name__ == "__main__":
    main()
