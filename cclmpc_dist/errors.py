"""Errors that are told in words."""


class InputError(Exception):
    """The input or the configuration is wrong.

    The message is one line a problem: what is wrong, where (file, key, sample), what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class LostRanks(Exception):
    """Other ranks are gone. The message is one line; the command line prints it without a traceback and exits with code
    1, so that the launcher starts all ranks again.
    """
