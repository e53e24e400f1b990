"""A safety net: record what everything computes, and compare two recordings, so that a change shows all that it changes.

    python -m benchmarks.baseline record FOLDER [--only NAME] [--quick]
    python -m benchmarks.baseline compare OLD NEW [--only NAME] [--numbers]

`record` runs every public analysis, edit, metric, generation, figure, page and command on the embedded checkpoints, the
models with a known mechanism, and random small ones (grouped-query, biases, several feature layers; two images and none;
padded on either side), with fixed seeds, in float64, float32 and some in bfloat16. A recording has two files for each
case, named GROUP/FUNCTION@MODEL-DTYPE: labelled arrays, and texts. Texts are also the order of hooks and results' axes,
counts of forward passes and work, exit codes, the names in written files, warnings, and errors: a case that fails is
recorded as what it raises. Not recorded are times, dates, versions and hashes of weights; the pixels of a page's figures
(what figures draw is recorded figure by figure); the fingerprint of a study whose images are in a folder, which has the
folder's path in it; and nearest words where most are equally near. The rest is the same in every run on one machine.
All of it takes some minutes on one core; `--quick` some seconds, for a first look.

`compare` prints what differs and exits with 1 if anything does: arrays by more than 1e-9 (float64), 1e-5 (float32) or
1e-2 (bfloat16) of their scale, texts as a diff, memory by more than a factor 1.3. `--numbers` leaves out texts. OLD and
NEW may also be two folders of benchmark results (benchmarks/results/*.json as they are committed, and others measured
with --out): then ratios are compared with how they scatter, and counts of runs and work exactly.

What changed since a commit:

    git worktree add ../before COMMIT && cd ../before
    python -m benchmarks.baseline record ../old
    cd - && python -m benchmarks.baseline record ../new && python -m benchmarks.baseline compare ../old ../new

(with PYTHONPATH=. where the package is installed from another folder). A commit that has no or fewer cases gets today's:
copy benchmarks/baseline.py and benchmarks/_baseline_*.py there. Everything that is imported from a module that may move is
in `_baseline_names.py`, which says what was elsewhere in version 0.1 (commit f8ca89f).

The small recording that tests compare with is made by `record tests/data/baseline --only golden/`; make it again when a
number or text in it is meant to change, and say so in the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: nothing is asked of the network
os.environ.setdefault(
    "TQDM_DISABLE", "1"
)  # bars appear after some seconds, so that what is printed depends on the clock

import torch
from transformers.utils import logging

from benchmarks._baseline_cases import CASES, Case, record
from benchmarks._baseline_compare import differences
from benchmarks._baseline_store import MANIFEST

GROUPS = ("model", "prompts", "analysis", "patching", "editing", "kinds", "golden", "files", "viz", "cli")


def cases(only: str = "", *, quick: bool = False) -> dict[str, Case]:
    """All cases by name, or those whose name contains `only`, or those of --quick."""
    for group in GROUPS:
        import_module(f"benchmarks._baseline_{group}")
    return {name: case for name, case in CASES.items() if only in name and (case.quick or not quick)}


def write(folder: Path, chosen: dict[str, Case], *, tell: bool = False) -> None:
    """Record these cases; a recording that is there keeps its others."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    manifest = folder / MANIFEST
    kept: list[str] = json.loads(manifest.read_text(encoding="utf-8"))["cases"] if manifest.is_file() else []
    for name, case in chosen.items():
        start = time.process_time()
        record(case).save(folder / name)
        if tell:
            print(f"{time.process_time() - start:7.2f} s  {name}", flush=True)
    listed = [name for name in kept if name not in chosen] + list(chosen)
    about = {"cases": sorted(listed), "torch": torch.__version__, "python": sys.version.split()[0]}
    manifest.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def show(found: Iterable[str]) -> int:
    """Print the differences; how many there are."""
    texts = list(found)
    print("\n".join([*texts, f"{len(texts)} differences" if texts else "no difference"]))
    return len(texts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every case and keep what it gives")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--quick", action="store_true", help="only some cases, in seconds")
    comparing = commands.add_parser("compare", help="print what differs; exit with 1 if anything does")
    comparing.add_argument("old", type=Path, metavar="OLD")
    comparing.add_argument("new", type=Path, metavar="NEW")
    comparing.add_argument("--numbers", action="store_true", help="leave out texts")
    for command in (recording, comparing):
        command.add_argument("--only", default="", metavar="NAME", help="only cases whose name contains this")
    options = parser.parse_args(argv)
    if options.command == "compare":
        found = differences(options.old, options.new, only=options.only, texts=not options.numbers)
        return int(show(found) > 0)
    chosen = cases(options.only, quick=options.quick)
    if not chosen:
        parser.error(f"no case contains {options.only!r}; they are: {', '.join(cases())}")
    write(options.folder, chosen, tell=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
