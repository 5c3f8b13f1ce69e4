"""The command line: `nemo-rl plan` shows a refit's plan without engines, devices or weights.

    nemo-rl plan --config examples/configs/grpo_qwen3_moe_tiny_cpu.yaml
    nemo-rl plan --model examples/models/deepseek_v3 --trainer pp=16,ep=16 --generator tp=32,dp=8 --html plan.html
    nemo-rl plan --diff before.json after.json

Exits with 2 where a plan is refused, with the reason, and with 130 where it is interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from nemo_rl.config import ConfigError, inherited_environment, load_config
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.planview import build
from nemo_rl.planview.difference import print_difference
from nemo_rl.planview.html import render
from nemo_rl.planview.model import PlanView, load_view
from nemo_rl.planview.picture import draw
from nemo_rl.planview.predict import Links
from nemo_rl.planview.text import print_view
from nemo_rl.preflight import engine_of, model_folder
from nemo_rl.schema import Config
from nemo_rl.topology import parallel_of, topology_of
from nemo_rl.trainer.model import Parallel, model_shape, read_config


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        return _difference(options, console) if options.diff else _plan(options, console)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"nemo-rl plan: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-rl", description="Weight refits of RL post-training.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="plan a refit without engines, devices or weights, and show it")
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML file of a GRPO run")
    what.add_argument("--model", type=Path, help="folder with a Hugging Face config.json; no weights are read")
    what.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"), help="compare two: saved plans or YAML files")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML file")
    plan.add_argument("--trainer", metavar="tp=2,pp=2", help=_keys(build.TRAINER_KEYS))
    kinds = f"{_keys(build.GENERATOR_KEYS)}; once for each kind of engine"
    plan.add_argument("--generator", metavar="tp=4,dp=2", action="append", help=kinds)
    plan.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"), help="with --model")
    plan.add_argument("--bucket-bytes", type=int, help="largest message")
    plan.add_argument("--gpus-per-node", type=int, help="ranks of a host (default: the file's, or 8)")
    rates = Links()
    plan.add_argument("--node-gb-per-s", type=float, default=rates.node_gb_per_s, help="link of ranks of one host")
    plan.add_argument("--network-gb-per-s", type=float, default=rates.network_gb_per_s, help="a rank's link to others")
    plan.add_argument("--latency-us", type=float, default=rates.latency_us, help="of a message")
    plan.add_argument("--html", type=Path, help="write a page with drawings, in one file without outside resources")
    plan.add_argument("--png", type=Path, help="write a picture")
    plan.add_argument("--json", type=Path, help="save the numbers, for --diff")
    return parser


def _keys(known: Mapping[str, str]) -> str:
    return "; ".join(f"{key}: {text}" for key, text in known.items())


def _plan(options: argparse.Namespace, console: Console) -> int:
    started = time.monotonic()
    view = _view(options, options.config)
    print_view(view, console)
    console.print(f"planned in {time.monotonic() - started:.1f} s", style="dim", highlight=False)
    for path, text in ((options.html, render), (options.json, PlanView.to_json)):
        if path is not None:
            path.write_text(text(view), encoding="utf-8")
    if options.png is not None:
        draw(view, options.png)
    return 0


def _difference(options: argparse.Namespace, console: Console) -> int:
    a, b = (load_view(p) if p.suffix == ".json" else _view(options, p) for p in options.diff)
    print_difference(a, b, console)
    return 0


def _view(options: argparse.Namespace, path: Path | None) -> PlanView:
    with tempfile.TemporaryDirectory() as scratch:
        request = _of_model(options) if path is None else _of_config(options, path, Path(scratch))
        links = Links(options.node_gb_per_s, options.network_gb_per_s, options.latency_us)
        request = dataclasses.replace(request, links=links)
        for name in ("bucket_bytes", "gpus_per_node"):
            if getattr(options, name) is not None:
                request = dataclasses.replace(request, **{name: getattr(options, name)})
        return build.build(_with_sides(request, options), inherited_environment())


def _of_model(options: argparse.Namespace) -> build.PlanRequest:
    """One rank a side until `--trainer` and `--generator` say more."""
    fleet = (build.Engines(EngineSpec(str(options.model), precision=options.precision)),)
    dtype = getattr(torch, options.precision)
    return build.PlanRequest(options.model.resolve().name, options.model, Parallel(1), fleet, dtype=dtype)


def _of_config(options: argparse.Namespace, path: Path, scratch: Path) -> build.PlanRequest:
    config = load_config(path, options.overrides)
    topology, problems = topology_of(config)
    if problems:
        raise ConfigError(problems)
    folder = model_folder(config, scratch)
    refit = config.policy.refit
    return build.PlanRequest(
        title=path.stem,
        folder=folder,
        parallel=parallel_of(config, topology.num_trainers),
        fleet=(build.Engines(engine_of(config, folder), topology.num_replicas),),
        dtype=getattr(torch, config.policy.precision),
        bucket_bytes=refit.bucket_bytes,
        num_streams=refit.num_streams,
        gpus_per_node=config.cluster.gpus_per_node,
        all_misc=_conventional(config),
    )


def _conventional(config: Config) -> str | None:
    return None if config.policy.nccl_xfer_refit else "conventional refit (policy.nccl_xfer_refit=false)"


def _with_sides(request: build.PlanRequest, options: argparse.Namespace) -> build.PlanRequest:
    """`--trainer` and `--generator` in place of what the file says."""
    if options.trainer is not None:
        shape = model_shape(read_config(request.folder))
        parallel = build.parse_trainer(options.trainer, shape.num_layers, moe=shape.is_moe)
        notes = request.notes
        if parallel.pipeline_layers is not None:
            layers = ":".join(map(str, parallel.pipeline_layers))
            notes = (*notes, f"{shape.num_layers} layers over the trainers' pipeline chunks as {layers}")
        request = dataclasses.replace(request, parallel=parallel, notes=notes)
    if options.generator:
        fleet = tuple(build.parse_generator(text, request.fleet[0].spec) for text in options.generator)
        request = dataclasses.replace(request, fleet=fleet)
    return request


if __name__ == "__main__":
    sys.exit(main())
