"""The `peer` transport between processes: any strided box is moved between GPU memory of two of them, bit for bit."""

from __future__ import annotations

import json
import multiprocessing as mp
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.refit.strided import Jobs, form_of

pytestmark = pytest.mark.gpu(1)

ROOT = Path(__file__).parents[2]
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)
COUNT = 60


def random_view(rng: random.Random, shape: list[int], dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A view of `shape` with permuted axes and gaps, of random bytes, and the storage that it lies in."""
    order = rng.sample(range(len(shape)), len(shape))
    padded = [shape[a] + rng.choice((0, 0, 3)) for a in order]
    count = int(np.prod(padded, dtype=int)) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).cuda()
    whole = raw.view(dtype).view(padded)
    cut = whole[tuple(slice(0, shape[a]) for a in order)]
    return cut.permute([order.index(a) for a in range(len(shape))]), raw


def cases() -> list[tuple[list[int], torch.dtype]]:
    rng = random.Random(11)
    small = [[rng.choice((1, 2, 5, 40)) for _ in range(rng.randint(0, 4))] for _ in range(COUNT)]
    large = [[64, 300, 128], [3000, 17], [5, 7, 2000], [3, 700, 9000]]  # the last ones over many chunks
    return [(shape, rng.choice(DTYPES)) for shape in small + large]


def owned() -> list[tuple[Any, Any]]:
    rng = random.Random(12)
    return [random_view(rng, shape, dtype, i) for i, (shape, dtype) in enumerate(cases())]


def sources() -> list[Any]:
    return [view for view, _ in owned()]


def owner(connection: Any) -> None:
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    mine = owned()
    memory = CudaMemory(torch.device("cuda", 0))
    torch.cuda.synchronize()
    windows, where = memory.show([view for view, _ in mine])
    connection.send((memory.beacon(), windows, where))
    while connection.recv() != "done":
        connection.send([raw.cpu().numpy() for _, raw in mine])


@contextmanager
def another(work: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, **environ: str) -> Iterator[Any]:
    """The pipe to a process that does `work` under `environ`, which this process, on CUDA already, does not see."""
    torch.zeros(1, device="cuda")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(there,), daemon=True)
    child.start()
    assert here.poll(60)
    yield here
    child.join(20)
    assert child.exitcode == 0


ALLOCATORS = ["expandable_segments:False", "expandable_segments:True"]
"""Memory with a CUDA IPC handle, and memory that the allocator maps chunk by chunk, which has none."""


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_any_box_is_read_into_any_other(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with another(owner, monkeypatch, PYTORCH_CUDA_ALLOC_CONF=allocator) as pipe:
        read_everything(pipe, chunked=allocator.endswith("True"))


def read_everything(pipe: Any, chunked: bool) -> None:
    """Refuse false beacons, then read each of the owner's views into a view of other strides, twice."""
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    beacon, windows, where = pipe.recv()
    memory = CudaMemory(torch.device("cuda", 0))
    assert memory.probe(beacon) is None
    assert "differently" in str(memory.probe(json.dumps(json.loads(beacon) | {"secret": "00" * 16})))
    assert "cannot be mapped" in str(memory.probe(json.dumps(json.loads(beacon) | {"window": "00" * 64})))
    assert "cannot be mapped" in str(
        memory.probe(json.dumps(json.loads(beacon) | {"window": '["gone", [[4096, 4096]]]'}))
    )
    assert any(window.startswith("[") for window in windows) == chunked
    peer, bases = memory.open(windows)
    rng = random.Random(13)
    expected, got, forms, addresses = [], [], [], []
    for number, source in enumerate(sources()):
        view, raw = random_view(rng, list(source.shape), source.dtype, 1000 + number)
        item = source.element_size()
        forms.append(form_of(tuple(source.shape), *(tuple(s * item for s in t.stride()) for t in (source, view)), item))
        addresses.append((bases[where[number, 0]] + where[number, 1], view.data_ptr()))
        want = raw.clone()
        want.view(view.dtype).as_strided(view.shape, view.stride()).copy_(source)
        expected.append(want)
        got.append(raw)
    src, dst = np.array(addresses, np.int64).T
    start = memory.prepare(peer, Jobs(src, dst, tuple(forms)), put=False, ordered=True)
    before = [raw.clone() for raw in got]
    start()
    memory.wait(time.monotonic() + 20)
    for number, (raw, want) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(raw, want), (number, cases()[number], forms[number])
    for raw, old in zip(got, before, strict=True):  # what is prepared starts again
        raw.copy_(old)
    start()
    memory.wait(time.monotonic() + 20)
    assert all(torch.equal(raw, want) for raw, want in zip(got, expected, strict=True))
    assert len(memory._open) == len(windows)
    memory.keep(windows[:1])
    assert list(memory._open) == windows[:1]
    memory.open(windows)  # what was unmapped can be mapped again
    memory.close()
    assert not memory._open
    pipe.send("done")


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_any_box_is_written_into_any_other(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with another(owner, monkeypatch, PYTORCH_CUDA_ALLOC_CONF=allocator) as pipe:
        write_everything(pipe)


def write_everything(pipe: Any) -> None:
    """Write a view of other strides into each of the owner's views; the owner says what it then holds."""
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    _, windows, where = pipe.recv()
    memory = CudaMemory(torch.device("cuda", 0))
    peer, bases = memory.open(windows)
    rng, expected, forms, addresses, kept = random.Random(14), [], [], [], []
    for number, (far, raw) in enumerate(owned()):
        view, whole = random_view(rng, list(far.shape), far.dtype, 2000 + number)
        item = far.element_size()
        forms.append(form_of(tuple(far.shape), *(tuple(s * item for s in t.stride()) for t in (view, far)), item))
        addresses.append((view.data_ptr(), bases[where[number, 0]] + where[number, 1]))
        kept.append(whole)
        far.copy_(view)  # here: what the owner's storage is to be
        expected.append(raw.cpu().numpy())
    src, dst = np.array(addresses, np.int64).T
    memory.prepare(peer, Jobs(src, dst, tuple(forms)), put=True, ordered=True)()
    done, end = memory.mark(), time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
    pipe.send("show")
    assert pipe.poll(20)
    for number, (raw, want) in enumerate(zip(pipe.recv(), expected, strict=True)):
        assert np.array_equal(raw, want), (number, cases()[number], forms[number])
    memory.close()
    pipe.send("done")


def test_memory_is_unmapped_behind_copies_that_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with another(owner, monkeypatch) as pipe:
        start_and_close(pipe)


def start_and_close(pipe: Any) -> None:
    """Read the owner's large views again and again, and end while that goes on."""
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    _, windows, where = pipe.recv()
    memory = CudaMemory(torch.device("cuda", 0))
    peer, bases = memory.open(windows)
    large = {number: source for number, source in enumerate(sources()) if source.numel() > 100_000}
    got = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in large.values()]
    forms, addresses = [], []
    for (number, far), view in zip(large.items(), got, strict=True):
        item = far.element_size()
        forms.append(form_of(tuple(far.shape), *(tuple(s * item for s in t.stride()) for t in (far, view)), item))
        addresses.append((bases[where[number, 0]] + where[number, 1], view.data_ptr()))
    src, dst = np.array(addresses, np.int64).T
    start = memory.prepare(peer, Jobs(src, dst, tuple(forms)), put=False, ordered=False)
    torch.cuda.synchronize()
    for _ in range(300):
        start()
    done = memory.mark()
    under_way = not done()
    memory.close()
    assert under_way and done() and not memory._open
    torch.cuda.synchronize()
    for view, far in zip(got, large.values(), strict=True):
        assert torch.equal(view.view(torch.uint8), far.contiguous().view(torch.uint8))
    pipe.send("done")


def unexportable(connection: Any) -> None:
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    connection.send(CudaMemory(torch.device("cuda", 0)).beacon())


def test_memory_that_cannot_be_shown_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    environ = dict(PYTORCH_CUDA_ALLOC_CONF=ALLOCATORS[1], TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC="0")
    with another(unexportable, monkeypatch, **environ) as pipe:
        reason = str(CudaMemory(torch.device("cuda", 0)).probe(pipe.recv()))
    assert "was not created to be shown" in reason and "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1" in reason


@pytest.mark.gpu(2)
@pytest.mark.parametrize("variants", ["peer,peer no verify", "nccl", "golden,broadcast"])
def test_refits_between_processes_that_see_one_gpu_each(variants: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_refit.py", "--device", "cuda", "--small", "--layers", "2"]
    command += ["--trainers", "1", "--generators", "1", "--repeat", "3", "--deadline", "20", "--limit", "100"]
    done = subprocess.run(
        [*command, "--variants", variants, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in rows] == variants.split(",")
    assert all(r["bit_exact"] and r["verified"] != r["variant"].endswith("no verify") for r in rows)
