"""DTensor to DTensor over disjoint and overlapping meshes, against torch's own full_tensor and chunking."""

from __future__ import annotations

import itertools
import multiprocessing as mp
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.dtensor import shard_region, xferdtensor

CASES = [
    # shape, dtype, source ranks, mesh shape, placements, destination ranks, mesh shape, placements
    ((10, 6), torch.float32, (0, 1), (2,), (Shard(0),), (2, 3), (2,), (Shard(1),)),
    ((7,), torch.bfloat16, (0, 2), (2,), (Shard(0),), (1, 3), (2,), (Replicate(),)),
    ((5, 3, 4), torch.uint8, (0, 1, 2, 3), (2, 2), (Shard(0), Shard(2)), (0, 1, 2, 3), (4,), (Shard(1),)),
    ((4, 6, 2, 3), torch.int64, (0, 1, 2, 3), (4,), (Shard(1),), (1, 2), (2,), (Shard(3),)),
    ((9, 8), torch.float64, (3,), (1,), (Replicate(),), (0, 1, 2, 3), (2, 2), (Shard(0), Shard(0))),
]


@pytest.mark.parametrize("shape", [(7, 5), (1, 3), (8, 2, 3)])
def test_regions_are_those_of_torch(shape):
    choices = [Replicate(), *[Shard(d) for d in range(len(shape))]]
    for mesh_shape in [(3,), (2, 3)]:
        for placements in itertools.product(choices, repeat=len(mesh_shape)):
            for at in itertools.product(*map(range, mesh_shape)):
                want, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, list(at), placements)
                region = shard_region(shape, mesh_shape, at, placements)
                assert region.sizes == tuple(want)
                if region.volume:
                    assert region.offsets == tuple(offset)


def test_partial_is_refused():
    with pytest.raises(ValueError, match="neither Shard nor Replicate"):
        shard_region((4,), (2,), (0,), (Partial(),))


def one_case(rank, case, transport):
    shape, dtype, src_ranks, src_mesh, src_placements, dst_ranks, dst_mesh, dst_placements = case
    full = (torch.arange(torch.Size(shape).numel()) % 251).to(dtype).view(shape)
    on_src = DeviceMesh("cpu", torch.tensor(src_ranks).view(src_mesh))
    on_dst = DeviceMesh("cpu", torch.tensor(dst_ranks).view(dst_mesh))
    src = distribute_tensor(full.clone(), on_src, src_placements) if rank in src_ranks else None
    dst = distribute_tensor(torch.full_like(full, 7), on_dst, dst_placements) if rank in dst_ranks else None
    store = dist.PrefixStore(f"{case}{transport}", dist.distributed_c10d._get_default_store())
    everyone = sorted(set(src_ranks) | set(dst_ranks))
    if rank not in everyone:
        return
    world = World(tuple(map(everyone.index, src_ranks)), tuple(map(everyone.index, dst_ranks)))
    options = RefitOptions(transport=transport, deadline_s=30, bucket_bytes=1024)
    report = xferdtensor(src, dst, rank=everyone.index(rank), world=world, store=store, options=options)
    assert report.verified
    if dst is not None:
        assert torch.equal(dst.full_tensor(), full)


def rank_main(rank, port, queue):
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", rank=rank, world_size=4, store=store, timeout=timedelta(seconds=60))
        for case, transport in itertools.product(CASES, ("gloo", "golden")):
            one_case(rank, case, transport)
            dist.barrier()
        queue.put((rank, "ok"))
    except Exception as error:
        queue.put((rank, repr(error)))
    dist.destroy_process_group()


def test_dtensors_move_between_meshes():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=rank_main, args=(r, store.port, queue), daemon=True) for r in range(4)]
    for p in ranks:
        p.start()
    assert dict(queue.get(timeout=120) for _ in ranks) == dict.fromkeys(range(4), "ok")
    for p in ranks:
        p.join(20)
