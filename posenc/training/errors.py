"""The ways in which a run ends early, each with its exit code."""


class RunError(RuntimeError):
    """A run that cannot go on: one line for the user."""

    exit_code = 1


class Refused(RunError):
    """Input that cannot be trained with. Nothing was written."""

    exit_code = 2


class Diverged(RunError):
    """The loss or the gradient is no longer finite."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} Lower --lr or --grad-clip, or lengthen --warmup.")


class PeerFailed(RunError):
    """Rank 0 failed; it has printed why."""


def describe(error: BaseException) -> str:
    """One line for the user."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}."
    return " ".join(str(error).split())
