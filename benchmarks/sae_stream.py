"""What a stream of activations costs, and a step of training on it: `python -m benchmarks.sae_stream`.

Every ratio is to a forward pass of the same prompt, prepared already, stopped at the same layer. A batch has as many activations
as the prompt has positions, so that it takes one forward pass; the stream checks its prompts anew each time, and the images are
pixel values already. The memory is that of a run of many steps on the smallest model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks._measure import Summary, alternate, arguments, markdown, reset_peak, start, summarise, write
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from hooked_llava.machine.processes import Processes
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.stream import ActivationStream, activation_stream
from hooked_llava.sae.train import train_sae
from hooked_llava.sae.trainer import SAETrainer, StepRecord, TrainingConfig

FORWARD, STEP = "forward, stopped", "training step"
STREAMS = STREAM, NO_THREAD, FROM_DISK = "stream", "stream, no thread", "stream, from disk"
_EXPANSION, _K = 8, 32
_BATCHES = 4  # what the buffer holds
_STEPS, _QUICK_STEPS = 10_000, 40
_MB = 2**20


def prompts(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The prompt again and again."""
    while True:
        yield inputs


def stream_of(geometry: str, model: HookedLLaVA, *, n: int | None = None, **options: Any) -> ActivationStream:
    """Activations after half of the blocks, one prompt a batch; `n` prompts, or without end."""
    n_positions, inputs = POSITIONS[geometry], random_prompt(hf_config(geometry), POSITIONS[geometry])
    hook = ("resid_post", model.cfg.n_layers // 2 - 1)
    data: Any = prompts(inputs) if n is None else [inputs] * n
    buffer = _BATCHES * n_positions
    return activation_stream(model, hook, data, batch_size=n_positions, buffer=buffer, progress=False, **options)


def measure(geometry: str, repetitions: int) -> dict[str, Summary]:
    """Seconds of a batch of each stream, and of a training step on one, beside the forward pass."""
    model = HookedLLaVA.from_hf(random_hf_model(hf_config(geometry)))
    inputs = model.as_inputs(random_prompt(hf_config(geometry), POSITIONS[geometry]))
    cfg = SAEConfig(d_in=model.cfg.d_model, d_sae=_EXPANSION * model.cfg.d_model, k=min(_K, model.cfg.d_model))
    trainer = SAETrainer(SparseAutoencoder(cfg).reset(0), TrainingConfig(steps=2**31), Processes(0, 1))
    with tempfile.TemporaryDirectory() as folder:
        streams = {
            STREAM: stream_of(geometry, model),
            NO_THREAD: stream_of(geometry, model, prefetch=0),
            FROM_DISK: stream_of(geometry, model, n=2 * _BATCHES, epochs=None, cache_dir=Path(folder, "acts")),
        }
        batch: Any = next(streams[STREAM])
        works: dict[str, Any] = {
            FORWARD: lambda: model(inputs, stop_at_layer=model.cfg.n_layers // 2),
            **{name: lambda stream=stream: next(stream) for name, stream in streams.items()},
            STEP: lambda: trainer.step([batch]),
        }
        seconds = alternate(works, repetitions)
        for stream in streams.values():
            stream.close()
    return summarise(seconds, FORWARD)


def memory(steps: int) -> dict[str, Any]:
    """Resident memory in bytes after a tenth of a run, and how much was added to it by its end."""
    model = HookedLLaVA.from_hf(random_hf_model(hf_config("quick")))
    resident: dict[int, int] = {}

    def note(record: StepRecord) -> None:
        if record.step in (steps // 10, steps):
            reset_peak()  # what was freed is given back first
            resident[record.step] = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    train_sae(stream_of("quick", model), 128, 8, steps=steps, on_step=note, progress=False)
    first, last = resident[steps // 10], resident[steps]
    return {"steps": steps, "resident_bytes": first, "added_bytes": last - first}


def table(report: dict[str, Any]) -> str:
    """Ratios to the forward pass, the share of the training step, and the memory of a long run."""
    rows = {}
    for geometry, found in report["geometries"].items():
        summaries = found["rows"]
        share = summaries[STEP]["median_s"] / (summaries[STEP]["median_s"] + summaries[STREAM]["median_s"])
        ratios = [f"{summaries[name]['ratio']:.2f}" for name in (*STREAMS, STEP)]
        rows[geometry] = [f"1.00 ({summaries[FORWARD]['median_s']:.3g} s)", *ratios, f"{share:.0%}"]
    kept = report["memory"]
    costs = markdown([FORWARD, *STREAMS, STEP, "step's share"], rows, "a batch")
    grown = {f"{kept['steps']} steps": [f"{kept['resident_bytes'] / _MB:.0f}", f"{kept['added_bytes'] / _MB:+.1f}"]}
    return f"{costs}\n\n{markdown(['after a tenth, MiB', 'added by the end, MiB'], grown, 'resident memory')}"


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__), argv)
    geometries = {
        geometry: {
            "sizes": sizes(hf_config(geometry), POSITIONS[geometry]),
            "rows": measure(geometry, options.repetitions),
        }
        for geometry in options.geometry
    }
    kept = memory(_QUICK_STEPS if options.quick else _STEPS)
    print(table({"geometries": geometries, "memory": kept}))
    write("sae_stream", options, geometries=geometries, memory=kept)


if __name__ == "__main__":
    main()
