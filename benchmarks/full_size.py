"""What a model of true size costs on one GPU: `python -m benchmarks.full_size [--geometry NAME ...] [--device cuda]`.

A named geometry is built with random weights directly on the device, in bfloat16, once: both libraries read the same memory.
Every row is timed in turn with one forward of Hugging Face's model (sdpa attention, all logits) on the same prompt, or for
generation with its `generate`; "counted" is the work of the re-runs in such forwards. Memory is the peak of tensors over what
was held before, the weights among it; a read is a number that the CPU waits for. There is one JSON file for each geometry,
written after every part: what is measured is kept if the run is cut short, and no part begins after `--minutes`.

A machine for such measurements is often bare and without a network. `benchmarks/full_size_wheels.txt` lists the wheels that it
needs besides torch, transformers and what comes with them, and how to take them along.
"""

from __future__ import annotations

import functools
import gc
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import causal_trace as trace
from benchmarks import generation, head_scores, knockout
from benchmarks._geometries import GEOMETRIES, TEXT, Geometry
from benchmarks._hook_works import ROWS as HOOKS
from benchmarks._hook_works import hf_works, our_works
from benchmarks._host_reads import host_reads
from benchmarks._measure import (
    BASELINE,
    OURS,
    RESULTS,
    Summary,
    Work,
    alternate,
    arguments,
    markdown,
    peak_bytes,
    reset_peak,
    start,
    summarise,
    write,
)
from benchmarks._models import image_positions, random_hf_model, random_prompt, sizes
from benchmarks._sweeps import TEXT as SWEPT
from benchmarks._sweeps import Setting, metric, resid_pre, token_layers_of_a_forward
from hooked_llava.analysis import attention_knockout
from hooked_llava.analysis.causal_trace import causal_trace
from hooked_llava.editing import EditRequest, multedit
from hooked_llava.errors import HookedLLaVAWarning
from hooked_llava.machine.processes import Processes
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Replay
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.trainer import SAETrainer, TrainingConfig

FORWARD, READING, RESID, PATTERNS = HOOKS[0], HOOKS[1], HOOKS[3], HOOKS[4]
HEADS = "head scores and one patch map"
SWEEP = f"resid_pre, every layer x last {SWEPT} positions"
KNOCKOUT, TRACE = "knockout, six edges x every window", "causal trace, three kinds"
EDIT, STEP = "MultEdit, applied and reverted", "autoencoder, a training step"
WIDTH, K = 2**17, 256
MARKS = {FORWARD: 1.0, READING: 1.02, RESID: 1.05, HEADS: 1.5}
"""Ratios to a forward to be reached: on one H100, in bfloat16, at 620 positions."""
GENERATION_MARK = 0.8
"""Of Hugging Face's generation."""
OVER_COUNTED = 1.3
"""Of the counted work."""
_QUICK: dict[str, Any] = {"n_tokens": 4, "width": 256, "k": 8, "at_least": 0.0}
_MB = 2**20

Measured = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model of a geometry with its prompt, and how it is measured.

    Attributes:
        setting (Setting): Both libraries' models on the same weights, and prompts about two images.
        n_image (int): Positions of the image.
        n_tiles (int): Tiles that it is cut into.
        repetitions (int): Of every time.
        n_tokens (int): New tokens of a generation.
        width (int): Features of the autoencoder.
        k (int): How many of them are active.
        at_least (float): Seconds of one repetition.
    """

    setting: Setting
    n_image: int
    n_tiles: int
    repetitions: int
    n_tokens: int = 64
    width: int = WIDTH
    k: int = K
    at_least: float = 0.1

    @classmethod
    def of(cls, geometry: Geometry, device: torch.device, dtype: torch.dtype, repetitions: int, *, quick: bool) -> Case:
        """The model of a geometry on a device; with `quick` a shrunken one."""
        geometry = geometry.small() if quick else geometry
        config = geometry.config()
        hf_model = random_hf_model(config, device=device, dtype=dtype)
        n_image, n_tiles = image_positions(config, geometry.image)
        prompt = random_prompt(config, 1 + n_image + TEXT, size=geometry.image)
        prompt = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in prompt.items()}
        other = {**prompt, "pixel_values": torch.randn_like(prompt["pixel_values"])}
        setting = Setting(hf_model, HookedLLaVA.from_hf(hf_model), prompt, other)
        return cls(setting, n_image, n_tiles, repetitions, **(_QUICK if quick else {}))

    @property
    def model(self) -> HookedLLaVA:
        """Ours."""
        return self.setting.model

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.setting.model.cfg.device

    def measured(self, ours: Work, theirs: Work | None = None, **known: Any) -> Measured:
        """Seconds of some work in turn with Hugging Face's, the peak of memory of each, and how often each waits."""
        works = {BASELINE: theirs or self.setting.forward, OURS: ours}
        costs = {name: self._cost(work) for name, work in works.items()}
        summaries: dict[str, Summary] = summarise(alternate(works, self.repetitions, at_least=self.at_least))
        return {**{name: {**summaries[name], **costs[name]} for name in works}, **known}

    def _cost(self, work: Work) -> dict[str, int]:
        reads = host_reads(work, self.device)  # what is made once is there from now on
        reset_peak(self.device)
        before = _held(self.device)
        work()
        return {"peak_bytes": peak_bytes(self.device) - before, "host_reads": reads}

    def in_forwards(self, blocks: float) -> float:
        """Passes through all language blocks as a share of a Hugging Face forward, by multiplications with weights."""
        n_positions = self.setting.inputs.shape[1]
        whole = token_layers_of_a_forward(self.setting.hf_model, n_positions, self.n_tiles)
        return blocks * self.model.cfg.n_layers * n_positions / whole


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_bytes()


def forwards(case: Case) -> dict[str, Measured]:
    """The forward itself, one hook, and two caches; Hugging Face's own means in the last column where it has some."""
    ours = dict(zip(HOOKS, our_works(case.model, case.setting.clean), strict=True))
    theirs = dict(zip(HOOKS, hf_works(case.setting.hf_model, case.setting.clean, eager=False), strict=True))
    found = {}
    for row in (FORWARD, READING, RESID, PATTERNS):
        work = ours[row]
        assert work is not None
        found[row] = case.measured(work)
        own = theirs[row]
        if row != FORWARD and own is not None:
            seconds = alternate({BASELINE: own, OURS: work}, case.repetitions, at_least=case.at_least)
            found[row]["of_hf_own_means"] = summarise(seconds)[OURS]
    found[FORWARD]["logits_difference"] = _logits_difference(case)
    return found


def _logits_difference(case: Case) -> float:
    """The largest difference from Hugging Face's logits, in parts of the largest logit."""
    theirs = case.setting.hf_model(**case.setting.clean).logits.float()
    ours = case.model(case.model.as_inputs(case.setting.clean))
    assert ours is not None
    return float((ours.float() - theirs).abs().max() / theirs.abs().max())


def generate(case: Case) -> dict[str, Measured]:
    """New tokens after the prompt, beside Hugging Face's generation."""
    prompt, n = case.model.as_inputs(case.setting.clean), case.n_tokens
    theirs = functools.partial(generation.hf, case.setting.hf_model, case.setting.clean, n)
    ours = functools.partial(generation.ours, case.model, prompt, n)
    same = float((ours() == theirs()).float().mean())
    return {f"generate {n} tokens": case.measured(ours, theirs, same_tokens=same, mark=GENERATION_MARK)}


def heads(case: Case) -> dict[str, Measured]:
    """Scores of all heads, and the map of the best."""
    prompt = case.model.as_inputs(case.setting.clean)
    return {HEADS: case.measured(lambda: head_scores.heads_and_map(case.model, prompt))}


def sweep(case: Case) -> dict[str, Measured]:
    """Activation patching by Replay, besides the kept run."""
    positions = range(case.setting.inputs.shape[1])[-SWEPT:]
    runs = [run.data for run in resid_pre(case.setting, positions).runs]
    replay = Replay(case.model, case.setting.inputs)
    counted = case.in_forwards(replay.sweep(runs, metric).forecast)
    return {SWEEP: case.measured(lambda: replay.run(runs, metric, progress=False), counted=counted, runs=len(runs))}


def block(case: Case) -> dict[str, Measured]:
    """Attention knockout as in 2411.18620."""
    inputs = knockout.with_asked_spans(case.setting.inputs)
    work = lambda: attention_knockout(case.model, inputs, knockout.EDGES)  # noqa: E731
    about = work().attrs
    counted = about["n_forward"] + case.in_forwards(about["work"])
    return {KNOCKOUT: case.measured(work, counted=counted, runs=about["runs"])}


def traced(case: Case) -> dict[str, Measured]:
    """A causal trace as in 2406.04236."""
    inputs = case.setting.inputs
    options = trace.options_of("three kinds", case.setting.corrupted, case.n_image)
    work = lambda: causal_trace(case.model, inputs, **options)  # noqa: E731
    about = work().attrs
    counted = about["n_forward"] + case.in_forwards(about["work"])
    return {TRACE: case.measured(work, counted=counted, runs=about["runs"])}


def edit(case: Case) -> dict[str, Measured]:
    """One fact edited at the last position, a quarter of the way up: searched for, applied, and reverted."""
    layer = case.model.cfg.n_layers // 4
    request = EditRequest(case.setting.clean, target=[_other_token(case)])
    weight = case.model.get_parameter(f"language.blocks.{layer}.mlp.down.weight")
    before = weight.clone()

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HookedLLaVAWarning)  # random weights need not learn it
            found = multedit(case.model, request, layer=layer, position="last")
        with found.applied():
            assert not torch.equal(weight, before)

    measured = case.measured(work)
    return {EDIT: {**measured, "reverted_exactly": torch.equal(weight, before)}}


def _other_token(case: Case) -> int:
    """One that is not answered anyway."""
    logits = case.model(case.setting.clean)
    assert logits is not None
    return int(logits[0, -1].topk(2).indices[1])


def autoencoder(case: Case) -> dict[str, Measured]:
    """A step of training in float32, on the activations of the prompt's positions after half of the blocks."""
    name = f"blocks.{case.model.cfg.n_layers // 2}.hook_resid_post"
    acts = case.model.run_with_cache(case.setting.clean, names_filter=name)[1][name][0].float()
    with torch.device(case.device):
        sae = SparseAutoencoder(SAEConfig(d_in=acts.shape[1], d_sae=case.width, k=case.k))
        start = F.normalize(torch.randn_like(sae.W_dec), dim=1)
    for weight, value in ((sae.W_dec, start), (sae.encoder.weight, start), (sae.encoder.bias, 0), (sae.b_dec, 0)):
        weight.copy_(torch.as_tensor(value, device=case.device))
    trainer = SAETrainer(sae, TrainingConfig(steps=2**31), Processes(0, 1))
    return {STEP: case.measured(lambda: trainer.step([acts]), width=case.width, activations=len(acts))}


PARTS: dict[str, Callable[[Case], dict[str, Measured]]] = {
    "forward": forwards,
    "generate": generate,
    "heads": heads,
    "sweep": sweep,
    "knockout": block,
    "edit": edit,
    "autoencoder": autoencoder,
    "trace": traced,
}
"""What is measured, the shortest first."""


def mark_of(row: str, measured: Measured) -> float | None:
    """The ratio that is to be reached, if there is one."""
    if "counted" in measured:
        return OVER_COUNTED * measured["counted"]
    return measured.get("mark", MARKS.get(row))


def table(report: Measured) -> str:
    """One geometry's rows against the marks."""
    cells = {}
    for row, of in report["rows"].items():
        ours, theirs, mark = of[OURS], of[BASELINE], mark_of(row, of)
        cells[row] = [
            f"{theirs['median_s']:.3g}",
            f"{ours['ratio']:.2f}",
            "-" if mark is None else f"{mark:.2f}",
            f"{of['counted']:.2f}" if "counted" in of else "-",
            f"{ours['peak_bytes'] / _MB:.0f} ({theirs['peak_bytes'] / _MB:.0f})",
            f"{ours['host_reads']} ({theirs['host_reads']})",
        ]
    columns = [f"{BASELINE}, s", OURS, "to reach", "counted", "memory over the weights, MiB", "host reads"]
    return markdown(columns, cells, f"{report['geometry']}, {report['sizes']['positions']} positions")


def tables(report: Measured) -> list[str]:
    """The table of one geometry, with what it was measured on."""
    made = f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}"
    left = [f"{part}: {why}" for part, why in report["left_out"].items()]
    missing = f" Not measured: {'; '.join(left)}." if left else ""
    return [table(report), f"{made}. In brackets {BASELINE}.{missing}"]


def marks() -> str:
    """What is to be reached, as long as nothing is measured."""
    of_counted = dict.fromkeys((SWEEP, KNOCKOUT, TRACE), f"{OVER_COUNTED:g} x counted")
    wanted = {row: f"{mark:.2f}" for row, mark in MARKS.items()} | {"generate 64 tokens": f"{GENERATION_MARK:.2f}"}
    cells = {row: [mark, "not measured yet"] for row, mark in (wanted | of_counted).items()}
    return markdown(["to reach", OURS], cells, "llava-1.5-7b on one H100, in Hugging Face's")


def measure(name: str, options: Any) -> None:
    """All parts of one geometry; the file is written after each."""
    began, device = time.perf_counter(), torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if options.quick else "bfloat16"))
    case = Case.of(GEOMETRIES[name], device, dtype, options.repetitions, quick=options.quick)
    config = case.setting.hf_model.config
    image = (GEOMETRIES[name].small() if options.quick else GEOMETRIES[name]).image
    report: Measured = {
        "geometry": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cuda": torch.version.cuda,
        "dtype": str(case.model.cfg.dtype).removeprefix("torch."),
        "sizes": sizes(config, case.setting.inputs.shape[1], image),
        "tiles": case.n_tiles,
        "weight_bytes": sum(p.nbytes for p in case.model.parameters()),
        "built_s": time.perf_counter() - began,
        "rows": {},
        "left_out": {},
    }
    for part in options.parts:
        if time.perf_counter() - began > 60 * options.minutes:
            report["left_out"][part] = f"{options.minutes:g} minutes were over"
        else:
            _measure_part(part, case, report)
        report["seconds"] = time.perf_counter() - began
        write("full_size", options, **report)


def _measure_part(part: str, case: Case, report: Measured) -> None:
    """One part; where it fails that is written down, and the others are measured."""
    try:
        report["rows"] |= PARTS[part](case)
    except Exception as error:  # noqa: BLE001 (a lent machine is lent once)
        report["left_out"][part] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=5, geometries=("llava-1.5-7b",), choices=GEOMETRIES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16, with --quick float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each geometry, after which no part begins")
    options = start(parser, argv)
    chosen, given = options.geometry, options.out
    failed: dict[str, Mapping[str, str]] = {}
    for name in chosen:
        options.out = given if given and len(chosen) == 1 else _path(name, given, quick=options.quick)
        measure(name, options)
        report = json.loads(options.out.read_text(encoding="utf-8"))
        failed |= {name: report["left_out"]} if report["left_out"] else {}
        print("\n\n".join(["", *tables(report)]), flush=True)
        print(f"\nwritten to {options.out}")
        gc.collect()
    if failed:
        raise SystemExit(f"Not everything was measured: {failed}")


def _path(name: str, given: Path | None, *, quick: bool) -> Path:
    """Where the report of one of several geometries goes: `--out` is then a folder."""
    return (given or RESULTS) / f"full_size-{name}{'.quick' if quick else ''}.json"


if __name__ == "__main__":
    main()
