"""Would vLLM's loader be filled whole by these tensors? Answered from shapes alone, before anything is started.

As a program, `python -m nemo_rl.generator.preflight REQUEST` reads a JSON file
`{"engine": {fields of EngineSpec}, "table": [[fqn, shape, dtype], ...]}`, and writes a JSON list of problems as the
last line of its output. It needs `PREFLIGHT_ENV` in its environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.refit.layout import TensorMeta, TensorTable

PREFLIGHT_ENV: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
}
"""What the process that traces needs in its environment before it imports vLLM."""


def check_loader(spec: EngineSpec, table: TensorTable) -> list[str]:
    """Problems of vLLM's loader with `table`, for the first and the last rank; the others are like the first.

    Takes the process for itself: no default process group, and no engine afterwards.
    """
    problems = []
    for rank in sorted({0, spec.num_ranks - 1}):
        problems += [f"generator rank {rank} of {spec.num_ranks}: {text}" for text in _problems(spec, rank, table)]
    return problems


def check_loader_apart(
    spec: EngineSpec, table: TensorTable, environ: Mapping[str, str], timeout_s: float = 120.0
) -> list[str]:
    """As `check_loader`, in a process of its own; a process that fails or takes too long is a problem too.

    Args:
        environ: environment of the new process, to which `PREFLIGHT_ENV` is added.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(request_text(spec, table))
        command = [sys.executable, "-m", "nemo_rl.generator.preflight", str(path)]
        try:
            done = subprocess.run(
                command, env={**environ, **PREFLIGHT_ENV}, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return [f"the check of vLLM's loader took more than {timeout_s:g} s; give it more time"]
    return _answer(done)


def request_text(spec: EngineSpec, table: TensorTable) -> str:
    """The JSON that the program reads."""
    rows = [[fqn, list(meta.shape), str(meta.dtype).removeprefix("torch.")] for fqn, meta in table.items()]
    return json.dumps({"engine": dataclasses.asdict(spec), "table": rows})


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 with an answer, be it problems; 2 where the request cannot be read."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever vLLM writes goes to standard error, so that the answer stands alone
    try:
        request = json.loads(Path(arguments[0]).read_text())
        table = {fqn: TensorMeta(tuple(shape), getattr(torch, dtype)) for fqn, shape, dtype in request["table"]}
        spec = EngineSpec(**request["engine"])
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        sys.stderr.write(
            f"preflight: give a request file as the module describes it ({type(error).__name__}: {error})\n"
        )
        return 2
    os.write(out, (json.dumps(check_loader(spec, table)) + "\n").encode())
    return 0


def _problems(spec: EngineSpec, rank: int, table: TensorTable) -> Sequence[str]:
    from nemo_rl.generator.twin import trace_rank

    try:
        return trace_rank(spec, rank, table).problems
    except Exception as error:  # whatever vLLM refuses a model or a layout with is the answer
        return [f"vLLM refuses {spec}: {type(error).__name__}: {' '.join(str(error).split())}"]


def _answer(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode == 0:
            return [str(text) for text in json.loads(lines[-1])]
    except (IndexError, ValueError):
        pass
    tail = " | ".join(done.stderr.strip().splitlines()[-3:])
    return [f"the check of vLLM's loader ended with status {done.returncode} and no answer: {tail}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
