"""How a function becomes a command: its dataclass arguments are groups of options, and what the library says is a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

import typer

from hooked_llava.cli.terminal import clear_errors, examples
from hooked_llava.errors import InputError


class TypedOptions(dict[str, str]):
    """The options that stand on the command line: how each is written, by the name of its argument."""

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise `InputError` for the first of these arguments that was typed."""
        if given := next((self[name] for name in names if name in self), None):
            raise InputError(f"{given} {why}")


@dataclass(frozen=True)
class Command:
    """One command of the shell.

    Attributes:
        run (Callable[..., None]): What typer calls, with an argument for each option.
        epilog (str): What is printed below its help.
    """

    run: Callable[..., None]
    epilog: str


def command(*lines: str) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command of the shell, with these examples below its help.

    An argument whose type is a dataclass is a group: each of the dataclass's fields, with its name, type and default, is an
    option of the command, and the function is called with the group filled in. So several commands share a group, and a
    group can hold what a function of the library takes by name. An argument of type `TypedOptions` is no option: it says
    which ones were typed.
    """

    def made(function: Callable[..., None]) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

        @wraps(function)
        def run(**given: Any) -> None:
            typed = _typed(given.pop("context"))
            for name, kind in groups.items():
                given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            given |= {name: typed for name, kind in hints.items() if kind is TypedOptions}
            with clear_errors():
                function(**given)

        parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for own in signature(function).parameters.values():
            parameters += _flat(own, hints[own.name])
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return Command(run, examples(*lines))

    return made


def as_arguments(group: Any) -> dict[str, Any]:
    """The options of a group, as a function of the library takes them by name."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in vars(group).items()}


def _typed(context: Any) -> TypedOptions:
    written = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in written}
    return TypedOptions({name: written[name] for name in written if sources[name].name == "COMMANDLINE"})


def _flat(own: Parameter, kind: Any) -> Iterator[Parameter]:
    """The options of an argument: itself, or one for each field of its group."""
    if kind is TypedOptions:
        return
    if not is_dataclass(kind):
        yield own.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY)
        return
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
