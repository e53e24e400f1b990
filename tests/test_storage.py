"""Files appear whole or not at all, as any new file does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.storage import bytes_written, on_disk, read_tensors, write_tensors, written_whole


def test_permissions_are_those_of_any_new_file(tmp_path):
    with written_whole(tmp_path / "made") as partial:
        partial.write_text("text")
    (tmp_path / "usual").touch()
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("older")

    def write_half() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "older"


def test_places_that_cannot_be_written_are_said_before_the_work(tmp_path):
    for path, message in (
        (tmp_path, "'.*'.*a folder.*file name"),
        (tmp_path / "nowhere" / "file", "no folder '.*nowhere'.*Make"),
    ):
        with pytest.raises(InputError, match=message), written_whole(path):
            raise AssertionError("the block was entered")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5).T,
        torch.ones(7, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(0, 4),
        torch.arange(6)[::2],
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_a_tensor_on_disk_is_the_tensor_and_its_file_has_no_name(tmp_path, tensor):
    kept = on_disk(tensor, tmp_path)
    assert torch.equal(kept, tensor)
    assert kept.dtype == tensor.dtype
    assert not list(tmp_path.iterdir())
    kept.zero_()  # a copy: the first stays as it was
    assert bool(tensor.any()) == bool(tensor.numel())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what memory is")
def test_its_pages_are_those_of_the_file_for_as_long_as_it_is_there(tmp_path):
    def mapped() -> int:
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        ends = [line.split()[0].split("-") for line in lines]
        return sum(int(stop, 16) - int(start, 16) for start, stop in ends)

    kept = on_disk(torch.ones(2**18), tmp_path)
    assert mapped() == kept.nbytes == 2**20
    del kept
    assert mapped() == 0


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_on_the_way_to_disk_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    for where in ("os.posix_fallocate", "torch.from_file"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(error):
                on_disk(torch.ones(3), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no folder '.*nowhere'.*Make"):
        on_disk(torch.ones(3), tmp_path / "nowhere")


def test_tensors_come_back_with_what_belongs_to_them(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16, requires_grad=True)}
    write_tensors(tmp_path / "file", tensors, {"of": "test"}, "kind.v2")
    read, metadata = read_tensors(tmp_path / "file", ["kind.v2", "kind.v1"], writer="test")
    assert metadata == {"format": "kind.v2", "of": "test"}
    assert {name: tensor.dtype for name, tensor in read.items()} == {"a": torch.int64, "b": torch.bfloat16}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert abs(bytes_written(tensors, {"of": "test"}, "kind.v2") - (tmp_path / "file").stat().st_size) <= 16


def test_other_files_are_refused_with_what_they_are_and_what_was_expected(tmp_path):
    write_tensors(tmp_path / "file", {}, {}, "other.v1")
    with pytest.raises(CheckpointError, match="file.*'other.v1'.*'kind.v2'.*Kind.save"):
        read_tensors(tmp_path / "file", ["kind.v2", "kind.v1"], writer="Kind.save")
    for name in ("missing", "text"):
        (tmp_path / "text").write_text("text")
        with pytest.raises(CheckpointError, match=f"{name}.*Kind.save"):
            read_tensors(tmp_path / name, ["kind.v2"], writer="Kind.save", unreadable="is broken")
