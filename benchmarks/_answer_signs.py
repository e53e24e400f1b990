"""Can one see that the answer is made up? Signs of wrong answers on questions where wrong answers are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from benchmarks._maps import answers, batches
from hooked_llava.analysis import answer_signs, patch_importance, predict_wrong
from hooked_llava.analysis.answer_signs import SIGNS
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.map_quality import auroc, bootstrap
from hooked_llava.toy.evaluate import Example, held_out
from hooked_llava.toy.objects import SHAPES
from hooked_llava.toy.scenes import Scene

Asked = list[tuple[Example, bool | None]]
"""Questions, and for each whether its answer is wrong; None where that is what the model says."""
FEWEST = 5
"""Wrong answers from which on an AUROC is given."""
_SEED = 7
NOISE = 90.0


def absent(n: int, kind: str = "query_color") -> Asked:
    """Half the questions as they are, half about a shape that is not in the image: whatever is answered is made up."""
    rng = np.random.default_rng(_SEED)
    found: Asked = []
    for i, example in enumerate(held_out(kind, n)):
        assert example.scene is not None
        if i % 2 == 0:
            found.append((example, False))
            continue
        there = {o.shape for o in example.scene.objects}
        missing = [shape for shape in SHAPES if shape not in there]
        text = example.question.text.replace(example.question.objects[0], missing[int(rng.integers(len(missing)))])
        found.append((replace(example, question=replace(example.question, text=text)), True))
    return found


def noisy(n: int, kind: str, sigma: float = NOISE) -> Asked:
    """Held-out questions with noise on the images, so that some answers are wrong."""
    rng = np.random.default_rng(_SEED)
    found: Asked = []
    for example in held_out(kind, n):
        assert example.scene is not None
        pixels = example.scene.pixels + rng.normal(0, sigma, example.scene.pixels.shape)
        scene = Scene(example.scene.objects, np.clip(pixels, 0, 255).astype(np.uint8))
        found.append((replace(example, scene=scene), None))
    return found


CASES: dict[str, Callable[[int], Asked]] = {
    "color of an absent object (half of the questions)": absent,
    '"is there a ...", wrong colors and absent shapes': lambda n: [(e, None) for e in held_out("exist", n)],
    '"is there a ...", noisy images': lambda n: noisy(n, "exist"),
    "color, noisy images": lambda n: noisy(n, "query_color"),
    "relations of two objects": lambda n: [(e, None) for e in held_out("choose_rel", n)],
}


def measure(model: HookedLLaVA, n: int) -> dict[str, Any]:
    """For each case the AUROC of every sign with its interval, and how many answers were wrong."""
    found = {}
    for name, make in CASES.items():
        asked = make(n)
        signs: list[xr.Dataset] = []
        wrong: list[bool] = []
        for batch in batches(asked):
            examples = [example for example, _ in batch]
            images = [e.scene.render() for e in examples if e.scene is not None]
            inputs = model.prepare([e.prompt for e in examples], images=images, template=None)
            covered = np.stack([e.scene.patch_coverage.max(0) for e in examples if e.scene is not None])
            signs.append(answer_signs(model, inputs, patch_importance(model, inputs), covered))
            said = answers(model, inputs)
            for (example, known), answer in zip(batch, said, strict=True):
                wrong.append(answer != example.question.answer if known is None else known)
        found[name] = summary(xr.concat(signs, "prompt"), np.array(wrong))
    return found


def summary(signs: xr.Dataset, wrong: np.ndarray) -> dict[str, Any]:
    """AUROC of every sign with its bootstrap interval; none where too few answers are wrong."""
    row: dict[str, Any] = {"n": len(wrong), "wrong": int(wrong.sum())}
    if row["wrong"] < FEWEST or row["n"] - row["wrong"] < FEWEST:
        return row
    values = predict_wrong(signs, wrong)
    for sign in values.sign.values.tolist():
        pairs = np.stack([SIGNS[sign] * signs[sign].values, wrong], 1)
        value, low, high = bootstrap(pairs, lambda rows: auroc(rows[:, 0], rows[:, 1] > 0), n=500)
        row[sign] = [round(value, 4), round(low, 4), round(high, 4)]
    return row
