"""What flows through a GRPO step: problems, prompts, samples and the batch that the trainers see."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        weight_version: version of the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    weight_version: int

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probabilities")


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
        rewards: float32 `[N]`.
        groups: prompt of each row; int64 `[N]`.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    generator_logprobs: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor

    @property
    def num_samples(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> RolloutBatch:
        """The samples `start .. stop - 1`."""
        columns = (self.input_ids, self.lengths, self.mask, self.generator_logprobs, self.rewards, self.groups)
        return RolloutBatch(*(column[start:stop] for column in columns))


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
    for row, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        start = len(sample.prompt.token_ids)
        input_ids[row, :size] = torch.tensor(sample.prompt.token_ids + sample.completion.token_ids)
        mask[row, start:size] = 1.0
        logprobs[row, start:size] = torch.tensor(sample.completion.logprobs)
    return RolloutBatch(
        input_ids,
        torch.tensor(sizes),
        mask,
        logprobs,
        torch.tensor([s.reward for s in samples], dtype=torch.float32),
        torch.tensor([s.prompt.group for s in samples]),
    )
