"""What a loader does with every tensor, seen by running it once on tensors without storage.

A loader is any function of `(name, tensor)` pairs that fills parameters. It runs on meta tensors under a dispatch mode
that swallows each `aten::copy_` and notes which box of which fed tensor would land in which strided view of which
parameter. Tensors that arrive by views and copies alone become rows; those whose value the loader computes, or whose
way is not a box, are misc. Every byte of every parameter is accounted for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_rl.refit.cover import ByteRange, account, common, join, strided_ranges, view_ranges
from nemo_rl.refit.held import Held
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.region import Region

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


@dataclass(frozen=True, slots=True)
class TracedRow:
    """The loader copies `region` of `fqn` to one strided view of a parameter's storage.

    The view is `as_strided(region.sizes, stride, storage_offset)` of the storage of `param`, axes in the Hugging Face
    tensor's order; offset and strides count elements. Parameters that share a storage go by the first one's name.
    """

    fqn: str
    region: Region
    param: str
    storage_offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What a loader does with a table of tensors.

    Attributes:
        rows: copies of boxes, in the loader's order; none belongs to a tensor of `misc`.
        misc: tensors whose value the loader computes or whose way is not a box, with the reason.
        padding: parameter -> byte ranges of its storage that the loader fills with a constant.
        problems: what must refuse a plan: bytes nobody writes or two write, values no fed tensor explains, a loader
            that stopped.
        left_alone: parameters that the loader did not write and may leave alone, with the reason.
    """

    rows: tuple[TracedRow, ...]
    misc: Mapping[str, str]
    padding: Mapping[str, tuple[ByteRange, ...]]
    problems: tuple[str, ...]
    left_alone: Mapping[str, str] = field(default_factory=dict)


def trace_loader(
    load: Load, table: TensorTable, params: Mapping[str, torch.Tensor], derived: Mapping[str, str] | None = None
) -> Trace:
    """Run `load` once on meta tensors of `table` and account for every byte of `params`.

    Args:
        params: the tensors that `load` fills, on the meta device; those that share a storage count once.
        derived: parameters that the loader may leave alone, with the reason.

    Raises:
        ValueError: a parameter has storage, so that running the loader could change it.
    """
    real = [name for name, p in params.items() if p.device.type != "meta"]
    if real:
        raise ValueError(f"parameters must be on the meta device to trace a loader, these are not: {', '.join(real)}")
    recorder = _Recorder(table, params)
    stopped = ""
    with torch.no_grad(), recorder:
        try:
            load(recorder.feed())
        except Exception as error:  # any failure of foreign code is an answer: this table cannot be loaded
            stopped = f"the loader stopped after {recorder.last or 'no tensor'}: {type(error).__name__}: {error}"
    if stopped:
        return Trace(tuple(recorder.kept_rows()), recorder.misc, {}, (stopped, *recorder.problems))
    derived = derived or {}
    padding, problems = recorder.check_cover(derived)
    left_alone = {name: why for name, why in derived.items() if recorder.left_alone(name)}
    return Trace(tuple(recorder.kept_rows()), recorder.misc, padding, (*recorder.problems, *problems), left_alone)


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


class _Recorder(TorchDispatchMode):
    """Notes every write to a parameter and from which fed tensors each value comes.

    Attributes:
        misc: fqn -> reason.
        problems: writes that no fed tensor explains.
        last: name of the tensor that the loader took last.
    """

    def __init__(self, table: TensorTable, params: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.misc: dict[str, str] = {}
        self.problems: list[str] = []
        self.last = ""
        self._table, self._params = table, params
        self._name: dict[int, str] = {}
        for name, param in params.items():
            self._name.setdefault(storage_id(param), name)
        self._alive: list[Any] = [p.untyped_storage() for p in params.values()]  # ids stay unique while these live
        self._pure: dict[int, Held] = {}  # storage of an unchanged fed tensor, or of a plain copy of a part of it
        self._origin: dict[int, set[str]] = {key: set() for key in self._name}  # storage -> fqns its value depends on
        self._how: dict[int, str] = {}  # storage -> the operation that computed it
        self._numbers: set[int] = set()  # storages of a number that the loader wrote, as in `view[...] = 0`
        self._rows: list[TracedRow] = []
        self._copied: defaultdict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)  # (fqn, bytes) of each row
        self._computed: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self._fills: defaultdict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)  # (copies before it, bytes)
        self._reached: set[int] = set()  # parameter storages that a fed tensor was copied to, be it zero elements

    def feed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The table's tensors on the meta device, made as the loader asks for them."""
        for fqn, meta in self._table.items():
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
            key = self._register(tensor)
            self._pure[key], self._origin[key], self.last = Held.whole(fqn, meta), {fqn}, fqn
            yield fqn, tensor

    def kept_rows(self) -> list[TracedRow]:
        """Rows of tensors that are not misc."""
        return [row for row in self._rows if row.fqn not in self.misc]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):  # a view of known storage is nothing new
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::copy_":
            return self._copy(func, args, kwargs)
        written = _written(func, args, kwargs)
        read = [t for t in _tensors((args, kwargs)) if name not in _FILLS or all(t is not w for w in written)]
        out = func(*args, **kwargs)
        if name == "aten::scalar_tensor":
            self._numbers.add(self._register(out))
        fqns = set().union(*(self._origin.get(storage_id(t), set()) for t in read))
        for tensor in written:
            self._wrote(tensor, fqns, name)
        if fqns:
            for tensor in _tensors(out):
                self._made(tensor, fqns, name)
        if name in _COPIES:
            self._cloned(args[0], out)
        return out

    def _register(self, tensor: torch.Tensor) -> int:
        self._alive.append(tensor.untyped_storage())
        return storage_id(tensor)

    def _made(self, tensor: torch.Tensor, fqns: set[str], op: str) -> None:
        """An operation on values of `fqns` returned `tensor`; a view of known storage is nothing new."""
        if storage_id(tensor) not in self._origin:
            key = self._register(tensor)
            self._origin[key], self._how[key] = set(fqns), op

    def _cloned(self, src: torch.Tensor, made: torch.Tensor) -> None:
        """`made` has the values of `src` in a storage of its own; of an unchanged tensor it is as good as that."""
        source = self._pure.get(storage_id(src))
        if source is not None and src.numel() and storage_id(made) != storage_id(src):
            held, key = source.copied(src, made), storage_id(made)
            if isinstance(held, Held):
                self._pure[key] = held
            else:
                self._how[key] += f" of {held}"

    def _copy(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        dst: torch.Tensor = args[0]
        src: torch.Tensor = args[1]
        key, fqns = storage_id(src), self._origin.get(storage_id(src), set())
        if storage_id(dst) not in self._name:
            if dst.device.type != "meta" and src.device.type != "meta":
                func(*args, **kwargs)
            self._wrote(dst, fqns, "aten::copy_")
        elif key in self._numbers and not fqns:
            self._wrote(dst, fqns, "aten::fill_")
        elif not dst.numel():
            self._reached.add(storage_id(dst))
        elif key not in self._pure:
            self._wrote(dst, fqns, self._how.get(key, "aten::copy_"))
        else:
            self._copy_fed(self._pure[key], src, dst)
        return dst

    def _copy_fed(self, source: Held, src: torch.Tensor, dst: torch.Tensor) -> None:
        """A view of what is unchanged of a fed tensor is copied to a parameter: a row, or misc."""
        key, fqn = storage_id(dst), source.fqn
        self._reached.add(key)
        self._origin[key].add(fqn)
        name = self._name[key]
        found = source.box_of(src, dst)
        if dst.dtype != self._params[name].dtype:
            found = f"{name} of {self._params[name].dtype} is written as {dst.dtype}"
        if isinstance(found, str):
            self.misc.setdefault(fqn, f"the loader copies it to {name} through {found}")
            self._computed[key].append(view_ranges(dst))
            return
        region, stride = found
        row = TracedRow(fqn, region, name, dst.storage_offset(), stride)
        size = dst.element_size()
        self._rows.append(row)
        self._copied[key].append((fqn, strided_ranges(row.storage_offset * size, region.sizes, stride, size)))

    def _wrote(self, dst: torch.Tensor, fqns: set[str], op: str) -> None:
        """`op` wrote values of `fqns` to `dst` in place, other than by a plain copy of a fed tensor."""
        key = storage_id(dst)
        name = self._name.get(key)
        if name is not None and op in _FILLS and not fqns:
            if dst.numel():
                self._fills[key].append((len(self._copied[key]), view_ranges(dst)))
            return
        if name is None:
            self._wrote_elsewhere(dst, fqns, op)
            return
        if dst.numel():
            self._computed[key].append(view_ranges(dst))
        self._origin[key] |= fqns
        for fqn in sorted(fqns):
            self.misc.setdefault(fqn, f"the loader computes {name} from it by {op}")
        if not fqns and dst.numel():
            self.problems.append(
                f"{name}: {_spans(_sorted(view_ranges(dst)))} written by {op} with values that come from no tensor of "
                "the table"
            )

    def _wrote_elsewhere(self, dst: torch.Tensor, fqns: set[str], op: str) -> None:
        """A value of `fqns` went to a tensor that is no parameter; only the loader itself can repeat that."""
        key = storage_id(dst)
        fqns = fqns | self._origin.get(key, set())
        if not fqns:
            return
        if key not in self._origin:
            self._register(dst)
        self._pure.pop(key, None)
        self._origin[key], self._how[key] = fqns, op
        for fqn in sorted(fqns):
            self.misc.setdefault(fqn, f"the loader writes it by {op} to a tensor that is no parameter")

    def check_cover(self, derived: Mapping[str, str]) -> tuple[dict[str, tuple[ByteRange, ...]], list[str]]:
        """Padding of every parameter, and a problem for every byte that is not written as it must be."""
        padding: dict[str, tuple[ByteRange, ...]] = {}
        problems = [
            f"{n}: the loader replaced its storage; it must be filled in place"
            for n, p in self._params.items()
            if storage_id(p) not in self._name
        ]
        sharing: defaultdict[int, list[str]] = defaultdict(list)
        for name, param in self._params.items():
            sharing[storage_id(param)].append(name)
        for key, name in self._name.items():
            pads, found = self._check_storage(key, sharing[key], any(n in derived for n in sharing[key]))
            problems += [f"{name}: {text}" for text in found]
            if pads:
                padding[name] = pads
        return padding, problems

    def _check_storage(self, key: int, names: list[str], derived: bool) -> tuple[tuple[ByteRange, ...], list[str]]:
        target = join(view_ranges(self._params[n]) for n in names)
        rows = self._copied[key]
        copied = join(r for fqn, r in rows if fqn not in self.misc)
        computed = join([*self._computed[key], *(r for fqn, r in rows if fqn in self.misc)])
        filled = join(r for _, r in self._fills[key])
        got, size = account(target, copied, computed, filled), int((target[:, 1] - target[:, 0]).sum())
        if self._untouched(key) and size:
            what = "only a constant is written" if len(filled) else "nothing is written"
            text = f"{what} to its {size} bytes: the table lacks its tensor, or it must be declared as derived"
            return tuple(got.padding), [] if derived else [text]
        found = [f"{_spans(got.holes)} of {size} written by no tensor"] if got.holes else []
        found += [f"{_spans(got.twice)} of {size} written more than once"] if got.twice else []
        for before, ranges in self._fills[key]:
            lost = common(join(r for _, r in rows[:before]), ranges)
            found += (
                [f"{_spans(lost)} of {size} filled with a constant after a tensor was copied there"] if lost else []
            )
        return tuple(got.padding), found

    def left_alone(self, param: str) -> bool:
        """Whether no tensor of the table reached `param`."""
        return param in self._params and self._untouched(storage_id(self._params[param]))

    def _untouched(self, key: int) -> bool:
        return not self._copied[key] and not self._computed[key] and key not in self._reached


_FILLS = frozenset({"aten::fill_", "aten::zero_"})
_COPIES = frozenset({"aten::clone", "aten::_to_copy"})


@cache
def _is_view(func: Any) -> bool:
    """Whether results of an operation share storage with its arguments, and it writes nothing."""
    aliases = any(argument.alias_info is not None for argument in func._schema.arguments)
    return aliases and not func._schema.is_mutable


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Tensors of nested lists, tuples and mappings: all that an operation's arguments are made of."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for part in tree for tensor in _tensors(part)]
    return _tensors(list(tree.values())) if isinstance(tree, dict) else []


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operation writes in place."""
    return [tensor for i, name in _outputs(func) for tensor in _tensors(args[i] if i < len(args) else kwargs.get(name))]


@cache
def _outputs(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an operation writes, by its schema."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _sorted(ranges: np.ndarray) -> list[ByteRange]:
    return [(int(a), int(b)) for a, b in ranges[np.argsort(ranges[:, 0])]]


def _spans(ranges: list[ByteRange]) -> str:
    """`bytes 0:8, 16:24 and 3 more ranges`."""
    shown = ", ".join(f"{a}:{b}" for a, b in ranges[:4])
    return f"bytes {shown}" + (f" and {len(ranges) - 4} more ranges" if len(ranges) > 4 else "")
