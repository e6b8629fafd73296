"""Errors that are told in words."""

from collections.abc import Sequence

TOLD = 8  # problems of a corpus at a time


class InputError(Exception):
    """The input or the configuration is wrong.

    The message is one line a problem: what is wrong, where (file, key, sample), what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class NoFilesLeft(InputError):
    """This process may open no more files: no other sample is read in place of one that this keeps from being read."""


class LostRanks(Exception):
    """Other ranks are gone. The message is one line; the command line prints it without a traceback and exits with code
    1, so that the launcher starts all ranks again.
    """


def refuse(corpus: object, problems: Sequence[str]) -> None:
    """Raise InputError where a corpus has problems, with the first ones and what tells the others."""
    if not problems:
        return
    lines, left = list(problems[:TOLD]), len(problems) - TOLD
    if left > 0:
        lines.append(f"{corpus}: {left} more problems: `cclmpc verify {corpus}` tells them all")
    raise InputError("\n".join(lines))
