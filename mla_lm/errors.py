"""The exceptions that end a program, other than bugs."""

# What to do about a run that diverged.
ADVICE = (
    "on_nonfinite=skip leaves such steps out, in a new run or with ckpt_path=RUN where it has been saved before; "
    "a smaller optimizer.lr needs a new run."
)


class UserError(ValueError):
    """A user's mistake. Its text says what is wrong, where, and what would be right.

    `mla_lm.terminal.cli` prints it in at most three lines and exits with status 2. It is a `ValueError`, so that
    programs which use `MLA` or `Transformer` as a library can catch it without knowing this class.
    """


class TrainingFailed(RuntimeError):
    """Training cannot continue, for lack of memory or disk. Its text says what to do; the exit status is 1."""


class Diverged(TrainingFailed):
    """Training cannot continue because a loss, gradient or weight is not finite."""


class Interrupted(BaseException):
    """A signal ended the run at a step boundary, after its checkpoint was saved. The exit status is 128 + signal.

    Like KeyboardInterrupt, it is not an `Exception`, so that a sweep does not continue with its next job.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
