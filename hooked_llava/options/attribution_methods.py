"""The ways to attribute an answer to features of a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from hooked_llava.options.markdown import markdown_rows

AttributionMethod = Literal["gradient", "integrated", "exact"]
Pooling = Literal["mean", "max", "sum"]

ATTRIBUTION_METHODS: dict[AttributionMethod, str] = {
    "gradient": "a feature's activation times the gradient along what it writes: all features at once, to first order",
    "integrated": "the same with the gradient's mean along the straight line from all features switched off; the sum over all "
    "features is what switching off all of them changes",
    "exact": "the model run again without the feature at the token, for the `top` largest by gradient",
}
"""By the name that `feature_attribution(method=)` takes."""


def markdown_table(methods: Mapping[AttributionMethod, str] = ATTRIBUTION_METHODS) -> str:
    """The methods as a table for the documentation.

    >>> markdown_table().splitlines()[0]
    '| method | an attribution is |'
    """
    return markdown_rows(("method", "an attribution is"), [(f"`{name}`", meaning) for name, meaning in methods.items()])
