"""Rules of a trainer that are wrong in both directions: refits agree on them, what the model computes does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from nemo_rl.trainer import families
from nemo_rl.trainer.families import Box
from nemo_rl.trainer.model import Parallel
from nemo_rl.trainer.policy import MegatronPolicy, TrainerConfig
from tests.unit.trainer.models import save_reference
from tests.unit.trainer.ranks import free_port, run_ranks

Fault = Callable[[str, list[Box]], list[Box]]


def renamed(one: str, two: str) -> Fault:
    """Each of two tensors taken for the other."""
    other = {one: two, two: one}

    def rename(key: str, found: list[Box]) -> list[Box]:
        part = {b: next((p for p in other if p in b.fqn), None) for b in found}
        return [replace(b, fqn=b.fqn.replace(part[b], other[part[b]])) if part[b] else b for b in found]

    return rename


def groups(kind: str, *places: int) -> Fault:
    """The first query groups' rows of `kind` lie where those of `places` do."""

    def move(key: str, found: list[Box]) -> list[Box]:
        mine = [b for b in found if f"{kind}_proj" in b.fqn] if "linear_qkv" in key else []
        moved = {mine[i]: mine[place].source for i, place in enumerate(places)} if mine else {}
        return [replace(b, source=moved.get(b, b.source)) for b in found]

    return move


FAULTS: dict[str, Fault] = {
    "none": lambda key, found: found,
    "two experts": renamed(".experts.0.", ".experts.1."),
    "gate and up": renamed(".gate_proj.", ".up_proj."),
    **{f"{kind} rows": groups(kind, 1, 0) for kind in "qkv"},
    "one place for two groups": groups("q", 1, 1),
}


def misruled(rank: int, meet: str, folder: str) -> dict[str, tuple[float, list[str]]]:
    """For each fault: the largest difference to transformers' log-probabilities, and what is not the checkpoint's."""
    reference = torch.load(Path(folder) / "reference.pt")
    rule, said = families.boxes, {}
    for name, fault in FAULTS.items():
        wrong = lambda shape, key, size, fault=fault: fault(key, rule(shape, key, size))  # noqa: E731
        with mock.patch.object(families, "boxes", wrong):
            config = TrainerConfig(folder, Parallel(1), keep_reference=False)
            policy = MegatronPolicy(config, rank, meet)
        difference = float((policy.logprobs(reference["ids"]) - reference["logprobs"]).abs().max())
        said[name] = difference, policy.weight_problems()
        if name == "none":
            policy.supervised_step(reference["ids"], reference["mask"])
            assert policy.weight_problems() == [], "a trained model is not the checkpoint, and need not be"
        policy.close()
        assert not dist.is_initialized()
        meet = f"tcp://127.0.0.1:{free_port()}"
    return said


def test_a_wrong_rule_computes_something_else(tmp_path: Path) -> None:
    run_ranks(save_reference, 1, "moe", {}, str(tmp_path), 3, 11)
    said = run_ranks(misruled, 1, str(tmp_path))[0]
    right, problems = said.pop("none")
    assert right < 2e-6 and problems == []
    for name, (difference, problems) in said.items():
        assert difference > 1e-3, name
        assert bool(problems) == (name == "one place for two groups"), (name, problems)
    lost = said["one place for two groups"][1]
    assert len(lost) == 3 and all("q_proj.weight [0:64, 0:64]: 4096 of 4096 elements are not" in p for p in lost)
