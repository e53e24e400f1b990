"""The vocabulary of hooks: each one's name, shape, meaning and other spellings, and how a filter finds them.

The names of the language tower are TransformerLens's, without a prefix; the vision tower carries the same names
under `vision.`, the projector its own under `projector.`. A hook point exists if and only if it fires; the table
below is the single list of them, and a test holds it against the model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hooked_llava.checks import as_index
from hooked_llava.errors import HookNameError, InputError, did_you_mean

if TYPE_CHECKING:
    from hooked_llava.architecture.config import LLaVAConfig

NamesFilter = str | tuple | Callable[[str], bool] | Iterable["str | tuple"] | None
"""Which hooks: an exact name, a glob, a short name ("resid_post"), a pair (short name, layer), a function, or a list."""

IMAGE_SIDE = ("vision.", "projector.", "hook_image_embed")
"""Beginnings of the names of hooks that fire only when the prompt has an image."""


@dataclass(frozen=True)
class HookSpec:
    """One row of the table."""

    name: str
    """Full name; `{i}` stands for the layer."""
    axes: tuple[str, ...]
    """Names of the tensor's axes."""
    meaning: str
    """What the tensor is."""
    large: bool = False
    """Whether a cache without a filter leaves it out because of its size."""
    aliases: tuple[str, ...] = ()
    """Other spellings that are understood."""

    @property
    def position_axis(self) -> int | None:
        """Index of the axis that runs over positions (query rows, for scores and pattern), if there is one."""
        for axis in ("pos", "query", "patch", "feature"):
            if axis in self.axes:
                return self.axes.index(axis)
        return None


_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KEY_VALUE_HEADS = ("batch", "pos", "kv_head", "d_head")
_EDGES = ("batch", "head", "query", "key")
_NEURONS = ("batch", "pos", "d_mlp")
_SCALE = ("batch", "pos", "1")


def _norm_hooks(name: str, what: str) -> list[HookSpec]:
    return [
        HookSpec(f"{name}.hook_scale", _SCALE, f"root mean square (or standard deviation) that {what} is divided by"),
        HookSpec(f"{name}.hook_normalized", _RESID, f"{what} after the division, before the norm's weight"),
    ]


def _attention_hooks(*, rotary: bool) -> list[HookSpec]:
    attn = "blocks.{i}.attn."
    projections: list[HookSpec] = []
    for x, word in (("q", "queries"), ("k", "keys"), ("v", "values")):
        heads = _HEADS if x == "q" else _KEY_VALUE_HEADS
        projections += [
            HookSpec(
                f"{attn}hook_{x}_input",
                (*heads[:-1], "d_model"),
                f"residual stream, before the norm, as each head's {word} read it",
                large=True,
                aliases=(f"blocks.{{i}}.hook_{x}_input",),
            ),
            HookSpec(f"{attn}hook_{x}", heads, word),
        ]
    rotated = [
        HookSpec(f"{attn}hook_rot_q", _HEADS, "queries after the rotary embedding"),
        HookSpec(f"{attn}hook_rot_k", _KEY_VALUE_HEADS, "keys after the rotary embedding"),
    ]
    return [
        *projections,
        *(rotated if rotary else []),
        HookSpec(f"{attn}hook_attn_scores", _EDGES, "attention scores before the softmax; blocked edges are -inf"),
        HookSpec(f"{attn}hook_pattern", _EDGES, "attention pattern: softmax of the scores over the keys"),
        HookSpec(f"{attn}hook_z", _HEADS, "values averaged by the pattern"),
        HookSpec(
            f"{attn}hook_result", ("batch", "pos", "head", "d_model"), "what each head adds to the stream", large=True
        ),
    ]


def _block_hooks(*, rotary: bool, gated: bool) -> list[HookSpec]:
    up = [HookSpec("blocks.{i}.mlp.hook_pre_linear", _NEURONS, "the linear half of the gated MLP")] if gated else []
    return [
        HookSpec("blocks.{i}.hook_resid_pre", _RESID, "residual stream entering the block"),
        *_norm_hooks("blocks.{i}.ln1", "the attention's input"),
        *_attention_hooks(rotary=rotary),
        HookSpec("blocks.{i}.hook_attn_out", _RESID, "what attention adds to the stream"),
        HookSpec("blocks.{i}.hook_resid_mid", _RESID, "residual stream between attention and MLP"),
        HookSpec("blocks.{i}.hook_mlp_in", _RESID, "residual stream, before the norm, as the MLP reads it"),
        *_norm_hooks("blocks.{i}.ln2", "the MLP's input"),
        HookSpec("blocks.{i}.mlp.hook_pre", _NEURONS, "MLP neurons before the activation function"),
        *up,
        HookSpec("blocks.{i}.mlp.hook_post", _NEURONS, "MLP neurons, as the output map reads them"),
        HookSpec("blocks.{i}.hook_mlp_out", _RESID, "what the MLP adds to the stream"),
        HookSpec("blocks.{i}.hook_resid_post", _RESID, "residual stream leaving the block"),
    ]


_PATCHES = ("image", "feature", "d_model")

VISION_HOOKS: tuple[HookSpec, ...] = tuple(
    replace(
        spec,
        name=f"vision.{spec.name}",
        axes=tuple("image" if axis == "batch" else axis for axis in spec.axes),
        aliases=tuple(f"vision.{alias}" for alias in spec.aliases),
    )
    for spec in (
        HookSpec("hook_patch_embed", ("batch", "patch", "d_model"), "patches after the convolution"),
        HookSpec("hook_pos_embed", _RESID, "learned positions, class token first"),
        *_norm_hooks("ln_pre", "the embedding"),
        HookSpec("hook_embed", _RESID, "what enters block 0, after the pre-norm, class token first"),
        *_block_hooks(rotary=False, gated=False),
        HookSpec("hook_out", ("batch", "feature", "d_features"), "vision features, as the projector receives them"),
    )
)
PROJECTOR_HOOKS: tuple[HookSpec, ...] = (
    HookSpec("projector.hook_pre", _PATCHES, "hidden layer before the activation function"),
    HookSpec("projector.hook_post", _PATCHES, "hidden layer after the activation function"),
    HookSpec("projector.hook_out", _PATCHES, "image features in the language model's residual stream"),
)
LANGUAGE_HOOKS: tuple[HookSpec, ...] = (
    HookSpec("hook_text_embed", _RESID, "token embeddings, before the image is merged in"),
    HookSpec("hook_image_embed", _PATCHES, "what the merge puts at the image positions"),
    HookSpec("hook_embed", _RESID, "what enters block 0: text and image"),
    *_block_hooks(rotary=True, gated=True),
    *_norm_hooks("ln_final", "the final stream"),
    HookSpec("hook_logits", ("batch", "pos", "d_vocab"), "logits"),
)

# TransformerLens's other words, as its get_act_name has them.
_SHORT = {
    "attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v",
    "mlp_pre": "mlp.pre", "mlp_post": "mlp.post",
}  # fmt: skip
_LAYER_TYPES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}


def _is_image_side(name: str) -> bool:
    return name.startswith(IMAGE_SIDE)


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
        self.specs: dict[str, HookSpec] = {}
        self.aliases: dict[str, str] = {}
        self._add(VISION_HOOKS, config.vision.n_layers_run)
        self._add(PROJECTOR_HOOKS, 0)
        self._add(LANGUAGE_HOOKS, config.language.n_layers)

    def _add(self, specs: Sequence[HookSpec], n_layers: int) -> None:
        per_layer = [spec for spec in specs if "{i}" in spec.name]
        for spec in specs:
            if spec not in per_layer:
                self.specs[spec.name] = spec
            elif spec is per_layer[0]:  # keep forward order: all hooks of block 0, then of block 1, ...
                for i in range(n_layers):
                    for row in per_layer:
                        self.specs[row.name.format(i=i)] = row
                        self.aliases |= {alias.format(i=i): row.name.format(i=i) for alias in row.aliases}

    @property
    def names(self) -> list[str]:
        """Names of all hooks, in the order in which they fire."""
        return list(self.specs)

    def __getitem__(self, name: str) -> HookSpec:
        return self.specs[self.aliases.get(name, name)]

    def stage(self, name: str) -> int:
        """When a hook fires: -2 before text and image are merged, -1 after it, i in block i, n_layers after them."""
        if name.startswith("blocks."):
            return int(name.split(".")[1])
        if name == "hook_embed":
            return -1
        return -2 if _is_image_side(name) or name == "hook_text_embed" else self.config.language.n_layers

    def resolve(self, names_filter: NamesFilter, *, with_image: bool = True, stages: range | None = None) -> list[str]:
        """Full names, in firing order, of the hooks that a filter asks for.

        Without a filter: all that fire, but for the large ones. Raises `HookNameError` for a name or pattern that
        matches nothing (with a suggestion), for an empty filter, for a vision block that is not run, and for what does
        not fire: image hooks when the prompt has no image (`with_image=False`), and hooks outside the `stages` of a run
        that is entered or left at some layer.
        """
        fires = dict.fromkeys(  # ordered as they fire, and quick to look up
            name
            for name in self.specs
            if (with_image or not _is_image_side(name)) and (stages is None or self.stage(name) in stages)
        )
        if names_filter is None:
            return [name for name in fires if not self.specs[name].large]
        if isinstance(names_filter, (str, tuple)):
            found = set(self._match(names_filter, fires, with_image))
        elif callable(names_filter):
            found = {name for name in fires if names_filter(name)}
        else:
            found = {name for item in names_filter for name in self._match(item, fires, with_image)}
        if not found:
            raise HookNameError(
                "The filter matches no hook, so nothing would be seen. Give a name, a glob such as "
                "'blocks.*.hook_resid_post', or a short name such as 'pattern'; model.hook_dict lists them all."
            )
        return [name for name in self.specs if name in found]

    def one(self, hook: object, *, with_image: bool = True) -> str:
        """The full name of the one hook that a spelling means, any that `resolve` or `cache[...]` understands.

        Raises `HookNameError` as `resolve`, and `InputError` for what is no name, or means several hooks.
        """
        if not isinstance(hook, (str, tuple)):
            raise InputError(f"hook={hook!r}; expected the name of a hook, such as 'blocks.3.attn.hook_z' or ('z', 3).")
        names = self.resolve(hook, with_image=with_image)
        outside = [name for name in names if "blocks." not in name]  # "scale" is ln_final.hook_scale, as in a cache
        if len(names) != 1 and len(outside) != 1:
            short = names[0].rpartition("hook_")[2]
            raise InputError(
                f"{hook!r} means {len(names)} hooks; an intervention changes one. Name its layer: ({short!r}, 3)."
            )
        return (outside or names)[0]

    def _match(self, item: str | tuple, fires: dict[str, None], with_image: bool) -> list[str]:
        if not isinstance(item, (str, tuple)):
            raise HookNameError(
                f"A hook filter holds {item!r} of type {type(item).__name__}; expected names, globs, short names, "
                "pairs (short name, layer), or one function from name to bool."
            )
        matches = self._from_pair(item) if isinstance(item, tuple) else self._from_string(item)
        firing = [name for name in matches if name in fires]
        if not firing and not with_image and _is_image_side(matches[0]):
            raise HookNameError(
                f"Hook {matches[0]!r} does not fire: the prompt has no image, so the vision tower and the projector "
                "are not run. Give an image, or ask for hooks of the language tower."
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
        tower = self.config.vision if str(short).startswith("vision.") else self.config.language
        n_layers = getattr(tower, "n_layers_run", tower.n_layers)
        says = f"Layer {layer} is out of range for {short!r}"
        layer_index = as_index(layer, n_layers, "layer", says=says, error=HookNameError)
        matches = [name for name in names if f"blocks.{layer_index}." in name]
        if not matches:
            raise HookNameError(f"Hook {short!r} has no layers, yet layer {layer} was asked for; leave the layer out.")
        return matches

    def _from_string(self, name: str) -> list[str]:
        exact = self.aliases.get(name, name)
        if exact in self.specs:
            return [exact]
        if any(sign in name for sign in "*?["):
            found = fnmatch.filter(self.specs, name)
            found += [full for alias, full in self.aliases.items() if fnmatch.fnmatchcase(alias, name)]
            found = found or self._short(name)
        else:
            found = self._short(name) or self._with_layer(name)
        if not found:
            raise HookNameError(self._unknown(name))
        return found

    def _short(self, name: str) -> list[str]:
        """Hooks of every layer that a short name means: "resid_post", "pattern", "mlp.post", "vision.pattern"."""
        tower, short = ("vision.", name.removeprefix("vision.")) if name.startswith("vision.") else ("", name)
        short = _SHORT.get(short, short)
        head, _, tail = short.rpartition(".")
        ending = f"{head}.hook_{tail.removeprefix('hook_')}" if head else f"hook_{tail.removeprefix('hook_')}"
        return [
            full
            for full in self.specs
            if full.startswith("vision.") == bool(tower) and (full == tower + ending or full.endswith("." + ending))
        ]

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
        parts = name.split(".")
        if parts[:2] == ["vision", "blocks"] and len(parts) > 2 and parts[2].isdigit():
            run, total = self.config.vision.n_layers_run, self.config.vision.n_layers
            if run == 0:
                return (
                    f"Hook {name!r} does not exist: the projector reads the embedding, so no block of the vision tower "
                    "is run."
                )
            if run <= int(parts[2]) < total:
                return (
                    f"Hook {name!r} does not exist: the projector reads the vision features after block {run - 1}, so "
                    f"blocks {run}..{total - 1} of the vision tower are loaded but not run. Use vision.blocks.0..{run - 1}."
                )
        if parts[:2] == ["vision", "ln_post"]:
            return f"Hook {name!r} does not exist: LLaVA does not use the vision tower's post norm, so it is not run."
        known = [*self.specs, *self.aliases, *{full.rpartition("hook_")[2] for full in self.specs}]
        return (
            f"No hook is called {name!r}.{did_you_mean(name, known)} model.hook_dict lists all {len(self.specs)} names."
        )


def markdown_table() -> str:
    """The table of all hooks as Markdown, for the README."""
    rows = ["| hook | shape | meaning |", "|---|---|---|"]
    for spec in (*LANGUAGE_HOOKS, *PROJECTOR_HOOKS, *VISION_HOOKS):
        also = f" (also `{'`, `'.join(spec.aliases)}`)" if spec.aliases else ""
        named = "; cached when named" if spec.large else ""
        rows.append(f"| `{spec.name}`{also} | [{' '.join(spec.axes)}] | {spec.meaning}{named} |")
    return "\n".join(rows)
