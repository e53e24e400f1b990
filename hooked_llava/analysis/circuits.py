"""Which edges are enough?

A circuit is a set of edges between embedding, heads, MLPs and logits. It is faithful if the model gives the clean answer while
every edge outside it carries what it carries in a corrupted run. Hanna et al. (2024) choose circuits by the scores of edge
attribution with integrated gradients, from the logits down, and measure faithfulness by size.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int

from hooked_llava.checks import one_of, whole_number
from hooked_llava.errors import InputError
from hooked_llava.experiments.baselines import check_metrics, metric_with_baselines
from hooked_llava.experiments.circuit_runs import CircuitRun
from hooked_llava.experiments.pairs import prompt_pairs
from hooked_llava.model.requirements import check_supported
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.metrics import Metric
from hooked_llava.readout.resid import logits_and_activations
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import stack, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import PromptsLike

Choose = Literal["greedy", "top"]
"""From the logits down, or the largest anywhere."""
_PARTS = ("heads", "mlps", "embed")
_RECEIVER = re.compile(r"L(\d+)(?:H(\d+) ([qkv])| mlp)")


def circuit(edge_scores: xr.Dataset, n: int, *, choose: Choose = "greedy") -> xr.Dataset:
    """The n edges of a circuit, by the size of their scores: True in `heads`, `mlps` and `embed`, axes as in `edge_attribution`.

    Args:
        edge_scores: what `edge_attribution` gives; of several pairs their mean counts.
        n: number of edges.
        choose: "greedy" begins at the logits and always adds the largest edge into a node that the circuit has, as Hanna et
            al. (2024) do, so that every edge leads to the logits; "top" takes the largest edges, wherever they are.

    A smaller circuit is a part of every larger one of the same scores. Raises `InputError` for scores without their edges, and
    for more edges than there are.

    >>> part = xr.DataArray([[np.nan], [0.5]], dims=("receiver", "layer"), coords={"receiver": ["L0 mlp", "logits"]})
    >>> scores = xr.Dataset({"heads": 0.1 * part.expand_dims(head=1, axis=2), "mlps": part, "embed": ("receiver", [-2.0, 0.1])})
    >>> circuit(scores, 1, choose="top").embed.values.tolist(), circuit(scores, 1).mlps.values[:, 0].tolist()
    ([True, False], [False, True])
    """
    edges = _Edges.of(edge_scores)
    return edges.labelled(edges.kept(edges.order(choose), n))


def faithfulness_curve(
    model: HookedLLaVA,
    clean: PromptsLike,
    corrupted: PromptsLike,
    edge_scores: xr.Dataset | Mapping[str, xr.Dataset],
    sizes: Sequence[int],
    metric: Metric | Sequence[Metric] | None = None,
    *,
    choose: Choose = "greedy",
    n_random: int = 3,
    seed: int = 0,
    logit_positions: PositionsLike = "last",
    batch_size: int | None = 1,
) -> xr.Dataset:
    """How much of the difference between two runs a circuit restores, by its number of edges (Hanna et al. 2024).

    All edges outside the circuit carry the corrupted run's contributions: a run for each circuit, exact, over the positions
    from the first on at which the prompts differ.

    Args:
        model: the model.
        clean: one prompt, or a batch or list of them.
        corrupted: as many others, each of the same length as its partner, with images and spans in the same places.
        edge_scores: what `edge_attribution` gives, or several by name, such as {"EAP": ..., "EAP-IG": ...}.
        sizes: numbers of edges.
        metric: function of logits [..., d_vocab], or a list with one for each pair; by default the logit difference of the
            two prompts' own answers.
        choose: how edges are chosen by their scores, as for `circuit`.
        n_random: how many random orders of all edges are measured beside, as a control of the same sizes.
        seed: of the random orders.
        logit_positions: where the metric reads logits, if not at the last position (see `metrics.teacher_forced`).
        batch_size: circuits at once; each holds the change of every sender, [sender, position, d_model].

    Returns `faithfulness` [scores, size] and `random` [draw, size], (metric of the circuit - corrupted) / (clean - corrupted):
    1 is the clean run, 0 the corrupted one; for several pairs after an axis pair. `size` counts edges, the attribute `n_edges`
    all there are. Raises `InputError` for prompts that do not match, sizes that do not fit, runs whose metric does not differ,
    and models with parallel blocks.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.analysis import edge_attribution
    >>> from hooked_llava.readout.metrics import Answer, log_probability
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pair = model.prepare("Who made the star?"), model.prepare("Who made the ring?")
    >>> clara = log_probability(Answer.of(model, "Clara"))
    >>> curve = faithfulness_curve(model, *pair, edge_attribution(model, *pair, metric=clara), [0, 30], clara, n_random=1)
    >>> curve.faithfulness.dims, abs(float(curve.faithfulness[0, 0])) < 1e-3
    (('scores', 'size'), True)
    """
    check_supported("faithfulness_curve", model)
    missing, names, n_edges = _missing(model, edge_scores, sizes, choose, n_random, seed)
    pairs, several = prompt_pairs(model, clean, corrupted, metric)
    check_metrics(model, pairs, logit_positions)
    how = {"sizes": list(sizes), "choose": choose, "n_random": n_random, "seed": seed, "read": logit_positions}
    results = [_one_pair(model, *pair, missing, names, logit_positions, batch_size, how) for pair in pairs]
    results = [one.assign_coords(size=list(sizes)).assign_attrs(n_edges=n_edges) for one in results]
    return stack(results, "pair") if several else results[0]


def _missing(
    model: HookedLLaVA,
    edge_scores: xr.Dataset | Mapping[str, xr.Dataset],
    sizes: Sequence[int],
    choose: Choose,
    n_random: int,
    seed: int,
) -> tuple[Bool[torch.Tensor, "order size receiver sender"], list[str], int]:
    """The edges outside each circuit, those of random orders last; names of the scores; and how many edges there are."""
    by_name: Mapping[str, xr.Dataset]
    by_name = {"edges": edge_scores} if isinstance(edge_scores, xr.Dataset) else edge_scores
    whole_number(n_random, "n_random", least=0, expected="how many random orders are measured")
    edges = {name: _Edges.of(scores) for name, scores in by_name.items()}
    if not edges or not len(sizes):
        raise InputError(f"edge_scores has {len(edges)} results and sizes={list(sizes)!r}; give at least one of each.")
    first = next(iter(edges.values()))
    _check_edges(model, edges)
    rng = np.random.default_rng(seed)
    orders = [one.order(choose) for one in edges.values()] + [first.shuffled(rng) for _ in range(n_random)]
    kept = np.stack([[first.kept(order, n) for n in sizes] for order in orders])  # (order, size, receiver, sender)
    return torch.from_numpy(first.there & ~kept), list(edges), int(first.there.sum())


def _one_pair(
    model: HookedLLaVA,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric | None,
    missing: torch.Tensor,
    names: list[str],
    logit_positions: PositionsLike,
    batch_size: int | None,
    how: dict[str, object],
) -> xr.Dataset:
    with provenance("faithfulness_curve", model, clean, corrupted=corrupted, n_forward=2, **how) as made:
        replay, table, layers = Replay(model, clean), model.hooks_table, range(model.cfg.n_layers)
        senders = ["hook_embed", *(table.name(part, layer) for part in ("z", "mlp_out") for layer in layers)]
        read = resolve_positions(logit_positions, corrupted)
        logits, there = logits_and_activations(model, corrupted, read, senders)
        there_logits = replay.shaped(logits[None], logit_positions)[0]
        measure, ends = metric_with_baselines(model, metric, replay.logits(logit_positions), there_logits, "denoise")
        if ends["clean"] == ends["corrupted"]:
            raise InputError(
                f"The metric is {ends['clean']} of both runs, so there is nothing to restore; give another pair."
            )
        embedded = replay.kept.entering(0)[0]
        change = there["hook_embed"][0].to(embedded.device) - embedded  # (pos, d_model)
        changed = change.any(-1).tolist()
        differ = [p for p in clean.token_map.real if changed[p]]
        where = range(differ[0], clean.token_map.real.stop) if differ else clean.token_map.real
        runs = [
            CircuitRun(model, one, change[where.start : where.stop], there, where).interventions()
            for one in missing.flatten(0, 1)
        ]
        values = to_numpy(replay.run(runs, measure, logit_positions, batch_size)).reshape(missing.shape[:2])
        restored = (values - ends["corrupted"]) / (ends["clean"] - ends["corrupted"])
        return xr.Dataset(
            {
                "faithfulness": (("scores", "size"), restored[: len(names)]),
                "random": (("draw", "size"), restored[len(names) :]),
            },
            coords={"scores": names, "draw": range(len(restored) - len(names))},
            attrs=made.attrs(**ends, work=replay.work.forwards),
        )


def _check_edges(model: HookedLLaVA, edges: Mapping[str, _Edges]) -> None:
    cfg = model.config.language
    n_receivers = cfg.n_layers * (cfg.n_heads + 2 * cfg.n_key_value_heads + 1) + 1
    for name, one in edges.items():
        if one.there.shape != (n_receivers, 1 + cfg.n_layers * (cfg.n_heads + 1)):
            raise InputError(
                f"The edges {name!r} are between {one.there.shape[1]} senders and {one.there.shape[0]} receivers, and this "
                f"model has {1 + cfg.n_layers * (cfg.n_heads + 1)} and {n_receivers}; give edge_attribution of this model."
            )


class _Edges(NamedTuple):
    """Scores of edges as a table, senders in the order of the model: the embedding, then in each layer heads and MLP."""

    scores: Float[np.ndarray, "receiver sender"]
    parts: xr.Dataset

    @classmethod
    def of(cls, edge_scores: xr.Dataset) -> _Edges:
        if (
            not isinstance(edge_scores, xr.Dataset)
            or set(_PARTS) - set(edge_scores)
            or "receiver" not in edge_scores.coords
        ):
            raise InputError(f"edge_scores is {type(edge_scores).__name__}; expected what edge_attribution returns.")
        parts = edge_scores[list(_PARTS)]
        parts = parts.mean("pair", skipna=False) if "pair" in parts.dims else parts
        heads, mlps = (parts[n].transpose("receiver", "layer", ...).values for n in ("heads", "mlps"))
        by_layer = np.concatenate([heads, mlps[..., None]], axis=-1)  # (receiver, layer, head or MLP)
        table = np.concatenate([parts["embed"].values[:, None], by_layer.reshape(len(heads), -1)], axis=1)
        return cls(table, parts)

    @property
    def there(self) -> np.ndarray:
        """Which of all pairs are edges."""
        return np.isfinite(self.scores)

    def order(self, choose: Choose) -> Int[np.ndarray, "edge 2"]:
        """All edges (receiver, sender), the first of a circuit first."""
        one_of(choose, get_args(Choose), "choose")
        if choose == "greedy":
            return self._from_the_logits()
        found = np.argwhere(self.there)
        return found[np.argsort(-abs(self.scores[tuple(found.T)]), kind="stable")]

    def shuffled(self, rng: np.random.Generator) -> Int[np.ndarray, "edge 2"]:
        """All edges in a random order."""
        return rng.permutation(np.argwhere(self.there))

    def kept(self, order: Int[np.ndarray, "edge 2"], n: int) -> np.ndarray:
        """The first n edges, [receiver, sender]; raises `InputError` for more than there are."""
        whole_number(n, "n", least=0, of=" edges", expected=f"0 to {len(order)}")
        if n > len(order):
            raise InputError(f"n={n} edges; expected 0 to {len(order)}.")
        chosen = np.zeros(self.scores.shape, dtype=bool)
        chosen[tuple(order[:n].T)] = True
        return chosen

    def labelled(self, table: np.ndarray) -> xr.Dataset:
        """A table [receiver, sender] with the axes of the scores."""
        heads = self.parts["heads"].transpose("receiver", "layer", "head")
        by_layer = table[:, 1:].reshape(*heads.shape[:2], -1)
        values = {"heads": by_layer[..., :-1], "mlps": by_layer[..., -1], "embed": table[:, 0]}
        axes = ("receiver", "layer", "head")
        return xr.Dataset({n: (axes[: v.ndim], v) for n, v in values.items()}, coords=heads.coords)

    def _from_the_logits(self) -> Int[np.ndarray, "edge 2"]:
        """The largest edge into a node that is there already, again and again, from the logits on."""
        readers = self._readers()
        queue: list[tuple[float, int, int]] = []
        opened: set[int] = set()

        def enter(sender: int) -> None:
            for receiver in readers.get(sender, ()):
                if receiver not in opened:
                    opened.add(receiver)
                    for source in np.flatnonzero(self.there[receiver]).tolist():
                        heapq.heappush(queue, (-abs(float(self.scores[receiver, source])), receiver, source))

        enter(-1)
        found = []
        while queue:
            _, receiver, sender = heapq.heappop(queue)
            found.append((receiver, sender))
            enter(sender)
        return np.array(found, dtype=int).reshape(-1, 2)

    def _readers(self) -> dict[int, list[int]]:
        """The receivers of each node by its number as a sender; -1 stands for the logits."""
        n_heads = self.parts.sizes["head"]
        labels = [str(label) for label in self.parts["receiver"].values]
        n_key_value = len({m[2] for label in labels if (m := _RECEIVER.fullmatch(label)) and m[3] == "k"}) or n_heads
        readers: dict[int, list[int]] = {-1: []}
        for row, label in enumerate(labels):
            match = _RECEIVER.fullmatch(label)
            if match is None:
                readers[-1].append(row)
                continue
            start = 1 + int(match[1]) * (n_heads + 1)
            if match[2] is None:
                nodes: Sequence[int] = [start + n_heads]
            elif match[3] == "q":
                nodes = [start + int(match[2])]
            else:  # a key-value head is read by a group of heads
                group = n_heads // n_key_value
                nodes = range(start + int(match[2]) * group, start + (int(match[2]) + 1) * group)
            for node in nodes:
                readers.setdefault(node, []).append(row)
        return readers
