"""Where a refit of LoRA adapters lands: the stacked tensors that vLLM's LoRA layers read, over a base that stays.

The trainer's table holds adapter tensors alone, named as PEFT names them. vLLM's own code says where each goes: it runs
once on storage-less stand-ins of its LoRA layers, and every copy is recorded. The loader folds the adapter's scaling
into `lora_B`, so those land in fresh tensors first (one landing unit each), and the engine's own code scales them; with
scaling 1, and for `lora_A`, bytes land in the live tensors.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from nemo_rl.generator.compat import adapter_names
from nemo_rl.generator.landing import IN_PLACE, view_of
from nemo_rl.generator.options import ADAPTER_ID, AdapterConfig
from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout, TensorTable
from nemo_rl.refit.trace import Trace, TracedRow, trace_loader

log = logging.getLogger(__name__)
KINDS = ("lora_a_stacked", "lora_b_stacked")


def serve_adapter(workers: Any, config: AdapterConfig) -> None:
    """Give the adapter its place for good: from `config.path`, or zeros, with which the base answers alone.

    Args:
        workers: vLLM's `WorkerLoRAManager`.
    """
    request = adapter_request(config)
    if config.path is None:
        workers.add_dummy_lora(request, config.rank)
        workers._adapter_manager.activate_adapter(ADAPTER_ID)
    else:
        workers.add_adapter(request)
    workers._adapter_manager.pin_adapter(ADAPTER_ID)


def adapter_request(config: AdapterConfig) -> LoRARequest:
    """What a request to generate names; the folder is read once, when the engine starts."""
    return LoRARequest("adapter", ADAPTER_ID, config.path or "brought by refits")


# ---- what vLLM's code does with adapter tensors


def trace_adapter(manager: LoRAModelManager, config: AdapterConfig, table: TensorTable) -> Trace:
    """Run vLLM's own packing, slicing and copying of an adapter on storage-less tensors of `table`.

    Rows name parameters `<module>.lora_a_stacked.<slice>`; only the adapter's slot counts as theirs. The scaling is
    left out: `AdapterLanding` applies it. A projection that is no target may stay zero.
    """
    slot = slot_of(manager)
    twin = _twin(manager, slot)
    slots = {name: stacked[slot] for name, stacked in stacked_tensors(twin).items()}

    def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        model = _adapter_model(manager, dict(tensors), _settings(config, config.rank), "meta")
        LoRAModelManager._add_adapter(twin, model)
        LoRAModelManager.activate_adapter(twin, ADAPTER_ID)

    untouched = "no target of the adapter: stays zero"
    free = {name: untouched for name in slots if projection_of(manager, name) not in config.target_modules}
    return trace_loader(load, table, slots, free)


def replace_adapter(workers: Any, config: AdapterConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Let vLLM's own code put whole adapter tensors in the place of the adapter that it has."""
    manager = workers._adapter_manager
    model = _adapter_model(manager, tensors, _settings(config, config.alpha), "cpu")
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(model)
    manager.activate_adapter(ADAPTER_ID)
    manager.pin_adapter(ADAPTER_ID)


def _adapter_model(
    manager: LoRAModelManager, tensors: dict[str, torch.Tensor], settings: PEFTHelper, device: str
) -> LoRAModel:
    return LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        settings,
        device,
        manager.lora_config.lora_dtype,
        weights_mapper=adapter_names(manager.model),
    )


def _settings(config: AdapterConfig, alpha: float) -> PEFTHelper:
    return PEFTHelper(r=config.rank, lora_alpha=alpha, target_modules=list(config.target_modules))  # type: ignore[arg-type]


def slot_of(manager: LoRAModelManager) -> int:
    """Index of the adapter in the stacked tensors. Raises RuntimeError where the engine gave its place away."""
    if ADAPTER_ID not in manager.lora_index_to_id:
        raise RuntimeError("the adapter has no slot in the engine: another adapter was loaded, or all were removed")
    return manager.lora_index_to_id.index(ADAPTER_ID)


def stacked_tensors(manager: LoRAModelManager) -> dict[str, torch.Tensor]:
    """`<module>.lora_a_stacked.<slice>` -> tensor with the slots in front, for layers that keep a tuple of slices."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in manager.modules.items():
        for kind in KINDS:
            stacked = _stacked(layer, kind)
            if isinstance(stacked, tuple):
                found |= {f"{name}.{kind}.{i}": tensor for i, tensor in enumerate(stacked)}
    return found


def _stacked(layer: Any, kind: str) -> Any:
    return vars(layer).get(kind)


def projection_of(manager: LoRAModelManager, param: str) -> str:
    """Which target the slice is of: `q_proj` for `...qkv_proj.lora_a_stacked.0`."""
    module, _, index = param.rsplit(".", 2)
    packed = manager.packed_modules.get(module, [module])
    return packed[int(index)].rpartition(".")[2]


def _twin(manager: LoRAModelManager, slot: int) -> LoRAModelManager:
    """The manager with storage-less stacked tensors and no adapter; `slot` alone is free.

    Layers that keep their tensors otherwise are left out, so that nothing touches the live ones.
    """
    twin = copy.copy(manager)
    kept = {name: layer for name, layer in manager.modules.items() if isinstance(_stacked(layer, KINDS[0]), tuple)}
    twin.modules = {name: copy.copy(layer) for name, layer in kept.items()}
    for layer in twin.modules.values():
        for kind in KINDS:
            vars(layer)[kind] = tuple(torch.empty_like(tensor, device="meta") for tensor in _stacked(layer, kind))
    twin._registered_adapters, twin._active_adapters = {}, {}  # type: ignore[assignment]
    twin.lora_index_to_id = [None if i == slot else 0 for i in range(len(manager.lora_index_to_id))]
    return twin


# ---- landing


@dataclass(slots=True)
class _Update:
    """Progress of one version."""

    version: int
    open: dict[int, torch.Tensor | None] = field(default_factory=dict)
    landed: set[int] = field(default_factory=set)


class AdapterLanding:
    """The `Landing` of one vLLM worker that serves one adapter over a frozen base.

    Args:
        workers: vLLM's `WorkerLoRAManager`, in which the adapter has its place (`serve_adapter`).
        base: parameter of the base -> why no tensor comes for it; empty where the base cannot be trusted.
    """

    def __init__(self, workers: Any, config: AdapterConfig, base: Mapping[str, str]) -> None:
        self._workers, self._config, self.frozen = workers, config, base
        self._rows: tuple[TracedRow, ...] | None = None
        self._units: tuple[int, ...] = ()
        self._scaled: tuple[str, ...] = ()
        self._misc: Mapping[str, str] = {}
        self._update: _Update | None = None
        self._rejected: str | None = None
        self.version: int | None = None

    @property
    def _manager(self) -> LoRAModelManager:
        return self._workers._adapter_manager  # type: ignore[no-any-return]

    def declare(self, table: TensorTable) -> Declaration:
        """Trace vLLM's adapter code on `table`, which holds adapter tensors alone."""
        trace = trace_adapter(self._manager, self._config, table)
        misc = dict(trace.misc)
        if misc:  # an adapter that the loader computes in part goes through the loader whole
            misc = {fqn: misc.get(fqn, "its adapter has tensors that are not plain copies") for fqn in table}
        self._rows, self._misc = tuple(row for row in trace.rows if row.fqn not in misc), misc
        scales = _settings(self._config, self._config.alpha).vllm_lora_scaling_factor != 1
        self._scaled = tuple(sorted({r.param for r in self._rows if scales and ".lora_b_stacked." in r.param}))
        number = {name: i for i, name in enumerate(self._scaled)}
        self._units = tuple(number.get(row.param, IN_PLACE) for row in self._rows)
        layout = Layout.from_regions([(row.fqn, row.region) for row in self._rows], table, self._units)
        problems = (*trace.problems, *self._problems(trace, table))
        log.info("%d rows, %d misc tensors; %d parameters frozen", len(layout), len(misc), len(self.frozen))
        return Declaration(layout, misc, problems, kept=self.frozen)

    def _problems(self, trace: Trace, table: TensorTable) -> Iterator[str]:
        if not self.frozen:
            yield "the base has random weights (load_format dummy) and adapters alone travel; load the base's weights"
        known = {projection_of(self._manager, name) for name in stacked_tensors(self._manager)}
        for target in self._config.target_modules:
            if target not in known:
                yield f"target '{target}': the engine has no adapter layer that can be refitted; known: {sorted(known)}"
        placed = {row.fqn for row in trace.rows} | trace.misc.keys()
        for fqn, meta in table.items():
            rank = meta.shape[1 if ".lora_B." in fqn else 0] if len(meta.shape) == 2 else 0
            if rank != self._config.rank:
                yield f"{fqn}: shape {meta.shape} is not that of an adapter of rank {self._config.rank}"
            elif fqn not in placed and not any(fqn in text for text in trace.problems):
                yield f"{fqn}: the engine's adapter code puts it nowhere"

    def begin(self, version: int) -> None:
        """Raises RuntimeError where an update is open, one was rejected, or nothing was declared."""
        if self._rejected is not None or self._update is not None or self._rows is None:
            raise RuntimeError(
                f"version {version} cannot begin: {self._rejected or 'declare first, and one at a time'}"
            )
        slot = slot_of(self._manager)
        self._update = _Update(version)
        for layer in self._manager.modules.values():
            layer.reset_lora(slot)  # what the tensors leave free is zero, whatever served there before

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        """Row -> view of the adapter's slot, or of a fresh one that `close` scales into it."""
        rows, update = self._in_update()
        if unit in update.open or unit in update.landed:
            raise RuntimeError(f"unit {unit} was opened before in version {update.version}")
        live = stacked_tensors(self._manager)
        mine = {i: rows[i] for i, u in enumerate(self._units) if u == unit}
        if unit == IN_PLACE:
            update.open[unit] = None
            return {i: view_of(live[row.param], row) for i, row in mine.items()}
        update.open[unit] = fresh = torch.zeros_like(live[self._scaled[unit]])
        return {i: view_of(fresh, row) for i, row in mine.items()}

    def close(self, unit: int) -> None:
        _, update = self._in_update()
        fresh = update.open.pop(unit)
        if fresh is not None:
            name, slot = self._scaled[unit], slot_of(self._manager)
            weights = LoRALayerWeights.from_config(name, _settings(self._config, self._config.alpha))
            weights.lora_b = fresh[slot]
            stacked_tensors(self._manager)[name][slot].copy_(weights.optimize().lora_b)
        update.landed.add(unit)

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give the whole adapter to vLLM's own code, in the place of the one it has.

        Raises:
            RuntimeError: a tensor did not come.
        """
        rows, update = self._in_update()
        given = {name: tensor.clone() for name, tensor in tensors}
        lacking = sorted((self._misc.keys() | {row.fqn for row in rows}) - given.keys())
        if lacking:
            raise RuntimeError(f"{len(lacking)} tensors did not come: {', '.join(lacking[:8])}")
        replace_adapter(self._workers, self._config, given)
        update.landed |= {IN_PLACE, *range(len(self._scaled))}

    def finish(self) -> None:
        """Raises RuntimeError where tensors did not land or were not scaled in this version, or the place is lost."""
        _, update = self._in_update()
        slot_of(self._manager)
        due = set(self._units) | ({IN_PLACE} if self._misc else set())
        missing = ["adapters in place" if u == IN_PLACE else self._scaled[u] for u in sorted(due - update.landed)]
        if update.open or missing:
            raise RuntimeError(
                f"version {update.version}: units {sorted(update.open)} are open, and not landed and scaled: "
                f"{', '.join(missing[:8])}"
            )

    def commit(self, version: int) -> None:
        _, update = self._in_update()
        if version != update.version:
            raise RuntimeError(f"version {version} was committed while {update.version} is open")
        self._update, self.version = None, version

    def reject(self, reason: str) -> None:
        """No further update begins here; a new landing can begin a whole one."""
        self._rejected, self._update = self._rejected or reason, None

    def _in_update(self) -> tuple[tuple[TracedRow, ...], _Update]:
        if self._rows is None or self._update is None:
            raise RuntimeError("no update is open; call begin() first")
        return self._rows, self._update
