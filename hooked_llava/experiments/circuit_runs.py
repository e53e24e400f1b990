"""A circuit as a run: every receiver reads the senders of its edges as they are, and all others as in the corrupted run.

Changes accumulate while the run goes on: what a receiver reads is the residual stream, and for each missing edge the sender's
output in the corrupted run less its output in this run. So a run is a list of interventions, exact in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_llava.machine.devices import to_device
from hooked_llava.model.requirements import require
from hooked_llava.replay.intervention import Intervention

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


class CircuitRun:
    """One run of the clean prompt in which some edges carry the corrupted run's contributions.

    Senders are counted as the model computes them: the embedding, then in each layer the heads and the MLP; receivers in
    each layer the queries, keys and values by head and the MLP, then the logits.

    Args:
        model: the model.
        missing: edges outside the circuit, [receiver, sender].
        embed_change: what the embeddings of the corrupted prompt are more than those of the clean one, at `positions`.
        corrupted: z and mlp_out of the corrupted run by full hook name, at all positions.
        positions: where the prompts' runs may differ.

    Raises `InputError` for a model whose MLPs read no copy of the residual stream of their own (parallel blocks).
    """

    def __init__(
        self,
        model: HookedLLaVA,
        missing: Bool[Tensor, "receiver sender"],
        embed_change: Float[Tensor, "position d_model"],
        corrupted: Mapping[str, Tensor],
        positions: Sequence[int],
    ) -> None:
        require(["separate_mlps"], "A circuit", model)
        self.model, self.positions, self.corrupted = model, list(positions), corrupted
        self.missing = to_device(missing, model.cfg.device).to(embed_change.dtype)
        self.at = to_device(self.positions, model.cfg.device)
        self.embed_change = embed_change
        self.changes: list[Float[Tensor, "sender position d_model"]] = []

    def interventions(self) -> list[Intervention]:
        """The run, for Replay of the clean prompt."""
        cfg, found, row = self.model.config.language, [], 0
        for layer in range(cfg.n_layers):
            for kind, n in (("q", cfg.n_heads), ("k", cfg.n_key_value_heads), ("v", cfg.n_key_value_heads)):
                found.append(self._reading(f"{kind}_input", layer, slice(row, row + n)))
                row += n
            found += [self._writing("z", layer), self._reading("mlp_in", layer, row), self._writing("mlp_out", layer)]
            row += 1
        return [*found, self._reading("resid_post", -1, row)]

    def _reading(self, hook: str, layer: int, rows: slice | int) -> Intervention:
        def read(cut: Tensor) -> Tensor:
            if layer == 0 and hook == "q_input":  # a run may be begun again
                self.changes = [self.embed_change[None]]
            changes = torch.cat([change.to(cut.device) for change in self.changes])  # (sender, position, d_model)
            missing = self.missing[rows, : len(changes)].to(cut.device)
            added = torch.tensordot(missing, changes, 1)  # ([reader], position, d_model)
            return cut + (added if isinstance(rows, int) else added.movedim(0, 1))

        return self._at(hook, layer, read)

    def _writing(self, hook: str, layer: int) -> Intervention:
        there = self.corrupted[self.model.hooks_table.name(hook, layer)][0, self.at]

        def write(cut: Tensor) -> Tensor:
            change = there.to(cut.device) - cut
            if hook == "z":
                self.changes.append(einsum("p h d, h d m -> h p m", change, self.model.blocks[layer].attn.W_O))
            else:
                self.changes.append(change[None])
            return cut

        return self._at(hook, layer, write)

    def _at(self, hook: str, layer: int, fn: object) -> Intervention:
        return Intervention(self.model.hooks_table.name(hook, layer), positions=self.positions, fn=fn)  # type: ignore[arg-type]
