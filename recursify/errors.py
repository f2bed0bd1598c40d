"""The one error that means "the input is wrong, not the program".

Its message names the place, what was expected, what was given, and how to mend it. A command prints it
as ``error: <message>`` on stderr and ends with status 2; from Python it is a ``ValueError``.

Floor 0. Imports nothing.
"""


class UserError(ValueError):
    """Bad input: a file, a flag, a data set or a checkpoint that cannot be used as given."""
