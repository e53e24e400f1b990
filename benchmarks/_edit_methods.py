"""The contestants of the editing benchmark, and what they are measured on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hooked_llava.editing import (
    ROME_RELEASED,
    Edit,
    EditRequest,
    KeptPrompts,
    KeyCovariance,
    Probe,
    TargetNotReached,
    evaluate_edit,
    finetune,
    keep_prompts,
    key_covariance,
    key_covariances,
    rome,
    summary,
)
from hooked_llava.editing.memit import SpreadValues, solve_spread
from hooked_llava.editing.solved import Solved, solve
from hooked_llava.editing.values import ValueSearch
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.edit_tables import THIS, EditCase, EditTable, ProbeRows
from hooked_llava.toy.evaluate import Example, usual_questions

# Chosen on the facts CHOSEN_ON of tiny-shapes (seed 1), asked with other images than the benchmark's.
LAYER = 3
SPREAD, SPREAD_CLAMP = (1, 2, 3), 0.75  # of MEMIT: its default clamp
LEARNING_RATE = {"one": 3e-3, "all": 1e-3}
MAX_CHANGE = 0.02
CHOSEN_ON = (3, 14, 27, 36, 41, 58, 62, 75, 80, 99)
RELEASED_CLAMP = 1e-4
LAMBDAS = (0.0, 0.01, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Bench:
    """One checkpoint with the table's questions kept in front of every layer."""

    model: HookedLLaVA
    table: EditTable
    pools: dict[str, KeptPrompts]

    @classmethod
    def of(cls, name: str, table: EditTable, cases: Sequence[int]) -> Bench:
        """The checkpoint, with only those questions run that the chosen cases ask."""
        model = HookedLLaVA.from_pretrained(name)
        table = _only(table, cases)
        layers = range(model.cfg.n_layers)
        pools = {
            "images": keep_prompts(model, prepared(model, table.images), layers),
            "words": keep_prompts(model, prepared(model, table.words), layers),
        }
        return cls(model, table, pools)

    def measure(self, case: int, edit: Edit) -> dict[str, Any]:
        """What an edit of a case did, as plain numbers."""
        began = time.perf_counter()
        probes = [self._probe(rows) for rows in self.table.cases[case].probes]
        result = evaluate_edit(self.model, edit, probes)
        return {
            "case": case,
            **{name: round(value, 5) for name, value in summary(result).items()},
            "probability": round(float(result.sel(probe="the edited question").probability), 5),
            "accuracy": dict(zip(result.probe.values.tolist(), result.accuracy.values.round(4).tolist(), strict=True)),
            "evaluation_seconds": round(time.perf_counter() - began, 4),
        }

    def request(self, case: int, *, n_images: int = 1, by_name: bool = False, constraint: bool = False) -> EditRequest:
        """The request for a case: asked about one image or two, and by name besides."""
        one = self.table.cases[case]
        examples = [*one.requests[:n_images], *([one.requests[-1]] if by_name else [])]
        return EditRequest(
            [e.question.text for e in examples],
            one.target,
            images=[None if e.scene is None else e.scene.render() for e in examples],
            constraint=THIS if constraint else None,
        )

    @cached_property
    def covariance(self) -> KeyCovariance:
        """Key covariance of the edited layer over text positions of held-out questions of many kinds."""
        batches = (prepared(self.model, batch) for batch in usual_questions())
        return key_covariance(self.model, batches, LAYER)

    def _probe(self, rows: ProbeRows) -> Probe:
        return Probe(rows.name, rows.role, self.pools[rows.pool][rows.rows], rows.expected)


def prepared(model: HookedLLaVA, examples: Sequence[Example]) -> Inputs:
    """Questions as the model takes them."""
    images = [None if e.scene is None else e.scene.render() for e in examples]
    return model.prepare([e.prompt for e in examples], images, template=None)


# ---------------------------------------------------------------------- contestants

Method = Callable[[Bench, Sequence[int]], Iterator[Edit]]
"""Edits of some cases, one for each."""


def search_of(bench: Bench, cases: Sequence[int], layer: int, position: str, **options: Any) -> Solved:
    """Keys and value differences of all cases in one batch."""
    asked = {name: options.pop(name) for name in ("n_images", "by_name") if name in options}
    requests = [bench.request(case, constraint=position == "constraint", **asked) for case in cases]
    with _misses_are_measured():
        return solve(bench.model, requests, layer, position, ValueSearch(**options))


def spread_search_of(bench: Bench, cases: Sequence[int], layers: Sequence[int], **options: Any) -> SpreadValues:
    """Value differences of all cases at the last of several layers, over two images and the name."""
    requests = [bench.request(case, n_images=2, by_name=True) for case in cases]
    batches = (prepared(bench.model, batch) for batch in usual_questions())
    with _misses_are_measured():
        covariance = key_covariances(bench.model, batches, layers)
        return solve_spread(
            bench.model, requests, covariance, "last", ValueSearch(**{"clamp": SPREAD_CLAMP, **options})
        )


@contextmanager
def _misses_are_measured() -> Iterator[None]:
    """The released clamp and layers that store nothing are compared on purpose: the tables say how far they get."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetNotReached)
        yield


def seconds_alone(method: Method, bench: Bench, case: int) -> float:
    """What a contestant takes for one case by itself: closed forms are searched for in one batch, fine-tuning is not."""
    began = time.perf_counter()
    next(method(bench, [case]))
    return round(time.perf_counter() - began, 4)


def _closed(name: str, layer: int = LAYER, position: str = "last", **options: Any) -> Method:
    """One edit for each case, from one search."""
    closing = {key: options.pop(key) for key in ("lam", "keys") if key in options}

    def edits(bench: Bench, cases: Sequence[int]) -> Iterator[Edit]:
        found = search_of(bench, cases, layer, position, **options)
        if name == "rome":
            closing.update(covariance=bench.covariance, lam=0.0)
        if name == "random key":
            found = replace(found, keys=replace(found.keys, keys=_random_like(found.keys.keys)))
        for i in range(len(cases)):
            yield found.edit(name, only=[i], **closing)

    return edits


def _tuned(layers: int | str, weights: str, lr: float, max_change: float | None = None) -> Method:
    def edits(bench: Bench, cases: Sequence[int]) -> Iterator[Edit]:
        options = {"layers": layers, "weights": weights, "lr": lr, "max_change": max_change}
        for case in cases:
            with _misses_are_measured():
                edit = finetune(bench.model, bench.request(case), **options)
            yield edit

    return edits


def _rome_released(position: str) -> Method:
    """One search for each case, over contexts that the model writes for its own question."""

    def edits(bench: Bench, cases: Sequence[int]) -> Iterator[Edit]:
        for case in cases:
            request = bench.request(case, constraint=True)
            with _misses_are_measured():
                edit = rome(bench.model, request, bench.covariance, position=position, **ROME_RELEASED)
            yield edit

    return edits


def _random_like(keys: torch.Tensor) -> torch.Tensor:
    """Random directions of the keys' lengths."""
    noise = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0)).to(keys)
    return noise / noise.norm(dim=-1, keepdim=True) * keys.norm(dim=-1, keepdim=True)


def methods() -> dict[str, Method]:
    """All contestants of the main table."""
    return {
        "MultEdit": _closed("multedit"),
        "MultEdit, key and value over 2 images and the name": _closed("multedit", n_images=2, by_name=True),
        "ROME, the same prompts": _closed("rome", n_images=2, by_name=True),
        "ROME": _closed("rome"),
        "ROME as released": _rome_released("last"),
        "ROME as released, at the constraint's last token": _rome_released("constraint"),
        "MultEdit at the constraint's last token": _closed("multedit", position="constraint"),
        "MultEdit, released clamp 1e-4": _closed("multedit", clamp=RELEASED_CLAMP),
        "MultEdit, random key": _closed("random key"),
    }


def baselines() -> dict[str, Method]:
    """Fine-tuning, which costs more."""
    one, every = LEARNING_RATE["one"], LEARNING_RATE["all"]
    return {
        "fine-tuning W_out of the layer": _tuned(LAYER, "W_out", one),
        f"the same, no number by more than {MAX_CHANGE}": _tuned(LAYER, "W_out", one, MAX_CHANGE),
        "fine-tuning all layers": _tuned("all", "all", every),
    }


def layer_sweep(n_layers: int) -> dict[str, Method]:
    """MultEdit at every layer and both positions; in the last layer a constraint's token does not reach the answer."""
    cells = [("last", layer) for layer in range(n_layers)] + [("constraint", layer) for layer in range(n_layers - 1)]
    return {f"{position} {layer}": _closed("multedit", layer, position) for position, layer in cells}


def lambda_sweep() -> dict[str, Method]:
    """MultEdit at every weight of the update's size."""
    return {f"lam {lam:g}": _closed("multedit", lam=lam) for lam in LAMBDAS}


def _only(table: EditTable, cases: Sequence[int]) -> EditTable:
    """The table with only the questions that some cases ask, rows counted anew."""
    chosen: dict[str, dict[int, int]] = {"images": {}, "words": {}}
    for case in cases:
        for probe in table.cases[case].probes:
            for row in probe.rows:
                chosen[probe.pool].setdefault(row, len(chosen[probe.pool]))
    kept = set(cases)
    renumbered = tuple(
        replace(case, probes=tuple(_renumbered(probe, chosen[probe.pool]) for probe in case.probes))
        if i in kept
        else case
        for i, case in enumerate(table.cases)
    )
    images = tuple(table.images[row] for row in chosen["images"])
    return EditTable(renumbered, images, tuple(table.words[row] for row in chosen["words"]))


def _renumbered(probe: ProbeRows, rows: dict[int, int]) -> ProbeRows:
    return replace(probe, rows=tuple(rows[row] for row in probe.rows))


def other_case(table: EditTable, case: int) -> EditCase:
    """A fact of the same relation about another shape, with another answer."""
    one = table.cases[case]
    return next(c for c in table.cases if c.relation == one.relation and c.answer != one.answer)
