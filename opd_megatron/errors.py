"""Errors that a user can act on. Each message names the value, the rule it breaks and the remedy, in one line.

Every class also inherits the matching standard type, so that callers who know nothing of this package can
still write `except ValueError`. The command line prints the message without a traceback and exits with code 2.
"""


class OPDError(Exception):
    """Base of every error that a user, rather than a developer, has to act on."""


class ConfigError(OPDError, ValueError):
    """A value of the run configuration that breaks a rule."""


class MissingPathError(OPDError, FileNotFoundError):
    """A file, folder or hub id that cannot be found."""


class UnsupportedModelError(OPDError, ValueError):
    """A model architecture, or a field of its config, that has no mapping to Megatron."""


class WeightsError(OPDError, ValueError):
    """A checkpoint file whose tensors are missing, damaged or of the wrong shape."""


class TokenizerMismatchError(OPDError, ValueError):
    """Student and teacher disagree on what a token id means."""


class DataError(OPDError, ValueError):
    """An empty data set, a row without its column, or a prompt that does not fit."""


class CheckpointError(OPDError, RuntimeError):
    """A training checkpoint that cannot be written, or belongs to another run."""


class RolloutError(OPDError, RuntimeError):
    """The rollout engine could not do what was asked."""


class TeacherError(OPDError, RuntimeError):
    """A teacher could not be asked, or is gone."""


class RewardError(OPDError, RuntimeError):
    """Answers could not be judged."""


class StopRequestedError(OPDError):
    """A signal asked the run to stop; what was waited for was given up."""


class EngineDiedError(RolloutError):
    """The rollout engine's process ended; `RolloutClient` restarts it."""


class EngineMemoryError(RolloutError):
    """The rollout engine found too little free memory to start."""


class StalePolicyError(RolloutError):
    """A rollout was sampled by other weights than the ones being trained."""


class NonFiniteError(OPDError, ArithmeticError):
    """The loss or the gradient norm is NaN or infinite."""


def one_line(error: BaseException) -> str:
    """Describes an error by class and message, in at most 300 characters."""
    error = cause_of(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host: by the error's name and words, as torch has several."""
    said = one_line(error).lower()
    return "memoryerror" in said or any(
        words in said for words in ("out of memory", "allocate memory", "cuda_error_out")
    )


def cause_of(error: BaseException) -> BaseException:
    """Unwraps torch.distributed.checkpoint's collection of all ranks' errors: returns the first one."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if isinstance(failures, dict) and failures else error
