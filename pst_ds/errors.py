"""Errors that are the user's to mend: one message with the place, the value and the fix; exit code 2."""


class InputError(ValueError):
    """Bad input: a setting, a file, a model or a checkpoint that cannot be used as it is."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line without its full stop; the error's name if it says nothing."""
    return str(error).strip().partition("\n")[0].strip().rstrip(".") or type(error).__name__
