"""
Makes one model ready: woken or loaded, verified, measured; again, colder or smaller if that fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from common.errors import LoadFailed, LoadRefused, OutOfMemory, ShiftworkerError, TooLittleMemory
from common.logs import get_logger
from common.schemas import SwitchStage
from worker.engines.base import Loaded
from worker.engines.measure import count_bytes
from worker.hardware.gpu import Machine
from worker.memory.learn import learned
from worker.memory.measured import Measured
from worker.residency.check import check_cards, check_load, check_memory, free_bytes
from worker.residency.expect import allow_s
from worker.residency.parts import Parts
from worker.residency.progress import Progress, weights_of
from worker.residency.recover import Failure, Others, Recovery, Rung, recover
from worker.residency.shrink import shrink, what_changed
from worker.residency.unloader import Unloader
from worker.residency.verify import differs, verify
from worker.selection.placement import Placement
from worker.state.residency import Level, Resident

logger = get_logger(__name__)

_PAUSE_S = 2.0  # between attempts: time for a hot card or a leaving process
NOISE_BYTES = 256 * 2**20  # by which free memory changes from look to look although no program came or went


class Loader:
    """Makes the model of *placement* ready, or gives the error of the last thing that was tried."""

    def __init__(
        self, parts: Parts, unloader: Unloader, progress: Progress, placement: Placement, *, force: bool
    ) -> None:
        self._parts = parts
        self._unloader = unloader
        self._progress = progress
        self._force = force
        self.placement = placement  # the plan that is being loaded, smaller ones included
        self.level = parts.level(placement.model_id)  # from where it is being made ready
        self.attempts = 0
        self.ran_short: list[str] = []  # what became of the larger plans
        self.smaller: str | None = None  # what the plan gives up, if it is not the full one
        self._attempts_before = 0  # of the larger plans
        self._plans: tuple[Placement, ...] = ()  # smaller ones, once memory has run out
        self._begun_at: Machine | None = None  # the cards as the load under way found them
        self._shorter: int | None = None  # tokens, if the plan's length is one of the things

    def load_what_fits(self) -> None:
        """
        Load the plan; where memory runs out, the next smaller one that what is free now can hold.

        A model that sleeps is woken; where that fails it is started from its files. A plan that an engine ran out
        of memory with is not loaded again until more is free than was then: every switch to its model would crash
        first.
        """
        full, ran_out = self.placement, self._parts.learned.ran_out
        error = self._outcome_of(self._load_full)
        if error is not None and self._next(error).rung is Rung.COLDER:
            self._take_colder(error)
            error = self._outcome_of(self._load_full)
        if error is None:
            ran_out.pop(full.model_id, None)
        elif isinstance(error, OutOfMemory):
            ran_out[full.model_id] = free_bytes(self._parts.machine.read(), full)
        if isinstance(error, OutOfMemory | TooLittleMemory):
            self._plans = shrink(full, self._parts.machine.read())
        while error is not None:
            if self._next(error).rung is not Rung.SMALLER:
                raise type(error)("; ".join([*self.ran_short, error.message]))
            self._take_smaller(full, error)
            error = self._outcome_of(self._load_smaller)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take *step*, again after a pause where that may help; raises the last attempt's error."""
        for number in count(1):
            self.end_if_leaving()
            self.attempts = self._attempts_before + number
            try:
                return step()
            except ShiftworkerError as error:
                logger.warning(
                    "residency.attempt_failed", model_id=self.placement.model_id, attempt=number, error=error.message
                )
                after = self._next(error, attempts_left=self._parts.limits.attempts - number)
                if after.rung is not Rung.RETRY or self._parts.leaving.is_set():
                    raise
            self._parts.pause(_PAUSE_S)
        return None

    def check_cards(self) -> None:
        """Raise what the cards show against a load, unless forced."""
        self._check(check_cards)

    def end_if_leaving(self) -> None:
        """Raise if the worker leaves."""
        if self._parts.leaving.is_set():
            raise LoadFailed(f"{self.placement.model_id} was not loaded.")

    def clear_away(self) -> None:
        """Leave nothing of a failed attempt; what will not end stays on the board, with its memory."""
        model_id = self.placement.model_id
        self._parts.board.set_level(model_id, Level.STOPPING)
        try:
            self._unloader.stop(model_id, begun_at=self._begun_at)
        except ShiftworkerError as error:
            logger.exception("residency.remains", model_id=model_id, error=error.message)

    def _outcome_of(self, load: Callable[[], None]) -> ShiftworkerError | None:
        """Give the error that *load* ended with, None if the model is ready. Raises that the worker leaves."""
        self.end_if_leaving()
        try:
            load()
        except ShiftworkerError as error:
            if self._parts.leaving.is_set():
                raise
            return error
        return None

    def _load_full(self) -> None:
        self._check_more_is_free()
        self.attempt(self._load)

    def _load_smaller(self) -> None:
        self._look_at_memory()
        self.attempt(self._load)

    def _take_colder(self, error: ShiftworkerError) -> None:
        """Go on from the model's files; *error* is why it did not wake."""
        model_id = self.placement.model_id
        self.ran_short.append(error.message)
        logger.warning("residency.colder", model_id=model_id, asleep=self.level, reason=error.message)
        if self._parts.board.read().resident(model_id) is not None:
            self._unloader.stop(model_id)
        self._attempts_before = self.attempts

    def _take_smaller(self, full: Placement, error: ShiftworkerError) -> None:
        """Go on with the next smaller plan; *error* is why the one before cannot be loaded."""
        plan, *rest = self._plans
        self._plans = tuple(rest)
        self.ran_short.append(error.message)
        self.placement, self.smaller = plan, f"smaller than planned: {what_changed(full, plan)}"
        self._shorter = plan.max_model_len if plan.max_model_len < full.max_model_len else None
        self._attempts_before = self.attempts
        logger.warning("residency.smaller_plan", model_id=plan.model_id, changed=self.smaller, reason=error.message)

    def _next(self, error: ShiftworkerError, *, attempts_left: int = 0) -> Recovery:
        """Ask what is tried after *error*, as far as this model goes."""
        failure = Failure(
            model_id=self.placement.model_id,
            error=error,
            level=self.level,
            attempts_left=attempts_left,
            plans_left=len(self._plans),
            shrunk=self.smaller is not None,
        )
        return recover(failure, Others())

    def _check_more_is_free(self) -> None:
        """Raise if the plan ran out of memory before, and no more is free than was then."""
        before = self._parts.learned.ran_out.get(self.placement.model_id)
        if before is None or self._force:
            return
        free = free_bytes(self._parts.machine.read(), self.placement)
        if free is not None and free < before + NOISE_BYTES:
            raise TooLittleMemory(
                f"{self.placement.model_id} ran out of memory with {before:,} bytes free, and {free:,} are now."
            )

    def _look_at_memory(self) -> None:
        """Raise if there is too little for the plan: a smaller one is worth no waiting."""
        problems = () if self._force else check_memory(self._parts.machine.read(), self.placement)
        if problems:
            raise TooLittleMemory(f"{self.smaller}: {'; '.join(problems)}")

    def _load(self) -> None:
        self._begun_at = None
        self._parts.reclaimer.see_freed()  # after a failed attempt, say
        slept = self._parts.board.read().resident(self.placement.model_id)
        self.level = self._parts.level(self.placement.model_id)
        self._enter_loading()
        self._check(check_load, held=slept.bytes if slept is not None and slept.level.asleep else 0)
        try:
            self._load_and_verify(slept)
        except ShiftworkerError as error:
            if self.level.asleep and not isinstance(error, OutOfMemory) and not self._parts.leaving.is_set():
                self._parts.ban(self.placement.model_id, self.level, error.message)
            self.clear_away()
            raise

    def _enter_loading(self) -> None:
        attempt = f"attempt {self.attempts - self._attempts_before} of {self._parts.limits.attempts}"
        slept = f"awake from {self.level}" if self.level.asleep else None
        self._progress.enter(SwitchStage.LOADING, "; ".join(filter(None, [attempt, slept, self.smaller])))

    def _load_and_verify(self, slept: Resident | None) -> None:
        placement, parts = self.placement, self._parts
        model_id = placement.model_id
        may_take_s = allow_s(parts.limits.attempt_s, weights_of(placement), parts.load_speed())
        until = time.monotonic() + may_take_s
        before = self._begun_at = parts.machine.read() if placement.gpus else None
        resident = Resident(
            model_id=model_id,
            level=Level.STARTING,
            bytes=placement.memory.total,
            gpus=placement.gpus,
            # PyTorch keeps the pinned memory of an earlier sleep for the next one (vllm#16663).
            host_bytes=max(placement.memory.host, slept.host_bytes if slept else 0),
            since=time.time(),
            smaller=self.smaller,
            max_model_len=self._shorter,
        )
        parts.board.put(resident)
        loaded = parts.engine(model_id).ensure_ready(placement, timeout_s=may_take_s)
        self.level = loaded.level
        self._verify(loaded, until)
        measured = self._measure(loaded)
        if before is not None:
            parts.reclaimer.note_loaded(placement, loaded.pids, before)
        taken = learned(placement.memory, measured, on_card=bool(placement.gpus)).total
        host_bytes = resident.host_bytes
        if parts.engine(model_id).sleep_levels(placement):
            host_bytes = max(host_bytes, loaded.rss_bytes or 0)  # its process may stay for long
        parts.board.put(replace(resident, level=Level.READY, bytes=taken, host_bytes=host_bytes, since=time.time()))
        self._progress.tell(parts.measured, placement, measured)

    def _verify(self, loaded: Loaded, until: float) -> None:
        """See that it answers; awake, with the very tokens that it gave when it was loaded."""
        model_id, said = self.placement.model_id, self._parts.learned.said
        before = said[model_id] if loaded.level.asleep else None
        self._progress.enter(SwitchStage.VERIFYING, f"{loaded.level} in {loaded.seconds:.1f} s, canary prompt")
        left_s = max(1.0, until - time.monotonic())
        now = verify(self._parts.engine(model_id), self.placement, timeout_s=left_s, before=before)
        if before is None:
            said[model_id] = now
        elif changed := differs(before, now):
            raise LoadFailed(f"{model_id} woke from {loaded.level} and answers its canary prompt otherwise: {changed}")

    def _measure(self, loaded: Loaded) -> Measured:
        """Put what the machine counts beside what the engine says."""
        if not self.placement.gpus:
            return replace(loaded.measured, total=loaded.rss_bytes)
        held = count_bytes(self._parts.machine.read(), loaded.pids) if loaded.pids else None
        return replace(loaded.measured, total=held)

    def _check(self, check: Callable[..., tuple[str, ...]], **known: int) -> None:
        """Raise what *check* has against the machine as it is now, unless forced."""
        if self._force:
            return
        machine, limits = self._parts.machine.read(), self._parts.limits.load
        if problems := check(machine, self.placement, limits, **known):
            refusal = LoadRefused if check_cards(machine, self.placement, limits) else TooLittleMemory
            raise refusal(
                f"{self.placement.model_id} is not loaded now: {'; '.join(problems)}. "
                "`shiftworker switch --force` loads it anyway."
            )
