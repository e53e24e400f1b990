"""TransformerLens's ActivationCache, with views of the image, the text and the vision tower, and files."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities import get_act_name

from hooked_llava.architecture.hooks import Hook, HookTable
from hooked_llava.architecture.missing_hooks import SIDE_BY_SIDE
from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.errors import HookNameError, InputError, SpanError, did_you_mean
from hooked_llava.model.components.block import Blocks
from hooked_llava.model.tl_protocol import ConfigView, sum_biases
from hooked_llava.model.vision import VisionTower
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.storage import read_tensors, write_tensors

_FORMAT = "hooked_llava.cache.v1"


@runtime_checkable
class CachedModel(Protocol):
    """What a cache asks of its model, besides what TransformerLens's methods ask."""

    hooks_table: HookTable
    vision: VisionTower

    @property
    def cfg(self) -> ConfigView:
        """Sizes of the model, and its name."""
        ...

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where its weights lie."""
        ...


class _AtHome:
    """A model on several devices, or a part of one, as ActivationCache's methods see it: on one, where the cache is."""

    def __init__(self, part: Any, home: torch.device) -> None:
        self.part, self._home = part, home

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle probe for these before there is a part
            raise AttributeError(name)
        return self._brought(getattr(self.part, name))

    def __getitem__(self, index: int) -> Any:
        return self._brought(self.part[index])

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x.to(next(self.part.parameters()).device)).to(self._home)

    def _brought(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            return found.to(self._home)
        return _AtHome(found, self._home) if isinstance(found, nn.Module) else found


@dataclass(frozen=True)
class _VisionModel:
    """The vision tower as ActivationCache's methods see a model: only the blocks that were run."""

    cfg: TowerConfig
    blocks: Blocks
    home: torch.device

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        return sum_biases(self.blocks, layer, mlp_input, include_mlp_biases).to(self.home)


def _without_middle(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of TransformerLens that refuses to read between attention and MLP where a block has nothing there."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(self: NamedCache, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        asked = [name for name in ("mlp_input", "incl_mid") if given.get(name)]
        if asked and self.model.cfg.parallel_attn_mlp:
            raise InputError(
                f"{method.__name__}({asked[0]}=True) needs the residual stream between attention and MLP, and "
                f"{SIDE_BY_SIDE}. Leave {asked[0]} out."
            )
        return method(self, *args, **kwargs)

    return checked


class NamedCache(ActivationCache):
    """TransformerLens's cache, with our other names, and an error that says what is missing."""

    aliases: Mapping[str, str] = MappingProxyType({})

    accumulated_resid = _without_middle(ActivationCache.accumulated_resid)
    decompose_resid = _without_middle(ActivationCache.decompose_resid)
    stack_neuron_results = _without_middle(ActivationCache.stack_neuron_results)
    apply_ln_to_stack = _without_middle(ActivationCache.apply_ln_to_stack)
    get_full_resid_decomposition = _without_middle(ActivationCache.get_full_resid_decomposition)

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        name, layer, *rest = (key, None) if isinstance(key, str) else (*key, None)
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        full_name = get_act_name(name, layer, rest[0] if rest else None)
        full_name = self.aliases.get(full_name, full_name)
        if full_name not in self.cache_dict:
            wanted = key if isinstance(key, str) else " ".join(map(str, key))
            if (of_sae := self._of_autoencoder(full_name, wanted)) is not None:
                return self.cache_dict[of_sae]
            raise HookNameError(
                f"{wanted!r} is not in this cache of {len(self)} activations.{did_you_mean(wanted, self.cache_dict)} "
                "cache.keys() lists them; name it in names_filter to cache it."
            )
        return self.cache_dict[full_name]

    def _of_autoencoder(self, short: str, wanted: str) -> str | None:
        """The held activation of an autoencoder that "blocks.2.hook_sae_acts" means, wherever in the block it is attached.

        It is looked up among what is held, since a cache outlives the autoencoder. Raises `HookNameError` for several.
        """
        block, _, site = short.rpartition("hook_sae_")
        held = [
            name
            for name in self.cache_dict
            if name.endswith(f".hook_sae_{site}") and name.startswith(block) and not name.startswith("vision.")
        ]
        if len(held) > 1:
            raise HookNameError(f"{wanted!r} means {len(held)} activations of this cache: {', '.join(held)}. Name one.")
        return held[0] if held else None


class LLaVACache(NamedCache):
    """Activations of one forward pass by hook name, with all of ActivationCache's methods.

    `cache["pattern", 3]`, `cache["blocks.3.attn.hook_z"]` and `cache["projector.hook_out"]` give tensors;
    `cache.vision["pattern", 3]` those of the vision tower; `cache.image[...]` and `cache.text[...]` the same tensors
    of the language tower cut to the image's or the text's positions (scores and pattern: cut along the keys).
    `token_maps` are those of the prompts, where they are known; `some_positions` says that only some are held.
    """

    model: CachedModel

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: CachedModel,
        *,
        has_batch_dim: bool = True,
        spans: dict[str, Int[Tensor, " n_positions"]] | None = None,
    ) -> None:
        at_home = isinstance(model, _AtHome) or len(model.devices) == 1
        super().__init__(
            cache_dict, model if at_home else _AtHome(model, model.cfg.device), has_batch_dim=has_batch_dim
        )  # type: ignore[arg-type]
        self.spans = spans or {}
        self.token_maps: tuple[TokenMap, ...] | None = None
        self.some_positions = False
        self.aliases = model.hooks_table.aliases

    def __contains__(self, key: object) -> bool:
        return key in self.cache_dict

    def __repr__(self) -> str:
        gigabytes = sum(t.numel() * t.element_size() for t in self.values()) / 1e9
        return f"LLaVACache({len(self)} activations, {gigabytes:.3g} GB)"

    def _hook(self, name: str) -> Hook:
        return self.model.hooks_table[name.removesuffix("_grad")]

    def _batch_size(self) -> int:
        """Number of prompts; the leading axis of the image side's activations counts tiles or images."""
        return next((t.shape[0] for name, t in self.items() if not self._hook(name).on_image_side), 1)

    def remove_batch_dim(self, batch_size: int | None = None) -> LLaVACache:
        """Drop the axis of prompts, where there is one; activations of the image side keep their tiles and images."""
        kept = {name: t for name, t in self.items() if self._hook(name).on_image_side}
        super().remove_batch_dim(batch_size)
        self.cache_dict.update(kept)
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> LLaVACache:
        """A cache of some prompts; activations of the image side are left as they are."""
        language = {name: t for name, t in self.items() if not self._hook(name).on_image_side}
        sliced = ActivationCache(language, self.model, has_batch_dim=self.has_batch_dim)
        sliced = sliced.apply_slice_to_batch_dim(batch_slice)
        held = {**self.cache_dict, **sliced.cache_dict}
        return LLaVACache(held, self.model, has_batch_dim=sliced.has_batch_dim, spans=self.spans)

    @property
    def vision(self) -> NamedCache:
        """The vision tower's activations under their names without `vision.`, tiles on the batch axis."""
        spread = isinstance(self.model, _AtHome)
        tower, home = (self.model.part if spread else self.model).vision, self.model.cfg.device
        model = _VisionModel(replace(tower.cfg, n_layers=tower.cfg.n_layers_run), tower.blocks, home)
        held = {name.removeprefix("vision."): t for name, t in self.items() if self._hook(name).tower == "vision"}
        if not held:
            raise HookNameError("This cache holds nothing of the vision tower; name 'vision.*' in names_filter.")
        view = NamedCache(held, _AtHome(model, home) if spread else model)
        view.aliases = {a.removeprefix("vision."): full.removeprefix("vision.") for a, full in self.aliases.items()}
        view.has_pos_embed = False  # positions are part of hook_embed already, which is taken after the pre-norm
        return view

    @property
    def image(self) -> LLaVACache:
        """The language tower's activations at the image positions only."""
        return self._cut("image")

    @property
    def text(self) -> LLaVACache:
        """The language tower's activations at the text positions only."""
        return self._cut("text")

    def _cut(self, span: str) -> LLaVACache:
        if span not in self.spans:
            raise SpanError(
                f"This cache has no {span} positions: either the prompts have none, or they differ from row to row, or "
                "only some positions were kept. Run one prompt at a time, with all positions."
            )
        positions = self.spans[span]
        held = {}
        for name, tensor in self.items():
            hook = self._hook(name)
            if hook.on_image_side:
                continue
            axes = hook.axes
            axis = axes.index("key" if "key" in axes else "pos") - len(axes)
            held[name] = tensor.index_select(axis, positions.to(tensor.device))
        return LLaVACache(held, self.model, has_batch_dim=self.has_batch_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all activations to one safetensors file; nothing half-written stays.

        Raises `InputError` for a folder that is not there.
        """
        about = {
            "has_batch_dim": json.dumps(self.has_batch_dim),
            "model": str(self.model.cfg.model_name),
            "spans": json.dumps({name: positions.tolist() for name, positions in self.spans.items()}),
        }
        # Neighboring hooks share storage, which the format refuses, so each tensor is written on its own.
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.items()}
        write_tensors(path, tensors, about, _FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: CachedModel) -> LLaVACache:
        """Read a cache that `save` wrote; raises `CheckpointError` for any other file."""
        tensors, about = read_tensors(path, [_FORMAT], writer="LLaVACache.save")
        spans = {name: torch.tensor(positions) for name, positions in json.loads(about["spans"]).items()}
        return cls(tensors, model, has_batch_dim=json.loads(about["has_batch_dim"]), spans=spans)
