"""How a run ends early: UserError for what users can fix, Leaving for what befell it; everything else is our bug."""

from __future__ import annotations

_MOST = 4000  # characters: a value of a stranger's file may be millions


class UserError(ValueError):
    """Something the user can fix.

    message  what is wrong (with the value) and where
    hint     what to do about it; None: the message says it

    Both become one line. The command line prints them as `error: message` and `hint: hint`, once, on rank 0; every rank
    that raises the error leaves with a non-zero exit status. `str(error)` is "message: hint".
    """

    def __init__(self, message: str, hint: str | None = None):
        self.message = _one_line(message)
        self.hint = None if hint is None else _one_line(hint)
        super().__init__(self.message if self.hint is None else f"{self.message}: {self.hint}")


def _one_line(text: str) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST else f"{line[: _MOST // 2]} ... {line[-_MOST // 2 :]}"


class Leaving(Exception):
    """An end that is nobody's mistake: the same command goes on later. `status` is the exit status of the process."""

    status = 1


class RankLost(Leaving):
    """Another rank died, or the run hung. The watch has said which, where and in which phase."""

    status = 3


class Preempted(Leaving):
    """A signal asked the run to leave. `str(error)` says after which step, and what is saved."""

    status = 75  # EX_TEMPFAIL; scripts/slurm/launch.sh turns it into a requeue


class Interrupted(Preempted):
    """Ctrl-C asked the run to leave."""

    status = 130
