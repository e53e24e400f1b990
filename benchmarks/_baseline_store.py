"""What a recording holds: of every case labelled arrays, texts and loosely compared numbers, in two files each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from benchmarks._baseline_figures import drawn
from benchmarks._baseline_names import written_whole

MANIFEST = "recording.json"
_VOLATILE_ATTRS = {"seconds", "version", "weights"}
"""The last is a hash: of random and of compiled weights another machine may get another."""
_IMAGE = re.compile(r"data:image/(\w+)[^\"')]*")
_VOLATILE = (
    (re.compile(r"\b\d+(\.\d+)? ?(s|seconds)\b"), "N s"),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
    (re.compile(r"\b\d{4}-\d\d-\d\d with [^<\n]*"), "DATE with VERSIONS"),
)


@dataclass(frozen=True)
class Loose:
    """A number that is compared by its order of magnitude only, such as memory."""

    value: float


@dataclass
class Record:
    """What one case gave."""

    dtype: str = "float64"
    """Precision of the computation: says how closely its arrays are compared."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Also counts and orders, as JSON."""
    loose: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: object) -> None:
        """Take in anything that a case may return, under names that say where it was in it."""
        if isinstance(value, Loose):
            self.loose[name] = value.value
        elif isinstance(value, str):
            self.texts[name] = without_volatile(value)
        elif isinstance(value, (torch.Tensor, np.ndarray, np.generic, float)):
            self._add_array(name, value)
        elif isinstance(value, (xr.DataArray, xr.Dataset)):
            self._add_labelled(name, value)
        elif isinstance(value, Figure):
            self.add(name, drawn(value))
        elif isinstance(value, Mapping):
            self.texts[f"{name}|keys"] = json.dumps([str(key) for key in value])
            for key, item in value.items():
                self.add(f"{name}|{key}", item)
        elif isinstance(value, (list, tuple, range)):
            self._add_list(name, value)
        elif hasattr(value, "html") and hasattr(value, "results"):
            for part, item in vars(value).items():
                self.add(f"{name}|{part}", item)
        elif value is None or isinstance(value, (bool, int)):
            self.texts[name] = json.dumps(value)
        else:
            self.texts[name] = without_volatile(repr(value))

    def _add_array(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
        array = np.asarray(value)
        if array.dtype.kind in "UO":
            self.texts[name] = json.dumps(array.tolist(), ensure_ascii=False, default=repr)
        else:
            self.arrays[name] = np.ascontiguousarray(array).reshape(array.shape)

    def _add_labelled(self, name: str, value: xr.DataArray | xr.Dataset) -> None:
        parts = {"": value} if isinstance(value, xr.DataArray) else dict(value.data_vars)
        for part, array in parts.items():
            self.add(f"{name}|{part}" if part else name, array.values)
            self.texts[f"{name}|{part}|dims"] = json.dumps([str(dim) for dim in array.dims])
            if part:
                self._add_attrs(f"{name}|{part}", array.attrs)
        self.texts[f"{name}|coords"] = json.dumps(sorted(map(str, value.coords)))
        for coord, array in value.coords.items():
            self.add(f"{name}@{coord}", array.values)
        self._add_attrs(name, value.attrs)

    def _add_attrs(self, name: str, attrs: Mapping[Any, Any]) -> None:
        for key, item in attrs.items():
            if key not in _VOLATILE_ATTRS:
                self.add(f"{name}.{key}", _steady(item))

    def _add_list(self, name: str, values: Sequence[Any]) -> None:
        if all(item is None or isinstance(item, (str, bool, int)) for item in values):
            self.texts[name] = without_volatile(json.dumps(list(values), ensure_ascii=False))
        elif all(isinstance(item, float) for item in values):
            self.arrays[name] = np.array(values, dtype=np.float64)
        else:
            self.texts[f"{name}|length"] = json.dumps(len(values))
            for i, item in enumerate(values):
                self.add(f"{name}|{i}", item)

    def save(self, stem: Path) -> None:
        """Two files beside each other: STEM.safetensors and STEM.json."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        about = {"dtype": self.dtype, "texts": self.texts, "loose": self.loose}
        with written_whole(_file(stem, "json")) as partial:
            partial.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with written_whole(_file(stem, "safetensors")) as partial:
            save_file(self.arrays, partial)

    @classmethod
    def load(cls, stem: Path) -> Self:
        """Read what `save` wrote."""
        about = json.loads(_file(stem, "json").read_text(encoding="utf-8"))
        return cls(about["dtype"], load_file(_file(stem, "safetensors")), about["texts"], about["loose"])


def without_volatile(text: str) -> str:
    """A text without times, dates, versions and addresses; embedded images by their kind alone.

    >>> without_volatile('1 run, 0.25 s <img src="data:image/png;base64,AAAA">')
    '1 run, N s <img src="[png]">'
    """
    text = _IMAGE.sub(lambda found: f"[{found[1]}]", text)
    for pattern, instead in _VOLATILE:
        text = pattern.sub(instead, text)
    return text


def _steady(value: Any) -> Any:
    """An attribute without the times that stand deeper in it."""
    if isinstance(value, Mapping):
        return {key: _steady(item) for key, item in value.items() if key not in _VOLATILE_ATTRS}
    return value


def _file(stem: Path, ending: str) -> Path:
    return stem.with_name(f"{stem.name}.{ending}")  # a case's name may hold a dot
