"""Fills the measured and generated parts of README.md, so that no figure in it is typed by hand.

`python -m benchmarks.readme` runs the session again, renders the hook table, and takes overhead figures from
benchmarks/results; with `--accuracy` it also asks every embedded checkpoint its held-out questions (minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from benchmarks import (
    causal_trace,
    causal_trace_study,
    editing,
    head_scores,
    information_flow,
    knockout,
    patch_importance,
    patching,
    top_heads,
)
from benchmarks._measure import BASELINE, BRIDGE, HF_EAGER, NNSIGHT, OURS, RESULTS, ratio_table
from benchmarks.hook_overhead import HF_OWN
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hook_specs import markdown_table
from hooked_llava.errors import HookedLLaVAError

SESSIONS = ("session", "replay", "patch", "heads", "flow", "edit")
COLUMNS = (BASELINE, HF_OWN, HF_EAGER, OURS, BRIDGE, NNSIGHT)
Report = dict[str, Any]
README = Path(__file__).parent.parent / "README.md"


def replaced(text: str, part: str, content: str) -> str:
    """The text with what stands between a part's markers exchanged."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def between(text: str, part: str) -> str:
    """What stands between a part's markers now."""
    return text.partition(f"<!-- {part}:begin -->")[2].partition(f"<!-- {part}:end -->")[0].strip()


def session(text: str, part: str = "session", names: dict[str, Any] | None = None) -> str:
    """A part of the README's session, run again: the same inputs with their true outputs; `names` carry over."""
    names = {} if names is None else names
    lines = []
    for example in doctest.DocTestParser().get_examples(between(text, part)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(example.source, "README", "single"), names)  # noqa: S102 (the README's own lines)
            except HookedLLaVAError as error:
                print(f"{type(error).__name__}: {error}")
        first, *more = example.source.rstrip().splitlines()
        lines += [f">>> {first}", *(f"... {line}" for line in more), *printed.getvalue().rstrip().splitlines()]
    return "```python\n" + "\n".join(lines) + "\n```"


def ratios(report: Report) -> list[str]:
    """Ratios to Hugging Face's forward, one table for each geometry and batch."""
    tables = []
    for geometry, found in report["geometries"].items():
        parts = {f"{geometry}, batch {n}": batch["rows"] for n, batch in found.get("batches", {}).items()}
        for part, rows in (parts or {geometry: found["rows"]}).items():
            columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
            tables.append(ratio_table(rows, columns, f"{report['benchmark'].replace('_', ' ')}, {part}"))
    return tables


def sweeps(report: Report) -> list[str]:
    """What sweeps cost, in forward passes, and how that grows."""
    tables = []
    for found in report["geometries"].values():
        tables.append(patching.table({row: found["rows"][row] for row in patching.ROWS if row in found["rows"]}))
        if "scaling" in found:
            tables.append(patching.scaling_table(found["scaling"]))
    return tables


def costs(report: Report) -> list[str]:
    """What an analysis costs, one table for each geometry."""
    table = {"head_scores": head_scores, "knockout": knockout, "causal_trace": causal_trace}[report["benchmark"]].table
    return [table(found["rows"], geometry) for geometry, found in report["geometries"].items()]


def importance(report: Report) -> list[str]:
    """Patch maps against the truth, and signs of wrong answers."""
    checkpoints, against = report["checkpoints"], report["against_mean_attention"]
    asked = f"{report['pictures']} pictures x {len(checkpoints) - 1} checkpoints"
    return [
        patch_importance.table(checkpoints["all"], asked),
        patch_importance.comparison_table({"all checkpoints": against["all"]}),
        patch_importance.signs_table(report["answer_signs"]),
    ]


def ablations(report: Report) -> list[str]:
    """What is lost when the best heads are taken away."""
    return [top_heads.table(report["checkpoints"])]


def flow(report: Report) -> list[str]:
    """Knockout in the embedded models."""
    return [information_flow.totals(report["checkpoints"]), information_flow.stages(report["checkpoints"])]


def traces(report: Report) -> list[str]:
    """Causal traces of the embedded models."""
    return [causal_trace_study.tables(report["checkpoints"])]


def edits(report: Report) -> list[str]:
    """What edits change: the contestants, layers, many edits, and whether the trace says where."""
    tables = editing.tables(report)
    return [tables[name] for name in ("methods", "layers", "sequence", "trace") if name in tables]


MEASURED: dict[str, dict[str, Callable[[Report], list[str]]]] = {
    "overhead": {"hook_overhead": ratios, "generation": ratios},
    "patching": {"patching": sweeps},
    "analyses": {"head_scores": costs, "knockout": costs, "causal_trace": costs},
    "importance": {"patch_importance": importance, "top_heads": ablations},
    "travelling": {"information_flow": flow},
    "tracing": {"causal_trace_study": traces},
    "editing": {"editing": edits},
}
"""Parts of the README -> the result files that they are made of, and how."""


def measured(part: str) -> str:
    """The tables of a part, from the result files that are there."""
    tables = []
    for name, made in MEASURED[part].items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            tables += made(json.loads(path.read_text(encoding="utf-8")))
    return "\n\n".join(tables)


def accuracy() -> str:
    """Held-out accuracy of every embedded checkpoint."""
    from hooked_llava.toy.evaluate import embedded, evaluate_checkpoint
    from hooked_llava.toy.evaluate import markdown_table as accuracy_table

    return accuracy_table({folder.name: evaluate_checkpoint(folder) for folder in embedded()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--accuracy", action="store_true", help="also measure the embedded checkpoints again (minutes)")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for part in SESSIONS:
        text = replaced(text, part, session(text, part, names))
    text = replaced(text, "hooks", markdown_table(LLaVAConfig.from_hf(LlavaConfig())))
    for part in MEASURED:
        text = replaced(text, part, measured(part) or between(text, part))
    if options.accuracy:
        text = replaced(text, "accuracy", accuracy())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
