"""What attention knockout compares with and without an edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricName = Literal["relative_change", "probability", "log_probability", "logit_difference"]


@dataclass(frozen=True)
class KnockoutMetric:
    """One metric of `attention_knockout`; its name is its key in `KNOCKOUT_METRICS`, and on the command line.

    Attributes:
        meaning (str): What is compared, as the command's help says it.
        units (str): Units of its change.
        needs_baseline (bool): Whether it needs a second token, which tables and the command do not have.
    """

    meaning: str
    units: str
    needs_baseline: bool = False


KNOCKOUT_METRICS: dict[str, KnockoutMetric] = {
    "relative_change": KnockoutMetric(
        "how many percent the answer's probability changes", "% of the answer's probability"
    ),
    "probability": KnockoutMetric("the change of that probability", "probability"),
    "log_probability": KnockoutMetric("the change of its logarithm", "nats"),
    "logit_difference": KnockoutMetric(
        "the change of the answer's logit less another's", "logits", needs_baseline=True
    ),
}
OF_THE_ANSWER = [name for name, metric in KNOCKOUT_METRICS.items() if not metric.needs_baseline]
"""Those that need no word but the model's answer."""
