"""The one error type that users see: everything they can mend raises it, everything else is our bug."""


class UserError(ValueError):
    """Something the user can mend.

    `str(error)` is one line that says what is wrong (with the value), where, and what to do. Every rank that
    raises it leaves with a non-zero exit status; rank 0 prints it once (see `megalora.parallel.launch`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
