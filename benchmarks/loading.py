"""Memory and time of loading a sharded checkpoint: `python -m benchmarks.loading [--size 7b]`.

A checkpoint with random weights is written to a temporary folder, shard by shard. Each contestant then loads it in a
fresh process. Memory is the peak of resident memory (mapped pages of the files included) less what the process had
after its imports, over the size of the weights; seconds end when every weight has been read once.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks._geometries import GEOMETRIES
from benchmarks._measure import (
    OURS,
    arguments,
    in_fresh_process,
    markdown,
    peak_bytes,
    reset_peak,
    start,
    summarise,
    write,
)
from benchmarks._models import make_config, sizes
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.loading import expected_tensors, hf_name
from hooked_llava.model.llava import HookedLLaVA

HF = "Hugging Face"
SIZES: dict[str, dict[str, int]] = {
    "100mb": {"d_vision": 256, "d_model": 512, "n_layers": 4, "d_mlp": 1376},
    "2gb": {"d_vision": 1024, "d_model": 2048, "n_layers": 13, "d_mlp": 5504, "n_heads": 16},
}
"""Sizes of the checkpoint in bfloat16."""
REAL = {"7b": "llava-1.5-7b"}
"""And those of real ones."""
_SHARD_BYTES = 2**30
_BLOCK = 2**22
_GB = 1e9


def write_checkpoint(config: LlavaConfig, folder: Path, shard_bytes: int) -> int:
    """Random bfloat16 weights in Hugging Face's layout, never more than a shard in memory; returns their bytes."""
    config.architectures, config.dtype = [LlavaForConditionalGeneration.__name__], "bfloat16"
    config.save_pretrained(folder)
    weight_map, total = {}, 0
    for number, shard in enumerate(_shards(config, shard_bytes)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _shards(config: LlavaConfig, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    block = torch.randn(_BLOCK).mul_(0.02).bfloat16()
    shard: dict[str, Tensor] = {}
    ours = LLaVAConfig.from_hf(config)
    for name, shape in expected_tensors(ours).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        for piece in tensor.view(-1).split(_BLOCK):
            piece.copy_(block[: len(piece)])
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[hf_name(name, ours)] = tensor
    yield shard


LOADERS: dict[str, Callable[[str], torch.nn.Module]] = {
    HF: lambda folder: LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto"),
    OURS: HookedLLaVA.from_pretrained,
}


def worker(contestant: str, folder: str) -> dict[str, float]:
    """Load in this process, which should have done nothing else."""
    reset_peak()
    before, began = peak_bytes(), time.perf_counter()
    model = LOADERS[contestant](folder)
    touched = sum(float(p.view(-1)[:: 2**11].sum()) for p in model.parameters())  # an element of every page
    assert touched == touched, "the weights hold NaN"
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes() - before}


def measure(folder: Path, repetitions: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """The runs of each contestant, in turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for repetition in range(repetitions):
        for name in LOADERS if repetition % 2 == 0 else reversed(LOADERS):
            runs[name].append(in_fresh_process("loading", threads, name, str(folder)))
    return runs


def table(report: dict[str, Any]) -> str:
    """Time and memory of each contestant."""
    cells = {
        name: [f"{of['median_s']:.2f}", f"{of['ratio']:.2f}", f"{of['peak_over_weights']:.2f}"]
        for name, of in report["rows"].items()
    }
    loaded = f"from_pretrained, {report['weight_bytes'] / _GB:.1f} GB in bfloat16"
    return markdown(["s", "to Hugging Face", "peak memory over imports / weights"], cells, loaded)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=7)
    parser.add_argument(
        "--size", choices=[*SIZES, *REAL], default="2gb", help="size of the checkpoint in bfloat16 (default 2gb)"
    )
    parser.add_argument("--folder", type=Path, help="where to write it (default: the temporary folder)")
    parser.add_argument("--worker", nargs=2, metavar=("CONTESTANT", "FOLDER"), help="one measurement, as JSON")
    options = start(parser, argv)
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    size, shard_bytes = ("100mb", _SHARD_BYTES // 32) if options.quick else (options.size, _SHARD_BYTES)
    config = (
        GEOMETRIES[REAL[size]].config() if size in REAL else make_config(image_size=336, patch_size=14, **SIZES[size])
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        weights = write_checkpoint(config, Path(folder), shard_bytes)
        runs = measure(Path(folder), options.repetitions, options.threads)
    seconds = summarise({name: [run["seconds"] for run in of] for name, of in runs.items()}, HF)
    rows = {
        name: seconds[name] | {"peak_over_weights": statistics.median(run["peak_bytes"] / weights for run in of)}
        for name, of in runs.items()
    }
    measured = {"size": size, "weight_bytes": weights, "sizes": sizes(config, 0), "rows": rows}
    name = "loading" if options.quick else f"loading-{size}"
    print(f"\n{table(measured)}\n\nwritten to {write(name, options, **measured)}")


if __name__ == "__main__":
    main()
