"""What a probe can measure of an edit: the roles of Basu et al. (arXiv 2406.04236) and Meng et al. (arXiv 2202.05262)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import xarray as xr

from hooked_llava.options.markdown import markdown_rows

Role = Literal["efficacy", "generalisation", "specificity", "locality"]
"""The names in `PROBE_ROLES`."""


@dataclass(frozen=True)
class ProbeRole:
    """One role of a probe; its name is its key in `PROBE_ROLES`, and in results.

    Attributes:
        asks (str): What its prompts are.
        to_change (bool): Whether their answers are to become the target; otherwise they are to stay.
        measure (str): What `summary` calls its number.
        meaning (str): What that number is.
        of (Callable[[xr.Dataset], float]): The number, from the role's probes in the result of `evaluate_edit`.
    """

    asks: str
    to_change: bool
    measure: str
    meaning: str
    of: Callable[[xr.Dataset], float]

    @property
    def wanted(self) -> str:
        """What the answers are to do, in words."""
        return "to become the target" if self.to_change else "to stay"


def _accuracy(probes: xr.Dataset) -> float:
    return float(probes.accuracy.mean())


def _drop(probes: xr.Dataset) -> float:
    return 100 * float((probes.accuracy_before - probes.accuracy).mean())


def _divergence(probes: xr.Dataset) -> float:
    return float(probes.kl.mean())


PROBE_ROLES: dict[str, ProbeRole] = {
    "efficacy": ProbeRole(
        "the edited question", True, "efficacy", "share of prompts that get the target, with the edit", _accuracy
    ),
    "generalisation": ProbeRole(
        "other ways of asking", True, "generalisation", "the same, of other images and other words", _accuracy
    ),
    "specificity": ProbeRole(
        "answers that are to stay", False, "specificity_drop", "accuracy before less accuracy after, in points", _drop
    ),
    "locality": ProbeRole(
        "unrelated prompts", False, "locality_kl", "mean KL(before ‖ after) of the next token, in nats", _divergence
    ),
}
"""By the name that `Probe.role` takes."""


def markdown_table(roles: Mapping[str, ProbeRole] = PROBE_ROLES) -> str:
    """The roles as a table for the documentation.

    >>> markdown_table().splitlines()[2].startswith("| `efficacy` | the edited question | to become the target |")
    True
    """
    rows = [(f"`{name}`", one.asks, one.wanted, f"`{one.measure}`", one.meaning) for name, one in roles.items()]
    return markdown_rows(("role", "prompts", "answers are", "in `summary`", "which is"), rows)
