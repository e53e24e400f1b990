"""The key-value cache: filled in place, read as views."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_llava.model.components import KVCache
from tests.model.components.towers import LANGUAGE

SHAPE = (2, LANGUAGE.n_key_value_heads, LANGUAGE.d_head)


def made(capacity: int = 6) -> KVCache:
    return KVCache(LANGUAGE, batch=2, capacity=capacity, dtype=torch.float32)


def keys(n: int, seed: int) -> Tensor:
    batch, heads, d_head = SHAPE
    return torch.randn(batch, heads, n, d_head, generator=torch.Generator().manual_seed(seed))


def test_every_layer_of_a_step_writes_the_same_slots() -> None:
    cache = made()
    first = {layer: (keys(4, layer), keys(4, 10 + layer)) for layer in range(LANGUAGE.n_layers)}
    for layer, (k, v) in first.items():
        all_k, all_v = cache.append(layer, k, v)
        assert torch.equal(all_k, k)
        assert torch.equal(all_v, v)
        assert cache.length == 0
    cache.advance(4)
    for layer, (k, v) in first.items():
        new_k, new_v = keys(1, 20 + layer), keys(1, 30 + layer)
        all_k, all_v = cache.append(layer, new_k, new_v)
        assert torch.equal(all_k, torch.cat([k, new_k], 2))
        assert torch.equal(all_v, torch.cat([v, new_v], 2))
    cache.advance(1)
    assert cache.length == 5


def test_what_is_read_is_a_view_and_nothing_is_allocated() -> None:
    cache = made()
    forecast = cache.nbytes
    for layer in range(LANGUAGE.n_layers):
        first, _ = cache.append(layer, keys(3, 0), keys(3, 1))
        cache.advance(3)
        all_k, all_v = cache.append(layer, keys(1, 0), keys(1, 1))
        assert (
            all_k.untyped_storage().data_ptr()
            == all_v.untyped_storage().data_ptr()
            == first.untyped_storage().data_ptr()
        )
        cache.length = 0
    assert cache.nbytes == forecast == LANGUAGE.n_layers * all_k.untyped_storage().nbytes()


def test_a_layers_keys_and_values_so_far() -> None:
    cache = made()
    cache.append(1, keys(3, 0), keys(3, 1))
    assert cache.layer(1)[0].shape[2] == 0, "not yet counted"
    cache.advance(3)
    k, v = cache.layer(1)
    assert torch.equal(k, keys(3, 0))
    assert torch.equal(v, keys(3, 1))


def test_a_layer_is_kept_in_another_dtype() -> None:
    cache = made()
    for layer in (0, 1):
        cache.append(layer, keys(2, layer), keys(2, 1))
    cache.keep(0, lambda both: both.to(torch.bfloat16))
    cache.advance(2)
    assert cache.layer(0)[0].dtype == torch.bfloat16
    assert torch.equal(cache.layer(0)[0], keys(2, 0).bfloat16())
    assert torch.equal(cache.layer(1)[0], keys(2, 1))
