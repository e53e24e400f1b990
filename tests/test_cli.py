from __future__ import annotations

import subprocess
import sys

from tests.cli.running import run


def test_help_has_examples_and_every_option():
    assert "hooked-llava ask demo" in run("--help").stdout
    explained = run("explain", "--help").stdout
    for option in (
        "--output",
        "--model",
        "--no-image",
        "--versus",
        "--template",
        "--max-new-tokens",
        "--device",
        "--dtype",
    ):
        assert option in explained
    assert "hooked-llava explain demo" in explained


def test_help_loads_nothing_that_draws():
    heavy = ("matplotlib", "xarray", "hooked_llava.viz")
    code = f"import sys, hooked_llava.cli; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_python_m_runs_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "hooked_llava.cli", "--help"], check=True, capture_output=True, text=True
    )
    assert "Ask a LLaVA model about a picture" in done.stdout
