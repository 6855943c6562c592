"""
One switch under way: files, room, load; and leaving the model alone for a while if that fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait

from common.errors import DoesNotFit, InternalError, ShiftworkerError
from common.logs import get_logger
from common.schemas import SwitchRecord, SwitchStage
from worker.residency.expect import expect_at_most_s, expect_switch_s
from worker.residency.loader import NOISE_BYTES, Loader
from worker.residency.parts import Parts
from worker.residency.plan import Missed, Sleeping, SwitchPlan, plan_switch, see_others
from worker.residency.progress import OnStage, Progress
from worker.residency.settle import Rest, by_next_use, rank_levels, rest_at
from worker.residency.unloader import Unloader
from worker.selection.placement import Placement
from worker.selection.places import host_place
from worker.state.backlog import Backlog
from worker.state.residency import HOST, Level, Quarantine, Residency, Resident, by_place

logger = get_logger(__name__)

_LOOK_S = 0.2  # between two looks whether the files are there, or the worker leaves
_MAX_QUARANTINE_DOUBLINGS = 6


class SwitchRun:
    """One switch, from the plan to the record."""

    def __init__(
        self,
        parts: Parts,
        unloader: Unloader,
        placement: Placement,
        *,
        epoch: int,
        reason: str,
        force: bool,
        on_stage: OnStage,
    ) -> None:
        self._parts = parts
        self._board = parts.board
        self._unloader = unloader
        self._progress = Progress(parts, placement.model_id, epoch=epoch, reason=reason, on_stage=on_stage)
        self._loader = Loader(parts, unloader, self._progress, placement, force=force)
        self.error: ShiftworkerError | None = None  # why the model was given up

    @property
    def placement(self) -> Placement:
        """The plan that was loaded, or tried last."""
        return self._loader.placement

    def carry_out(self) -> SwitchRecord:
        """Have leave what must, then make the model ready, in as many attempts as allowed."""
        model_id = self.placement.model_id
        self._progress.begin()
        try:
            self._unloader.end_the_dead()
            self._parts.count_standby()
            self._parts.reclaimer.see_freed()  # what is still on its way back would count as others'
            residency = see_others(self._board.read(), self._parts.machine.read())
            plan = plan_switch(residency, model_id, self._needs(), self._sleeping(), self._missed())
            logger.info("residency.planned", model_id=model_id, stop=plan.stop, sleep=plan.sleep, reason=plan.reason)
            if self._board.read().ready(model_id):
                return self.finished("ready", plan.reason)
            if plan.start is None:
                return self._give_up(DoesNotFit(plan.reason))
            # Files that must come over the network come before anything is stopped, and cost no attempt.
            self._fetch()
            self._make_room(plan)
            self._loader.load_what_fits()
        except ShiftworkerError as error:
            return self._give_up(error)
        except Exception as error:
            # A fault of ours, or of the machine (no file, no process left): left alone like any other failure.
            logger.exception("residency.internal_error", model_id=model_id)
            self._loader.clear_away()
            return self._give_up(InternalError(f"{type(error).__name__}: {error}"))
        self._board.quarantine(model_id, None)
        self._parts.count_standby()
        what = [plan.reason, *self._loader.ran_short, *filter(None, [self._loader.smaller])]
        return self.finished("ready", "; ".join(what))

    def finished(self, outcome: str, detail: str = "") -> SwitchRecord:
        """Keep the record of the switch, tell its end, and return the record."""
        loader = self._loader
        return self._progress.finished(
            outcome, detail, placement=loader.placement, attempts=loader.attempts, level=loader.level
        )

    def _needs(self) -> Mapping[int, int]:
        """
        What the model will take; of the host at least what it has there asleep, for it keeps that awake.

        If it was given up for want of memory, more than was free then, as far as there is more: whatever its plan says,
        it does not fit beside the same models.
        """
        residency, model_id, needs = self._board.read(), self.placement.model_id, dict(needs_of(self.placement))
        found, ran_out = residency.resident(model_id), self._parts.learned.ran_out.get(model_id)
        if found is not None and found.level.asleep:
            needs[HOST] = max(needs[HOST], found.host_bytes)
        if ran_out is not None and model_id in residency.quarantined:
            for place in self.placement.gpus or (HOST,):
                needs[place] = max(needs[place], min(residency.places.get(place, 0), ran_out + NOISE_BYTES))
        return needs

    def _sleeping(self) -> Sleeping:
        """Gather what decides how models sleep here."""
        parts, residency = self._parts, self._board.read()
        rests = {r.model_id: found for r in residency.residents if (found := self._rests(r, residency))}
        if not rests and len(residency.awake) == len(residency.residents):
            return Sleeping()
        held = sum(resident.held.get(HOST, 0) for resident in residency.residents)
        return Sleeping(
            rests=rests,
            order=by_next_use(residency.residents, self._backlog()),
            most=parts.limits.asleep,
            host_bytes=held + host_place(parts.machine.read()).budget,
        )

    def _missed(self) -> Missed:
        """Gather what decides who leaves, where there is a choice."""
        parts, awake = self._parts, [resident.model_id for resident in self._board.read().awake]
        if len(awake) < 2:  # noqa: PLR2004 - one has nobody to be compared with
            return Missed()
        backlog, times, target = self._backlog(), tuple(parts.times()), self.placement.model_id
        # As if it ended: whether it finds room to sleep depends on who else leaves.
        back_s = {model: expect_at_most_s(times, target, model, level=parts.engine(model).standby) for model in awake}
        return Missed(
            waited_for=frozenset(model for model in awake if backlog.count(model)),
            back_s={model: seconds for model, seconds in back_s.items() if seconds is not None},
        )

    def _rests(self, resident: Resident, residency: Residency) -> tuple[Rest, ...]:
        """
        The ways in which *resident* may sleep, the best first.

        None for one that was loaded smaller than planned: what it lacked then may be free at its next start.
        """
        parts, model_id = self._parts, resident.model_id
        if resident.level is not Level.READY or resident.smaller is not None or not parts.limits.asleep:
            return ()
        placement, engine, times = parts.placements[model_id], parts.engine(model_id), tuple(parts.times())
        target, sleeps = self.placement.model_id, parts.learned.sleeps
        levels = [each for each in engine.sleep_levels(placement) if (model_id, each) not in residency.banned]
        back_s = {
            level: seconds
            for level in (*levels, engine.standby)
            if (seconds := expect_switch_s(times, target, model_id, level=level)) is not None
        }
        ranked = rank_levels(
            levels,
            wake_s=back_s,
            sleep_s=sleeps.seconds(model_id, weights=placement.memory.weights),
            start_s=back_s.get(engine.standby),
        )
        measured = sleeps.host_bytes(model_id, weights=placement.memory.weights)
        return tuple(rest_at(level, resident, placement.memory, host_bytes=measured.get(level)) for level in ranked)

    def _backlog(self) -> Backlog:
        """What waits; nothing, if nobody can say."""
        try:
            return self._parts.backlog()
        except Exception as error:  # noqa: BLE001 - Redis away: then the last ones used are kept
            logger.warning("residency.not_told", model_id=self.placement.model_id, error=str(error))
            return Backlog()

    def _fetch(self) -> None:
        """
        Wait for the model's files, as long as they come; only the worker's leave ends the wait before.

        A download that stands still is ended by the hub's client itself, after a few tries: each read has its
        timeout (HF_HUB_DOWNLOAD_TIMEOUT, HF_XET_CLIENT_READ_TIMEOUT).
        """
        download = _in_background(lambda: self._parts.fetch(self.placement.spec))
        while not wait([download], timeout=_LOOK_S).done:
            self._loader.end_if_leaving()
        download.result()

    def _make_room(self, plan: SwitchPlan) -> None:
        """
        Have the models of *plan* leave, unless the cards are too hot for what comes after.

        The cards are looked at between the two halves: while jobs ran, their heat and power were the jobs' own;
        once the old engine has ended, a refusal would leave nothing ready.
        """
        awake = {resident.model_id for resident in self._board.read().awake}
        leaving = [
            *(model_id for model_id in plan.stop if model_id in awake),
            *(model_id for model_id, _ in plan.sleep),
        ]
        serving = [model_id for model_id in leaving if self._board.read().ready(model_id)]
        try:
            if leaving:
                self._progress.enter(SwitchStage.DRAINING, f"jobs on {', '.join(leaving)} end")
            self._unloader.drain(leaving)
            self._loader.attempt(self._loader.check_cards)
        except Exception:
            for model_id in serving:
                self._board.set_level(model_id, Level.READY)
            raise
        self._unload(plan)

    def _unload(self, plan: SwitchPlan) -> None:
        deeds = [f"{model_id} ends" for model_id in plan.stop]
        deeds += [f"{model_id} falls asleep ({level})" for model_id, level in plan.sleep]
        if deeds:
            self._progress.enter(SwitchStage.UNLOADING, ", ".join(deeds))
        for model_id in plan.stop:
            self._unloader.stop(model_id)
        for model_id, level in plan.sleep:
            self._unloader.put_to_sleep(model_id, level)
        self._parts.reclaimer.see_freed()

    def _give_up(self, error: ShiftworkerError) -> SwitchRecord:
        """Leave the model alone for a while: asked for again at once, it would fail at once."""
        if self._parts.leaving.is_set():
            return self.finished("failed", f"the worker leaves: {error.message}")
        self.error = error
        model_id = self.placement.model_id
        before = self._board.read().quarantined.get(model_id)
        failures = (before.failures if before else 0) + 1
        pause_s = self._parts.limits.quarantine_s * 2 ** min(failures - 1, _MAX_QUARANTINE_DOUBLINGS)
        now = time.time()
        self._board.quarantine(
            model_id, Quarantine(since=now, until=now + pause_s, failures=failures, reason=error.message)
        )
        logger.error(
            "residency.quarantined", model_id=model_id, seconds=pause_s, failures=failures, error=error.message
        )
        return self.finished("failed", error.message)


def needs_of(placement: Placement) -> Mapping[int, int]:
    """What a model takes by its plan, by card and HOST."""
    return by_place(size=placement.memory.total, gpus=placement.gpus, host_bytes=placement.memory.host)


def _in_background(do: Callable[[], object]) -> Future[object]:
    """Call *do* on a thread that keeps no process alive."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(do())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is read
            done.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return done
