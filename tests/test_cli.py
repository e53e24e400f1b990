from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.config.expand import read_attr

import hooked_llava
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


@pytest.mark.parametrize("module", ["hooked_llava", "hooked_llava.cli"])
def test_python_m_runs_the_same_command(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True, text=True)
    assert f"python -m {module} [OPTIONS]" in done.stdout
    assert "Ask a LLaVA model about an image" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", module, "explian"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "explian" in wrong.stderr


def test_the_package_knows_its_version():
    root = Path(__file__).parent.parent
    settings = configparser.ConfigParser()
    settings.read(root / "setup.cfg")
    assert settings["metadata"]["version"] == "attr: hooked_llava.__version__"
    assert read_attr("hooked_llava.__version__", root_dir=root) == hooked_llava.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", hooked_llava.__version__)
