"""Tokens in words: what a tokenizer has no word for is told apart by its number."""

from __future__ import annotations

import torch

from hooked_llava.readout.vocabulary import decode_tokens, token_names
from tests.tiled import with_processor


def test_ids_beyond_the_tokenizer_are_numbers() -> None:
    model = with_processor("next")
    beyond = len(model.tokenizer)
    assert beyond < model.cfg.d_vocab - 1  # as a vocabulary that is padded to a round size
    ids = [model.to_single_token("star"), beyond, beyond + 1]
    expected = ["star", f"#{beyond}", f"#{beyond + 1}"]
    assert decode_tokens(model, torch.tensor(ids)).tolist() == expected
    assert token_names(model, ids) == expected
