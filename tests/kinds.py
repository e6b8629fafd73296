"""Registries of bad input, by kind."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def registering(kinds: dict[str, T]) -> Callable[[str], Callable[[T], T]]:
    """A decorator that enters a function under its row in docs/formats.md."""

    def kind(name: str) -> Callable[[T], T]:
        def add(function: T) -> T:
            kinds[name] = function
            return function

        return add

    return kind
