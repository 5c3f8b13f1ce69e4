"""Rewards that a program can check."""

from __future__ import annotations

from nemo_rl.grpo.types import Problem


def exact_match(problem: Problem, text: str, finished: bool) -> float:
    """1.0 where the text is the answer and the generator ended it by itself, else 0.0."""
    return 1.0 if finished and text == problem.answer else 0.0
