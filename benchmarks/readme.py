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
from pathlib import Path
from typing import Any

from benchmarks._measure import BASELINE, BRIDGE, HF_EAGER, NNSIGHT, OURS, RESULTS, ratio_table
from benchmarks.hook_overhead import HF_OWN
from hooked_llava.errors import HookedLLaVAError
from hooked_llava.hook_names import markdown_table

SESSIONS = ("session", "replay")
COLUMNS = (BASELINE, HF_OWN, HF_EAGER, OURS, BRIDGE, NNSIGHT)
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


def overhead() -> str:
    """Tables of the result files: hook overhead and generation, one for each geometry."""
    tables = []
    for name in ("hook_overhead", "generation"):
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        for geometry, measured in json.loads(path.read_text(encoding="utf-8"))["geometries"].items():
            parts = {f"{geometry}, batch {n}": batch["rows"] for n, batch in measured.get("batches", {}).items()}
            for part, rows in (parts or {geometry: measured["rows"]}).items():
                columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
                tables.append(ratio_table(rows, columns, f"{name.replace('_', ' ')}, {part}"))
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
    text = replaced(text, "hooks", markdown_table())
    if tables := overhead():
        text = replaced(text, "overhead", tables)
    if options.accuracy:
        text = replaced(text, "accuracy", accuracy())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
