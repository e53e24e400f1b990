"""From a model's name to a folder with its files: embedded in the package, on disk, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hooked_llava.errors import CheckpointError, did_you_mean

EMBEDDED = {
    "tiny-shapes": "seed1",
    "tiny-shapes-seed0": "seed0",
    "tiny-shapes-seed1": "seed1",
    "tiny-shapes-seed2": "seed2",
    "tiny-shapes-next": "next0",
}
"""Models that come with the package, by name, and the folder of each below `toy/checkpoint`."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a checkpoint needs and no more: no pickles, no weights of other frameworks, nothing in subfolders.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_HUB_SKIPPED = ("*/*",)


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    files: Sequence[str] | None = None,
) -> Path:
    """The folder of a model: an embedded name, a local folder, or a hub name, which is downloaded once and kept.

    An embedded name comes before a local folder of the same name; write `./tiny-shapes` for the folder. `revision` (a
    branch, tag or commit), `token` and `cache_dir` are the hub's and count for hub names only, as in transformers. `files`
    are what is downloaded, by default what a checkpoint needs. Raises `CheckpointError` for a name that is none of the
    three, or a hub that cannot be reached.

    >>> resolve("tiny-shapes").parent.name
    'checkpoint'
    """
    name = os.fspath(name_or_path)
    if name in EMBEDDED:
        return embedded_folder(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"{name!r} is a file; expected the folder that holds config.json and the safetensors files. "
            f"Give its folder, {str(path.parent)!r}."
        )
    looks_local = not isinstance(name_or_path, str) or name.startswith((".", "~", "/"))
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"There is no model {name!r}: neither an embedded model ({', '.join(EMBEDDED)}), nor a local folder, "
            f"nor a hub name of the form owner/name.{did_you_mean(name, EMBEDDED)}"
        )
    patterns = {"allow_patterns": list(_HUB_FILES), "ignore_patterns": list(_HUB_SKIPPED)}
    if files is not None:
        patterns = {"allow_patterns": list(files)}
    return _download(name, revision, {"token": token, "cache_dir": cache_dir, **patterns})


def embedded_folder(name: str) -> Path:
    """The folder of a model that comes with the package; raises `CheckpointError` if its files are not installed.

    >>> embedded_folder("tiny-shapes-seed0").name
    'seed0'
    """
    folder = Path(str(files("hooked_llava").joinpath("toy", "checkpoint", EMBEDDED[name])))
    if not folder.is_dir():
        raise CheckpointError(
            f"The files of the embedded model {name!r} are not where the package keeps them ({folder}). "
            "Install hooked_llava again, from a complete copy."
        )
    return folder


def _download(name: str, revision: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, **options))
    except GatedRepoError as error:
        reason = "it is gated: accept its terms on its hub page and log in with `hf auth login`, or give token="
        cause = error
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such model (or it is private and needs `hf auth login` or token=)"
        cause = error
    except RevisionNotFoundError as error:
        reason, cause = f"it has no revision {revision!r}", error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        reason, cause = "the hub cannot be reached and there is no copy in the local cache", error
    raise CheckpointError(
        f"Model {name!r} is neither embedded ({', '.join(EMBEDDED)}) nor a local folder, and could not be had from "
        f"the hub: {reason}.{did_you_mean(name, EMBEDDED)} "
        "Offline, give the path of a folder in Hugging Face format or use an embedded model."
    ) from cause
