"""How groups are made that leave a peer's death to who waits; what NCCL does then is tested where there are GPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist

from nemo_rl.refit.transports.own_nccl import make_group

NAME = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.mark.parametrize("before", [None, "3"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_watchdog_is_told_while_the_group_is_made(
    monkeypatch: pytest.MonkeyPatch, before: str | None, fails: bool
) -> None:
    seen = []

    def made(*_: Any) -> str:
        seen.append(os.environ[NAME])
        if fails:
            raise RuntimeError("no connection")
        return "group"

    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    monkeypatch.setenv(NAME, before) if before else monkeypatch.delenv(NAME, raising=False)
    try:
        assert make_group(None, 0, 1, None) == "group" and not fails
    except RuntimeError:
        assert fails
    assert seen == ["0"] and os.environ.get(NAME) == before
