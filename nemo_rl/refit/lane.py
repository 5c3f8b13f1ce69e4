"""Whole tensors on a lane of their own: threads that gather, broadcast and receive them while bulk bytes move.

Why nothing can wait in a circle: bulk never waits for the lane, which has connections, buffers and threads of its own.
On the lane, trainers send in plan order and wait for the root alone; the root gathers and broadcasts in plan order and
waits for trainers and generators; a generator receives in plan order and waits for the root and, when its buffers are
full, for its engine to load what arrived, which begins when its bulk has landed. Engines load on the session's thread,
so that no module takes bulk bytes and whole tensors at once.

On GPUs a kernel of NCCL that waits for its peers may keep others of its process from starting. So the lane runs beside
bulk only where bulk has no kernels that wait (`peer`), and where there is room for all buffers: then no kernel of the
lane waits for an engine to load. Otherwise it runs after bulk.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist

from nemo_rl.refit.base import Landing
from nemo_rl.refit.device import finish
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import PlanError, RefitError, TransferError
from nemo_rl.refit.misc import Receiver, RootSink, root_layout
from nemo_rl.refit.pipeline import Arrivals, Pipeline, Tracker, Traffic
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.mover import Facts, Setting, Transport
from nemo_rl.refit.transports.registry import open_channel, own_gpus

_Arrived = dict[str, torch.Tensor] | Exception | None
_POLL_S = 0.05
THREAD = "whole tensors"


def room(num_streams: int) -> int:
    """Buffers that a generator holds until its engine has loaded them, at most."""
    return 2 * num_streams


def open_lane(setting: Setting, transport: Transport, facts: Facts, verify: bool) -> Lane:
    """The lane of a plan: beside bulk where that cannot deadlock, on connections of its own where bulk needs others.

    Raises:
        PlanError: GPUs cannot carry whole tensors among these ranks.
    """
    plan, bulk, given = setting.plan, setting.messages, facts[setting.rank].given
    if setting.device.type == "cuda":
        _refuse(plan, setting.rank, facts)
        beside = transport.one_sided and len(plan.misc_buffers) <= room(bulk.num_streams)
    else:
        # Simulated ranks pass all their messages through one box a pair.
        beside = not (given and (plan.world.shared or transport.broadcasts))
    channel, own = bulk.channel, None
    if plan.misc_fqns and beside and not transport.one_sided and not given:
        control = setting.control
        store = dist.PrefixStore(f"lane{control.ticket()}", control.store)
        channel = own = open_channel(setting.device, store, setting.rank, plan.world.size, control.deadline_s)
    messages = Pipeline(plan, setting.rank, channel, bulk.num_streams, setting.device)
    return Lane(plan, setting.rank, messages, own, beside, verify)


def _refuse(plan: RefitPlan, rank: int, facts: Facts) -> None:
    """NCCL carries whole tensors on GPUs: one a rank, and a rank that gathers and receives has kernels that wait in
    two orders."""
    both = ", ".join(map(plan.world.describe, plan.world.shared))
    why = f"{both} cannot serve on GPUs" if both else own_gpus(facts)
    if plan.misc_fqns and why:
        first = plan.misc_fqns[0]
        raise PlanError(
            f"{len(plan.misc_fqns)} tensors must travel whole ({first}: {plan.misc_reasons[first]}): {why}",
            rank=rank,
            phase="agree",
            remedy="put trainers and generators on ranks and GPUs of their own",
        )


class Lane:
    """One rank's part in the whole tensors of a plan, refit after refit.

    Args:
        messages: over the lane's channel.
        own: that channel where nobody else uses it; closed with the lane.
        beside: run while bulk moves; otherwise after it.
        verify: keep digests of what arrives.
    """

    def __init__(
        self, plan: RefitPlan, rank: int, messages: Pipeline, own: Channel | None, beside: bool, verify: bool
    ) -> None:
        self._plan, self._rank, self._messages, self._own = plan, rank, messages, own
        self._beside, self._verify = beside, verify
        self._run: _Run | None = None

    def begin(self, src_view: Callable[[int, Region], torch.Tensor], deadline_s: float) -> None:
        """Start, where that may be; weights stand and engines are closed to requests. `src_view` as for `Mover.run`."""
        if self._plan.misc_fqns:
            self._run = _Run(self._plan, self._rank, self._messages, src_view, deadline_s, self._verify)
            if self._beside:
                self._run.start()

    def load(self, landing: Landing | None) -> tuple[Traffic, Ledger]:
        """Give what arrives to the engine, until this rank's part is done: what moved, and digests of what arrived.

        Raises:
            TransferError: naming whom this rank waited for; or the engine did not take all tensors.
        """
        if self._run is None:
            return Traffic(), Ledger(0)
        if not self._beside:
            self._run.start()
        if landing is not None:
            landing.load_misc(self._run.tensors())
            if not self._run.exhausted:
                raise TransferError(
                    "the engine's loader stopped before the last whole tensor",
                    rank=self._rank,
                    phase="misc",
                    remedy="see the engine's log for what its load_weights did",
                )
        return self._run.finish()

    def close(self) -> None:
        """Give up connections, and end what runs at its next look; idempotent."""
        if self._run is not None:
            self._run.stop()
        if self._own is not None:
            self._own.close()


class _Run:
    """One refit's.

    Attributes:
        exhausted: everything was given to whoever iterates over `tensors`.
    """

    def __init__(
        self,
        plan: RefitPlan,
        rank: int,
        messages: Pipeline,
        src_view: Callable[[int, Region], torch.Tensor],
        deadline_s: float,
        verify: bool,
    ) -> None:
        self._plan, self._rank, self._messages, self._src_view = plan, rank, messages, src_view
        self._device, self._end = messages.device, time.monotonic() + deadline_s
        self._patience = self._end + 0.05 * deadline_s  # whoever waits for a thread hears first what that waited for
        self._receiver = Receiver(plan, rank, messages.channel, self._device, self._end, verify)
        self._room = threading.Semaphore(room(messages.num_streams))
        self._arrived: queue.SimpleQueue[_Arrived] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._traffic = Traffic()
        self._loaded_bytes = 0  # of buffers; told by the engine's thread
        self._put_bytes = self._most_bytes = 0  # in all and at once; told by the lane's
        self._delivered = 0  # buffers that a root gave to its own engine
        self._threads: list[threading.Thread] = []
        self.exhausted = False

    def start(self) -> None:
        """What this rank does of it; nothing where no tensor travels whole."""
        plan, rank = self._plan, self._rank
        gathers = rank == plan.misc_root or bool((plan.misc.src_rank == rank).any())
        tasks = [(self._gather, gathers), (self._receive, rank in plan.world.generators and rank != plan.misc_root)]
        for task, due in tasks:
            if due and plan.misc_fqns:
                thread = threading.Thread(target=self._guarded, args=(task, self._stream()), name=THREAD, daemon=True)
                self._threads.append(thread)
                thread.start()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All whole tensors in plan order, as they arrive; a tensor's memory is given up with its buffer's last one.

        Raises:
            TransferError: naming whom this rank waited for.
        """
        while (arrived := self._next()) is not None:
            yield from arrived.items()
            self._loaded_bytes += sum(tensor.nbytes for tensor in arrived.values())
            del arrived  # before the next buffer is made
            self._room.release()
        self.exhausted = True

    def finish(self) -> tuple[Traffic, Ledger]:
        """What moved, and digests of what arrived, once this rank's part is done. Raises what ended it."""
        for thread in self._threads:
            thread.join(max(self._patience - time.monotonic(), 0.0))
        if self._failure is not None:
            raise self._failure
        if any(thread.is_alive() for thread in self._threads):
            raise self._late()
        traffic, receiver = self._traffic, self._receiver
        traffic.received_bytes += receiver.received_bytes
        traffic.staging_bytes += self._most_bytes + self._messages.staging_bytes
        return traffic, receiver.ledger

    def stop(self) -> None:
        """End the threads at their next look; idempotent."""
        self._stopped.set()

    # ---- on threads of the lane

    def _guarded(self, task: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                task()
                finish(self._device, self._end)
        except Exception as error:
            self._failure = self._failure or error
            self._arrived.put(error)

    def _gather(self) -> None:
        tracker = None
        if self._rank == self._plan.misc_root:
            whole = root_layout(self._plan)
            keep = self._keep if self._rank in self._plan.world.generators else None
            sink = RootSink(self._plan, self._messages.channel, self._device, self._end, keep)
            arrivals = Arrivals(self._plan, self._plan.misc, self._rank, whole, self._device)
            tracker = Tracker(self._plan, self._plan.misc, arrivals, sink, verify=False)
        left = self._end - time.monotonic()
        self._traffic = self._messages.run(self._plan.misc, self._src_view, tracker, False, left)
        if tracker is not None:
            self._traffic.sent_bytes += sink.sent_bytes
            self._traffic.staging_bytes += sink.staging_bytes
            if keep is not None:
                self._pass_empty(len(self._plan.misc_buffers))
                self._arrived.put(None)

    def _keep(self, number: int, memory: torch.Tensor) -> None:
        """A root that generates too gives itself what it has broadcast."""
        self._pass_empty(number)
        self._deliver(self._receiver.take(self._plan.misc_buffers[number], memory))
        self._delivered = number + 1

    def _pass_empty(self, end: int) -> None:
        """Buffers before `end` that were not delivered have no bytes, and did not travel."""
        for buffer in self._plan.misc_buffers[self._delivered : end]:
            self._deliver(self._receiver.receive(buffer))

    def _receive(self) -> None:
        for buffer in self._plan.misc_buffers:
            self._make_room()
            self._put(self._receiver.receive(buffer))
        self._arrived.put(None)

    def _deliver(self, tensors: dict[str, torch.Tensor]) -> None:
        self._make_room()
        self._put(tensors)

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        self._put_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._most_bytes = max(self._most_bytes, self._put_bytes - self._loaded_bytes)
        finish(self._device, self._end)
        self._arrived.put(tensors)

    def _make_room(self) -> None:
        """Wait until the engine has loaded enough of what arrived. Raises where nobody will."""
        while not self._room.acquire(timeout=_POLL_S):
            if time.monotonic() > self._end:
                raise self._late()
            self._check()
        self._check()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise RuntimeError("the session ended")

    # ---- helpers

    def _stream(self) -> torch.cuda.Stream | None:
        """A stream whose work comes after all that the caller's stream was given."""
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    def _next(self) -> Mapping[str, torch.Tensor] | None:
        try:
            arrived = self._arrived.get(timeout=max(self._patience - time.monotonic(), 0.001))
        except queue.Empty:
            raise self._late() from None
        if isinstance(arrived, Exception):
            raise arrived
        if arrived is not None and self._device.type == "cuda":
            for tensor in arrived.values():  # the allocator must not reuse it while the caller's stream reads
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return arrived

    def _late(self) -> RefitError:
        return TransferError(
            f"whole tensors from {self._plan.world.describe(self._plan.misc_root)} were not through in time",
            rank=self._rank,
            phase="misc",
            remedy="look at the logs of the trainers; remake the session",
        )
