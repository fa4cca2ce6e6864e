"""What can go wrong, named. A `UserError` is one sentence for a person; the rest is for the code that catches it."""


class DistkvError(Exception):
    """Base of every error raised on purpose in this package."""


class UserError(DistkvError):
    """Bad input: what, where and what would work, in one sentence. The command line prints it."""

    exit_status = 2


class ConfigError(UserError):
    """A configuration file or key that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another shape than the model."""


class LedgerUnavailable(DistkvError):
    """The ledger server did not answer within its time limit. Running requests go on; new loans wait."""


class SupersededError(DistkvError):
    """A newer incarnation of this instance has registered: this one must stop, and not be started again."""

    exit_status = 3


class PeerLost(DistkvError):
    """A peer died (EOF) or did not answer within the deadline; its channel is closed and cannot be used again."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"lost {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerWrong(PeerLost):
    """A peer answered in the right shape, but what it said or gave back cannot be true: nothing of it is believed."""


class UnreadableMessage(DistkvError):
    """Bytes of another process that are not what they should be."""


class FatalError(DistkvError):
    """What a process cannot go on with, whichever of its threads meets it: it ends, and others take its work over."""


class IntegrityError(FatalError):
    """A conservation law of the memory accounts is broken: a bug, never a user's fault."""


class RankLost(PeerLost, FatalError):
    """A tensor-parallel rank of this very instance is gone: no rank can go on alone."""
