"""Errors and signals become one sentence on standard error and an exit code."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import typer

from dirmerge.cli.options import LogKind
from dirmerge.cli.progress import print_json
from dirmerge.errors import DirmergeError


@contextlib.contextmanager
def report_errors(log: LogKind) -> Iterator[None]:
    """Turns errors that the user can act on into one sentence on standard error and their exit code."""
    try:
        with _termination():
            yield
    except DirmergeError as error:
        if log is LogKind.json:
            print_json({"event": "error", "message": str(error), "exit_code": error.exit_code})
        typer.echo(f"dirmerge: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo("dirmerge: interrupted, nothing was written", err=True)
        raise typer.Exit(130) from error
    except _Terminated as error:
        typer.echo("dirmerge: terminated, nothing was written", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from error


class _Terminated(BaseException):
    """SIGTERM arrived; the merge cleans up as after Ctrl-C."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raises _Terminated at SIGTERM, instead of leaving files behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
