"""How a run ends early: UserError for what users can mend, Leaving for what befell it; everything else is our bug."""


class UserError(ValueError):
    """Something the user can mend.

    `str(error)` is one line that says what is wrong (with the value), where, and what to do. Every rank that
    raises it leaves with a non-zero exit status; rank 0 prints it once (see `megalora.cluster.launch`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class Leaving(Exception):
    """An end that is nobody's mistake: the same command goes on later. `status` is the exit status of the process."""

    status = 1


class RankLost(Leaving):
    """Another rank died, or the run hung. The watch has said which, where and in which phase."""

    status = 3


class Preempted(Leaving):
    """A signal asked the run to leave. `str(error)` says after which step, and what is saved."""

    status = 75  # EX_TEMPFAIL; scripts/slurm/launch.sh turns it into a requeue
