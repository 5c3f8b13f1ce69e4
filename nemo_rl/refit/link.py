"""How the ranks of a session reach each other: the control plane, what all say of themselves, and a channel."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.control import Control
from nemo_rl.refit.cost import Links
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.board import Board
from nemo_rl.refit.transports.links import learn
from nemo_rl.refit.transports.mover import Facts, Transport
from nemo_rl.refit.transports.registry import candidates, open_channel, own_fact, share_facts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """What `connect` makes.

    Attributes:
        control: with a board where ranks share a host.
        facts: what each rank says of itself.
        candidates: transports that the options permit and all ranks support.
        channel: connected to every rank.
        links: what links give; None where nobody measured.
    """

    control: Control
    facts: Facts
    candidates: tuple[Transport, ...]
    channel: Channel
    links: Links | None


def connect(control: Control, options: RefitOptions, device: torch.device, given: Channel | None) -> Link:
    """Every rank calls it. `given` is an open channel to use instead of one that this opens.

    Raises:
        TransferError: a rank did not answer, was here before, or does not support the transport; its name and the
            reason.
    """
    control.enter()
    facts = share_facts(control, own_fact(device, given is not None))
    boardless = _meet_on_board(control, facts)
    found = candidates(control, options, facts, boardless)
    links = None if given else learn(control, found, facts, options, device)
    channel = given or open_channel(device, control.store, control.rank, control.world.size, control.deadline_s)
    return Link(control, facts, found, channel, links)


def _meet_on_board(control: Control, facts: Facts) -> str | None:
    """Ranks that can share memory meet there from now on. Why they cannot; None where they can."""
    hosts = {fact.host for fact in facts.values()}
    if len(hosts) > 1 or "" in hosts:
        return "ranks are on several hosts"
    try:
        control.board = Board.open(control, lanes=control.world.size)
    except OSError as error:
        if control.rank == 0:
            log.info("ranks of one host meet at the store, which takes longer: %s", error)
        return f"no memory that all ranks share ({error})"
    return None
