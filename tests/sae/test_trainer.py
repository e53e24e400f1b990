"""The schedule, and one step of training at a time."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import ConfigError, InputError
from hooked_llava.machine.processes import Processes
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.trainer import SAETrainer, TrainingConfig
from tests.oracles.plain_sae import train_by_hand
from tests.sae.test_autoencoder import activations

GROUPS = {"matryoshka": (8, 24)}
TRAINED = ("topk", "batch_topk", "matryoshka", "jump_relu")


def make_trainer(kind: str = "topk", *, d_in: int = 6, d_sae: int = 24, k: int = 3, **options) -> SAETrainer:
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, kind=kind, k=k, groups=GROUPS.get(kind, ()))
    settings = {"steps": 20, "lr": 0.01, "warmup": 2, "dead_after": 40}
    return SAETrainer(SparseAutoencoder(cfg).reset(0), TrainingConfig(**settings | options), Processes(0, 1))


def batches(n: int, size: int = 16) -> list[torch.Tensor]:
    return [activations(size, 6, seed=10 + i) @ torch.diag(torch.linspace(0.2, 3, 6)) + 1 for i in range(n)]


def weights(trainer: SAETrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}


def test_training_is_the_formulas_written_out():
    trainer, data = make_trainer(), batches(8)
    trainer.start(data[:1])
    sae = trainer.sae
    start = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    start = {name: tensor.detach().clone() for name, tensor in start.items()}
    rates = [0.005, 0.01, *(0.01 * (20 - i) / 18 for i in range(2, 8))]
    expected, seen = train_by_hand(data, start, rates, k=3, dead_after=40, aux_weight=1 / 32, clip=1.0)
    records = [trainer.step([x]) for x in data]
    assert [r.lr for r in records] == pytest.approx(rates)
    assert [(r.fvu, r.aux) for r in records] == [pytest.approx(one, rel=1e-3) for one in seen]
    assert any(aux > 0 for _, aux in seen)
    torch.testing.assert_close(sae.encoder.weight.detach(), expected["W_enc"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sae.W_dec.detach(), expected["W_dec"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sae.b_dec.detach(), expected["b_dec"], atol=1e-4, rtol=1e-3)


def test_the_rate_follows_the_papers_rule_and_counts_steps_once():
    config = TrainingConfig(steps=5000)
    rates = [config.learning_rate(step, 2**17) for step in range(5000)]
    assert max(rates) == pytest.approx(7.07e-5, rel=1e-3)
    assert rates.index(max(rates)) == 499  # warm-up of a tenth of the steps, since 1000 would be more
    assert rates[-1] < 1e-3 * max(rates)
    falls = torch.tensor(rates[500:]).diff()
    torch.testing.assert_close(falls, falls[:1].expand_as(falls), rtol=1e-2, atol=1e-12)
    trainer = make_trainer(accumulate=3)
    lrs = [trainer.step(batches(3)).lr for _ in range(20)]
    assert lrs == [trainer.config.learning_rate(step, 24) for step in range(20)]
    with pytest.raises(InputError, match=r"warmup=30.*steps=20.*0 to 19"):
        TrainingConfig(steps=20, warmup=30)


@pytest.mark.parametrize("kind", ["topk", "jump_relu"])
def test_accumulated_batches_count_as_one(kind):
    split, whole = make_trainer(kind), make_trainer(kind)
    for step in range(4):
        data = batches(3, size=10 + step)
        if step == 0:
            split.start(data)
            whole.start([torch.cat(data)])
        records = split.step(data), whole.step([torch.cat(data)])
        assert records[0].fvu == pytest.approx(records[1].fvu, rel=1e-4)
        assert records[0].l0 == pytest.approx(records[1].l0)
    for name, tensor in weights(split).items():
        torch.testing.assert_close(tensor, whole.sae.state_dict()[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_learns_and_keeps_unit_rows(kind):
    trainer, data = make_trainer(kind, steps=60), batches(60, size=32)
    trainer.start(data[:1])
    records = [trainer.step([x]) for x in data]
    assert records[-1].fvu < 0.5 * records[0].fvu
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(24))
    if kind != "jump_relu":
        assert records[-1].l0 == pytest.approx(3, abs=0.2)
        used = (trainer.sae.encode(torch.cat(data[-10:])).values > 0).sum(-1).float().mean()
        assert float(used) == pytest.approx(3, abs=0.6)  # also with the threshold that is kept for use


def test_jump_relus_active_features_move_to_k():
    few, many = (
        make_trainer("jump_relu", steps=80, lr=0.05, warmup=0, bandwidth=0.1, sparsity_weight=w) for w in (1.0, 0.0)
    )
    data = batches(80, size=32)
    for trainer in (few, many):
        trainer.start(data[:1])
    last = [[trainer.step([x]) for x in data][-1] for trainer in (few, many)]
    assert abs(last[0].l0 - 3) < 1.5
    assert last[1].l0 > last[0].l0 + 2


def test_dead_features_are_counted_by_activations():
    trainer = make_trainer(k=1, dead_after=30)
    records = [trainer.step([x]) for x in batches(1, size=7)]
    assert set(trainer.unfired.tolist()) == {0, 7}
    never = trainer.unfired == 7
    with torch.no_grad():
        trainer.sae.encoder.bias[never] = -100.0
    records += [trainer.step([x]) for x in batches(5, size=7)]
    assert trainer.unfired[never].tolist() == [42] * int(never.sum())
    # Counted before a step: after 4 steps 28 activations, after 5 steps 35.
    assert [r.dead > 0 for r in records] == [False] * 5 + [True]
    assert records[-1].dead >= float(never.float().mean())


def test_nothing_is_changed_by_activations_that_are_not_finite():
    trainer = make_trainer()
    trainer.start(batches(1))
    trainer.step(batches(1))
    before = weights(trainer)
    broken = batches(1)[0]
    broken[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"Step 2.*NaN or infinite"):
        trainer.step([broken])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    with torch.no_grad():
        trainer.sae.W_dec[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"Step 2.*diverged.*lr="):
        trainer.step(batches(1))


def test_what_is_not_trained_is_refused():
    with pytest.raises(ConfigError, match=r"kind='relu'.*topk"):
        make_trainer("relu")
    with pytest.raises(ConfigError, match=r"matryoshka.*groups.*24"):
        SAETrainer(
            SparseAutoencoder(SAEConfig(d_in=6, d_sae=24, kind="matryoshka", k=3)),
            TrainingConfig(steps=2),
            Processes(0, 1),
        )
    with pytest.raises(ConfigError, match=r"jump_relu.*k=32"):
        SAETrainer(
            SparseAutoencoder(SAEConfig(d_in=6, d_sae=24, kind="jump_relu")), TrainingConfig(steps=2), Processes(0, 1)
        )
    with pytest.raises(InputError, match=r"\[16, 5\].*\[batch, 6\]"):
        make_trainer().step([activations(16, 5)])


@pytest.mark.parametrize("name", ["lr", "aux_weight", "sparsity_weight", "bandwidth", "clip"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "0.1"])
def test_settings_that_are_no_numbers_or_negative_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        TrainingConfig(steps=3, **{name: value})


def test_batches_without_variance_or_without_activations_are_named():
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(InputError, match=r"Step 1.*same vector"):
        trainer.step([torch.ones(4, 6)])
    with pytest.raises(InputError, match=r"Step 1.*without activations"):
        trainer.step([torch.ones(0, 6)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
