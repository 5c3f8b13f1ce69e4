"""What a row proves, each as a verdict with its numbers. Nothing here trusts the plan: bytes are counted anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.trace import Trace
from tests.golden.case import Case, Target
from tests.golden.execute import OPTIONS, ORDER, Outcome
from tests.golden.ranks import Tensors, id_of, written

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check of one row: its name, what is wrong (nothing where it passed), and what was seen."""

    check: str
    wrong: tuple[str, ...]
    seen: str = ""

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def text(self) -> str:
        if self.ok:
            return self.seen or "ok"
        rest = f"; and {len(self.wrong) - _SHOWN} more" if len(self.wrong) > _SHOWN else ""
        return "; ".join(self.wrong[:_SHOWN]) + rest


def judge(case: Case, outcome: Outcome) -> list[Verdict]:
    """Every check of a case that ran."""
    return [
        cover(case),
        used(case, outcome),
        equal(case, outcome),
        moved(case, outcome),
        staging(outcome),
        bulk(case, outcome),
    ]


# ---- 1: exact cover, and every trainer tensor accounted for


def cover(case: Case) -> Verdict:
    """Every byte of every parameter and persistent buffer: copied once, padding, computed by the loader, or left."""
    wrong, sums, seen = [], Counter[str](), set()
    for rank, target in enumerate(case.targets):
        if (target.spec, target.role) in seen:
            continue
        seen.add((target.spec, target.role))
        for name, text, counts in _accounts(target):
            sums.update(counts)
            wrong += [f"generator {rank}: {name}: {text}"] if text else []
    return Verdict("cover", tuple(wrong), ", ".join(f"{n} {kind}" for kind, n in sorted(sums.items())) + " bytes")


def _accounts(target: Target) -> Iterator[tuple[str, str, Counter[str]]]:
    """(parameter, what is wrong, bytes by what becomes of them) of every storage."""
    trace, storage, done = target.trace, target.wanted["A"], set()
    hits = _by_storage(trace, storage)
    for name, tensor in storage.items():
        key = id_of(tensor)
        if key in done:
            continue
        done.add(key)
        shared = [n for n, t in storage.items() if id_of(t) == key]
        rows = hits.get(key, np.zeros(tensor.untyped_storage().nbytes(), np.int32))
        pads = np.zeros(len(rows), bool)
        for one in shared:
            for first, end in trace.padding.get(one, ()):
                pads[first:end] = True
        rest = int(((rows == 0) & ~pads).sum())
        reason = next((trace.left_alone[n] for n in shared if n in trace.left_alone), "")
        kind = f"left ({reason})" if reason else "computed"
        counts = Counter({"copied": int((rows > 0).sum()), "padding": int(pads.sum()), kind: rest})
        yield name, _account_error(trace, rows, pads, rest, reason), +counts


def _account_error(trace: Trace, rows: np.ndarray, pads: np.ndarray, rest: int, reason: str) -> str:
    if (rows > 1).any():
        return f"{int((rows > 1).sum())} bytes are copied more than once, the first at {int(np.argmax(rows > 1))}"
    if ((rows > 0) & pads).any():
        return f"{int(((rows > 0) & pads).sum())} bytes are copied and padding"
    if rest and not reason and not trace.misc:
        return f"{rest} of {len(rows)} bytes are written by nothing, the first at {int(np.argmax((rows == 0) & ~pads))}"
    return ""


def _by_storage(trace: Trace, storage: Tensors) -> dict[int, np.ndarray]:  # type: ignore[type-arg]
    hits: dict[int, np.ndarray] = {}
    for name, counts in written(trace, storage).items():
        key = id_of(storage[name])
        hits[key] = hits[key] + counts if key in hits else counts
    return hits


def used(case: Case, outcome: Outcome) -> Verdict:
    """Every trainer tensor travels or is unused with a reason; trainers give out what a checkpoint holds."""
    plan, table = outcome.plan, case.trainer.table
    travels = {plan.names[i] for i in np.unique(plan.bulk.tensor).tolist()} | set(plan.misc_fqns)
    wrong = [
        f"{f}: does not travel, and no reason is given" for f in table if f not in travels and not plan.unused.get(f)
    ]
    wrong += [f"{f}: travels, and is called unused" for f in travels if f in plan.unused]
    wrong += [f"{f}: not as in a checkpoint of the family" for f in case.differs_from_checkpoint]
    reasons = Counter(plan.unused.values())
    text = ", ".join(f"{n} unused: {why}" for why, n in reasons.items())
    return Verdict("used", tuple(wrong), f"{len(travels)} travel" + (f", {text}" if text else ""))


# ---- 2: bit equality with the engine's own loader


def equal(case: Case, outcome: Outcome) -> Verdict:
    """After every refit, every byte is as the engine's own loader leaves it on that rank."""
    wrong, compared = [], 0
    for number, (name, held) in enumerate(zip(ORDER, outcome.held, strict=True), 1):
        if set(held) != set(range(len(case.targets))):
            wrong.append(f"refit {number}: ranks {sorted(held)} of {len(case.targets)} answered")
        for rank, got in held.items():
            want = case.targets[rank].wanted[name]
            wrong += [f"refit {number} ({name}), generator {rank}: {text}" for text in differences(want, got)]
            compared += sum(t.nbytes for t in want.values())
    for rank, target in enumerate(case.targets):
        wrong += [f"generator {rank}: {n}: A and B do not differ, so staleness would not show" for n in _alike(target)]
    return Verdict("equal", tuple(wrong), f"{compared} bytes compared after {len(ORDER)} refits")


def differences(want: Tensors, got: Tensors) -> list[str]:
    """Each parameter that differs, with the first byte that does."""
    wrong = [f"{name} is there on one side alone" for name in sorted(want.keys() ^ got.keys())]
    for name in sorted(want.keys() & got.keys()):
        one, two = _flat(want[name]), _flat(got[name])
        if len(one) != len(two):
            wrong.append(f"{name}: {len(two)} bytes, {len(one)} wanted")
        elif not torch.equal(one, two):
            bad = torch.nonzero(one != two).flatten()
            wrong.append(f"{name}: {len(bad)} of {len(one)} bytes differ, the first at {int(bad[0])}")
    return wrong


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _alike(target: Target) -> list[str]:
    """Parameters that rows fill and that weights A and B fill with the same bytes."""
    a, b = target.wanted["A"], target.wanted["B"]
    filled = {row.param for row in target.trace.rows if row.region.volume}
    return sorted(n for n in filled if torch.equal(_flat(a[n]), _flat(b[n])))


# ---- 3: bytes that move, and memory


def moved(case: Case, outcome: Outcome) -> Verdict:
    """Sent = received = planned, and planned = what the generators' loaders take, each byte once."""
    plan, trainers = outcome.plan, set(outcome.plan.world.trainers)
    item = {fqn: meta.dtype.itemsize for fqn, meta in plan.table.items()}
    least = sum(
        row.region.volume * item[row.fqn]
        for target in case.targets
        for row in target.trace.rows
        if row.fqn not in plan.misc_reasons
    )
    messages = plan.bulk.messages
    wire = int(messages[messages[:, 1] != messages[:, 2], 5].sum())
    wrong = (
        []
        if plan.bulk_bytes == plan.required_bytes == least
        else [f"{plan.bulk_bytes} bytes are planned, {plan.required_bytes} required, the loaders take {least}"]
    )
    for number, reports in enumerate(outcome.reports, 1):
        total = sum(r.bulk_bytes for r in reports.values())
        if total != 2 * wire:
            wrong.append(f"refit {number}: {total} bytes sent and received, {wire} planned each way")
        whole = {r.misc_bytes for rank, r in reports.items() if rank not in trainers}
        due = sum(b.num_bytes for b in plan.misc_buffers)
        if whole - {due}:
            wrong.append(f"refit {number}: generators got {sorted(whole)} bytes whole, {due} are planned")
        wrong += [f"refit {number}: rank {rank} did not verify" for rank, r in reports.items() if not r.verified]
    return Verdict("moved", tuple(wrong), f"{wire} bytes on the wire, {least} taken")


def staging(outcome: Outcome) -> Verdict:
    """Message buffers stay within 2 x streams x bucket; tensors that travel whole take their own size beside them."""
    bound = 2 * OPTIONS.num_streams * OPTIONS.bucket_bytes + sum(b.num_bytes for b in outcome.plan.misc_buffers)
    top = max(r.staging_bytes for reports in outcome.reports for r in reports.values())
    largest = max((outcome.plan.table[n].num_bytes for n in _bulk_names(outcome)), default=0)
    wrong = (f"{top} bytes of buffers, {bound} allowed",) if top > bound else ()
    return Verdict("staging", wrong, f"{top} bytes, bound {bound}, largest tensor {largest}")


def _bulk_names(outcome: Outcome) -> set[str]:
    return {outcome.plan.names[i] for i in np.unique(outcome.plan.bulk.tensor).tolist()}


def bulk(case: Case, outcome: Outcome) -> Verdict:
    """The share of the travelling bytes that goes from shard to shard."""
    plan, least = outcome.plan, case.row.model.bulk
    total = sum(plan.table[n].num_bytes for n in _bulk_names(outcome) | set(plan.misc_fqns))
    share = 1 - plan.misc_bytes / total
    why = f"; {case.row.model.why}" if share < 0.995 else ""
    wrong = (f"{share:.2%} of the bytes are bulk, {least:.2%} are due",) if share < least else ()
    return Verdict("bulk", wrong, f"{share:.2%} of {total} bytes{why}")
