"""How functions are attached to the hooks of a model, and how its activations are kept.

TransformerLens's `HookedRootModule` with four differences: names may be globs or short names and are checked before
anything is attached; a context removes exactly what it added; the cache is a `LLaVACache`; nothing leaves gradients on
the weights.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformers import GenerationConfig

from hooked_llava.architecture.hooks import NO_IMAGE, HookTable, NamesFilter
from hooked_llava.errors import HookNameError, InputError
from hooked_llava.machine.devices import keeper
from hooked_llava.model.attached_sae import AttachedSAE, Autoencoder, check_sae
from hooked_llava.model.cache import LLaVACache
from hooked_llava.model.cache_hooks import caching_hook, shared_spans, tensor_bytes
from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.hook_point import HookPoint, has_functions
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.quantized import like_weight
from hooked_llava.model.projector import Projector
from hooked_llava.model.prompt_hooks import HookEntry, PromptHook, as_hook, placing
from hooked_llava.model.request import ForwardRequest, forward_request
from hooked_llava.model.tl_protocol import TransformerLensSurface
from hooked_llava.model.vision import VisionTower
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.where import PositionsLike, resolve_positions


class HookedModule(TransformerLensSurface, HookedRootModule, ABC):
    """The base of `HookedLLaVA`: hooks, caches and runs, for a model of three parts whose hooks a `HookTable` lists.

    The abstract methods are what these, generation and `verify` ask of the model's own computation.
    """

    hooks_table: HookTable
    vision: VisionTower
    projector: Projector
    generation_config: GenerationConfig | None
    hook_dict: dict[str, HookPoint]

    @abstractmethod
    def as_inputs(self, value: InputsLike) -> Inputs:
        """Whatever a user gives as input, checked."""

    @abstractmethod
    def embed(self, inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
        """What enters the language tower: token embeddings, with the image embeddings at the image positions."""

    @abstractmethod
    def context(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Bool[Tensor, "batch key"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        kv_cache: KVCache | None = None,
    ) -> AttentionContext:
        """What attention needs for these positions."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the weights lie: the first is `cfg.device`, where tokens come in and logits come out.

        >>> from hooked_llava import HookedLLaVA
        >>> HookedLLaVA.from_pretrained("tiny-shapes").devices
        (device(type='cpu'),)
        """
        language, vision = self.language, self.vision
        weights = (language.embed.weight, vision.patch_embed.weight, like_weight(self.projector.linear_in))
        ends = (language.ln_final.weight, like_weight(language.unembed))
        blocks = (block.device for block in (*vision.blocks, *language.blocks))
        return tuple(dict.fromkeys((*(weight.device for weight in (*weights, *ends)), *blocks)))

    def setup(self) -> None:
        """Name the hook points: the language tower's without a prefix, and none in blocks that are not run."""
        points = {
            path.removeprefix("language."): module
            for path, module in self.named_modules()
            if isinstance(module, HookPoint)
        }
        self.hook_dict = {name: points[name] for name in self.hooks_table.names}
        self.mod_dict = {path.removeprefix("language."): module for path, module in self.named_modules() if path}
        for name, point in self.hook_dict.items():
            point.name = name
        self._prompt_hooks: list[tuple[str, PromptHook]] = []

    def add_hook(self, name: NamesFilter, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Attach a function to every hook that the filter names, until `reset_hooks`; raises `HookNameError`."""
        for full_name in self.hooks_table.resolve(name):
            self.hook_dict[full_name].add_hook(hook, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[HookEntry] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Functions and `Intervention`s attached inside the block; at its end exactly those are removed, exceptions included.

        An entry of `fwd_hooks` is (names, function), the function fn(tensor) or fn(tensor, hook), or an `Intervention`, which
        is placed in the prompt of every pass that begins in the block. Names are resolved before anything is attached, so a
        misspelt one (`HookNameError`) leaves no trace.
        """
        entries = [as_hook(entry, self) for entry in fwd_hooks]
        table = self.hooks_table
        wanted: list[tuple[str, Callable[..., Any], Literal["fwd", "bwd"]]] = [
            *((name, fn, "fwd") for names, fn in entries for name in table.resolve(names)),
            *((name, fn, "bwd") for names, fn in bwd_hooks for name in table.resolve(names)),
        ]
        PromptHook.prepare_all([fn for _, fn in entries])
        attached = []
        self.context_level += 1
        try:
            for name, fn, direction in wanted:
                point = self.hook_dict[name]
                attached.append((point, direction, point.add_hook(fn, direction, level=self.context_level)))
                if isinstance(fn, PromptHook):
                    self._prompt_hooks.append((name, fn))
            yield self
        finally:
            self.context_level -= 1
            if reset_hooks_end:
                for point, direction, handle in attached:
                    handle.hook.remove()
                    held = point.fwd_hooks if direction == "fwd" else point.bwd_hooks
                    held[:] = [other for other in held if other is not handle]
                    if clear_contexts:
                        point.clear_context()
                self._forget_detached()

    @contextmanager
    def attach_sae(
        self, sae: Autoencoder, hook: Any = None, *, keep_error: bool = True, any_model: bool = False
    ) -> Iterator[Self]:
        """A sparse autoencoder in the place of a hook, inside the block: its features become hooks like any other.

        `<hook>.hook_sae_acts` [..., d_sae] holds all features, `<hook>.hook_sae_pre` the same before the largest are chosen,
        and `<hook>.hook_sae_error` what the features leave unexplained. They can be cached, changed and replayed (short names
        "sae_acts", "sae_pre", "sae_error"). Functions on the hook itself come before them.
        Several autoencoders may be attached, one to each hook.

        Args:
            sae: the autoencoder.
            hook: any name of the hook; by default the one that the autoencoder was trained on.
            keep_error: add what the features leave unexplained, so that attaching changes nothing; otherwise the
                reconstruction takes the activation's place.
            any_model: take an autoencoder that was trained on a model of another name.

        Raises `InputError` for a hook of another width, for another hook or model than the autoencoder was trained on, and
        for a hook that has one already.
        """
        name = check_sae(sae, hook, self.hooks_table, None if any_model else self.config.model_name)
        attached = AttachedSAE(sae, keep_error=keep_error)
        points = dict(zip(self.hooks_table.add_sae(name, sae.cfg.d_sae), attached.points, strict=True))
        for point_name, point in points.items():
            point.name = point_name
        before, self.hook_dict = self.hook_dict, {n: (self.hook_dict | points)[n] for n in self.hooks_table.names}
        before[name].then = attached
        try:
            yield self
        finally:
            before[name].then = None
            self.hooks_table.remove_sae(name)
            for point_name in points:
                del self.hook_dict[point_name]
            self._forget_detached()

    def _forget_detached(self) -> None:
        """Keep only prompt hooks whose function is still attached; `reset_hooks` may have removed some."""
        self._prompt_hooks = [
            (name, fn)
            for name, fn in self._prompt_hooks
            if name in self.hook_dict and any(held.user_hook is fn for held in self.hook_dict[name].fwd_hooks)
        ]

    @contextmanager
    def placing(self, inputs: Inputs | None, n_new: int = 0) -> Iterator[None]:
        """Bind the attached `Intervention`s to the prompts of one pass (None: a pass over a residual stream).

        In generation `n_new` is how many tokens were generated so far, and the pass is over the newest of them; 0 for
        a pass over the prompt. Raises `InputError` or `SpanError` for interventions that do not fit, before the pass.
        """
        if not self._prompt_hooks:
            yield
            return
        self._forget_detached()
        with placing([fn for _, fn in self._prompt_hooks], inputs, n_new):
            yield

    def run_with_hooks(
        self,
        inputs: InputsLike | None = None,
        *,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[HookEntry] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """`forward` with functions and `Intervention`s attached for this run, as by `hooks`; `kwargs` go to `forward`.

        Raises `HookNameError` for hooks that are not there or do not fire in this run, `InputError` and `SpanError` for
        interventions that do not fit the prompt, and `InputError` for backward functions that would be gone before any
        backward pass.
        """
        if bwd_hooks and reset_hooks_end:
            raise InputError(
                "bwd_hooks would be removed at the end of this run, before a backward pass. Use `with model.hooks("
                "bwd_hooks=...)` around both, or reset_hooks_end=False and model.reset_hooks() afterwards."
            )
        request = self.request(inputs, **kwargs)
        fwd_hooks = self._entries(fwd_hooks, request)
        bwd_hooks = [(self.hooks_table.resolve(names, **request.fires), fn) for names, fn in bwd_hooks]
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(request)

    def run_with_cache(
        self,
        inputs: InputsLike | None = None,
        *,
        names_filter: NamesFilter = None,
        fwd_hooks: Sequence[Any] = (),
        positions: PositionsLike | None = None,
        device: torch.device | str | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        incl_bwd: bool = False,
        metric: Callable[[Tensor], Tensor] | None = None,
        remove_batch_dim: bool = False,
        return_cache_object: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor | None, LLaVACache | dict[str, Tensor]]:
        """The forward's result and a cache of the activations that `names_filter` asks for (all but the large ones by default).

        Args:
            inputs: as for `forward`.
            names_filter: name, glob, short name, (short name, layer), list of these, or function of the full name.
            fwd_hooks: functions and `Intervention`s for this run, as for `run_with_hooks`; what they change is cached changed.
            positions: keep only these sequence positions of the language tower's activations (query rows of pattern).
            device: where to keep the activations, moved there as they come; by default the first device, `model.cfg.device`.
            offload_folder: keep them on disk instead, in files of this folder that go with them; what is read comes into memory.
            incl_bwd: also cache gradients, under name + "_grad", of the result (or of `metric(result)`), which must be a scalar.
            metric: function from the result to a scalar, for `incl_bwd`.
            remove_batch_dim: drop the batch axis; for one prompt only.
            return_cache_object: `LLaVACache`, or a plain dict.
            kwargs: go to `forward`.

        Raises `HookNameError` for a filter that matches nothing or a hook that does not fire in this run, `InputError`
        for input that does not fit.
        """
        if metric is not None and not incl_bwd:
            raise InputError("metric= says what gradients are taken of; give incl_bwd=True with it, or leave it out.")
        keep = keeper(self.cfg.device if device is None and offload_folder is None else device, offload_folder)
        request = self.request(inputs, **kwargs)
        prompt, n_prompts = request.prompt, len(request.begin)
        if remove_batch_dim and n_prompts != 1:
            raise InputError(f"remove_batch_dim=True needs one prompt, got {n_prompts}. Leave it out for a batch.")
        names = self.hooks_table.resolve(names_filter, **request.fires)
        fwd_hooks = self._entries(fwd_hooks, request)
        index = None if positions is None else resolve_positions(positions, request.begin)
        store: dict[str, Tensor] = {}
        fwd = caching_hook(store, self, index, keep)
        bwd = caching_hook(store, self, index, keep, suffix="_grad")
        with (
            torch.set_grad_enabled(incl_bwd),
            self.hooks([*fwd_hooks, (names, fwd)], [(names, bwd)] if incl_bwd else []),
        ):
            result = self(request)
            if incl_bwd:
                result = _backward(result, metric)
        if not return_cache_object:
            return result, store
        cache = self._cache_of(store, prompt, some_positions=index is not None)
        if remove_batch_dim:
            cache.remove_batch_dim(batch_size=1)
        return result, cache

    def _cache_of(self, store: dict[str, Tensor], prompt: Inputs | None, *, some_positions: bool) -> LLaVACache:
        spans = {} if prompt is None or some_positions else shared_spans(prompt)
        cache = LLaVACache(store, self, spans=spans)
        cache.some_positions = some_positions
        cache.token_maps = None if prompt is None else prompt.token_maps
        return cache

    def add_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """TransformerLens's caching, attached until `reset_hooks`, with our filters; raises `HookNameError`."""
        names = frozenset(self.hooks_table.resolve(names_filter))
        return super().add_caching_hooks(lambda name: name in names, *args, **kwargs)

    def get_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> tuple[dict, list, list]:
        """TransformerLens's caching, as functions for `hooks`, with our filters; raises `HookNameError`."""
        names = frozenset(self.hooks_table.resolve(names_filter))
        return super().get_caching_hooks(lambda name: name in names, *args, **kwargs)

    def cache_size(
        self, inputs: InputsLike, names_filter: NamesFilter = None, positions: PositionsLike | None = None
    ) -> int:
        """Bytes that `run_with_cache` would keep, without running the model (neighbors that share storage counted each).

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> model.cache_size("USER: Who made the star? ASSISTANT:", ("resid_pre", 0)) % (4 * model.cfg.d_model)
        0
        """
        prompt = self.as_inputs(inputs)
        n_kept = prompt.shape[1] if positions is None else resolve_positions(positions, prompt).shape[1]
        names = self.hooks_table.resolve(names_filter, with_image=prompt.pixel_values is not None)
        return sum(tensor_bytes(self.hooks_table, name, prompt, n_kept, self.hook_dtype(name)) for name in names)

    def hook_dtype(self, name: str) -> torch.dtype:
        """The dtype that the activation of that name is computed in, without autocast."""
        return next(self.get_submodule(self.hooks_table[name].tower).parameters()).dtype

    def request(self, inputs: InputsLike | ForwardRequest | None, **options: Any) -> ForwardRequest:
        """The arguments of `forward`, checked; raises `InputError`."""
        if isinstance(inputs, ForwardRequest):
            return inputs
        return forward_request(self.as_inputs, self.config.language, inputs, **options)

    def _entries(self, fwd_hooks: Sequence[Any], request: ForwardRequest) -> list[HookEntry]:
        """The entries of `fwd_hooks` by full names, checked against the run and the prompt."""
        entries = [as_hook(entry, self) for entry in fwd_hooks]
        found: list[HookEntry] = [(self.hooks_table.resolve(names, **request.fires), fn) for names, fn in entries]
        for _, fn in found:
            if isinstance(fn, PromptHook) and request.prompt is not None:
                fn.place(request.prompt)  # for its errors; `placing` does it again when the pass begins
        return found

    def _refuse_image_hooks(self) -> None:
        """Without an image the image side is not run, so a function on a hook there would never be called."""
        for name, point in self.hook_dict.items():
            if has_functions(point) and self.hooks_table[name].on_image_side:
                raise HookNameError(
                    f"A function is attached to {name!r}, which does not fire: {NO_IMAGE}, or remove the hook "
                    "(model.reset_hooks())."
                )


def _backward(result: Tensor | None, metric: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Gradients of the result, or of a metric of it; returns the result without its graph."""
    scalar = metric(result) if metric is not None and result is not None else result
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        given = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
        raise InputError(
            f"incl_bwd=True needs a tensor of a single number to take gradients of, got {given}. Use "
            "return_type='loss', or give metric=, a function from the logits to a scalar."
        )
    scalar.backward()
    assert result is not None
    return result.detach()
