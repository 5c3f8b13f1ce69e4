"""Qwen3-MoE shaped weights for benchmarks: expert-parallel trainers as Megatron holds them, tensor-parallel generators
as vLLM holds them, with values that any rank can make again from names."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Holding, Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region

Placed = tuple[str, Region, torch.Tensor]
"""Tensor, the box of it, and the view that holds the box."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3-MoE model; the defaults are Qwen3-30B-A3B's."""

    layers: int = 48
    hidden: int = 2048
    experts: int = 128
    expert_hidden: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936
    dtype: torch.dtype = torch.bfloat16

    def table(self) -> TensorTable:
        """Every tensor of the checkpoint, in natural order."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, h),
            "model.norm.weight": (h,),
            "lm_head.weight": (self.vocab, h),
        }
        for i in range(self.layers):
            shapes |= {
                f"model.layers.{i}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (h,),
                    "post_attention_layernorm": (h,),
                    "self_attn.q_proj": (q, h),
                    "self_attn.k_proj": (kv, h),
                    "self_attn.v_proj": (kv, h),
                    "self_attn.o_proj": (h, q),
                    "self_attn.q_norm": (self.head_dim,),
                    "self_attn.k_norm": (self.head_dim,),
                    "mlp.gate": (self.experts, h),
                }.items()
            }
            for e in range(self.experts):
                prefix = f"model.layers.{i}.mlp.experts.{e}"
                shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (self.expert_hidden, h)
                shapes[f"{prefix}.down_proj.weight"] = (h, self.expert_hidden)
        return {name: TensorMeta(shapes[name], self.dtype) for name in natural_order(shapes)}

    def held_by(self, count: int, size: int) -> TensorTable:
        """What the first `count` of `size` trainers hold."""
        last = self.experts * count // size
        return {
            name: meta
            for name, meta in self.table().items()
            if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) < last
        }


def _empty(shape: Shape, device: torch.device, *sizes: int) -> torch.Tensor:
    return torch.empty(sizes, dtype=shape.dtype, device=device)


def trainer_rows(
    shape: Shape, rank: int, size: int, device: torch.device, in_one_buffer: bool = False
) -> Iterator[Placed]:
    """Expert parallel: own experts, gate over up; all else on every rank, q/k/v by group.

    A layer's experts are tensors of their own, or lie in one buffer, as distributed optimizers keep them.
    """
    table = shape.table()
    for name, meta in table.items():
        if ".experts." not in name and not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            yield name, Region.whole(meta.shape), _empty(shape, device, *meta.shape)
    mine = range(rank * shape.experts // size, (rank + 1) * shape.experts // size)
    f, h = shape.expert_hidden, shape.hidden
    for i in range(shape.layers):
        yield from _trainer_qkv(shape, f"model.layers.{i}.self_attn", device)
        buffer = _empty(shape, device, len(mine) if in_one_buffer else 0, 3, f, h)
        for number, e in enumerate(mine):
            prefix = f"model.layers.{i}.mlp.experts.{e}"
            if in_one_buffer:
                fc1, fc2 = buffer[number, :2].view(2 * f, h), buffer[number, 2].view(h, f)
            else:
                fc1, fc2 = _empty(shape, device, 2 * f, h), _empty(shape, device, h, f)
            yield f"{prefix}.gate_proj.weight", Region.whole((f, shape.hidden)), fc1[:f]
            yield f"{prefix}.up_proj.weight", Region.whole((f, shape.hidden)), fc1[f:]
            yield f"{prefix}.down_proj.weight", Region.whole((shape.hidden, f)), fc2


def _trainer_qkv(shape: Shape, prefix: str, device: torch.device) -> Iterator[Placed]:
    per, d = shape.heads // shape.kv_heads, shape.head_dim
    fused = _empty(shape, device, shape.kv_heads, (per + 2) * d, shape.hidden)
    for g in range(shape.kv_heads):
        for name, first, rows in (("q", 0, per * d), ("k", per * d, d), ("v", (per + 1) * d, d)):
            region = Region((g * rows, 0), (rows, shape.hidden))
            yield f"{prefix}.{name}_proj.weight", region, fused[g, first : first + rows]


def generator_rows(shape: Shape, rank: int, size: int, device: torch.device) -> Iterator[Placed]:
    """Tensor parallel: fused q/k/v and w13, columns of o_proj and w2, rows of the vocabulary; the rest whole."""
    table, h = shape.table(), shape.hidden
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = shape.vocab // size
        yield name, Region((rank * rows, 0), (rows, h)), _empty(shape, device, rows, h)
    split = ("embed_tokens", "lm_head", ".experts.", "q_proj", "k_proj", "v_proj", "o_proj")
    for name, meta in table.items():
        if not any(part in name for part in split):
            yield name, Region.whole(meta.shape), _empty(shape, device, *meta.shape)
    for i in range(shape.layers):
        yield from _generator_attention(shape, f"model.layers.{i}.self_attn", rank, size, device)
        f = shape.expert_hidden // size
        w13, w2 = _empty(shape, device, shape.experts, 2 * f, h), _empty(shape, device, shape.experts, h, f)
        for e in range(shape.experts):
            prefix = f"model.layers.{i}.mlp.experts.{e}"
            yield f"{prefix}.gate_proj.weight", Region((rank * f, 0), (f, h)), w13[e, :f]
            yield f"{prefix}.up_proj.weight", Region((rank * f, 0), (f, h)), w13[e, f:]
            yield f"{prefix}.down_proj.weight", Region((0, rank * f), (h, f)), w2[e]


def _generator_attention(shape: Shape, prefix: str, rank: int, size: int, device: torch.device) -> Iterator[Placed]:
    q, kv, h = shape.heads * shape.head_dim // size, shape.kv_heads * shape.head_dim // size, shape.hidden
    fused, out = _empty(shape, device, q + 2 * kv, h), _empty(shape, device, h, q)
    for name, first, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
        yield f"{prefix}.{name}_proj.weight", Region((rank * rows, 0), (rows, h)), fused[first : first + rows]
    yield f"{prefix}.o_proj.weight", Region((0, rank * q), (h, q)), out


def value(fqn: str, meta: TensorMeta, version: int, device: torch.device) -> torch.Tensor:
    """The whole tensor of a version: random bytes, NaNs included, the same on every GPU of a model."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(fqn.encode()) * 1000 + version)
    raw = torch.empty(meta.num_bytes // 2, dtype=torch.int16, device=device).random_(
        -(1 << 15), 1 << 15, generator=generator
    )
    return raw.view(meta.dtype).view(meta.shape)


def _values(rows: Iterable[Placed], table: TensorTable, version: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(view, what it must hold) of every row; rows of one tensor that follow each other share its making."""
    last, whole = "", torch.empty(0)
    for fqn, region, view in rows:
        if fqn != last:
            last, whole = fqn, value(fqn, table[fqn], version, view.device)
        yield view, whole[region.slices_in(Region.whole(table[fqn].shape))]


@dataclass
class BenchSource:
    """A trainer rank."""

    whole: TensorTable
    rows: list[Placed]
    held: list[Holding] = field(init=False)

    def __post_init__(self) -> None:
        self.held = [Holding(*row) for row in self.rows]

    def table(self) -> TensorTable:
        return self.whole

    def holdings(self) -> list[Holding]:
        return self.held

    def unused(self) -> Mapping[str, str]:
        return {}

    def load(self, version: int) -> None:
        for view, want in _values(sorted(self.rows, key=lambda row: row[0]), self.whole, version):
            view.copy_(want)


@dataclass
class BenchLanding:
    """A generator rank whose kernels read what the loader fills."""

    rows: list[Placed]
    version: int | None = None

    def declare(self, table: TensorTable) -> Declaration:
        self.whole = table
        self.views = {i: view for i, (_, _, view) in enumerate(self.rows)}
        return Declaration(Layout.from_regions([(f, r) for f, r, _ in self.rows], table))

    def begin(self, version: int) -> None:
        return None

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return self.views

    def close(self, unit: int) -> None:
        return None

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        by_name = {f: (r, v) for f, r, v in self.rows}
        for fqn, whole in tensors:
            region, view = by_name[fqn]
            view.copy_(whole[region.slices_in(Region.whole(tuple(whole.shape)))])

    def finish(self) -> None:
        return None

    def commit(self, version: int) -> None:
        self.version = version

    def reject(self, reason: str) -> None:
        return None

    def scramble(self) -> None:
        """Random bytes in every destination."""
        for _, _, view in self.rows:
            if view.is_contiguous():
                view.view(torch.int16).random_(-(1 << 15), 1 << 15)
            else:
                view.copy_(torch.rand(view.shape, device=view.device))

    def wrong(self, version: int) -> int:
        """Rows that do not hold their part of `version`, bit for bit."""
        flags = [
            (view.view(torch.int16) != want.view(torch.int16)).any()
            for view, want in _values(sorted(self.rows, key=lambda row: row[0]), self.whole, version)
        ]
        return int(torch.stack(flags).sum().item())
