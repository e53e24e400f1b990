"""Results are labelled arrays: `xarray` with named axes, and attributes that say how they came about."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.errors import InputError, a_type
from hooked_llava.readout.vocabulary import decode_tokens
from hooked_llava.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.token_map import TokenMap

SHARE = "share recovered"
"""Units of `recovered`: 0 corrupted, 1 clean."""
TIED = 1e-3  # of the largest value
_FORMAT = "hooked_llava.result.v1"
_OLD_NAMES = {
    "stream": "resid",
    "message": "head_output",
    "message_logit_difference": "head_output_logit_difference",
    "message_rank": "head_output_rank",
}
"""Variables and axes of `information_storage`, `reciprocal_rank` and `flow_study` as version 0.1 called them."""
_OF_OLD_NAMES = ("information_storage", "attention_knockout", "answer_probability")
"""Analyses, and names of arrays, in whose files they may stand."""
_OLD_VALUES = {"window_reading": {"centred": "centered"}}
"""Values of attributes as version 0.1 wrote them."""
_ADDED = ("n_forward", "n_backward", "seconds", "work", "runs")  # attributes that add up over prompt pairs
_LISTED = (  # attributes that each prompt or pair has its own of
    *("clean", "corrupted", "prompt", "images", "corrupted_prompt", "corrupted_images"),
    *("logit", "rest"),
)


def stack(results: Sequence[Any], dim: str) -> Any:
    """Results of several prompts or pairs (arrays or datasets) side by side on a new first axis.

    Attributes that differ become lists, costs are added. Where positions differ, their axis counts from 0 and the
    coordinate `absolute_position` [dim, position] says where they are. Raises `InputError` for different lengths.

    >>> import xarray as xr
    >>> parts = [xr.DataArray([1.0, 2.0], dims="position", coords={"position": [p, p + 1]}) for p in (3, 5)]
    >>> stack(parts, "pair").absolute_position.values.tolist()
    [[3, 4], [5, 6]]
    """
    import xarray as xr

    sizes = [dict(result.sizes) for result in results]
    check_sizes(sizes)
    parts = [result.drop_attrs(deep=False) for result in results]
    per_result: dict[str, Any] = {dim: range(len(parts))}
    if "position" in sizes[0]:
        places = np.stack([r.position.values for r in parts])
        if (places != places[0]).any():
            per_result["absolute_position"] = ((dim, "position"), places)
            parts = [r.assign_coords(position=range(places.shape[1])) for r in parts]
    for name in ("label", "grid", "row", "col"):  # what stands at the places of an axis
        if any(name in r.coords and not r[name].equals(parts[0][name]) for r in parts):
            per_result[name] = ((dim, *parts[0][name].dims), np.stack([r[name].values for r in parts]))
            parts = [r.drop_vars(name) for r in parts]
    joined = xr.concat(parts, dim=dim, coords="minimal", compat="override", join="exact")
    return joined.assign_coords(per_result).assign_attrs(join_attrs([r.attrs for r in results]))


def check_sizes(sizes: Sequence[Mapping[Any, int]]) -> None:
    """Raise `InputError` unless results of these sizes, {axis: length}, can be stacked: to be found out before they are made.

    >>> check_sizes([{"layer": 6, "position": 11}, {"layer": 6, "position": 11}])
    """
    if any(size != sizes[0] for size in sizes):
        raise InputError(
            f"The results have different sizes ({', '.join(str(dict(size)) for size in sizes)}), which do not stack. "
            "Choose positions that all have ('all' together, or a span of equal length), or do one at a time."
        )


def join_attrs(attrs: Sequence[dict[str, Any]], *, keep_differing: bool = True) -> dict[str, Any]:
    """Attributes of several results as those of one: costs added up, and of the rest what all have alike.

    What differs, or is each result's own (the prompt), becomes a list, or is left out.

    >>> join_attrs([{"n_forward": 1, "model": "m", "prompt": "a"}, {"n_forward": 2, "model": "m", "prompt": "b"}])
    {'n_forward': 3, 'model': 'm', 'prompt': ['a', 'b']}
    """
    joined = {}
    for name, first in attrs[0].items():
        values = [a.get(name) for a in attrs]
        if name in _ADDED:
            joined[name] = sum(a[name] for a in attrs)
        elif name not in _LISTED and all(value == first for value in values):
            joined[name] = first
        elif keep_differing:
            joined[name] = values
    return joined


def recovered(result: Any) -> Any:
    """Patching results as the share of the two runs' difference that comes back: 0 is corrupted, 1 is clean.

    (m - m_corrupted) / (m_clean - m_corrupted) for a metric m, as `activation_patching` and `path_patching` return it
    (arrays named "metric"). Estimated changes of the metric, as in the arrays of `attribution_patching`'s dataset, are
    first added to the metric of the run that is patched. The attribute `neutral` says what a cell that does nothing
    has: 0 where clean activations are put into the corrupted run, 1 where it is the reverse. What is in shares already
    stays as it is.

    Raises `InputError` where the result does not say what the metric of the two runs is (an array taken out of a
    dataset: take the share of the whole dataset first), or where it is the same.

    >>> import xarray as xr
    >>> ends = {"clean": 3.0, "corrupted": -1.0, "direction": "denoise"}
    >>> recovered(xr.DataArray([-1.0, 1.0, 3.0], dims="layer", name="metric", attrs=ends)).values.tolist()
    [0.0, 0.5, 1.0]
    """
    if result.attrs.get("units") == SHARE:
        return result
    ends = [result.attrs.get(name) for name in ("clean", "corrupted")]
    if None in ends:
        raise InputError(
            "The result does not say what the metric is in the clean and in the corrupted run (attributes `clean` and "
            "`corrupted`). Give the whole result of a patching analysis: recovered(estimate)['z'], not "
            "recovered(estimate['z'])."
        )
    clean, corrupted = (_along_pairs(end, result) for end in ends)
    if bool((clean == corrupted).any()):
        raise InputError(
            f"The metric is the same in the clean and in the corrupted run ({ends[0]}), so there is no difference to "
            "recover; choose another metric or pair."
        )
    neutral = float(result.attrs.get("direction") == "noise")
    is_array = not hasattr(result, "data_vars")
    lifted = result - corrupted if is_array and result.name == "metric" else result + neutral * (clean - corrupted)
    share = lifted / (clean - corrupted)
    about = {"units": SHARE, "neutral": neutral}
    if is_array:
        return share.rename("recovered").assign_attrs({**result.attrs, **about})
    named = {name: array.assign_attrs(about) for name, array in share.data_vars.items()}
    return share.assign(named).assign_attrs({**result.attrs, **about})


def _along_pairs(end: float | Sequence[float], result: Any) -> Any:
    """The metric of one side, along the axis of the pairs where there are several."""
    import xarray as xr

    return xr.DataArray(end, dims="pair" if isinstance(end, (list, tuple)) else ())


def position_coords(token_map: TokenMap, positions: Sequence[int]) -> dict[str, Any]:
    """Coordinates of an axis of positions: their numbers in the prompt, and what stands there.

    >>> from hooked_llava.prompt.token_map import TokenMap
    >>> position_coords(TokenMap(token_ids=(7, 8, 9), real=range(3)), [0, 2])
    {'position': [0, 2], 'label': ('position', ['7', '9'])}
    """
    labels = token_map.labels
    return {"position": list(positions), "label": ("position", [labels[p] for p in positions])}


def word_variables(
    model: HookedLLaVA, values: Tensor, ids: Int[Tensor, "*shape"], dims: Sequence[str], name: str
) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    """Variables of a dataset of words: `token`, `token_id`, and under `name` a number for each."""
    return {
        "token": (dims, decode_tokens(model, ids)),
        "token_id": (dims, ids.cpu().numpy()),
        name: (dims, to_numpy(values)),
    }


def resid_coords(n_layers: int, dim: str = "layer") -> dict[str, Any]:
    """Coordinates of an axis of residual streams: the number of the layer that each enters, and its name, last "final".

    The name stays with its residual stream where some layers are chosen, which a number by itself does not say.

    >>> resid_coords(2)
    {'layer': [0, 1, 2], 'layer_name': ('layer', ['0', '1', 'final'])}
    """
    return {dim: list(range(n_layers + 1)), "layer_name": (dim, [*map(str, range(n_layers)), "final"])}


def n_tied(values: np.ndarray) -> int:
    """How many further values are as large as the largest, but for a thousandth of it: what a "best" must say.

    >>> n_tied(np.array([0.5, 0.9, 0.9, 0.8995])), n_tied(np.array([0.1, 0.9]))
    (2, 0)
    """
    largest = np.nanmax(values)
    return int((values >= largest - TIED * abs(largest)).sum()) - 1


def to_numpy(values: Tensor) -> np.ndarray:
    """A tensor's numbers for a result: in its own precision, or in float32 where NumPy has none such.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype('float32')
    """
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


# ---------------------------------------------------------------------- files


def save(result: xr.DataArray | xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a result to one safetensors file: numbers as tensors; names, words and attributes as JSON; no pickle.

    Nothing half-written stays. Raises `InputError` for contents that the file cannot hold (dates, objects), and a
    folder that is not there.

    >>> import tempfile, xarray as xr
    >>> result = xr.DataArray([1.0, 2.0], dims="layer", coords={"word": ("layer", ["a", "b"])}, attrs={"model": "m"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(result, folder + "/result.safetensors")
    ...     load(folder + "/result.safetensors").identical(result)
    True
    """
    import xarray as xr

    if not isinstance(result, xr.DataArray | xr.Dataset):
        raise InputError(f"result is {a_type(result)}; expected a DataArray or a Dataset of xarray.")
    tensors: dict[str, Tensor] = {}
    variables = {}
    is_array = not hasattr(result, "data_vars")
    arrays = {"": result.variable} if is_array else {str(name): v.variable for name, v in result.data_vars.items()}
    for role, several in (("data", arrays), ("coord", {str(n): v.variable for n, v in result.coords.items()})):
        for name, variable in several.items():
            key = f"{role}:{name}"
            variables[key] = {"dims": list(map(str, variable.dims)), "shape": list(variable.shape)}
            variables[key]["attrs"] = _plain(variable.attrs if role == "coord" or not is_array else {}, name)
            values = variable.values
            if values.dtype.kind in "UO":
                variables[key]["words"] = _words(values, name)
            elif values.dtype.kind in "biuf" and values.dtype.itemsize <= 8:
                tensors[key] = torch.tensor(values.astype(values.dtype.newbyteorder("="), copy=False).reshape(-1))
            else:
                raise InputError(f"{name!r} holds {values.dtype}; a result file holds numbers, booleans and words.")
    about = {
        "kind": "DataArray" if is_array else "Dataset",
        "name": str(result.name) if is_array and result.name is not None else None,
        "attrs": _plain(result.attrs, "the result"),
        "variables": variables,
    }
    write_tensors(path, tensors, {"about": json.dumps(about)}, _FORMAT)


def load(path: str | os.PathLike[str]) -> xr.DataArray | xr.Dataset:
    """Read a result that `save` wrote, with today's names; raises `CheckpointError` for any other file."""
    import xarray as xr

    tensors, metadata = read_tensors(path, [_FORMAT], writer="save")
    described = json.loads(metadata["about"])
    attrs = {k: _OLD_VALUES[k].get(v, v) if k in _OLD_VALUES else v for k, v in described["attrs"].items()}
    about = (described["name"], attrs.get("analysis"))
    renamed: dict[str, str] = _OLD_NAMES if any(what in _OF_OLD_NAMES for what in about) else {}
    found: dict[str, dict[str, xr.Variable]] = {"data": {}, "coord": {}}
    for key, entry in described["variables"].items():
        role, _, name = key.partition(":")
        flat = tensors[key].numpy() if key in tensors else np.array(entry["words"], dtype=str)
        dims = [renamed.get(dim, dim) for dim in entry["dims"]]
        found[role][renamed.get(name) or name] = xr.Variable(dims, flat.reshape(entry["shape"]), entry["attrs"])
    if described["kind"] == "Dataset":
        return xr.Dataset(found["data"], coords=found["coord"], attrs=attrs)
    return xr.DataArray(found["data"][""], coords=found["coord"], name=described["name"]).assign_attrs(attrs)


def _words(values: np.ndarray, name: str) -> list[str]:
    words = values.reshape(-1).tolist()
    if not all(isinstance(word, str) for word in words):
        raise InputError(
            f"{name!r} holds {values.dtype} that are not all words; a result file holds numbers and words."
        )
    return words


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it: tuples as lists, NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(v, f"{where}, {key}") for key, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(v, where) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), where)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise InputError(f"An attribute of {where} is {a_type(value)}; expected numbers, words, or lists of them.")
