"""Filters and explanations as the released pipeline writes them."""

from __future__ import annotations

import json

import pytest

from hooked_llava.errors import CheckpointError
from hooked_llava.features.released_lists import read_explanations, read_filter, write_explanations, write_filter

MODULE = "model.layers.24"


def test_filters(tmp_path):
    path = tmp_path / "filter.json"
    path.write_text(json.dumps({MODULE: [108692, 14], "model.layers.8": []}, indent=4))
    assert read_filter(path) == {MODULE: [108692, 14], "model.layers.8": []}
    write_filter(path, {MODULE: range(3)})
    assert json.loads(path.read_text()) == {MODULE: [0, 1, 2]}
    path.write_text(json.dumps({MODULE: ["14"]}))
    with pytest.raises(CheckpointError, match=r"filter\.json.*filter"):
        read_filter(path)


def test_explanations(tmp_path):
    listed = [{f"{MODULE}_feature7": "the word “eat”"}, {f"{MODULE}_feature12": "stars", "prompt": [{"role": "user"}]}]
    (tmp_path / "model_layers_24.json").write_text(json.dumps(listed), encoding="utf-8")
    (tmp_path / "images").mkdir()
    assert read_explanations(tmp_path) == {MODULE: {7: "the word “eat”", 12: "stars"}}
    (tmp_path / "refined.json").write_text(json.dumps({f"{MODULE}_feature7": "eat", "model.layers.8_feature1": "red"}))
    assert read_explanations(tmp_path / "refined.json") == {MODULE: {7: "eat"}, "model.layers.8": {1: "red"}}
    written = write_explanations(tmp_path / "mine", MODULE, {7: "a “star”", 9: "a ring"})
    assert written.name == "model_layers_24.json"
    assert json.loads(written.read_text(encoding="utf-8")) == [
        {f"{MODULE}_feature7": "a “star”"},
        {f"{MODULE}_feature9": "a ring"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seven": "a star"}', "seven.*MODULE_featureNUMBER"),
        ('{"a_feature7": 3}', "a_feature7.*3.*words"),
        ("[3]", "list"),
        ("{", "JSON"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "explained.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_explanations(path)


def test_a_folder_without_explanations(tmp_path):
    with pytest.raises(CheckpointError, match=r"no explanations.*\.json"):
        read_explanations(tmp_path)
