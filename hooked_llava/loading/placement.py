"""Where the parts of a model go: on one device, or on several, as a user says or as accelerate plans it.

What runs as one step lies together: a block, the embedding of the vision tower, the projector.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hooked_llava.checks import one_of
from hooked_llava.errors import ConfigError, did_you_mean
from hooked_llava.loading.packed import KeepsPacked

Place: TypeAlias = str | int | torch.device
DeviceMap: TypeAlias = Place | Mapping[str, Place]
"""A plan of accelerate's by its name, one device, or a device for each part of the model by the part's name."""

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate plans. "auto" and "balanced" give every accelerator about the same share."""
_WHOLE = ("Block", "ParallelBlock", "Projector", "PoolingHead")
"""Classes of modules that accelerate must not split."""
_PART = re.compile(
    r"(language|vision)\.blocks\.\d+|language\.\w+|vision\.(ln_post|head)|projector|image_newline|(?P<embedding>vision)"
)


def placed(
    model: nn.Module,
    names: Iterable[str],
    device_map: DeviceMap,
    *,
    dtype: torch.dtype,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> dict[str, torch.device]:
    """The device of every tensor of a model that is built on the meta device.

    Args:
        model: the model, without weights.
        names: of its tensors.
        device_map: a plan of accelerate's ("auto", "balanced", "balanced_low_0", "sequential"), a device for all of it, or a
            device for each part, such as {"": 0, "language.blocks.3": 1}; the longest name that fits counts.
        dtype: of the weights that are not packed, for their size. Those in 8 or 4 bits count as the model keeps them.
        max_memory: bytes for each device, as accelerate takes them: {0: "20GiB", 1: "20GiB", "cpu": "60GiB"}.

    Raises `ConfigError` for another plan, a part that there is not or that has no device, a block on several devices, and for
    parts on disk.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = placed(model, model.state_dict(), {"": "cpu", "language.blocks.3": "meta"}, dtype=model.cfg.dtype)
    Traceback (most recent call last):
    hooked_llava.errors.ConfigError: device_map= puts 'language.blocks.3' on 'meta'; ...
    """
    names = list(names)
    if isinstance(device_map, Mapping):
        found = {name: _device_of(name, device_map) for name in names}
        _check_parts(device_map, names)
        check_whole(found, "device_map=")
        return found
    if not isinstance(device_map, str) or _is_device(device_map):
        return dict.fromkeys(names, _device("", device_map))
    one_of(
        device_map,
        PLANS,
        "device_map",
        expected=f"one of {', '.join(PLANS)}, a device, or a dict of devices",
        error=ConfigError,
    )
    plan = _planned(model, device_map, dtype, max_memory)
    by_part: dict[str, torch.device] = {}  # accelerate may cut the vision tower's embedding, which is small
    for name in names:
        by_part.setdefault(_part(name), _device_of(name, plan))
    return {name: by_part[_part(name)] for name in names}


def check_whole(devices: Mapping[str, torch.device], what: str) -> None:
    """Raises `ConfigError` where tensors of one part, by their names, lie on several devices; `what` put them there."""
    by_part: dict[str, set[str]] = defaultdict(set)
    for name, device in devices.items():
        by_part[_part(name)].add(str(device))
    for part, several in by_part.items():
        if len(several) > 1:
            raise ConfigError(
                f"{what} puts {part!r} on several devices ({', '.join(sorted(several))}); expected all of it on one. Give its "
                'device to the whole of it; device_map="auto" plans so.'
            )


def _part(name: str) -> str:
    """What runs as one step, and lies together."""
    found = _PART.match(name)
    assert found is not None, name
    return found.group()


def _planned(
    model: nn.Module, plan: str, dtype: torch.dtype, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, Place]:
    try:
        from accelerate.utils import get_balanced_memory, infer_auto_device_map
    except ImportError as error:
        raise ImportError(
            f"device_map={plan!r} needs the package accelerate, which is not installed: pip install 'hooked_llava[devices]'."
        ) from error
    dtypes = _dtypes(model, dtype)
    options: dict[str, Any] = {"no_split_module_classes": list(_WHOLE), "special_dtypes": dtypes}
    memory = None if max_memory is None else dict(max_memory)
    if plan != "sequential":
        memory = get_balanced_memory(model, memory, low_zero=plan == "balanced_low_0", **options)
    found = infer_auto_device_map(model, memory, **options)
    if "disk" in found.values():
        size = sum(x.numel() * dtypes.get(name, x.dtype).itemsize for name, x in _tensors(model)) / 1e9
        given = ", ".join(f"{device}: {n}" for device, n in (memory or {}).items())
        raise ConfigError(
            f"device_map={plan!r}: the model takes {size:.3g} GB in {_precision(model, dtype)} and does not fit into "
            f"memory ({given}); parts on disk cannot be run. Load it in fewer bits (dtype= or quantization_config=), or "
            "give more max_memory=."
        )
    return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor in floating point will be in: that dtype, but the scales of packed weights stay as they are."""
    kept: set[str] = set()
    for path, module in model.named_modules():
        names = [name for name, _ in _tensors(module) if name != "bias"]
        kept |= {f"{path}.{name}" for name in names if isinstance(module, KeepsPacked)}
    return {name: x.dtype if name in kept else dtype for name, x in _tensors(model) if x.is_floating_point()}


def _precision(model: nn.Module, dtype: torch.dtype) -> str:
    """Words for what the weights are in: "bfloat16", or "4 bits and bfloat16"."""
    bits = {f"{module.bits} bits" for module in model.modules() if isinstance(module, KeepsPacked)}
    return " and ".join((*sorted(bits), str(dtype).removeprefix("torch.")))


def _device_of(name: str, device_map: Mapping[str, Place]) -> torch.device:
    """The device that the longest name in the map that fits gives a tensor."""
    parts = name.split(".")
    for n in range(len(parts), -1, -1):
        part = ".".join(parts[:n])
        if part in device_map:
            return _device(part, device_map[part])
    raise ConfigError(
        f"device_map= has no device for {name!r}; expected one for each part. Name the part, or give a device for all "
        'others under the name "".'
    )


def _check_parts(device_map: Mapping[str, Place], names: list[str]) -> None:
    for part in device_map:
        if part and not any(name == part or name.startswith(f"{part}.") for name in names):
            known = dict.fromkeys(_part(name) for name in names)
            raise ConfigError(
                f"device_map= names {part!r}, and the model has no such part.{did_you_mean(part, known)} Parts are called "
                "'vision', 'projector', 'language.embed', 'language.blocks.0', ..., 'language.ln_final', 'language.unembed'."
            )


def _device(part: str, given: Place) -> torch.device:
    if isinstance(given, int) and not torch.accelerator.is_available():
        given = f"cuda:{given}"
    device = torch.device(given) if not isinstance(given, str) or _is_device(given) else None
    if device is None or device.type == "meta":
        raise ConfigError(
            f"device_map= puts {part or 'all'!r} on {given!r}; expected a device with memory, such as 0, 'cuda:1' or 'cpu'. "
            "Parts on disk cannot be run."
        )
    return device


def _is_device(given: str) -> bool:
    try:
        torch.device(given)
    except RuntimeError:
        return False
    return True
