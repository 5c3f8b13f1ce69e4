"""The refit service as one rank sees it: declare, plan, agree, transfer, verify, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from nemo_rl.refit.agreed import Agreed, agree_on
from nemo_rl.refit.base import Declaration, Landing, RefitOptions, RefitReport, Source, World
from nemo_rl.refit.control import Address, Control
from nemo_rl.refit.declare import Declared, agree, agree_still, share_declarations, share_sources
from nemo_rl.refit.device import await_rest, finish, one_device
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import AgreementError, PlanError, PoisonedError, RefitError, TransferError
from nemo_rl.refit.layout import Holding, Layout, SourceViews, departure
from nemo_rl.refit.link import Link, connect
from nemo_rl.refit.memory import PeakRss
from nemo_rl.refit.phase import Phase
from nemo_rl.refit.pipeline import Tracker, Traffic
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.proof import Refusal
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.registry import NAMES
from nemo_rl.refit.watch import Watch

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class RefitSession:
    """One rank's end of the service. Every rank makes one and calls the same methods in the same order.

    Args:
        rank: in `world`.
        world: the ranks.
        store: (host, port) of a TCPStore that the driver hosts for this session alone, or a store in hand.
        options: equal on all ranks (checked).
        source: on a trainer, what it holds.
        landing: on a generator, where it lands.
        device: where this rank's tensors and buffers are; `cuda` is the current one.
        channel: an open channel to use instead of one of the session's own (simulated ranks).
        planner: makes the plan, in the way of `plan_refit`; ranks of one process may share the work.

    A session that failed once is poisoned: every later call raises PoisonedError with the first failure.
    """

    def __init__(
        self,
        rank: int,
        world: World,
        store: Address,
        options: RefitOptions,
        source: Source | None = None,
        landing: Landing | None = None,
        device: torch.device = _CPU,
        channel: Channel | None = None,
        planner: Callable[..., RefitPlan] = plan_refit,
    ) -> None:
        if (source is not None) != (rank in world.trainers) or (landing is not None) != (rank in world.generators):
            raise ValueError(
                f"{world.describe(rank)}: a trainer takes a source, a generator a landing, and nothing else"
            )
        if options.transport not in NAMES:
            raise ValueError(f"transport '{options.transport}' is not one of {', '.join(NAMES)}")
        self.rank, self.world, self.options = rank, world, options
        self._address, self._source, self._landing = store, source, landing
        self._device, self._given_channel, self._planner = one_device(device), channel, planner
        self._failure: RefitError | None = None
        self._version: int | None = None
        # Messages give up before gathers do, so that the first report is the one that names peer and parameter.
        self._data_s = 0.9 * options.deadline_s
        self._touched = False
        self._prepared: tuple[int, int | None, Ledger | None] | None = None
        self._phase_s: dict[str, float] = {}
        self._control: Control | None = None
        self._link_or_none: Link | None = None
        self._agreed_or_none: Agreed | None = None
        self._holdings: tuple[Holding, ...] = ()
        self._src_view = SourceViews(())

    # ---- declare, plan, agree

    def connect(self) -> None:
        """Reach the store and every peer, find the transports that all ranks support, and learn what links give.

        Raises:
            TransferError: a rank did not answer, or does not support the transport; its name and the reason.
        """
        with self._guarded("connect"):
            self._control = Control(self.rank, self.world, self._address, self.options.deadline_s)
            self._link_or_none = connect(self._control, self.options, self._device, self._given_channel)

    def plan(self, problems: Sequence[str] = ()) -> RefitPlan:
        """Declare this rank's layout, join all layouts, prove the plan and agree on it, in place of one made before.

        Args:
            problems: what a trainer knows to be wrong with its weights; any of them refuses the plan on all ranks.

        Raises:
            PlanError: the layouts do not join; every violation by name.
            AgreementError: ranks hold different plans or options.
        """
        with self._guarded("declare"):
            self._drop_plan()
            said = self._declare_source(problems)
            declaration = None if self._landing is None else self._landing.declare(said.table)
            declarations = share_declarations(self._link.control, declaration)
        with self._guarded("plan"):
            plan = self._join(said, declarations)
            if self.rank == self.world.trainers[0]:
                log.info("%s", plan.describe())
        with self._guarded("agree"):
            self._agreed_or_none = agree_on(plan, said.sources, declarations, self._link, self.options, self._device)
        return plan

    def _declare_source(self, problems: Sequence[str]) -> Declared:
        layout = None
        if self._source is not None:
            self._hold(tuple(self._source.holdings()), "declare")
            layout = Layout.from_holdings(self._holdings, self._source.table())
        return share_sources(self._link.control, self._source, layout, problems)

    def _join(self, said: Declared, declarations: Mapping[int, Declaration]) -> RefitPlan:
        try:
            if said.problems:
                raise Refusal(said.problems)
            return self._planner(
                self.world,
                said.sources,
                declarations,
                said.table,
                bucket_bytes=self.options.bucket_bytes,
                all_misc=self._link.candidates[0].all_misc,
                unused=said.unused,
            )
        except Refusal as error:
            raise PlanError(
                str(error), rank=self.rank, phase="plan", remedy="make the named layouts meet; nothing was moved"
            ) from error

    # ---- transfer, verify, commit

    def prepare(self, version: int, num_steps: int | None = None) -> Mapping[str, float]:
        """The part of a refit during which engines may still serve: agree on `version`, look at the source's storage.

        `refit` of the same version goes on from here, and does this part itself where nobody asked for it. Every rank
        prepares, or none. Returns seconds by phase. Arguments and errors are those of `refit`.
        """
        self._agree_to(version, num_steps)
        with self._guarded("digest"):
            if self._source is not None and self._agreed.verifier is not None:
                self._agreed.verifier.follow()
                self._prepared = version, num_steps, self._agreed.verifier.look(self._holdings)
        return dict(self._phase_s)

    def _agree_to(self, version: int, num_steps: int | None) -> None:
        """All ranks refit the same; this one's weights are complete, and their storage is known."""
        self._phase_s, rest = {}, []

        def meanwhile() -> None:
            if self._source is not None:
                rest.append(await_rest(self._device))
                self._find_source(self._source)

        with self._guarded("agree"):
            self._check_version(version)
            items: dict[str, str | int | None] = {"plan digest": self._agreed.plan.digest, "version": version}
            agree(self._link.control, items | {"optimizer steps": num_steps}, meanwhile)
            for complete in rest:
                complete(time.monotonic() + self._data_s)
            self._prepared = version, num_steps, None

    def refit(self, version: int, num_steps: int | None = None) -> RefitReport:
        """Move the trainers' weights into the generators and commit them as `version`.

        Args:
            version: above the committed one.
            num_steps: on a trainer that counts them, the optimizer steps that made its weights; equal on all trainers.

        Versions only grow. On success every generator serves `version`. On any error the session is poisoned, and no
        generator serves `version`: one that was not touched yet serves on, a touched one refuses.

        Raises:
            AgreementError: ranks disagree on version, plan or steps.
            TransferError: a peer died or a deadline passed; rank, phase, round, peer and parameter.
            VerificationError: bytes differ; parameter, region and both ranks.
        """
        started, memory = time.monotonic(), PeakRss() if self.options.measure_memory else None
        if self._prepared is None or self._prepared[0] != version:
            self._agree_to(version, num_steps)
        assert self._prepared is not None
        (_, steps, first), self._prepared = self._prepared, None
        with self._guarded("begin"):
            agree_still(self.rank, steps, num_steps)
            tracker, news = self._begin(version)
            self._agreed.lane.begin(self._src_view, self._data_s)
        with self._guarded("transfer"):
            watch = self._watch(first)
            bulk = self._move_bulk(tracker, news)
        misc, whole = self._load_misc()
        self._verify(watch, tracker, whole)
        with self._guarded("commit"):
            self._commit(version)
        report = self._report(version, time.monotonic() - started, bulk, misc, memory)
        self._tidy(version)
        return report

    def close(self) -> None:
        """Give up connections; idempotent."""
        self._disconnect()
        self._control = self._link_or_none = None
        self._failure = self._failure or PoisonedError(
            "the session was closed", rank=self.rank, phase="close", remedy="make a new session"
        )

    def _check_version(self, version: int) -> None:
        served = None if self._landing is None else self._landing.version
        newest = max((v for v in (self._version, served) if v is not None), default=None)
        if newest is not None and version <= newest:
            raise AgreementError(
                f"version {version} was asked for after version {newest} was committed",
                rank=self.rank,
                phase="agree",
                remedy="refit with a version above the committed one",
            )

    def _find_source(self, source: Source) -> None:
        """Find its storage again."""
        fresh = tuple(source.holdings())
        if fresh is self._holdings or fresh == self._holdings:  # the same objects
            return
        if strange := departure(fresh, self._holdings):
            raise AgreementError(
                f"the source holds other regions or dtypes than it declared: {strange}",
                rank=self.rank,
                phase="digest",
                remedy="remake the session after the model or its layout changed",
            )
        self._hold(fresh, "digest")

    def _hold(self, holdings: tuple[Holding, ...], phase: str) -> None:
        away = next((h for h in holdings if h.view.device != self._device), None)
        if away is not None:
            raise (PlanError if phase == "declare" else AgreementError)(
                f"{away.fqn} is on {away.view.device}, and this rank was declared to be on {self._device}",
                rank=self.rank,
                phase=phase,
                remedy="give the session the device of the model, and bring the model there before each refit",
            )
        self._holdings, self._src_view = holdings, SourceViews(holdings)

    def _begin(self, version: int) -> tuple[Tracker | None, bool]:
        """Close the engine, make ready, and wait until all ranks did: where bytes land, and whether ranks have news."""
        tracker, agreed = None, self._agreed
        if self._landing is not None:
            self._touched = True
            self._landing.begin(version)
            rest = await_rest(self._device)
            assert agreed.arrivals is not None
            tracker = Tracker(agreed.plan, agreed.plan.bulk, agreed.arrivals, self._landing, self.options.verify)
        news = agreed.mover.ready(self._src_view, tracker)
        if self._landing is not None:
            rest(time.monotonic() + self._data_s)
        return tracker, any(other for (other,) in self._link.control.meet("begin", (news,)))

    def _watch(self, first: Ledger | None) -> Watch | None:
        """What looks at sources while bytes move: whenever this rank waits for others."""
        verifier, control = self._agreed.verifier, self._link.control
        if verifier is None:
            return None
        watch = Watch(verifier, control, None if self._source is None else self._holdings, first)
        if not self._agreed.choice.transport.idles:  # elsewhere the first bytes are on their way before it looks
            watch.look()
        control.rest(watch.step)
        return watch

    def _move_bulk(self, tracker: Tracker | None, news: bool) -> Traffic:
        agreed = self._agreed
        traffic = agreed.mover.run(agreed.plan.bulk, self._src_view, tracker, news, self._data_s)
        if tracker is not None and tracker.unfinished:
            raise TransferError(
                f"landing units {tracker.unfinished} (unit: copies) are incomplete",
                rank=self.rank,
                phase="transfer",
                remedy="report this: the plan was proven complete",
            )
        if tracker is not None:
            tracker.pass_empty_units()
        if not agreed.choice.transport.one_sided or not (tracker is None or tracker.arrivals.final):
            finish(self._device, time.monotonic() + self._data_s)  # elsewhere all is there already
        return traffic

    def _load_misc(self) -> tuple[Traffic, Ledger | None]:
        """What travels whole: what moved, and digests of what arrived; None where nothing travels so."""
        if not self._agreed.plan.misc_fqns:
            return Traffic(), None
        with self._guarded("misc"):
            loaded = self._agreed.lane.load(self._landing)
            finish(self._device, time.monotonic() + self._data_s)
        return loaded

    def _verify(self, watch: Watch | None, tracker: Tracker | None, whole: Ledger | None) -> None:
        """Compare what landed, `whole` tensors included, with what trainers held, where the options ask for it."""
        if watch is None:
            return
        with self._guarded("verify"):
            if tracker is not None:
                tracker.digest_in_place()
            bulk = Ledger(0) if tracker is None else tracker.ledger
            watch.check(bulk, Ledger(0) if whole is None else whole)
            self._link.control.rest()

    def _tidy(self, version: int) -> None:
        """What nobody waits for: engines serve `version` already, whatever fails here; the next call says what did."""
        try:
            self._link.control.tidy()
            self._agreed.tidy()
        except Exception as error:
            said = f"version {version} is committed and served; behind it, {type(error).__name__}: {error}"
            self._fail(RefitError(said, rank=self.rank, phase="commit", remedy="remake the session before a refit"))

    def _commit(self, version: int) -> None:
        """All ranks finish, decide as one, commit, and decide that all have: who is late refuses as all others do."""
        if self._landing is not None:
            self._landing.finish()
        self._link.control.settle("commit", str(version))
        if self._landing is not None:
            self._landing.commit(version)
        self._link.control.settle("commit", f"{version} by all")
        self._version, self._touched = version, False

    def _report(
        self, version: int, total_s: float, bulk: Traffic, misc: Traffic, memory: PeakRss | None
    ) -> RefitReport:
        extra = None if memory is None else memory.extra_bytes
        report = self._agreed.report(version, total_s, self._phase_s, bulk, misc, extra)
        if self.rank == 0 and report.predicted_s is not None:
            seconds = total_s, report.predicted_s
            log.info("refit %d by '%s' took %.4f s, predicted %.4f s", version, report.transport, *seconds)
        return report

    # ---- helpers

    @property
    def _link(self) -> Link:
        if self._link_or_none is None:
            raise RuntimeError("connect() comes first")
        return self._link_or_none

    @property
    def _agreed(self) -> Agreed:
        if self._agreed_or_none is None:
            raise RuntimeError("plan() comes before refit()")
        return self._agreed_or_none

    def _guarded(self, phase: str) -> Phase:
        """Time a phase; any failure becomes a RefitError, is told to all ranks, and poisons the session."""
        if self._failure is not None:
            raise PoisonedError(
                f"the session failed before: {self._failure}", rank=self.rank, phase=phase, remedy="remake the session"
            ) from self._failure
        return Phase(phase, self.rank, self._phase_s, self._fail)

    def _fail(self, error: RefitError) -> None:
        # A copy, for logs too: the error's frames hold messages in flight, which keep connections open.
        self._failure = type(error)(error.detail, rank=error.rank, phase=error.phase, remedy=error.remedy)
        log.error("%s", self._failure)
        if self._control is not None:
            self._whatever("could not tell others", partial(self._control.abort, error))
        if self._landing is not None and self._touched:
            self._whatever("could not be told to refuse", partial(self._landing.reject, str(error)))
        self._disconnect()

    def _disconnect(self) -> None:
        """Give up the mover's windows and the channel, which releases peers that wait for this rank."""
        self._whatever("did not give up its plan", self._drop_plan)
        if self._link_or_none is not None:
            self._whatever("did not give up its channel", self._link_or_none.channel.close)
        if self._control is not None:
            self._whatever("did not give up its board", self._control.close)

    def _whatever(self, text: str, step: Callable[[], object]) -> None:
        """Peers wait, and the first failure is what counts: another one in `step` is logged."""
        try:
            step()
        except Exception:
            log.exception("%s %s", self.world.describe(self.rank), text)

    def _drop_plan(self) -> None:
        """Give up what was made for the plan; idempotent."""
        agreed, self._agreed_or_none, self._prepared = self._agreed_or_none, None, None
        if agreed is not None:
            agreed.close()
