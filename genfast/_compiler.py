"""Marks that torch.compile reads, made without importing it.

``torch.compiler.disable`` and its neighbours import ``torch._dynamo``, which takes most of a second and which a program
that never compiles does not need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.compiler.assume_constant_result``: the compiler calls ``function`` while it traces, and keeps the
    result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncompiled(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As ``torch.compiler.disable``: the compiler leaves the decorated function, and all that it calls, to Python."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        disabled: list[Callable[P, R]] = []

        @constant  # so that it runs while the compiler traces, and only where there is one
        def prepare() -> int:
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]
            return 0

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                prepare()
                return disabled[0](*args, **kwargs)
            return function(*args, **kwargs)

        return wrapper

    return decorate
