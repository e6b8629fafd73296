"""The one error a user's input can raise."""


class InputError(Exception):
    """The input or the configuration is wrong.

    The message is one line a problem: what is wrong, where (file, key, sample), what to do. The command line prints it
    without a traceback and exits with code 2.
    """
