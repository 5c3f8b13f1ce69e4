"""What flows through a GRPO step: problems, prompts, samples and the batch that the trainers see."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


class RunError(RuntimeError):
    """The run cannot go on; the message names the step, the numbers and the remedy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question of a task and its only right answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as token ids. Samples of one `group` compete with each other."""

    group: int
    problem: Problem
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator answered to one prompt.

    Attributes:
        token_ids: sampled tokens, the end-of-sequence token included where the generator stopped by itself.
        logprobs: the generator's log-probability of each.
        finished: False where `max_new_tokens` cut it.
        versions: of the weights that sampled each token; they never fall.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    versions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions) > 0:
            raise ValueError(
                f"{len(self.token_ids)} tokens, {len(self.logprobs)} log-probabilities and {len(self.versions)} "
                f"versions: a completion has as many of each, and at least one"
            )
        if any(later < earlier for earlier, later in itertools.pairwise(self.versions)):
            raise ValueError(f"versions of a completion's tokens fall: {self.versions}")

    @property
    def oldest(self) -> int:
        """Version of the weights that sampled the first token."""
        return self.versions[0]

    @property
    def newest(self) -> int:
        """Version of the weights that sampled the last token."""
        return self.versions[-1]


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its prompt, decoded text and reward."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: float


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Samples as right-padded tensors of `num_samples` rows and `length` columns.

    Attributes:
        input_ids: prompt, then response, then padding; int64 `[N, L]`.
        lengths: tokens of each row; int64 `[N]`.
        mask: 1.0 at response tokens; column t belongs to token t of `input_ids`; float32 `[N, L]`.
        generator_logprobs: of token t given those before it, 0 where `mask` is 0; float32 `[N, L]`.
        versions: of the weights that sampled token t, -1 where `mask` is 0; int64 `[N, L]`.
        rewards: float32 `[N]`.
        groups: prompt of each row; int64 `[N]`.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    generator_logprobs: torch.Tensor
    versions: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor

    @property
    def num_samples(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> RolloutBatch:
        """The samples `start .. stop - 1`."""
        tokens = (self.input_ids, self.lengths, self.mask, self.generator_logprobs, self.versions)
        return RolloutBatch(*(column[start:stop] for column in (*tokens, self.rewards, self.groups)))


def collate(samples: list[Sample], pad_id: int, pad_to_multiple: int = 8) -> RolloutBatch:
    """Stack samples; the row length is the longest sample's, rounded up to `pad_to_multiple`.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    sizes = [len(s.prompt.token_ids) + len(s.completion.token_ids) for s in samples]
    width = -(-max(sizes) // pad_to_multiple) * pad_to_multiple
    input_ids = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(samples), width)
    logprobs = torch.zeros(len(samples), width)
    versions = torch.full((len(samples), width), -1)
    for row, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        start = len(sample.prompt.token_ids)
        input_ids[row, :size] = torch.tensor(sample.prompt.token_ids + sample.completion.token_ids)
        mask[row, start:size] = 1.0
        logprobs[row, start:size] = torch.tensor(sample.completion.logprobs)
        versions[row, start:size] = torch.tensor(sample.completion.versions)
    return RolloutBatch(
        input_ids,
        torch.tensor(sizes),
        mask,
        logprobs,
        versions,
        torch.tensor([s.reward for s in samples], dtype=torch.float32),
        torch.tensor([s.prompt.group for s in samples]),
    )
