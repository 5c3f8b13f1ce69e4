"""From pieces to messages in rounds: waves that bound staging, buckets that bound messages, rounds that pair ranks."""

from __future__ import annotations

import hashlib

import numpy as np

from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.join import Join, Pieces, Takers
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.rounds import Timetable

_CHUNK = 1 << 20  # pieces that are scheduled at a time


def timetable(held: Boxes, trainers: np.ndarray, takers: Takers, item: np.ndarray, bucket_bytes: int) -> Timetable:
    """Rounds of all messages from `trainers` to `takers`; needs what everyone holds and takes, but no join.

    Waves: a destination takes them one after the other, and a landing unit lies in one wave, which bounds open staging.
    Tensors that share a unit on any rank share a wave. Consecutive waves of a stage merge up to a bucket per
    destination; where no destination has units, a stage is one wave.
    """
    taken = takers.boxes
    units = bool((taken.unit >= 0).any())
    root = _together(taken, len(item)) if units else np.arange(len(item))
    used = np.zeros(len(item), bool)
    used[taken.tensor] = True
    rows = np.flatnonzero(used[held.tensor])
    src_stage, tensor_stage = _stages(
        root[held.tensor[rows]], np.searchsorted(trainers, held.rank[rows]), item, trainers
    )
    wave, largest = _waves(taken, item, root, tensor_stage[root], bucket_bytes if units else None)
    num_messages = most_messages(largest, item, bucket_bytes)
    return Timetable.of(trainers, takers.ranks, src_stage, tensor_stage[root], wave, num_messages)


def most_messages(num_bytes: int, item: np.ndarray, bucket_bytes: int) -> int:
    """Of one pair that sends `num_bytes`: two messages that follow each other fill a bucket, or differ in item size."""
    return 2 * num_bytes // bucket_bytes + len(np.unique(item)) + 1


def _stages(
    tensor: np.ndarray, src: np.ndarray, item: np.ndarray, trainers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stage of every trainer and of every tensor, where trainer src[i] holds tensor[i].

    Trainers that hold a tensor in common are of one stage: pipeline stages, each with its own tensors.
    """
    label = np.arange(len(trainers))
    of_tensor = np.full(len(item), len(trainers))
    while True:
        np.minimum.at(of_tensor, tensor, label[src])
        before = label.copy()
        np.minimum.at(label, src, of_tensor[tensor])
        if (label == before).all():
            break
    stages = np.unique(label[src])
    number = np.zeros(len(trainers) + 1, np.int64)
    number[stages] = np.arange(len(stages))
    return number[label], number[of_tensor]


def _waves(
    taken: Boxes, item: np.ndarray, root: np.ndarray, stage: np.ndarray, limit: int | None
) -> tuple[np.ndarray, int]:
    """(tensor -> wave of its stage, most bytes that a destination takes in a wave). Without limit, one wave a stage."""
    num_kinds = int(taken.rank.max(initial=-1)) + 1
    if not num_kinds:
        return np.zeros(len(item), np.int64), 0
    num_bytes = taken.sizes.prod(axis=1) * item[taken.tensor]
    load = np.bincount(root[taken.tensor] * num_kinds + taken.rank, num_bytes, len(item) * num_kinds)
    roots = np.unique(root)
    roots = roots[np.argsort(stage[roots], kind="stable")]
    load = np.unique(load.astype(np.int64).reshape(-1, num_kinds)[roots], axis=1)
    ends = np.concatenate([np.zeros((1, load.shape[1]), np.int64), np.cumsum(load, axis=0)])
    stage_ends = np.searchsorted(stage[roots], stage[roots], "right")
    starts, largest = [0], 0
    while starts[-1] < len(roots):
        at = starts[-1]
        stop = int(stage_ends[at])
        if limit is not None:
            fits = min(int(np.searchsorted(e, e[at] + limit, "right")) - 1 for e in ends.T)
            stop = min(stop, max(at + 1, fits))
        starts.append(stop)
        largest = max(largest, int((ends[stop] - ends[at]).max()))
    wave = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    wave -= wave[np.searchsorted(stage[roots], stage[roots])]
    of_tensor = np.zeros(len(item), np.int64)
    of_tensor[roots] = wave
    return of_tensor[root], largest


def _together(taken: Boxes, num_tensors: int) -> np.ndarray:
    """tensor -> first of the tensors that it must share a wave with."""
    rows = _unlike(taken)
    rows = rows[taken.unit[rows] >= 0]
    width = int(taken.unit.max()) + 1
    pair = np.unique((taken.rank[rows] * width + taken.unit[rows]) * num_tensors + taken.tensor[rows])
    unit, tensor = pair // num_tensors, pair % num_tensors
    first = np.flatnonzero(np.concatenate([[True], unit[1:] != unit[:-1]]))
    root = np.arange(num_tensors)
    while True:
        least = np.minimum.reduceat(root[tensor], first)
        grown = root.copy()
        np.minimum.at(grown, tensor, np.repeat(least, np.diff(np.append(first, len(pair)))))
        if (grown == root).all():
            return root
        root = grown


def _unlike(taken: Boxes) -> np.ndarray:
    """Rows without those of kinds whose tensors and units are those of another kind (the ranks of one engine)."""
    first = np.flatnonzero(np.concatenate([[True], taken.rank[1:] != taken.rank[:-1]]))
    seen: dict[bytes, np.ndarray] = {}
    for rows in np.split(np.arange(len(taken)), first[1:]):
        key = hashlib.sha256(taken.tensor[rows].tobytes() + taken.unit[rows].tobytes()).digest()
        seen.setdefault(key, rows)
    return np.concatenate(list(seen.values()))


def schedule(join: Join, times: Timetable, item: np.ndarray, bucket_bytes: int) -> CopyTable:
    """All copies of `join` in messages; ordered by destination, wave and sender, messages by round."""
    ends = np.cumsum(join.count())
    tables, start = [], 0
    while start < len(ends):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, "right")))
        tables.append(pack(join.pieces(np.arange(start, stop)), times, item, bucket_bytes))
        start = stop
    return _in_order(CopyTable.stack(tables, join.offsets.shape[1]))


def pack(pieces: Pieces, times: Timetable, item: np.ndarray, bucket_bytes: int) -> CopyTable:
    """Pieces of any destinations and senders in messages: each is of one wave, one pair and one item size."""
    src, step, size = np.searchsorted(times.src, pieces.src_rank), times.step[pieces.tensor], item[pieces.tensor]
    pair = (pieces.dst * (int(times.step.max(initial=0)) + 1) + step) * len(times.src) + src
    key = pair * (int(item.max(initial=0)) + 1) + size
    order = np.argsort(key, kind="stable")
    pieces, key, pair = pieces.take(order), key[order], pair[order]
    num_bytes = pieces.sizes.prod(axis=1) * item[pieces.tensor]
    lo, total = _message_starts(key, num_bytes, bucket_bytes)
    hi = np.append(lo, len(key))[1:]
    new = np.concatenate([[True], pair[lo][1:] != pair[lo][:-1]])[: len(lo)]
    number = np.arange(len(lo)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    filled = total[hi] - total[lo]
    rounds = times.rounds(src[order][lo], pieces.dst[lo], step[order][lo], number, filled)
    dst_rank = times.dst[pieces.dst]
    messages = [rounds, pieces.src_rank[lo], dst_rank[lo], lo, hi, filled]
    table = CopyTable(
        tensor=pieces.tensor.astype(np.int32),
        offsets=pieces.offsets,
        sizes=pieces.sizes,
        src_rank=pieces.src_rank.astype(np.int32),
        src_row=pieces.src_row.astype(np.int32),
        dst_rank=dst_rank.astype(np.int32),
        dst_row=pieces.dst_row.astype(np.int32),
        messages=np.stack(messages, axis=1),
    )
    return _in_order(table)


def _in_order(table: CopyTable) -> CopyTable:
    """Messages by round, then by their first copy."""
    m = table.messages
    return table.with_messages(m[np.lexsort((m[:, 3], m[:, 0]))])


def _message_starts(key: np.ndarray, num_bytes: np.ndarray, bucket_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """First piece of each message, and the bytes before each piece. Runs of one key are filled up to a bucket."""
    total = np.concatenate([[0], np.cumsum(num_bytes)])
    start = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    end = np.append(start, len(key))[1:]
    found = [start]
    while len(start):
        start = np.searchsorted(total, total[start] + bucket_bytes, "right") - 1
        start, end = start[start < end], end[start < end]
        found.append(start)
    return np.sort(np.concatenate(found)), total
