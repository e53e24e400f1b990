"""Prompts that are asked again under many edits, entered at the first layer that an edit changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.components import AttentionContext
from hooked_llava.editing import ledger
from hooked_llava.editing.identity import identity, is_same
from hooked_llava.errors import InputError
from hooked_llava.input_checks import whole_number

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA


@dataclass(frozen=True)
class KeptPrompts:
    """Prompts of one batch, with the residual stream that entered some layers before an edit.

    An edit of layer l and above leaves everything below l as it was, so its effect on thousands of prompts costs the
    layers from l on.
    """

    model: HookedLLaVA
    streams: dict[int, Float[Tensor, "prompt pos d_model"]]
    """The stream entering each of the kept layers."""
    mask: Bool[Tensor, "prompt pos"]
    """False at padding, which is on the left."""
    position_ids: Int[Tensor, "prompt pos"] | None
    """Positions for the rotary embedding, if they were given."""
    before: Float[Tensor, "prompt d_vocab"]
    """Next-token logits then."""
    weights: Float[Tensor, " sample"]
    """Which unedited weights they were run with, see `identity`."""
    edits: frozenset[ledger.Entry] = frozenset()
    """The edits that were active then; as a rule none."""

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, rows: Sequence[int] | slice) -> KeptPrompts:
        """Some of the prompts, without columns that are padding in all of them."""
        index: Any = rows if isinstance(rows, slice) else list(rows)
        mask = self.mask[index]
        first = int(mask.any(0).nonzero()[0]) if len(mask) else 0
        return replace(
            self,
            streams={layer: stream[index][:, first:] for layer, stream in self.streams.items()},
            mask=mask[:, first:],
            position_ids=None if self.position_ids is None else self.position_ids[index][:, first:],
            before=self.before[index],
        )

    def check_current(self, model: HookedLLaVA, weights: Float[Tensor, " any_sample"], name: str) -> None:
        """Raises `InputError` unless they are of this model, with the active edits and the identity that it has now."""
        if self.model is not model:
            problem = "of another model object"
        elif not is_same(weights, self.weights):
            problem = "before the model's weights were changed by something other than an edit"
        elif self.edits != ledger.all_active(model):
            problem = "while other edits were active than now"
        else:
            return
        raise InputError(
            f"The prompts of probe {name!r} were kept {problem}, so what they say without the edit is out of date. Keep them "
            "anew, or give the prompts themselves."
        )

    @torch.no_grad()
    def logits(self, layer: int = 0) -> Float[Tensor, "prompt d_vocab"]:
        """Next-token logits with the weights as they are now, from the highest kept layer that is not above `layer`.

        Weights that act before that layer count as they were when the prompts were kept.
        """
        start = max(kept for kept in self.streams if kept <= layer)
        blocks, resid = self.model.language.blocks, self.streams[start]
        context = self.model.context(resid, self.mask, self.position_ids)
        for block in blocks[start:-1]:
            resid = block(resid, context)
        if start < len(blocks):  # of the last block only the last position is asked for; it sees every real key
            last = torch.tensor([resid.shape[1] - 1], device=resid.device)
            allowed = None if context.allowed is None else self.mask[:, None, None, :]
            only = AttentionContext(allowed=allowed, rotation=context.rotation, queries=last)
            resid = blocks[-1](resid, only)
        return self.model.language.to_logits(resid[:, -1:])[:, 0]


@torch.no_grad()
def keep_prompts(model: HookedLLaVA, inputs: Any, layers: Sequence[int] = (0,), *, batch_size: int = 64) -> KeptPrompts:
    """Run prompts once and keep the stream entering the given layers (0 besides; n_layers: leaving the last), and the logits.

    Raises `InputError` for a layer that the model does not have.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> kept = keep_prompts(model, model.prepare(["Who made the star?", "Who owns the ring?"]), layers=[3])
    >>> bool(torch.allclose(kept.logits(3), kept.before, atol=1e-4))
    True
    """
    prompts = model.as_inputs(inputs).padded_left()
    n_layers = model.cfg.n_layers
    wanted = sorted({0, *(whole_number(layer, "A layer to keep") for layer in layers)})
    if wanted[0] < 0 or wanted[-1] > n_layers:
        raise InputError(f"layers={list(layers)} are out of range; expected 0..{n_layers}, {n_layers} being the end.")
    parts: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    before = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        resid = model.embed(batch)
        context = model.context(resid, batch.attention_mask, batch.position_ids)
        for layer in range(n_layers + 1):
            if layer in parts:
                parts[layer].append(resid)
            if layer < n_layers:
                resid = model.language.blocks[layer](resid, context)
        before.append(model.language.to_logits(resid[:, -1:])[:, 0])
    return KeptPrompts(
        model=model,
        streams={layer: torch.cat(part) for layer, part in parts.items()},
        mask=prompts.attention_mask,
        position_ids=prompts.position_ids,
        before=torch.cat(before),
        weights=identity(model),
        edits=ledger.all_active(model),
    )
