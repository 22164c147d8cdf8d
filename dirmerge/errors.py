"""Errors that a user can act on; each class has the exit code of the command line."""

from __future__ import annotations


class DirmergeError(Exception):
    """Base of all errors that name a cause the user can remove."""

    exit_code = 1


class RecipeError(DirmergeError, ValueError):
    """The recipe is not valid YAML, has an unknown key, or asks for something meaningless."""

    exit_code = 3


class CheckpointError(DirmergeError, ValueError):
    """A file cannot be read: malformed, truncated, hostile, or of an unsupported kind."""

    exit_code = 4


class MismatchError(DirmergeError, ValueError):
    """The inputs do not fit together; the message lists every problem with the option that resolves it."""

    exit_code = 5


class OutputError(DirmergeError, OSError):
    """The output exists already or cannot be written."""

    exit_code = 6


class NonFiniteError(DirmergeError, ValueError):
    """A tensor holds NaN or Inf; the message names file and tensor."""

    exit_code = 7
