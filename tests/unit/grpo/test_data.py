"""Tasks, the byte-level tokenizer, rewards and batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_rl.grpo.data import (
    EOS,
    PAD,
    VOCAB_MULTIPLE,
    Task,
    byte_tokenizer,
    decode,
    load_tokenizer,
    make_prompts,
    padded_vocab_size,
    save_tokenizer,
)
from nemo_rl.grpo.rewards import exact_match
from nemo_rl.grpo.types import Completion, Problem, Prompt, Sample, collate


@pytest.mark.parametrize("index", range(20))
def test_answers_are_right(index: int) -> None:
    sort = Task("sort", 2, 9, 1).problem("step 1", index)
    assert sort.answer == "".join(sorted(sort.question.removesuffix("=")))
    add = Task("add", 1, 5, 1).problem("step 1", index)
    a, b = add.question.removesuffix("=").split("+")
    assert int(add.answer[::-1]) == int(a) + int(b)


@pytest.mark.parametrize("name", ["sort", "add"])
def test_problems_fit_their_bounds_and_repeat(name: str) -> None:
    task = Task(name, 2, 6, 3)
    problems = [task.problem("step 1", i) for i in range(200)]
    assert max(len(p.question) for p in problems) <= task.max_prompt_tokens
    assert max(len(p.answer) + 1 for p in problems) <= task.max_answer_tokens
    assert problems == [task.problem("step 1", i) for i in range(200)]
    assert problems != [task.problem("step 2", i) for i in range(200)]
    assert problems != [Task(name, 2, 6, 4).problem("step 1", i) for i in range(200)]


@pytest.mark.parametrize(("name", "low", "high"), [("sorting", 2, 3), ("sort", 0, 3), ("add", 4, 3)])
def test_bad_tasks_are_refused(name: str, low: int, high: int) -> None:
    with pytest.raises(ValueError, match="data"):
        Task(name, low, high, 0)


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "12+34= äß€\n\t\x00 漢"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode()) and decode(tokenizer, ids) == text
    assert padded_vocab_size(tokenizer) % VOCAB_MULTIPLE == 0
    assert decode(tokenizer, [*ids, tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)]) == text


def test_saved_tokenizer_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    assert fast.encode("3142=") == own.encode("3142=").ids
    assert (fast.eos_token_id, fast.pad_token_id) == (own.token_to_id(EOS), own.token_to_id(PAD))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_reward_wants_the_answer_and_its_end() -> None:
    problem = Problem("31=", "13")
    assert exact_match(problem, "13", True) == 1.0
    assert exact_match(problem, "13", False) == 0.0
    assert exact_match(problem, "31", True) == 0.0
    assert exact_match(problem, "13 ", True) == 0.0


def test_prompts_are_numbered_groups() -> None:
    tokenizer = byte_tokenizer()
    prompts = make_prompts(Task("sort", 2, 4, 0), tokenizer, 5, 8)
    assert [p.group for p in prompts] == list(range(8))
    assert all(decode(tokenizer, p.token_ids) == p.problem.question for p in prompts)


def test_collate_aligns_logprobs_with_tokens() -> None:
    prompts = [Prompt(0, Problem("", ""), (5, 6, 7)), Prompt(1, Problem("", ""), (8,))]
    samples = [
        Sample(prompts[0], Completion((1, 2), (-0.5, -0.25), True, (0, 0)), "", 1.0),
        Sample(prompts[1], Completion((3, 4, 9), (-1.0, -2.0, -3.0), True, (0, 1, 1)), "", 0.0),
    ]
    batch = collate(samples, pad_id=0, pad_to_multiple=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 0, 0, 0], [8, 3, 4, 9, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.generator_logprobs[0, 3:5].tolist() == [-0.5, -0.25]
    assert batch.generator_logprobs[1, 1:4].tolist() == [-1.0, -2.0, -3.0]
    assert batch.lengths.tolist() == [5, 4] and batch.groups.tolist() == [0, 1]
    assert torch.equal(batch.rows(1, 2).rewards, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)
