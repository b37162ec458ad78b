"""Errors that are the user's to mend: one message with the place, the value and the fix; exit code 2."""


class InputError(ValueError):
    """Bad input: a setting, a file, a model or a checkpoint that cannot be used as it is."""
