"""The transports by name, and the choice among them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.pipeline import Pipeline
from nemo_rl.refit.transports import peer
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.gloo import GlooChannel
from nemo_rl.refit.transports.golden import Golden
from nemo_rl.refit.transports.mover import Fact, Facts, Setting, Transport
from nemo_rl.refit.transports.nccl import NcclChannel

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _only_on(device: str, name: str, facts: Facts) -> str | None:
    other = next((r for r, fact in facts.items() if fact.device != device), None)
    return None if other is None else f"{name} moves {device} tensors, rank {other} has them on {facts[other].device}"


def _any_one_device(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on(facts[0].device, "one channel", facts)


def _gloo_unsupported(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on("cpu", "gloo", facts)


def _nccl_unsupported(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on("cuda", "nccl", facts)


def _messages(setting: Setting) -> Pipeline:
    return setting.messages


TRANSPORTS: Mapping[str, Transport] = {
    transport.name: transport
    for transport in (
        Transport("gloo", _gloo_unsupported, _messages),
        Transport("peer", peer.unsupported, peer.Peer),
        Transport("nccl", _nccl_unsupported, _messages),
        Transport("golden", _any_one_device, Golden),
        Transport("broadcast", _any_one_device, _messages, all_misc="conventional refit"),
    )
}

AUTO = ("peer", "nccl", "gloo")
"""What `auto` takes: the first of these that every rank supports; where a channel was given, what passes messages."""

NAMES = ("auto", *TRANSPORTS)


def own_fact(device: torch.device, given: bool) -> Fact:
    """This rank's part of the facts."""
    host = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return Fact(host, device.type, given, peer.memory_of(device).beacon())


def choose(control: Control, asked: str, fact: Fact) -> Transport:
    """The transport that `asked` names, or the first of `AUTO` that all ranks support; every rank calls it.

    Raises:
        TransferError: a rank does not support what was asked for; the reason and the rank.
    """
    facts = {r: Fact(**json.loads(b)) for r, b in control.gather("connect", json.dumps(asdict(fact)).encode()).items()}
    mine = {t.name: t.unsupported(control.rank, control.world, facts) for t in TRANSPORTS.values()}
    said = {r: json.loads(b) for r, b in control.gather("connect", json.dumps(mine).encode()).items()}
    reasons = {
        name: next((f"{control.world.describe(r)}: {text[name]}" for r, text in said.items() if text[name]), None)
        for name in TRANSPORTS
    }
    auto = [name for name in AUTO if name != "peer" or not fact.given]
    wanted = auto if asked == "auto" else [asked]
    found = next((name for name in wanted if reasons[name] is None), None)
    refused = "; ".join(f"transport '{name}' is not possible ({reasons[name]})" for name in wanted if reasons[name])
    if found is None:
        raise TransferError(
            refused, rank=control.rank, phase="connect", remedy="choose another transport, or 'auto' for one that fits"
        )
    if control.rank == 0:
        log.info("transport '%s'%s", found, f"; {refused}" if refused else "")
    return TRANSPORTS[found]


def open_channel(device: torch.device, store: dist.Store, rank: int, size: int, deadline_s: float) -> Channel:
    """The channel of buffers on `device`, connected to every rank. Raises RuntimeError where a rank does not answer."""
    if device.type == "cpu":
        return GlooChannel(store, rank, size, deadline_s)
    return NcclChannel(store, rank, size, deadline_s, device)
