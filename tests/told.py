"""What a command prints for a UserError."""


def user_error(printed: str) -> str:
    """Return "message: hint" of standard error that holds one `error:` line, perhaps a `hint:` line, and no more."""
    first, *rest = printed.splitlines()
    assert first.startswith("error: ") and len(rest) <= 1, printed
    assert all(line.startswith("hint: ") for line in rest), printed
    return ": ".join([first.removeprefix("error: "), *(line.removeprefix("hint: ") for line in rest)])
