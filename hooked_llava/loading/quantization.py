"""Which weights are kept in 8 or 4 bits, and how: as transformers' `BitsAndBytesConfig` says, or as a checkpoint was saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import TIED, our_name
from hooked_llava.errors import ConfigError
from hooked_llava.loading.packed import BITSANDBYTES, CODES, SCALES, PackedWeight, is_bitsandbytes, packed_layers
from hooked_llava.loading.weights import WeightFiles

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig

QuantizationLike: TypeAlias = "BitsAndBytesConfig | Mapping[str, Any] | None"
_GIVEN = "quantization_config"
_FIELDS = (
    *("load_in_8bit", "load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_has_fp16_weight"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    "llm_int8_enable_fp32_cpu_offload",
)
_EXPECTED = "expected a BitsAndBytesConfig of transformers with load_in_8bit=True or load_in_4bit=True"
_INSTALL = "Install them: pip install 'hooked_llava[quantized]'."


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are packed.

    Attributes:
        config (BitsAndBytesConfig): In how many bits, and which layers not.
        packed (Mapping[str, PackedWeight] | None): Weights in memory that are packed already, by our names.
        stored (tuple[str, ...]): The weights that a checkpoint's files hold packed, by Hugging Face's names.
    """

    config: BitsAndBytesConfig
    packed: Mapping[str, PackedWeight] | None = None
    stored: tuple[str, ...] = ()

    def names(self, hf_config: PreTrainedConfig, config: LLaVAConfig) -> list[str]:
        """Our names of the weights that are packed: those that are already, or those that transformers would pack.

        Raises `ConfigError` where the unembedding is among them and is the embedding, which is looked up.
        """
        if self.packed is not None:
            return list(self.packed)
        chosen = self.stored or _chosen_by_transformers(hf_config, self.config)
        names = [ours for name in chosen if (ours := our_name(name, config)) is not None]
        if TIED in names and config.language.tied_embeddings:
            raise ConfigError(
                "The unembedding would be quantized, but it is the embedding (tie_word_embeddings), which is looked up. Leave "
                'llm_int8_skip_modules out of the quantization_config, or put "lm_head" into it.'
            )
        return names


def as_quantization(
    given: QuantizationLike, hf_config: PreTrainedConfig, files: WeightFiles
) -> tuple[Quantization | None, WeightFiles]:
    """How a checkpoint is to be quantized, as asked for or as it was saved (None: not at all), and its files.

    Raises `ConfigError` for a config of another method, for what it may ask that is not done here, for a checkpoint that
    is quantized already, and where bitsandbytes is not installed.
    """
    saved = getattr(hf_config, _GIVEN, None)
    if saved is None and given is None:
        return None, files
    if saved is not None and given is not None:
        raise ConfigError(
            f"{_GIVEN}={_shown(given)} is given, but the checkpoint is quantized already ({_shown(saved)}). Leave it out."
        )
    config = copy.copy(_checked(saved if given is None else given))
    if given is not None and config.llm_int8_enable_fp32_cpu_offload:
        raise ConfigError(
            f"{_GIVEN} has llm_int8_enable_fp32_cpu_offload=True, with which transformers leaves what lies on the CPU unpacked. "
            "Here it is packed and runs on the CPU as well. Leave it out, and name in llm_int8_skip_modules what is to stay "
            "as it is."
        )
    config.bnb_4bit_quant_storage = torch.uint8  # as it is kept here, and saved
    hf_config.quantization_config = config
    files = files if saved is None else files.with_packed()
    return Quantization(config, stored=tuple(files.parts)), files


def quantization_of(hf_model: nn.Module, config: LLaVAConfig) -> Quantization | None:
    """How a model of transformers in memory is quantized, its packed weights shared; None where it is not.

    On a CPU with bfloat16 instructions bitsandbytes rearranges weights in 4 bits when they are first used: those are copied.
    """
    saved = getattr(hf_model.config, _GIVEN, None)
    layers = {our_name(f"{path}.weight", config): layer for path, layer in packed_layers(hf_model).items()}
    if saved is None or not layers:
        return None
    dtype: Any = hf_model.dtype
    packed = {name: _packed(layer, dtype) for name, layer in layers.items() if name is not None}
    return Quantization(_checked(saved), packed)


def _packed(layer: Any, dtype: torch.dtype) -> PackedWeight:
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # it moves there in the first forward pass
        return PackedWeight({CODES: weight.data, SCALES: scales}, dtype)
    codes, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = _in_order(codes, state)
    parts: dict[str, Tensor] = state.as_dict(packed=True)
    return PackedWeight({CODES: codes, **{f"{CODES}.{name}": part for name, part in parts.items()}}, dtype)


def _in_order(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Copies of codes and state in the order of the weight, from that of the kernels of some CPUs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

    state = copy.copy(state)
    # Their scales are kept unpacked, and not in the order in which it would pack them again.
    state.original_nested = False
    codes, state = inverse(codes, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return codes, state


def _checked(given: QuantizationLike) -> BitsAndBytesConfig:
    """The config, as a `BitsAndBytesConfig`."""
    from transformers import BitsAndBytesConfig

    if isinstance(given, Mapping) and is_bitsandbytes(given):
        try:
            given = BitsAndBytesConfig(**{name: value for name, value in given.items() if name in _FIELDS})
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{_GIVEN}={_shown(given)} is none that transformers reads ({error}); {_EXPECTED}."
            ) from error
    if not isinstance(given, BitsAndBytesConfig):
        raise ConfigError(
            f"{_GIVEN}={_shown(given)} is not of a method that is supported; {_EXPECTED}. Models of other methods (GPTQ, "
            "AWQ, torchao, ...) do not load: use the checkpoint that they were quantized from."
        )
    if not given.load_in_8bit and not given.load_in_4bit:
        raise ConfigError(f"{_GIVEN} has load_in_8bit=False and load_in_4bit=False; {_EXPECTED}, or leave it out.")
    if given.load_in_8bit and given.llm_int8_has_fp16_weight:
        raise ConfigError(
            f"{_GIVEN} has llm_int8_has_fp16_weight=True, which keeps weights in 16 bits and packs them in every pass; "
            f"{_EXPECTED} and without it."
        )
    if find_spec(BITSANDBYTES) is None:
        raise ConfigError(
            f"{_GIVEN}={_shown(given)} needs the package bitsandbytes, which is not installed. {_INSTALL}"
        )
    return given


def _chosen_by_transformers(hf_config: PreTrainedConfig, quantization: BitsAndBytesConfig) -> list[str]:
    """The weights that transformers packs, asked of a model of its own without memory for weights."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers import AutoHfQuantizer

    plain = copy.deepcopy(hf_config)
    vars(plain).pop(_GIVEN, None)
    with torch.device("meta"):
        hf_model = AutoModelForImageTextToText.from_config(plain)
    before = {path for path, module in hf_model.named_modules() if type(module) is nn.Linear}
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=hf_model, device_map={})
    return [f"{path}.weight" for path in sorted(before) if type(hf_model.get_submodule(path)) is not nn.Linear]


def _shown(given: object) -> str:
    """A config in few words."""
    if isinstance(given, Mapping):
        return str(dict(given))
    if not hasattr(given, "quant_method"):
        return repr(given)
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(given, name, False)]
    return f"{type(given).__name__}({', '.join(f'{name}=True' for name in bits)})"
