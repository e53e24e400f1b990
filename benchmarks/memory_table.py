"""How much memory each kind of work keeps, beside the weights: `python -m benchmarks.memory_table`.

Nothing is run: models of real geometries are built without memory for their weights, and the library's own forecasts are
asked. The prompts have one image and 43 tokens after it. A test compares every forecast with what is kept on a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from benchmarks import causal_trace as trace
from benchmarks._geometries import FOR_COUNTING, TEXT, Geometry
from benchmarks._measure import arguments, markdown, start, write
from benchmarks._models import image_positions, random_prompt, sizes
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.loading.quantization import Quantization
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer_cache import AnswerCache
from hooked_llava.replay import Replay
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder

CHOSEN = ("llava-1.5-7b", "llava-1.5-13b", "llama3-llava-next-8b")
NEW_TOKENS = 64
WIDTH, K = 2**17, 256
WEIGHTS = "the weights"
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
_COPIES_IN_TRAINING = 4  # weights, gradients, and Adam's two moments

Measured = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, perhaps without memory for its weights, a prompt, and how wide the autoencoder is.

    Attributes:
        model (HookedLLaVA): The model.
        hf_config (Any): Its config, as transformers has it.
        inputs (Inputs): The prompt.
        constraint (Sequence[int]): What a trace corrupts.
        sae (SAEConfig): The autoencoder's sizes.
    """

    model: HookedLLaVA
    hf_config: Any
    inputs: Inputs
    constraint: Sequence[int]
    sae: SAEConfig

    @classmethod
    def counted(cls, geometry: Geometry) -> Case:
        """The case of a geometry, in bfloat16 and without memory for the weights."""
        config = geometry.config()
        model = HookedLLaVA.build(LLaVAConfig.from_hf(config), device="meta", dtype=torch.bfloat16)
        return cls.of(model, config, geometry, WIDTH, K)

    @classmethod
    def of(cls, model: HookedLLaVA, config: Any, geometry: Geometry, width: int, k: int) -> Case:
        """A model with its prompt."""
        n_image, _ = image_positions(config, geometry.image)
        prompt = random_prompt(config, 1 + n_image + TEXT, size=geometry.image)
        constraint = trace.options_of("three kinds", prompt, n_image)["constraint"]
        return cls(
            model, config, model.as_inputs(prompt), constraint, SAEConfig(d_in=model.cfg.d_model, d_sae=width, k=k)
        )


def packed(how: BitsAndBytesConfig) -> Callable[[Case], int]:
    """The weights in few bits."""

    def count(case: Case) -> int:
        where: dict[str, Any] = {"device": "meta", "dtype": case.model.cfg.dtype}
        blank = HookedLLaVA.build(case.model.config, hf_config=case.hf_config, quantization=Quantization(how), **where)
        return sum(weight.nbytes for weight in blank.parameters())

    return count


def cached(names: Any, positions: Any = None) -> Callable[[Case], int]:
    """What a cache of these hooks keeps."""
    return lambda case: case.model.cache_size(case.inputs, names, positions)


def generated(case: Case) -> int:
    """Keys and values of the prompt and of what is generated."""
    capacity = case.inputs.shape[1] + NEW_TOKENS
    return KVCache(case.model.language.cfg, batch=1, capacity=capacity, dtype=case.model.cfg.dtype).nbytes


def traced(case: Case) -> int:
    """The clean and the corrupted run, and the clean outputs from the constraint on."""
    outputs = [kind.hook for kind in TRACE_KINDS.values()]
    changed = list(range(case.constraint[0], case.inputs.shape[1]))
    kept = Replay.forecast(case.model, case.inputs)
    return 2 * kept + case.model.cache_size(case.inputs, outputs, changed)


def edited(case: Case) -> int:
    """The edited weight as it was before, and the factors of a change of rank 1 in float32."""
    weight = case.model.get_parameter("language.blocks.0.mlp.down.weight")
    return weight.nbytes + sum(weight.shape) * torch.float32.itemsize


def autoencoder(case: Case) -> int:
    """An autoencoder's weights in float32."""
    with torch.device("meta"):
        return sum(weight.nbytes for weight in SparseAutoencoder(case.sae).parameters())


KINDS: dict[str, Callable[[Case], int]] = {
    WEIGHTS: lambda case: sum(weight.nbytes for weight in case.model.parameters()),
    f"{WEIGHTS} in 8 bits": packed(EIGHT_BITS),
    f"{WEIGHTS} in 4 bits (nf4)": packed(FOUR_BITS),
    f"generate {NEW_TOKENS} tokens: keys and values": generated,
    "cache `resid_post` of all layers": cached("resid_post"),
    "cache `pattern` of all layers": cached("pattern"),
    'cache everything, `positions="last"`': cached(None, "last"),
    "head scores and patch maps: the answer cache": lambda case: AnswerCache.forecast(case.model, case.inputs),
    "patching, knockout: a kept run (`Replay`)": lambda case: Replay.forecast(case.model, case.inputs),
    "causal trace, three kinds": traced,
    "MultEdit, applied": edited,
    "autoencoder of 2^17 features, float32": autoencoder,
    "its training": lambda case: _COPIES_IN_TRAINING * autoencoder(case),
}
"""Kinds of work, and what each keeps."""


def forecasts(case: Case) -> dict[str, int]:
    """Bytes of every kind of work."""
    return {kind: count(case) for kind, count in KINDS.items()}


def tables(report: Measured) -> list[str]:
    """One column for each geometry, in GB of 10^9 bytes."""
    found = report["geometries"]
    cells = {kind: [f"{of['bytes'][kind] / 1e9:.3g}" for of in found.values()] for kind in KINDS}
    columns = [f"{name}, {of['sizes']['positions']} positions" for name, of in found.items()]
    return [markdown(columns, cells, "GB")]


def main(argv: Sequence[str] | None = None) -> None:
    options = start(arguments(__doc__, geometries=CHOSEN, choices=FOR_COUNTING), argv)
    geometries = {}
    for name in options.geometry:
        geometry = FOR_COUNTING[name]
        case = Case.counted(geometry)
        size = sizes(geometry.config(), case.inputs.shape[1], geometry.image)
        geometries[name] = {"sizes": size, "bytes": forecasts(case)}
    path = write("memory_table", options, geometries=geometries)
    print(tables({"geometries": geometries})[0])
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
