"""Small facts between ranks: gathers with deadlines and one abort flag through a TCPStore that the driver hosts.

Ranks of one host meet and decide on a board in memory that they share, where they have one; it takes microseconds.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.errors import RefitError, StoreLost, TransferError, named_error
from nemo_rl.refit.store import Client, reach

if TYPE_CHECKING:
    from nemo_rl.refit.transports.board import Board

log = logging.getLogger(__name__)

_ABORT = "abort"
_LEAST_PAUSE_S, _MOST_PAUSE_S = 5e-5, 5e-3
_PAUSE_SHARE = 1 / 32  # of what was waited
_ABORT_S = 5e-3  # between two looks for reports of failures

Address: TypeAlias = "tuple[str, int] | dist.Store"


class Control:
    """The control plane of one session, as one rank sees it.

    Args:
        rank, world: who this is.
        store: (host, port) of the driver's TCPStore, or a store in hand.
        deadline_s: longest wait for any rank in any gather.

    Attributes:
        store, asked: the store, for those who connect through it, and as this rank asks it.
        board: where ranks of one host meet; None where they meet at the store. All ranks set it at the same point.

    Raises:
        TransferError: the store cannot be reached.
    """

    def __init__(self, rank: int, world: World, store: Address, deadline_s: float) -> None:
        self.rank, self.world, self.deadline_s = rank, world, deadline_s
        self.store = store if isinstance(store, dist.Store) else self._reach(*store)
        self.asked = Client(self.store, deadline_s)
        self.rest()
        self._sequence = self._questions = 0
        self._written: list[str] = []  # what all will have read when they come to the next gather or meeting
        self._kept: dict[int, list[str]] = {}  # what exchanges that go on have posted
        self.board: Board | None = None

    def rest(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """From now on, do `meanwhile`, which waits for nobody, while this rank waits elsewhere than at a meeting."""
        self._meanwhile = meanwhile

    def idle(self) -> None:
        """For who waits without a gather: what is to be done meanwhile."""
        self._meanwhile()

    def _reach(self, host: str, port: int) -> dist.TCPStore:
        try:
            return reach(host, port, self.deadline_s)
        except Exception as error:
            raise TransferError(
                f"the store at {host}:{port} did not answer within {self.deadline_s:g} s ({error})",
                rank=self.rank,
                phase="connect",
                remedy="start the driver's TCPStore first and check that this host reaches it",
            ) from error

    def enter(self) -> None:
        """First of all, once: what an earlier session left in the store would be taken for what this one's ranks say.

        Raises:
            TransferError: a session was in this store as this rank before.
        """
        if self.asked.add(f"entered/{self.rank}", 1) > 1:
            raise TransferError(
                f"{self.world.describe(self.rank)} entered this store before, in this process or another",
                rank=self.rank,
                phase="connect",
                remedy="give every session a store of its own (or a PrefixStore), and every process a rank of its own",
            )

    def gather(self, phase: str, payload: bytes, ranks: Iterable[int] | None = None) -> dict[int, bytes]:
        """Publish `payload` and wait for the payloads of `ranks` (default: all). Every rank calls in the same order.

        Raises:
            TransferError: ranks that did not publish within the deadline, by name.
            RefitError: another rank reported a failure; its text.
        """
        number = self.ticket()
        self.asked.set(key := f"{number}/{self.rank}/", payload)
        self._written.append(key)
        wanted = range(self.world.size) if ranks is None else sorted(ranks)
        said = self._await({r: f"{number}/{r}/" for r in wanted}, phase)
        if ranks is None:
            self._forget(len(self._written) - 1)
        return said

    def meet(
        self, phase: str, words: Sequence[int] = (), meanwhile: Callable[[], None] = lambda: None
    ) -> list[tuple[int, ...]]:
        """All ranks come here, each with as many words (signed, 64 bits): what each brought, by rank.

        A board has room for `MOST_WORDS` of them. `meanwhile` is called once: where there is a board, others know by
        then that this rank came. Raises as `gather`, also where all came but this rank heard of it too late, because
        its process was stopped: others may have given up on it.
        """
        started = time.monotonic()
        if self.board is not None:
            told = self.board.meet(phase, words, meanwhile)
        else:
            meanwhile()
            packed = struct.Struct(f"{len(words)}q")
            said = self.gather(phase, packed.pack(*words))
            told = [packed.unpack(said[rank]) for rank in range(self.world.size)]
        if (took := time.monotonic() - started) > self.deadline_s:
            raise TransferError(
                f"all ranks came, but a meeting took {took:.1f} s on this one: others may have given up on it at "
                f"{self.deadline_s:g} s",
                rank=self.rank,
                phase=phase,
                remedy="see why its process stood still; remake the session",
            )
        return told

    def exchange(
        self,
        phase: str,
        outgoing: Mapping[int, bytes],
        ranks: Iterable[int],
        look: Callable[[], None] = lambda: None,
        deadline_s: float | None = None,
    ) -> dict[int, bytes]:
        """Give each rank of `outgoing` a payload of its own, and wait for those that `ranks` have for this one.

        Every rank calls in the same order. Raises as `gather`.

        Args:
            look: called now and then by who waits; what it raises ends the wait.
            deadline_s: longest wait, where others wait for what this rank makes of what it hears.
        """
        ticket = self.ticket()
        self._post(ticket, {str(reader): payload for reader, payload in outgoing.items()})
        said = self._await({r: f"{ticket}/{r}/{self.rank}" for r in sorted(ranks)}, phase, look, deadline_s)
        self.end(ticket)
        return said

    def ticket(self) -> int:
        """The number of an exchange whose parts come later; every rank calls in the same order, and `end` in the end.

        Before a rank enters the next gather from all ranks behind its `end`, it has collected all it wants.
        """
        self._sequence += 1
        return self._sequence

    def make_room(self, phase: str, num_bytes: int) -> None:
        """All ranks come here before they `post`, each with the most bytes that it will give others under one ticket.

        Raises as `gather`.
        """
        if self.board is not None:
            self.board.make_room(phase, num_bytes)

    def post(self, ticket: int, outgoing: Mapping[int, bytes]) -> None:
        """Give each rank of `outgoing` a payload of its own, and all ranks to know that this one has posted.

        Where ranks have a board, a payload stays until this rank posts again: no earlier than behind the next meeting.
        """
        if self.board is not None:
            self.board.write(ticket, outgoing)
        else:
            self._post(ticket, {**{str(reader): payload for reader, payload in outgoing.items()}, "": b""})

    def _post(self, ticket: int, payloads: Mapping[str, bytes]) -> None:
        for reader, payload in payloads.items():
            self.asked.set(key := f"{ticket}/{self.rank}/{reader}", payload)
            self._kept.setdefault(ticket, []).append(key)

    def posted(self, ticket: int, ranks: Iterable[int]) -> bool:
        """Whether all of `ranks` have posted, without waiting."""
        if self.board is not None:
            return all(self.board.seen(r, self.board.written) >= ticket for r in ranks)
        return self.asked.check([f"{ticket}/{r}/" for r in ranks])

    def await_posts(self, ticket: int, phase: str, ranks: Iterable[int]) -> None:
        """Wait until all of `ranks` have posted. Raises as `gather`."""
        if (board := self.board) is not None:
            end = time.monotonic() + self.deadline_s
            board.wait(dict.fromkeys(ranks, ticket), phase, end, board.written, self.idle)
        else:
            self._await({r: f"{ticket}/{r}/" for r in ranks}, phase)

    def collect(self, ticket: int, phase: str, ranks: Iterable[int]) -> dict[int, bytes]:
        """Wait for what `ranks` have for this rank. Raises as `gather`."""
        wanted = sorted(ranks)
        if self.board is not None:
            self.await_posts(ticket, phase, wanted)
            return {r: self.board.letter(r) for r in wanted}
        return self._await({r: f"{ticket}/{r}/{self.rank}" for r in wanted}, phase)

    def end(self, ticket: int) -> None:
        """What this rank posted may be deleted when all ranks have come to the next gather or meeting."""
        self._written += self._kept.pop(ticket, [])

    def read(self, keys: Sequence[str]) -> list[bytes]:
        """Values of keys that are set, in one round trip."""
        return self.asked.multi_get(keys)

    def _await(
        self,
        keys: Mapping[int, str],
        phase: str,
        look: Callable[[], None] = lambda: None,
        deadline_s: float | None = None,
    ) -> dict[int, bytes]:
        """Values of `keys`, with pauses that grow with the time waited, so that little of it is lost to them."""
        started, names, looked = time.monotonic(), list(keys.values()), 0.0
        longest_s = self.deadline_s if deadline_s is None else deadline_s
        while not self.asked.check(names):
            waited = time.monotonic() - started
            if waited > looked + _ABORT_S:
                looked = waited
                if self.asked.check([_ABORT]) and not self.asked.check(names):  # what is complete counts
                    self.raise_if_aborted(phase)
                look()
            if waited > longest_s:
                self._give_up(phase, longest_s, [r for r, key in keys.items() if not self.asked.check([key])])
            self.idle()
            time.sleep(min(max(_LEAST_PAUSE_S, waited * _PAUSE_SHARE), _MOST_PAUSE_S))
        return dict(zip(keys, self.read(names), strict=True))

    def settle(self, phase: str, question: str) -> None:
        """All ranks come here, or none passes: the first rank that is sure answers for all.

        Raises:
            TransferError, RefitError: as `gather`, or another rank gave up on some rank.
        """
        self._questions += 1
        meeting = 0 if self.board is None else self.board.meetings + 1
        failure: RefitError | None = None
        try:
            self.meet(phase)
            if self.board is not None and self.board.undisputed(self._questions):
                return
        except RefitError as error:
            failure = error
        except StoreLost as error:
            failure = named_error(error, self.rank, phase)
        # A rank that gave up may be a moment late or early: the first answer binds all.
        answer = "yes" if failure is None else f"no: {failure.detail}"
        if self.board is not None:
            if failure is not None and self.board.dispute(self._questions, meeting):
                answer = "yes"
            decision = self.board.decide(self._questions, answer, phase)
        else:
            decision = self._decide(f"{phase} {question}", answer)
        if decision != "yes":
            raise failure or TransferError(
                f"another rank decided against it ({decision})",
                rank=self.rank,
                phase=phase,
                remedy="see that rank's error; remake the session",
            )

    def _decide(self, question: str, answer: str) -> str:
        """The answer that the first rank gave to `question`; every rank gets the same, whatever it wanted itself.

        Questions differ; the answer is kept until every rank has called a gather after it.
        """
        key = f"decision/{question}"
        if self.rank == 0:
            self._written.append(key)
        return self.asked.compare_set(key, "", answer).decode()

    def close(self) -> None:
        """Give up the board; idempotent. The store is the driver's."""
        if self.board is not None:
            self.board.close()

    def abort(self, error: RefitError) -> None:
        """Tell all ranks that this session failed; the first report stays."""
        text = f"{self.world.describe(error.rank)} failed in phase '{error.phase}': {error.detail}"
        try:
            self.asked.compare_set(_ABORT, "", text)
        except RuntimeError:
            return  # the store is gone and with it whoever could read the report

    def raise_if_aborted(self, phase: str) -> None:
        """Raises RefitError with the first failure that a rank reported."""
        if self.asked.check([_ABORT]):
            raise RefitError(
                self.asked.get(_ABORT).decode(),
                rank=self.rank,
                phase=phase,
                remedy="see that rank's error; remake the session",
            )

    def tidy(self) -> None:
        """Right behind a meeting, when there is time: delete what this rank wrote. Gathers do so themselves."""
        if self.board is None:
            return
        try:
            self._forget(len(self._written))
        except RuntimeError as error:  # what ranks decided stands; whoever asks the store next is told
            log.warning("the store keeps what rank %d wrote: %s", self.rank, error)

    def _forget(self, count: int) -> None:
        """All ranks came here, so they have read what they wanted of the first `count` keys that this one wrote."""
        for key in self._written[:count]:
            self.asked.delete_key(key)
        self._written = self._written[count:]

    def _give_up(self, phase: str, waited_s: float, missing: list[int]) -> None:
        names = ", ".join(self.world.describe(r) for r in missing)
        raise TransferError(
            f"waited {waited_s:g} s for {names}",
            rank=self.rank,
            phase=phase,
            remedy="look at those ranks' logs: they died, hang, or never called this refit",
        )
