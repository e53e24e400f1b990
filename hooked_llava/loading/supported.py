"""What can be wrapped or loaded: a table of what may be given instead, how it is recognised, and what to do about it.

`from_hf` and `from_pretrained` check it before anything is built. An advice is given only where following it ends in a
model with all of its weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.errors import CheckpointError, ConfigError, a_type
from hooked_llava.loading.packed import is_bitsandbytes, packed_layers

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that weights may have."""

_ORIGINAL_TYPES = (
    "llava_llama",
    "llava_mistral",
    "llava_mixtral",
    "llava_mpt",
    "llava_qwen",
    "llava_phi",
    "llava_gemma",
)
_ORIGINAL_CLASS = re.compile(r"Llava\w+ForCausalLM")

_CLASSES = ", ".join(kind.architecture for kind in LLAVA_MODELS.values())
_UNQUANTIZED = (
    "Load the checkpoint that it was quantized from; where memory is short, "
    'HookedLLaVA.from_pretrained(name, dtype="bfloat16") takes once the memory of the weights.'
)
_ORIGINAL = (
    "Load the same model in Hugging Face format: llava-hf/llava-1.5-7b-hf and its siblings on the hub are the converted "
    "liuhaotian/llava-v1.5-7b and so on. A model of your own is converted by convert_llava_weights_to_hf.py in the source "
    "of transformers (an adapter is merged first, by the original code's merge_lora_weights.py). Plain from_pretrained and "
    "save_pretrained of transformers do not convert it: they find no weight under its name and draw new ones at random."
)
_MERGE = (
    "Merge the adapter and pass or save the result: base = AutoModelForImageTextToText.from_pretrained(base_name); "
    "PeftModel.from_pretrained(base, adapter_name).merge_and_unload()."
)


@dataclass(frozen=True)
class Kind:
    """Something that is given in the place of a plain model or checkpoint.

    Attributes:
        what (str): What it is, to follow "which is".
        found (Callable[[Any], object]): What it is known by, in words where there are any; false if it is not of this
            kind.
        advice (str): How to come to a model that can be used.
    """

    what: str
    found: Callable[[Any], object]
    advice: str


# --- models in memory: `found` takes the object that was given


def _is_named(*names: str) -> Callable[[Any], bool]:
    return lambda given: any(cls.__name__ in names for cls in type(given).__mro__)


def _holds(name: str) -> Callable[[Any], bool]:
    return lambda given: isinstance(getattr(given, name, None), nn.Module)


def _is_prompt_tuned(given: Any) -> bool:
    return bool(getattr(getattr(given, "active_peft_config", None), "is_prompt_learning", False))


def _adapter_layer(given: nn.Module) -> str:
    found = (
        name for name, module in given.named_modules() if isinstance(getattr(module, "base_layer", None), nn.Module)
    )
    return next(found, "")


def _not_float(given: nn.Module) -> str:
    by_bitsandbytes = is_bitsandbytes(getattr(given.config, "quantization_config", None))
    shared = {f"{path}.weight" for path in packed_layers(given)} if by_bitsandbytes else ()
    for name, weight in given.named_parameters():
        if name in shared:
            continue
        if weight.dtype not in FLOATS:
            return f"{name} is {_name(weight.dtype)}"
        if type(weight.data) is not Tensor and "Quantized" in type(weight.data).__name__:
            return f"{name} is {a_type(weight.data)}"
    packed = (
        f"{name} is a {type(m).__module__}.{type(m).__name__}" for name, m in given.named_modules() if _is_packed(m)
    )
    declared = "is_quantized is True" if getattr(given, "is_quantized", False) is True and not shared else ""
    return next(packed, declared)


def _is_packed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight in a form of its own, as torch's dynamic quantization and GPTQ or AWQ do."""
    return type(module).__module__.startswith("torch.ao.nn.quantized") or any(
        isinstance(getattr(module, name, None), Tensor) for name in ("qweight", "weight_packed")
    )


def _absent(given: nn.Module) -> str:
    return next((f"{name} is on the meta device" for name, weight in given.named_parameters() if weight.is_meta), "")


def _offloaded(given: nn.Module) -> str:
    hooks = ((name, getattr(module, "_hf_hook", None)) for name, module in given.named_modules())
    found = (
        f"accelerate loads the weights of {name or 'the model'} as they are used" for name, h in hooks if _moves(h)
    )
    return next(found, "")


def _moves(hook: Any) -> bool:
    return any(getattr(each, "offload", False) is True for each in (hook, *getattr(hook, "hooks", ())))


def _no_tensor(given: nn.Module) -> str:
    found = (name for name, weight in given.named_parameters() if type(weight.data) is not Tensor)
    return next((f"{name} is no plain tensor" for name in found), "")


def _prepares_inputs(given: Any) -> bool:
    from transformers import ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin

    return isinstance(given, (ProcessorMixin, PreTrainedTokenizerBase, ImageProcessingMixin))


OBJECTS = (
    Kind("already what from_hf makes", _is_named("HookedLLaVA"), "Use it as it is."),
    Kind(
        "the name of a model or its folder",
        lambda given: isinstance(given, (str, os.PathLike)),
        "Load it with HookedLLaVA.from_pretrained.",
    ),
    Kind(
        "no model but what prepares its inputs",
        _prepares_inputs,
        "The model comes first: from_hf(hf_model, processor).",
    ),
    Kind(
        "a config, which has no weights",
        lambda given: isinstance(given, PreTrainedConfig),
        "Load the weights with AutoModelForImageTextToText.from_pretrained, or HookedLLaVA.from_pretrained.",
    ),
    Kind(
        "a mapping of weights, without their model", lambda given: isinstance(given, Mapping), "Pass the model itself."
    ),
    Kind("a pipeline", lambda given: _holds("model")(given) and hasattr(given, "task"), "Pass its .model."),
    Kind("a compiled model", _holds("_orig_mod"), "Pass hf_model._orig_mod, the model that was compiled."),
    Kind("a wrapper around a model", _holds("module"), "Pass hf_model.module, the model inside."),
    Kind(
        "a model with a tuned prompt (PEFT)",
        _is_prompt_tuned,
        "That is no change of the weights and cannot be merged; without it the model is hf_model.get_base_model().",
    ),
    Kind(
        "a model with an adapter (PEFT) that is not merged",
        lambda given: callable(getattr(given, "get_base_model", None)),
        "Pass hf_model.merge_and_unload(), or hf_model.unload() for the model without the adapter.",
    ),
)
"""What is known by the object itself."""

MODULES = (
    Kind(
        "a model without its unembedding",
        _is_named("LlavaModel", "LlavaNextModel", "LlavaOnevisionModel"),
        "Pass the model around it, whose class is called ...ForConditionalGeneration.",
    ),
    Kind("a model with layers of an adapter (PEFT) that is not merged", _adapter_layer, _MERGE),
    Kind(
        "a model whose weights are not in memory",
        _absent,
        "Load it without offloading (without device_map, or with more max_memory), or build and fill it before passing it.",
    ),
    Kind(
        "a model whose weights are brought in as they are used",
        _offloaded,
        "Load it without offloading, or call accelerate's remove_hook_from_submodules first.",
    ),
    Kind("a model with quantized weights", _not_float, _UNQUANTIZED),
    Kind(
        "a model whose weights are shared out or packed",
        _no_tensor,
        "Gather it on one device, as plain tensors, first.",
    ),
)
"""What is known by the weights and layers of a LLaVA model."""


def check_model(given: object) -> None:
    """Raises `ConfigError` for anything but a plain LLaVA model of transformers with its weights in memory.

    >>> check_model("llava-hf/llava-1.5-7b-hf")
    Traceback (most recent call last):
    hooked_llava.errors.ConfigError: hf_model is 'llava-hf/llava-1.5-7b-hf', ... Load it with HookedLLaVA.from_pretrained.
    """
    for kind in OBJECTS:
        _refuse_model(given, kind)
    if not isinstance(given, nn.Module) or not isinstance(getattr(given, "config", None), PreTrainedConfig):
        raise ConfigError(
            f"hf_model is {_shown(given)}; expected a model of transformers ({_CLASSES}). Load one with "
            "AutoModelForImageTextToText.from_pretrained, or use HookedLLaVA.from_pretrained."
        )
    if given.config.model_type in LLAVA_MODELS:  # another architecture is told by its config
        for kind in MODULES:
            _refuse_model(given, kind)


def _refuse_model(given: object, kind: Kind) -> None:
    if evidence := kind.found(given):
        known_by = f" ({evidence})" if isinstance(evidence, str) else ""
        raise ConfigError(
            f"hf_model is {_shown(given)}, which is {kind.what}{known_by}; expected a model of transformers ({_CLASSES}) "
            f"with its weights in memory, in floating point. {kind.advice}"
        )


def _shown(given: object) -> str:
    return repr(str(given)) if isinstance(given, (str, os.PathLike)) else a_type(given)


# --- checkpoint folders: `found` takes the `Folder`


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder, of which nothing has been checked.

    Attributes:
        path (Path): The folder.
        fields (Mapping[str, Any]): config.json, empty if there is none.
    """

    path: Path
    fields: Mapping[str, Any]

    def has(self, pattern: str) -> bool:
        """Whether a file of the folder has a name like that."""
        return any(self.path.glob(pattern))


def _original_config(folder: Folder) -> str:
    fields = folder.fields
    if own := sorted(name for name in fields if name.startswith("mm_")):
        return f"config.json has {_some(own)}"
    if fields.get("model_type") in _ORIGINAL_TYPES:
        return f"config.json has model_type {fields['model_type']!r}"
    classes = [name for name in fields.get("architectures") or () if _ORIGINAL_CLASS.fullmatch(str(name))]
    return f"config.json has the architecture {classes[0]!r}" if classes else ""


def _adapter_folder(folder: Folder) -> str:
    if not folder.has("adapter_config.json"):
        return ""
    try:
        base = json.loads((folder.path / "adapter_config.json").read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
    except (ValueError, OSError, AttributeError):
        base = None
    return f"adapter_config.json, for {base}" if base else "adapter_config.json"


def _quantized_config(folder: Folder) -> str:
    parts = {"": folder.fields} | {f"{name}.": folder.fields.get(f"{name}_config") for name in ("text", "vision")}
    for part, fields in parts.items():
        for name in ("quantization_config", "compression_config"):
            if isinstance(fields, Mapping) and name in fields and not (part == "" and is_bitsandbytes(fields[name])):
                kind = fields[name].get("quant_method") if isinstance(fields[name], Mapping) else None
                return f"config.json has {part}{name}{f' of {kind!r}' if kind else ''}"
    return ""


def _gguf(folder: Folder) -> str:
    return (
        "" if folder.has("*.safetensors") else ", ".join(sorted(path.name for path in folder.path.glob("*.gguf"))[:1])
    )


FOLDERS = (
    Kind("a checkpoint in the layout of the original LLaVA code", _original_config, _ORIGINAL),
    Kind("an adapter (PEFT), which is no model by itself", _adapter_folder, _MERGE),
    Kind("a checkpoint with quantized weights", _quantized_config, _UNQUANTIZED),
    Kind("a checkpoint of llama.cpp", _gguf, "Load the checkpoint in Hugging Face format that it was made from."),
)
"""What is known by a folder's config and files."""

TENSORS = (
    Kind("a checkpoint in the layout of the original LLaVA code", re.compile(r"\bmm_projector\.").search, _ORIGINAL),
    Kind("an adapter (PEFT), which is no model by itself", re.compile(r"\blora_[AB]\b|\bbase_layer\b").search, _MERGE),
    Kind(
        "a checkpoint with quantized weights",
        re.compile(r"\.(SCB|qweight|qzeros|weight_scale(_inv)?|weight_packed|absmax|quant_map)$").search,
        _UNQUANTIZED,
    ),
)
"""What is known by a tensor's name."""


def check_folder(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for a folder that holds something else than a plain LLaVA checkpoint, and says what to do."""
    folder = Folder(path, fields)
    for kind in FOLDERS:
        if evidence := kind.found(folder):
            _refuse_folder(path, kind, str(evidence))


def check_tensor_names(path: Path, names: Iterable[str]) -> None:
    """Raises `CheckpointError` if a tensor's name tells that the checkpoint is of another kind."""
    for name in names:
        for kind in TENSORS:
            if kind.found(name):
                _refuse_folder(path, kind, f"it has the tensor {name}")


def _refuse_folder(path: Path, kind: Kind, evidence: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is {kind.what} ({evidence}); expected a LLaVA checkpoint in Hugging Face format. {kind.advice}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more such fields" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- dtypes


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype for weights from a dtype or its name; None for "auto", which leaves it to the checkpoint.

    Raises `ConfigError` for an unknown name and for what is not floating point.

    >>> as_dtype("bfloat16"), as_dtype("auto")
    (torch.bfloat16, None)
    """
    if dtype is None or dtype == "auto":
        return None
    known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if known not in FLOATS:
        given = repr(dtype) if isinstance(dtype, str) else str(dtype)
        raise ConfigError(
            f"dtype={given} is not one that weights can have here; expected {', '.join(map(_name, FLOATS))} (the name or "
            "torch's dtype), or \"auto\" for the checkpoint's own."
        )
    return known
