"""The few exceptions of hubfusion.

A finetune that does not fit is a value (`hubfusion.lineage.Rejected`), never an exception. An exception means that
the work at hand cannot go on; its message is one line that says where, what came, and what is allowed.
"""


class FusionError(Exception):
    """Anything hubfusion refuses to go on with; the message is one line."""


class CheckpointError(FusionError):
    """A checkpoint on disk cannot be read or written as asked: names the file and the parameter."""


class RecipeError(FusionError):
    """A method, option or coefficient is not allowed: names it, the value that came and the range."""


class HubError(FusionError):
    """The Hub did not do what was asked: names the call, the repository and the answer."""


class NotFound(HubError):
    """The repository, revision or file does not exist, or is hidden from this token."""


class Forbidden(HubError):
    """The token may not do this, or there is none (HTTP 401, 403); asking again will not help."""


class Conflict(HubError):
    """Somebody else moved the branch first (HTTP 412, or 409 with the head moved): nothing was written."""


class Corrupt(HubError):
    """A download does not have the size or the hash that the Hub lists."""


class EvaluationError(FusionError):
    """A dataset, protocol or score is not usable: names the dataset and what is allowed."""
