"""The hooks of one model: where each one is, and how a filter finds their names.

The names of the language tower are TransformerLens's, without a prefix; the vision tower carries the same names
under `vision.`, the projector its own under `projector.`. A hook point exists if and only if it fires; the table
is the single list of them, and a test holds it against the model.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, SupportsIndex, TypeAlias

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hook_specs import PROJECTOR_HOOKS, HookSpec, language_hooks, sae_hooks, vision_hooks
from hooked_llava.architecture.missing_hooks import missing_hooks
from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.checks import as_index
from hooked_llava.errors import HookNameError, InputError, did_you_mean

NamesFilter = str | tuple | Callable[[str], bool] | Iterable["str | tuple"] | None
"""Which hooks: an exact name, a glob, a short name ("resid_post"), a pair (short name, layer), a function, or a list."""

Part: TypeAlias = Literal["vision", "projector", "language"]
"""A part of the model, by the name of its module."""

NO_IMAGE = "the prompt has no image, so the vision tower and the projector are not run. Give an image"
"""Why hooks of the image side do not fire."""


@dataclass(frozen=True)
class Hook:
    """One hook of one model: where it is, and what passes through it.

    Attributes:
        name (str): Full name: "blocks.3.attn.hook_z".
        spec (HookSpec): Its row of the table.
        tower (Part): The part of the model that it belongs to; "language" for the merge of text and image.
        layer (int | None): The block of that part; None outside of blocks.
        site (str): Name inside the block, or in the part outside of blocks: "attn.hook_z", "hook_embed",
            "ln_final.hook_scale".
        stage (int): When it fires: -2 before text and image are merged, -1 after it, i in block i, n_layers after the
            blocks.
    """

    name: str
    spec: HookSpec
    tower: Part
    layer: int | None
    site: str
    stage: int

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the tensor's axes."""
        return self.spec.axes

    @property
    def on_image_side(self) -> bool:
        """Whether it fires only when the prompt has an image: in the vision tower, the projector and before the merge."""
        return self.by_tile or self.axes[0] == "image"

    @property
    def by_tile(self) -> bool:
        """Whether its tensor has a row for each vision tile (in the vision tower and the projector)."""
        return self.axes[0] == "tile"

    @property
    def position_axis(self) -> int | None:
        """Index of the axis that runs over positions (query rows, for scores and pattern), if there is one."""
        for axis in ("pos", "query", "patch", "feature"):
            if axis in self.axes:
                return self.axes.index(axis)
        return None


# TransformerLens's other words, as its get_act_name has them.
_SHORT = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v",
    "mlp_pre": "mlp.pre", "mlp_post": "mlp.post",
}  # fmt: skip
_LAYER_TYPES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}


class HookTable:
    """All hooks of one model, and the resolution of filters to their names.

    >>> from transformers import LlavaConfig
    >>> from hooked_llava.architecture.config import LLaVAConfig
    >>> table = HookTable(LLaVAConfig.from_hf(LlavaConfig()))
    >>> table.resolve(("pattern", -1))
    ['blocks.31.attn.hook_pattern']
    """

    def __init__(self, config: LLaVAConfig) -> None:
        self.config = config
        self.hooks: dict[str, Hook] = {}
        self.aliases: dict[str, str] = {}
        self._add("vision", vision_hooks(config.vision), config.vision.n_layers_run)
        self._add("projector", PROJECTOR_HOOKS, 0)
        self._add("language", language_hooks(config.language), config.language.n_layers)
        self.d_sae: dict[str, int] = {}
        """Number of features by the hook that an autoencoder is attached to."""
        self._index_endings()

    def _index_endings(self) -> None:
        self._by_ending: dict[tuple[bool, str], list[str]] = defaultdict(list)
        for hook in self.hooks.values():
            for ending in _endings(hook.name.removeprefix("vision.")):
                self._by_ending[hook.tower == "vision", ending].append(hook.name)

    def add_sae(self, name: str, d_sae: int) -> list[str]:
        """List the hooks of an autoencoder attached to the hook `name`, which they follow; their names."""
        added, listed = self._sae_hooks(name), list(self.hooks.items())
        place = listed.index((name, self.hooks[name])) + 1
        self.hooks = dict([*listed[:place], *added.items(), *listed[place:]])
        self.d_sae[name] = d_sae
        self._index_endings()
        return list(added)

    def remove_sae(self, name: str) -> None:
        """Take the hooks of an autoencoder from the table."""
        for added in self._sae_hooks(name):
            del self.hooks[added]
        del self.d_sae[name]
        self._index_endings()

    def _sae_hooks(self, name: str) -> dict[str, Hook]:
        """The hooks that an autoencoder at the hook `name` has, whether or not one is attached."""
        at = self.hooks[name]
        specs = sae_hooks(at.spec, name)
        return {s.name: replace(at, name=s.name, spec=s, site=at.site + s.name.removeprefix(name)) for s in specs}

    def _add(self, tower: Part, specs: Sequence[HookSpec], n_layers: int) -> None:
        """The hooks of a part in the order in which they fire: all of block 0, then of block 1, ..."""
        in_block = [spec for spec in specs if "{i}" in spec.name]
        first = specs.index(in_block[0]) if in_block else len(specs)
        for spec in specs[:first]:
            self._put(tower, spec, None, -1)
        for i in range(n_layers):
            for spec in in_block:
                self._put(tower, spec, i, i)
        for spec in specs[first + len(in_block) :]:
            self._put(tower, spec, None, n_layers)

    def _put(self, tower: Part, spec: HookSpec, layer: int | None, stage: int) -> None:
        name, stem = spec.name.format(i=layer), "" if tower == "language" else f"{tower}."
        site = name.removeprefix(stem if layer is None else f"{stem}blocks.{layer}.")
        before_merge = spec.axes[0] in ("tile", "image") or site == "hook_text_embed"
        self.hooks[name] = Hook(name, spec, tower, layer, site, -2 if before_merge else stage)
        self.aliases |= {alias.format(i=layer): name for alias in spec.aliases}

    @property
    def names(self) -> list[str]:
        """Names of all hooks, in the order in which they fire."""
        return list(self.hooks)

    def __getitem__(self, name: str) -> Hook:
        """The hook of a full name; an autoencoder's also after it was removed, since caches outlive it."""
        name = self.aliases.get(name, name)
        if name not in self.hooks and (at := name.rpartition(".")[0]) in self.hooks:
            return self._sae_hooks(at)[name]
        return self.hooks[name]

    def tower(self, hook: Hook) -> TowerConfig:
        """The sizes of a hook's tower; for hooks of the projector and the merge, those of the language tower."""
        return self.config.vision if hook.tower == "vision" else self.config.language

    def name(self, short: str, layer: SupportsIndex) -> str:
        """The full name of a hook in one layer (from the end where negative); raises as `one`.

        >>> from transformers import LlavaConfig
        >>> HookTable(LLaVAConfig.from_hf(LlavaConfig())).name("resid_post", -1)
        'blocks.31.hook_resid_post'
        """
        return self.one((short, operator.index(layer)))

    def stop_after(self, names: Iterable[str]) -> int | None:
        """The `stop_at_layer` of the shortest run in which all these hooks fire; None where one fires after the blocks.

        >>> from transformers import LlavaConfig
        >>> table = HookTable(LLaVAConfig.from_hf(LlavaConfig()))
        >>> table.stop_after(["hook_embed", "blocks.3.hook_resid_post"]), table.stop_after(["ln_final.hook_scale"])
        (4, None)
        """
        end = max(self[name].stage for name in names) + 1
        return max(end, 0) if end <= self.config.language.n_layers else None

    def resolve(self, names_filter: NamesFilter, *, with_image: bool = True, stages: range | None = None) -> list[str]:
        """Full names, in firing order, of the hooks that a filter asks for.

        Without a filter: all that fire, but for the large ones. Raises `HookNameError` for a name or pattern that
        matches nothing (with a suggestion), for an empty filter, for a vision block that is not run, and for what does
        not fire: image hooks when the prompt has no image (`with_image=False`), and hooks outside the `stages` of a run
        that is entered or left at some layer.
        """

        def fires(hook: Hook) -> bool:
            return (with_image or not hook.on_image_side) and (stages is None or hook.stage in stages)

        if names_filter is None:
            return [name for name, hook in self.hooks.items() if fires(hook) and not hook.spec.large]
        if isinstance(names_filter, (str, tuple)):
            found = set(self._match(names_filter, fires, with_image))
        elif callable(names_filter):
            found = {name for name, hook in self.hooks.items() if fires(hook) and names_filter(name)}
        else:
            found = {name for item in names_filter for name in self._match(item, fires, with_image)}
        if not found:
            raise HookNameError(
                "The filter matches no hook, so nothing would be seen. Give a name, a glob such as "
                "'blocks.*.hook_resid_post', or a short name such as 'pattern'; model.hook_dict lists them all."
            )
        return list(found) if len(found) == 1 else [name for name in self.hooks if name in found]

    def one(self, hook: object, *, with_image: bool = True) -> str:
        """The full name of the one hook that a name means, in any form that `resolve` or `cache[...]` understands.

        Raises `HookNameError` as `resolve`, and `InputError` for what is no name, or means several hooks.
        """
        if not isinstance(hook, (str, tuple)):
            raise InputError(f"hook={hook!r}; expected the name of a hook, such as 'blocks.3.attn.hook_z' or ('z', 3).")
        names = self.resolve(hook, with_image=with_image)
        outside = [
            name for name in names if self.hooks[name].layer is None
        ]  # "scale" is ln_final.hook_scale, as in a cache
        if len(names) != 1 and len(outside) != 1:
            short = names[0].rpartition("hook_")[2]
            raise InputError(
                f"{hook!r} means {len(names)} hooks; an intervention changes one. Name its layer: ({short!r}, 3)."
            )
        return (outside or names)[0]

    def _match(self, item: str | tuple, fires: Callable[[Hook], bool], with_image: bool) -> list[str]:
        if not isinstance(item, (str, tuple)):
            raise HookNameError(
                f"A hook filter holds {item!r} of type {type(item).__name__}; expected names, globs, short names, "
                "pairs (short name, layer), or one function from name to bool."
            )
        matches = self._from_pair(item) if isinstance(item, tuple) else self._from_string(item)
        firing = [name for name in matches if fires(self.hooks[name])]
        if not firing and not with_image and self.hooks[matches[0]].on_image_side:
            raise HookNameError(
                f"Hook {matches[0]!r} does not fire: {NO_IMAGE}, or ask for hooks of the language tower."
            )
        if not firing:
            raise HookNameError(
                f"Hook {matches[0]!r} does not fire: it lies outside the part of the model between start_at_layer and "
                "stop_at_layer. Run more layers, or ask for hooks of those that are run."
            )
        return firing

    def _from_pair(self, pair: tuple) -> list[str]:
        short, layer, *_ = (*pair, None, None)
        if not 1 <= len(pair) <= 3 or not isinstance(short, str) or not isinstance(layer, (int, type(None))):
            raise HookNameError(
                f"{pair!r} is no hook: a tuple is (short name, layer), for example ('pattern', 3). Give several names "
                "as a list."
            )
        if len(pair) == 3 and pair[2] is not None:
            part = _LAYER_TYPES.get(pair[2], pair[2])
            names = self._from_string(f"{part}.hook_{short.removeprefix('hook_')}" if part else short)
        else:
            names = self._from_string(short)
        if layer is None:
            return names
        n_layers = (self.config.vision if short.startswith("vision.") else self.config.language).n_layers_run
        says = f"Layer {layer} is out of range for {short!r}"
        layer_index = as_index(layer, n_layers, "layer", says=says, error=HookNameError)
        matches = [name for name in names if self.hooks[name].layer == layer_index]
        if not matches:
            raise HookNameError(f"Hook {short!r} has no layers, yet layer {layer} was asked for; leave the layer out.")
        return matches

    def _from_string(self, name: str) -> list[str]:
        exact = self.aliases.get(name, name)
        if exact in self.hooks:
            return [exact]
        if any(sign in name for sign in "*?["):
            found = fnmatch.filter(self.hooks, name)
            found += [full for alias, full in self.aliases.items() if fnmatch.fnmatchcase(alias, name)]
            found = found or self._short(name)
        else:
            found = self._short(name) or self._with_layer(name)
        if not found:
            raise HookNameError(self._unknown(name))
        return found

    def _short(self, name: str) -> list[str]:
        """Hooks of every layer that a short name means: "resid_post", "pattern", "mlp.post", "vision.pattern"."""
        in_vision, short = name.startswith("vision."), name.removeprefix("vision.")
        head, dot, tail = _SHORT.get(short, short).rpartition(".")
        return self._by_ending.get((in_vision, f"{head}{dot}hook_{tail.removeprefix('hook_')}"), [])

    def _with_layer(self, name: str) -> list[str]:
        """The hook that a name with its layer in it means, as `cache[...]` understands it: "k6", "scale4ln1", "pre5"."""
        match = re.fullmatch(r"([a-z]+(?:_[a-z]+)*)(\d+)([a-z]*\d?)", name)
        if match is None:
            return []
        short, layer, part = match.groups()
        if not self._short(short) or int(layer) >= self.config.language.n_layers:
            return []
        return self._from_pair((short, int(layer), part or None))

    def _unknown(self, name: str) -> str:
        for missing in missing_hooks(self.config):
            if name in missing:
                return f"Hook {name!r} does not exist: {missing.why}"
        if name.rpartition(".")[2].startswith("hook_sae_"):
            return (
                f"No hook is called {name!r}: no autoencoder is attached there. Attach it by model.attach_sae(...), or a "
                "steering's by its attached(), and stay inside the block."
            )
        known = [*self.hooks, *self.aliases, *{full.rpartition("hook_")[2] for full in self.hooks}]
        return (
            f"No hook is called {name!r}.{did_you_mean(name, known)} model.hook_dict lists all {len(self.hooks)} names."
        )


def _endings(name: str) -> Iterator[str]:
    """The name, and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]
