"""One sparse autoencoder in training: its loss, its optimiser, and what it remembers of earlier steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooked_llava.checks import finite_number, whole_number
from hooked_llava.errors import ConfigError, InputError
from hooked_llava.machine.processes import Processes
from hooked_llava.sae import losses
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder

AUX_WEIGHT = 1 / 32
DEAD_AFTER = 10_000_000
_LR, _LR_WIDTH = 2e-4, 2**14
_WARMUP = 1000
_THRESHOLD_MEMORY = 0.9  # of the running mean of BatchTopK's thresholds, each of a whole batch
_TRAINED = ("topk", "batch_topk", "matryoshka", "jump_relu")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What decides how an autoencoder is trained.

    Attributes:
        steps (int): Steps of the optimiser.
        lr (float | None): The highest learning rate; None for 2e-4 / sqrt(d_sae / 2**14), as in 2411.14982.
        warmup (int | None): Steps over which the rate rises to it, before it falls linearly to 0; None for 1000, or a tenth of
            the steps if that is fewer.
        accumulate (int): Batches of the stream in one step.
        aux_weight (float): Weight of the auxiliary loss.
        dead_after (int): A feature is dead if it was active at none of so many activations.
        sparsity_weight (float): Of (L0 / k - 1)^2, which holds JumpReLU's number of active features at k, where a penalty on L0
            itself would leave it open.
        bandwidth (float): Width of the kernel of JumpReLU's gradients, and its first thresholds, in units of the root of the
            activations' mean squared norm around the decoder's bias; 0.001 in 2407.14435. Thresholds move by about `lr`
            of themselves in a step, so k is reached late or never where `lr * steps` is small.
        clip (float): The norm to which gradients are clipped.
        seed (int): Of the start values.
    """

    steps: int
    lr: float | None = None
    warmup: int | None = None
    accumulate: int = 1
    aux_weight: float = AUX_WEIGHT
    dead_after: int = DEAD_AFTER
    sparsity_weight: float = 1.0
    bandwidth: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number(self.steps, "steps", least=1)
        whole_number(self.accumulate, "accumulate", least=1)
        whole_number(self.dead_after, "dead_after", least=1)
        for name in ("lr", "aux_weight", "sparsity_weight", "bandwidth", "clip"):
            if (value := getattr(self, name)) is not None:
                finite_number(value, name, least=0.0)
        if self.warmup is not None:
            whole_number(self.warmup, "warmup", least=0, most=self.steps - 1, of=f" of steps={self.steps}")

    def learning_rate(self, step: int, d_sae: int) -> float:
        """The rate of a step of the optimiser, counted from 0.

        >>> config = TrainingConfig(steps=10, warmup=2)
        >>> [round(config.learning_rate(i, 2**14) / 2e-4, 3) for i in (0, 1, 2, 9)]
        [0.5, 1.0, 1.0, 0.125]
        """
        highest = _LR / (d_sae / _LR_WIDTH) ** 0.5 if self.lr is None else self.lr
        rise = min(_WARMUP, self.steps // 10) if self.warmup is None else self.warmup
        if step < rise:
            return highest * (step + 1) / rise
        return highest * (self.steps - step) / (self.steps - rise)


@dataclass(frozen=True)
class StepRecord:
    """What one step of the optimiser has found, over all its batches and processes.

    Attributes:
        step (int): Its number, counted from 1.
        fvu (float): The share of variance unexplained.
        aux (float): The auxiliary loss, also as a share of variance.
        l0 (float): Active features of a vector, on average.
        dead (float): The share of features that are dead.
        lr (float): The learning rate.
    """

    step: int
    fvu: float
    aux: float
    l0: float
    dead: float
    lr: float


class _Reconstruction(NamedTuple):
    """What one batch gives: its loss, what stays unexplained, how often each feature was active, BatchTopK's threshold."""

    loss: Tensor
    error: Tensor
    counts: Tensor
    threshold: Tensor


class SAETrainer:
    """Trains one autoencoder, step by step; see `train_sae` for a whole run.

    Args:
        sae: the autoencoder, with its start values; it is changed in place.
        config: how it is trained.
        processes: those that train it together, each with its part of every batch.

    Raises `ConfigError` for a kind that is not trained here.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainingConfig, processes: Processes) -> None:
        _check_kind(sae.cfg)
        self.sae, self.config, self.processes = sae.requires_grad_(True), config, processes
        self.steps_done = 0
        self.unfired = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.b_dec.device)
        """How many activations each feature was not active at, since it last was."""
        self.bandwidth = 0.0
        self.log_threshold = nn.Parameter(torch.zeros_like(sae.b_enc)) if sae.cfg.kind == "jump_relu" else None
        self.optimizer = torch.optim.Adam(self._parameters(), lr=0.0)

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.sae.parameters(), *([] if self.log_threshold is None else [self.log_threshold])]

    @torch.no_grad()
    def start(self, batches: list[Tensor]) -> None:
        """Set the decoder's bias to the geometric median of the first batches, and JumpReLU's first thresholds by their size."""
        x = torch.cat(self._chunks(batches))
        median = losses.geometric_median(x, self.processes)
        self._check(bool(median.isfinite().all()), [x])
        self.sae.b_dec.copy_(median)
        if self.log_threshold is not None:
            squares = (x - self.sae.b_dec).pow(2).sum()
            total, n = self.processes.sum(torch.stack([squares, squares.new_tensor(len(x))])).tolist()
            self.bandwidth = self.config.bandwidth * (total / n) ** 0.5
            self.log_threshold.fill_(self.bandwidth).log_()

    @torch.enable_grad()
    def step(self, batches: list[Tensor]) -> StepRecord:
        """One step of the optimiser over some batches [batch, d_in], as over one that holds all of them.

        Raises `InputError` for vectors of another width, and where activations or gradients are not finite, before any weight is
        changed.
        """
        chunks = self._chunks(batches)
        variance = losses.variance_around_mean(chunks, self.processes)
        self._check_variance(float(variance))
        lr = self.config.learning_rate(self.steps_done, self.sae.cfg.d_sae)
        dead = self.unfired >= self.config.dead_after
        self.optimizer.zero_grad()
        found = self._backward(chunks, variance, dead)
        losses.remove_parallel_gradient(self.sae)
        norm = nn.utils.clip_grad_norm_(self._parameters(), self.config.clip)
        self._check(bool(norm.isfinite()), chunks)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        losses.normalize_decoder(self.sae)
        self._set_thresholds(found["threshold"])
        self.unfired += int(found["n"])
        self.unfired[found["fired"]] = 0
        self.steps_done += 1
        error, aux, active = (float(found[name]) for name in ("error", "aux", "active"))
        share = float(dead.float().mean())
        return StepRecord(self.steps_done, error / float(variance), aux, active / found["n"], share, lr)

    def _chunks(self, batches: list[Tensor]) -> list[Tensor]:
        d_in, like = self.sae.cfg.d_in, self.sae.b_dec
        for x in batches:
            if x.ndim != 2 or x.shape[1] != d_in:
                raise InputError(
                    f"A batch has the shape {list(x.shape)}; expected [batch, {d_in}], the width it began with."
                )
            if not len(x):
                raise InputError(f"Step {self.steps_done + 1}: the stream gave a batch without activations.")
        return [x.detach().to(like.device, like.dtype) for x in batches]

    def _backward(self, chunks: list[Tensor], variance: Tensor, dead: Tensor) -> dict[str, Any]:
        """Gradients of the loss over all chunks and processes, and the sums that a record is made of."""
        n = self.processes.sum(variance.new_tensor([sum(map(len, chunks))])).item()
        l0 = self._l0(chunks) / n if self.log_threshold is not None else None
        sums, fired = variance.new_zeros(4), torch.zeros_like(dead, dtype=torch.int)
        for x in chunks:
            pre_acts = self.sae.pre_acts(x)
            one = self._reconstruction(x, pre_acts, variance)
            loss = one.loss if l0 is None else one.loss + self._sparsity(pre_acts, l0, n)
            aux = losses.auxiliary_loss(self.sae, pre_acts, one.error, dead, variance)
            (loss + self.config.aux_weight * aux).backward()
            fired |= (one.counts > 0).int()
            sums += torch.stack([one.error.detach().pow(2).sum(), aux.detach(), one.counts.sum(), one.threshold])
        for parameter in self._parameters():
            assert parameter.grad is not None
            self.processes.sum(parameter.grad)
        error, aux, active, threshold = self.processes.sum(sums)
        fired = self.processes.most(fired).bool()
        threshold = threshold / len(chunks) / self.processes.n
        return {"error": error, "aux": aux, "active": active, "threshold": threshold, "fired": fired, "n": n}

    def _reconstruction(self, x: Tensor, pre_acts: Tensor, variance: Tensor) -> _Reconstruction:
        sae, none = self.sae, x.new_zeros(())
        if sae.cfg.kind == "topk":
            features = sae.choose(pre_acts)
            error = x - sae.decode(features)
            counts = none.new_zeros(sae.cfg.d_sae).index_add(
                0, features.indices.flatten(), (features.values.detach() > 0).flatten().to(x.dtype)
            )
            return _Reconstruction(error.pow(2).sum() / variance, error, counts, none)
        if self.log_threshold is not None:
            threshold, acts = none, losses.JumpReLU.apply(pre_acts, self.log_threshold.exp(), self.bandwidth)
        else:
            n = round(self.processes.sum(variance.new_tensor([len(x)])).item())
            threshold = losses.batch_threshold(pre_acts, (sae.cfg.k or 1) * n, self.processes)
            acts = pre_acts * (pre_acts >= threshold)
        errors = losses.nested_errors(sae, x, acts)
        loss = torch.stack([error.pow(2).sum() for error in errors]).mean() / variance
        return _Reconstruction(loss, errors[-1], (acts.detach() > 0).sum(0).to(x.dtype), threshold)

    @torch.no_grad()
    def _l0(self, chunks: list[Tensor]) -> Tensor:
        """How many features are above their thresholds, over all chunks and processes."""
        assert self.log_threshold is not None
        threshold = self.log_threshold.exp()
        return self.processes.sum(torch.stack([(self.sae.pre_acts(x) > threshold).sum().float() for x in chunks]).sum())

    def _sparsity(self, pre_acts: Tensor, l0: Tensor, n: float) -> Tensor:
        """A term with the gradient of weight (L0 / k - 1)^2, where L0 is the mean over all chunks and processes."""
        assert self.log_threshold is not None
        assert self.sae.cfg.k is not None
        active = losses.Step.apply(pre_acts, self.log_threshold.exp(), self.bandwidth).sum() / n
        return self.config.sparsity_weight * 2 * (l0 / self.sae.cfg.k - 1) * active / self.sae.cfg.k

    @torch.no_grad()
    def _set_thresholds(self, of_batch: Tensor) -> None:
        if self.log_threshold is not None:
            assert self.sae.threshold is not None
            self.sae.threshold.copy_(self.log_threshold.exp())
        elif self.sae.threshold is not None:
            weight = 1.0 if self.steps_done == 0 else 1 - _THRESHOLD_MEMORY
            self.sae.threshold.lerp_(of_batch.expand_as(self.sae.threshold), weight)

    def _check_variance(self, variance: float) -> None:
        if variance == 0:
            raise InputError(
                f"Step {self.steps_done + 1}: all activations of the step are the same vector, so no share of their variance "
                "can be explained. Give larger batches, or other tokens."
            )

    def _check(self, finite: bool, chunks: list[Tensor]) -> None:
        if finite:
            return
        if all(bool(x.isfinite().all()) for x in chunks):
            raise InputError(
                f"Step {self.steps_done + 1}: gradients are not finite, so training has diverged; lower lr=, or start again "
                "from the last checkpoint."
            )
        raise InputError(
            f"Step {self.steps_done + 1}: the stream gave activations that are NaN or infinite; nothing was changed."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the steps to come: weights, moments, counters."""
        state = {
            "weights": self.sae.state_dict(),
            "moments": {str(i): moments for i, moments in self.optimizer.state_dict()["state"].items()},
            "unfired": self.unfired,
            "steps_done": self.steps_done,
            "bandwidth": self.bandwidth,
        }
        return state if self.log_threshold is None else {**state, "log_threshold": self.log_threshold.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer of the same configuration was."""
        self.sae.load_state_dict(state["weights"])
        moments = {int(i): dict(of_one) for i, of_one in state["moments"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.unfired.copy_(state["unfired"])
        self.steps_done, self.bandwidth = state["steps_done"], state["bandwidth"]
        if self.log_threshold is not None:
            self.log_threshold.copy_(state["log_threshold"])


def _check_kind(cfg: SAEConfig) -> None:
    if cfg.kind not in _TRAINED:
        raise ConfigError(f"kind={cfg.kind!r} is not trained here; expected one of {', '.join(_TRAINED)}.")
    if cfg.k is None:
        raise ConfigError(
            f"kind={cfg.kind!r} without k; expected how many features a vector has on average, such as k=32."
        )
    if cfg.kind == "matryoshka" and not cfg.groups:
        raise ConfigError(f"kind='matryoshka' without groups; expected growing widths that end with {cfg.d_sae}.")
