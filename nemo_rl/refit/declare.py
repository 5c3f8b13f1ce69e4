"""What ranks tell each other before a plan, and the question whether all say the same. Equal statements travel once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from nemo_rl.refit.base import Declaration, RefitOptions, Source
from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import AgreementError, PlanError
from nemo_rl.refit.layout import Layout, TensorTable
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.wire import (
    pack_declaration,
    pack_source,
    pack_table,
    unpack_declaration,
    unpack_source,
    unpack_table,
)

T = TypeVar("T")
_SMALL = 1 << 62


@dataclass(frozen=True, slots=True)
class Declared:
    """What the trainers say.

    Attributes:
        table: every tensor that they export, in natural order.
        sources: trainer rank -> layout; replicas share one object.
        unused: tensors that they do not export, with the reason.
        problems: what must refuse the plan, with the trainer's name.
    """

    table: TensorTable
    sources: Mapping[int, Layout]
    unused: Mapping[str, str]
    problems: tuple[str, ...]


def share_sources(control: Control, source: Source | None, layout: Layout | None, problems: Sequence[str]) -> Declared:
    """Every rank calls it, trainers with what they hold (`layout`: of its holdings), the others with None.

    Raises:
        PlanError: trainers do not build the same model.
    """
    mine: tuple[bytes, ...] = ()
    if source is not None and layout is not None:
        mine = pack_table(source.table()), pack_source(layout, source.unused(), problems)
    keys, blobs = _exchange(control, "declare", mine)
    world = control.world
    first = world.trainers[0]
    differ = [r for r in world.trainers if keys[r][0] != keys[first][0]]
    if differ:
        raise PlanError(
            f"the tensor table of {', '.join(map(world.describe, differ))} is not that of {world.describe(first)}",
            rank=control.rank,
            phase="declare",
            remedy="all trainer ranks must build the same model",
        )
    said = _decoded(unpack_source, {r: keys[r][1] for r in world.trainers}, blobs)
    return Declared(
        table=unpack_table(blobs[keys[first][0]]),
        sources={r: layout for r, (layout, _, _) in said.items()},
        unused={name: reason for _, given, _ in said.values() for name, reason in given.items()},
        problems=tuple(f"{world.describe(r)}: {text}" for r, (_, _, found) in said.items() for text in found),
    )


def share_declarations(control: Control, declaration: Declaration | None) -> dict[int, Declaration]:
    """Every rank calls it, generators with what their loader says; generator rank -> declaration."""
    mine = () if declaration is None else (pack_declaration(declaration),)
    keys, blobs = _exchange(control, "declare", mine)
    return _decoded(unpack_declaration, {r: keys[r][0] for r in control.world.generators}, blobs)


def statement(plan: RefitPlan, transport: str, options: RefitOptions) -> dict[str, str]:
    """What all ranks must have in common before a byte moves."""
    dtypes = json.dumps([str(m.dtype) for m in plan.table.values()])
    return {
        "plan digest": plan.digest,
        "dtype table": hashlib.sha256(dtypes.encode()).hexdigest(),
        "transport": transport,
        "options": repr(options),
    }


def agree(control: Control, mine: Mapping[str, str | int | None], meanwhile: Callable[[], None] = lambda: None) -> None:
    """All ranks that say something of an item say the same, or nobody enters a transfer.

    Args:
        mine: items, the same ones in the same order on all ranks; None where this rank says nothing of one.
        meanwhile: called once, while others come.

    Raises:
        AgreementError: naming every rank and item that differs from what the first trainer says.
    """
    said = control.meet("agree", [_word(value) for value in mine.values()], meanwhile)
    meant = said[control.world.trainers[0]]
    if any(word not in (0, want) for words in {*said} for word, want in zip(words, meant, strict=True)):
        _refuse(control, mine)


def agree_still(rank: int, prepared: int | None, num_steps: int | None) -> None:
    """Weights are still those that ranks agreed on when they prepared. Raises AgreementError."""
    if num_steps not in (None, prepared):
        raise AgreementError(
            f"these weights took {num_steps} optimizer steps, and {prepared} when the refit was prepared",
            rank=rank,
            phase="agree",
            remedy="train behind the refit, or prepare it again on all ranks as another version",
        )


def _word(value: str | int | None) -> int:
    """What stands for a value where ranks compare; 0 where there is none. Small numbers stand for themselves."""
    if isinstance(value, int) and abs(value) < _SMALL:
        return 2 * value + 1
    return 0 if value is None else _digest(value)


@lru_cache(maxsize=64)
def _digest(value: Any) -> int:
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _refuse(control: Control, mine: Mapping[str, Any]) -> None:
    """Say who differs in what; every rank calls it."""
    world, first = control.world, control.world.trainers[0]
    items = {item: value for item, value in mine.items() if value is not None}
    said = {r: json.loads(b) for r, b in control.gather("agree", json.dumps(items).encode()).items()}
    differ = [
        f"{world.describe(r)} has {item} {value}, {world.describe(first)} has {said[first].get(item)}"
        for r, other in said.items()
        for item, value in sorted(other.items())
        if value != said[first].get(item)
    ]
    if differ:
        raise AgreementError(
            "; ".join(differ),
            rank=control.rank,
            phase="agree",
            remedy="start all ranks from the same configuration, model and code, and have all do the same steps",
        )


def _exchange(
    control: Control, phase: str, payloads: Sequence[bytes]
) -> tuple[dict[int, tuple[str, ...]], dict[str, bytes]]:
    """Gather where equal payloads travel once: ranks pass hashes, blobs are stored by hash."""
    keys = [hashlib.sha256(payload).hexdigest() for payload in payloads]
    store = control.asked
    for key, payload in zip(keys, payloads, strict=True):
        if not store.check([f"blob/{key}"]):
            store.set(f"blob/{key}", payload)
    said = {r: tuple(b.decode().split()) for r, b in control.gather(phase, " ".join(keys).encode()).items()}
    wanted = sorted({key for named in said.values() for key in named})
    blobs = dict(zip(wanted, control.read([f"blob/{key}" for key in wanted]), strict=True))
    for key, blob in blobs.items():
        if hashlib.sha256(blob).hexdigest() != key:
            raise PlanError(
                f"a statement of {len(blob)} bytes is not the one that was published under {key[:12]}",
                rank=control.rank,
                phase=phase,
                remedy="the store was written by something else or is damaged; give every session a store of its own",
            )
    return said, blobs


def _decoded(unpack: Callable[[bytes], T], keys: Mapping[int, str], blobs: Mapping[str, bytes]) -> dict[int, T]:
    """Each distinct blob decoded once, by rank."""
    values = {key: unpack(blobs[key]) for key in dict.fromkeys(keys.values())}
    return {rank: values[key] for rank, key in keys.items()}
