"""What `make dist` builds: all of the package and nothing else, and it runs without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hooked_llava"
MAX_BYTES = 15_000_000
BESIDE = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The wheel and the sdist, built from a copy, so that the checkout gets no build folder."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests")
    for name in BESIDE:
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta as b; b.build_sdist('dist'), b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return copy / "dist"


def package_files() -> set[str]:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    folders = ("toy/checkpoint/", "toy/images/", "viz/templates/")
    assert all(any(name.startswith(f"hooked_llava/{folder}") for name in names) for folder in folders)
    assert wheel.stat().st_size < MAX_BYTES


def test_the_sdist_holds_the_package_and_what_builds_it(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert package_files() <= names
    assert set(BESIDE) <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "notebooks/"))]
    assert sdist.stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_the_installed_wheel_answers_without_a_checkout(dist: Path, tmp_path: Path):
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    where = [sys.executable, "-c", "import hooked_llava; print(hooked_llava.__file__)"]
    ask = [sys.executable, str(target / "bin" / "hooked-llava"), "ask", "demo", "What color is the star?"]
    found, answer = (
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for command in (where, ask)
    )
    assert Path(found.strip()).is_relative_to(target)
    assert "Orange" in answer
