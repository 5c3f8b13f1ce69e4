"""The trace of a generator rank against what vLLM's own loader makes of the same whole tensors, byte for byte.

Needs a process in which vLLM may take the default process group (`nemo_rl.generator.preflight.PREFLIGHT_ENV`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nemo_rl.generator.twin import EngineSpec, load_rank, trace_rank
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import Trace, TracedRow


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rank of one engine.

    Attributes:
        differing: parameters and persistent buffers in which a byte is not as the loader leaves it.
        num_bytes: of the rank's storage, shared storage once.
        moved_bytes: that rows write; padding_bytes: that the loader fills.
        misc_share: bytes of misc tensors among the bytes of the whole checkpoint.
    """

    trace: Trace
    differing: tuple[str, ...]
    num_bytes: int
    moved_bytes: int
    padding_bytes: int
    misc_share: float


def judge(spec: EngineSpec, rank: int, table: TensorTable, values: Mapping[str, torch.Tensor]) -> Verdict:
    """Trace the rank, follow the trace into random storage, and compare with the loader's result."""
    trace = trace_rank(spec, rank, table)
    wanted = load_rank(spec, rank, values.items())
    got = follow(spec, rank, trace, values)
    return Verdict(
        trace=trace,
        differing=differences(wanted, got),
        num_bytes=sum({_storage(t): t.untyped_storage().nbytes() for t in wanted.values()}.values()),
        moved_bytes=sum(row.region.volume * values[row.fqn].itemsize for row in trace.rows),
        padding_bytes=sum(end - first for ranges in trace.padding.values() for first, end in ranges),
        misc_share=sum(table[fqn].num_bytes for fqn in trace.misc) / sum(meta.num_bytes for meta in table.values()),
    )


def follow(spec: EngineSpec, rank: int, trace: Trace, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the trace alone makes of random storage: misc through the loader, then every row, then padding."""
    from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

    with disable_mtp_completeness_check():  # misc alone is no whole checkpoint
        storage = load_rank(spec, rank, ((fqn, values[fqn]) for fqn in trace.misc))
    for row in trace.rows:
        source = values[row.fqn][row.region.slices_in(Region.whole(tuple(values[row.fqn].shape)))]
        storage[row.param].as_strided(row.region.sizes, row.stride, row.storage_offset).copy_(source)
    for name, ranges in trace.padding.items():
        for first, end in ranges:
            _bytes(storage[name])[first:end] = 0
    return storage


def differences(wanted: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names whose bytes differ, or that only one side has."""
    alone = wanted.keys() ^ got.keys()
    return tuple(sorted(alone | {n for n in wanted.keys() & got.keys() if not _same(wanted[n], got[n])}))


def without(trace: Trace, rows: Sequence[TracedRow]) -> Trace:
    """The trace with a hole where `rows` were."""
    return replace(trace, rows=tuple(row for row in trace.rows if row not in rows))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a.contiguous()), _bytes(b.contiguous()))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
