"""What an engine on GPUs asks of vLLM."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import vllm
from vllm.config import CompilationConfig
from vllm.platforms import current_platform

from nemo_rl.generator.engine import _make_llm
from nemo_rl.generator.options import GeneratorConfig, worker_env


def options(device: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    config = GeneratorConfig("model", tensor_parallel_size=2, enforce_eager=False)
    for name, value in worker_env(config).items():
        monkeypatch.setenv(name, value)
    with mock.patch.object(vllm, "LLM") as made, mock.patch.object(current_platform, "is_cpu", lambda: device == "cpu"):
        _make_llm(config)
    return dict(made.call_args.kwargs)


def test_compiled_models_sum_over_ranks_without_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options("cuda", monkeypatch)["compilation_config"]
    assert CompilationConfig(**asked).pass_config.fuse_allreduce_rms is False
    assert CompilationConfig().pass_config.fuse_allreduce_rms is None, "else vLLM decides"
    assert "compilation_config" not in options("cpu", monkeypatch)
