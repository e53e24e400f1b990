from __future__ import annotations

import torch

from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model


def test_a_model_prints_on_one_screen_with_the_sizes_of_its_parts():
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    lines = str(model).splitlines()
    assert str(model) == repr(model)
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 110
    assert "tiny-shapes" in lines[0]
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    for part in ("vision", "language"):
        cfg = getattr(model.config, part)
        assert {cfg.model_type, str(cfg.n_heads), str(cfg.d_model), str(cfg.d_mlp)} <= set(rows[part])
    parts = [int(rows[part][-3].replace(",", "")) for part in ("vision", "projector", "language", "all")]
    assert sum(parts[:3]) == parts[3] == sum(weight.numel() for weight in model.parameters())
    assert rows["all"][-2:] == ["float32", "cpu"]
    assert f"{model.config.language.d_vocab:,} tokens" in str(model)


def test_what_differs_between_parts_is_seen():
    model = HookedLLaVA.from_hf(make_hf_model())
    model.projector.to(torch.bfloat16)
    rows = {line.split()[0]: line.split() for line in str(model).splitlines()[1:]}
    assert rows["projector"][-2] == "bfloat16"
    assert rows["all"][-2] == "bfloat16/float32"
