"""From pieces to messages in rounds: waves that bound staging, buckets that bound messages, rounds that pair ranks."""

from __future__ import annotations

import numpy as np

from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.join import Pieces
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.rounds import color_edges


def waves(taken: Boxes, item: np.ndarray, bucket_bytes: int) -> np.ndarray:
    """tensor -> wave. Waves run one after the other; a landing unit lies in one wave, which bounds open staging.

    Tensors that share a unit on any rank share a wave. Consecutive waves merge up to a bucket per destination.
    Where no destination has units there is one wave.
    """
    if not len(taken) or (taken.unit < 0).all():
        return np.zeros(len(item), np.int64)
    parent = np.arange(len(item))

    def find(t: int) -> int:
        while parent[t] != t:
            parent[t] = parent[parent[t]]
            t = int(parent[t])
        return t

    rows = np.unique(np.column_stack([taken.rank, taken.unit, taken.tensor])[taken.unit >= 0], axis=0)
    same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    for a, b in zip(rows[:-1][same, 2], rows[1:][same, 2], strict=True):
        low, high = sorted((find(int(a)), find(int(b))))
        parent[high] = low
    root = np.array([find(t) for t in range(len(item))])
    ranks, rank_index = np.unique(taken.rank, return_inverse=True)
    load = np.zeros((len(item), len(ranks)))
    np.add.at(load, (root[taken.tensor], rank_index.reshape(-1)), taken.sizes.prod(axis=1) * item[taken.tensor])
    wave = np.zeros(len(item), np.int64)
    current, filled = 0, np.zeros(len(ranks))
    for t in range(len(item)):
        if root[t] != t:
            continue
        if filled.any() and (filled + load[t]).max() > bucket_bytes:
            current, filled = current + 1, np.zeros(len(ranks))
        wave[t], filled = current, filled + load[t]
    return np.take(wave, root)


def _split(pieces: Pieces, item: np.ndarray, bucket_bytes: int) -> Pieces:
    """Cut pieces larger than a bucket along their outermost axes."""
    large = pieces.num_bytes(item) > bucket_bytes
    if not large.any():
        return pieces
    source = [np.flatnonzero(~large)]
    offsets, sizes = [pieces.offsets[~large]], [pieces.sizes[~large]]
    for i in np.flatnonzero(large):
        parts = _split_box(pieces.offsets[i], pieces.sizes[i], max(1, bucket_bytes // int(item[pieces.tensor[i]])))
        source.append(np.full(len(parts), i))
        offsets.append(np.stack([p[0] for p in parts]))
        sizes.append(np.stack([p[1] for p in parts]))
    out = pieces.take(np.concatenate(source))
    return Pieces(
        out.tensor,
        np.concatenate(offsets),
        np.concatenate(sizes),
        *(out.src_rank, out.src_row, out.dst_rank, out.dst_row),
    )


def _split_box(offsets: np.ndarray, sizes: np.ndarray, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes of at most `limit` elements that tile the given one, cut along the first axis that is long enough."""
    if sizes.prod() <= limit:
        return [(offsets, sizes)]
    axis = int(np.flatnonzero(sizes > 1)[0])
    inner = int(sizes.prod() // sizes[axis])
    step = max(1, limit // inner)
    parts = []
    for start in range(0, int(sizes[axis]), step):
        low, size = offsets.copy(), sizes.copy()
        low[axis] += start
        size[axis] = min(step, int(sizes[axis]) - start)
        parts += _split_box(low, size, limit)
    return parts


def schedule(pieces: Pieces, item: np.ndarray, wave_of: np.ndarray, bucket_bytes: int) -> CopyTable:
    """Pack pieces into messages and pair ranks in rounds, wave by wave."""
    pieces = _split(pieces, item, bucket_bytes)
    wave, size = wave_of[pieces.tensor], item[pieces.tensor]
    keys = (pieces.offsets.T[::-1] if pieces.offsets.shape[1] else np.zeros((1, len(wave)))).tolist()
    order = np.lexsort((*keys, pieces.dst_row, pieces.tensor, size, pieces.dst_rank, pieces.src_rank, wave))
    pieces, wave, size = pieces.take(order), wave[order], size[order]
    lo, hi = _message_bounds(pieces, wave, size, pieces.num_bytes(item), bucket_bytes)
    rounds = _rounds(pieces.src_rank[lo], pieces.dst_rank[lo], wave[lo])
    nbytes = np.add.reduceat(pieces.num_bytes(item), lo) if len(lo) else np.zeros(0, np.int64)
    columns = [rounds, pieces.src_rank[lo], pieces.dst_rank[lo], lo, hi, nbytes]
    messages = np.stack(columns, axis=1).astype(np.int64) if len(lo) else np.zeros((0, 6), np.int64)
    messages = messages[np.lexsort((messages[:, 3], messages[:, 0]))]
    return CopyTable(**{f: getattr(pieces, f) for f in Pieces.__dataclass_fields__}, messages=messages)


def _message_bounds(
    pieces: Pieces, wave: np.ndarray, size: np.ndarray, nbytes: np.ndarray, bucket_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs `[lo, hi)` of pieces with the same wave, pair and item size, each of at most a bucket."""
    if not len(wave):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key = np.column_stack([wave, pieces.src_rank, pieces.dst_rank, size])
    breaks = np.concatenate([[True], (key[1:] != key[:-1]).any(axis=1)])
    lo, filled = [], 0
    for i, (new, n) in enumerate(zip(breaks.tolist(), nbytes.tolist(), strict=True)):
        if new or filled + n > bucket_bytes:
            lo.append(i)
            filled = 0
        filled += n
    starts = np.array(lo, np.int64)
    return starts, np.concatenate([starts[1:], [len(wave)]])


def _rounds(src: np.ndarray, dst: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Round of each message: waves in order, inside a wave as few rounds as the busiest rank needs."""
    rounds = np.zeros(len(src), np.int64)
    base = 0
    for w in np.unique(wave):
        rows = np.flatnonzero(wave == w)
        colors = color_edges(src[rows], dst[rows])
        rounds[rows] = base + colors
        base += int(colors.max()) + 1
    return rounds
