"""What the benchmarks share: their options, alternating timing, tables, result files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: nothing is asked of the network

import torch
from transformers.utils import logging

from benchmarks._models import POSITIONS
from hooked_llava.storage import written_whole

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
BASELINE = "HF sdpa"
HF_EAGER, OURS, BRIDGE, NNSIGHT = "HF eager", "hooked_llava", "TransformerLens bridge", "nnsight"
_READABLE = 2**19  # characters up to which a result file is laid out for reading
_PACKAGES = ("torch", "transformers", "transformer-lens", "safetensors", "nnsight")

Work = Callable[[], object]
Summary = dict[str, Any]


def arguments(
    doc: str | None,
    *,
    repetitions: int = 9,
    geometries: Sequence[str] = ("medium",),
    choices: Iterable[str] = POSITIONS,
) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: checks that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--repetitions", type=int, default=repetitions, help=f"default {repetitions}")
    parser.add_argument(
        "--geometry", nargs="+", choices=[*choices], default=list(geometries), help="sizes of the model"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/NAME.json)")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options; with --quick fewer repetitions, and the smallest geometry in place of another of `POSITIONS`."""
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    if options.quick:
        options.repetitions = min(options.repetitions, 2)
        options.geometry = ["quick"] if set(options.geometry) <= set(POSITIONS) else options.geometry
    return options


def alternate(works: Mapping[str, Work], repetitions: int, *, at_least: float = 0.1) -> dict[str, list[float]]:
    """Seconds per call, one number a repetition; in each repetition every contestant runs, in a turning order.

    A repetition is so many calls that the slowest contestant takes `at_least` seconds: short calls are timed well too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():  # warm-up
        work()
    first = max(_time(work, 1) for work in works.values())
    calls = max(1, round(at_least / first))
    names = list(works)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        order = names[turn:] + names[:turn]
        for name in order if repetition % 2 == 0 else reversed(order):
            gc.collect()  # nobody pays for another's cycles
            seconds[name].append(_time(works[name], calls))
    return seconds


def _time(work: Work, calls: int) -> float:
    _finish()
    start = time.perf_counter()
    for _ in range(calls):
        result = work()
    _finish()
    elapsed = time.perf_counter() - start
    del result
    return elapsed / calls


def _finish() -> None:
    """Wait for the accelerator, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summarise(seconds: Mapping[str, Sequence[float]], baseline: str = BASELINE) -> dict[str, Summary]:
    """Medians and interquartile ranges of seconds, and of the ratio to the baseline of the same repetition."""
    summaries = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[baseline], strict=True)]
        summaries[name] = {
            "median_s": statistics.median(values),
            "iqr_s": quartiles(values),
            "ratio": statistics.median(ratios),
            "ratio_iqr": quartiles(ratios),
            "repetitions": len(values),
        }
    return summaries


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def reset_peak(device: torch.device = CPU) -> None:
    """Give freed memory back to the system and count the peak from what remains; on a CPU Linux only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device = CPU) -> int:
    """The most bytes of tensors on a GPU since the last reset; on a CPU this process's highest resident memory, mapped
    pages of files included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def in_fresh_process(script: str, threads: int, *worker: str) -> dict[str, Any]:
    """What `python -m benchmarks.SCRIPT --worker ...` prints as JSON on its last line."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--threads", str(threads), "--worker", *worker]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]], corner: str) -> str:
    """A Markdown table; a stroke within a cell, as in "image->question|rest", does not end it."""
    table = [[corner, *columns], *([name, *cells] for name, cells in rows.items())]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])


def ratio_table(rows: Mapping[str, Mapping[str, Summary]], columns: Sequence[str], corner: str) -> str:
    """Ratios to the baseline, whose seconds stand in brackets."""
    cells = {row: [f"{of[name]['ratio']:.2f}" if name in of else "-" for name in columns] for row, of in rows.items()}
    for row, of in rows.items():
        cells[row][columns.index(BASELINE)] += f" ({of[BASELINE]['median_s']:.3g} s)"
    return markdown(columns, cells, corner)


def result_path(name: str, options: argparse.Namespace) -> Path:
    """Where a benchmark's result goes."""
    return options.out or RESULTS / (f"{name}.quick.json" if options.quick else f"{name}.json")


def write(name: str, options: argparse.Namespace, **measured: Any) -> Path:
    """The result file, whole or not at all."""
    path = result_path(name, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    report = {
        "benchmark": name,
        "quick": options.quick,
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in _PACKAGES if package in installed},
        "repetitions": options.repetitions,
        **measured,
    }
    text = json.dumps(report, indent=2)
    if len(text) > _READABLE:
        text = json.dumps(report)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return path
