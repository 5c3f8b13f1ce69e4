"""What the two sides of a refit implement, and what a refit reports. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nemo_rl.refit.layout import Holding, Layout, TensorTable


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of one refit: who holds trained weights and who receives them. A rank may do both.

    Raises:
        ValueError: a side is empty or names a rank twice, or ranks are not `0 .. size - 1`.
    """

    trainers: tuple[int, ...]
    generators: tuple[int, ...]

    def __post_init__(self) -> None:
        ranks = set(self.trainers) | set(self.generators)
        twice = len(set(self.trainers)) != len(self.trainers) or len(set(self.generators)) != len(self.generators)
        if not self.trainers or not self.generators or twice or ranks != set(range(len(ranks))):
            raise ValueError(
                f"a refit needs trainers and generators, each once, with ranks from 0 up without gaps: {self}"
            )

    @classmethod
    def of(cls, num_trainers: int, num_generators: int) -> World:
        """Trainers are `0 .. num_trainers - 1`, generator workers follow."""
        return cls(tuple(range(num_trainers)), tuple(range(num_trainers, num_trainers + num_generators)))

    @property
    def size(self) -> int:
        return len(set(self.trainers) | set(self.generators))

    @property
    def shared(self) -> tuple[int, ...]:
        """Ranks that are on both sides."""
        return tuple(r for r in self.trainers if r in self.generators)

    def describe(self, rank: int) -> str:
        """`trainer 1 (rank 1)`, `generator 0 (rank 2)`, or both roles."""
        roles = [f"trainer {self.trainers.index(rank)}"] if rank in self.trainers else []
        roles += [f"generator {self.generators.index(rank)}"] if rank in self.generators else []
        return f"{' and '.join(roles)} (rank {rank})"


class Source(Protocol):
    """A rank that holds trained weights."""

    def table(self) -> TensorTable:
        """Every Hugging Face tensor of the whole model that the family rule exports, held by this rank or not."""

    def holdings(self) -> Sequence[Holding]:
        """Live views of this rank's parameters; the same objects again say that storage stayed where it was, and the
        same tuple says so at once."""

    def unused(self) -> Mapping[str, str]:
        """Trainer tensors that are not exported, with the reason."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a generator rank says of its loader.

    Attributes:
        layout: row i is the destination of one box; `unit` says which module must see it whole.
        misc: tensors whose value the loader computes or whose way is not pure views, with the reason.
        problems: what must refuse the plan: bytes nobody writes, values the loader needs and the table lacks.
        kept: parameters that this refit leaves as they are, with the rule that says so (a frozen base under adapters).
    """

    layout: Layout
    misc: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


class Landing(Protocol):
    """A rank that receives weights into an engine."""

    @property
    def version(self) -> int | None:
        """Of the weights that the last refit committed; None before the first."""

    def declare(self, table: TensorTable) -> Declaration:
        """Derive the layout by running the engine's own loader on storage-less tensors of `table`."""

    def begin(self, version: int) -> None:
        """Start of an update on a paused engine; until `commit` the engine refuses to generate."""

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        """Row -> load-format view for every row of `unit`; views stay valid until `close(unit)`.

        The same mapping again says that storage stayed where it was.
        """

    def close(self, unit: int) -> None:
        """All rows of `unit` landed: run the engine's own processing of that module and free its staging."""

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give whole Hugging Face tensors to the engine's own loader; `tensors` is consumed lazily."""

    def finish(self) -> None:
        """Run the engine's finalize hooks. Raises where a unit's processing did not run in this version."""

    def commit(self, version: int) -> None:
        """Stamp the version, drop caches tied to the old one, allow generation."""

    def reject(self, reason: str) -> None:
        """Keep refusing to generate, with `reason`."""


MEASURE_LINKS = ("auto", "always", "never")
MOST_STREAMS = 64
"""A lane of `nccl` is a communicator, with gigabytes of its own."""
LONGEST_S = 1e6
"""Of a deadline: what clocks and stores of all kinds take."""


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """Knobs of a session.

    Attributes:
        transport: `auto`, `peer`, `nccl`, `m2n`, `gloo`, `golden` or `broadcast` (the conventional refit).
        bucket_bytes: largest message.
        num_streams: messages in flight per rank and direction; bounds extra memory to
            `2 * num_streams * bucket_bytes`. `nccl` joins messages to 128 MiB over three lanes or more, and takes at
            most 512 MiB for them beside what NCCL itself takes for a communicator a lane; two messages must fit into
            those, or into half of them where a rank is on both sides.
        deadline_s: longest that any phase of one refit may take.
        verify: compare digests after every refit.
        verify_against_checkpoint: before the first step, trainers compare what they hold with the checkpoint, and
            version 0 must leave generators as they loaded it.
        measure_links: when ranks measure their links: `auto` where `transport=auto` has a choice and no measurement
            is cached, `always` at connect, or `never`, which takes the first transport that all ranks support.
        cache_dir: folder of measurements on the host of rank 0; empty for none.
        measure_memory: each report says how far resident memory rose; asking the kernel takes 0.2 ms of each refit.
    """

    transport: str = "auto"
    bucket_bytes: int = 16 << 20
    num_streams: int = 2
    deadline_s: float = 120.0
    verify: bool = True
    verify_against_checkpoint: bool = False
    measure_links: str = "never"
    cache_dir: str = ""
    measure_memory: bool = False

    def __post_init__(self) -> None:
        if self.measure_links not in MEASURE_LINKS:
            raise ValueError(f"measure_links='{self.measure_links}' is not one of {', '.join(MEASURE_LINKS)}")
        if not (self.bucket_bytes >= 1024 and 1 <= self.num_streams <= MOST_STREAMS):
            raise ValueError(f"bucket_bytes >= 1024 and num_streams from 1 to {MOST_STREAMS} are needed, got {self}")
        if not 0 < self.deadline_s <= LONGEST_S:  # nor nan: waits would have no end
            raise ValueError(f"deadline_s above 0 and at most {LONGEST_S:g} is needed, got {self}")


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one rank saw of one refit. Bytes are those that this rank sent or received over the wire.

    `total_s` are the seconds until every rank has committed.

    `staging_bytes` are message and broadcast buffers; `extra_rss_bytes` is how far the process's resident memory rose
    above its start during the refit, the engine's own staging included (None where the options do not ask or the kernel
    does not tell).
    `predictions` are the seconds that the cost model gave each transport that could be taken, without what engines do
    with landed bytes; empty where links were not measured.
    `engine_copies` and `kernel_launches` are what this rank moved bulk bytes by, where it is counted.
    `pause_s` is how long the refit kept the rank's engine from generating, by parts that add up to the whole.
    """

    version: int
    transport: str
    verified: bool
    total_s: float
    phase_s: Mapping[str, float]
    bulk_bytes: int
    misc_bytes: int
    staging_bytes: int
    extra_rss_bytes: int | None = None
    required_bytes: int = 0
    predictions: Mapping[str, float] = field(default_factory=dict)
    pause_s: Mapping[str, float] = field(default_factory=dict)
    engine_copies: int = 0
    kernel_launches: int = 0

    @property
    def predicted_s(self) -> float | None:
        """Of the transport that ran; None where links were not measured."""
        return self.predictions.get(self.transport)

    @property
    def gb_per_s(self) -> float:
        return (self.bulk_bytes + self.misc_bytes) / self.total_s / 1e9 if self.total_s else 0.0
