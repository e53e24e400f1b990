"""POPE: questions whether an object is in an image, and how often a model says so where it is not (Li et al., arXiv 2305.10355).

Half of the questions name an object that is there. The other half name one that is not: any ("random"), one that is frequent in
the data set ("popular"), or one that often appears together with what is there ("adversarial").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hooked_llava.checks import one_of, whole_number
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.study import OF_ALL
from hooked_llava.errors import InputError
from hooked_llava.results.map_quality import mean_intervals, percentile_interval

POPE_KINDS = ("random", "popular", "adversarial")
"""The three kinds of questions, by how the absent objects were chosen."""
POPE_TAIL = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluation puts after each question."""
_ASKED = ("question_id", "image", "text", "label")
_ANSWERS = {"yes": "Yes", "no": "No"}
_DENYING = ("No", "not", "no")
_STATISTICS = ["mean", "low", "high"]
_SUFFIXES = (".json", ".jsonl")


def read_pope(path: str | Path, *, kinds: Iterable[str] | None = None, limit: int | None = None) -> list[StudyRow]:
    """The questions of one POPE file, or of all that are in a folder: a JSON object a line, with question_id, image, text, label.

    A row's kind is its field `category` where it has one, otherwise the word "random", "popular" or "adversarial" in the
    file's name, as in coco_pope_random.json; its id is the kind and the question_id. The answer is "Yes" or "No".

    Args:
        path: a file, or a folder with files (.json, .jsonl) whose names say their kinds.
        kinds: kinds of question to read (`POPE_KINDS`); all that are there by default.
        limit: questions of each file, the first ones, at least 1; all by default.

    Raises `InputError` for a file that is not there or of no kind, a line that is no such question, unknown kinds, and a limit
    below 1.

    >>> import tempfile
    >>> from hooked_llava.toy.pope_tables import write_pope
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = read_pope(write_pope(folder, n=2), kinds=["popular"])
    >>> [(row.id, row.kind, row.answer) for row in rows]
    [('popular-1', 'popular', 'Yes'), ('popular-2', 'popular', 'No')]
    """
    wanted = POPE_KINDS if kinds is None else tuple(kinds)
    for kind in wanted:
        one_of(kind, POPE_KINDS, "kinds", says=f"There is no kind {kind!r}.")
    if limit is not None:
        whole_number(limit, "limit", least=1, of=" questions of each file", expected="at least 1, or None for all")
    rows = [row for file in _files(Path(path)) for row in _read(file, limit) if row.kind in wanted]
    if not rows:
        raise InputError(f"{str(path)!r} holds no questions of the kinds {', '.join(wanted)}.")
    return rows


def is_pope(path: str | Path) -> bool:
    """Whether this is a POPE file, by its first line, or a folder that holds one.

    >>> is_pope("nowhere")
    False
    """
    path = Path(path)
    return any(map(_begins_as_pope, [path] if path.is_file() else _tables_in(path)))


def said_yes(said: str) -> bool:
    """Whether an answer counts as yes by the rule of POPE's code: its first sentence has no word "No", "no" or "not".

    >>> said_yes("Yes, there is."), said_yes("No"), said_yes("There is not. Yes."), said_yes("Nothing")
    (True, False, False, True)
    """
    words = said.partition(".")[0].replace(",", "").split(" ")
    return not any(word in _DENYING for word in words)


def answers_match_as_pope(said: str, answer: str) -> bool:
    """Whether what was said and the answer are both yes or both no, by `said_yes`.

    >>> answers_match_as_pope("No, there is no dog.", "No")
    True
    """
    return said_yes(said) == said_yes(answer)


def pope_scores(
    asked: xr.Dataset | Sequence[StudyRow],
    said: Sequence[str] | None = None,
    *,
    n_boot: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Accuracy, precision, recall, F1 and the share of yes, by kind of question and over all, as the POPE paper reports them.

    "Yes" is what is looked for: precision is the share of right answers among those that say yes, recall the share of the
    objects there that are found, F1 their harmonic mean. A share of yes far above the true one says that objects are made up.

    Args:
        asked: a study of such a table with `only_correct=False` (`pope_study`), or its rows.
        said: with rows, what the model said to each.
        n_boot: samples of a bootstrap over the questions of each kind and answer; with them the scores have an axis
            statistic: "mean" (the score itself), "low" and "high".
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns `accuracy`, `precision`, `recall`, `f1`, `yes_share` [kind], `true_share` (of questions whose object is there) and `n`
    (questions) [kind]; of a study with `log_odds` also their means where the object is there and where it is not, `log_odds`
    [kind, label]. A share of nothing is NaN. Raises `InputError` for a study of correct answers only, for as many answers as
    there are not rows, and for `n_boot` below 0.

    >>> rows = [StudyRow(id=i, question="?", answer=a, kind="random") for i, a in (("1", "Yes"), ("2", "No"))]
    >>> scores = pope_scores(rows, ["Yes", "Yes"]).sel(kind="random")
    >>> float(scores.accuracy), float(scores.precision), float(scores.recall), float(scores.yes_share)
    (0.5, 0.5, 1.0, 1.0)
    """
    n_boot = whole_number(n_boot, "n_boot", least=0, expected="0 for no intervals, or some samples")
    kinds, truth, guess = _answers(asked, said)
    groups = {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
    if len(groups) > 1:
        groups[OF_ALL] = np.ones(len(kinds), dtype=bool)
    counts = np.stack([_counts(truth[group], guess[group], n_boot, seed) for group in groups.values()], axis=1)
    dims = ("kind", "statistic") if n_boot else ("kind",)
    found: dict[str, Any] = {}
    for name, values in _scores(counts).items():
        found[name] = (dims, percentile_interval(values, confidence).T if n_boot else values[0])
    found["true_share"] = ("kind", [_share(truth[group]) for group in groups.values()])
    found["n"] = ("kind", [int(group.sum()) for group in groups.values()])
    scores = xr.Dataset(found, coords={"kind": list(groups), **({"statistic": _STATISTICS} if n_boot else {})})
    about: dict[str, Any] = {"n_boot": n_boot, "confidence": confidence} if n_boot else {}
    if isinstance(asked, xr.Dataset):
        about = {**asked.attrs, **about}
        if "log_odds" in asked:
            parts = [
                [asked["log_odds"].values[group & part].astype(float) for part in (truth, ~truth)]
                for group in groups.values()
            ]
            means = [[_mean(values, n_boot, confidence, seed) for values in of_kind] for of_kind in parts]
            scores["log_odds"] = (("kind", "label", *dims[1:]), np.array(means))
            scores = scores.assign_coords(label=["Yes", "No"])
    return scores.assign_attrs({**about, "analysis": "pope_scores"})


def _answers(
    asked: xr.Dataset | Sequence[StudyRow], said: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind, whether the object is there, and whether the model says so, question by question."""
    if isinstance(asked, xr.Dataset):
        if missing := [name for name in ("kind", "answer", "said") if name not in asked.coords] or said is not None:
            raise InputError(f"A study brings what was said; got said={said!r}, and the study lacks {missing}.")
        if asked.attrs.get("only_correct"):
            raise InputError(
                "The study has only_correct=True, so that all its answers are right; ask with only_correct=False."
            )
        kinds, answers, said = (asked[name].values.tolist() for name in ("kind", "answer", "said"))
    else:
        kinds, answers = [row.kind for row in asked], [row.answer for row in asked]
    if said is None or len(said) != len(answers) or not answers:
        raise InputError(f"{len(answers)} questions and said={said!r}; expected what was said to each.")
    return np.array(kinds, dtype=str), np.array([*map(said_yes, answers)]), np.array([*map(said_yes, said)])


def _counts(truth: np.ndarray, guess: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """True and false yes, false and true no [1 + sample, 4]: of the questions, and of as many of each answer drawn from them."""
    rng = np.random.default_rng(seed)
    yes = []
    for own in (guess[truth], guess[~truth]):
        drawn = rng.binomial(len(own), own.mean() if len(own) else 0.0, size=n_boot)
        yes.append(np.concatenate([[own.sum()], drawn]))
    return np.stack([*yes, truth.sum() - yes[0], (~truth).sum() - yes[1]], axis=-1)


def _scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of counts [..., 4]; a share of nothing is NaN."""
    true_yes, false_yes, false_no, true_no = np.moveaxis(counts.astype(float), -1, 0)
    n = counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + false_no)
        f1 = np.where(precision + recall == 0, 0.0, 2 * precision * recall / (precision + recall))
    accuracy, yes_share = (true_yes + true_no) / n, (true_yes + false_yes) / n
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_share": yes_share}


def _mean(values: np.ndarray, n_boot: int, confidence: float, seed: int) -> np.ndarray | float:
    """A mean, with the ends of its interval where they are wanted; NaN of nothing."""
    if n_boot and len(values):
        return mean_intervals(values, n=n_boot, level=confidence, seed=seed)
    return np.full(len(_STATISTICS), np.nan) if n_boot else _share(values)


def _share(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _tables_in(folder: Path) -> list[Path]:
    """Files of a folder whose names say a kind, in the order of the kinds."""
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES) if folder.is_dir() else []
    return [file for kind in POPE_KINDS for file in files if _kind_of(file) == kind]


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else _tables_in(path)
    if not found:
        what = "holds no file named after a kind" if path.is_dir() else "is no file and no folder"
        raise InputError(
            f"{str(path)!r} {what}; give a POPE file such as coco_pope_random.json, or the folder that they are in."
        )
    return found


def _kind_of(file: Path) -> str:
    return next((kind for kind in POPE_KINDS if kind in file.stem.lower()), "")


def _begins_as_pope(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = json.loads(next(filter(str.strip, lines), ""))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and set(_ASKED) <= set(first)


def _read(file: Path, limit: int | None) -> list[StudyRow]:
    try:
        lines = [*islice(filter(str.strip, file.read_text(encoding="utf-8-sig").splitlines()), limit)]
    except (OSError, UnicodeError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({error}); expected JSON in UTF-8, an object a line.") from None
    return [_row(line, _kind_of(file), f"{str(file)!r}, line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: str, kind: str, where: str) -> StudyRow:
    try:
        cells: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}); expected an object with {', '.join(_ASKED)}.") from None
    if not isinstance(cells, dict) or (missing := [name for name in _ASKED if name not in cells]):
        lacks = missing if isinstance(cells, dict) else list(_ASKED)
        raise InputError(f"{where} lacks {lacks}; expected an object with {', '.join(_ASKED)}.")
    kind, label = str(cells.get("category", kind)).lower(), str(cells["label"]).strip().lower()
    if kind not in POPE_KINDS or label not in _ANSWERS:
        raise InputError(
            f"{where} is of the kind {kind!r} with the label {label!r}; expected yes or no, and one of "
            f"{', '.join(POPE_KINDS)} in the file's name or in a field category."
        )
    return StudyRow(
        id=f"{kind}-{cells['question_id']}",
        question=str(cells["text"]),
        answer=_ANSWERS[label],
        image=str(cells["image"]),
        kind=kind,
    )
