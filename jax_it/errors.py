"""The one exception that a user can mend."""


class UserError(Exception):
    """Bad input, said in one line: what is wrong, where (file, line, field) and how to mend it.

    The command line prints it to standard error without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """The run has stopped before its end and nothing is lost: the same command goes on with it. Exit code 75."""
