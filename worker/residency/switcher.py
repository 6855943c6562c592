"""
Carries out switches: drain, unload, load, verify; again if it fails, smaller if memory runs out.

The only writer of the board. One switch at a time, on the thread of the switch task. Every wait has an end, and every
stage is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

from common.errors import (
    DoesNotFit,
    InternalError,
    LoadFailed,
    LoadRefused,
    OutOfMemory,
    ShiftworkerError,
    TooLittleMemory,
    UnknownModel,
)
from common.logs import get_logger
from common.schemas import SwitchRecord, SwitchStage, utc_now
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Engine, EngineState, Loaded
from worker.engines.measure import count_bytes
from worker.hardware.gpu import Machine, MachineReader
from worker.memory.learn import learned
from worker.memory.measured import Measured
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits, check_cards, check_load, check_memory, free_bytes
from worker.residency.expect import allow_s
from worker.residency.plan import plan_switch
from worker.residency.reclaimer import Reclaimer
from worker.residency.recover import Failure, Others, Recovery, Rung, recover
from worker.residency.shrink import shrink, what_changed
from worker.residency.verify import verify
from worker.selection.placement import Placement
from worker.state.residency import Level, Quarantine, Resident, Switching, by_place

logger = get_logger(__name__)

_HANDBACK_S = 30.0  # a job that was told to stop has this long to leave before its engine is ended anyway
_STOP_S = 30.0  # for an engine's processes to be gone
_PAUSE_S = 2.0  # between attempts: time for a hot card or a leaving process
_ABANDON_S = 5.0  # for a load to be interrupted; then it is asked again
_LOOK_S = 0.2  # between two looks whether a switch has ended, or must
_MAX_QUARANTINE_DOUBLINGS = 6
_NOISE_BYTES = 256 * 2**20  # by which free memory changes from look to look although no program came or went


@dataclass(frozen=True, kw_only=True)
class SwitchLimits:
    """How long and how often."""

    attempt_s: float  # to load and verify, at least; more where a model's size says so
    attempts: int
    drain_s: float  # for jobs in flight to end by themselves
    quarantine_s: float  # the first pause after failing; doubles each time
    load: LoadLimits


class Handback(Protocol):
    """Tells the jobs that run on a model to stop and go back to their queue."""

    def __call__(self, model_id: str) -> None:
        """Tell them; returns at once."""


class Switcher:
    """Makes models ready, one after the other."""

    def __init__(
        self,
        *,
        board: ResidencyBoard,
        placements: Mapping[str, Placement],
        engines: Mapping[EngineKind, Engine],
        machine: MachineReader,
        limits: SwitchLimits,
        fetch: Callable[[ModelSpec], object],
        hand_back: Handback,
        record: Callable[[SwitchRecord], None],
        measured: Callable[[Placement, Measured], object] = lambda _placement, _measured: None,
        load_speed: Callable[[], float | None] = lambda: None,
        substitutable: Callable[[str], bool] = lambda _model_id: False,
        cloud: Callable[[str], bool] = lambda _model_id: False,
        epoch: int = 0,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._board = board
        self._placements = placements
        self._engines = engines
        self._machine = machine
        self._limits = limits
        self._fetch = fetch
        self._hand_back = hand_back
        self._record = record
        self._measured = measured
        self._load_speed = load_speed
        self._substitutable = substitutable
        self._cloud = cloud
        self._ran_out: dict[str, int | None] = {}  # model -> bytes that were free when its plan ran out of memory
        self._leaving = threading.Event()
        self._pause = pause or self._leaving.wait
        self._reclaimer = Reclaimer(board=board, machine=machine, leaving=self._leaving, pause=self._pause)
        self._one_at_a_time = threading.Lock()
        self._asked_epoch = epoch  # switches asked of an earlier start of this worker are stale

    def ask(self, model_id: str, epoch: int) -> None:
        """Note on the board that a switch to *model_id* was asked for; any other one will do nothing."""
        self._asked_epoch = epoch  # also if it is the smaller one: Redis may have lost its counter
        self._board.switching(Switching(to_model=model_id, epoch=epoch, since=time.time()))

    def switch(
        self,
        model_id: str,
        *,
        epoch: int | None = None,
        reason: str = "",
        force: bool = False,
        on_stage: Callable[[SwitchStage, str], None] = lambda _stage, _detail: None,
    ) -> SwitchRecord:
        """
        Make *model_id* ready; returns what happened, also when it failed.

        Should that leave nothing ready, another model is made ready in its place: see `recover`.

        *epoch* None comes from a person and is always carried out; *force* skips the checks of temperature,
        power and free memory. Each stage is told to *on_stage* as it begins.

        Raises
        ------
        UnknownModel
            This worker has no placement for *model_id*.
        """
        if model_id not in self._placements:
            raise UnknownModel(
                f"This worker has no model {model_id!r}; it has {', '.join(sorted(self._placements)) or 'none'}. "
                "`shiftworker models` says why the others were left out."
            )
        with self._one_at_a_time:
            previous = next(iter(self._board.read().ready_models), None)
            run = _Run(self, self._placements[model_id], reason=reason, force=force, on_stage=on_stage)
            if epoch is not None and epoch != self._asked_epoch:
                return run.finished("stale")
            epoch = epoch or self._asked_epoch
            try:
                asked = run.carry_out(epoch)
                while run.error is not None:
                    after = self._after(run.placement, run.error, previous)
                    logger.info("residency.recovering", model_id=after.model_id, rung=after.rung, reason=after.reason)
                    if after.model_id is None:
                        break
                    reason = f"{after.rung}: {after.reason}"
                    run = _Run(self, self._placements[after.model_id], reason=reason, force=False, on_stage=on_stage)
                    run.carry_out(epoch)
                return asked
            finally:
                self._board.switching(None)

    def _after(self, failed: Placement, error: ShiftworkerError, previous: str | None) -> Recovery:
        """Ask what comes after a model that was given up."""
        now, residency = time.time(), self._board.read()
        possible = [p for p in self._placements.values() if not residency.is_quarantined(p.model_id, now)]
        smaller = [p for p in possible if p.auto and p.spec.tier < failed.spec.tier]
        others = Others(
            ready=residency.ready_models,
            cascade=tuple(p.model_id for p in sorted(smaller, key=lambda p: (-p.spec.tier, p.model_id))),
            previous=previous if previous in {p.model_id for p in possible} else None,
            substitutable=_is_known(self._substitutable, failed.model_id),
            cloud=_is_known(self._cloud, failed.model_id),
        )
        return recover(Failure(model_id=failed.model_id, error=error), others)

    def note_deaths(self) -> tuple[str, ...]:
        """Take engines that died by themselves off the board; returns their models. Cheap; call it often."""
        dead = tuple(
            model_id for model_id in self._board.read().ready_models if self._state(model_id) is not EngineState.READY
        )
        for model_id in dead:
            logger.error("residency.engine_died", model_id=model_id)
            self._board.remove(model_id)
        return dead

    def end_the_dead(self) -> None:
        """
        End what is left of engines that are not on the board: a deaf one lives on, and holds its memory.

        Raises
        ------
        EngineTimeout
            Something of one is still there.
        """
        self.note_deaths()
        for model_id in self._placements:
            if self._board.read().resident(model_id) is None and self._state(model_id) is not EngineState.STOPPED:
                logger.warning("residency.dead_engine_ends", model_id=model_id)
                self.stop(model_id)

    def stop(self, model_id: str, *, begun_at: Machine | None = None) -> None:
        """
        End *model_id* and take it off the board; what its memory owes is noted.

        *begun_at* is the machine as a load found it that has failed.

        Raises
        ------
        EngineTimeout
            Something of it is still there; it stays on the board.
        """
        owed = self._reclaimer.owed_by(self._placements[model_id], begun_at=begun_at)
        self._engine(model_id).ensure_stopped(model_id, timeout_s=_STOP_S)
        self._board.remove(model_id)
        self._reclaimer.note_ended(owed)

    def abandon(self) -> None:
        """
        End the switch under way and begin no other: the worker leaves. Returns when that switch has ended.

        A load is interrupted, not waited for; the switch ends as failed, and its model is not quarantined.
        """
        self._leaving.set()
        while not self._one_at_a_time.acquire(timeout=_LOOK_S):
            # Asked again each time: a load that was just beginning had no process yet that could be ended.
            for resident in self._board.read().residents:
                if resident.level is Level.STARTING:
                    with suppress(ShiftworkerError):
                        self._engine(resident.model_id).ensure_stopped(resident.model_id, timeout_s=_ABANDON_S)
        self._one_at_a_time.release()

    def close(self) -> None:
        """End every engine: the worker leaves."""
        for engine in self._engines.values():
            engine.close()
        for resident in self._board.read().residents:
            self._board.remove(resident.model_id)

    def _state(self, model_id: str) -> EngineState:
        return self._engine(model_id).state(model_id)

    def _engine(self, model_id: str) -> Engine:
        return self._engines[self._placements[model_id].spec.engine]


class _Run:
    """One switch under way."""

    def __init__(
        self,
        switcher: Switcher,
        placement: Placement,
        *,
        reason: str,
        force: bool,
        on_stage: Callable[[SwitchStage, str], None],
    ) -> None:
        self._switcher = switcher
        self._board = switcher._board
        self._limits = switcher._limits
        self.placement = placement  # the plan that is being loaded, smaller ones included
        self._reason = reason
        self._force = force
        self._on_stage = on_stage
        self._began = time.monotonic()
        self._stages: dict[SwitchStage, float] = {}
        self._stage: tuple[SwitchStage, float] | None = None
        self._attempts = 0
        self._attempts_before = 0  # of the larger plans
        self._plans: tuple[Placement, ...] = ()  # smaller ones, once memory has run out
        self._ran_short: list[str] = []  # what became of the larger plans
        self.error: ShiftworkerError | None = None  # why the model was given up
        self._smaller: str | None = None  # what the plan gives up, if it is not the full one
        self._begun_at: Machine | None = None  # the cards as the load under way found them
        self._shorter: int | None = None  # tokens, if the plan's length is one of the things
        self._epoch = 0
        ready = self._board.read().ready_models
        self._from = ready[0] if ready else None

    def carry_out(self, epoch: int) -> SwitchRecord:
        """Stop what must go, then start the model, in as many attempts as allowed."""
        self._epoch = epoch
        model_id = self.placement.model_id
        self._show(None)
        try:
            self._switcher.end_the_dead()
            plan = plan_switch(self._board.read(), model_id, needs_of(self.placement))
            logger.info("residency.planned", model_id=model_id, stop=plan.stop, reason=plan.reason)
            if self._board.read().ready(model_id):
                return self.finished("ready", plan.reason)
            if plan.start is None:
                return self._give_up(DoesNotFit(plan.reason))
            # Files that must come over the network come before anything is stopped, and cost no attempt.
            self._fetch()
            self._make_room(plan.stop)
            self._load_what_fits()
        except ShiftworkerError as error:
            return self._give_up(error)
        except Exception as error:
            # A fault of ours, or of the machine (no file, no process left): left alone like any other failure.
            logger.exception("residency.internal_error", model_id=model_id)
            self._clear_away()
            return self._give_up(InternalError(f"{type(error).__name__}: {error}"))
        self._board.quarantine(model_id, None)
        return self.finished("ready", "; ".join([plan.reason, *self._ran_short, *filter(None, [self._smaller])]))

    def _fetch(self) -> None:
        """
        Wait for the model's files, as long as they come; only the worker's leave ends the wait before.

        A download that stands still is ended by the hub's client itself, after a few tries: each read has its
        timeout (HF_HUB_DOWNLOAD_TIMEOUT, HF_XET_CLIENT_READ_TIMEOUT).
        """
        download = _in_background(lambda: self._switcher._fetch(self.placement.spec))
        while not wait([download], timeout=_LOOK_S).done:
            self._end_if_leaving()
        download.result()

    def _make_room(self, stop: tuple[str, ...]) -> None:
        """
        End the models in *stop*, unless the cards are too hot for what comes after.

        The cards are looked at between the two halves: while jobs ran, their heat and power were the jobs' own;
        once the old engine has ended, a refusal would leave nothing ready.
        """
        serving = [model_id for model_id in stop if self._board.read().ready(model_id)]
        try:
            self._drain(stop)
            self._try(lambda: self._check(check_cards))
        except Exception:
            for model_id in serving:
                self._board.set_level(model_id, Level.READY)
            raise
        self._unload(stop)

    def _drain(self, stop: tuple[str, ...]) -> None:
        if stop:
            self._enter(SwitchStage.DRAINING, f"jobs on {', '.join(stop)} end")
        for model_id in stop:
            self._board.set_level(model_id, Level.STOPPING)
        for model_id in stop:
            if not self._board.wait_empty(model_id, timeout_s=self._limits.drain_s):
                logger.warning("residency.handing_back", model_id=model_id, after_s=self._limits.drain_s)
                self._switcher._hand_back(model_id)
                self._board.wait_empty(model_id, timeout_s=_HANDBACK_S)

    def _unload(self, stop: tuple[str, ...]) -> None:
        if stop:
            self._enter(SwitchStage.UNLOADING, f"{', '.join(stop)} ends")
        for model_id in stop:
            self._switcher.stop(model_id)
        self._switcher._reclaimer.see_freed()

    def _load_what_fits(self) -> None:
        """
        Load the plan; where memory runs out, the next smaller one that what is free now can hold.

        A plan that an engine ran out of memory with is not loaded again until more is free than was then: every
        switch to its model would crash first.
        """
        full, ran_out = self.placement, self._switcher._ran_out
        error = self._outcome_of(self._load_full)
        if error is None:
            ran_out.pop(full.model_id, None)
        elif isinstance(error, OutOfMemory):
            ran_out[full.model_id] = free_bytes(self._switcher._machine.read(), full)
        if isinstance(error, OutOfMemory | TooLittleMemory):
            self._plans = shrink(full, self._switcher._machine.read())
        while error is not None:
            if self._next(error).rung is not Rung.SMALLER:
                raise type(error)("; ".join([*self._ran_short, error.message]))
            self._take_smaller(full, error)
            error = self._outcome_of(self._load_smaller)

    def _outcome_of(self, load: Callable[[], None]) -> ShiftworkerError | None:
        """Give the error that *load* ended with, None if the model is ready. Raises that the worker leaves."""
        self._end_if_leaving()
        try:
            load()
        except ShiftworkerError as error:
            if self._switcher._leaving.is_set():
                raise
            return error
        return None

    def _load_full(self) -> None:
        self._check_more_is_free()
        self._try(self._load)

    def _load_smaller(self) -> None:
        self._look_at_memory()
        self._try(self._load)

    def _take_smaller(self, full: Placement, error: ShiftworkerError) -> None:
        """Go on with the next smaller plan; *error* is why the one before cannot be loaded."""
        plan, *rest = self._plans
        self._plans = tuple(rest)
        self._ran_short.append(error.message)
        self.placement, self._smaller = plan, f"smaller than planned: {what_changed(full, plan)}"
        self._shorter = plan.max_model_len if plan.max_model_len < full.max_model_len else None
        self._attempts_before = self._attempts
        logger.warning("residency.smaller_plan", model_id=plan.model_id, changed=self._smaller, reason=error.message)

    def _next(self, error: ShiftworkerError, *, attempts_left: int = 0) -> Recovery:
        """Ask what is tried after *error*, as far as this model goes."""
        failure = Failure(
            model_id=self.placement.model_id,
            error=error,
            attempts_left=attempts_left,
            plans_left=len(self._plans),
            shrunk=self._smaller is not None,
        )
        return recover(failure, Others())

    def _check_more_is_free(self) -> None:
        """Raise if the plan ran out of memory before, and no more is free than was then."""
        before = self._switcher._ran_out.get(self.placement.model_id)
        if before is None or self._force:
            return
        free = free_bytes(self._switcher._machine.read(), self.placement)
        if free is not None and free < before + _NOISE_BYTES:
            raise TooLittleMemory(
                f"{self.placement.model_id} ran out of memory with {before:,} bytes free, and {free:,} are now."
            )

    def _look_at_memory(self) -> None:
        """Raise if there is too little for the plan: a smaller one is worth no waiting."""
        problems = () if self._force else check_memory(self._switcher._machine.read(), self.placement)
        if problems:
            raise TooLittleMemory(f"{self._smaller}: {'; '.join(problems)}")

    def _try(self, step: Callable[[], None]) -> None:
        """Take *step*, again after a pause where that may help; raises the last attempt's error."""
        for attempt in count(1):
            self._end_if_leaving()
            self._attempts = self._attempts_before + attempt
            try:
                return step()
            except ShiftworkerError as error:
                logger.warning(
                    "residency.attempt_failed", model_id=self.placement.model_id, attempt=attempt, error=error.message
                )
                after = self._next(error, attempts_left=self._limits.attempts - attempt)
                if after.rung is not Rung.RETRY or self._switcher._leaving.is_set():
                    raise
            self._switcher._pause(_PAUSE_S)
        return None

    def _end_if_leaving(self) -> None:
        """Raise if the worker leaves."""
        if self._switcher._leaving.is_set():
            raise LoadFailed(f"{self.placement.model_id} was not loaded.")

    def _load(self) -> None:
        try:
            self._load_and_verify()
        except ShiftworkerError:
            self._clear_away()
            raise

    def _load_and_verify(self) -> None:
        placement = self.placement
        model_id = placement.model_id
        may_take_s = allow_s(self._limits.attempt_s, _weights_of(placement), self._switcher._load_speed())
        until = time.monotonic() + may_take_s
        attempt = f"attempt {self._attempts - self._attempts_before} of {self._limits.attempts}"
        self._enter(SwitchStage.LOADING, "; ".join(filter(None, [attempt, self._smaller])))
        self._begun_at = None
        self._switcher._reclaimer.see_freed()  # after a failed attempt, say
        self._check(check_load)
        before = self._begun_at = self._switcher._machine.read() if placement.gpus else None
        resident = Resident(
            model_id=model_id,
            level=Level.STARTING,
            bytes=placement.memory.total,
            gpus=placement.gpus,
            host_bytes=placement.memory.host,
            since=time.time(),
            smaller=self._smaller,
            max_model_len=self._shorter,
        )
        self._board.put(resident)
        engine = self._switcher._engine(model_id)
        loaded = engine.ensure_ready(placement, timeout_s=may_take_s)
        self._enter(SwitchStage.VERIFYING, f"loaded in {loaded.seconds:.1f} s, canary prompt")
        verify(engine, placement, timeout_s=max(1.0, until - time.monotonic()))
        measured = self._measure(loaded)
        if before is not None:
            self._switcher._reclaimer.note_loaded(placement, loaded.pids, before)
        taken = learned(placement.memory, measured, on_card=bool(placement.gpus)).total
        self._board.put(replace(resident, level=Level.READY, bytes=taken, since=time.time()))
        self._tell(self._switcher._measured, placement, measured)

    def _measure(self, loaded: Loaded) -> Measured:
        """Put what the machine counts beside what the engine says."""
        if not self.placement.gpus:
            return replace(loaded.measured, total=loaded.rss_bytes)
        held = count_bytes(self._switcher._machine.read(), loaded.pids) if loaded.pids else None
        return replace(loaded.measured, total=held)

    def _check(self, check: Callable[[Machine, Placement, LoadLimits], tuple[str, ...]]) -> None:
        """Raise what *check* has against the machine as it is now, unless forced."""
        if self._force:
            return
        machine, limits = self._switcher._machine.read(), self._limits.load
        if problems := check(machine, self.placement, limits):
            refusal = LoadRefused if check_cards(machine, self.placement, limits) else TooLittleMemory
            raise refusal(
                f"{self.placement.model_id} is not loaded now: {'; '.join(problems)}. "
                "`shiftworker switch --force` loads it anyway."
            )

    def _clear_away(self) -> None:
        """Leave nothing of a failed attempt; what will not end stays on the board, with its memory."""
        model_id = self.placement.model_id
        self._board.set_level(model_id, Level.STOPPING)
        try:
            self._switcher.stop(model_id, begun_at=self._begun_at)
        except ShiftworkerError as error:
            logger.exception("residency.remains", model_id=model_id, error=error.message)

    def _give_up(self, error: ShiftworkerError) -> SwitchRecord:
        """Leave the model alone for a while: asked for again at once, it would fail at once."""
        if self._switcher._leaving.is_set():
            return self.finished("failed", f"the worker leaves: {error.message}")
        self.error = error
        model_id = self.placement.model_id
        before = self._board.read().quarantined.get(model_id)
        failures = (before.failures if before else 0) + 1
        pause_s = self._limits.quarantine_s * 2 ** min(failures - 1, _MAX_QUARANTINE_DOUBLINGS)
        now = time.time()
        self._board.quarantine(
            model_id, Quarantine(since=now, until=now + pause_s, failures=failures, reason=error.message)
        )
        logger.error(
            "residency.quarantined", model_id=model_id, seconds=pause_s, failures=failures, error=error.message
        )
        return self.finished("failed", error.message)

    def _enter(self, stage: SwitchStage, detail: str) -> None:
        self._leave()
        self._stage = (stage, time.monotonic())
        self._show(stage)
        logger.info("residency.stage", model_id=self.placement.model_id, stage=stage, detail=detail)
        self._tell(self._on_stage, stage, detail)

    def _show(self, stage: SwitchStage | None) -> None:
        """Put it on the board that this switch is under way."""
        model_id = self.placement.model_id
        self._board.switching(
            Switching(to_model=model_id, epoch=self._epoch, since=time.time(), begun=True, stage=stage)
        )

    def _tell(self, listener: Callable[..., object], *what: object) -> None:
        """Tell the outside; that nobody listens (Redis is away, say) does not stop a switch half way."""
        try:
            listener(*what)
        except Exception as error:  # noqa: BLE001 - whatever a listener's fault is, it is not the switch's
            logger.warning("residency.not_told", model_id=self.placement.model_id, error=str(error))

    def _leave(self) -> None:
        if self._stage is not None:
            stage, since = self._stage
            self._stages[stage] = self._stages.get(stage, 0.0) + time.monotonic() - since
            self._stage = None

    def finished(self, outcome: Any, detail: str = "") -> SwitchRecord:
        """Keep the record of the switch, tell its end, and return the record."""
        self._leave()
        record = SwitchRecord(
            from_model=self._from,
            to_model=self.placement.model_id,
            outcome=outcome,
            seconds=round(time.monotonic() - self._began, 4),
            stages={stage: round(seconds, 4) for stage, seconds in self._stages.items()},
            attempts=self._attempts,
            reason="; ".join(part for part in (self._reason, detail) if part),
            at=utc_now(),
            load_bytes=_weights_of(self.placement),
        )
        logger.info("residency.switched", **record.model_dump(mode="json", exclude={"at"}))
        if outcome != "stale":
            stage = SwitchStage.READY if outcome == "ready" else SwitchStage.FAILED
            self._tell(self._switcher._record, record)
            self._show(stage)
            self._tell(self._on_stage, stage, record.reason)
        return record


def needs_of(placement: Placement) -> Mapping[int, int]:
    """What a model takes by its plan, by card and HOST."""
    return by_place(size=placement.memory.total, gpus=placement.gpus, host_bytes=placement.memory.host)


def _weights_of(placement: Placement) -> int:
    """Bytes of weights that a load reads, for all its cards."""
    return placement.memory.weights * placement.tensor_parallel_size


def _is_known(ask: Callable[[str], bool], model_id: str) -> bool:
    """Ask about the jobs that wait for *model_id*; no, if nobody can say."""
    try:
        return ask(model_id)
    except Exception as error:  # noqa: BLE001 - Redis away: that is no reason to be without a model
        logger.warning("residency.not_told", model_id=model_id, error=str(error))
        return False


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
