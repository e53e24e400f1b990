"""The register of cases: small functions that compute something and return it, to be recorded."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from benchmarks._baseline_store import Record
from benchmarks._baseline_subjects import Subject, subject

Made = Mapping[str, Any]
"""Values by name; a function without arguments stands for what it returns, or the exception that it raises."""
CASES: dict[str, Case] = {}
"""By name, GROUP/FUNCTION or GROUP/FUNCTION@SUBJECT."""


@dataclass(frozen=True)
class Case:
    """One function, on one subject where it has one."""

    run: Callable[[], Made]
    dtype: str
    quick: bool


def once(*, quick: bool = False, dtype: str = "float64") -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a function without arguments; `dtype` says in what precision it computes."""

    def register(function: Callable[[], Made]) -> Callable[[], Made]:
        CASES[_name(function)] = Case(function, dtype, quick)
        return function

    return register


def on(
    subjects: Iterable[str], *, quick: Iterable[str] = ()
) -> Callable[[Callable[[Subject], Made]], Callable[[Subject], Made]]:
    """Register a function of a `Subject` for each of these names; some of them also for --quick."""

    def register(function: Callable[[Subject], Made]) -> Callable[[Subject], Made]:
        for name in subjects:
            case = Case(lambda name=name: function(subject(name)), name.rpartition("-")[2], name in quick)
            CASES[f"{_name(function)}@{name}"] = case
        return function

    return register


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('_baseline_')[2]}/{function.__name__}"


def record(case: Case) -> Record:
    """Run one case in an empty folder of its own with fixed seeds; an exception becomes part of what is recorded."""
    made = Record(case.dtype)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _value_of(case.run)
        for name, value in ({"exception": found} if isinstance(found, str) else found).items():
            made.add(name, _evaluated(value))
    made.add("warnings", [f"{w.category.__name__}: {w.message}" for w in said if _ours(w)])
    return made


def _value_of(function: Callable[[], Any]) -> Any:
    """What a function returns, called with fixed seeds, or what it raises in words."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (whatever draws from the global state)
    torch.manual_seed(0)
    try:
        return function()
    except Exception as error:  # noqa: BLE001 (that it fails is what this version does)
        return f"{type(error).__name__}: {error}".replace(os.path.realpath("."), "FOLDER")


def _evaluated(value: Any) -> Any:
    """The value with every function in it called, however deep."""
    if isinstance(value, dict):
        return {name: _evaluated(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_evaluated(item) for item in value]
    return _value_of(value) if isinstance(value, (FunctionType, partial)) else value


def _ours(warning: warnings.WarningMessage) -> bool:
    """Said by the library, not by what it is built on."""
    return "hooked_llava" in warning.category.__module__ or "hooked_llava" in Path(warning.filename).parts
