"""Which model is this? Some numbers of every unedited weight, so that an edit is not applied to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.editing import ledger
from hooked_llava.errors import InputError
from hooked_llava.interventions.fingerprint import sample

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

_SAMPLES = 16
_PRECISION = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


@torch.no_grad()
def identity(model: HookedLLaVA) -> Float[Tensor, " sample"]:
    """Some numbers of every weight, as they are without any edit."""
    return torch.cat([sample(ledger.original(parameter), _SAMPLES) for parameter in model.parameters()]).cpu()


def is_same(mine: Float[Tensor, " sample"], kept: Float[Tensor, " any_sample"]) -> bool:
    """Whether two identities are of the same weights, in the coarser of both dtypes."""
    coarser = min(mine.dtype, kept.dtype, key=lambda dtype: _PRECISION[dtype])
    return mine.shape == kept.shape and torch.equal(mine.to(coarser), kept.to(coarser))


def check_same_model(
    model: HookedLLaVA, kept: Float[Tensor, " any_sample"], name: str = "", *, what: str = "edit"
) -> None:
    """Raises `InputError` unless a model is the one (of that name) that something was computed on, see `is_same`."""
    if not is_same(identity(model), kept):
        raise InputError(
            f"The {what} was computed on another model{name and f' ({name!r})'}: the unedited weights of "
            f"{model.config.model_name!r} differ from those that it knows. Use it with the model that it was made for, or "
            f"make the {what} again."
        )
