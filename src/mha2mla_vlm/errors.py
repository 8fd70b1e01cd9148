"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


class InputError(ValueError):
    """Bad input: one line with the bad value, what is accepted and what to do.

    The command line prints it without a traceback and exits with 2.
    """
