"""The parts of a model and their sizes, on one screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.model.components.quantized import quantized_linears

_COLUMNS = ("part", "kind", "layers", "heads", "d_head", "d_model", "d_mlp", "parameters", "dtype", "device")


def format_columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, every column as wide as its widest cell.

    >>> format_columns([("part", "layers"), ("language", "6")])
    ['part      layers', 'language  6']
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(model: nn.Module, config: LLaVAConfig) -> str:
    """The parts with their sizes, read from the config; parameters, dtype and device from the weights."""
    vision, projector, language = config.vision, config.projector, config.language
    kinds = {"vision": vision.model_type, "projector": projector.act_fn, "language": language.model_type}
    sizes = {
        "vision": _tower(vision),
        "projector": ("", "", "", str(projector.d_model), ""),
        "language": _tower(language),
    }
    rows = [(part, kind, *sizes[part], *_weights(getattr(model, part))) for part, kind in kinds.items()]
    rows.append(("all", config.model_type, "", "", "", "", "", *_weights(model)))
    side, (patch_rows, patch_columns) = vision.image_size, vision.patch_grid
    states = ", ".join(str(layer) for layer in vision.feature_layers)
    return "\n".join(
        [
            f"{type(model).__name__}({config.model_name!r})",
            *(f"  {line}" for line in format_columns([_COLUMNS, *rows])),
            f"  image: tiles of {side} x {side} pixels, {'a' if vision.class_token else 'no'} class token and "
            f"{patch_rows} x {patch_columns} patches; features from the tower's hidden "
            f"state{'s' * (len(vision.feature_layers) > 1)} {states}",
            f"  text: {language.d_vocab:,} tokens in the vocabulary, prompts of up to {language.n_ctx:,} positions",
        ]
    )


def _tower(cfg: TowerConfig) -> tuple[str, ...]:
    layers = str(cfg.n_layers) if cfg.n_layers_run == cfg.n_layers else f"{cfg.n_layers} ({cfg.n_layers_run} run)"
    grouped = f" ({cfg.n_key_value_heads} kv)" if cfg.n_key_value_heads != cfg.n_heads else ""
    return layers, f"{cfg.n_heads}{grouped}", str(cfg.d_head), str(cfg.d_model), str(cfg.d_mlp)


def _weights(part: nn.Module) -> tuple[str, str, str]:
    """Number of parameters, their dtypes and their devices."""
    packed = quantized_linears(part)
    inside = {id(held) for linear in packed.values() for name, held in linear.named_parameters() if name != "bias"}
    weights = [weight for weight in part.parameters() if id(weight) not in inside]  # a tied embedding is counted once
    n = sum(weight.numel() for weight in weights)
    n += sum(linear.in_features * linear.out_features for linear in packed.values())
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights}
    dtypes |= {f"{linear.bits} bits" for linear in packed.values()}
    devices = sorted({str(weight.device) for weight in part.parameters()})
    return f"{n:,}", "/".join(sorted(dtypes)), "/".join(devices)
