"""What the ranks of a session have agreed on: a plan, who moves it, and what each rank needs to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo_rl.refit.base import Declaration, RefitOptions, RefitReport
from nemo_rl.refit.cost import Demand
from nemo_rl.refit.declare import agree, statement
from nemo_rl.refit.lane import Lane, open_lane
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.link import Link
from nemo_rl.refit.pipeline import Arrivals, Pipeline, Traffic
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.transports.mover import Mover, Setting
from nemo_rl.refit.transports.registry import Choice, choose
from nemo_rl.refit.verify import Verifier


@dataclass(frozen=True, slots=True)
class Agreed:
    """One rank's share of it.

    Attributes:
        verifier: None where the options do not ask for digests.
        arrivals: what lands on this rank; None on a rank that only trains.
        choice: the transport, and what was predicted for each.
    """

    plan: RefitPlan
    verifier: Verifier | None
    arrivals: Arrivals | None
    pipeline: Pipeline
    choice: Choice
    mover: Mover
    lane: Lane

    def report(
        self,
        version: int,
        total_s: float,
        phase_s: Mapping[str, float],
        bulk: Traffic,
        misc: Traffic,
        extra_rss_bytes: int | None,
    ) -> RefitReport:
        """What this rank saw of a refit that moved `bulk` and `misc`."""
        return RefitReport(
            version=version,
            transport=self.choice.transport.name,
            verified=self.verifier is not None,
            total_s=total_s,
            phase_s=dict(phase_s),
            bulk_bytes=bulk.sent_bytes + bulk.received_bytes,
            misc_bytes=misc.sent_bytes + misc.received_bytes,
            staging_bytes=self.pipeline.staging_bytes + bulk.staging_bytes + misc.staging_bytes,
            extra_rss_bytes=extra_rss_bytes,
            required_bytes=self.plan.required_bytes,
            predictions=self.choice.predictions,
            engine_copies=bulk.engine_copies,
            kernel_launches=bulk.kernel_launches,
        )

    def tidy(self) -> None:
        """Nobody reads digests of this refit any more: the next one finds room for its own."""
        if self.arrivals is not None:
            self.arrivals.tidy()
        if self.verifier is not None:
            self.verifier.tidy()

    def close(self) -> None:
        """Give up the mover's windows and the lane; idempotent."""
        try:
            self.mover.close()
        finally:
            self.lane.close()


def agree_on(
    plan: RefitPlan,
    sources: Mapping[int, Layout],
    declarations: Mapping[int, Declaration],
    link: Link,
    options: RefitOptions,
    device: torch.device,
) -> Agreed:
    """Every rank calls it with what it holds to be the plan of these layouts.

    Raises:
        AgreementError: ranks hold different plans or options.
        PlanError: GPUs cannot carry whole tensors among these ranks.
    """
    control, rank = link.control, link.control.rank
    landings = {r: declaration.layout for r, declaration in declarations.items()}
    choice = choose(control, link.candidates, link.links, link.facts, options, Demand(plan, sources, landings))
    agree(control, statement(plan, choice.transport.name, options))
    pipeline = Pipeline(plan, rank, link.channel, options.num_streams, device)
    setting = Setting(plan, rank, device, control, pipeline, sources, landings)
    verifier = Verifier(plan, rank, sources, device) if options.verify else None
    if verifier is not None:
        control.make_room("agree", verifier.statement_bytes)
    arrivals = Arrivals(plan, plan.bulk, rank, landings[rank], device) if rank in landings else None
    mover = choice.transport.mover(setting)
    try:
        lane = open_lane(setting, choice.transport, link.facts, options.verify)
    except Exception:
        mover.close()
        raise
    return Agreed(plan, verifier, arrivals, pipeline, choice, mover, lane)
