"""The SLURM script, with `srun` and Python played by programs that write down what they were asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemo_rl.refit.device import MULTICAST_OFF

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "grpo.sbatch"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#*=}; shift; done
[[ $1 == hostname ]] && exec echo 127.0.0.1 10.0.0.9
exec "$@"
"""
PYTHON = """#!{python}
import json, os, socket, sys, time
here = dict(node=os.environ["NODE"], args=sys.argv[1:], pid=os.getpid(), env=dict(os.environ))
with open("{folder}/said", "a") as file:
    file.write(json.dumps(here) + "\\n")
if "ray.scripts.scripts" not in sys.argv:
    while "--address" not in open("{folder}/said").read():
        time.sleep(0.02)  # the other nodes come up in their own time
    sys.exit({code})
if "--head" in sys.argv:
    listener = socket.create_server(("127.0.0.1", {port}))
time.sleep(60)
"""
PASSED = {"NRL_REFIT_TRANSPORT": "nccl", "NCCL_DEBUG": "INFO"}


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def submitted(folder: Path, *arguments: str, code: int = 0) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of the job, and who was started: on which node, with what arguments and environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program(folder / "srun", SRUN)
    program(folder / "scontrol", "#!/usr/bin/env bash\nprintf 'n1\\nn2\\nn3\\n'\n")
    program(folder / "python", PYTHON.format(python=sys.executable, folder=folder, code=code, port=port))
    job = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="n[1-3]", SLURM_GPUS_ON_NODE="4")
    mine = dict(PATH=f"{folder}:{os.environ['PATH']}", PYTHON=str(folder / "python"), RAY_PORT=str(port), **PASSED)
    done = subprocess.run([SCRIPT, *arguments], cwd=ROOT, env=job | mine, capture_output=True, text=True, timeout=60)
    said = folder / "said"
    return done.returncode, [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []


def test_a_cluster_of_all_nodes_and_one_run(tmp_path: Path) -> None:
    status, said = submitted(tmp_path, "my.yaml", "grpo.max_num_steps=3", code=5)
    assert status == 5, "the job ends as the run does"
    by_node = {call["node"]: call["args"] for call in said if "start" in call["args"]}
    assert set(by_node) == {"n1", "n2,n3"} and "--head" in by_node["n1"] and "--num-gpus=4" in by_node["n2,n3"]
    (run,) = (call for call in said if "start" not in call["args"])
    address = run["args"][3].removeprefix("cluster.address=")
    assert f"--address={address}" in by_node["n2,n3"] and run["node"] == "n1"
    expected = ["examples/run_grpo.py", "--config", "my.yaml", f"cluster.address={address}", "cluster.num_nodes=3"]
    assert run["args"] == [*expected, "cluster.gpus_per_node=4", "cluster.device=cuda", "grpo.max_num_steps=3"]


def test_every_process_has_the_token_and_no_multicast(tmp_path: Path) -> None:
    _, said = submitted(tmp_path, "my.yaml")
    tokens = {call["env"]["RAY_AUTH_TOKEN"] for call in said}
    assert len(said) == 3 and len(tokens) == 1 and len(tokens.pop()) == 64
    expected = PASSED | dict(MULTICAST_OFF) | {"RAY_AUTH_MODE": "token"}
    assert all(call["env"].items() >= expected.items() for call in said)
    assert not any(call["env"]["RAY_AUTH_TOKEN"] in " ".join(call["args"]) for call in said)


def test_nothing_runs_on_after_the_job(tmp_path: Path) -> None:
    _, said = submitted(tmp_path, "my.yaml")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{call['pid']}").exists() for call in said) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [call["args"] for call in said if Path(f"/proc/{call['pid']}").exists()]


def test_a_job_without_a_configuration_starts_nothing(tmp_path: Path) -> None:
    assert submitted(tmp_path) == (2, [])


def test_the_script_is_clean() -> None:
    checker = shutil.which("shellcheck")
    command = [checker, str(SCRIPT)] if checker else ["bash", "-n", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variable_is_documented() -> None:
    text = SCRIPT.read_text()
    head = text[: text.index("#SBATCH")]
    used = set(re.findall(r"\$\{([A-Z_]+):-", text))
    assert (
        len(used) > 3 and [name for name in used if not name.startswith("SLURM_") and f"#   {name} " not in head] == []
    )
