"""Memory that consists of chunks: which of them follow each other, and where an address lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks of memory, each right behind the one before: addresses, and bytes of each."""

    chunks: tuple[tuple[int, int], ...]

    @property
    def address(self) -> int:
        return self.chunks[0][0]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.chunks)


def runs_of(chunks: Mapping[int, int]) -> list[Run]:
    """Runs of chunks (address -> bytes) that touch, by address."""
    runs: list[list[tuple[int, int]]] = []
    end = -1
    for base, size in sorted(chunks.items()):
        if base != end:
            runs.append([])
        runs[-1].append((base, size))
        end = base + size
    return [Run(tuple(run)) for run in runs]


def place(address: int, runs: Sequence[Run]) -> tuple[int, int]:
    """(number of the run that holds `address`, offset in it)."""
    for number, run in enumerate(runs):
        if run.address <= address < run.address + run.num_bytes:
            return number, address - run.address
    raise AssertionError(f"{address:#x} lies in no run")
