"""How far an edit moves probability from the answer before it to its target: P(target) - P(answer before).

Efficacy magnitude in Meng et al. (arXiv 2202.05262, section 3.4) and in the released code of Basu et al. (arXiv 2406.04236),
which take one token of each answer. Here it is measured of whole answers, and of first tokens besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.machine.devices import to_device
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import NOTHING, answer_log_probability

MAX_ANSWER = 20
"""Tokens of a generated answer at most, as `model.generate` has it."""
MAGNITUDES = {"magnitude": "whole answers", "first_token_magnitude": "first tokens"}
"""What each of the measures is taken of."""


@dataclass(frozen=True, eq=False)
class AnswerBefore:
    """What prompts were answered without an edit, and logits where its tokens are predicted, without the edit and with it.

    Attributes:
        ids (Int[Tensor, "prompt read"]): Its tokens, -1 after an answer's end.
        before (Float[Tensor, "prompt read d_vocab"]): Logits without the edit.
        after (Float[Tensor, "prompt read d_vocab"]): Likewise with it.
    """

    ids: Int[Tensor, "prompt read"]
    before: Float[Tensor, "prompt read d_vocab"]
    after: Float[Tensor, "prompt read d_vocab"]

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "prompt read"],
        before: Float[Tensor, "prompt some_read d_vocab"],
        after: Float[Tensor, "prompt some_read d_vocab"],
    ) -> AnswerBefore:
        """From logits where these tokens are predicted; a first token's are those of any other answer's first one."""
        n = ids.shape[1]
        return cls(ids, before[:, :n], after[:, :n])

    def magnitudes(
        self,
        target: Int[Tensor, "prompt target_read variant"],
        before: Float[Tensor, "prompt target_read d_vocab"],
        after: Float[Tensor, "prompt target_read d_vocab"],
    ) -> dict[str, Float[Tensor, " prompt"]]:
        """P(target) - P(answer before) of every prompt, of whole answers and of first tokens, without the edit and with it."""
        own, found = self.ids[..., None], {}
        for state, logits, own_logits in (("_before", before, self.before), ("", after, self.after)):
            first = logits[:, :1]
            found[f"magnitude{state}"] = _p(logits, target) - _p(own_logits, own)
            found[f"first_token_magnitude{state}"] = _p(first, target[:, :1]) - _p(first, own[:, :1])
        return found


def no_magnitudes(n: int) -> dict[str, Float[Tensor, " prompt"]]:
    """NaN for prompts that have no target, or whose answers before are not known."""
    return {f"{name}{state}": torch.full((n,), torch.nan) for state in ("_before", "") for name in MAGNITUDES}


def generated_answers(
    model: HookedLLaVA, inputs: Inputs, max_new_tokens: int = MAX_ANSWER
) -> Int[Tensor, "prompt read"] | None:
    """What each prompt is answered, decoding greedily: its tokens up to the end token, which does not count; -1 after them.

    A token that stands for an image ends it, too, as no prompt takes it as text. An answer that ends at once is its end token.
    None where the model has no position left for an answer.
    """
    n_new = min(max_new_tokens, model.config.language.n_ctx - inputs.shape[1])
    if n_new < 1:
        return None
    ids = model.generate(inputs, n_new, return_type="tokens")
    ended = (
        torch.isin(ids, to_device([*model.config.eos_token_ids, model.config.image_token_id], ids.device)).cumsum(-1)
        > 0
    )
    ended[:, 0] = False
    ids = ids.masked_fill(ended, NOTHING)
    return ids[:, : int((ids >= 0).sum(-1).max())]


def _p(logits: Tensor, ids: Tensor) -> Tensor:
    return answer_log_probability(logits, ids).exp()
