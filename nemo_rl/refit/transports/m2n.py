"""Tensors that `nccl.m2n` can reshard go by it, one call for all of a buffer; the others as parcels.

Needs NCCL 2.30.7, preloaded, with nccl4py and nccl-extensions. Calls are issued in one order on all ranks
(`resharding.reshards`), and nothing else of this session uses their communicator. Each call packs, waits for all ranks
and unpacks by itself, and calls cannot be grouped where there is no RDMA-capable NIC: many small ones leave the link
idle most of the time, so tensors of one buffer go in one call, and very small ones as parcels.

nccl4py 0.6.0 is built for NCCL 2.32.3: what passes it a versioned structure (`Communicator.properties`, a `NCCLConfig`)
is refused by 2.30.7. So multicast is told by the environment, which is all that turns it off, and not by properties.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from nemo_rl.refit.device import MULTICAST_OFF, await_event, within
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.pipeline import IN_PLACE, Tracker, Traffic
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.grouped import Grouped
from nemo_rl.refit.transports.lanes import Lanes
from nemo_rl.refit.transports.mover import Setting
from nemo_rl.refit.transports.own_nccl import abort_together, keep_variable, variable
from nemo_rl.refit.transports.resharding import SLOT_BYTES, Reshard, Said, Side, reshards

log = logging.getLogger(__name__)

_NCCL = 23007
_PACKAGES = ("nccl.core", "nccl.m2n")
_NVLS = "NCCL_NVLS_ENABLE"
_CLOSE_S = 10.0
_MOST_RUNNING = 32  # calls, of a few kernels each


def missing() -> str | None:
    """What this process lacks for m2n, with the remedy; None where it is all there."""
    absent = [name for name in _PACKAGES if not _found(name)]
    if absent:
        return f"{', '.join(absent)} cannot be imported: install nccl4py 0.6.0 and nccl-extensions 0.1.0"
    found = _nccl_version()
    if found < _NCCL:
        return f"NCCL is {found}, m2n needs {_NCCL}: preload its libnccl.so.2 (LD_PRELOAD) before torch loads another"
    if variable(_NVLS) != MULTICAST_OFF[_NVLS]:
        return f"{_NVLS} is {variable(_NVLS)}, m2n's windows would use NVLink multicast: start with {_NVLS}=0"
    return NcclM2n.lost or None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _nccl_version() -> int:
    """Of the library that the process has loaded; 0 where there is none."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


class NcclM2n:
    """A communicator of nccl4py's and m2n's handle; every rank makes one at the same time.

    Attributes:
        lost: why this process cannot use m2n again; empty while it can.

    Raises:
        TimeoutError: some rank did not connect.
        nccl.bindings.nccl.NCCLError: NCCL refuses.
    """

    lost: ClassVar[str] = ""

    def __init__(self, setting: Setting) -> None:
        keep_variable("NCCL_RESHARD_PACK_BUFFSIZES", f"{SLOT_BYTES}:1")  # read when the first handle is made
        import nccl.core
        import nccl.m2n

        self._core, self._m2n, self._device = nccl.core, nccl.m2n, setting.device
        self._comm: Any = None
        self._deadline_s = setting.control.deadline_s
        self._made: dict[int, Reshard] = {}  # those that were made before
        self._running: deque[torch.cuda.Event] = deque()
        own = bytes(nccl.core.get_unique_id()) if setting.rank == 0 else b""
        name = setting.control.gather("agree", own)[0]
        try:
            within(setting.control.deadline_s, lambda: self._connect(setting, name), "making m2n's communicator")
        except TimeoutError as error:  # a thread is inside NCCL, which may come back with a communicator at any time
            NcclM2n.lost = f"{error}: start this process again, or use 'nccl'"
            raise

    def _connect(self, setting: Setting, name: bytes) -> None:
        size, rank = setting.plan.world.size, setting.rank
        with torch.cuda.device(self._device):
            self._handle = self._m2n.Handle.create()
            try:
                self._comm = self._core.Communicator.init(size, rank, self._core.UniqueId.from_bytes(name))
            except Exception:  # those of NCCL's packages are of no common kind
                self._handle.destroy()
                raise

    def reshard(self, call: Reshard, rank: int) -> None:
        """Start on the current stream of the session's device.

        The first time, ranks may wait for each other on their hosts, as NCCL registers memory with all of them. At any
        time, few calls are under way: the driver makes the host wait, without a limit, where its queues are full.

        Raises:
            TimeoutError: some rank did not come then, or an earlier call does not end.
        """
        stream = torch.cuda.current_stream(self._device)
        if len(self._running) == _MOST_RUNNING:
            await_event(self._running.popleft(), "an earlier call", time.monotonic() + self._deadline_s)
        if id(call) in self._made:
            self._start(call, rank, stream)
        else:
            within(self._deadline_s, lambda: self._start(call, rank, stream), "m2n's first call")
            self._made[id(call)] = call
        self._running.append(stream.record_event())

    def _start(self, call: Reshard, rank: int, stream: torch.cuda.Stream) -> None:
        ends: dict[str, Any] = {}
        for name, side in (("src", call.src), ("dst", call.dst)):
            ends[name] = call.address[rank] if rank in side.ranks else None
            ends[f"{name}_mesh"] = self._m2n.Mesh(side.mesh, side.start)
            ends[f"{name}_placements"] = self._placements(side)
            ends[f"{name}_local_shape"], ends[f"{name}_dtype"] = side.local, call.dtype
        with torch.cuda.device(self._device):  # m2n refuses a communicator of another device
            self._m2n.reshard(comm=self._comm, stream=stream, handle=self._handle, **ends)

    def _placements(self, side: Side) -> tuple[object, ...]:
        return tuple(self._m2n.Replicate() if dim is None else self._m2n.Shard(dim) for dim in side.dims)

    def close(self) -> None:
        """Give back m2n's buffers and the communicator, or say that this process has lost m2n; idempotent."""
        comm, self._comm = self._comm, None
        if comm is None:
            return
        stream = torch.cuda.current_stream(self._device)
        try:
            within(2 * _CLOSE_S, lambda: self._give_back(comm, stream), "giving back m2n's buffers")
        except Exception as error:  # those of NCCL's packages are of no common kind
            NcclM2n.lost = f"m2n was left in the middle of a call ({error}): start this process again, or use 'nccl'"
            log.warning("%s", NcclM2n.lost)

    def _give_back(self, comm: Any, stream: torch.cuda.Stream) -> None:
        """The handle first: m2n keeps windows by the communicator's address, which a later one may have again."""
        with torch.cuda.device(self._device):
            await_event(stream.record_event(), f"m2n's work on {self._device}", time.monotonic() + _CLOSE_S)
            self._handle.destroy()
            comm.abort()


class Library(Protocol):
    """What starts calls of m2n on one rank."""

    def reshard(self, call: Reshard, rank: int) -> None: ...

    def close(self) -> None: ...


class M2n:
    """The mover of one rank; see the module.

    Args:
        lanes: for what m2n does not take; closed with the mover.
        library: starts calls; closed with the mover.
    """

    def __init__(self, setting: Setting, lanes: Lanes, library: Library) -> None:
        self._setting, self._lanes, self._library = setting, lanes, library
        self._plan, self._rank = setting.plan, setting.rank
        self._numbers = {fqn: number for number, fqn in enumerate(setting.plan.names)}
        self._seen: tuple[object, object] = (None, None)
        self._said: dict[int, Said] = {}
        self._calls: Sequence[tuple[Reshard, np.ndarray]] = ()
        self._rest: Grouped | None = None
        self._news = b""

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """Find out where rows lie."""
        self._news = self._say(src_view, tracker)
        return bool(self._news)

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """See `Mover.run`. Raises TransferError naming the tensor whose call failed."""
        if news := news or self._rest is None:
            said = self._setting.control.gather("transfer", self._news)
            self._said |= {rank: Said.from_bytes(payload) for rank, payload in said.items() if payload}
            self._rest = self._divide(copies)
        for call, lands in self._calls:
            self._reshard(call)
            if tracker is not None and len(lands):
                tracker.landed(lands)
        self._rest.ready(src_view, tracker)
        traffic = self._rest.run(copies, src_view, tracker, news, deadline_s)
        traffic.staging_bytes += SLOT_BYTES if self._calls else 0
        return traffic

    def close(self) -> None:
        abort_together([self._library.close, self._lanes.close])

    def _say(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bytes:
        """Where this rank's rows lie; nothing where they are where they were."""
        landing: Mapping[int, torch.Tensor] | None = None
        if tracker is not None and (tracker.layout.unit == IN_PLACE).any():
            landing = tracker.rows(IN_PLACE)
        if self._seen[0] is src_view and self._seen[1] is landing:
            return b""
        self._seen = src_view, landing
        if tracker is not None:  # a rank on both sides is refused, whatever it holds
            return Said.of(tracker.layout, landing or {}, self._numbers).to_bytes()
        layout = self._setting.sources[self._rank]
        views = {row: src_view(row, layout.region(row)) for row in range(len(layout))}
        return Said.of(layout, views, self._numbers).to_bytes()

    def _divide(self, copies: CopyTable) -> Grouped:
        """What goes by m2n, in which calls; the mover of the rest."""
        takers: dict[int, set[int]] = {}
        for tensor, rank in set(zip(copies.tensor.tolist(), copies.dst_rank.tolist(), strict=True)):
            takers.setdefault(tensor, set()).add(rank)
        frozen = {tensor: frozenset(takers[tensor]) for tensor in sorted(takers)}
        metas = list(self._plan.table.values())
        calls, reasons = reshards(metas, self._plan.world, self._said, frozen)
        mine = copies.dst_rank == self._rank
        self._calls = [(c, np.flatnonzero(np.isin(copies.tensor, c.tensors) & mine)) for c in calls]
        by_m2n = np.isin(copies.tensor, [tensor for call in calls for tensor in call.tensors])
        if self._rank == self._plan.world.trainers[0]:
            log.info("m2n: %d tensors in %d calls; %s", len(frozen) - len(reasons), len(calls), self._why(reasons))
        return Grouped(self._setting, self._lanes, by_m2n)

    def _why(self, reasons: Mapping[int, str]) -> str:
        first = {text: self._plan.names[tensor] for tensor, text in reversed(list(reasons.items()))}
        counts = Counter(reasons.values()).most_common()
        return "; ".join(f"{n} as parcels ({first[text]}, ...): {text}" for text, n in counts) or "no parcels"

    def _reshard(self, call: Reshard) -> None:
        try:
            self._library.reshard(call, self._rank)
        except Exception as error:  # those of NCCL's packages are of no common kind
            name = self._plan.names[call.tensors[0]]
            raise TransferError(
                f"m2n failed with {name} ({len(call.tensors)} tensors in one call, {call.src} -> {call.dst}): {error}",
                rank=self._rank,
                phase="transfer",
                remedy="use the transport 'nccl'; remake the session",
            ) from error
