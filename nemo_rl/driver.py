"""One GRPO run from a configuration: checks, start model, cluster, loop, summary."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from nemo_rl.actors import Actors
from nemo_rl.cluster import Cluster, ClusterError
from nemo_rl.config import ConfigError, to_yaml
from nemo_rl.grpo.data import load_tokenizer
from nemo_rl.grpo.loop import GrpoLoop
from nemo_rl.grpo.types import RunError
from nemo_rl.grpo.warmup import ensure_start_model
from nemo_rl.metrics import RunRecorder, make_run_folder, start_logging
from nemo_rl.preflight import START_MODEL, validate
from nemo_rl.schema import Config
from nemo_rl.topology import device_of, gpus_here, topology_of

log = logging.getLogger(__name__)


def run(config: Config, title: str, console: Console) -> Path:
    """Check `config`, then train. Returns the run's folder.

    Raises:
        ConfigError: the configuration cannot work; no actor was started and no folder made.
        ClusterError: actors could not be placed, died or failed; what was recorded stays in the run's folder.
        RunError: what actors answered ends the run; what was recorded stays too.
        KeyboardInterrupt: also on SIGTERM, as SLURM and Kubernetes send it; actors are closed.
    """
    console.print("checking the configuration", style="dim")
    if problems := validate(config):
        raise ConfigError(problems)
    folder = make_run_folder(Path(config.logger.log_dir), config.logger.run_name, title)
    start_logging(folder, config.logger.level, console)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    model_path = _model_path(config, console)
    topology, _ = topology_of(config)
    console.print(
        f"starting {topology.num_trainers} trainer ranks and {topology.num_replicas} generators of "
        f"{topology.generator_size} rank(s)",
        style="dim",
    )
    try:
        with (
            Cluster(config.cluster, topology, device_of(config)) as cluster,
            _interrupted_by_sigterm(),
            Actors(config, model_path, topology, device_of(config), cluster) as actors,
        ):
            _train(config, title, folder, model_path, actors, console)
    except (ClusterError, RunError):
        log.info("the run ended early", exc_info=True)
        raise
    return folder


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is: Ray's own handler, which it sets when it starts, aborts the process."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_token_ids(model_path: Path) -> tuple[int, ...]:
    """End-of-sequence tokens of a checkpoint: `generation_config.json` before `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = model_path / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def _model_path(config: Config, console: Console) -> Path:
    if config.policy.model_name != START_MODEL:
        return Path(config.policy.model_name).resolve()
    console.print("preparing the start model", style="dim")
    return ensure_start_model(config, device_of(config) if gpus_here() else "cpu").resolve()


def _train(config: Config, title: str, folder: Path, model_path: Path, actors: Actors, console: Console) -> None:
    trainers, generators, refitter = actors.groups(stop_token_ids(model_path))
    log.info("%s", refitter.connect())
    options = dict(bar=config.logger.progress and console.is_terminal, tensorboard=config.logger.tensorboard_enabled)
    with RunRecorder(folder, title, config.grpo.max_num_steps, console, **options) as recorder:
        loop = GrpoLoop(config, load_tokenizer(model_path), trainers, generators, refitter, recorder.record)
        try:
            loop.run()
        finally:
            recorder.summarize()
