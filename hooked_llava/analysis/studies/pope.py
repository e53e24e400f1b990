"""Whether a model says that objects are there which are not: a study of POPE's questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from hooked_llava.datasets.pope import answers_match_as_pope
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.study import study
from hooked_llava.machine.devices import to_device
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.readout.resid import next_token_logits
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


def pope_study(model: HookedLLaVA, rows: Sequence[StudyRow], **options: Any) -> xr.Dataset:
    """What a model says to questions whether an object is there, and its log odds of yes: `log_odds` [question], in nats.

    The log odds are log P(Yes) - log P(No) of the first token; positive means yes. They cost one forward pass for each batch
    beside the one that answers it. `options` are those of `datasets.study`; wrong answers are kept unless `only_correct=True`,
    and POPE's rule says which they are. `datasets.pope_scores` gives the paper's numbers. Raises as `study`, and `InputError`
    where Yes or No are several tokens.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.datasets import pope_scores
    >>> from hooked_llava.toy.pope_tables import pope_rows
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pope_scores(pope_study(model, pope_rows(2, kinds=["random"]))).accuracy.dims
    ('kind',)
    """

    @torch.no_grad()
    def run(inputs: Inputs, _: Sequence[StudyRow]) -> xr.Dataset:
        with provenance("pope_study", model, inputs, n_forward=1) as made:
            ids = [[single_token(model, m, word) for word in ("Yes", "No")] for m in inputs.token_maps]
            logits = next_token_logits(model, inputs).float()
            yes, no = logits.gather(-1, to_device(ids, logits.device)).unbind(-1)
            odds = xr.DataArray(to_numpy(yes - no), dims="prompt", attrs={"units": "nats", "measured": "first token"})
            return xr.Dataset({"log_odds": odds}, attrs=made.attrs())

    how = {"only_correct": False, "match": answers_match_as_pope} | options
    return study(model, rows, run, about={"analysis": "pope_study"}, **how)
