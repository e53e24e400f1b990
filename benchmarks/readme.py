"""Fills the executed and measured parts of README.md and docs/, so that no output and no number in them is typed by hand.

`python -m benchmarks.readme` runs every ```python block of every page again and writes its real output below it. It fills
the tables between `<!-- name:begin -->` and `<!-- name:end -->` from benchmarks/results. Names of pages limit it to these.
With `--accuracy` it also asks every embedded checkpoint its held-out questions (minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    analysis_costs,
    cache_memory,
    causal_trace,
    causal_trace_study,
    editing,
    feature_store,
    features,
    full_size,
    head_scores,
    information_flow,
    knockout,
    loading,
    memory_table,
    patch_importance,
    patching,
    quantized,
    sae,
    sae_stream,
    steering,
    tiles,
    top_heads,
    trace_table,
    tuned_lens,
)
from benchmarks._geometries import GEOMETRIES
from benchmarks._measure import BASELINE, BRIDGE, HF_EAGER, NNSIGHT, OURS, RESULTS, ratio_table
from benchmarks.hook_overhead import HF_OWN
from hooked_llava.errors import HookedLLaVAError

COLUMNS = (BASELINE, HF_OWN, HF_EAGER, OURS, BRIDGE, NNSIGHT)
Report = dict[str, Any]
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PART = re.compile(r"<!-- (\w+):begin -->")


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every Markdown page of docs/."""
    docs = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    return [README, *(path for path in [ROOT / "CONTRIBUTING.md"] if path.is_file()), *sorted(docs)]


def replaced(text: str, part: str, content: str) -> str:
    """The text with what stands between a part's markers exchanged."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def between(text: str, part: str) -> str:
    """What stands between a part's markers now."""
    return text.partition(f"<!-- {part}:begin -->")[2].partition(f"<!-- {part}:end -->")[0].strip()


def parts(text: str) -> list[str]:
    """Names of the parts that a page marks."""
    return _PART.findall(text)


def blocks(text: str) -> list[str]:
    """The ```python blocks of a page."""
    return _BLOCK.findall(text)


def executed(text: str) -> str:
    """A page with its ```python blocks run again, in order and in an empty folder: the same inputs with their true outputs.

    Errors and warnings of this library are printed in one line, as `ClassName: message`. Names carry over from block to block.
    """
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return _BLOCK.sub(lambda found: f"```python\n{_session(found[1], names)}\n```", text)


def _session(block: str, names: dict[str, Any]) -> str:
    lines = []
    for example in doctest.DocTestParser().get_examples(block):
        first, *more = example.source.rstrip().splitlines()
        lines += [
            f">>> {first}",
            *(f"... {line}" for line in more),
            *_printed(example.source, names).rstrip().splitlines(),
        ]
    return "\n".join(lines)


def _printed(source: str, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            exec(compile(source, "page", "single"), names)  # noqa: S102 (the page's own lines)
        except HookedLLaVAError as error:
            print(f"{type(error).__name__}: {error}")
    for warning in heard:
        if warning.category.__module__.startswith("hooked_llava"):
            print(f"{warning.category.__name__}: {warning.message}", file=printed)
    return printed.getvalue()


def ratios(report: Report) -> list[str]:
    """Ratios to Hugging Face's forward, one table for each geometry and batch."""
    tables = []
    for geometry, found in report["geometries"].items():
        batches = {f"{geometry}, batch {n}": batch["rows"] for n, batch in found.get("batches", {}).items()}
        for part, rows in (batches or {geometry: found["rows"]}).items():
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


def caches(report: Report) -> list[str]:
    """Memory of caches, one table for each geometry."""
    return [cache_memory.table(found, geometry) for geometry, found in report["geometries"].items()]


def streams(report: Report) -> list[str]:
    """What activations for autoencoders cost, and a step of training on them."""
    return [sae_stream.table(report)]


def steered(report: Report) -> list[str]:
    """What steered generation costs, and attribution to features."""
    return [table for geometry, found in report["geometries"].items() for table in steering.tables(found, geometry)]


def autoencoders(report: Report) -> list[str]:
    """What autoencoders of the embedded model explain, keep, find and steer."""
    return sae.tables(report)


def importance(report: Report) -> list[str]:
    """Patch maps against the truth, and signs of wrong answers."""
    checkpoints, against = report["checkpoints"], report["against_mean_attention"]
    asked = f"{report['images']} images x {len(checkpoints) - 1} checkpoints"
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


def lenses(report: Report) -> list[str]:
    """What lenses read in the embedded models, against what the models say."""
    return tuned_lens.tables(report["checkpoints"])


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
    "every_analysis": {
        "analysis_costs": lambda report: [analysis_costs.table(*one) for one in report["geometries"].items()]
    },
    "full_size": {f"full_size-{name}": full_size.tables for name in GEOMETRIES},
    "memory": {"memory_table": memory_table.tables},
    "quantized": {"quantized": quantized.tables},
    "streaming": {"sae_stream": streams},
    "steering": {"steering": steered},
    "stores": {"feature_store": lambda report: [feature_store.table(report)]},
    "loading": {f"loading-{size}": lambda report: [loading.table(report)] for size in (*loading.SIZES, *loading.REAL)},
    "caches": {"cache_memory": caches},
    "autoencoders": {"sae": autoencoders},
    "tiled_autoencoders": {"sae-tiny-shapes-next": autoencoders},
    "explaining": {"features": features.tables},
    "importance": {"patch_importance": importance, "top_heads": ablations},
    "tiles": {"tiles": tiles.tables},
    "apart": {"tiles": tiles.apart},
    "travelling": {"information_flow": flow},
    "lenses": {"tuned_lens": lenses},
    "tracing": {"causal_trace_study": traces},
    "traced_table": {"trace_table": lambda report: [trace_table.table(report["kinds"])]},
    "editing": {"editing": edits},
}
"""Parts of the pages -> the result files that they are made of, and how."""
WITHOUT_FILES: dict[str, Callable[[], str]] = {"full_size": full_size.marks}
"""What stands in a part as long as no result file is there."""


def measured(part: str) -> str:
    """The tables of a part, from the result files that are there."""
    tables = []
    for name, made in MEASURED[part].items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            tables += made(json.loads(path.read_text(encoding="utf-8")))
    return "\n\n".join(tables) if tables or part not in WITHOUT_FILES else WITHOUT_FILES[part]()


def accuracy() -> str:
    """Held-out accuracy of every embedded checkpoint."""
    from hooked_llava.toy.evaluate import embedded, evaluate_checkpoint
    from hooked_llava.toy.evaluate import markdown_table as accuracy_table

    return accuracy_table({folder.name: evaluate_checkpoint(folder) for folder in embedded()})


def filled(text: str, *, with_accuracy: bool = False) -> str:
    """A page with its blocks run again and its measured tables taken from the result files."""
    text = executed(text)
    for part in parts(text):
        if part in MEASURED:
            text = replaced(text, part, measured(part) or between(text, part))
        elif with_accuracy:
            text = replaced(text, part, accuracy())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="only these pages")
    parser.add_argument("--accuracy", action="store_true", help="also measure the embedded checkpoints again (minutes)")
    options = parser.parse_args()
    for page in options.pages or pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, with_accuracy=options.accuracy), encoding="utf-8")


if __name__ == "__main__":
    main()
