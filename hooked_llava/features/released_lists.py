"""The released pipeline's lists of features: filters, which say which features are looked at, and explanations."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hooked_llava.checks import whole_numbers
from hooked_llava.errors import CheckpointError
from hooked_llava.storage import read_json, written_whole

_NAME = re.compile(r"(.+)_feature(\d+)")
_PROMPT = "prompt"  # what stands beside the explanations in some files


def read_filter(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Which features of which module a filter file names; raises `CheckpointError` for another file."""
    found = read_json(path)
    try:
        return {module: whole_numbers(features, module) for module, features in found.items()}
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no filter, which has a list of features for each module ({error})."
        ) from error


def write_filter(path: str | os.PathLike[str], features: Mapping[str, Iterable[int]]) -> None:
    """Write a filter file: for each module its features.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_filter(f"{folder}/filter.json", {"model.layers.24": [7, 9]})
    ...     read_filter(f"{folder}/filter.json")
    {'model.layers.24': [7, 9]}
    """
    _write(Path(path), {module: whole_numbers(list(chosen), module) for module, chosen in features.items()})


def read_explanations(path: str | os.PathLike[str]) -> dict[str, dict[int, str]]:
    """The explanations in a file or in all files of a folder: for each module, by feature.

    Reads what the pipeline's explainer writes (a list of objects with one name each) and what its refinement and its labels are
    (one object). Raises `CheckpointError` for a file of another kind.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} holds no explanations, which are files that end in .json; check the path.")
    found: dict[str, dict[int, str]] = {}
    for file in files:
        for name, text in _named(file):
            module = _NAME.fullmatch(name)
            if module is None or not isinstance(text, str):
                raise CheckpointError(
                    f"{file} has {name!r}: {text!r}; expected 'MODULE_featureNUMBER' and an explanation in words."
                )
            found.setdefault(module[1], {})[int(module[2])] = text
    return found


def write_explanations(folder: str | os.PathLike[str], module: str, explanations: Mapping[int, str]) -> Path:
    """Write explanations by feature as the pipeline's explainer does: `{folder}/{module with _ for .}.json`; returns the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_explanations(folder, "model.layers.24", {7: "a star"}).name
    ...     read_explanations(folder)
    'model_layers_24.json'
    {'model.layers.24': {7: 'a star'}}
    """
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{module.replace('.', '_')}.json"
    _write(path, [{f"{module}_feature{feature}": text} for feature, text in explanations.items()])
    return path


def _named(path: Path) -> list[tuple[str, Any]]:
    """The names and what they stand for, one after the other."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download or copy it again.") from error
    entries = found if isinstance(found, list) else [found]
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(
            f"{path} holds a JSON {type(found).__name__} of other things than objects of named texts."
        )
    return [(name, text) for entry in entries for name, text in entry.items() if name != _PROMPT]


def _write(path: Path, content: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
