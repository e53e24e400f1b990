"""Cases of the command line: what every command says, its exit code, and the files that it leaves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from benchmarks._baseline_cases import Made, once
from benchmarks._baseline_names import app, load_result, write_gqa
from benchmarks._baseline_subjects import subject

_QUESTION = "What color is the star?"
_FACT = "Who made this shape?"


def _run(*arguments: str) -> dict[str, Any]:
    """One command as a user runs it, in this folder, and the pages that it writes."""
    before = set(Path().iterdir())
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    new = sorted(set(Path().iterdir()) - before)
    pages = {path.name: path.read_text(encoding="utf-8") for path in new if path.suffix == ".html"}
    for path in new:
        if path.is_file():
            path.unlink()
    said = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    return {
        "code": done.exit_code,
        "out": done.stdout,
        "err": done.stderr,
        "exception": said,
        "files": [path.name for path in new],
        "pages": pages,
    }


def _runs(commands: dict[str, tuple[str, ...]]) -> Made:
    return {name: lambda arguments=arguments: _run(*arguments) for name, arguments in commands.items()}


@once(quick=True, dtype="float32")
def help_texts() -> Made:
    commands = ("ask", "explain", "patch", "knockout", "trace", "edit", "verify")
    return _runs({"help": ("--help",), "nothing": (), **{name: (name, "--help") for name in commands}})


@once(dtype="float32")
def ask() -> Made:
    return _runs(
        {
            "demo": ("ask", "demo", _QUESTION),
            "text": ("ask", "Who made the star?", "--top", "3"),
            "other model": ("ask", "demo", _QUESTION, "-m", "tiny-shapes-seed0", "--max-new-tokens", "2"),
            "template": ("ask", "demo", _QUESTION, "--template", "plain"),
            "coarse": ("ask", "demo", _QUESTION, "--dtype", "bfloat16", "--top", "2"),
        }
    )


@once(dtype="float32")
def verify() -> Made:
    """The activations that are compared; the differences themselves are rounding."""
    done = _run("verify")
    return {
        "code": done["code"],
        "first words": [line.split()[:1] for line in done["out"].splitlines()],
        "err": done["err"],
    }


@once(dtype="float32")
def explain() -> Made:
    words = ("--answer", "Orange", "--versus", "Blue")
    return _runs(
        {
            "demo": ("explain", "demo", _QUESTION, "-o", "a.html"),
            "words": ("explain", "Who made the star?", "--answer", "Clara", "--versus", "Boris", "-o", "a.html"),
            "fast": ("explain", "demo", _QUESTION, *words, "--patches", "attention", "--no-occlusion", "-o", "a.html"),
        }
    )


@once(dtype="float32")
def patch() -> Made:
    pair = ("patch", "demo", "demo-blue-star", _QUESTION, "-o", "a.html")
    return _runs(
        {
            "denoise": (*pair, "--max-runs", "100"),
            "noise": (*pair, "--direction", "noise", "--max-runs", "0"),
            "same": ("patch", "demo", "demo", _QUESTION, "-o", "a.html"),
        }
    )


@once(dtype="float32")
def knockout() -> Made:
    folder = str(write_gqa("gqa", 1, kinds=["ChooseAttr", "QueryAttr"]))
    table = ("knockout", "--dataset", folder, "--images", folder, "-o", "a.html", "--results", "kept.safetensors")
    found = _runs(
        {
            "demo": ("knockout", "demo", _QUESTION, "--box", "20,40,36,55", "-o", "a.html"),
            "edges": ("knockout", "demo", _QUESTION, "--edge", "question->last", "--window", "1", "-o", "a.html"),
            "metric": ("knockout", "demo", _QUESTION, "--metric", "log_probability", "-o", "a.html"),
            "table": table,
        }
    )
    return {**found, "result": partial(_kept, table)}


def _kept(table: tuple[str, ...]) -> Any:
    CliRunner().invoke(app, [*table[:-1], "again.safetensors", "--all", "--edge", "image->last"])
    found = load_result("again.safetensors")
    found.attrs.pop("fingerprint")  # has the images' folder in it, which is another in every run
    return found


@once(dtype="float32")
def trace() -> Made:
    start = ("trace", "one-shape", _FACT, "--constraint", "this shape", "-o", "a.html")
    return _runs(
        {
            "noise": start,
            "replaced": (*start, "--replace", "the ring"),
            "repeated": (*start, "--replace", "the", "--repeat", "--window", "2"),
            "mean": (*start, "--corruption", "mean", "--max-new-tokens", "1"),
        }
    )


@once(dtype="float32")
def edit() -> Made:
    start = ("edit", "one-shape", _FACT, "-t", "Boris", "-o", "a.html")
    constraint = ("-c", "this shape", "--replace", "the ring")
    asked = (
        "--reword",
        "By whom was this shape made?",
        "--ask",
        "What shape is this?",
        "--ask-text",
        "Who made the star?",
    )
    return _runs(
        {
            "default": (*start, "--save", "edit.safetensors"),
            "asked": (*start, *constraint, *asked),
            "sweep": (*start, *constraint, "--ask", "What shape is this?", "--sweep"),
            "auto": (*start, *constraint, "--ask", "What shape is this?", "--layer", "auto"),
            "rome": (*start, "--method", "rome", "--ask", "What shape is this?"),
            "keep": (*start, "--keep", "What shape is this?", "--lam", "0.1", "--clamp", "2"),
        }
    )


@once(quick=True, dtype="float32")
def refused() -> Made:
    subject("grouped-float32").model.save_pretrained("saved")
    here = ("-m", "saved", "-o", "a.html")
    return _runs(
        {
            "no image": ("ask", "dmo", _QUESTION),
            "no model": ("ask", "demo", _QUESTION, "-m", "nowhere"),
            "no option": ("ask", "demo", _QUESTION, "--nothing"),
            "no template": ("ask", "demo", _QUESTION, "--template", "nothing"),
            "no command": ("nothing",),
            "no edge": ("knockout", "demo", _QUESTION, "--edge", "last->image", *here),
            "no constraint": ("trace", "demo", _QUESTION, *here),
            "not there": ("trace", "demo", _QUESTION, "-c", "square", *here),
            "no target": ("edit", "demo", _QUESTION, *here),
            "no layer": ("edit", "demo", _QUESTION, "-t", "red", "--layer", "last", *here),
            "no token": ("explain", "demo", _QUESTION, "--answer", "zzz", *here),
            "no folder": ("explain", "demo", _QUESTION, "-m", "saved", "-o", "no/a.html"),
            "no box": ("knockout", "demo", _QUESTION, "--box", "1,2,3", *here),
        }
    )
