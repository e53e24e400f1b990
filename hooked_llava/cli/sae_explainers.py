"""Who explains features and who judges what is said, as options of `hooked-llava sae explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_llava.checks import one_of
from hooked_llava.cli.options import at_least
from hooked_llava.errors import InputError
from hooked_llava.options.explainers import EXPLAINERS
from hooked_llava.options.feature_scores import FEATURE_SCORES

if TYPE_CHECKING:
    from hooked_llava.toy import Scene

ORACLE = "oracle"
_BY_DEFAULT = {True: "iou,detection", False: "detection"}  # with an oracle, and without

Who = Annotated[
    str | None,
    typer.Option(
        "--explainer",
        metavar="WHO",
        help="; ".join(f"{choice.written}: {choice.meaning}" for choice in EXPLAINERS.values()) + ".",
    ),
]
BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="The server's address, such as http://localhost:8000/v1.")
]
MaxRequests = Annotated[
    int | None, at_least(1, "--max-requests", help="So many requests are sent to the server, at most.")
]
Scores = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME,...",
        help="; ".join(f"{name}: {score.meaning}" for name, score in FEATURE_SCORES.items())
        + f"; none. Default: {_BY_DEFAULT[True]} with the oracle, else {_BY_DEFAULT[False]}.",
    ),
]


@dataclass(frozen=True)
class Judges:
    """Who explains, and who judges.

    Attributes:
        explainer (Callable[..., str]): Images and a prompt -> text.
        scores (tuple[str, ...]): Names of the scores.
        scenes (Sequence[Scene] | None): What the images hold, for an oracle.
        device (str): Where models are loaded.
    """

    explainer: Callable[..., str]
    scores: tuple[str, ...]
    scenes: Sequence[Scene] | None
    device: str

    def by_score(self) -> dict[str, Any]:
        """The judges, as `score_features` takes them; models are loaded now."""
        found: dict[str, Any] = {}
        if "iou" in self.scores:
            found["segmenter"] = self._segmenter()
        if "clip_score" in self.scores:
            from hooked_llava.features import ClipSimilarity

            found["similarity"] = ClipSimilarity.from_pretrained(device=self.device)
        if "detection" in self.scores:
            found["explainer"] = self.explainer
        return found

    def _segmenter(self) -> Any:
        if self.scenes is not None:
            from hooked_llava.toy import OracleSegmenter

            return OracleSegmenter(self.scenes)
        from hooked_llava.features import GroundedSegmenter

        return GroundedSegmenter.from_pretrained(device=self.device)


@dataclass(frozen=True, kw_only=True)
class ExplainerOptions:
    """Who explains, and how what is said is scored."""

    explainer: Who = None
    base_url: BaseUrl = None
    max_requests: MaxRequests = None
    scores: Scores = None

    def check(self) -> None:
        """Raise `InputError` for an explainer and for scores that there are not, before anything is loaded."""
        kind, name = self._kind_and_name()
        if kind is not None and ("NAME" in EXPLAINERS[kind].written) is not bool(name):
            raise InputError(f"--explainer {self.explainer}; expected {EXPLAINERS[kind].written}.")
        if kind != "server" and (self.base_url is not None or self.max_requests is not None):
            raise InputError("--base-url and --max-requests are of a server; give --explainer server:NAME with them.")
        self._names(is_oracle=True)

    def judges(self, scenes: Sequence[Scene] | None, device: str) -> Judges:
        """The explainer, and the names of the scores; raises `InputError` without one for images that it does not know."""
        kind, name = self._kind_and_name()
        kind = kind or (ORACLE if scenes is not None else None)
        if kind is None or (kind == ORACLE and scenes is None):
            given = "The oracle knows only the images that tiny-shapes draws" if kind else "There is no explainer"
            others = " or ".join(choice.written for key, choice in EXPLAINERS.items() if key != ORACLE)
            raise InputError(f"{given}; give --explainer {others}.")
        explainer, names = self._made(kind, name, scenes, device), self._names(is_oracle=kind == ORACLE)
        return Judges(explainer, names, scenes, device)

    def _kind_and_name(self) -> tuple[str | None, str]:
        if self.explainer is None:
            return None, ""
        kind, _, name = self.explainer.partition(":")
        return one_of(kind, list(EXPLAINERS), "--explainer"), name

    def _names(self, *, is_oracle: bool) -> tuple[str, ...]:
        given = _BY_DEFAULT[is_oracle] if self.scores is None else self.scores
        names = [] if given == "none" else [part.strip() for part in given.split(",")]
        return tuple(one_of(name, list(FEATURE_SCORES), "--scores") for name in names)

    def _made(self, kind: str, name: str, scenes: Sequence[Scene] | None, device: str) -> Callable[..., str]:
        if kind == ORACLE:
            from hooked_llava.toy import OracleExplainer

            assert scenes is not None
            return OracleExplainer(scenes)
        from hooked_llava.features import ServerExplainer, TransformersExplainer

        if kind == "server":
            return ServerExplainer(name, self.base_url, max_requests=self.max_requests)
        return TransformersExplainer.from_pretrained(name, device=device)
