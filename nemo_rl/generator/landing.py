"""Where a refit lands inside a vLLM worker: views that bytes go to, and vLLM's own processing after them.

Every module that has processing goes through it again in every version. A *staged* module, whose kernels read another
format than the loader fills, gets its bytes in fresh load-format tensors and is a landing unit of its own; one *in
place*, whose live tensors are what the loader fills, gets them in its live storage (unit -1).
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from nemo_rl.generator import compat, formats
from nemo_rl.generator.placement import moved_experts
from nemo_rl.generator.twin import build_twin, trace_twin
from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout, TensorTable
from nemo_rl.refit.trace import Trace, TracedRow

log = logging.getLogger(__name__)
IN_PLACE = -1
Form: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class Layouts:
    """What `declare` found; constant until the next `declare`.

    Attributes:
        rows: destination rows; row i belongs to `units[i]`.
        staged: unit -> module name.
        in_place: modules that must be processed again although their bytes land in live storage.
        constant: modules that no tensor fills and that processing makes from constants.
        misc: tensors that the engine's own loader takes.
        live: live parameters that rows of unit -1 go into, with the form that rows were traced for.
        needs: module -> tensors that it is made of, as far as rows tell; every module that the loader fills is a key.
        padding: live parameter -> byte ranges that no tensor fills and that dummy weights left random.
    """

    rows: tuple[TracedRow, ...]
    units: tuple[int, ...]
    staged: tuple[str, ...]
    in_place: tuple[str, ...]
    constant: tuple[str, ...]
    misc: Mapping[str, str]
    live: Mapping[str, Form]
    needs: Mapping[str, frozenset[str]]
    padding: Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(slots=True)
class Update:
    """Progress of one version: units opened, modules landed, those whose processing ran, attention that derived.

    `places` are the addresses of live tensors that bytes go into.
    """

    version: int
    open: set[int] = field(default_factory=set)
    landed: set[str] = field(default_factory=set)
    processed: set[str] = field(default_factory=set)
    derived: set[str] = field(default_factory=set)
    misc_loaded: bool = False
    places: Mapping[str, int] = field(default_factory=dict)


class VllmLanding:
    """The `Landing` of one vLLM worker.

    Args:
        model: the live model, loaded and processed.
        vllm_config, model_config: of this worker.
    """

    def __init__(self, model: nn.Module, vllm_config: Any, model_config: Any) -> None:
        self._model, self._config, self._model_config = model, vllm_config, model_config
        self._modules = dict(model.named_modules())
        self._names = {id(m): name for name, m in self._modules.items()}
        self._layouts: Layouts | None = None
        self._update: Update | None = None
        self._rejected: str | None = None
        self._live: tuple[Mapping[str, int], Mapping[int, torch.Tensor]] = {}, {}
        self.version: int | None = None
        self._restore()

    # ---- declare

    def declare(self, table: TensorTable) -> Declaration:
        """Trace the loader on a storage-less twin and find out for every module how it takes new bytes."""
        twin = build_twin(self._config)
        trace = trace_twin(twin, self._config, table)
        found = formats.classify(self._model, twin, self._config)
        problems = [*trace.problems, *found.problems, *_uneven(trace.left_alone, twin), *moved_experts(self._model)]
        short = {_module_of(p) for p in _short_parameters(trace, twin)} if trace.misc else set()
        misc = _close_over_modules(trace, short, found.must_be_misc)
        rows = tuple(row for row in trace.rows if row.fqn not in misc)
        self._live = {}, {}
        self._layouts = self._lay_out(trace, rows, misc, found, short)
        regions = [(row.fqn, row.region) for row in rows]
        layout = Layout.from_regions(regions, table, self._layouts.units)
        log.info(
            "%d modules staged, %d processed in place, %d rows, %d misc tensors",
            len(self._layouts.staged),
            len(self._layouts.in_place),
            len(rows),
            len(misc),
        )
        return Declaration(layout, misc, tuple(problems))

    def _lay_out(
        self,
        trace: Trace,
        rows: tuple[TracedRow, ...],
        misc: Mapping[str, str],
        found: formats.Formats,
        short: Iterable[str],
    ) -> Layouts:
        needs: defaultdict[str, set[str]] = defaultdict(set, {name: set() for name in short})
        for row in trace.rows:
            needs[_module_of(row.param)].add(row.fqn)
        alone = {_module_of(name) for name in trace.left_alone} - needs.keys()
        staged = tuple(name for name in found.staged if name not in alone)
        number = {name: i for i, name in enumerate(staged)}
        dummy = self._config.load_config.load_format == "dummy"  # any other load ran the loader, which fills padding
        return Layouts(
            rows=rows,
            units=tuple(number.get(_module_of(row.param), IN_PLACE) for row in rows),
            staged=staged,
            in_place=tuple(found.in_place),
            constant=tuple(name for name in found.staged if name in alone),
            misc=misc,
            live={r.param: _form(self._tensor(r.param)) for r in rows if _module_of(r.param) not in number},
            needs={name: frozenset(fqns) for name, fqns in needs.items()},
            padding={p: r for p, r in trace.padding.items() if dummy and _module_of(p) not in number},
        )

    # ---- one update

    def begin(self, version: int) -> None:
        """Raises RuntimeError where an update is open or one was rejected, nothing was declared, or experts moved."""
        if self._rejected is not None or self._update is not None:
            state = f"was rejected: {self._rejected}" if self._update is None else f"to {self._update.version} is open"
            raise RuntimeError(f"version {version} cannot begin; an earlier update {state}")
        if self._layouts is None:
            raise RuntimeError("declare() must come before begin()")
        moved = moved_experts(self._model)
        if moved:
            raise RuntimeError(f"version {version} cannot begin; stop balancing experts: {'; '.join(moved[:4])}")
        self._update = Update(version)
        for param, ranges in self._layouts.padding.items():
            _zero(self._tensor(param), ranges)

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        """Row -> view of load-format storage. Raises RuntimeError where the unit is open or was landed before."""
        layouts, update = self._in_update()
        name = f"unit {unit}" if unit == IN_PLACE else layouts.staged[unit]
        if unit in update.open or name in update.processed:
            raise RuntimeError(f"{name} was opened before in version {update.version}")
        update.open.add(unit)
        if unit == IN_PLACE:
            update.landed |= set(map(_module_of, layouts.live))
            update.places, views = self._in_place(layouts)
            return views
        mine = {i: layouts.rows[i] for i, u in enumerate(layouts.units) if u == unit}
        with compat.inside(self._config):
            fresh = compat.stage(self._modules[name])
        update.landed.add(name)
        return {i: view_of(fresh[row.param.rpartition(".")[2]], row) for i, row in mine.items()}

    def close(self, unit: int) -> None:
        layouts, update = self._in_update()
        update.open.remove(unit)
        if unit != IN_PLACE:
            with compat.inside(self._config):
                compat.process_staged(self._modules[layouts.staged[unit]], self._ran)

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Run the model's own loader for every module that did not get its bytes through units.

        Raises:
            RuntimeError: a unit is open, or a tensor of these modules did not come.
        """
        layouts, update = self._in_update()
        if update.open:
            raise RuntimeError(f"units {sorted(update.open)} are open while whole tensors arrive")
        rest = [name for name in self._modules if name in layouts.needs and name not in update.landed]
        expected = set(layouts.misc).union(*(layouts.needs[name] for name in rest))
        seen: set[str] = set()

        def noted() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                seen.add(name)
                yield name, tensor

        with compat.inside(self._config):
            layers = [self._modules[name] for name in rest]
            compat.load_whole(self._model, self._model_config, layers, noted(), self._ran)
        if expected - seen:
            missing = sorted(expected - seen)
            raise RuntimeError(f"{len(missing)} tensors did not come: {', '.join(missing[:8])}")
        update.landed |= set(rest)
        update.misc_loaded = True

    def finish(self) -> None:
        """Process what lies in place and derive what attention keeps.

        Raises:
            RuntimeError: a module of the model got no bytes, its processing did not run in this version, or its storage
                is not what the bytes went into.
        """
        layouts, update = self._in_update()
        missing = [name for name in layouts.needs if name not in update.landed]
        missing += [name for name in layouts.staged if name not in update.processed]
        missing += [] if update.misc_loaded else sorted(layouts.misc)
        if update.open or missing:
            raise RuntimeError(
                f"version {update.version}: units {sorted(update.open)} are open, and {len(missing)} modules or "
                f"tensors were not loaded and processed: {', '.join(missing[:8])}"
            )
        moved = [name for name, place in update.places.items() if self._tensor(name).data_ptr() != place]
        if moved:
            raise RuntimeError(
                f"version {update.version}: the storage of {', '.join(moved[:8])} was replaced while bytes went into it"
            )
        with compat.inside(self._config):
            for name in layouts.in_place:
                compat.reprocess(self._modules[name], self._ran)
            for name in layouts.constant:
                compat.stage(self._modules[name])
                compat.process_staged(self._modules[name], self._ran)
            compat.finish_model(self._model, self._model_config, lambda layer: update.derived.add(self._name(layer)))
        missing = [name for name in layouts.in_place + layouts.constant if name not in update.processed]
        attention = [n for n, m in self._modules.items() if compat.is_deferred_attention_layer(m)]
        missing += [name for name in attention if name not in update.derived]
        if missing:
            raise RuntimeError(f"version {update.version}: processing of {', '.join(missing)} did not run")

    def commit(self, version: int) -> None:
        _, update = self._in_update()
        if version != update.version:
            raise RuntimeError(f"version {version} was committed while {update.version} is open")
        self._update, self.version = None, version

    def reject(self, reason: str) -> None:
        """No further update begins here, and staging is freed. A new landing of the model can begin a whole update."""
        self._rejected, self._update = self._rejected or reason, None
        self._restore()

    # ---- helpers

    def _in_place(self, layouts: Layouts) -> tuple[Mapping[str, int], Mapping[int, torch.Tensor]]:
        """(parameter -> address, row -> view) of unit -1: the same mappings again while no storage moved.

        Raises RuntimeError where a parameter was replaced by one in another form: views would say what it is not.
        """
        live = {name: self._tensor(name) for name in layouts.live}
        places = {name: tensor.data_ptr() for name, tensor in live.items()}
        if places != self._live[0]:
            changed = [name for name, tensor in live.items() if _form(tensor) != layouts.live[name]]
            if changed:
                raise RuntimeError(
                    f"{', '.join(changed[:8])} no longer has the shape, strides and type that the loader fills; make a "
                    "new session after the engine changed its parameters"
                )
            mine = {i: row for i, row in enumerate(layouts.rows) if layouts.units[i] == IN_PLACE}
            self._live = places, {i: view_of(live[row.param], row) for i, row in mine.items()}
        return self._live

    def _restore(self) -> None:
        """Put kernel tensors back into modules that an update left half loaded."""
        for layer in self._modules.values():
            compat.restore(layer)

    def _in_update(self) -> tuple[Layouts, Update]:
        if self._layouts is None or self._update is None:
            raise RuntimeError("no update is open; call begin() first")
        return self._layouts, self._update

    def _ran(self, layer: nn.Module) -> None:
        assert self._update is not None
        self._update.processed.add(self._name(layer))

    def _name(self, layer: nn.Module) -> str:
        return self._names[id(layer)]

    def _tensor(self, name: str) -> torch.Tensor:
        module, _, attribute = name.rpartition(".")
        return compat.own_tensors(self._modules[module])[attribute]


def _form(tensor: torch.Tensor) -> Form:
    return tensor.shape, tensor.stride(), tensor.dtype


def _module_of(param: str) -> str:
    return param.rpartition(".")[0]


def view_of(tensor: torch.Tensor, row: TracedRow) -> torch.Tensor:
    """The row's destination in `tensor`, whose first element stands at offset 0 in the trace."""
    return tensor.detach().as_strided(row.region.sizes, row.stride, tensor.storage_offset() + row.storage_offset)


def _zero(tensor: torch.Tensor, ranges: Iterable[tuple[int, int]]) -> None:
    item = tensor.element_size()
    with torch.no_grad():
        for start, stop in ranges:
            size = (stop - start) // item
            tensor.detach().as_strided((size,), (1,), tensor.storage_offset() + start // item).zero_()


def _close_over_modules(trace: Trace, short: Iterable[str], must: Mapping[str, str]) -> dict[str, str]:
    """Misc tensors: the trace's, and all others of every module that one of them or a reason of `must` touches.

    A module goes through the engine's loader whole or not at all.
    """
    reasons = {m: f"its module {m} has tensors that are not plain copies" for m in short} | dict(must)
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for row in trace.rows:
        modules[row.fqn].add(_module_of(row.param))
    misc = dict(trace.misc)
    grew = True
    while grew:
        grew = False
        for fqn in modules.keys() - misc.keys():
            hit = next((m for m in sorted(modules[fqn]) if m in reasons), None)
            if hit is not None:
                misc[fqn], grew = reasons[hit], True
                reasons.update({m: reasons.get(m, f"its module {m} shares {fqn} with {hit}") for m in modules[fqn]})
    return misc


def _uneven(left_alone: Iterable[str], twin: nn.Module) -> list[str]:
    """Parameters that no tensor brings although one comes for the same parameter of another layer."""
    alone, params = set(left_alone), dict(twin.named_parameters())
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name in params:
        kinds[re.sub(r"\d+", "*", name)].append(name)
    return [
        f"{name}: no tensor brings it, although one comes for {next(n for n in names if n not in alone)}"
        for names in kinds.values()
        for name in names
        if name in alone and not alone.issuperset(names)
    ]


def _short_parameters(trace: Trace, twin: nn.Module) -> list[str]:
    """Parameters that rows and padding leave short: the rest of their bytes comes from misc tensors."""
    got: defaultdict[str, int] = defaultdict(int)
    params = dict(twin.named_parameters())
    for row in trace.rows:
        got[row.param] += row.region.volume * params[row.param].element_size()
    for name, ranges in trace.padding.items():
        got[name] += sum(stop - start for start, stop in ranges)
    return [name for name, p in params.items() if got[name] < p.nbytes and name not in trace.left_alone]
