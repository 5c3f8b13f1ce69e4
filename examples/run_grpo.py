"""Train a model with GRPO: `run_grpo.py --config examples/configs/grpo_qwen3_tiny_cpu.yaml key=value ...`.

The keys are those of `nemo_rl/schema.py`. Exits with 2 where the configuration is refused, with 1 where the run fails,
with 130 where it is interrupted, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from rich.console import Console

from nemo_rl.config import ConfigError, load_config
from nemo_rl.schema import Config

DEFAULT = Path(__file__).parent / "configs" / "grpo_qwen3_tiny_cpu.yaml"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train a model with GRPO.")
    parser.add_argument("--config", type=Path, default=DEFAULT, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        return train(config, options.config.stem)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def train(config: Config, title: str) -> int:
    """Run, and say in one message why a run ended early."""
    # Megatron says at every import what it does without Transformer Engine and Apex.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    from nemo_rl.cluster import ClusterError
    from nemo_rl.driver import run
    from nemo_rl.grpo.types import RunError

    try:
        run(config, title, Console())
    except (ClusterError, RunError) as error:
        sys.stderr.write(f"the run failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what was recorded is in the run's folder\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
