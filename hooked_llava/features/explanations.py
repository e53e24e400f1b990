"""What was said about features, and the file that it is kept in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hooked_llava.checks import check_same_work
from hooked_llava.errors import CheckpointError
from hooked_llava.features.prompts import Concept
from hooked_llava.options.explainers import UNABLE
from hooked_llava.storage import read_json, write_json

FORMAT = "hooked_llava.explanations.v1"
_SECONDS = 10.0
"""So long at most an answer waits to be written."""


@dataclass(frozen=True)
class Explanation:
    """What a larger model says of a feature.

    >>> one = Explanation(7, (3, 1), "The train on the bridge", "train", "object")
    >>> one.found, Explanation(8, (2,), "Unable to produce descriptions").found
    (True, False)

    Attributes:
        feature (int): Which feature.
        images (tuple[int, ...]): The images of the store that the model was shown, the most active first.
        text (str): The explanation; "Unable to produce descriptions" where the model said so, and of a feature that is active
            in no image; "" where its reply has none.
        phrase (str): The same as a noun phrase, for the scores; "" where there is none.
        concept (Concept | None): What kind of thing it names; None where that was not asked, or not answered.
        reply (str): The whole reply.
    """

    feature: int
    images: tuple[int, ...]
    text: str = UNABLE
    phrase: str = ""
    concept: Concept | None = None
    reply: str = ""

    @property
    def found(self) -> bool:
        """Whether there is a phrase to score."""
        return bool(self.phrase)


def load_explanations(path: str | os.PathLike[str]) -> list[Explanation]:
    """The explanations of a file that `explain_features` wrote, in the order of their features.

    Raises `CheckpointError` for a file that is not there, is damaged, or is of another format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = ExplanationFile(f"{folder}/said.json", {"n_images": 5})
    ...     file.add(Explanation(7, (3, 1), "The train", "train"))
    ...     file.write()
    ...     load_explanations(f"{folder}/said.json")[0].phrase
    'train'
    """
    return sorted(_read(Path(path).expanduser())[1], key=lambda one: one.feature)


class ExplanationFile:
    """A file of explanations that grows while they are made, each time written whole.

    Args:
        path: the file; None keeps nothing.
        about: how the explanations are made. Raises `InputError` if the file is there and says otherwise.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.about = dict(about)
        self.explanations: dict[int, Explanation] = {}
        self._written = time.monotonic()
        self._new = False
        if self.path is not None and self.path.exists():
            made, known = _read(self.path)
            check_same_work(made, self.about, f"out={str(self.path)!r}", "other explanations")
            self.explanations = {one.feature: one for one in known}

    def add(self, explanation: Explanation) -> None:
        """Add one, and write the file if that was not done for some seconds."""
        self.explanations[explanation.feature] = explanation
        self._new = True
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is new, whole or not at all."""
        if self.path is not None and self._new:
            listed = [asdict(self.explanations[feature]) for feature in sorted(self.explanations)]
            write_json(self.path, {"format": FORMAT, "about": self.about, "explanations": listed})
        self._new, self._written = False, time.monotonic()

    def __enter__(self) -> ExplanationFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def among(self, features: Iterable[int]) -> list[Explanation]:
        """Those of some features, in that order."""
        return [self.explanations[feature] for feature in features]


def _read(path: Path) -> tuple[dict[str, Any], list[Explanation]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; expected a file that explain_features wrote.")
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds format {stored.get('format')!r}; expected {FORMAT!r}, of explain_features."
        )
    names = {field.name for field in fields(Explanation)}
    try:
        listed: Sequence[Mapping[str, Any]] = stored["explanations"]
        found = [
            Explanation(**{name: one[name] for name in names - {"images"}}, images=tuple(one["images"]))
            for one in listed
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} lacks {error}; expected what explain_features writes.") from error
    return dict(stored.get("about", {})), found
