"""Explanations come back from their file as they were, and a file is never half of what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.features import explanations as module
from hooked_llava.features.explanations import Explanation, ExplanationFile, load_explanations

ABOUT = {"hook": "blocks.1.hook_resid_post", "n_images": 5, "prompt": "abc"}
SAID = [
    Explanation(7, (3, 1, 2), "The “Zug”", "Zug", "object", "[EXPLANATION]: The “Zug”"),
    Explanation(2, (), reply=""),
    Explanation(5, (9,), "", reply="nonsense"),
]


def written(path: Path) -> Path:
    with ExplanationFile(path, ABOUT) as file:
        for one in SAID:
            file.add(one)
    return path


def test_they_come_back_in_the_order_of_features(tmp_path: Path) -> None:
    assert load_explanations(written(tmp_path / "said.json")) == sorted(SAID, key=lambda one: one.feature)


def test_a_file_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "said.json")
    with ExplanationFile(path, ABOUT) as file:
        assert file.among([7, 2]) == [SAID[0], SAID[1]]
        file.add(Explanation(0, (1,), "new", "new"))
    assert [one.feature for one in load_explanations(path)] == [0, 2, 5, 7]


def test_a_file_made_otherwise_is_not_continued(tmp_path: Path) -> None:
    path = written(tmp_path / "said.json")
    with pytest.raises(InputError, match=r"n_images=5.*3"):
        ExplanationFile(path, ABOUT | {"n_images": 3})


def test_it_is_kept_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "said.json"

    def interrupted() -> None:
        with ExplanationFile(path, ABOUT) as file:
            file.add(SAID[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert load_explanations(path) == [SAID[0]]


def test_it_is_written_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    path = tmp_path / "said.json"
    file = ExplanationFile(path, ABOUT)
    file.add(SAID[0])
    assert not path.exists()
    now = 11.0
    file.add(SAID[1])
    assert len(load_explanations(path)) == 2
    now = 12.0
    file.add(SAID[2])
    assert len(load_explanations(path)) == 2
    file.write()
    assert len(load_explanations(path)) == 3


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    path = written(tmp_path / "said.json")
    stamp = path.stat().st_mtime_ns
    with ExplanationFile(path, ABOUT):
        pass
    assert path.stat().st_mtime_ns == stamp


def test_none_keeps_nothing() -> None:
    with ExplanationFile(None, ABOUT) as file:
        file.add(SAID[0])
    assert file.among([7]) == [SAID[0]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r"said\.json"),
        ("[]", r"said\.json.*list"),
        ('{"format": "other"}', r"'other'.*hooked_llava\.explanations\.v1"),
        (json.dumps({"format": module.FORMAT}), r"said\.json.*explanations"),
        (json.dumps({"format": module.FORMAT, "explanations": [{"feature": 1}]}), r"said\.json"),
        (json.dumps({"format": module.FORMAT, "explanations": [3]}), r"said\.json"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "said.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=says):
        load_explanations(path)
    with pytest.raises(CheckpointError, match=says):
        ExplanationFile(path, ABOUT)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"said\.json.*explain_features"):
        load_explanations(tmp_path / "said.json")


def test_found() -> None:
    assert [one.found for one in SAID] == [True, False, False]
