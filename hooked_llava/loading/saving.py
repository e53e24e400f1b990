"""Writing a checkpoint in Hugging Face format: all of it or nothing."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from hooked_llava.architecture.llava import llava_kind
from hooked_llava.architecture.tensors import TIED, expected_tensors, hf_name, model_config
from hooked_llava.errors import CheckpointError
from hooked_llava.loading.packed import CODES, by_weight, part_of
from hooked_llava.loading.weights import INDEX, WEIGHTS
from hooked_llava.prompt.processor import Processor

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_GENERATION_CONFIG = "generation_config.json"
_METADATA = {"format": "pt"}  # transformers refuses safetensors without it


def save(
    state: Mapping[str, Float[Tensor, "..."]],
    hf_config: PreTrainedConfig,
    processor: Processor | None,
    folder: str | Path,
    *,
    generation_config: GenerationConfig | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write tensors under our names as a folder that `from_pretrained` of transformers loads.

    Everything is written beside the folder and moved into place at the end, so a failure leaves no trace and an
    older checkpoint there untouched. Returns the folder. Raises `CheckpointError` if the folder exists and overwrite
    is False, or holds something other than a checkpoint, or if the tensors do not fit the config.
    """
    folder = Path(folder).expanduser()
    tensors = _named_for_disk(state, hf_config)
    shards = _shards(tensors, _bytes(max_shard_size))
    _check_target(folder, overwrite)
    with _all_or_nothing(folder) as partial:
        _write_shards(tensors, shards, partial)
        _write_configs(hf_config, generation_config, _a_float(tensors), partial)
        if processor is not None:
            processor.save_pretrained(partial)
    return folder


def _named_for_disk(state: Mapping[str, Tensor], hf_config: PreTrainedConfig) -> dict[str, Tensor]:
    config = model_config(hf_config, state)
    expected = expected_tensors(config)
    packed = by_weight(state.items())
    given = {
        name: tensor for name, tensor in state.items() if part_of(name) is None and (name != TIED or TIED in expected)
    }
    wrong = sorted(set(expected) ^ set(given))
    wrong += [n for n in expected if n in given and n not in packed and tuple(given[n].shape) != expected[n]]
    if wrong:
        name = wrong[0]
        was = tuple(given[name].shape) if name in given else "missing"
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the config; {name} is {was}, expected {expected.get(name, 'absent')}. "
            "Save a model with the config that it was built from."
        )
    named = {hf_name(name, config): given[name].detach() for name in expected}
    for name, parts in packed.items():
        layer = hf_name(name, config).removesuffix(CODES)
        named |= {f"{layer}{part}": tensor.detach() for part, tensor in parts.items()}
    return named


def _bytes(size: int | str) -> int:
    """A size as a number of bytes: 5000000 or "5MB"."""
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise CheckpointError(f"max_shard_size={size!r} is not a size; expected bytes as a number, or such as '5GB'.")
    return int(float(number) * _UNITS[unit])


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than a shard has one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_shards(tensors: dict[str, Tensor], shards: dict[str, list[str]], folder: Path) -> None:
    for file, names in shards.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata=_METADATA)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _a_float(tensors: Mapping[str, Tensor]) -> Tensor:
    return next(tensor for tensor in tensors.values() if tensor.is_floating_point())


def _write_configs(
    hf_config: PreTrainedConfig, generation_config: GenerationConfig | None, a_weight: Tensor, folder: Path
) -> None:
    config = copy.deepcopy(hf_config)
    config.architectures = [llava_kind(config.model_type).architecture]
    config.dtype = a_weight.dtype
    config.save_pretrained(folder)
    generation_config = generation_config or GenerationConfig.from_model_config(config)
    # As it is. Its own save_pretrained refuses sampling parameters without do_sample, which Vicuna's checkpoints have.
    generation_config.to_json_file(folder / _GENERATION_CONFIG, use_diff=True)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the name of a folder to write. Give another name.")
    if not overwrite:
        raise CheckpointError(f"{folder} exists already. Give another name, or overwrite=True to replace it.")
    # overwrite=True deletes the folder: a slip such as "." must not delete a folder of other files
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} exists and is no checkpoint (no config.json with safetensors beside it), so it is not "
            "replaced. Give another name, or remove it yourself."
        )


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place if the block succeeds and is removed if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        partial, replaced = Path(scratch, "new"), Path(scratch, "old")
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
