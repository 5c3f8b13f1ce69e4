"""The progress board between processes: what a rank says is seen by all, and who waits for a dead rank is told so."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import mmap
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import RefitError, TransferError
from nemo_rl.refit.transports.board import Board

from .forked import Forked

WORLD = World.of(1, 2)


def started(work):
    """Ranks 1 and 2 as processes that open the board and `work(board, rank)`, and this process's board of rank 0."""

    def opened(rank, store):
        control = Control(rank, WORLD, store, 10)
        control.board = Board.open(control, lanes=2)
        return control

    def run(rank, port):
        control = opened(rank, ("127.0.0.1", port))
        return work(control.board, rank)

    ranks = Forked((1, 2), run)
    ranks.control = opened(0, ranks.store)
    return ranks, ranks.control.board


def soon(seconds=10):
    return time.monotonic() + seconds


def test_what_each_process_says_is_seen_by_all():
    """A token goes round: 0 -> 1 -> 2 -> 0, in a lane of its own; the other lane stays."""

    def pass_on(board, rank):
        for turn in range(1, 200):
            board.wait({rank - 1: turn}, "transfer", soon(), lane=1)
            board.post(turn, lane=1)
        assert [board.seen(r) for r in range(3)] == [0, 0, 0]

    ranks, board = started(pass_on)
    for turn in range(1, 200):
        board.post(turn, lane=1)
        board.wait({2: turn}, "transfer", soon(), lane=1)
        assert board.seen(1, lane=1) == turn
    assert ranks.codes() == {1: 0, 2: 0}
    board.wait({1: 199, 2: 199}, "transfer", soon(0), lane=1)
    with pytest.raises(ValueError, match="rank 0 posts 3 in lane 1 after 199"):
        board.post(3, lane=1)
    board.close()
    board.close()


def test_letters_reach_whom_they_are_for():
    """Each rank writes to each other one, letters of other lengths each time; who got none finds none."""

    def letters(rank, turn):
        return {r: bytes([turn, rank, r]) * (turn * r % 5) for r in range(3) if (turn + r) % 3}

    def write(board, rank):
        control = board._control
        control.make_room("agree", 40 + rank)
        for turn in range(1, 60):
            control.post(turn, letters(rank, turn))
            assert control.collect(turn, "verify", range(3)) == {
                r: letters(r, turn).get(rank, b"") for r in range(3)
            } and control.posted(turn, range(3))
            assert not control.posted(turn + 1, [rank])
            control.meet("commit")

    ranks, board = started(write)
    write(board, 0)
    assert ranks.codes() == {1: 0, 2: 0} and board.room == 48
    with pytest.raises(ValueError, match="rank 0 has letters of 50 bytes, and there is room for 48"):
        board.write(60, {1: b"x" * 25, 2: b"x" * 25})
    board.close()


def test_who_waits_for_a_letter_of_a_dead_process_is_told():
    def die(board, rank):
        board._control.make_room("agree", 8)
        if rank == 2:
            board.write(1, {})
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(TransferError, match=r"the process ended of generator 1 \(rank 2\), which said 1 of 2"):
            board._control.collect(2, "verify", [2])

    ranks, board = started(die)
    board._control.make_room("agree", 8)
    assert board._control.collect(1, "verify", [2]) == {2: b""}
    with pytest.raises(TransferError, match=r"the process ended of generator 1 \(rank 2\), which said 1 of 2"):
        board._control.await_posts(2, "verify", [2])
    assert ranks.codes() == {1: 0, 2: -signal.SIGKILL}
    board.close()


def test_ranks_meet_without_the_store_and_a_dead_one_is_named():
    """Nobody leaves a meeting before all came; in the last one rank 2 is dead."""

    def meet(board, rank):
        for turn in range(1, 50):
            assert min(board.seen(r) for r in range(3)) >= turn - 1, "left the last meeting early"
            board.post(turn)
            board._control.meet("begin")
            assert min(board.seen(r) for r in range(3)) >= turn
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(TransferError, match=r"the process ended of generator 1 \(rank 2\), which said 49 of 50"):
            board._control.meet("commit")

    ranks, board = started(meet)
    before = board._control._sequence
    for turn in range(1, 50):
        board.post(turn)
        board._control.meet("begin")
        assert min(board.seen(r) for r in range(3)) >= turn
    with pytest.raises(TransferError, match="which said 49 of 50"):
        board._control.meet("commit")
    assert board._control._sequence == before and ranks.codes() == {1: 0, 2: -signal.SIGKILL}
    board.close()


def test_an_exchange_with_a_dead_process_ends_long_before_the_deadline():
    ranks, board = started(lambda board, rank: time.sleep(30))
    control = board._control
    board.check_alive((0, 1, 2), "transfer")
    os.kill(ranks.pids[2], signal.SIGKILL)
    before = time.monotonic()
    with pytest.raises(TransferError, match=r"the process ended of generator 1 \(rank 2\)\."):
        control.exchange("transfer", {}, (1, 2), lambda: board.check_alive((1, 2), "transfer"))
    assert time.monotonic() - before < 3
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.codes() == {1: -signal.SIGKILL, 2: -signal.SIGKILL}
    board.close()


def test_who_waits_for_a_dead_process_is_told_long_before_the_deadline():
    def say_and_hang(board, rank):
        board.post(rank)
        time.sleep(60)

    (ranks, board), begun = started(say_and_hang), time.monotonic()
    board.wait({1: 1, 2: 2}, "transfer", soon())
    for pid in ranks.pids.values():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(TransferError, match=r"process ended of generator 0 \(rank 1\), which said 1 of 7") as caught:
        board.wait({1: 7, 2: 2}, "transfer", soon())
    assert caught.value.phase == "transfer" and time.monotonic() - begun < 5
    assert ranks.codes() == {1: -signal.SIGKILL, 2: -signal.SIGKILL}
    with pytest.raises(TransferError, match=r"ended of generator 1 \(rank 2\), which said 2 of 3"):
        board.wait({2: 3}, "transfer", soon())
    board.wait({1: 1, 2: 2}, "transfer", soon(0))


def test_waits_end_at_the_deadline_and_at_an_abort():
    ranks, board = started(lambda b, rank: b.wait({0: 1}, "transfer", soon()))
    with pytest.raises(TransferError, match=r"until the deadline for generator 1 \(rank 2\), which said 0 of 1"):
        board.wait({2: 1}, "transfer", soon(0.1))
    board._control.abort(TransferError("no link", rank=1, phase="transfer", remedy="none"))
    with pytest.raises(RefitError, match=r"generator 0 \(rank 1\) failed in phase 'transfer': no link"):
        board.wait({2: 1}, "transfer", soon())
    assert ranks.codes() == {1: 1, 2: 1}, "an abort ends the waits of all"


def refused(monkeypatch, name, value, text):
    """No rank of two gets a board, and each is told why."""
    store = dist.HashStore()
    members = [Control(rank, World.of(1, 1), store, 2) for rank in range(2)]
    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(name, value)
        for result in [pool.submit(Board.open, member) for member in members]:
            with pytest.raises(OSError, match=text):
                result.result()


def test_ranks_that_cannot_share_memory_have_no_board(monkeypatch):
    def closed(*_):
        raise PermissionError("not yours")

    first = r"trainer 0 \(rank 0\): "
    refused(monkeypatch, "os.open", closed, first + "the board of process [0-9]+ cannot be opened: not yours")
    opened = os.open
    refused(monkeypatch, "os.open", lambda *_: opened("/dev/zero", os.O_RDWR), first + ".* has another file here")
    seen = iter((5, 5, None, 6, None, 6))  # each rank's own, then what it finds
    refused(monkeypatch, "nemo_rl.refit.transports.shared_file.born", lambda _: next(seen), "no common process ids")
    refused(monkeypatch, "platform.machine", lambda: "aarch64", first + "on aarch64, ranks may see")


def test_one_rank_that_cannot_is_named_to_all():
    """The others, which could, have no board either."""

    def blind(rank, port):
        if rank == 2:
            os.open = lambda *_: (_ for _ in ()).throw(PermissionError("not yours"))
        with pytest.raises(OSError, match=r"generator 1 \(rank 2\): the board of process .* not yours"):
            Board.open(Control(rank, WORLD, ("127.0.0.1", port), 10))

    ranks = Forked((1, 2), blind)
    with pytest.raises(OSError, match=r"generator 1 \(rank 2\): the board of process"):
        Board.open(Control(0, WORLD, ranks.store, 10))
    assert ranks.codes() == {1: 0, 2: 0}


@contextlib.contextmanager
def nothing_left():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["os.memfd_create", "os.ftruncate"])
def test_a_board_that_cannot_be_made_is_named_to_all(name, monkeypatch):
    def full(*_):
        raise OSError(28, "no space")

    with nothing_left():
        refused(monkeypatch, name, full, r"trainer 0 \(rank 0\): no board .*can be made: .* no space")


def test_a_board_that_one_rank_cannot_map_is_named_to_all(monkeypatch):
    maps, made = mmap.mmap, itertools.count()

    def second_fails(*given):
        if next(made):
            raise OSError(12, "no memory")
        return maps(*given)

    with nothing_left():
        refused(monkeypatch, "mmap.mmap", second_fails, r"\(rank [01]\): the board cannot be mapped: .* no memory")


def test_the_first_of_many_answers_is_everyones():
    """Three processes answer at once, again and again; whoever is first, all get its answer."""

    def answers(board, rank):
        got = []
        for turn in range(300):
            board.meet("commit")
            if rank == 0 and turn < 5:  # who is alone on a busy host would always be the first
                time.sleep(0.02)
            got.append(board.decide(turn + 1, f"{turn} as rank {rank} wants", "commit"))
        digest = int.from_bytes(hashlib.sha256("".join(got).encode()).digest()[:7], "little")
        assert {word for (word,) in board.meet("commit", (digest,))} == {digest}
        return got

    def child(board, rank):
        answers(board, rank)

    ranks, board = started(child)
    got = answers(board, 0)
    assert ranks.codes() == {1: 0, 2: 0}
    assert all(text in {f"{turn} as rank {rank} wants" for rank in range(3)} for turn, text in enumerate(got))
    assert len({text.split()[3] for text in got}) > 1, "ranks really contend"


@pytest.mark.parametrize("wrote", [False, True])
def test_a_process_killed_while_it_decides_holds_up_nobody(wrote):
    """Before it decided, and with half of its answer written: the next one's counts."""

    def die(board, rank):
        assert board.decide(1, "yes", "commit") == "yes"
        board.meet("committed")
        if rank == 2:
            with board._locked() as locked:
                assert locked
                if wrote:
                    start = 8 * (3 * board._width + 3)
                    board._map[start : start + 4] = b"half"
                    board._words[3 * board._width + 1] = 4
                board.post(1)
                time.sleep(30)
        board.wait({0: 1}, "commit", soon())
        assert board.decide(2, "no", "commit") == "no: it died"

    ranks, board = started(die)
    assert board.decide(1, "yes", "commit") == "yes"
    board.meet("committed")
    board.wait({2: 1}, "commit", soon())
    board._control.deadline_s = 0.05
    with pytest.raises(TransferError, match="another rank was about to decide for 0.05 s"):
        board.decide(2, "no", "commit")
    os.kill(ranks.pids[2], signal.SIGKILL)
    board._control.deadline_s = 10
    assert board.decide(2, "no: it died", "commit") == "no: it died"
    board.post(1)
    assert ranks.codes() == {1: 0, 2: -signal.SIGKILL}


def test_ranks_that_give_up_and_ranks_that_do_not_come_to_one_end():
    """Meetings that last about as long as the deadline, so that some see all come and others give up."""

    def settle(board, rank):
        control, ends = board._control, []
        for turn in range(120):
            control.deadline_s = 10
            control.meet("begin")
            control.deadline_s = 2e-3
            if rank == turn % 3:
                time.sleep(random.uniform(1e-3, 3e-3))
            try:
                control.settle("commit", str(turn))
                ends.append(1)
            except TransferError:
                ends.append(0)
        control.deadline_s = 10
        control.meet("end")
        word = int("".join(map(str, ends[:60])), 2), int("".join(map(str, ends[60:])), 2)
        assert set(control.meet("end", word)) == {word}
        return ends

    def child(board, rank):
        random.seed(rank)
        settle(board, rank)

    ranks, board = started(child)
    ends = settle(board, 0)
    assert ranks.codes() == {1: 0, 2: 0}
    assert 0 < sum(ends) < len(ends), "some were agreed on and some were not"


def test_counters_start_again_when_all_have_come():
    def count(board, rank):
        for _ in range(20):
            board.post(rank, lane=1)
            board.wait({1: 1, 2: 2}, "transfer", soon(), lane=1)
            board.restart("agree")
            assert board.seen(rank, lane=1) == 0

    ranks, board = started(count)
    count(board, 0)
    assert ranks.codes() == {1: 0, 2: 0}


def test_threads_of_one_process_have_boards_too():
    store = dist.HashStore()
    members = [Control(rank, World.of(1, 1), store, 5) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(Board.open, members)
    one.post(4)
    assert two.seen(0) == 4 and two.seen(1) == 0
