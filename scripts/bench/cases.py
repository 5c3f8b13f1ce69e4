"""What is timed: models by their sizes, and the table of cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nemo_rl.trainer.model import Parallel
from nemo_rl.trainer.shape import ModelShape

NO_VERIFY = " no verify"
"""Behind a transport's name: without digests."""

LINKS = "links"
"""The variant that measures the ceilings of a case's ranks; it comes first."""


def _qwen3(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, vocab: int, tied: bool) -> ModelShape:
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        ffn_size=ffn,
        vocab_size=vocab,
        max_positions=4096,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied_embeddings=tied,
        qkv_bias=False,
        qk_norm=True,
        sparse_layers=(False,) * layers,
    )


def _qwen3_moe(layers: int, hidden: int, heads: int, kv_heads: int, experts: int, width: int, vocab: int) -> ModelShape:
    return replace(
        _qwen3(layers, hidden, heads, kv_heads, 0, vocab=vocab, tied=False),
        architecture="Qwen3MoeForCausalLM",
        sparse_layers=(True,) * layers,
        num_experts=experts,
        experts_per_token=min(8, experts),
        expert_ffn_size=width,
    )


MODELS: Mapping[str, ModelShape] = {
    "Qwen3-30B-A3B": _qwen3_moe(48, 2048, 32, 4, 128, 768, 151936),
    "Qwen3-4B": _qwen3(36, 2560, 32, 8, 9728, vocab=151936, tied=True),
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 8, 3072, vocab=151936, tied=True),
    "small MoE": replace(_qwen3_moe(6, 64, 8, 4, 6, 48, 384), head_dim=16),
    "small dense": replace(_qwen3(6, 64, 8, 4, 96, vocab=384, tied=True), head_dim=16),
}
"""Sizes as the published configurations say; the small ones for tries."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The generators: `replicas` engines of `tp` ranks each.

    Attributes:
        present: of these ranks, how many there are, from the first on; None for all.
    """

    tp: int = 1
    replicas: int = 1
    present: int | None = None

    @property
    def num_ranks(self) -> int:
        return self.tp * self.replicas if self.present is None else self.present


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one pair of layouts, and the variants that are timed with it.

    Attributes:
        one_buffer: a trainer's parameters lie in one buffer, as Megatron's distributed optimizer keeps them, instead of
            one allocation each.
        shared: all trainers are on one GPU and all generators on another, so that they share one link.
        stand_in: for machines with too few GPUs for the other cases.
        profile: kernels and copies of one more refit are counted.
        repeat: timed refits; one more comes before them. Slow variants take `SLOW_REPEAT`.
    """

    name: str
    model: str
    trainers: Parallel
    engines: Engines
    variants: tuple[str, ...]
    one_buffer: bool = False
    shared: bool = False
    stand_in: bool = False
    layers: int | None = None
    profile: bool = False
    repeat: int = 7

    @property
    def shape(self) -> ModelShape:
        """Of the model, or of its first `layers` layers."""
        whole = MODELS[self.model]
        if self.layers is None:
            return whole
        return replace(whole, num_layers=self.layers, sparse_layers=whole.sparse_layers[: self.layers])

    @property
    def num_ranks(self) -> int:
        return self.trainers.world_size + self.engines.num_ranks

    @property
    def num_devices(self) -> int:
        return 2 if self.shared else self.num_ranks

    def device_of(self, rank: int) -> int:
        return int(rank >= self.trainers.world_size) if self.shared else rank

    def repeats(self, variant: str) -> int:
        return min(self.repeat, SLOW_REPEAT) if variant.split()[0] in SLOW else self.repeat


SLOW = ("auto", "broadcast", "golden", "m2n", "gloo", "vllm", "checkpoint-engine")
SLOW_REPEAT = 3

PEER = ("peer" + NO_VERIFY, "peer")
NCCL = ("nccl" + NO_VERIFY, "nccl")
M2N = ("m2n" + NO_VERIFY,)
CONVENTIONAL = ("broadcast" + NO_VERIFY,)
AUTO = ("auto" + NO_VERIFY,)
MOST = (LINKS, *PEER, "nccl" + NO_VERIFY, *CONVENTIONAL, *AUTO)
EVERY = (LINKS, *PEER, *NCCL, *CONVENTIONAL, *AUTO, "auto", *M2N)

_ONE = Parallel(1)
_EP2 = Parallel(2, expert=2)
_TP2 = Parallel(2, tensor=2)
_PP2 = Parallel(2, pipeline=2)
_MOE, _DENSE, _TINY = "Qwen3-30B-A3B", "Qwen3-4B", "Qwen3-0.6B"
_TWO_RANKS = Engines(2)
_FIRST_OF_TWO = Engines(2, present=1)

_FOUR: tuple[Case, ...] = (
    Case("30B EP2 -> TP2", _MOE, _EP2, _TWO_RANKS, EVERY, profile=True),
    Case("4B TP2 -> TP2", _DENSE, _TP2, _TWO_RANKS, EVERY, profile=True, repeat=15),
    Case("0.6B TP2 -> TP2", _TINY, _TP2, _TWO_RANKS, EVERY, profile=True, repeat=15),
    Case("30B 1 -> 3 replicas", _MOE, _ONE, Engines(1, 3), MOST),
    Case("30B TP2 -> 2 replicas", _MOE, Parallel(2, tensor=2, expert_tensor=2), Engines(1, 2), MOST),
    Case("30B PP2 -> TP2", _MOE, _PP2, _TWO_RANKS, MOST),
    Case("30B EP2 TP2 -> TP2", _MOE, Parallel(2, tensor=2, expert=2), _TWO_RANKS, MOST),
    Case("30B PP3 -> 1", _MOE, Parallel(3, pipeline=3), Engines(1), MOST),
    Case("30B EP2 -> TP2 one buffer", _MOE, _EP2, _TWO_RANKS, (LINKS, *PEER), one_buffer=True),
    Case("30B 2 layers EP2 -> TP2", _MOE, _EP2, _TWO_RANKS, (LINKS, *PEER, "broadcast", "golden"), layers=2, repeat=3),
    Case("30B EP2 -> TP2 by vLLM", _MOE, _EP2, _TWO_RANKS, (LINKS, "vllm")),
    Case("30B 8 layers EP2 -> TP2", _MOE, _EP2, _TWO_RANKS, (LINKS, PEER[0], "vllm", "checkpoint-engine"), layers=8),
)

_TWO: tuple[Case, ...] = tuple(
    replace(case, stand_in=True)
    for case in (
        Case("30B 1 -> first of TP2", _MOE, _ONE, _FIRST_OF_TWO, EVERY, profile=True),
        Case("0.6B 1 -> first of TP2", _TINY, _ONE, _FIRST_OF_TWO, MOST, profile=True),
        Case("4B 1 -> first of TP2", _DENSE, _ONE, _FIRST_OF_TWO, EVERY, profile=True),
        Case("30B 1 -> 1", _MOE, _ONE, Engines(1), MOST),
        Case("30B EP2 -> TP2 over one link", _MOE, _EP2, _TWO_RANKS, (LINKS, *PEER), shared=True),
        Case("30B PP2 -> TP2 over one link", _MOE, _PP2, _TWO_RANKS, (LINKS, *PEER), shared=True),
        Case("4B 1 -> 3 replicas over one link", _DENSE, _ONE, Engines(1, 3), (LINKS, *PEER), shared=True),
        Case("30B 1 -> first of TP2 by vLLM", _MOE, _ONE, _FIRST_OF_TWO, (LINKS, "vllm")),
        Case("30B 2 layers 1 -> 1", _MOE, _ONE, Engines(1), (LINKS, *PEER, "broadcast", "golden"), layers=2),
        Case("30B 8 layers 1 -> 1", _MOE, _ONE, Engines(1), (LINKS, PEER[0], "vllm", "checkpoint-engine"), layers=8),
    )
)

CASES = _FOUR + _TWO
"""In order of weight: what comes first is measured first."""

_ON_CPU = ("gloo", *PEER, "broadcast", "golden")

SMALL: tuple[Case, ...] = (
    Case("small MoE EP2 -> TP2", "small MoE", _EP2, Engines(2), ("gloo" + NO_VERIFY, *_ON_CPU)),
    Case("small dense TP2 -> 2 replicas", "small dense", _TP2, Engines(1, 2), _ON_CPU),
)
"""Tries of every kind that a CPU can do."""
