"""A model is known by numbers from all over its weights."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.editing.identity import check_same_model, identity, is_same
from hooked_llava.errors import InputError
from hooked_llava.model import HookedLLaVA


@torch.no_grad()
def test_columns_other_than_the_first_count():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    kept = identity(model)
    assert is_same(identity(model), kept)
    model.get_parameter("language.blocks.2.attn.query.weight")[:, 1:] += 1.0  # as wide as a power of two
    assert not is_same(identity(model), kept)
    with pytest.raises(InputError, match=r"The thing was computed on another model \('it'\).*make the thing again"):
        check_same_model(model, kept, "it", what="thing")
