"""POPE's numbers as its released evaluation computes them: counts of true and false positives and negatives."""

from __future__ import annotations

from collections.abc import Sequence


def released_label(text: str) -> str:
    """What the evaluation makes of an answer: the first sentence, without commas, is "no" with one of three words."""
    if text.find(".") != -1:
        text = text[: text.find(".")]
    text = text.replace(",", "")
    words = text.split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def released_scores(said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes."""
    pairs = [(released_label(text), label) for text, label in zip(said, labels, strict=True)]
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision, recall = float(tp) / float(tp + fp), float(tp) / float(tp + fn)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_share": (tp + fp) / len(pairs),
    }
