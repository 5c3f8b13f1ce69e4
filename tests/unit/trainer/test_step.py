"""Micro-batches cover a batch once, and the CPU scope leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.step import MicroBatch, micro_batches, padded_rows


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 8, 64])
@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_ranks_share_all_rows_once_in_micro_batches_of_one_shape(num_rows: int, data_size: int, limit: int) -> None:
    ranks = [micro_batches(num_rows, data_size, rank, limit) for rank in range(data_size)]
    assert len({(len(batches), b.size) for batches in ranks for b in batches}) == 1
    assert all(0 <= b.stop - b.start <= b.size <= limit for batches in ranks for b in batches)
    rows = [row for batches in ranks for b in batches for row in range(b.start, b.stop)]
    assert rows == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "limit"), [(0, 4), (4, 0)])
def test_empty_batches_are_refused(num_rows: int, limit: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        micro_batches(num_rows, 1, 0, limit)


def test_rows_are_padded_to_the_right_and_below() -> None:
    ids = torch.arange(15).reshape(3, 5) + 1
    padded = padded_rows(ids, MicroBatch(2, 3, 2), multiple=4)
    assert padded.tolist() == [[11, 12, 13, 14, 15, 0, 0, 0], [0] * 8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the scope does nothing beside CUDA")
def test_the_scope_reads_cuda_names_as_the_cpu_and_restores_them() -> None:
    before = torch.cuda.current_device
    with pytest.raises(KeyError), megatron_on_cpu(), megatron_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(2).type(torch.float64).dtype == torch.float64
        raise KeyError
    assert torch.cuda.current_device is before
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
