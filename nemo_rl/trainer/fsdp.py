"""Trainers of PyTorch's FSDP2 or of plain DTensors over a Hugging Face module: what their ranks hold.

Names are those of the module's parameters and persistent buffers. Transformers keeps the experts of a layer in one
parameter, of which a checkpoint has a tensor for each expert and projection; they are named as the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from nemo_rl.refit.dtensor import holdings_of, shard_regions
from nemo_rl.refit.layout import Holding, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.trainer.places import Places
from nemo_rl.trainer.simulated import SimulatedTrainer

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Slab:
    """Rows `start .. stop - 1` of every expert of a fused parameter are projection `name` of that expert."""

    name: str
    start: int
    stop: int


def _slabs(fqn: str, shape: Shape) -> list[_Slab]:
    """How a fused parameter of experts `[E, rows, columns]` comes apart; empty for any other tensor.

    Raises:
        ValueError: a parameter of experts that is neither `gate_up_proj`, `up_proj` nor `down_proj`.
    """
    match = re.fullmatch(r".+\.experts\.(\w+)", fqn)
    if match is None:
        return []
    name, rows = match[1], shape[1] if len(shape) == 3 else 0
    if name == "gate_up_proj" and rows:
        return [_Slab("gate_proj", 0, rows // 2), _Slab("up_proj", rows // 2, rows)]
    if name in ("up_proj", "down_proj") and rows:
        return [_Slab(name, 0, rows)]
    raise ValueError(
        f"{fqn} {shape}: experts come as gate_up_proj, up_proj and down_proj of 3 dims; extend the rule, or export "
        f"them as they are with stacked_experts=True"
    )


def _apart_table(fqn: str, meta: TensorMeta, slabs: list[_Slab]) -> TensorTable:
    """The checkpoint's tensors that parameter `fqn` is."""
    if not slabs:
        return {fqn: meta}
    return {
        _expert_name(fqn, expert, slab): TensorMeta((slab.stop - slab.start, meta.shape[2]), meta.dtype)
        for expert in range(meta.shape[0])
        for slab in slabs
    }


def _expert_name(fqn: str, expert: int, slab: _Slab) -> str:
    return f"{fqn.rpartition('.')[0]}.{expert}.{slab.name}.weight"


def _apart(fqn: str, held: Region, slabs: list[_Slab]) -> Iterator[tuple[str, Region, Region | None]]:
    """(checkpoint name, region of it, where it lies in the parameter) of what is held of it; None means all of it."""
    if not slabs:
        yield fqn, held, None
        return
    for expert in range(held.offsets[0], held.ends[0]):
        for slab in slabs:
            inside = Region((expert, slab.start, held.offsets[2]), (1, slab.stop - slab.start, held.sizes[2]))
            common = inside.intersect(held)
            if common is not None:
                region = Region((common.offsets[1] - slab.start, common.offsets[2]), common.sizes[1:])
                yield _expert_name(fqn, expert, slab), region, common


@dataclass(frozen=True, slots=True)
class _Found:
    """What a module has: tensors that travel, those that do not with the reason, and what this rank holds."""

    table: TensorTable
    unused: dict[str, str]
    holdings: list[Holding]


class FsdpSource:
    """The trainer's side of a refit; see `nemo_rl.refit.base.Source`.

    Make it after `fully_shard` (or after parameters were made DTensors) and while the module is sharded. Optimizers
    update local shards in place, so that holdings stay valid; tensors that were replaced or given other storage are
    found again.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        adapters_only: bool = False,
        not_generated_from: tuple[str, ...] = (),
        rename: Callable[[str], str] = str,
        stacked_experts: bool = False,
    ) -> None:
        """
        Args:
            adapters_only: export what is trained; the frozen base is listed as unused.
            not_generated_from: prefixes of tensors that no generator has, such as a value head; listed as unused.
            rename: checkpoint's name of a name of the module; it comes before experts are told apart.
            stacked_experts: export the experts of a layer as the module has them, without telling them apart.

        Raises:
            ValueError: the module is gathered and not sharded, or experts come in an unknown form; by name.
        """
        self._module, self._adapters_only, self._left_out = module, adapters_only, not_generated_from
        self._rename, self._stacked = rename, stacked_experts
        self._sharded = any(isinstance(p, DTensor) for p in module.parameters())
        self._found, self._places = self._find(), Places([module])
        self._holdings = tuple(self._found.holdings)

    def table(self) -> TensorTable:
        """Every exported tensor of the whole model, held by this rank or not."""
        return dict(self._found.table)

    def holdings(self) -> tuple[Holding, ...]:
        """Live views of this rank's shards.

        Raises:
            ValueError: the module was gathered, or is another one than before: a tensor that it had or has, by name.
        """
        if self._places.moved:
            found = self._find()
            _check_same(self._found, found)
            self._found, self._places = found, Places([self._module])
            self._holdings = tuple(found.holdings)
        return self._holdings

    def unused(self) -> Mapping[str, str]:
        """Tensors of the module that are not exported, with the reason."""
        return dict(self._found.unused)

    def _find(self) -> _Found:
        found = _Found({}, {}, [])
        for name, tensor in self._exported(found.unused):
            fqn = _plain_name(self._rename(name))
            slabs = [] if self._stacked else _slabs(fqn, tuple(tensor.shape))
            found.holdings.extend(_held(fqn, tensor, slabs))
            found.table.update(_apart_table(fqn, TensorMeta(tuple(tensor.shape), tensor.dtype), slabs))
        return replace(found, table={fqn: found.table[fqn] for fqn in natural_order(found.table)})

    def _exported(self, unused: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
        """By name; the others go to `unused`."""
        first: dict[int, str] = {}
        for name, tensor in _tensors(self._module, self._sharded):
            original = first.setdefault(id(tensor), name)
            if original != name:
                unused[name] = f"tied to {original}"
            elif name.startswith(self._left_out) and self._left_out:
                unused[name] = "not generated from"
            elif self._adapters_only and not tensor.requires_grad:
                unused[name] = "frozen: adapters alone are trained"
            else:
                yield name, tensor


def _check_same(before: _Found, after: _Found) -> None:
    """Raises ValueError naming the first tensor that is another one or unused for another reason."""
    told: list[dict[str, object]] = [{**found.table, **found.unused} for found in (before, after)]
    for name in natural_order({**told[0], **told[1]}):
        was, now = (said.get(name, "not there") for said in told)
        if was != now:
            raise ValueError(f"{name} was {was} when this source was made, and is {now}; make a new source and session")


def _held(fqn: str, tensor: torch.Tensor, slabs: list[_Slab]) -> Iterator[Holding]:
    """What this rank holds of one exported tensor."""
    whole = holdings_of(fqn, tensor) if isinstance(tensor, DTensor) else [_whole(fqn, tensor)]
    for held in whole:
        for name, region, inside in _apart(fqn, held.region, slabs):
            if region.volume:
                view = held.view if inside is None else held.view[inside.slices_in(held.region)][0]
                yield Holding(name, region, view)


def _tensors(module: torch.nn.Module, sharded: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones under each of their names, and persistent buffers; `sharded` ones are all DTensors.

    Raises:
        ValueError: some parameters of them are not: the module is gathered.
    """
    parameters = list(module.named_parameters(remove_duplicate=False))
    plain = [name for name, p in parameters if not isinstance(p, DTensor)]
    if plain and sharded:
        raise ValueError(
            f"{len(plain)} of {len(parameters)} parameters are no DTensors, the first {plain[0]}: the module is "
            f"gathered or sharded in part; shard all of it and call reshard() on it before"
        )
    yield from parameters
    known = {name for name, _ in parameters}
    kept = module.state_dict(keep_vars=True)
    yield from ((name, kept[name]) for name, _ in module.named_buffers() if name in kept and name not in known)


def _whole(fqn: str, tensor: torch.Tensor) -> Holding:
    return Holding(fqn, Region.whole(tuple(tensor.shape)), tensor.detach())


def _plain_name(name: str) -> str:
    """PEFT puts the adapter's own name into its parameters' names, but not into its files."""
    return re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name)


def simulate_fsdp(
    table: TensorTable,
    world_size: int,
    *,
    dim: int = 0,
    replicas: int = 1,
    fused_experts: bool = True,
    buffers: tuple[str, ...] = ("e_score_correction_bias",),
) -> SimulatedTrainer:
    """What the ranks of an FSDP2 trainer hold of a checkpoint's tensors; no process, no weights.

    Args:
        table: the checkpoint's tensors; stacked experts stay so.
        dim: that parameters are sharded on, as torch.chunk does; the last one of tensors with fewer dims.
        replicas: groups of ranks that each hold the whole model; ranks of a group follow each other.
        fused_experts: experts of a layer are one parameter, as transformers 5 keeps them.
        buffers: ends of the names of buffers, which every rank holds whole.

    Raises:
        ValueError: replicas do not divide the ranks.
    """
    if replicas < 1 or world_size < 1 or world_size % replicas:
        raise ValueError(f"{replicas} replicas do not divide {world_size} ranks; choose a divisor")
    shards = world_size // replicas
    parameters = _fused(table) if fused_experts else {fqn: meta.shape for fqn, meta in table.items()}
    slabs = {fqn: [] if fqn in table else _slabs(fqn, shape) for fqn, shape in parameters.items()}
    made = [tuple(_rows(parameters, slabs, (shards, shard), dim, buffers)) for shard in range(shards)]
    return SimulatedTrainer(dict(table), tuple(made[rank % shards] for rank in range(world_size)))


def _rows(
    parameters: Mapping[str, Shape],
    slabs: Mapping[str, list[_Slab]],
    shard: tuple[int, int],
    dim: int,
    buffers: tuple[str, ...],
) -> Iterator[tuple[str, Region]]:
    """Of shard `shard[1]` of `shard[0]`."""
    count, index = shard
    for fqn, shape in parameters.items():
        placement = Replicate() if not shape or fqn.endswith(buffers) else Shard(min(dim, len(shape) - 1))
        for held, _ in shard_regions(shape, (count,), (index,), (placement,)):
            yield from ((name, region) for name, region, _ in _apart(fqn, held, slabs[fqn]) if region.volume)


def _fused(table: TensorTable) -> dict[str, Shape]:
    """Parameters of a transformers module whose checkpoint has the tensors of `table`."""
    out: dict[str, Shape] = {}
    for fqn, meta in table.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", fqn)
        if match is None:
            out[fqn] = meta.shape
            continue
        gated = f"{match[1]}.{match[2]}.gate_proj.weight" in table
        name = f"{match[1]}.{'gate_up_proj' if gated and match[3] != 'down_proj' else match[3]}"
        rows, columns = meta.shape
        out[name] = (int(match[2]) + 1, rows * (2 if name.endswith("gate_up_proj") else 1), columns)
    return out
