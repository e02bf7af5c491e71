"""Every error this project raises on purpose.

`BMMError` is the root; `UserError` and its subclasses are the user's mistakes, each one sentence that names the
file, key or tensor and says what to do (the command line prints it and exits with 2). Anything else is a fault of
the machine or of ours (exit 1); `one_line` is for telling of a library's within one of these.
"""

from __future__ import annotations


class BMMError(Exception):
    """Root of all errors raised on purpose."""


class ArtefactDamagedError(BMMError):
    """An artefact's bytes differ from what its manifest promises; the stage that made it must run again."""


class StoreAwayError(BMMError):
    """The artefact store is not where it was: its disk is not mounted, say; it may come back."""


class ClusterError(BMMError):
    """The Dask cluster could not be started or reached, or lost a piece of work for good."""


class KilledWorkersError(ClusterError):
    """A piece of work killed every Dask worker that tried it; the cluster itself is well."""


class UserError(BMMError):
    """The user's mistake: one sentence, no traceback, exit code 2."""


class RecipeError(UserError):
    """The recipe is not valid: unknown key, wrong type, impossible value."""


class CheckpointError(UserError):
    """A model folder cannot be used: missing, pickled, of another architecture, with a tensor of another shape."""


class ModelAwayError(CheckpointError):
    """The server that a model is on does not answer: nothing is known of the model, and asking again may help."""


class DataError(UserError):
    """A data split cannot be used: missing, empty, without its columns, overlapping another split."""


class OutputError(UserError):
    """The output folder or the store cannot be written: permissions, disk space, somebody else's files."""


def one_line(error: BaseException) -> str:
    """Return what an error of a library says, on one line of 300 characters at most; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
