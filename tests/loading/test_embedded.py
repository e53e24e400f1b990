from __future__ import annotations

from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hooked_llava.errors import CheckpointError
from hooked_llava.loading import embedded
from hooked_llava.loading.embedded import EMBEDDED, resolve


def test_every_embedded_model_is_there():
    for name, folder in EMBEDDED.items():
        path = resolve(name)
        assert path.name == folder
        assert (path / "config.json").is_file()
        assert list(path.glob("*.safetensors"))


def test_an_embedded_model_whose_files_are_gone_says_so(monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny-shapes", "seed99")
    with pytest.raises(CheckpointError, match="model 'tiny-shapes'"):
        resolve("tiny-shapes")


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_an_embedded_name_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "tiny-shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("./tiny-shapes") == Path("tiny-shapes")
    monkeypatch.setattr(embedded, "embedded_folder", lambda name: Path("embedded", name))
    assert resolve("tiny-shapes") == Path("embedded/tiny-shapes")


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=f"file.*folder.*folder, '{tmp_path}'"):
        resolve(file)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("tiny-shape", "Did you mean: tiny-shapes"),
        ("/nowhere/at/all", "nor a hub name of the form owner/name."),
        ("./llava-hf/llava", "nor a hub name of the form owner/name."),
        (Path("llava-hf/llava"), "nor a hub name of the form owner/name."),
        ("", "nor a hub name of the form owner/name."),
        ("a/b/c", "nor a hub name of the form owner/name."),
    ],
)
def test_a_name_that_is_nothing_is_refused(name, end):
    with pytest.raises(CheckpointError) as error:
        resolve(name)
    message = str(error.value)
    assert message.startswith(f"There is no model {str(name)!r}: neither an embedded model (tiny-shapes, ")
    assert end in message


@pytest.fixture
def hub(monkeypatch):
    """What was asked of the hub; what it answers is set by the test."""
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        if isinstance(asked["answer"], Exception):
            raise asked["answer"]
        return asked["answer"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_name_is_downloaded_without_pickles(hub, tmp_path):
    hub["answer"] = str(tmp_path)
    assert resolve("llava-hf/llava-1.5-7b-hf", revision="abc") == tmp_path
    assert (hub["name"], hub["revision"]) == ("llava-hf/llava-1.5-7b-hf", "abc")
    assert hub["allow_patterns"] == ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def http_error(kind, status):
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))
    return kind("answer of the hub", response=response)


UNREACHABLE = "the hub cannot be reached and there is no copy in the local cache"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            LocalEntryNotFoundError("nothing cached"),
            "the hub cannot be reached and there is no copy in the local cache",
        ),
        (OfflineModeIsEnabled("offline"), UNREACHABLE),
        (ConnectionError("no route"), UNREACHABLE),
        (http_error(HfHubHTTPError, 500), UNREACHABLE),
        (http_error(huggingface_hub.errors.RepositoryNotFoundError, 404), "the hub has no such model"),
        (http_error(huggingface_hub.errors.GatedRepoError, 403), "it is gated: accept its terms"),
        (http_error(huggingface_hub.errors.RevisionNotFoundError, 404), "it has no revision 'v9'"),
    ],
)
def test_a_hub_that_does_not_answer_is_explained(hub, answer, reason):
    hub["answer"] = answer
    with pytest.raises(CheckpointError) as error:
        resolve("owner/tiny-shapes", revision="v9")
    message = str(error.value)
    assert f"could not be had from the hub: {reason}" in message
    assert "Did you mean: tiny-shapes" in message
    assert error.value.__cause__ is answer
