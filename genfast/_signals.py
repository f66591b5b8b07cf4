"""Ctrl-C and SIGTERM: one line while the libraries load, a checkpoint while a model trains, never the middle of a step.

Nothing of torch is imported here, since :func:`quiet_start` runs before it, when this module is first imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the end of the terminal (SIGHUP): what handles Ctrl-C handles it too."""

    signum: int = signal.SIGTERM


def interruption(signum: int, message: str = "") -> KeyboardInterrupt:
    """The exception of a signal."""
    if signum == signal.SIGINT:
        return KeyboardInterrupt(message) if message else KeyboardInterrupt()
    error = Terminated(message) if message else Terminated()
    error.signum = signum
    return error


def _quit(signum: int, _: Any) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        os.write(2, b"genfast: interrupted\n")
    os._exit(128 + signum)  # an exception in the middle of an import would end in its traceback


def _raise(signum: int, _: Any) -> None:
    raise interruption(signum)


def _ours(signum: int) -> bool:
    """Whether nobody else has a handler: an ignored signal (nohup) stays ignored, and a user's handler stays in
    place."""
    return signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler, _quit, _raise)


def quiet_start() -> None:
    """Ends the process with one line where it is stopped before the command line has begun: torch takes seconds to
    load.

    Only in a process that runs ``genfast`` or ``python -m genfast``; a program that imports the library keeps its
    handlers.
    """
    words = sys.orig_argv
    module = "-m" in words[1:-1] and words[words.index("-m") + 1] == "genfast" and sys.argv[:1] == ["-m"]
    script = bool(sys.argv) and os.path.splitext(os.path.basename(sys.argv[0]))[0] == "genfast"
    if (module or script) and threading.current_thread() is threading.main_thread():
        for signum in filter(_ours, STOPPING):
            signal.signal(signum, _quit)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """``handler`` in place of Python's own, for as long as this is entered; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in STOPPING if _ours(signum)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def raised() -> contextlib.AbstractContextManager[None]:
    """While entered, each of the signals raises its exception, KeyboardInterrupt or :class:`Terminated`."""
    return _handled(_raise)


class Pending:
    """The first signal that came, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, _: Any) -> None:
        if self.signum is not None:  # asked twice: at once, without a checkpoint
            raise interruption(signum)
        self.signum = signum


@contextlib.contextmanager
def deferred() -> Iterator[Pending]:
    """While entered, the first signal is only noted, so that the step and the files in hand are finished; a second one
    raises.

    A process that did not have Python's own handlers keeps those it had.
    """
    pending = Pending()
    with _handled(pending):
        yield pending


quiet_start()
