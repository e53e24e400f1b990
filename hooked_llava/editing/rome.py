"""ROME (Meng et al. 2022, arXiv 2202.05262): as MultEdit, with keys measured against what keys usually look like."""

from __future__ import annotations

from hooked_llava.editing.covariance import KeyCovariance
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.request import Requests, ToKeep
from hooked_llava.editing.solved import Keys, solve_edit
from hooked_llava.editing.values import ValueSearch
from hooked_llava.model.llava import HookedLLaVA


def rome(
    model: HookedLLaVA,
    requests: Requests,
    covariance: KeyCovariance,
    *,
    position: str = "auto",
    lam: float = 0.0,
    keys: Keys = "mean",
    keep: ToKeep | None = None,
    clamp: float = 4.0,
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 1e-3,
    stop: float = 0.99,
) -> Edit:
    """An edit of one layer's W_out along corrected keys C^-1 k: other keys, alike in what all share, feel it less.

    `covariance` is from `key_covariance` and says which layer is edited; everything else is as in `multedit`, and raises
    the same. With one request and lam = 0 it is equation 2 of 2202.05262; several requests are solved for together.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.editing import EditRequest, key_covariance
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> seen = key_covariance(model, [model.prepare(f"Who made the {s}?") for s in ("ring", "moon", "star")], layer=4)
    >>> rome(model, EditRequest("Who made the star?", "Boris"), seen, position="last").layers
    [4]
    """
    covariance.check_model(model)
    search = ValueSearch(steps, lr, clamp, weight_decay, stop)
    options = {"name": "rome", "lam": lam, "keys": keys, "keep": keep, "covariance": covariance}
    return solve_edit(model, requests, covariance.layer, position, search, **options)
