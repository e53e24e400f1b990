"""Reading a checkpoint folder: config, tensors under our names one at a time, processor.

Only safetensors are read, so nothing is ever unpickled. Every tensor is compared with the config (missing, surplus,
misshapen) before the first one is read, and each is checked for NaN and infinity as it passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.architecture.tensors import TIED, TIED_TO, expected_tensors, our_name, with_optional_tensors
from hooked_llava.errors import CheckpointError, did_you_mean
from hooked_llava.loading.supported import check_folder, check_tensor_names
from hooked_llava.storage import read_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_SHOWN = 4  # names listed in a message before "and n more"
_CHUNK = 2**20  # elements checked at once: the check must not need memory of the tensor's own size


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The Hugging Face config of a checkpoint folder.

    Raises `CheckpointError` if config.json is missing or unreadable or describes another architecture, and for folders of
    another kind (`supported.FOLDERS`): original LLaVA code, adapters, quantized weights.

    >>> from hooked_llava.loading import resolve
    >>> read_config(resolve("tiny-shapes")).model_type
    'llava'
    """
    path = Path(folder) / "config.json"
    check_folder(Path(folder), read_json(path) if path.is_file() else {})  # an adapter's folder may have no config.json
    fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type not in LLAVA_MODELS:
        known = " or ".join(f"{name!r} ({kind.architecture})" for name, kind in LLAVA_MODELS.items())
        raise CheckpointError(
            f"{path} describes a model of type {model_type!r}.{did_you_mean(str(model_type), LLAVA_MODELS)} Expected {known}. "
            "Load a LLaVA checkpoint in Hugging Face format, such as those of llava-hf on the hub."
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} is not a LLaVA config that transformers can read: {error}") from error


def with_stored_tensors(config: LLaVAConfig, folder: str | Path) -> LLaVAConfig:
    """The config, with what only a folder's tensors tell: whether the unembedding has a bias; raises `CheckpointError`.

    >>> from hooked_llava.loading import resolve
    >>> config = LLaVAConfig.from_hf(read_config(resolve("tiny-shapes")))
    >>> with_stored_tensors(config, resolve("tiny-shapes")) == config
    True
    """
    return with_optional_tensors(config, (entry.hf_name for entry in _entries(Path(folder))))


def stored_dtype(hf_config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config says its weights have, None if it says nothing.

    >>> from transformers import LlavaConfig
    >>> stored_dtype(LlavaConfig(dtype="bfloat16"))
    torch.bfloat16
    """
    dtype = hf_config.dtype or getattr(hf_config.text_config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a string once the config has been saved


def load_processor(folder: str | Path) -> tuple[ProcessorMixin | None, str]:
    """The processor of a checkpoint folder, or None and the reason why there is none.

    Images are prepared by Pillow even where torchvision is installed, so that pixels do not depend on what is.

    >>> from hooked_llava.loading import resolve
    >>> processor, reason = load_processor(resolve("tiny-shapes"))
    >>> type(processor).__name__, reason
    ('LlavaProcessor', '')
    """
    from transformers import AutoProcessor  # imports most of transformers, and torch's compiler with it

    folder = Path(folder)
    alternatives = {
        "a tokenizer (tokenizer.json or tokenizer.model)": ("tokenizer.json", "tokenizer.model"),
        "an image processor (processor_config.json or preprocessor_config.json)": (
            "processor_config.json",
            "preprocessor_config.json",
        ),
    }
    for what, names in alternatives.items():
        if not any((folder / name).is_file() for name in names):
            return None, f"{folder} holds no {what.split(' ', 1)[1]}"
    try:
        config = folder / "config.json"
        if config.is_file() and read_json(config).get("model_type") == "llava_onevision":
            from hooked_llava.loading.onevision import OnevisionProcessor

            return OnevisionProcessor.from_pretrained(folder), ""
        return AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True), ""
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        return None, f"the processor files in {folder} do not load: {error}"


def read_generation_config(folder: str | Path) -> GenerationConfig | None:
    """The folder's generation_config.json, or None if it has none."""
    path = Path(folder) / "generation_config.json"
    return GenerationConfig.from_dict(read_json(path)) if path.is_file() else None


def stream_tensors(
    folder: str | Path, config: LLaVAConfig, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Every tensor under our name, one at a time, converted to dtype (None: as stored) and moved to device.

    Holds no tensor after it has been handed out, and no file's pages: memory is what the receiver keeps plus one
    tensor. With tied embeddings the unembedding does not come. Raises `CheckpointError`, naming tensor and file, for
    missing, surplus or misshapen tensors, damaged files, and numbers that are not finite.

    >>> from hooked_llava.loading import resolve
    >>> folder = resolve("tiny-shapes")
    >>> names = [name for name, tensor in stream_tensors(folder, LLaVAConfig.from_hf(read_config(folder)))]
    >>> names[0]
    'vision.class_embed'
    """
    entries = _matched_entries(Path(folder), config)
    if config.language.tied_embeddings and TIED in entries:
        _check_tied(entries[TIED], entries[TIED_TO])
    for name in expected_tensors(config):
        entry = entries[name]
        stored = _read(entry)
        # always a copy of our own: what safe_open returns is a view of the file's pages
        tensor = stored.to(device=device, dtype=dtype or stored.dtype, copy=True)
        _check_finite(tensor, stored, entry)
        del stored
        yield name, tensor


def load_into(
    module: nn.Module,
    folder: str | Path,
    config: LLaVAConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Replace every parameter of a module (built on the meta device) by the checkpoint's, at one times their memory.

    dtype None means the one in config.json, or where it names none, that of the first tensor. Parameters do not ask for
    gradients. Raises `CheckpointError` as `stream_tensors` does; the module is then half filled and should be thrown away.
    """
    dtype = dtype or stored_dtype(read_config(folder)) or _first_dtype(Path(folder))
    for name, tensor in stream_tensors(folder, config, dtype=dtype, device=device):
        set_parameter(module, name, nn.Parameter(tensor, requires_grad=False))
    if config.language.tied_embeddings:
        set_parameter(module, TIED, module.get_parameter(TIED_TO))
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"The module has parameters that the checkpoint's config does not call for: {_some(empty)}. "
            "Build it from the same config."
        )


def _first_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first tensor that is floating point, by which transformers goes as well."""
    return next((_FLOATS[entry.dtype] for entry in _entries(folder) if entry.dtype in _FLOATS), torch.float32)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the module's parameter of that dotted name.

    >>> block = nn.Sequential(nn.Linear(2, 2))
    >>> set_parameter(block, "0.bias", nn.Parameter(torch.ones(2)))
    >>> block[0].bias.tolist()
    [1.0, 1.0]
    """
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies and what the file's header says about it."""

    path: Path
    hf_name: str
    shape: tuple[int, ...]
    dtype: str


def _matched_entries(folder: Path, config: LLaVAConfig) -> dict[str, _Entry]:
    """The checkpoint's tensors by our names, after comparison with what the config asks for."""
    entries: dict[str, _Entry] = {}
    surplus: list[_Entry] = []
    for entry in _entries(folder):
        try:
            name = our_name(entry.hf_name, config)
        except CheckpointError:
            surplus.append(entry)
            continue
        if name is None:
            continue
        if name in entries:
            raise CheckpointError(
                f"{folder} holds the same tensor twice: {entries[name].hf_name} in {entries[name].path.name} and "
                f"{entry.hf_name} in {entry.path.name}. Remove one, or convert the checkpoint again."
            )
        entries[name] = entry
    check_tensor_names(folder, (entry.hf_name for entry in surplus))
    _compare(folder, entries, surplus, config)
    return entries


def _compare(folder: Path, entries: dict[str, _Entry], surplus: list[_Entry], config: LLaVAConfig) -> None:
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
        if entry.shape != shape:
            raise CheckpointError(
                f"Tensor {entry.hf_name} in {entry.path} has shape {entry.shape}; expected {shape} from config.json "
                f"(it becomes {name}). The config.json belongs to another model."
            )
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"Tensor {entry.hf_name} in {entry.path} is stored as {entry.dtype}; expected floating point "
                f"({', '.join(_FLOATS)}). Quantized checkpoints do not load: use the one it was made from."
            )


def _entries(folder: Path) -> Iterator[_Entry]:
    """Every tensor that the folder's files say they hold; headers only."""
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
        "LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True), and if found['missing_keys'] is "
        "empty (what is missing would be drawn at random), model.save_pretrained(new_folder)."
    )


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = [file.get_slice(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or is no safetensors file ({error}). Download or copy it again."
        ) from error
    return {
        name: _Entry(path, name, tuple(part.get_shape()), str(part.get_dtype()))
        for name, part in zip(names, slices, strict=True)
    }


def _read(entry: _Entry) -> Tensor:
    # Opened anew for each tensor: an open file would keep the pages of all tensors read from it so far.
    try:
        with safe_open(entry.path, framework="pt") as file:
            return file.get_tensor(entry.hf_name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"Tensor {entry.hf_name} in {entry.path} cannot be read ({error}).") from error


def _check_finite(tensor: Tensor, stored: Tensor, entry: _Entry) -> None:
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
    wide = torch.promote_types(tensor.dtype, torch.float32)
    chunks = tensor.reshape(-1).split(_CHUNK)
    return all(bool(chunk.sum(dtype=wide).isfinite()) or bool(chunk.isfinite().all()) for chunk in chunks)


def _check_tied(unembed: _Entry, embed: _Entry) -> None:
    if not torch.equal(_read(unembed), _read(embed)):
        raise CheckpointError(
            f"config.json says that the unembedding is the embedding (tie_word_embeddings), but {unembed.hf_name} in "
            f"{unembed.path} differs from {embed.hf_name}. Set tie_word_embeddings to false in config.json, in the "
            "outer part and in text_config, to keep both."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
