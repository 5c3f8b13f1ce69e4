"""Which ranks a configuration asks for, and on what: trainers first, then the workers of every generator replica."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_rl.schema import Config
from nemo_rl.trainer.model import Parallel


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks of one run.

    Attributes:
        num_trainers: Megatron ranks.
        num_replicas: vLLM engines.
        generator_size: tensor-parallel ranks of each engine.
        shared: device i holds trainer rank i and generator rank i; else each rank has a device of its own.
    """

    num_trainers: int
    num_replicas: int
    generator_size: int
    shared: bool = False

    @property
    def num_generators(self) -> int:
        """Generator ranks of all replicas."""
        return self.num_replicas * self.generator_size

    def first_rank(self, replica: int) -> int:
        """World rank of the first worker of `replica`."""
        return self.num_trainers + replica * self.generator_size


def device_of(config: Config) -> str:
    """`cpu` or `cuda`: what all ranks compute on."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if gpus_here() else "cpu"


def gpus_here() -> bool:
    """Whether torch finds a GPU on this machine; a cluster's driver may be on one that has none."""
    return torch.cuda.is_available()


def topology_of(config: Config) -> tuple[Topology, list[str]]:
    """The ranks that `config` asks for, and everything that is wrong with their numbers, with the remedy.

    Generators take `policy.generation.colocated.resources`, or what the smallest trainer layout leaves over; trainers
    take the rest. Where both are on the same devices, all of them hold a rank of either kind.
    """
    megatron, resources = config.policy.megatron_cfg, config.policy.generation.colocated.resources
    size, cluster = config.policy.generation.vllm_cfg.tensor_parallel_size, config.cluster
    problems = [f"{key}={value}: at least 1 is needed" for key, value in parallel_sizes(config).items() if value < 1]
    if problems:
        return Topology(1, 1, 1), problems
    total = cluster.gpus_per_node * cluster.num_nodes
    shared = config.policy.generation.colocated.enabled
    stage = megatron.pipeline_model_parallel_size
    dense = megatron.tensor_model_parallel_size * stage * megatron.context_parallel_size
    sparse = megatron.expert_model_parallel_size * megatron.expert_tensor_parallel_size * stage
    smallest = max(dense, sparse)
    asked = resources.gpus_per_node
    generators = total - smallest if asked is None else asked * (resources.num_nodes or 1)
    trainers = total - generators
    if shared:
        generators = trainers = total
    devices = f"cluster.gpus_per_node={cluster.gpus_per_node} x cluster.num_nodes={cluster.num_nodes} = {total} devices"
    key = "policy.generation.colocated.resources.gpus_per_node"
    if generators < size or trainers < smallest:
        problems.append(
            f"more ranks than resources: trainers need {smallest} (TP x PP = {dense}, EP x ETP x PP = {sparse}), one "
            f"generator needs {size}, and there are {devices}, {max(generators, 0)} of them for generators; raise "
            f"cluster.gpus_per_node or cluster.num_nodes, or lower the parallel sizes or {key}"
        )
    else:
        problems += [
            f"{trainers} trainer ranks are not a multiple of {name} = {part}; change {key} or cluster.gpus_per_node"
            for name, part in {"TP x PP": dense, "EP x ETP x PP": sparse}.items()
            if trainers % part
        ]
        if generators % size:
            problems.append(
                f"{generators} generator devices are not a multiple of policy.generation.vllm_cfg.tensor_parallel_size="
                f"{size}; change {key} or the parallel size"
            )
    return Topology(max(trainers, 1), max(generators // size, 1), size, shared), problems


def parallel_of(config: Config, world_size: int) -> Parallel:
    """How `world_size` trainer ranks are laid out."""
    megatron = config.policy.megatron_cfg
    return Parallel(
        world_size,
        tensor=megatron.tensor_model_parallel_size,
        pipeline=megatron.pipeline_model_parallel_size,
        expert=megatron.expert_model_parallel_size,
        expert_tensor=megatron.expert_tensor_parallel_size,
        pipeline_layers=megatron.pipeline_layers,
        sequence_parallel=megatron.sequence_parallel,
        context=megatron.context_parallel_size,
        virtual_pipeline=megatron.virtual_pipeline_model_parallel_size,
        first_layers=megatron.num_layers_in_first_pipeline_stage,
        last_layers=megatron.num_layers_in_last_pipeline_stage,
        count_embedding=megatron.account_for_embedding_in_pipeline_split,
        count_loss=megatron.account_for_loss_in_pipeline_split,
    )


def parallel_sizes(config: Config) -> dict[str, int]:
    """Key -> value of every size that must be at least 1."""
    megatron, resources = config.policy.megatron_cfg, config.policy.generation.colocated.resources
    prefix = "policy.megatron_cfg."
    sizes = {
        "cluster.gpus_per_node": config.cluster.gpus_per_node,
        "cluster.num_nodes": config.cluster.num_nodes,
        f"{prefix}tensor_model_parallel_size": megatron.tensor_model_parallel_size,
        f"{prefix}pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
        f"{prefix}virtual_pipeline_model_parallel_size": megatron.virtual_pipeline_model_parallel_size,
        f"{prefix}context_parallel_size": megatron.context_parallel_size,
        f"{prefix}expert_model_parallel_size": megatron.expert_model_parallel_size,
        f"{prefix}expert_tensor_parallel_size": megatron.expert_tensor_parallel_size,
        "policy.generation.vllm_cfg.tensor_parallel_size": config.policy.generation.vllm_cfg.tensor_parallel_size,
    }
    for name, value in (("gpus_per_node", resources.gpus_per_node), ("num_nodes", resources.num_nodes)):
        if value is not None:
            sizes[f"policy.generation.colocated.resources.{name}"] = value
    return sizes
