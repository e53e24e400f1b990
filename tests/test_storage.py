"""Files appear whole or not at all, as any new file does."""

from __future__ import annotations

import pytest

from hooked_llava.errors import InputError
from hooked_llava.storage import written_whole


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
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "file", "no folder .*nowhere.*Make it first"),
    ):
        with pytest.raises(InputError, match=message), written_whole(path):
            raise AssertionError("the block was entered")
