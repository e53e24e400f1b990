"""What every test and doctest starts from: few threads, no network, fixed seeds."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: a test never asks the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hooked_llava.model.llava import HookedLLaVA
from tests import shape_checks
from tests.builders import make_hf_model
from tests.builders import tiny_hf_config as build_tiny_hf_config

# The same examples in every run, so that a failure is a change; `make test-random` draws fresh ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")

# Tensors here are so small that threads cost more than they bring; on a busy machine they wait for each other, and
# the same test takes sixty times as long.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What imports and collection made stays to the end: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def types_checked() -> None:
    """The first calls of every function are checked in every file of tests."""
    shape_checks.check_again("file")


@pytest.fixture(autouse=True)
def shapes_checked() -> None:
    """The first calls of every function with shapes are checked in every test."""
    shape_checks.check_again("test")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Randomness that a test forgot to seed is at least the same in every run."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack each time, for accelerators to come
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def tiny_hf_config() -> Callable[..., LlavaConfig]:
    return build_tiny_hf_config


@pytest.fixture(scope="session")
def tiny_hf_model() -> LlavaForConditionalGeneration:
    """One tiny LLaVA shared by all tests: read it, do not change it."""
    return make_hf_model()


@pytest.fixture(scope="session")
def tiny_shapes() -> HookedLLaVA:
    """The embedded model, shared by all tests: read it, do not change it."""
    return HookedLLaVA.from_pretrained("tiny-shapes")
