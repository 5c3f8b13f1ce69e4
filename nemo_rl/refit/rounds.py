"""Rounds that pair ranks: when each message goes, known from its two ends alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SIZES = 64  # classes of messages by the power of two of their bytes


@dataclass(frozen=True, eq=False)
class Timetable:
    """Round of each message. Within a round a rank sends at most one message and receives at most one.

    Trainers fall into stages with no tensor in common (pipeline stages), generators into as many blocks. Block b
    begins with stage b and goes on with the next, so that each stage serves one block at any time. In a stage a
    block takes one wave after the other, and in a wave large messages before small ones: each pair its first, then each
    its second, and so on. The trainer at position s of its stage and the generator at position d of its block meet in
    phase `s XOR d`: in one phase a rank has one peer, and 2**k ranks of each side meet in 2**k phases.

    A rank knows its own rounds without the messages of others. An exact coloring of all messages has fewer rounds, as
    many as the busiest rank has messages, but takes all messages to find. That does not pay: no rank waits for a round
    to end, so what counts is how long ranks wait for each other when each keeps this order. With messages as long
    as their bytes, the busiest rank of DeepSeek-V3 PP16 x EP16 -> TP32 x DP8 and of Qwen3-30B-A3B EP8 x PP2 ->
    TP8 x DP2 with a unit per module never waits; without units and in 16 MiB messages they wait 2% of the time, 64
    FSDP ranks -> TP8 x DP4 2%, and 30% where units are small. `tests/unit/refit/test_scale.py` keeps such bounds.
    Numbers have gaps where pairs have nothing to send.

    Attributes:
        src, dst: ranks, ascending; the others are in their order.
        src_stage, src_place, dst_block, dst_place: position of each rank.
        step: tensor -> stage and wave in one number, `stage * num_waves + wave`.
        num_stages, num_waves: waves of the stage that has most.
        num_messages: more than any pair has in one wave.
    """

    src: np.ndarray
    dst: np.ndarray
    src_stage: np.ndarray
    src_place: np.ndarray
    dst_block: np.ndarray
    dst_place: np.ndarray
    step: np.ndarray
    num_stages: int
    num_waves: int
    num_messages: int

    @classmethod
    def of(
        cls,
        src: np.ndarray,
        dst: np.ndarray,
        src_stage: np.ndarray,
        tensor_stage: np.ndarray,
        wave: np.ndarray,
        num_messages: int,
    ) -> Timetable:
        """`wave`: tensor -> number among the waves of its stage."""
        num_stages, num_waves = int(src_stage.max(initial=0)) + 1, int(wave.max(initial=0)) + 1
        block = np.arange(len(dst)) * num_stages // max(len(dst), 1)
        step = tensor_stage * num_waves + wave
        places = _place(src_stage), block, _place(block)
        return cls(src, dst, src_stage, *places, step, num_stages, num_waves, num_messages)

    def rounds(
        self, src: np.ndarray, dst: np.ndarray, step: np.ndarray, number: np.ndarray, num_bytes: np.ndarray
    ) -> np.ndarray:
        """Of messages from the `src`-th trainer to the `dst`-th generator, `number`-th of their pair and `step`."""
        bits = int(max(self.src_place.max(initial=0), self.dst_place.max(initial=0))).bit_length()
        first = self.dst_block[dst] * self.num_waves
        turn = (step - first) % (self.num_stages * self.num_waves)
        phase = self.src_place[src] ^ self.dst_place[dst]
        smaller = _SIZES - np.frexp(num_bytes.astype(np.float64))[1]  # powers of two, descending
        found: np.ndarray = (((turn * _SIZES + smaller) * self.num_messages + number) << bits) + phase
        return found

    def turns(self) -> np.ndarray:
        """Generators in the order in which replicas of trainers share them out: neighbours of a block, which are
        served at the same time, far from each other, and so those at the same place of different blocks."""
        size = int(self.dst_place.max(initial=0)) + 1
        order: np.ndarray = np.lexsort((self.dst_block, (self.dst_place + self.dst_block) % size))
        return order


def _place(group: np.ndarray) -> np.ndarray:
    """Position of each entry among those of its group."""
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], group[order])
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - first
    return place
