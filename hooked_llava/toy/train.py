"""Trains `tiny-shapes` from scratch: `python -m hooked_llava.toy.train --seed 0 --steps 4000 --out DIR`.

First the vision tower and projector alone learn to say in words what each patch shows (`align_steps`), then everything
is trained together on packed questions (`steps`), most on the kinds still answered wrongly. A run can be stopped and
started again: the weights, both moments of the optimiser and the error rates are kept in `DIR/state.safetensors`, and
step i draws its data from a generator seeded with (seed, i), so a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hooked_llava.storage import read_tensors, write_tensors
from hooked_llava.toy.alignment import Alignment, OutlineHeads, ToyModel, align, image_embeddings, vision_states
from hooked_llava.toy.init import trainable_parameters
from hooked_llava.toy.neighbors import NeighborHeads
from hooked_llava.toy.packing import LEAD, Batch, BatchShape, KindSampler, pixels_of, sample_batch
from hooked_llava.toy.worlds import WORLDS, World

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
CHECKPOINT_FOLDER = "checkpoint"
_FORMAT = "hooked_llava.training.v1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; everything that decides its result."""

    world: str = "tiny-shapes"
    start: str = ""  # the folder of a checkpoint to go on from, instead of new weights
    seed: int = 0
    steps: int = 4000
    align_steps: int = 550
    align_images: int = 32
    align_weight: float = 0.5  # of the alignment loss in the second stage
    neighbor_weight: float = 0.0  # of the loss of the read-out of neighbors, in the second stage
    slow_scale: float = 0.2  # of the learning rate of tower, projector and embedding in the second stage
    lr: float = 1e-3
    align_lr: float = 2e-3
    warmup: int = 100
    decay_steps: int = 1200
    schedule: str = ""  # kinds asked only from one step to another, such as "list_places=0-1500 list_patterns=1200-"
    curriculum_steps: int = 600  # over these, images grow from 2 to 5 shapes
    image_rows: int = 10
    text_rows: int = 3
    row_length: int = 288

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.align_steps + self.steps


class Trainer:
    """A run in progress: model, optimiser, error rates by kind, and the number of steps done."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.step = 0
        self.seconds = 0.0
        self.world = WORLDS[config.world]
        self.model = first_model(self.world, config).train()
        self.heads = OutlineHeads(self.model.model.vision_tower.config.hidden_size, config.seed)
        self.neighbor_heads = NeighborHeads(self.model.config.get_text_config().hidden_size, config.seed)
        self.sampler = KindSampler(self.world.kinds)
        self.optimizer = self._new_optimizer()

    @property
    def aligning(self) -> bool:
        """Whether the first stage is still on."""
        return self.step < self.config.align_steps

    def _trained(self) -> dict[str, Tensor]:
        """The parameters of the present stage, by name."""
        named = trainable_parameters(self.model)
        if self.aligning:
            seeing = {n: p for n, p in named.items() if "vision_tower" in n or "multi_modal_projector" in n}
            return seeing | {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        return named | self._neighbor_parameters()

    def _all(self) -> dict[str, Tensor]:
        """Every parameter that a state must hold, by name."""
        named = {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        named |= self._neighbor_parameters()
        return {**dict(self.model.named_parameters()), **named}

    def _neighbor_parameters(self) -> dict[str, Tensor]:
        """Those of the read-out of neighbors, where it is trained."""
        if not self.config.neighbor_weight:
            return {}
        return {f"neighbor_heads.{n}": p for n, p in self.neighbor_heads.named_parameters()}

    def _new_optimizer(self) -> torch.optim.AdamW:
        """AdamW for the present stage; in the second, what is aligned already moves slowly, or it would be undone."""
        groups = []
        for slow in (False, True):
            named = [(n, p) for n, p in self._trained().items() if slow == (not self.aligning and _was_aligned(n))]
            scale = self.config.slow_scale if slow else 1.0
            for decay, dimensions in ((0.01, (2, 3, 4)), (0.0, (1,))):
                parameters = [p for _, p in named if p.ndim in dimensions]
                groups.append({"params": parameters, "weight_decay": decay, "scale": scale})
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.98), fused=True)

    def learning_rate(self) -> float:
        """The learning rate of the coming step.

        Stage one: warm-up and half a cosine. Stage two: warm-up, constant, and a straight line to zero over the last
        steps, so that a run may be made longer or shorter until the decline begins and still equals one planned that
        way from the start.
        """
        c = self.config
        if self.aligning:
            return (
                c.align_lr
                * min(1.0, (self.step + 1) / c.warmup)
                * 0.5
                * (1 + math.cos(math.pi * self.step / c.align_steps))
            )
        done = self.step - c.align_steps
        return c.lr * min(1.0, (done + 1) / c.warmup, (c.steps - done) / c.decay_steps)

    def max_objects(self) -> int:
        """How many shapes an image may hold at this point of the curriculum."""
        progress = (self.step - self.config.align_steps) / max(1, self.config.curriculum_steps)
        few, most = self.world.few_objects, self.world.max_objects
        return min(most, few + int((most - few) * progress))

    def _not_now(self) -> tuple[str, ...]:
        """The kinds of question that the schedule leaves out at this step."""
        absent = []
        for entry in self.config.schedule.split():
            kind, steps = entry.split("=")
            first, last = steps.split("-")
            if not int(first) <= self.step < int(last or self.config.total_steps):
                absent.append(kind)
        return tuple(absent)

    def train_step(self) -> dict[str, Any]:
        """Does one step and returns what is worth logging."""
        rng = np.random.default_rng([self.config.seed, self.step])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["scale"]
        loss, record = self._align_loss(rng) if self.aligning else self._answer_loss(rng)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._trained().values()), 1.0)
        self.optimizer.step()
        was_aligning = self.aligning
        self.step += 1
        if was_aligning and not self.aligning:
            self.optimizer = self._new_optimizer()
        return record

    def _align_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        scenes = [self.world.sample(rng, None, self.world.max_objects) for _ in range(self.config.align_images)]
        views = [self.world.views(scene) for scene in scenes]
        states = vision_states(self.model, pixels_of(views))
        result = align(self.model, image_embeddings(self.model, states), scenes, views)
        return result.loss + self.heads(states, list(chain.from_iterable(views))), _alignment_record(result)

    def _answer_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        c = self.config
        shape = BatchShape(c.image_rows, c.text_rows, c.row_length)
        batch = sample_batch(rng, self.world, self.sampler, shape, self.max_objects(), self._not_now())
        logits, images, resid = packed_logits(self.world, self.model, batch)
        answers = torch.tensor([t.token for t in batch.targets])
        weights = torch.tensor([t.weight for t in batch.targets])
        loss = (cross_entropy(logits, answers, reduction="none") * weights).sum() / weights.sum()
        result = align(self.model, images, batch.scenes, batch.views)
        right: dict[str, list[int]] = defaultdict(list)
        for target, ok in zip(batch.targets, (logits.argmax(-1) == answers).tolist(), strict=True):
            if target.kind:
                right[target.kind].append(int(ok))
                self.sampler.observe(target.kind, 1.0 - ok)
        record = {"loss": loss.item(), "right": dict(right), **_alignment_record(result)}
        loss = loss + c.align_weight * result.loss
        if c.neighbor_weight:
            neighbors = self.neighbor_heads(resid, [self.world.neighbors(scene) for scene in batch.scenes])
            record["neighbor_loss"] = neighbors.item()
            loss = loss + c.neighbor_weight * neighbors
        return loss, record

    def save(self, folder: Path) -> None:
        """Writes everything needed to go on, in one file, replaced in one move."""
        tensors = {f"weight.{n}": p for n, p in self._all().items()}
        for name, parameter in self._trained().items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{m}.{name}": moments[m] for m in _MOMENTS if m in moments}
        updates = next((int(s["step"]) for s in self.optimizer.state.values()), 0)
        state = {"config": asdict(self.config), "step": self.step, "updates": updates, "errors": self.sampler.errors}
        state["seconds"] = self.seconds
        write_tensors(folder / STATE_FILE, tensors, {"state": json.dumps(state)}, _FORMAT)

    def load(self, folder: Path) -> None:
        """Goes back to where `save` was called; refuses a state that belongs to another run."""
        # version 0.1 wrote no format
        tensors, metadata = read_tensors(folder / STATE_FILE, [_FORMAT, None], writer="training")
        state = json.loads(metadata["state"])
        # Before the learning rate declines neither number of steps has had an effect, so both may still be changed.
        decline = min(_decline(TrainConfig(**state["config"])), _decline(self.config))
        free = {"steps", "decay_steps"} if state["step"] <= decline else set()
        if any(state["config"][k] != v for k, v in asdict(self.config).items() if k not in free):
            raise ValueError(
                f"{folder / STATE_FILE} belongs to a run with {state['config']}, not {asdict(self.config)}"
            )
        self.step, self.seconds, self.sampler.errors = state["step"], state["seconds"], state["errors"]
        with torch.no_grad():
            for name, parameter in self._all().items():
                parameter.copy_(tensors[f"weight.{name}"])
        self.optimizer = self._new_optimizer()
        if not state["updates"]:
            return
        for name, parameter in self._trained().items():
            moments = {m: tensors[f"{m}.{name}"] for m in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state["updates"])), **moments}


def first_model(world: World, config: TrainConfig) -> ToyModel:
    """The model that training begins with: new, or from a checkpoint, whose vocabulary is made longer where needed."""
    model = world.build_model(config.seed)
    if not config.start:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = type(model).from_pretrained(config.start, dtype=torch.float32)
        model.resize_token_embeddings(len(world.vocabulary))
    return model


def packed_logits(world: World, model: ToyModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the supervised positions [target, d_vocab] and the embeddings of views [view, patch, d_model].

    And, for the read-out of neighbors, the residual stream of images after its layers, [row, position, d_model].
    """
    images = image_embeddings(model, vision_states(model, batch.pixels))
    embeds = model.model.language_model.embed_tokens(batch.ids)
    packed = world.pack(model, images, batch.scenes)
    shown = [torch.cat([row[:2], image, row[2 + len(image) :]]) for row, image in zip(embeds, packed, strict=False)]
    done = model.model.language_model(
        inputs_embeds=torch.cat([torch.stack(shown), embeds[len(shown) :]]),
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    picked = done.last_hidden_state[[t.row for t in batch.targets], [t.position for t in batch.targets]]
    return model.lm_head(picked), images, done.hidden_states[NeighborHeads.LAYERS][: len(shown), LEAD:]


def _decline(config: TrainConfig) -> int:
    """The step from which the learning rate of the second stage declines."""
    return config.total_steps - config.decay_steps


def _was_aligned(name: str) -> bool:
    """Whether a parameter is part of the alignment of images with words."""
    return any(part in name for part in ("vision_tower", "multi_modal_projector", "embed_tokens"))


def _alignment_record(result: Alignment) -> dict[str, float]:
    return {
        "align_loss": result.loss.item(),
        "patch_shape": result.shape_accuracy,
        "patch_color": result.color_accuracy,
    }


def train(
    config: TrainConfig, out: Path, *, log_every: int = 50, save_minutes: float = 10.0, stop_at: int | None = None
) -> Trainer:
    """Trains until done (or until `stop_at` steps), going on from a state in `out` if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config)
    if (out / STATE_FILE).exists():
        trainer.load(out)
    last = min(config.total_steps, stop_at if stop_at is not None else config.total_steps)
    records: list[dict[str, Any]] = []
    start, saved = time.monotonic() - trainer.seconds, time.monotonic()
    stop: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))  # finish the step, keep the state, leave
    for _ in tqdm(
        range(trainer.step, last),
        initial=trainer.step,
        total=config.total_steps,
        mininterval=10,
        desc=f"seed {config.seed}",
    ):
        lr, stage = trainer.learning_rate(), "align" if trainer.aligning else "answer"
        records.append(trainer.train_step())
        trainer.seconds = time.monotonic() - start
        if trainer.step % log_every == 0 or trainer.step == config.align_steps:
            line = {
                "step": trainer.step,
                "stage": stage,
                "lr": lr,
                "seconds": round(trainer.seconds, 1),
                **_summary(records),
            }
            with (out / LOG_FILE).open("a") as log:
                log.write(json.dumps(line) + "\n")
            records = []
        if stop:
            break
        if time.monotonic() - saved > 60 * save_minutes or trainer.step == config.align_steps:
            trainer.save(out)
            saved = time.monotonic()
    trainer.save(out)
    if trainer.step == config.total_steps:
        save_checkpoint(trainer.world, trainer.model, out / CHECKPOINT_FOLDER)
    return trainer


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the logged steps; accuracy by kind on images never seen before."""
    keys = [k for k in records[0] if k != "right"]
    summary: dict[str, Any] = {k: round(float(np.mean([r[k] for r in records if k in r])), 4) for k in keys}
    right: dict[str, list[int]] = defaultdict(list)
    for record in records:
        for kind, answers in record.get("right", {}).items():
            right[kind] += answers
    summary["accuracy"] = {k: round(float(np.mean(v)), 3) for k, v in sorted(right.items())}
    summary["asked"] = {k: len(v) for k, v in sorted(right.items())}
    return summary


def save_checkpoint(world: World, model: ToyModel, folder: Path) -> None:
    """Writes a Hugging Face checkpoint with its processor: float16 in the file, float32 in config and when loaded."""
    stored = {n: p.detach().to(torch.float16).contiguous() for n, p in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=stored)
    world.build_processor().save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train an embedded model.")
    for name, value in asdict(TrainConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, required=True, help="folder for log, state and checkpoint")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    out, log_every = arguments.pop("out"), arguments.pop("log_every")
    train(TrainConfig(**arguments), out, log_every=log_every)


if __name__ == "__main__":
    main()
