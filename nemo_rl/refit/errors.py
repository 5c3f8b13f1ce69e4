"""The errors a refit can end with. Each names what failed, where, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping


class RefitError(RuntimeError):
    """A refit was refused or failed; no version was committed.

    Attributes:
        rank: the rank that says so.
        phase: connect, declare, plan, agree, digest, begin, transfer, misc, verify or commit.
        detail: what was seen, with names and numbers.
        remedy: what to do about it.
    """

    def __init__(self, detail: str, *, rank: int, phase: str, remedy: str) -> None:
        super().__init__(f"refit failed on rank {rank} in phase '{phase}': {detail}. Remedy: {remedy}")
        self.rank, self.phase, self.detail, self.remedy = rank, phase, detail, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.detail, self.rank, self.phase, self.remedy)


def _rebuild(kind: type[RefitError], detail: str, rank: int, phase: str, remedy: str) -> RefitError:
    return kind(detail, rank=rank, phase=phase, remedy=remedy)


class PlanError(RefitError):
    """The layouts do not join into a plan that covers every destination byte exactly once."""


class AgreementError(RefitError):
    """Ranks do not hold the same plan, dtype table, transport or version."""


class TransferError(RefitError):
    """Bytes did not arrive: a peer died, a deadline passed, or a transport failed."""


class VerificationError(RefitError):
    """Bytes arrived but are not the trainer's."""


class StoreLost(RuntimeError):
    """The store over which ranks meet does not answer."""


class PoisonedError(RefitError):
    """The session failed before and must be remade."""


_OF_PHASE: Mapping[str, type[RefitError]] = {
    "connect": TransferError,
    "declare": PlanError,
    "plan": PlanError,
    "transfer": TransferError,
    "misc": TransferError,
    "digest": VerificationError,
    "verify": VerificationError,
}


def named_error(error: Exception, rank: int, phase: str) -> RefitError:
    """Any exception as the refit error of the phase it came from; deadlines are a transfer's in all of them."""
    late = isinstance(error, (TimeoutError, StoreLost))
    kind = TransferError if late else _OF_PHASE.get(phase, RefitError)
    remedy = "see the cause above; remake the session"
    return kind(f"{type(error).__name__}: {error}", rank=rank, phase=phase, remedy=remedy)
