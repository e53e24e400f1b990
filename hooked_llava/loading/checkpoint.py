"""What a checkpoint folder holds besides its weights: config, processor, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.errors import CheckpointError, did_you_mean
from hooked_llava.loading.supported import check_folder
from hooked_llava.storage import read_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_NEEDED = {
    "tokenizer": ("tokenizer.json", "tokenizer.model"),
    "image processor": ("processor_config.json", "preprocessor_config.json"),
}
"""The parts of a processor, and the files of which each needs one."""


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The Hugging Face config of a checkpoint folder.

    Raises `CheckpointError` if config.json is missing or unreadable or describes another architecture, and for folders of
    another kind (`supported.FOLDERS`): original LLaVA code, adapters, quantized weights.

    >>> from hooked_llava.loading import resolve
    >>> read_config(resolve("tiny-shapes")).model_type
    'llava'
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        check_folder(Path(folder), {})  # an adapter's folder may have no config.json
    fields = read_json(path)
    check_folder(Path(folder), fields)
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


def stored_dtype(hf_config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config says its weights have, None if it says nothing.

    >>> from transformers import LlavaConfig
    >>> stored_dtype(LlavaConfig(dtype="bfloat16"))
    torch.bfloat16
    """
    dtype = hf_config.dtype or getattr(hf_config.text_config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a string once the config has been saved


def load_processor(folder: str | Path, model_type: str) -> tuple[ProcessorMixin | None, str]:
    """The processor of a checkpoint folder of that type of model, or None and the reason why there is none.

    Images are prepared by Pillow even where torchvision is installed, so that pixels do not depend on what is.

    >>> from hooked_llava.loading import resolve
    >>> processor, reason = load_processor(resolve("tiny-shapes"), "llava")
    >>> type(processor).__name__, reason
    ('LlavaProcessor', '')
    """
    from transformers import AutoProcessor  # imports most of transformers, and torch's compiler with it

    folder = Path(folder)
    for what, files in _NEEDED.items():
        if not any((folder / file).is_file() for file in files):
            return None, f"{folder} holds no {what} ({' or '.join(files)})"
    try:
        if model_type == "llava_onevision":
            from hooked_llava.loading.onevision import OnevisionProcessor

            return OnevisionProcessor.from_pretrained(folder), ""
        return AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True), ""
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        return None, f"the processor files in {folder} do not load: {error}"


def read_generation_config(folder: str | Path) -> GenerationConfig | None:
    """The folder's generation_config.json, or None if it has none."""
    path = Path(folder) / "generation_config.json"
    return GenerationConfig.from_dict(read_json(path)) if path.is_file() else None
