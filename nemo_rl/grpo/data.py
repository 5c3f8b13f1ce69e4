"""Tasks made by a program, and the byte-level tokenizer they are written with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from nemo_rl.grpo.types import Problem, Prompt

PAD, EOS = "<pad>", "<eos>"
VOCAB_MULTIPLE = 16
TASKS = ("add", "sort")


@dataclass(frozen=True, slots=True)
class Task:
    """A source of problems. Equal `(stream, index)` give equal problems on any machine.

    Attributes:
        name: `sort` or `add`.
        min_items, max_items: bounds of a problem's size.
        seed: of the run.

    Raises:
        ValueError: the name is unknown or the bounds are empty.
    """

    name: str
    min_items: int
    max_items: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"data.task={self.name!r} is unknown; choose one of {', '.join(TASKS)}")
        if not 1 <= self.min_items <= self.max_items:
            raise ValueError(
                f"data.min_items={self.min_items}, data.max_items={self.max_items}: 1 <= min <= max is needed"
            )

    def problem(self, stream: str, index: int) -> Problem:
        """Problem `index` of `stream` (a step, or a warm-up); streams are independent of each other."""
        rng = random.Random(f"{self.seed}/{stream}/{index}")
        size = rng.randint(self.min_items, self.max_items)
        if self.name == "sort":
            digits = [rng.choice("0123456789") for _ in range(size)]
            return Problem("".join(digits) + "=", "".join(sorted(digits)))
        a, b = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
        # The answer's digits run from the ones up, the order in which carries are known.
        return Problem(f"{a}+{b}=", str(a + b)[::-1])

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_items + 1 if self.name == "sort" else 2 * self.max_items + 2

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of the longest answer, its end included."""
        return self.max_items + 1 if self.name == "sort" else self.max_items + 2


def byte_tokenizer() -> Tokenizer:
    """One token per byte, `<pad>` and `<eos>`; the ids of bytes follow the tokens' order in the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the vocabulary rounded up so that tensor parallelism divides it."""
    return -(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def save_tokenizer(folder: Path) -> None:
    """Write the byte tokenizer so that transformers and vLLM load it from `folder`."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), pad_token=PAD, eos_token=EOS)
    fast.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint. Raises FileNotFoundError naming the missing file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; save the checkpoint's fast tokenizer beside it")
    return Tokenizer.from_file(str(path))


def make_prompts(task: Task, tokenizer: Tokenizer, step: int, count: int) -> list[Prompt]:
    """The `count` prompts of a step, the same in every run of the same seed."""
    problems = [task.problem(f"step {step}", index) for index in range(count)]
    return [
        Prompt(group, problem, tuple(tokenizer.encode(problem.question, add_special_tokens=False).ids))
        for group, problem in enumerate(problems)
    ]


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of a response, without special tokens."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)
