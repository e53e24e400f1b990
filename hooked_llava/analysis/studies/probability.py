"""At which layer the answers to a table of questions appear, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from hooked_llava.analysis.answer_probability import answer_probability
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.study import study

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


def probability_study(model: HookedLLaVA, rows: Sequence[StudyRow], **options: Any) -> xr.Dataset:
    """`answer_probability` of every question of a table, side by side on an axis `question`; see `datasets.study`.

    As Zhang et al. (2411.18620) do, it follows the table's answer and its false option, in lower case and capitalised, with
    one forward pass for each batch of questions. `options` are those of `datasets.study`; raises as it does.
    `datasets.by_kind` averages the result, and `probability_summary` turns the curves into numbers.

    >>> from hooked_llava import HookedLLaVA
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", kind="fact")
    >>> probability_study(HookedLLaVA.from_pretrained("tiny-shapes"), [row]).answer_probability.dims
    ('question', 'norm', 'layer', 'form')
    """

    def run(inputs: Inputs, asked: Sequence[StudyRow]) -> xr.Dataset:
        found = probability_of_rows(model, inputs, asked)
        return found.drop_attrs().to_dataset(name="answer_probability").assign_attrs(found.attrs)

    return study(model, rows, run, about={"analysis": "answer_probability"}, **options)


def probability_of_rows(model: HookedLLaVA, inputs: Inputs, rows: Sequence[StudyRow]) -> xr.DataArray:
    """`answer_probability` of a batch, of the answers and false options that the table gives."""
    return answer_probability(model, inputs, [row.answer for row in rows], [row.false_option for row in rows])
