"""What an autoencoder keeps of what the model does: the loss with its reconstruction spliced in, beside two ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_llava.datasets.forwards import ALL
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.attached_sae import place_of_sae, side_by_side
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer import read_answer
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.reference_mean import reference_means
from hooked_llava.replay.replay import Replay
from hooked_llava.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class LossRecovered:
    """Cross-entropy of the answers in nats, and how many stay the same, with activations replaced in four ways.

    Attributes:
        clean (float): Cross-entropy of the model as it is.
        spliced (float): With the autoencoder's reconstruction in the activations' place.
        mean_ablated (float): With their mean over all prompts in their place.
        zero_ablated (float): With zeros in their place.
        answers_kept (float): Share of prompts whose answer is the same with the reconstruction.
        answers_kept_mean (float): The same with the mean.
        answers_kept_zero (float): The same with zeros.
        n_prompts (int): How many prompts there were.
    """

    clean: float
    spliced: float
    mean_ablated: float
    zero_ablated: float
    answers_kept: float
    answers_kept_mean: float
    answers_kept_zero: float
    n_prompts: int

    @property
    def recovered(self) -> float:
        """Share of what mean ablation costs that the reconstruction does not cost; NaN where it costs nothing."""
        return _recovered(self.clean, self.spliced, self.mean_ablated)

    @property
    def recovered_from_zero(self) -> float:
        """Share of what zero ablation costs that the reconstruction does not cost; NaN where it costs nothing."""
        return _recovered(self.clean, self.spliced, self.zero_ablated)


def loss_recovered(
    model: HookedLLaVA,
    sae: SparseAutoencoder,
    prompts: InputsLike | Sequence[Inputs],
    answers: str | Sequence[str] | None = None,
    *,
    hook: Any = None,
    tokens: str = ALL,
) -> LossRecovered:
    """How much of the answers' cross-entropy is recovered with an autoencoder spliced in, against mean and zero ablation.

    Whole answers are measured, teacher-forced. Where the ablations cost little, the activations do not matter at this hook, and
    what is recovered says nothing.

    Args:
        model: the model.
        sae: the autoencoder.
        prompts: what is asked, or a list of batches.
        answers: one for each prompt; by default the model's own next token.
        hook: where the autoencoder belongs; by default the hook that it was trained on.
        tokens: whose activations are replaced: those that it was trained on.

    Raises `InputError` for a hook where the autoencoder does not belong, and for another number of answers.

    >>> from hooked_llava.sae import SAEConfig
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="blocks.2.hook_resid_post")).reset(seed=0)
    >>> found = loss_recovered(model, sae, model.prepare("Who made the star?"))
    >>> found.spliced > found.clean, found.n_prompts
    (True, 1)
    """
    name = place_of_sae(sae, hook, model.hooks_table, model.config.model_name)
    several = isinstance(prompts, (list, tuple)) and all(isinstance(one, Inputs) for one in prompts)
    batches = [model.as_inputs(one) for one in (prompts if several else [prompts])]  # type: ignore[list-item]
    n = sum(map(len, batches))
    answers = [answers] if isinstance(answers, str) else answers
    if answers is not None and len(answers) != n:
        raise InputError(f"{len(answers)} answers for {n} prompts; expected one for each.")
    where = None if tokens == ALL else tokens
    mean = reference_means(model, batches, [(name, where)])[0]
    runs = [
        Intervention(name, positions=where, fn=lambda x: _reconstructed(sae, x)),
        Intervention(name, positions=where, value=mean),
        Intervention(name, positions=where, zero=True),
    ]
    losses, kept, first = [], [], 0
    for batch in batches:
        own = None if answers is None else list(answers[first : first + len(batch)])
        first += len(batch)
        of_batch = _measured(model, batch, own, runs)
        losses.append(of_batch[0])
        kept.append(of_batch[1])
    clean, spliced, by_mean, by_zero = torch.cat(losses, dim=1).double().mean(1).tolist()
    same, same_mean, same_zero = torch.cat(kept, dim=1).double().mean(1).tolist()
    return LossRecovered(clean, spliced, by_mean, by_zero, same, same_mean, same_zero, n)


def _measured(
    model: HookedLLaVA, batch: Inputs, answers: list[str] | None, runs: list[Intervention]
) -> tuple[Float[Tensor, "way prompt"], Bool[Tensor, "run prompt"]]:
    """Cross-entropy of each prompt's answer, clean and in every run; and whether its tokens stay the most probable ones."""
    reading = read_answer(model, batch, answers)
    replay = Replay(model, reading.inputs)
    clean = reading.shaped(replay.logits(reading.positions))
    reading = reading.with_own(model, clean)
    changed = reading.shaped(replay.run(runs, positions=reading.positions, progress=False), len(runs))
    logits = torch.cat([clean[None], changed])  # (way, prompt, read, d_vocab)
    assert reading.ids is not None
    unread = to_device((reading.ids < 0).all(-1), logits.device)  # of answers shorter than the longest
    said = logits.argmax(-1)
    return -reading.log_probability(logits), ((said[1:] == said[0]) | unread).all(-1)


def _reconstructed(sae: SparseAutoencoder, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return sae(side_by_side(x, sae.cfg.d_in).to(sae.b_dec.device)).to(x).view_as(x)


def _recovered(clean: float, spliced: float, ablated: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated > clean else float("nan")
