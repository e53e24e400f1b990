"""The tensors of a checkpoint folder under our names, one at a time.

Only safetensors are read, so nothing is ever unpickled. Every tensor is compared with the config (missing, surplus,
misshapen) before the first one is read, and each is checked for NaN and infinity as it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import TIED, TIED_TO, expected_tensors, our_name
from hooked_llava.errors import CheckpointError
from hooked_llava.loading.packed import CODES, KeepsPacked, PackedWeight, by_weight, part_of
from hooked_llava.loading.supported import check_tensor_names
from hooked_llava.storage import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_SHOWN = 4  # names listed in an error before "and n more"
_CHUNK = 2**20  # elements checked at once: the check must not need memory of the tensor's own size


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says about a tensor.

    Attributes:
        path (Path): The file.
        hf_name (str): Hugging Face's name.
        shape (tuple[int, ...]): Its shape.
        dtype (str): Its dtype as safetensors writes it: "BF16".
    """

    path: Path
    hf_name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightFiles:
    """What the headers of a folder's weight files say; `read_headers` reads them.

    Attributes:
        folder (Path): The checkpoint folder.
        tensors (tuple[StoredTensor, ...]): Every tensor in its files.
        parts (Mapping[str, Mapping[str, StoredTensor]]): For each weight that is stored in 8 or 4 bits, by Hugging Face's
            name, what stands beside its codes, which are among `tensors`.
    """

    folder: Path
    tensors: tuple[StoredTensor, ...]
    parts: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Hugging Face's names of all tensors."""
        return [stored.hf_name for stored in self.tensors]

    def with_packed(self) -> WeightFiles:
        """The same, tensors that belong to packed weights gathered in `parts`."""
        parts = by_weight((stored.hf_name, stored) for stored in self.tensors)
        return WeightFiles(self.folder, tuple(t for t in self.tensors if part_of(t.hf_name) is None), parts)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first tensor in floating point."""
        return next((_FLOATS[stored.dtype] for stored in self.tensors if stored.dtype in _FLOATS), torch.float32)


def stream_tensors(
    files: WeightFiles,
    config: LLaVAConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Mapping[str, torch.device] = "cpu",
) -> Iterator[tuple[str, Float[Tensor, "..."] | PackedWeight]]:
    """Every tensor under our name, one at a time, converted to dtype (None: as stored) and moved to its device.

    A packed weight comes as it is stored.

    Holds no tensor after it has been handed out, and no file's pages: memory is what the receiver keeps plus one
    tensor. With tied embeddings the unembedding does not come. Raises `CheckpointError`, naming tensor and file, for
    missing, surplus or misshapen tensors, damaged files, and numbers that are not finite.

    >>> from hooked_llava.loading import read_config, resolve
    >>> folder = resolve("tiny-shapes")
    >>> next(stream_tensors(read_headers(folder), LLaVAConfig.from_hf(read_config(folder))))[0]
    'vision.class_embed'
    """
    entries = _matched(files, config)
    if config.language.tied_embeddings and TIED in entries:
        _check_tied(entries[TIED], entries[TIED_TO])
    for name in expected_tensors(config):
        entry = entries[name]
        there = device[name] if isinstance(device, Mapping) else device
        if entry.hf_name in files.parts:
            yield name, _read_packed(entry, files.parts[entry.hf_name], dtype or torch.float32, there)
            continue
        stored = _read(entry)
        # always a copy of our own: what safe_open returns is a view of the file's pages
        tensor = stored.to(device=there, dtype=dtype or stored.dtype, copy=True)
        _check_finite(tensor, stored, entry)
        del stored
        yield name, tensor


def load_into(
    module: nn.Module,
    files: WeightFiles,
    config: LLaVAConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Mapping[str, torch.device] = "cpu",
) -> None:
    """Replace every parameter of a module (built on the meta device) by the checkpoint's, at one times their memory.

    dtype None means that of the first tensor in floating point, as in transformers where config.json names none; the device
    is one for all of them, or one for each by its name. Raises `CheckpointError` as `stream_tensors` does; the module is
    then half filled and should be thrown away.
    """
    dtype = files.dtype if dtype is None else dtype
    set_parameters(module, stream_tensors(files, config, dtype=dtype, device=device), config)
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"The module has parameters that the checkpoint's config does not call for: {_some(empty)}. "
            "Build it from the same config."
        )


def set_parameters(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor | PackedWeight]], config: LLaVAConfig
) -> None:
    """Put tensors in the place of a module's parameters of those dotted names, without gradients; tied ones are one parameter.

    A linear map that keeps its weight in few bits packs what it is given.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        keeper = module.get_submodule(owner)
        if leaf == CODES and isinstance(keeper, KeepsPacked):
            keeper.keep_weight(tensor)
        else:
            assert isinstance(tensor, Tensor), name
            _set_parameter(module, name, nn.Parameter(tensor, requires_grad=False))
    if config.language.tied_embeddings:
        _set_parameter(module, TIED, module.get_parameter(TIED_TO))


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def _matched(files: WeightFiles, config: LLaVAConfig) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by our names, after comparison with the config."""
    entries: dict[str, StoredTensor] = {}
    surplus: list[StoredTensor] = []
    for entry in files.tensors:
        try:
            name = our_name(entry.hf_name, config)
        except CheckpointError:
            surplus.append(entry)
            continue
        if name is None:
            continue
        if name in entries:
            raise CheckpointError(
                f"{files.folder} holds the same tensor twice: {entries[name].hf_name} in {entries[name].path.name} and "
                f"{entry.hf_name} in {entry.path.name}. Remove one, or convert the checkpoint again."
            )
        entries[name] = entry
    check_tensor_names(files.folder, (entry.hf_name for entry in surplus))
    _compare(files.folder, entries, surplus, config, files.parts)
    return entries


def _compare(
    folder: Path,
    entries: dict[str, StoredTensor],
    surplus: list[StoredTensor],
    config: LLaVAConfig,
    packed: Iterable[str] = (),
) -> None:
    expected = expected_tensors(config)
    if config.language.tied_embeddings and TIED in entries:
        expected = {**expected, TIED: expected[TIED_TO]}
    missing = [name for name in expected if name not in entries]
    surplus += [entry for name, entry in entries.items() if name not in expected]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors that its config.json calls for: "
            f"{_some(missing)}. The checkpoint is incomplete or its config.json belongs to another model."
        )
    if surplus:
        raise CheckpointError(
            f"{folder} holds {len(surplus)} tensors that its config.json does not call for: "
            f"{_some([f'{entry.hf_name} in {entry.path.name}' for entry in surplus])}. "
            "The config.json belongs to another model, or the checkpoint is of another architecture."
        )
    for name, shape in expected.items():
        entry = entries[name]
        if entry.hf_name in packed:
            continue  # the shape is among what is packed
        if entry.shape != shape:
            raise CheckpointError(
                f"Tensor {entry.hf_name} in {entry.path} has shape {entry.shape}; expected {shape} from config.json "
                f"(it becomes {name}). The config.json belongs to another model."
            )
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"Tensor {entry.hf_name} in {entry.path} is stored as {entry.dtype}; expected floating point "
                f"({', '.join(_FLOATS)}). Of quantized checkpoints only those of bitsandbytes load: use the one it was made from."
            )


def read_headers(folder: str | Path) -> WeightFiles:
    """Which tensors the weight files of a checkpoint folder hold; only their headers are read.

    Raises `CheckpointError` where there are none, for pickles, for damaged files, and for an index that belongs to others.

    >>> from hooked_llava.loading import resolve
    >>> "language_model.model.norm.weight" in read_headers(resolve("tiny-shapes")).names
    True
    """
    return WeightFiles(Path(folder), tuple(_headers(Path(folder))))


def _headers(folder: Path) -> Iterator[StoredTensor]:
    if (folder / WEIGHTS).is_file():
        yield from _header(folder / WEIGHTS).values()
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor to file. Save the checkpoint again.")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / INDEX} names the file {shard!r}, which is not there. Complete the download or copy."
            )
        held, named = _header(folder / shard), {name for name, file in weight_map.items() if file == shard}
        if absent := sorted(named - set(held)):
            raise CheckpointError(
                f"{folder / INDEX} says that {shard} holds {_some(absent)}, which it does not. "
                "Index and files are of different checkpoints: download or save both again."
            )
        yield from held.values()


def _no_weights(folder: Path) -> str:
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
    pickles = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if not pickles:
        return (
            f"{folder} holds no weights; expected {WEIGHTS}, or {INDEX} with the files it names. Pickle files (*.bin) are "
            "neither read nor downloaded."
        )
    for index in folder.glob("*.bin.index.json"):
        check_tensor_names(folder, read_json(index).get("weight_map") or {})
    return (
        f"{folder} holds its weights as pickle files only ({_some(pickles)}), which can run any code when opened "
        "and are never read. Convert them once, in a place you trust, with transformers: model, found = "
        "AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True), and if found['missing_keys'] is "
        "empty (what is missing would be drawn at random), model.save_pretrained(new_folder)."
    )


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = [file.get_slice(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or is no safetensors file ({error}). Download or copy it again."
        ) from error
    return {
        name: StoredTensor(path, name, tuple(part.get_shape()), str(part.get_dtype()))
        for name, part in zip(names, slices, strict=True)
    }


def _read(entry: StoredTensor) -> Tensor:
    # Opened anew for each tensor: an open file would keep the pages of all tensors read from it so far.
    try:
        with safe_open(entry.path, framework="pt") as file:
            return file.get_tensor(entry.hf_name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"Tensor {entry.hf_name} in {entry.path} cannot be read ({error}).") from error


def _read_packed(
    codes: StoredTensor, parts: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device | str
) -> PackedWeight:
    read = {}
    for part, entry in {CODES: codes, **parts}.items():
        stored = _read(entry)
        read[part] = stored.to(device, copy=True)
        if part != CODES and stored.is_floating_point():
            _check_finite(read[part], stored, entry)
    return PackedWeight(read, dtype)


def _check_finite(tensor: Tensor, stored: Tensor, entry: StoredTensor) -> None:
    if _is_finite(tensor):
        return
    if _is_finite(stored):
        raise CheckpointError(
            f"Tensor {entry.hf_name} in {entry.path} has numbers too large for {tensor.dtype} (it is stored as "
            f"{stored.dtype}). Load it with dtype={stored.dtype}."
        )
    nan, infinite = int(stored.isnan().sum()), int(stored.isinf().sum())
    raise CheckpointError(
        f"Tensor {entry.hf_name} in {entry.path} has {nan} NaN and {infinite} infinite numbers among "
        f"{stored.numel()}; expected finite weights. The checkpoint is damaged: download or save it again."
    )


def _is_finite(tensor: Tensor) -> bool:
    """A sum shows every NaN and infinity at a fraction of the cost; only where it is not finite each number is looked at."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    chunks = tensor.reshape(-1).split(_CHUNK)
    return all(bool(chunk.sum(dtype=dtype).isfinite()) or bool(chunk.isfinite().all()) for chunk in chunks)


def _check_tied(unembed: StoredTensor, embed: StoredTensor) -> None:
    if not torch.equal(_read(unembed), _read(embed)):
        raise CheckpointError(
            f"config.json says that the unembedding is the embedding (tie_word_embeddings), but {unembed.hf_name} in "
            f"{unembed.path} differs from {embed.hf_name}. Set tie_word_embeddings to false in config.json, in the "
            "outer part and in text_config, to keep both."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
