"""The plan of a refit: immutable, comparable by digest, provable, and independent of models and transports."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from nemo_rl.refit.base import World
from nemo_rl.refit.layout import TensorTable, meta_of
from nemo_rl.refit.packed import pack, packed_parts, unpack
from nemo_rl.refit.region import Region


@dataclass(frozen=True, slots=True)
class Copy:
    """One movement of the join: `region` of `fqn` goes from a row of `src_rank`'s layout to one of `dst_rank`'s."""

    fqn: str
    region: Region
    src_rank: int
    src_row: int
    dst_rank: int
    dst_row: int


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer of at most a bucket: copies `lo .. hi - 1` of a table, same pair and item size, densely packed."""

    index: int
    round: int
    src_rank: int
    dst_rank: int
    lo: int
    hi: int
    num_bytes: int


@dataclass(frozen=True, eq=False)
class CopyTable:
    """Copies in message order and the messages that carry them, columnar.

    Copy arrays have one entry a copy (`offsets`, `sizes`: one row); `messages` has the columns round, src_rank,
    dst_rank, lo, hi, num_bytes. Within a round every rank sends at most one message and receives at most one. Rounds
    grow along `messages`.
    """

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    src_rank: np.ndarray
    src_row: np.ndarray
    dst_rank: np.ndarray
    dst_row: np.ndarray
    messages: np.ndarray

    def __len__(self) -> int:
        return len(self.tensor)

    def message(self, index: int) -> Message:
        return Message(index, *(int(x) for x in self.messages[index]))

    def messages_of(self, rank: int) -> list[Message]:
        """Messages that `rank` sends or receives, in the order in which it must start them."""
        mine = np.flatnonzero((self.messages[:, 1] == rank) | (self.messages[:, 2] == rank))
        return [self.message(int(i)) for i in mine]

    @cached_property
    def message_of(self) -> np.ndarray:
        """Number of the message that carries each copy."""
        order = np.argsort(self.messages[:, 3])
        found: np.ndarray = np.repeat(order, self.messages[order, 4] - self.messages[order, 3])
        return found

    @property
    def num_rounds(self) -> int:
        """Rounds in which some message goes; their numbers have gaps."""
        return len(np.unique(self.messages[:, 0]))

    def num_bytes(self, item_bytes: np.ndarray) -> np.ndarray:
        """Of each copy, where elements of tensor i have `item_bytes[i]`."""
        found: np.ndarray = self.sizes.prod(axis=1) * item_bytes[self.tensor]
        return found

    def touches(self, rank: int) -> np.ndarray:
        """Which copies `rank` sends or receives."""
        found: np.ndarray = (self.src_rank == rank) | (self.dst_rank == rank)
        return found

    def of_rank(self, rank: int) -> CopyTable:
        """The copies and messages that `rank` sends or receives."""
        mine = self.touches(rank)
        m = self.messages[(self.messages[:, 1] == rank) | (self.messages[:, 2] == rank)]
        lo = (np.cumsum(mine) - 1)[m[:, 3]]
        rows = np.flatnonzero(mine)
        columns = {name: column[rows] for name, column in self.arrays().items() if name != "messages"}
        messages = np.column_stack([m[:, :3], lo, lo + m[:, 4] - m[:, 3], m[:, 5]])
        return CopyTable(**columns, messages=messages)

    def with_messages(self, messages: np.ndarray) -> CopyTable:
        return CopyTable(**{**self.arrays(), "messages": messages})

    @classmethod
    def stack(cls, tables: list[CopyTable], ndim: int) -> CopyTable:
        """All copies of `tables` in order; messages are in the order of the tables too."""
        if not tables:
            flat, box = np.zeros(0, np.int32), np.zeros((0, ndim), np.int64)
            return cls(flat, box, box, flat, flat, flat, flat, np.zeros((0, 6), np.int64))
        first = np.cumsum([0, *(len(t) for t in tables)])
        messages = [t.messages + start * np.array([0, 0, 0, 1, 1, 0]) for t, start in zip(tables, first, strict=False)]
        names = [name for name in cls.__dataclass_fields__ if name != "messages"]
        columns = {name: np.concatenate([getattr(t, name) for t in tables]) for name in names}
        return cls(**columns, messages=np.concatenate(messages))

    def wire_bytes(self, rank: int) -> tuple[int, int]:
        """Bytes that `rank` sends to and receives from other ranks."""
        m = self.messages[self.messages[:, 1] != self.messages[:, 2]]
        return int(m[m[:, 1] == rank, 5].sum()), int(m[m[:, 2] == rank, 5].sum())

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class MiscBuffer:
    """Whole tensors that travel together in one packed broadcast; `offsets[i]` is the byte offset of `fqns[i]`."""

    fqns: tuple[str, ...]
    offsets: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, eq=False)
class RefitPlan:
    """Every byte's way from the trainers to the generators.

    Attributes:
        world: the ranks.
        table: every tensor that travels.
        bulk: copies from shard to shard.
        misc: copies that gather whole tensors at `misc_root`, row i of whose virtual layout is `misc_fqns[i]`.
        misc_buffers: what `misc_root` broadcasts to the generators, in order.
        misc_reasons: fqn -> why it is not bulk.
        unused: fqn -> why no generator takes it.
        kept: generators' parameter -> why no trainer writes it.
        required_bytes: bytes of every generator's bulk destinations, each counted once: no plan moves fewer.
        bucket_bytes: limit of a message.
    """

    world: World
    table: TensorTable
    bulk: CopyTable
    misc: CopyTable
    misc_fqns: tuple[str, ...]
    misc_buffers: tuple[MiscBuffer, ...]
    misc_reasons: Mapping[str, str]
    required_bytes: int
    bucket_bytes: int
    unused: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def misc_root(self) -> int:
        """The rank that gathers and broadcasts misc tensors."""
        return self.world.trainers[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    @cached_property
    def item_bytes(self) -> np.ndarray:
        """int64, one a tensor of the table: bytes of an element."""
        return np.array([m.dtype.itemsize for m in self.table.values()], np.int64)

    def region(self, copies: CopyTable, index: int) -> Region:
        ndim = len(self.table[self.names[copies.tensor[index]]].shape)
        offsets, sizes = copies.offsets[index, :ndim], copies.sizes[index, :ndim]
        return Region(tuple(offsets.tolist()), tuple(sizes.tolist()))

    def copy(self, copies: CopyTable, index: int) -> Copy:
        ends = (copies.src_rank, copies.src_row, copies.dst_rank, copies.dst_row)
        fqn = self.names[copies.tensor[index]]
        return Copy(fqn, self.region(copies, index), *(int(column[index]) for column in ends))

    @cached_property
    def bulk_bytes(self) -> int:
        """Bytes of all bulk copies, those within a rank included."""
        return int(self.bulk.messages[:, 5].sum())

    @cached_property
    def misc_bytes(self) -> int:
        """Payload bytes of one pass of the misc broadcast."""
        return sum(self.table[f].num_bytes for f in self.misc_fqns)

    def part(self, rank: int) -> RefitPlan:
        """The same plan with the copies and messages that concern `rank`, which is what it executes and verifies.

        Generators and `misc_root` compare all copies of misc tensors, so they keep those.
        """
        whole = rank == self.misc_root or rank in self.world.generators
        misc = self.misc if whole else self.misc.of_rank(rank)
        return replace(self, bulk=self.bulk.of_rank(rank), misc=misc)

    def to_bytes(self) -> bytes:
        """Wire form; equal plans have equal bytes."""
        return pack(self._head(), self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        return {f"{part}.{k}": v for part in ("bulk", "misc") for k, v in getattr(self, part).arrays().items()}

    def _head(self) -> dict[str, Any]:
        return {
            "world": [self.world.trainers, self.world.generators],
            "table": [[n, list(m.shape), str(m.dtype).removeprefix("torch.")] for n, m in self.table.items()],
            "misc_fqns": self.misc_fqns,
            "misc_buffers": [[b.fqns, b.offsets, b.num_bytes] for b in self.misc_buffers],
            "misc_reasons": sorted(self.misc_reasons.items()),
            "unused": sorted(self.unused.items()),
            "kept": sorted(self.kept.items()),
            "numbers": [self.required_bytes, self.bucket_bytes],
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> RefitPlan:
        """Inverse of `to_bytes`. Raises ValueError where the bytes are truncated."""
        try:
            head, arrays = unpack(data)
            bulk, misc = (
                CopyTable(**{k: arrays[f"{part}.{k}"] for k in CopyTable.__dataclass_fields__})
                for part in ("bulk", "misc")
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"plan refused: {error}") from error
        required, bucket = head["numbers"]
        return cls(
            World(*(tuple(ranks) for ranks in head["world"])),
            {n: meta_of(tuple(s), d) for n, s, d in head["table"]},
            bulk,
            misc,
            tuple(head["misc_fqns"]),
            tuple(MiscBuffer(tuple(f), tuple(o), n) for f, o, n in head["misc_buffers"]),
            dict(head["misc_reasons"]),
            required,
            bucket,
            dict(head["unused"]),
            dict(head["kept"]),
        )

    @cached_property
    def digest(self) -> str:
        """Hash of the wire form; ranks compare it before any of them moves a byte."""
        found = hashlib.sha256()
        for part in packed_parts(self._head(), self._arrays()):
            found.update(part)
        return found.hexdigest()

    def describe(self) -> str:
        """A few lines for a log: what travels, how, and who is the busiest."""
        lines = [
            f"refit plan {self.digest[:12]}: {len(self.table)} tensors, {len(self.world.trainers)} trainers -> "
            f"{len(self.world.generators)} generators",
            f"  bulk: {len(self.bulk)} copies, {len(self.bulk.messages)} messages, {self.bulk.num_rounds} rounds, "
            f"{self.bulk_bytes / 1e6:.2f} MB (required {self.required_bytes / 1e6:.2f} MB)",
            f"  misc: {len(self.misc_fqns)} tensors, {len(self.misc_buffers)} buffers, {self.misc_bytes / 1e6:.2f} MB",
        ]
        lines += [f"    {text}" for text in _by_reason(self.misc_reasons)]
        lines += [f"  unused: {text}" for text in _by_reason(self.unused)]
        lines += [f"  kept by generators: {text}" for text in _by_reason(self.kept)]
        for rank in range(self.world.size):
            sent, received = self.bulk.wire_bytes(rank)
            lines.append(
                f"  {self.world.describe(rank)}: sends {sent / 1e6:.2f} MB, receives {received / 1e6:.2f} MB in bulk"
            )
        return "\n".join(lines)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """One line a reason, with the number of names and the first of them."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return [f"{len(names)} ({names[0]}{', ...' if names[1:] else ''}): {reason}" for reason, names in groups.items()]
