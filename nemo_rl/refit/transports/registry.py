"""The transports by name, and the choice among them."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.control import Control
from nemo_rl.refit.cost import Demand, Links
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.pipeline import Pipeline
from nemo_rl.refit.relay import relay_of
from nemo_rl.refit.transports import m2n, mapped, nccl_calls, peer
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.gloo import GlooChannel
from nemo_rl.refit.transports.golden import Golden
from nemo_rl.refit.transports.grouped import STAGING_BYTES, Grouped, longest_message
from nemo_rl.refit.transports.hardware import gpu_of, hardware_of
from nemo_rl.refit.transports.lanes import HostLanes, Lanes, num_lanes
from nemo_rl.refit.transports.mover import Fact, Facts, Setting, Transport
from nemo_rl.refit.transports.nccl import NcclChannel

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _only_on(device: str, name: str, facts: Facts) -> str | None:
    other = next((r for r, fact in facts.items() if fact.device != device), None)
    return None if other is None else f"{name} moves {device} tensors, rank {other} has them on {facts[other].device}"


def _any_one_device(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on(facts[0].device, "one channel", facts) or own_gpus(facts)


def _gloo_unsupported(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on("cpu", "gloo", facts)


def _nccl_unsupported(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on("cuda", "nccl", facts) or own_gpus(facts) or nccl_calls.missing()


def own_gpus(facts: Facts) -> str | None:
    """NCCL wants a GPU for each rank."""
    first: dict[str, int] = {}
    for rank, fact in facts.items():
        other = first.setdefault(fact.gpu, rank)
        if fact.gpu and other != rank:
            return f"ranks {other} and {rank} are on one GPU ({fact.gpu}), NCCL wants one for each"
    return None


def _lanes(setting: Setting) -> Lanes:
    channel = setting.messages.channel
    if not isinstance(channel, NcclChannel):
        return HostLanes(channel)
    return channel.lanes(num_lanes(setting.messages.num_streams))


def _grouped(setting: Setting) -> Grouped:
    return Grouped(setting, _lanes(setting))


def _m2n_unsupported(rank: int, world: World, facts: Facts) -> str | None:
    return _only_on("cuda", "m2n", facts) or own_gpus(facts) or nccl_calls.missing() or m2n.missing()


def _m2n(setting: Setting) -> m2n.M2n:
    lanes = _lanes(setting)
    try:
        return m2n.M2n(setting, lanes, m2n.NcclM2n(setting))
    except Exception:
        lanes.close()
        raise


def _messages(setting: Setting) -> Pipeline:
    return setting.messages


TRANSPORTS: dict[str, Transport] = {
    transport.name: transport
    for transport in (
        Transport("gloo", _gloo_unsupported, _messages),
        Transport("peer", peer.unsupported, peer.Peer, one_sided=True, idles=True),
        Transport("nccl", _nccl_unsupported, _grouped, idles=True),
        Transport("m2n", _m2n_unsupported, _m2n),
        Transport("golden", _any_one_device, Golden, broadcasts=True),
        Transport("broadcast", _any_one_device, _messages, all_misc="conventional refit"),
    )
}

AUTO = ("peer", "nccl", "gloo")
"""What `auto` takes of those that every rank supports: what is predicted to be fastest, the first of those that are
about as fast, or the first where links were not measured; where a channel was given, what passes messages."""

_ALIKE = 1.05
"""Predictions that differ by less are alike: the first transport of `AUTO` is taken, which needs the least memory."""

NAMES = ("auto", *TRANSPORTS)

OF_PARCELS = ("nccl", "m2n")
"""Those whose messages must fit into slots of bounded size."""


def own_fact(device: torch.device, given: bool) -> Fact:
    """This rank's part of the facts."""
    host = _BOOT.read_text().strip() if _BOOT.exists() else ""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    memory = mapped.memory_of(device)
    words = platform.node(), hardware_of(device), gpu_of(device)
    return Fact(host, device.type, given, memory.beacon(), *words, free)


def share_facts(control: Control, fact: Fact) -> Facts:
    """What all ranks say; every rank calls it."""
    return {r: Fact(**json.loads(b)) for r, b in control.gather("connect", json.dumps(asdict(fact)).encode()).items()}


def _too_long(options: RefitOptions, world: World) -> str | None:
    """Why messages do not fit into slots; None where they do."""
    most = longest_message(bool(world.shared))
    if options.bucket_bytes <= most:
        return None
    return f"bucket_bytes={options.bucket_bytes}, but slots take messages of {most} bytes at most"


def candidates(control: Control, options: RefitOptions, facts: Facts, boardless: str | None) -> tuple[Transport, ...]:
    """The transport that the options name, or all of `AUTO` that all ranks support; every rank calls it.

    Args:
        boardless: why ranks have no board, without which one-sided transports are not possible; None where they have.

    Raises:
        TransferError: a rank does not support what was asked for; the reason and the rank.
    """
    mine = {t.name: t.unsupported(control.rank, control.world, facts) for t in TRANSPORTS.values()}
    mine |= {name: mine[name] or boardless for name, t in TRANSPORTS.items() if t.one_sided}
    mine |= {name: mine[name] or _too_long(options, control.world) for name in OF_PARCELS}
    said = {r: json.loads(b) for r, b in control.gather("connect", json.dumps(mine).encode()).items()}
    reasons = {
        name: next((f"{control.world.describe(r)}: {text[name]}" for r, text in said.items() if text[name]), None)
        for name in TRANSPORTS
    }
    asked = options.transport
    auto = [name for name in AUTO if name != "peer" or not facts[control.rank].given]
    wanted = auto if asked == "auto" else [asked]
    found = [name for name in wanted if reasons[name] is None]
    refused = "; ".join(f"transport '{name}' is not possible ({reasons[name]})" for name in wanted if reasons[name])
    if not found:
        raise TransferError(
            refused, rank=control.rank, phase="connect", remedy="choose another transport, or 'auto' for one that fits"
        )
    if control.rank == 0 and refused:
        log.info("%s", refused)
    return tuple(TRANSPORTS[name] for name in found)


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport of a session, and seconds of a refit that were predicted for each that could be taken."""

    transport: Transport
    predictions: Mapping[str, float]


def choose(
    control: Control,
    found: Sequence[Transport],
    links: Links | None,
    facts: Facts,
    options: RefitOptions,
    demand: Demand,
) -> Choice:
    """The first of `found` that is as good as the fastest for a plan, as rank 0 predicts; every rank calls it."""
    if links is None:
        return Choice(found[0], {})
    told = b""
    if control.rank == 0:
        device = facts[0].device
        givers = {t.name: _givers(t, demand, device) for t in found}
        told = json.dumps(demand.predictions(links, givers, device, options.verify)).encode()
    predictions: dict[str, float] = json.loads(control.gather("agree", told)[0])
    fitting = [t for t in found if _room(t, facts, options) is None] or found
    least = min(predictions[t.name] for t in fitting)
    best = next(t for t in fitting if predictions[t.name] <= _ALIKE * least)
    if control.rank == 0:
        wanting = [text for t in found if (text := _room(t, facts, options))]
        said = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in predictions.items())
        log.info("transport '%s'; predicted: %s", best.name, "; ".join([said, *wanting]))
    return Choice(best, predictions)


def _givers(transport: Transport, demand: Demand, device: str) -> np.ndarray | None:
    """Where replicas of generators forward to each other."""
    if not transport.one_sided:
        return None
    return relay_of(demand.plan, demand.landings, mapped.memory_of(torch.device(device)).step_bytes).giver


def _room(transport: Transport, facts: Facts, options: RefitOptions) -> str | None:
    """Why message buffers do not fit into some rank's memory; None where they do or nobody can tell."""
    need = 0 if transport.one_sided else max(STAGING_BYTES, 2 * options.num_streams * options.bucket_bytes)
    short = next((r for r, fact in facts.items() if fact.free_bytes is not None and fact.free_bytes < need), None)
    if short is None:
        return None
    return f"{transport.name} needs {need} bytes of message buffers, rank {short} has {facts[short].free_bytes} left"


def open_channel(device: torch.device, store: dist.Store, rank: int, size: int, deadline_s: float) -> Channel:
    """The channel of buffers on `device`, connected to every rank. Raises RuntimeError where a rank does not answer."""
    if device.type == "cpu":
        return GlooChannel(store, rank, size, deadline_s)
    return NcclChannel(store, rank, size, deadline_s, device)
