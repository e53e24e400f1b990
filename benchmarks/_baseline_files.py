"""Cases of tables and studies over them, and of the files that are written and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors import safe_open

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_editing import request, shown
from benchmarks._baseline_names import (
    answers_match,
    boxes_lost,
    gqa_rows,
    image_path,
    load_result,
    save_result,
    write_gqa,
)
from benchmarks._baseline_subjects import EDITED, SOME, Subject, subject
from hooked_llava import HookedLLaVA, LLaVACache, analysis
from hooked_llava.datasets import by_kind, prepare_rows, read_gqa, read_vqa_constraints, study
from hooked_llava.editing import Edit, KeyCovariance, key_covariance, multedit

_CONSTRAINTS = """,question,main_entity,image_url
0,What is the name of this place?,this place,./val2014/a.jpg
1,Name the type of plant this is?,this plant,./val2014/b.jpg
2,Why would this cat do this?,this,./val2014/c.jpg
"""
_VOLATILE = ("seconds", "version", "weights", "transformers_version", "_name_or_path")


def written(path: Path) -> dict[str, Any]:
    """A safetensors file: names and shapes in their order, the numbers, and the words in its header."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        header = {name: _read_json(text) for name, text in sorted((file.metadata() or {}).items())}
    return {
        "shapes": [f"{n} {list(t.shape)} {t.dtype}" for n, t in tensors.items()],
        "tensors": tensors,
        "header": header,
    }


def _read_json(text: str) -> Any:
    try:
        return _steady(json.loads(text))
    except json.JSONDecodeError:
        return text


def _steady(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {name: _steady(item) for name, item in value.items() if name not in _VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- tables and studies


class Lengths:
    """An analysis that says how long each prompt is; it fails once it has been asked so often."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.fail_at = fail_at

    def __call__(self, inputs: Any, rows: Sequence[Any]) -> xr.DataArray:
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [row.id for row in rows]
        values = np.array([[len(m.real), 2.0 * len(m.real)] for m in inputs.token_maps])
        result = xr.DataArray(values, dims=("prompt", "layer"), name="length", attrs={"model": "m", "n_forward": 1})
        return result[0] if len(rows) == 1 else result


@once(quick=True, dtype="float32")
def tables() -> Made:
    rows = gqa_rows(2)
    write_gqa("gqa", 2)
    Path("okvqa.csv").write_text(_CONSTRAINTS, encoding="utf-8")
    constraints = read_vqa_constraints("okvqa.csv")
    model = subject("seed1-float32").model
    inputs = prepare_rows(model, rows, coverage=0.2)
    return {
        "rows": [[r.id, r.kind, r.question, r.answer, r.false_option, r.objects, r.boxes] for r in rows],
        "read": [[r.id, r.kind, r.question, r.answer, r.image, r.size] for r in read_gqa("gqa")],
        "limited": [r.id for r in read_gqa("gqa", kinds=["ChooseRel"], limit=1)],
        "files": {path.name: path.read_text(encoding="utf-8") for path in sorted(Path("gqa").glob("*.csv"))},
        "images": [np.asarray(r.image)[::8, ::8] for r in rows[:3]],
        "constraints": [[r.id, r.question, r.constraint] for r in constraints.rows],
        "unplaced": [[r.id, r.why] for r in constraints.unplaced],
        "spans": [{name: list(where) for name, where in m.spans.items()} for m in inputs.token_maps],
        "lost": boxes_lost(inputs, rows, 0.2),
        "match": [answers_match(*pair) for pair in ((" Red.", "red"), ("Redder", "red"), ("", ""))],
    }


@on(["seed1-float64", "seed1-float32"])
def studies(s: Subject) -> Made:
    rows = gqa_rows(2, kinds=["ChooseAttr", "QueryAttr", "CompareAttr"])
    flow = analysis.knockout_study(s.model, rows, ["image->last", "object->question"], 3, total=True, progress=False)
    return {
        "flow": flow,
        "by kind": by_kind(flow, n_boot=50),
        "wrong too": lambda: study(s.model, rows, Lengths(), only_correct=False, batch_size=4, progress=False),
        "asked": lambda: study(
            s.model, rows, lambda inputs, rows: analysis.head_scores(s.model, inputs), progress=False
        ),
    }


@on(["seed1-float32", "seed1-float64"])
def half_finished_study(s: Subject) -> Made:
    """Interrupted after two batches, and gone on with."""
    rows, out = gqa_rows(3, kinds=["ChooseAttr", "QueryAttr"]), Path("study.safetensors")
    with suppress(KeyboardInterrupt):
        study(s.model, rows, Lengths(fail_at=4), out=out, batch_size=2, progress=False)
    parts = {path.name: written(path) for path in sorted(Path("study.safetensors.parts").iterdir())}
    rest = Lengths()
    whole = study(s.model, rows, rest, out=out, batch_size=2, progress=False)
    other = lambda: study(s.model, rows[:2], Lengths(), out=out, progress=False)  # noqa: E731
    return {
        "parts": parts,
        "rest": rest.asked,
        "whole": whole,
        "file": written(out),
        "files": _listed("."),
        "other": other,
    }


def _listed(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


# ---------------------------------------------------------------------- files


@on(SOME, quick=["grouped-float64"])
def caches(s: Subject) -> Made:
    _, cache = s.model.run_with_cache(
        s.one, names_filter=["resid_post", "pattern", "vision.hook_out"], positions="last"
    )
    cache.save("cache.safetensors")
    again = LLaVACache.load("cache.safetensors", s.model)
    return {
        "file": written(Path("cache.safetensors")),
        "read": dict(again.items()),
        "other model": lambda: list(LLaVACache.load("cache.safetensors", subject("direct-float32").model)),
    }


@on(SOME, quick=["grouped-float64"])
def results(s: Subject) -> Made:
    found = {
        "lens": analysis.logit_lens(s.model, s.one),
        "trace": analysis.causal_trace(s.model, s.one, s.constraint, corruption=s.instead),
        "heads": analysis.head_scores(s.model, s.one),
    }
    for name, result in found.items():
        save_result(result, f"{name}.safetensors")
    same = {name: load_result(f"{name}.safetensors").equals(result) for name, result in found.items()}
    return {"files": {name: written(Path(f"{name}.safetensors")) for name in found}, "same": same}


@on(EDITED, quick=["grouped-float64"])
def edits(s: Subject) -> Made:
    model, layer = s.model, s.model.cfg.n_layers - 2
    multedit(model, request(s), layer=layer, position="last").save("edit.safetensors")
    covariance = key_covariance(model, [s.batch()], layer, path="keys.safetensors")
    return {
        "file": written(Path("edit.safetensors")),
        "read": shown(Edit.load("edit.safetensors", model)),
        "keys": written(Path("keys.safetensors")) if covariance.moment.numel() < 10_000 else None,
        "same": KeyCovariance.load("keys.safetensors", model).n_keys == covariance.n_keys,
        "other model": lambda: Edit.load("edit.safetensors", subject("seed0-float32").model),
    }


@on(["grouped-float32", "grouped-bfloat16", "direct-float32"], quick=["grouped-float32"])
def checkpoints(s: Subject) -> Made:
    """As saved, and loaded again in another precision."""
    s.model.save_pretrained("saved")
    s.model.save_pretrained("sharded", max_shard_size="100KB")
    again = HookedLLaVA.from_pretrained("saved")
    texts = {
        p.name: _read_json(p.read_text("utf-8")) for p in sorted(Path("saved").glob("*.json")) if "token" not in p.name
    }
    return {
        "files": _listed("."),
        "texts": texts,
        "weights": [f"{n} {list(p.shape)} {p.dtype}" for n, p in again.named_parameters()],
        "logits": again(again.prepare(s.question, s.images[0]))[0, -1],
        "double": HookedLLaVA.from_pretrained("sharded", dtype=subject("grouped-float64").model.cfg.dtype).W_E.sum(),
        "again": lambda: s.model.save_pretrained("saved"),
        "nowhere": lambda: HookedLLaVA.from_pretrained("nowhere"),
    }


@once(quick=True, dtype="float32")
def bundled() -> Made:
    """The images and the models that come with the package."""
    from PIL import Image

    names = ("demo", "one-shape", "two-shapes", "five-shapes", "demo-blue-star")
    return {name: np.asarray(Image.open(image_path(name)).convert("RGB"))[::8, ::8] for name in names}
