"""Every error that hooked_llava raises on purpose.

A message says three things: what was given, what was expected, what to do. Each class also derives from the
built-in exception that a user would catch without knowing this library, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class HookedLLaVAError(Exception):
    """Base of every error raised on purpose by this library."""


class ConfigError(HookedLLaVAError, ValueError):
    """A model, or a model's configuration, that this library cannot build or wrap."""


class CheckpointError(HookedLLaVAError, ValueError):
    """A checkpoint on disk that is missing, truncated, mismatching or not finite."""


class HookNameError(HookedLLaVAError, KeyError):
    """A hook name or filter that matches nothing, or a hook that does not fire on these inputs."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class HookValueError(HookedLLaVAError, ValueError):
    """A hook function that returned a tensor of another shape than it was given."""


class InputError(HookedLLaVAError, ValueError):
    """Prompts, images or tensors that do not fit the model or each other."""


class StaleReplayError(InputError):
    """A kept run that is no longer what the model would compute."""


class ExplainerError(HookedLLaVAError, RuntimeError):
    """A larger model that gave no answer: its server failed or refused, or the limit on requests is reached."""


class SpanError(HookedLLaVAError, KeyError):
    """A span, patch, box or position that the token map does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class HookedLLaVAWarning(UserWarning):
    """Base of every warning of this library."""


class PromptWithoutTemplate(HookedLLaVAWarning):
    """Text that is taken as the whole prompt, though the model answers questions in a conversation template."""


class ImageCropped(HookedLLaVAWarning):
    """An image of which the processor cuts a large part away before the model sees it."""


_SHOWN = 60
_BETWEEN = (
    "hooked_llava",
    "torch",
    "transformer_lens",
    "contextlib",
    "functools",
    "jaxtyping",
    "beartype",
    "typeguard",
)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this library (and its decorators) that led here, however deep the call."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def naming_prompt(row: int, words: str | None = None) -> Iterator[None]:
    """Errors of this library that the block raises say which prompt of a batch they are about, by number and words.

    >>> with naming_prompt(1, "Who made it?"):
    ...     raise SpanError("There is no star.")
    Traceback (most recent call last):
    hooked_llava.errors.SpanError: Prompt 1 ('Who made it?'): There is no star.
    """
    try:
        yield
    except (InputError, SpanError) as error:
        if not str(error).startswith("Prompt "):
            shown = "" if words is None else f" ({words if len(words) <= _SHOWN else words[: _SHOWN - 3] + '...'!r})"
            error.args = (f"Prompt {row}{shown}: {error}",)
        raise


def did_you_mean(given: str, known: Iterable[str], *, n: int = 3) -> str:
    """A clause naming the closest known words, or an empty string if none is close.

    >>> did_you_mean("questoin", ["question", "image"])
    ' Did you mean: question?'
    """
    close = difflib.get_close_matches(given, list(known), n=n, cutoff=0.5)
    return f" Did you mean: {', '.join(close)}?" if close else ""


def a_type(value: object) -> str:
    """The type of a value with its article, for a message.

    >>> a_type(3), a_type("x")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """A number of things in words.

    >>> counted(1, "image"), counted(0, "entry", "entries")
    ('1 image', '0 entries')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
