"""Hooks that other models of the family have and one has not, with the reason and what to use instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.sizes import VisionConfig

SIDE_BY_SIDE = (
    "in this model's blocks attention and MLP stand side by side: both read one normalized residual stream, 'resid_pre' "
    "through 'ln1'"
)
"""What is so in parallel blocks (Phi)."""


@dataclass(frozen=True)
class MissingHooks:
    """Hooks that do not exist in one model.

    Attributes:
        names (tuple[str, ...]): Parts of their names; those of the vision tower begin with "vision.".
        why (str): Why not, and what to use instead.
    """

    names: tuple[str, ...]
    why: str

    def __contains__(self, name: str) -> bool:
        """Whether a name, short or full, means one of them."""
        in_vision = name.startswith("vision.")
        own = [part.removeprefix("vision.") for part in self.names if part.startswith("vision.") == in_vision]
        return any(part in name for part in own)


def missing_hooks(config: LLaVAConfig) -> list[MissingHooks]:
    """What a model of this config lacks.

    >>> from transformers import LlavaConfig
    >>> [missing.names[0] for missing in missing_hooks(LLaVAConfig.from_hf(LlavaConfig()))]
    ['vision.blocks.23.', 'vision.ln_post']
    """
    return [*_of_blocks(config), *_of_vision(config.vision)]


def _of_blocks(config: LLaVAConfig) -> Iterator[MissingHooks]:
    if config.language.parallel_attn_mlp:
        yield MissingHooks(
            ("resid_mid", "mlp_in", "ln2"),
            f"{SIDE_BY_SIDE}, and there is no stream between them. Use 'resid_pre', 'ln1.hook_normalized', 'attn_out' and "
            "'mlp_out' (what each adds), or 'resid_post'.",
        )
    if not config.language.gated_mlp:
        yield MissingHooks(
            ("pre_linear",),
            "this model's MLPs are not gated. Use 'mlp.hook_pre' and 'mlp.hook_post', before and after the activation function.",
        )


def _of_vision(cfg: VisionConfig) -> Iterator[MissingHooks]:
    run, total = cfg.n_layers_run, cfg.n_layers
    blocks = tuple(f"vision.blocks.{i}." for i in range(run, total))
    if run == 0:
        yield MissingHooks(blocks, "the projector reads the embedding, so no block of the vision tower is run.")
    elif blocks:
        yield MissingHooks(
            blocks,
            f"the projector reads the vision features after block {run - 1}, so what follows in the vision tower (to block "
            f"{total - 1}) is loaded but not run. Use vision.blocks.0..{run - 1}.",
        )
    yield MissingHooks(
        ("vision.ln_post",), "LLaVA does not use the vision tower's post norm, so it is not run. Use 'vision.hook_out'."
    )
    if not cfg.pre_norm:
        yield MissingHooks(
            ("vision.ln_pre",), "this vision tower has no norm before its first block. Use 'vision.hook_embed'."
        )
