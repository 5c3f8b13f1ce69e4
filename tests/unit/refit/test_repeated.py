"""What a kernel is launched by again and again; a stand-in for Triton's says by which way and with what."""

from __future__ import annotations

import pytest

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
    assert compiled.launched == [((7, 1, 1), ("table", 3), {})] * (0 if interpreted else 2)
