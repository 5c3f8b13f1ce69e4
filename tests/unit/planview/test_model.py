"""The numbers of a view are the plan's, and the prediction is arithmetic that a reader can repeat."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from nemo_rl.planview.groups import between, groups_of
from nemo_rl.planview.model import PlanView, load_view
from nemo_rl.planview.predict import Links, predict
from nemo_rl.planview.units import seconds, size

from .views import COMPUTED, LINKS, plan_of, view_of


def same(a: PlanView, b: PlanView) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(PlanView))


@pytest.mark.parametrize(("trainers", "generators"), [(2, 3), (4, 2), (1, 1), (3, 8)])
def test_bytes_are_those_of_the_plan(trainers, generators):
    plan, view = plan_of(trainers, generators), view_of(trainers, generators)
    assert view.matrix.sum() == view.bulk_bytes == plan.bulk_bytes == view.required_bytes > 0
    assert view.digest == plan.digest
    for index, rank in enumerate(plan.world.trainers):
        assert view.trainers[index].wire_bytes == plan.bulk.wire_bytes(rank)[0] == view.matrix[index].sum()
    for index, rank in enumerate(plan.world.generators):
        assert view.generators[index].wire_bytes == plan.bulk.wire_bytes(rank)[1] == view.matrix[:, index].sum()
    assert [(r.reason, r.count, r.first) for r in view.misc] == [(COMPUTED, 1, "bias")]
    assert [(r.count, r.first) for r in view.unused] == [(1, "frozen")]
    assert view.bulk_share == view.required_bytes / (view.required_bytes + 12 * generators)


def test_a_saved_view_reads_back_equal(tmp_path):
    view = view_of(2, 3)
    path = tmp_path / "plan.json"
    path.write_text(view.to_json())
    assert same(load_view(path), view)
    assert not same(load_view(path), view_of(2, 3, rows=96))


@pytest.mark.parametrize("damage", [lambda t: t[:100], lambda t: "{}", lambda t: t.replace('"num_rounds"', '"rounds"')])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "plan.json"
    path.write_text(damage(view_of(2, 2).to_json()))
    with pytest.raises(ValueError, match=r"plan\.json: not a plan that"):
        load_view(path)


def test_the_prediction_is_the_busiest_ranks_messages():
    plan = plan_of(2, 1, misc=False)
    nodes = np.array([0, 1, 1])
    receives = [m for m in plan.bulk.messages.tolist() if m[2] == 2]
    want = sum(m[5] / (1e11 if m[1] == 1 else 1e10) + 5e-6 for m in receives)
    found = predict(plan, nodes, LINKS, num_streams=3)
    assert found.bulk_s == pytest.approx(want, rel=1e-12)
    assert found.rounds_s == pytest.approx(want, rel=1e-12)  # one receiver: its messages come one by one
    assert (found.bottleneck, found.bottleneck_bytes) == ("generator 0 (rank 2) receives", 2 * 48 * 16 + 12)
    assert found.misc_s == 0 and found.misc_staging_bytes == 0
    assert found.staging_bytes == 3 * max(m[5] for m in receives)
    slower = predict(plan, nodes, Links(100.0, 0.01, 5.0), num_streams=3)
    assert slower.bulk_s > 5 * found.bulk_s


def test_rounds_that_wait_are_never_faster():
    for shape in ((2, 3), (3, 2), (4, 4), (1, 8)):
        found = view_of(*shape, per_node=3).prediction
        assert 0 < found.bulk_s <= found.rounds_s * (1 + 1e-12)
        assert found.misc_s > 0 and found.total_s == found.rounds_s + found.misc_s


def test_a_local_copy_takes_no_link():
    tree = json.loads(view_of(1, 1).to_json())
    assert tree["matrix"] == [[0, 0, view_of(1, 1).bulk_bytes]]


def test_impossible_links_are_refused():
    with pytest.raises(ValueError, match="link rates must be above 0"):
        Links(node_gb_per_s=0)


@pytest.mark.parametrize(
    ("count", "per_node", "limit", "groups"),
    [(8, 8, 8, 8), (48, 1, 16, 16), (48, 1, 13, 12), (6, 1, 4, 3), (7, 1, 4, 4), (48, 8, 16, 7), (48, 64, 16, 16)],
)
def test_groups_hold_every_rank_once(count, per_node, limit, groups):
    ranks = view_of(1, count, rows=48 * 7, per_node=per_node).generators
    found = groups_of(ranks, limit)
    assert len(found) == groups
    assert [i for g in found for i in g.members] == list(range(count))


def test_sums_between_groups_are_those_of_their_ranks():
    view = view_of(12, 16, rows=96)
    rows, columns = groups_of(view.trainers, 4), groups_of(view.generators, 5)
    cells = between(view.matrix, rows, columns)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert cells[i, j] == view.matrix[np.ix_(row.members, column.members)].sum()
    assert cells.sum() == view.bulk_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (61_060_000_000, "61.1 GB"), (999_600, "1 MB"), (123e12, "123 TB")],
)
def test_sizes(value, text):
    assert size(value) == text


def test_times():
    assert [seconds(x) for x in (12.34, 0.1, 2e-5)] == ["12.3 s", "100 ms", "20 us"]
