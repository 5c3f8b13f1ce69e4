"""What a transport is: a named way to run plans, the limits of that way, and the mover that runs one plan by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_rl.refit.base import World
from nemo_rl.refit.control import Control
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.pipeline import Pipeline, Tracker, Traffic
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


@dataclass(frozen=True, slots=True)
class Fact:
    """What a rank says of itself before a transport is chosen.

    Attributes:
        host: identity of the machine since its last boot.
        device: kind of device that its tensors are on, `cpu` or `cuda`.
        given: the session was handed an open channel, so that ranks may be threads of one process.
        beacon: where other processes of the host find a piece of its memory; empty where it has none to show.
        name: of the host.
        hardware: its device and the software that moves bytes, in words; measurements of links go with them.
        gpu: identity of its GPU; empty for a CPU.
        free_bytes: memory of its device that nobody has taken; None where the system does not tell.
    """

    host: str
    device: str
    given: bool
    beacon: str = ""
    name: str = ""
    hardware: str = ""
    gpu: str = ""
    free_bytes: int | None = None


Facts = Mapping[int, Fact]
"""rank -> what it says; the same on all ranks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a mover is made from, on one rank.

    Attributes:
        messages: passes the plan's messages over the session's channel.
        sources: trainer rank -> its layout; replicas share one object.
        landings: generator rank -> its layout; replicas share one object.
    """

    plan: RefitPlan
    rank: int
    device: torch.device
    control: Control
    messages: Pipeline
    sources: Mapping[int, Layout]
    landings: Mapping[int, Layout]


class Mover(Protocol):
    """Runs one plan's bulk copies on one rank, refit after refit; every rank of the world has one."""

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """Make ready for `run`, with its arguments; every rank calls it, and then all meet. Nothing of other ranks is
        touched here. Returns whether others have to hear something of this rank before bytes move."""

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """Move this rank's part of `copies`; all ranks call it after every generator was closed to requests.

        Args:
            src_view: (source row, region) -> view of exactly that region in this rank's storage.
            tracker: where copies land; None on a rank that receives nothing.
            news: `ready` returned True on any rank.
            deadline_s: for the whole run.

        Raises:
            TransferError: naming peer and parameter.
        """

    def close(self) -> None:
        """Give up what was made for the plan; idempotent."""


@dataclass(frozen=True, slots=True)
class Transport:
    """One way to run plans.

    Attributes:
        name: as in the configuration.
        unsupported: (rank, world, facts) -> why this rank cannot take part, None where it can.
        mover: makes the mover of one rank, once its plan is agreed on.
        all_misc: why every tensor travels whole; None where the plan decides.
        one_sided: receivers read from where trainers hold, without message buffers.
        idles: its mover calls `control.idle` as soon as bytes move, and again and again.
        broadcasts: bulk is broadcast on the session's channel, as whole tensors are.
    """

    name: str
    unsupported: Callable[[int, World, Facts], str | None]
    mover: Callable[[Setting], Mover]
    all_misc: str | None = None
    one_sided: bool = False
    idles: bool = False
    broadcasts: bool = False
