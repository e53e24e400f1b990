"""What a Replay keeps, and what every re-run of it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.errors import StaleReplayError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import missing_for
from hooked_llava.model.weights_id import weights_version
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.resid import logits_at
from hooked_llava.replay.image_side import ImageSide
from hooked_llava.replay.kept_run import KeptRun


@dataclass
class Work:
    """Work done by re-runs, counted in token-layers: one position through one block of the language tower.

    The vision tower's blocks are counted in the same unit, by their multiplications by weights.

    Attributes:
        n_layers (int): Language blocks of the model.
        n_positions (int): PositionsLike of the padded prompts.
        token_layers (float): PositionsLike times layers that were computed.
        runs (int): Rows that were re-run: runs times prompts.
    """

    n_layers: int
    n_positions: int
    token_layers: float = 0.0
    runs: int = 0

    @property
    def forwards(self) -> float:
        """The work as a number of full passes through the language tower's blocks."""
        return self.token_layers / (self.n_layers * self.n_positions)

    @property
    def share(self) -> float:
        """The work as a share of one full pass for every row."""
        return self.forwards / self.runs if self.runs else 0.0


class ReplayState:
    """A kept run of a batch of prompts, the model and the prompts that it is of, and the work done on it since.

    `Replay` without its runs: what `LayerPass`, `Sweep` and reference means, which Replay uses, need of it.
    """

    def __init__(self, model: HookedLLaVA, inputs: Inputs, kept: KeptRun) -> None:
        self.model, self.inputs, self.kept = model, inputs, kept
        self.image_side = ImageSide(model, inputs)
        self.work = Work(n_layers=model.cfg.n_layers, n_positions=kept.n_positions)
        self._weights = weights_version(model)
        self._reconstructed = _reconstructed(model)

    @property
    def key_value_share(self) -> float:
        """What keys and values cost of a block, counted in multiplications by weights."""
        cfg = self.model.config.language
        key_value = 2 * cfg.n_key_value_heads * cfg.d_head
        rest = 2 * cfg.n_heads * cfg.d_head + (3 if cfg.gated_mlp else 2) * cfg.d_mlp
        return key_value / (key_value + rest)

    def check_fresh(self) -> None:
        """Raise `StaleReplayError` if the kept run is no longer what the model would compute."""
        if attached := missing_for("Replay", self.model):
            raise StaleReplayError(f"Replay {attached}")
        if weights_version(self.model) != self._weights:
            raise StaleReplayError(
                "The model's weights have changed since this Replay was made, so its kept run is out of date. Make a new "
                "Replay, or revert the edit."
            )
        if _reconstructed(self.model) != self._reconstructed:
            raise StaleReplayError(
                "Autoencoders that replace activations by their reconstructions (keep_error=False) have been attached or "
                "removed since this Replay was made, so its kept run is out of date. Make a new Replay."
            )

    def wanted(self, positions: PositionsLike) -> Int[Tensor, "prompt position"]:
        """Absolute positions at which logits are read; on the CPU, which plans by them."""
        return resolve_positions(positions, self.inputs)

    @torch.no_grad()
    def kept_logits(self, positions: PositionsLike) -> Float[Tensor, "prompt position d_vocab"]:
        """Logits of the kept run, with all axes."""
        return logits_at(self.model, self.kept.entering(self.model.cfg.n_layers), self.wanted(positions))

    def shaped(self, logits: Float[Tensor, "run prompt position d_vocab"], positions: PositionsLike) -> Tensor:
        """Without the prompt axis for one prompt, and without the position axis for "last"."""
        logits = logits[:, 0] if len(self.inputs) == 1 else logits
        return logits.squeeze(-2) if isinstance(positions, str) and positions == "last" else logits


def _reconstructed(model: HookedLLaVA) -> list[tuple[str, int]]:
    """The hooks whose activation an autoencoder replaces, and which one does."""
    attached = {name: point.then for name, point in model.hook_dict.items() if point.then is not None}
    return [(name, id(sae)) for name, sae in attached.items() if not getattr(sae, "keep_error", True)]
