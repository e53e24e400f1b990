"""What a model and some prompts support, said before anything runs: `model.describe(inputs)`.

"Not supported" is told apart from "measured zero": every reason comes from the function by which the call itself refuses
(`model.requirements`).
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.missing_hooks import MissingHooks, missing_hooks
from hooked_llava.architecture.sizes import TowerConfig
from hooked_llava.checks import one_of
from hooked_llava.errors import counted
from hooked_llava.model.hooked_module import HookedModule
from hooked_llava.model.requirements import OF_PROMPTS, missing_for_all
from hooked_llava.options.needs import NEEDS
from hooked_llava.options.support import needs_of_calls, shortest
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions, format_runs
from hooked_llava.prompt.spans import NEWLINES
from hooked_llava.prompt.token_map import TokenMap

_WIDTH = 88
_PROMPTS_SHOWN = 8


@dataclass(frozen=True)
class Description:
    """What a model and perhaps some prompts support; it prints as text.

    Attributes:
        parts (str): The parts of the model and their sizes.
        config (LLaVAConfig): The model's config.
        autoencoders (Mapping[str, int]): Hooks that an autoencoder is attached to, and its number of features.
        inputs (Inputs | None): The prompts, if some were given.
        reasons (Mapping[str, str | None]): By call, as in `hooked_llava.options.support`: why it is refused, or None.
    """

    parts: str
    config: LLaVAConfig
    autoencoders: Mapping[str, int]
    inputs: Inputs | None
    reasons: Mapping[str, str | None]

    @classmethod
    def of(cls, model: HookedModule, inputs: Inputs | None) -> Description:
        """Of a model and prepared prompts; nothing is run, and no tensor is read."""
        features = dict(model.hooks_table.d_sae)
        return cls(repr(model), model.config, features, inputs, missing_for_all(model, inputs))

    @property
    def lacks(self) -> list[MissingHooks]:
        """Hooks of other models that this one does not have, why, and what to use instead.

        >>> from hooked_llava import HookedLLaVA
        >>> [lacking.names for lacking in HookedLLaVA.from_pretrained("tiny-shapes").describe().lacks]
        [('vision.blocks.4.',), ('vision.ln_post',)]
        """
        return missing_hooks(self.config)

    def reason(self, call: str) -> str | None:
        """Why a call is refused, as its error says it; None where it is supported. Raises `InputError` for unknown calls.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> model.describe(model.prepare("Who made the star?")).reason("blank_image")
        'needs an image, and there is none; give one with prepare(question, images=...).'
        """
        return self.reasons[one_of(call, self.reasons, "call")]

    def supports(self, call: str) -> bool:
        """Whether a call is not refused for what the model or the prompts are; raises as `reason`.

        Without prompts: whether there are prompts for which it is not refused.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> description = model.describe(model.prepare("Who made the star?"))
        >>> description.supports("head_scores"), description.supports("patch_importance")
        (True, False)
        """
        return self.reason(call) is None

    @property
    def supported(self) -> list[str]:
        """The calls that are not refused."""
        return [call for call, reason in self.reasons.items() if reason is None]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                self.parts,
                *(f"  autoencoder at {name}: {n} features" for name, n in self.autoencoders.items()),
                *_section("inputs", [] if self.inputs is None else _prompts(self.inputs, self.config.language)),
                *_section("hooks that this model lacks", ((_shown(one.names), one.why) for one in self.lacks)),
                *_section("not supported", _grouped(self.reasons)),
                *_section("supported", [(", ".join(shortest(self.supported)), "")]),
                *_section(
                    "of these, some need of their prompts", _needs(self.supported) if self.inputs is None else []
                ),
            ]
        )


def _section(title: str, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A title, and below it each head with its body; nothing where there is no entry."""
    for i, (head, body) in enumerate(entries):
        if i == 0:
            yield title
        yield from _wrapped(head, 2)
        yield from _wrapped(body, 4)


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)


def _grouped(reasons: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Every reason once, and the calls that are refused for it."""
    calls = defaultdict(list)
    for call, reason in reasons.items():
        if reason is not None:
            calls[reason].append(call)
    return [(reason, ", ".join(shortest(names))) for reason, names in calls.items()]


def _needs(supported: Sequence[str]) -> list[tuple[str, str]]:
    """What prompts must have, and for which calls."""
    needs = needs_of_calls()
    calls = {NEEDS[need]: [call for call in supported if need in needs[call]] for need in NEEDS if need in OF_PROMPTS}
    return [(meaning, ", ".join(shortest(names))) for meaning, names in calls.items() if names]


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}*" if name.endswith(".") else name for name in names)


def _prompts(inputs: Inputs, cfg: TowerConfig) -> Iterator[tuple[str, str]]:
    yield inputs.summary(), ""
    for row, token_map in enumerate(inputs.token_maps[:_PROMPTS_SHOWN]):
        padding = len(token_map) - len(token_map.real)
        side = "left" if token_map.real.start else "right"
        padded = f", {padding} more of padding on the {side}" if padding else ""
        yield f"prompt {row}: {counted(len(token_map.real), 'position')}{padded}", ""
        yield from (("", line) for line in _images(token_map, cfg))
        spans = (f"{name} {format_runs(positions)}" for name, positions in token_map.spans.items() if name != NEWLINES)
        yield "", "spans: " + "; ".join(spans)
    if (more := len(inputs) - _PROMPTS_SHOWN) > 0:
        yield f"and {counted(more, 'more prompt')}", ""


def _images(token_map: TokenMap, cfg: TowerConfig) -> Iterator[str]:
    """Each image: its grids, its tiles, and where it stands."""
    for image, (here, layout) in enumerate(zip(token_map.image_ranges, token_map.layouts, strict=True)):
        grids = " + ".join(f"{grid.name} {grid.rows.cells} x {grid.columns.cells}" for grid in layout.grids)
        tiles, size = counted(layout.n_tiles, "tile"), layout.original_size
        original = "original not known" if size is None else f"original {size[0]} x {size[1]} pixels"
        first = ", class token first" if layout.class_token else ""
        yield f"image {image} at {format_runs(here)}: {grids} patches of {tiles}{first}; {original}"
        if cfg.window is not None and here.stop <= token_map.real.stop - cfg.window:
            layers = format_runs(Positions(cfg.windowed_layers))
            yield f"outside the {cfg.window} positions that the last one sees in layers {layers}: attention is 0 there"
