"""A model's weights in memory as Megatron's trainers and vLLM's generators hold them, without either.

Trainers follow the same family rules that live trainers and `nemo_rl.trainer.simulated` follow. What a vLLM rank holds
is written down here once more, in the names of its parameters; tests compare both with the simulated ones, and
generators' storage with the traces of vLLM's own loaders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Holding, Layout, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.families import Weight
from nemo_rl.trainer.model import Parallel, padded_vocabulary
from nemo_rl.trainer.shape import ModelShape
from nemo_rl.trainer.simulated import Coordinate, chunk_of, stage_of_layer
from scripts.bench.cases import Engines
from scripts.bench.values import Cell, Values

DTYPE = torch.bfloat16
Placed = tuple[str, Region, torch.Tensor]
"""Tensor, the box of it, and the view that holds the box."""


class Store:
    """Memory of one rank: an allocation for each parameter, or one for all of them.

    Attributes:
        parameters: name -> tensor.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = 0) -> None:
        self._device = device
        self._buffer = torch.empty(buffer_bytes // DTYPE.itemsize, dtype=DTYPE, device=device) if buffer_bytes else None
        self._used = 0
        self.parameters: dict[str, torch.Tensor] = {}

    def make(self, name: str, *sizes: int) -> torch.Tensor:
        if self._buffer is None:
            made = torch.empty(sizes, dtype=DTYPE, device=self._device)
        else:
            count = math.prod(sizes)
            made = self._buffer[self._used : self._used + count].view(sizes)
            self._used += -(-count // 64) * 64
        self.parameters[name] = made
        return made

    def scramble(self) -> None:
        """Random bytes everywhere."""
        for tensor in self.parameters.values():
            tensor.view(torch.int16).random_(-(1 << 15), 1 << 15)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.parameters.values())


# ---- trainers


def trainer_rows(shape: ModelShape, parallel: Parallel, rank: int, store: Store) -> list[Placed]:
    """What a Megatron rank holds; a box that it holds twice (a tied output layer) once."""
    found: dict[tuple[str, Region], torch.Tensor] = {}
    for weight, part in held_weights(shape, parallel, rank):
        local = _allocate(store, weight, part)
        for fqn, region, common in families.parts(families.boxes(shape, weight.key, weight.size), part):
            found.setdefault((fqn, region), local[common.slices_in(part)])
    return [(fqn, region, view) for (fqn, region), view in found.items()]


def held_weights(shape: ModelShape, parallel: Parallel, rank: int) -> Iterator[tuple[Weight, Region]]:
    """Megatron's tensors of a rank, each with the part of it that the rank holds."""
    at, stages = Coordinate.of(rank, parallel), stage_of_layer(shape, parallel)
    num_local = max(shape.num_experts // parallel.expert, 1)
    for weight in families.weights(shape, padded_vocabulary(shape, parallel)):
        if stages[weight.layer] != at.pipeline:
            continue
        if weight.expert is None:
            yield weight, chunk_of(weight, at.tensor, parallel.tensor)
        elif weight.expert // num_local == at.expert:
            yield weight, chunk_of(weight, at.expert_tensor, parallel.expert_tensor)


def _allocate(store: Store, weight: Weight, part: Region) -> torch.Tensor:
    """The rank's tensor; gate (`weight_w`) and up (`weight_v`) are halves of one `linear_fc1`."""
    name, half = weight.key, part.sizes[0]
    if not name.endswith(("weight_w", "weight_v")):
        return store.parameters[name] if name in store.parameters else store.make(name, *part.sizes)
    name = name.removesuffix("_w").removesuffix("_v")
    both = store.parameters[name] if name in store.parameters else store.make(name, 2 * half, *part.sizes[1:])
    return both[:half] if weight.key.endswith("_w") else both[half:]


def trainer_bytes(shape: ModelShape, parallel: Parallel, rank: int) -> int:
    """Enough for a buffer of all parameters of a rank."""
    sizes = (part.volume * DTYPE.itemsize for _, part in held_weights(shape, parallel, rank))
    return sum(-(-size // 128) * 128 for size in sizes)


# ---- generators


def generator_rows(shape: ModelShape, engines: Engines, rank: int, store: Store) -> list[Placed]:
    """What a vLLM rank of a Qwen3 or Qwen3-MoE engine holds; `rank` counts over all engines."""
    return list(_Rank(shape, engines.tp, rank % engines.tp, store).rows())


@dataclass(frozen=True, slots=True)
class _Rank:
    """One tensor-parallel rank of an engine."""

    shape: ModelShape
    tp: int
    at: int
    store: Store

    def rows(self) -> Iterator[Placed]:
        s = self.shape
        ends = ["model.embed_tokens"] if s.tied_embeddings else ["model.embed_tokens", "lm_head"]
        for name in ends:
            yield self._rows_of(f"{name}.weight", s.vocab_size, s.hidden_size)
        yield self._whole("model.norm.weight", s.hidden_size)
        for i, sparse in enumerate(s.sparse_layers):
            layer = f"model.layers.{i}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield self._whole(f"{layer}.{name}.weight", s.hidden_size)
            yield from self._attention(f"{layer}.self_attn")
            yield from self._experts(f"{layer}.mlp") if sparse else self._mlp(f"{layer}.mlp")

    def _whole(self, name: str, *sizes: int) -> Placed:
        return name, Region.whole(sizes), self.store.make(name, *sizes)

    def _rows_of(self, name: str, count: int, width: int) -> Placed:
        mine = count // self.tp
        return name, Region((self.at * mine, 0), (mine, width)), self.store.make(name, mine, width)

    def _columns_of(self, name: str, count: int, width: int) -> Placed:
        mine = width // self.tp
        return name, Region((0, self.at * mine), (count, mine)), self.store.make(name, count, mine)

    def _stacked(self, name: str, parts: Iterable[tuple[str, int]], width: int) -> Iterator[Placed]:
        """Own rows of several tensors of `width` columns, one over the other in one parameter."""
        mine = [(fqn, count // self.tp) for fqn, count in parts]
        whole, first = self.store.make(name, sum(count for _, count in mine), width), 0
        for fqn, count in mine:
            yield fqn, Region((self.at * count, 0), (count, width)), whole[first : first + count]
            first += count

    def _attention(self, at: str) -> Iterator[Placed]:
        s = self.shape
        query, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        parts = [(f"{at}.{n}_proj.weight", query if n == "q" else kv) for n in "qkv"]
        yield from self._stacked(f"{at}.qkv_proj.weight", parts, s.hidden_size)
        yield self._columns_of(f"{at}.o_proj.weight", s.hidden_size, query)
        for n in "qk":
            yield self._whole(f"{at}.{n}_norm.weight", s.head_dim)

    def _mlp(self, at: str) -> Iterator[Placed]:
        s = self.shape
        parts = [(f"{at}.{n}_proj.weight", s.ffn_size) for n in ("gate", "up")]
        yield from self._stacked(f"{at}.gate_up_proj.weight", parts, s.hidden_size)
        yield self._columns_of(f"{at}.down_proj.weight", s.hidden_size, s.ffn_size)

    def _experts(self, at: str) -> Iterator[Placed]:
        s, h = self.shape, self.shape.hidden_size
        yield self._whole(f"{at}.gate.weight", s.num_experts, h)
        f = s.expert_ffn_size // self.tp
        w13 = self.store.make(f"{at}.experts.w13_weight", s.num_experts, 2 * f, h)
        w2 = self.store.make(f"{at}.experts.w2_weight", s.num_experts, h, f)
        for e in range(s.num_experts):
            expert, rows = f"{at}.experts.{e}", Region((self.at * f, 0), (f, h))
            yield f"{expert}.gate_proj.weight", rows, w13[e, :f]
            yield f"{expert}.up_proj.weight", rows, w13[e, f:]
            yield f"{expert}.down_proj.weight", Region((0, self.at * f), (h, f)), w2[e]


# ---- the two ends of a session


def _values(rows: Iterable[Placed], table: TensorTable) -> Values:
    return Values([Cell(fqn, table[fqn].shape, region, view) for fqn, region, view in rows])


@dataclass
class BenchSource:
    """A trainer rank; see `nemo_rl.refit.base.Source`."""

    whole: TensorTable
    rows: list[Placed]
    held: tuple[Holding, ...] = field(init=False)
    values: Values = field(init=False)

    def __post_init__(self) -> None:
        self.held = tuple(Holding(*row) for row in self.rows)
        self.values = _values(self.rows, self.whole)

    def table(self) -> TensorTable:
        return self.whole

    def holdings(self) -> tuple[Holding, ...]:
        return self.held

    def unused(self) -> Mapping[str, str]:
        return {}

    def load(self, version: int) -> None:
        self.values.write(version)


@dataclass
class BenchLanding:
    """A generator rank whose kernels read what the loader fills; see `nemo_rl.refit.base.Landing`."""

    whole: TensorTable
    rows: list[Placed]
    store: Store
    version: int | None = None
    views: dict[int, torch.Tensor] = field(init=False)
    values: Values = field(init=False)
    by_name: dict[str, list[tuple[Region, torch.Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.views = {i: view for i, (_, _, view) in enumerate(self.rows)}
        self.values = _values(self.rows, self.whole)
        self.by_name = {}
        for fqn, region, view in self.rows:
            self.by_name.setdefault(fqn, []).append((region, view))

    def declare(self, table: TensorTable) -> Declaration:
        return Declaration(Layout.from_regions([(f, r) for f, r, _ in self.rows], table))

    def begin(self, version: int) -> None:
        return None

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return self.views

    def close(self, unit: int) -> None:
        return None

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Whole tensors, of which this rank takes its part, as an engine's `load_weights` does."""
        for fqn, whole in tensors:
            for region, view in self.by_name.get(fqn, ()):
                view.copy_(whole[region.slices_in(Region.whole(tuple(whole.shape)))])

    def finish(self) -> None:
        return None

    def commit(self, version: int) -> None:
        self.version = version

    def reject(self, reason: str) -> None:
        return None

    def scramble(self) -> None:
        """Random bytes in every destination."""
        self.store.scramble()

    def wrong(self, version: int) -> list[str]:
        """Tensors that do not hold their part of `version`, bit for bit."""
        return self.values.wrong(version)
