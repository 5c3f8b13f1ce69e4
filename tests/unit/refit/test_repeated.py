"""What a kernel is launched by again and again; a stand-in for Triton's says by which way and with what."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from nemo_rl.refit.repeated import Repeated


class Kernel:
    """Launches of a grid are noted; the first one gives what was compiled, where kernels are."""

    def __init__(self, compiled=None):
        self.compiled, self.launched = compiled, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched.append((grid, arguments, options))
            return self.compiled

        return launch


@pytest.mark.parametrize("interpreted", [False, True])
def test_arguments_are_looked_at_once(interpreted):
    compiled = Kernel()
    kernel = Kernel(None if interpreted else compiled)
    launch = Repeated(kernel, 7, "table", 3, num_warps=4)
    assert not kernel.launched, "nothing runs before it is asked for"
    for _ in range(3):
        launch()
    assert kernel.launched == [((7,), ("table", 3), {"num_warps": 4})] * (3 if interpreted else 1)
    assert compiled.launched == [((7, 1, 1), ("table", 3), {"stream": None})] * (0 if interpreted else 2)


def test_a_stream_may_be_another_one_each_time(monkeypatch):
    inside, compiled = [], Kernel()
    kernel, streams = Kernel(compiled), [SimpleNamespace(cuda_stream=number) for number in (5, 6)]
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside.append(stream) or nullcontext())
    launch = Repeated(kernel, 2, "table")
    for stream in streams:
        launch(stream)
    assert inside == streams[:1], "what compiles runs on the current stream"
    assert [options for _, _, options in compiled.launched] == [{"stream": 6}]
