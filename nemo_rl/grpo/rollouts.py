"""Rollouts: prompts go to the generator replicas, completions come back as samples with rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

from nemo_rl.grpo.data import decode
from nemo_rl.grpo.types import Completion, Problem, Prompt, Sample

Reward = Callable[[Problem, str, bool], float]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How every prompt is answered: `num_samples` times, at `temperature`, in at most `max_new_tokens` tokens."""

    num_samples: int
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one replica is asked: prompts as token ids, and for each prompt the seed of its samples."""

    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    sampling: SamplingOptions


class Generators(Protocol):
    """All replicas."""

    @property
    def num_replicas(self) -> int: ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
        """Answer request i on replica i, all at once; completions by replica, prompt and sample."""


def sample_seed(seed: int, step: int, group: int) -> int:
    """Seed of the samples of prompt `group` of `step`: equal in every run, whatever the number of replicas."""
    digest = hashlib.sha256(f"{seed}/{step}/{group}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def split_requests(
    prompts: Sequence[Prompt], num_replicas: int, sampling: SamplingOptions, seed: int, step: int
) -> list[GenerationRequest]:
    """Neighbouring prompts stay together; sizes differ by at most one, and a replica may get none."""
    requests = []
    for replica in range(num_replicas):
        share = prompts[replica * len(prompts) // num_replicas : (replica + 1) * len(prompts) // num_replicas]
        seeds = tuple(sample_seed(seed, step, p.group) for p in share)
        requests.append(GenerationRequest(tuple(p.token_ids for p in share), seeds, sampling))
    return requests


def rollout(
    generators: Generators,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingOptions,
    reward: Reward,
    *,
    seed: int,
    step: int,
) -> list[Sample]:
    """Samples of all prompts, in the order of the prompts.

    Raises:
        RuntimeError: a replica answered another number of prompts or samples than it was asked for.
    """
    requests = split_requests(prompts, generators.num_replicas, sampling, seed, step)
    answered = generators.generate(requests)
    for replica, (request, answers) in enumerate(zip(requests, answered, strict=True)):
        counts = [len(a) for a in answers]
        if counts != [sampling.num_samples] * len(request.prompts):
            raise RuntimeError(
                f"generator {replica} was asked for {len(request.prompts)} x {sampling.num_samples} samples "
                f"but answered {counts}"
            )
    flat = [completions for answers in answered for completions in answers]
    return [
        _sample(tokenizer, prompt, completion, reward)
        for prompt, completions in zip(prompts, flat, strict=True)
        for completion in completions
    ]


def _sample(tokenizer: Tokenizer, prompt: Prompt, completion: Completion, reward: Reward) -> Sample:
    text = decode(tokenizer, completion.token_ids)
    return Sample(prompt, completion, text, reward(prompt.problem, text, completion.finished))
