"""Hand-made loaders: what is traced equals what they write, and every planted fault is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from nemo_rl.refit.cover import account, common, view_ranges
from nemo_rl.refit.held import Held
from nemo_rl.refit.layout import TensorMeta, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import Trace, TracedRow, trace_loader

Weights = Iterable[tuple[str, torch.Tensor]]
Params = dict[str, torch.Tensor]
Loader = Callable[[Params, Weights], object]


def table_of(**shapes: tuple[int, ...]) -> TensorTable:
    return {name: TensorMeta(shape, torch.float32) for name, shape in shapes.items()}


def traced(loader: Loader, table: TensorTable, params: Params, derived: dict[str, str] | None = None) -> Trace:
    storages: dict[int, torch.Tensor] = {}
    meta: Params = {}
    for name, param in params.items():  # keep sharing, as_strided views included
        key = param.untyped_storage().data_ptr()
        if key not in storages:
            storages[key] = torch.empty(
                param.untyped_storage().nbytes() // param.itemsize, dtype=param.dtype, device="meta"
            )
        meta[name] = storages[key].as_strided(param.shape, param.stride(), param.storage_offset())
    return trace_loader(lambda weights: loader(meta, weights), table, meta, derived)


def replay(trace: Trace, values: Params, params: Params) -> None:
    """Do what the trace says: rows from their boxes, padding with zero bytes."""
    for row in trace.rows:
        at = params[row.param].as_strided(row.region.sizes, row.stride, row.storage_offset)
        at.copy_(values[row.fqn][row.region.slices_in(Region.whole(tuple(values[row.fqn].shape)))])
    for name, ranges in trace.padding.items():
        flat = torch.empty(0, dtype=torch.uint8).set_(params[name].untyped_storage())
        for first, end in ranges:
            flat[first:end] = 0


def check(loader: Loader, table: TensorTable, make: Callable[[], Params]) -> Trace:
    """Trace, then compare a replay with the loader itself on real tensors, bit for bit."""
    trace = traced(loader, table, make())
    assert trace.problems == () and trace.misc == {}
    values = {f: torch.randn(m.shape) for f, m in table.items()}
    wanted, got = make(), make()
    for p in (*wanted.values(), *got.values()):
        p.fill_(float("nan"))
    loader(wanted, values.items())
    replay(trace, values, got)
    for name in wanted:
        assert torch.equal(wanted[name].contiguous().view(torch.uint8), got[name].contiguous().view(torch.uint8)), name
    return trace


# ---- loaders of models


def load_qkv(params: Params, weights: Weights) -> None:
    at = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}
    for name, w in weights:
        start, n = at[name]
        params["qkv"].narrow(0, start, n).copy_(w.narrow(0, n, n))  # the second of two ranks


def test_fused_qkv() -> None:
    trace = check(load_qkv, table_of(q=(8, 6), k=(4, 6), v=(4, 6)), lambda: {"qkv": torch.empty(8, 6)})
    assert trace.rows[0] == TracedRow("q", Region((4, 0), (4, 6)), "qkv", 0, (6, 1))
    assert trace.rows[2] == TracedRow("v", Region((2, 0), (2, 6)), "qkv", 36, (6, 1))


def test_gate_up_and_a_row_parallel_shard() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            if name == "down":
                params["down"].copy_(w[:, 3:])
            else:
                params["gate_up"].chunk(2)[name == "up"].copy_(w)

    check(
        load,
        table_of(gate=(3, 4), up=(3, 4), down=(4, 6)),
        lambda: {"gate_up": torch.empty(6, 4), "down": torch.empty(4, 3)},
    )


def test_a_stack_of_experts_from_single_and_from_fused_tensors() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            if name == "fused":
                for e, one in enumerate(w.unbind(0)):
                    params["w2"].data[e].copy_(one.transpose(0, 1))
            else:
                params["w13"].data[int(name[1]), 2 * (name[0] == "u") :][:2].copy_(w[2:4])

    shapes = {f"{p}{e}": (4, 3) for e in range(3) for p in "gu"}
    make = lambda: {"w13": torch.empty(3, 4, 3), "w2": torch.empty(3, 5, 2)}  # noqa: E731
    trace = check(load, table_of(fused=(3, 2, 5), **shapes), make)
    assert TracedRow("fused", Region((1, 0, 0), (1, 2, 5)), "w2", 10, (1, 1, 2)) in trace.rows


def test_transposed_parameter() -> None:
    trace = check(
        lambda params, weights: [params["w"].copy_(w.t()) for _, w in weights],
        table_of(a=(5, 3)),
        lambda: {"w": torch.empty(3, 5)},
    )
    assert trace.rows == (TracedRow("a", Region((0, 0), (5, 3)), "w", 0, (1, 5)),)


def test_padded_vocabulary_filled_after_and_filled_first() -> None:
    def after(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["e"][:5].copy_(w)
            params["e"][5:].fill_(0)

    def first(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["e"].zero_()
            params["e"][:5] = w

    for load in (after, first):
        trace = check(load, table_of(e=(5, 2)), lambda: {"e": torch.empty(8, 2)})
        assert trace.padding == {"e": ((40, 64),)}


def test_a_rank_that_holds_padding_alone() -> None:
    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["e"][:0].copy_(w[5:])
            params["e"][0:].fill_(0)

    assert check(load, table_of(e=(5, 2)), lambda: {"e": torch.empty(4, 2)}).padding == {"e": ((0, 32),)}


def test_shared_storage_counts_once_under_its_first_name() -> None:
    def make() -> Params:
        e = torch.empty(4, 2)
        return {"embed": e, "head": e.view(4, 2)}

    trace = check(lambda params, weights: [params["head"].copy_(w) for _, w in weights], table_of(e=(4, 2)), make)
    assert [r.param for r in trace.rows] == ["embed"]


def test_scalars_and_axes_of_size_one() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            params[name].copy_(w.view(params[name].shape))

    make = lambda: {"s": torch.empty(1), "c": torch.empty(6, 4), "n": torch.empty(3, 1, 1)}  # noqa: E731
    trace = check(load, table_of(s=(), c=(6, 1, 4), n=(1, 3)), make)
    assert [r.region for r in trace.rows] == [Region((), ()), Region((0, 0, 0), (6, 1, 4)), Region((0, 0), (1, 3))]


def test_merged_and_split_axes_that_are_boxes() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            params[name].copy_(w.reshape(params[name].shape))

    make = lambda: {"a": torch.empty(12), "b": torch.empty(2, 3, 4)}  # noqa: E731
    assert len(check(load, table_of(a=(3, 4), b=(6, 4)), make).rows) == 2


def test_an_unused_tensor_is_no_problem() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            if name in params:
                params[name].copy_(w)

    trace = traced(load, table_of(a=(2,), rotary=(9,)), {"a": torch.empty(2)})
    assert trace.problems == () and trace.misc == {} and len(trace.rows) == 1


def stacked(params: Params, weights: Weights) -> None:
    """Experts as one tensor (experts, hidden, gate and up): a rank takes half of each part, and turns them over."""
    for _, w in weights:
        gate, up = w.chunk(2, dim=2)
        params["w13"][:, :2].copy_(gate[:, :, 2:4].permute(0, 2, 1).contiguous())
        for expert, one in enumerate(up.transpose(1, 2).contiguous()[:, 2:].clone()):
            params["w13"][expert, 2:].copy_(one)


def test_stacked_experts_through_copies_of_their_own() -> None:
    trace = check(stacked, table_of(e=(3, 5, 8)), lambda: {"w13": torch.empty(3, 4, 5)})
    assert [row.region for row in trace.rows] == [
        Region((0, 0, 2), (3, 5, 2)),
        *(Region((e, 0, 6), (1, 5, 2)) for e in range(3)),
    ]


def test_faults_behind_a_copy_are_seen() -> None:
    """Swapped experts and parts are other boxes; a hole and a double write are problems."""

    def swapped(params: Params, weights: Weights) -> None:
        for _, w in weights:
            turned = w.transpose(1, 2).contiguous()
            params["w13"][0].copy_(turned[1, :4])
            params["w13"][1].copy_(turned[0, 4:])

    def hole_and_overlap(params: Params, weights: Weights) -> None:
        for _, w in weights:
            turned = w.transpose(1, 2).contiguous()
            params["w13"][0, :3].copy_(turned[0, :3])
            params["w13"][1].copy_(turned[1, :4])
            params["w13"][1, :1].copy_(turned[1, 4:5])

    rows = traced(swapped, table_of(e=(2, 5, 8)), {"w13": torch.empty(2, 4, 5)}).rows
    assert [row.region for row in rows] == [Region((1, 0, 0), (1, 5, 4)), Region((0, 0, 4), (1, 5, 4))]
    problems = traced(hole_and_overlap, table_of(e=(2, 5, 8)), {"w13": torch.empty(2, 4, 5)}).problems
    assert problems == (
        "w13: bytes 60:80 of 160 written by no tensor",
        "w13: bytes 80:100 of 160 written more than once",
    )


def test_a_copy_that_is_changed_or_is_no_box_is_misc() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            copy = w.clone()
            params[name].copy_(copy.mul_(2) if name == "a" else w.view(2, 3, 4).transpose(0, 1).reshape(6, 4))

    trace = traced(load, table_of(a=(2,), b=(6, 4)), {"a": torch.empty(2), "b": torch.empty(6, 4)})
    assert sorted(trace.misc) == ["a", "b"] and trace.rows == () and trace.problems == ()
    assert "mul_" in trace.misc["a"] and "aten::clone of a view of shape (6, 4)" in trace.misc["b"]


def test_one_tensor_in_several_places() -> None:
    """A logical expert in two slots, and one key head on both halves."""

    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            for slot in (0, 2):
                params["slots"][slot].copy_(w)
            params["slots"][1].copy_(w.clone())

    trace = check(load, table_of(e=(4, 2)), lambda: {"slots": torch.empty(3, 4, 2)})
    assert [row.storage_offset for row in trace.rows] == [0, 16, 8]
    short = lambda params, weights: [params["slots"][s].copy_(w) for _, w in weights for s in (0, 0)]  # noqa: E731
    problems = traced(short, table_of(e=(4, 2)), {"slots": torch.empty(3, 4, 2)}).problems
    assert problems == (
        "slots: bytes 32:96 of 96 written by no tensor",
        "slots: bytes 0:32 of 96 written more than once",
    )


# ---- misc: the value is computed, or its way is no box


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (lambda w: -w.exp(), "aten::neg"),
        (lambda w: w.to(torch.bfloat16).to(torch.float32), "_to_copy"),
        (lambda w: w[:1].expand(6, 4), "stride 0"),
        (lambda w: w[:1], "broadcast"),
        (lambda w: torch.cat([w[3:], w[:3]]), "aten::cat"),
        (lambda w: w.neg_(), "neg_"),
        (lambda w: w.double(), "_to_copy"),
        (lambda w: w.view(torch.int32), "viewed as torch.int32"),
        (lambda w: torch.as_strided(w, (6, 4), (3, 1)), "no box"),
        (lambda w: torch.as_strided(w, (6, 4), (1, 1)), "no box"),
    ],
)
def test_computed_values_are_misc(transform: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    trace = traced(
        lambda params, weights: [params["a"].copy_(transform(w)) for _, w in weights],
        table_of(a=(6, 4)),
        {"a": torch.empty(6, 4)},
    )
    assert trace.rows == () and trace.problems == ()
    assert list(trace.misc) == ["a"] and reason in trace.misc["a"] and "a" in trace.misc["a"]


def test_a_step_and_a_cast_into_the_parameter_are_misc() -> None:
    table = table_of(a=(12,), b=(2,))
    params = {"a": torch.empty(6), "b": torch.empty(2, dtype=torch.float64)}

    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            params[name].copy_(w[::2] if name == "a" else w)

    trace = traced(load, table, params)
    assert "no box" in trace.misc["a"] and "cast" in trace.misc["b"] and trace.problems == ()


def test_a_view_that_crosses_rows_is_misc() -> None:
    trace = traced(
        lambda params, weights: [params["a"].copy_(w.flatten()[: params["a"].numel()]) for _, w in weights],
        table_of(a=(3, 4)),
        {"a": torch.empty(6)},
    )
    assert "crosses from one row into the next" in trace.misc["a"] and trace.rows == ()


def test_windows_that_overlap_are_misc() -> None:
    trace = traced(
        lambda params, weights: [params["a"].copy_(w.unfold(0, 2, 1)) for _, w in weights],
        table_of(a=(4,)),
        {"a": torch.empty(3, 2)},
    )
    assert "no box" in trace.misc["a"] and trace.rows == ()


def test_a_value_of_two_tensors_takes_all_their_rows_along() -> None:
    def load(params: Params, weights: Weights) -> None:
        got = dict(weights)
        params["a"].copy_(got["a"])
        params["sum"].copy_(got["a"] + got["b"])
        params["c"].copy_(got["c"])

    trace = traced(load, table_of(a=(2,), b=(2,), c=(2,)), {n: torch.empty(2) for n in ("a", "sum", "c")})
    assert sorted(trace.misc) == ["a", "b"] and [r.fqn for r in trace.rows] == ["c"] and trace.problems == ()


def test_a_parameter_changed_in_place_or_copied_on_is_misc() -> None:
    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["a"].copy_(w)
        params["a"].mul_(2)

    def twice(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["a"].copy_(w)
        params["b"].copy_(params["a"])

    def in_two_steps(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["a"].copy_(w.exp())
        params["b"].copy_(params["a"])

    two_steps = traced(in_two_steps, table_of(a=(2,)), {"a": torch.empty(2), "b": torch.empty(2)})
    changed = traced(load, table_of(a=(2,)), {"a": torch.empty(2)})
    copied = traced(twice, table_of(a=(2,)), {"a": torch.empty(2), "b": torch.empty(2)})
    for trace in (changed, copied, two_steps):
        assert list(trace.misc) == ["a"] and trace.rows == () and trace.problems == ()


def test_a_value_kept_outside_the_parameters_is_misc() -> None:
    kept = torch.zeros(2, device="meta")

    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["a"].copy_(w)
            kept.copy_(w)

    trace = traced(load, table_of(a=(2,)), {"a": torch.empty(2)})
    assert "no parameter" in trace.misc["a"] and trace.rows == ()


def test_a_parameter_written_as_another_dtype_is_misc() -> None:
    trace = traced(
        lambda params, weights: [params["a"].view(torch.int32).copy_(w) for _, w in weights],
        {"a": TensorMeta((2,), torch.int32)},
        {"a": torch.empty(2)},
    )
    assert "a of torch.float32 is written as torch.int32" in trace.misc["a"] and trace.problems == ()


# ---- problems


def one_problem(loader: Loader, table: TensorTable, params: Params) -> str:
    problems = traced(loader, table, params).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_hole_is_named_with_its_bytes() -> None:
    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["w"][:2, 1:].copy_(w)

    text = one_problem(load, table_of(a=(2, 3)), {"w": torch.empty(4, 4)})
    assert text == "w: bytes 0:4, 16:20, 32:64 of 64 written by no tensor"


def test_an_overlap_is_named_with_its_bytes() -> None:
    def load(params: Params, weights: Weights) -> None:
        for i, (_, w) in enumerate(weights):
            params["w"][2 * i : 2 * i + 3].copy_(w)

    text = one_problem(load, table_of(a=(3,), b=(3,)), {"w": torch.empty(5)})
    assert text == "w: bytes 8:12 of 20 written more than once"


def test_a_fill_over_a_copy_is_a_problem() -> None:
    def load(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["w"].copy_(w)
        params["w"][1:].zero_()

    assert "bytes 4:12 of 12 filled" in one_problem(load, table_of(a=(3,)), {"w": torch.empty(3)})


def test_nothing_written_and_only_a_constant_written() -> None:
    def load(params: Params, weights: Weights) -> None:
        for name, w in weights:
            params[name].copy_(w)
        params["c"].zero_()

    params = {"a": torch.empty(1), "b": torch.empty(2), "c": torch.empty(3)}
    trace = traced(load, table_of(a=(1,)), params)
    assert trace.problems[0].startswith("b: nothing is written to its 8 bytes")
    assert trace.problems[1].startswith("c: only a constant is written to its 12 bytes")
    assert traced(load, table_of(a=(1,)), params, {"b": "a scale", "c": "a scale"}).problems == ()


def test_a_missing_name_and_an_unknown_name() -> None:
    def insists(params: Params, weights: Weights) -> None:
        params["a"].copy_(dict(weights)["model.a"])

    def refuses(params: Params, weights: Weights) -> None:
        for name, w in weights:
            params[name].copy_(w)

    assert "KeyError: 'model.a'" in one_problem(insists, table_of(a=(1,)), {"a": torch.empty(1)})
    assert "stopped after b: KeyError: 'b'" in one_problem(refuses, table_of(a=(1,), b=(1,)), {"a": torch.empty(1)})


def test_a_value_of_no_tensor_and_a_replaced_storage() -> None:
    def load(params: Params, weights: Weights) -> None:
        list(weights)
        params["a"].copy_(torch.ones(2))

    def replaces(params: Params, weights: Weights) -> None:
        for _, w in weights:
            params["a"].data = w

    assert "values that come from no tensor" in one_problem(load, {}, {"a": torch.empty(2)})
    assert any("replaced its storage" in t for t in traced(replaces, table_of(a=(2,)), {"a": torch.empty(2)}).problems)


def test_parameters_with_storage_are_refused() -> None:
    with pytest.raises(ValueError, match="meta device.*: a"):
        trace_loader(lambda weights: None, {}, {"a": torch.empty(1)})


# ---- geometry against enumeration


def test_boxes_of_random_views_against_enumeration() -> None:
    """A box says exactly which element lands where, or the view is no box."""
    rng = np.random.default_rng(0)
    boxes = copies = 0
    for _ in range(600):
        shape = tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 4)))
        whole = torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)
        src, held = whole, Held.whole("w", TensorMeta(shape, torch.float32))
        for _ in range(4):
            src = random_view(src, rng)
            if rng.integers(0, 4) == 0 and src.numel():
                made = src.clone(memory_format=torch.contiguous_format) if rng.integers(0, 2) else src.clone()
                kept = held.copied(src, made)
                if isinstance(kept, Held):
                    src, held, copies = made, kept, copies + 1
        if not src.numel():
            continue
        step = int(rng.integers(1, 3))
        strides = tuple(step * n for n in torch.empty(src.shape).stride())
        dst = torch.full((2 * src.numel() + 3,), -1.0).as_strided(src.shape, strides, 3)
        found = held.box_of(src, dst)
        if isinstance(found, str):
            continue
        boxes += 1
        region, stride = found
        assert region.volume == src.numel()
        dst.copy_(src)
        there = dst.as_strided(region.sizes, stride, dst.storage_offset())
        assert torch.equal(there, whole[region.slices_in(Region.whole(shape))])
    assert boxes > 200 and copies > 100


def random_view(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    kind, dim = rng.integers(0, 6), int(rng.integers(0, max(x.dim(), 1)))
    if x.dim() == 0 or kind == 0:
        return x.unsqueeze(0)
    n = x.shape[dim]
    if kind == 1:
        return x.transpose(dim, int(rng.integers(0, x.dim())))
    if kind == 2:
        start = int(rng.integers(0, n))
        return x.narrow(dim, start, int(rng.integers(1, n - start + 1)))
    if kind == 3:
        return x.select(dim, int(rng.integers(0, n)))
    if kind == 4:
        return x.flatten() if x.is_contiguous() else x
    return x.unflatten(dim, (n // 2, 2)) if n % 2 == 0 else x[(slice(None),) * dim + (slice(None, None, 2),)]


def test_byte_ranges_of_random_views_against_enumeration() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        x = torch.empty(tuple(int(n) for n in rng.integers(1, 5, 3)))
        views = [random_view(random_view(x, rng), rng) for _ in range(3)]
        marks = []
        for view in views:
            mark = np.zeros(x.numel(), bool)
            mark[torch.arange(x.numel()).as_strided(view.shape, view.stride(), view.storage_offset()).numpy()] = True
            marks.append(mark)
        whole, (a, b, c) = view_ranges(x), (view_ranges(v) for v in views)
        got = account(whole, a, b, c)
        assert bits(got.holes, x.numel()) == list(~marks[0] & ~marks[1] & ~marks[2])
        assert bits(got.twice, x.numel()) == list(marks[0] & marks[1])
        assert bits(got.padding, x.numel()) == list(marks[2] & ~marks[0] & ~marks[1])
        assert bits(common(a, c), x.numel()) == list(marks[0] & marks[2])


def bits(ranges: list[tuple[int, int]], count: int) -> list[bool]:
    out = np.zeros(count, bool)
    for first, end in ranges:
        out[first // 4 : end // 4] = True
    return list(out)
