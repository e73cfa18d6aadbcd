"""The engine: many answers from one network at a time, whatever its mechanisms.

One step plans (`scheduler`), puts sequences in and out of their places (`slots`, `recall`), computes
(`network.extend`), chooses (`sampling`) and hands out. It runs on a thread of its own after `start`;
without, whoever waits for an answer drives it.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from armillary.base.errors import ArmillaryError, InputError
from armillary.engine.adapter import Adapters, refused
from armillary.engine.checks import carried, check
from armillary.engine.choosing import choose, choose_along, scored
from armillary.engine.drafts import Drafter
from armillary.engine.guesses import Guesses, force
from armillary.engine.pace import Pace
from armillary.engine.prefix import Match, Snapshot
from armillary.engine.recall import Recall, memory_for
from armillary.engine.replay import Held
from armillary.engine.request import Answer, Finish, Piece, Request
from armillary.engine.running import Running, Together, joins
from armillary.engine.sampling import Choice, Chooser
from armillary.engine.scheduler import Plan, Scheduler, Work
from armillary.engine.scheduler import Sequence as Progress
from armillary.engine.slots import Apart, Slots
from armillary.engine.steps import Mark
from armillary.engine.writer import Writer
from armillary.native.tape import alone
from armillary.nn.cache import Cache, Int8
from armillary.nn.network import Network
from armillary.nn.taps import Taps
from armillary.text import Tokenizer

log = logging.getLogger("armillary.engine")

LOOK = 0.1  # seconds after which somebody looks around, however many steps are made in one go


class Engine:
    """Generates answers.

    slots: answers at a time; capacity: most tokens of one, by default the network's context; memory: bytes
    for states, running and kept and a draft's, by default what the slots can come to and half as much again
    besides the draft's; keep: whether later requests may go on from earlier ones; overcommit: above 1, more answers
    are begun than memory is sure to hold, and the newest makes way when it ends; drafter: guesses tokens, which
    are then checked together; mark: a watermark on every answer that does not bring its own (one that acts
    through the draw leaves greedy answers as they are); cache: how keys and values are kept: with one that
    drops tokens nothing is shared or guessed; kv: "int8" is short for the cache `Int8`; weights: how the
    native decoding step on a CPU holds them: auto (float32, or bf16 or float16 where that loses nothing), float32,
    bf16, float16, int8, int4, or plain (no such step); steps of answers with an adapter (`adapters`) are plain.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        capacity: int | None = None,
        memory: int | None = None,
        keep: bool = True,
        overcommit: float = 1.0,
        patience: float = 30.0,
        drafter: Drafter | None = None,
        mark: Mark | None = None,
        cache: Cache | None = None,
        kv: Literal["int8"] | None = None,
        taps: Taps | None = None,
        weights: Held = "auto",
    ) -> None:
        self.network, self.tokenizer, self.taps = network, tokenizer, taps
        self.mark = mark
        if taps is not None and weights not in ("auto", "plain"):
            raise InputError("taps show plain steps", hint="leave weights out, or the taps")
        self.capacity = capacity or network.settings.context
        form = network.settings.form
        if kv is not None:
            if kv != "int8" or cache is not None:
                raise InputError(f"kv is '{kv}'" + (" beside a cache" if cache is not None else ""), hint="int8, alone")
            cache = Int8()
        self.lossy = cache is not None and cache.lossy
        if drafter is not None and self.lossy:
            raise InputError("guesses cannot be taken back where tokens are dropped", hint="leave out the drafter")
        self.slots = (Apart if form == "encoder_decoder" else Slots)(
            network, slots, self.capacity, cache, weights=weights if taps is None else "plain"
        )
        # a prefix that sees itself both ways cannot be gone on from in the middle, nor what was dropped from
        keep = keep and form == "decoder" and not self.lossy
        self.memory = memory_for(self.slots, memory, getattr(drafter, "nbytes", 0), keep)
        self.recall = Recall(self.slots, self.memory, keep)
        self.scheduler = Scheduler(
            slots, self.memory, overcommit=overcommit, patience=patience, reuse=self._reuse, shrink=self.recall.shrink
        )
        self.pace = Pace()
        self.guesses = None if drafter is None else Guesses(drafter)
        self.steps = self.failures = self.failing = 0
        self.progressed = time.monotonic()
        # −1 where nothing is said of what may be left out
        self._side = {name: torch.full((slots,), -1) for name in network.side_names | network.takes}
        self._runs: dict[Progress, Running] = {}
        self._new: list[Running] = []
        self._going: Together | None = None  # what the last step computed, where the next one may be the same again
        self._lock = threading.Lock()  # of what is in line and under way
        self._halted = array("q", [0])  # 1: no further step begins before somebody has looked around
        self._no_grad = torch.no_grad()
        self._stepping = threading.RLock()  # one step at a time, whoever drives
        self.adapters = Adapters(network, refused(self.slots, form), self._stepping)
        self._work = threading.Condition(self._lock)
        self.after = set[Callable[[], None]]()  # called by its thread when listeners have heard all of a step
        self._thread: threading.Thread | None = None
        self._closing: float | None = None

    # -- what a caller does

    def submit(self, request: Request, listener: Callable[[Piece], None] | None = None) -> Answer:
        """Put a request in line. Raises InputError for one that can never be served."""
        return self.submit_copies([request], [listener])[0]

    def submit_copies(
        self, requests: Sequence[Request], listeners: Sequence[Callable[[Piece], None] | None] | None = None
    ) -> list[Answer]:
        """Requests with one prompt, which is computed once: the others begin when the first has read it."""
        runs = [
            self._prepared(request, listener)
            for request, listener in zip(requests, listeners or [None] * len(requests), strict=True)
        ]
        first = runs[0]
        if any((run.answer.request.ids, run.origin) != (first.answer.request.ids, first.origin) for run in runs):
            raise InputError("copies need one prompt")
        if len(runs) > 1 and self.recall.keeps:
            first.followers = runs[1:]
            before = len(first.ids) - 1
            if before and not self.slots.divisible:  # where a copy can go on from
                first.progress.stops = tuple(sorted({*first.progress.stops, before}))
        with self._work:
            if self._closing is not None:
                raise InputError("the engine is closing and takes no more requests")
            for run in [first] if first.followers else runs:
                self._enter(run)
            self._halt()
            self._work.notify()
        return [run.answer for run in runs]

    def _prepared(self, request: Request, listener: Callable[[Piece], None] | None) -> Running:
        check(request, self.network, self.capacity, self._side)
        adapter = self.adapters.get(request.adapter)
        answer = Answer(request, self._drive, listener, self._halt)
        sampling, prompt = request.sampling, len(request.ids)
        ends = self.tokenizer.ends if self.tokenizer is not None else ()
        progress = Progress(
            known=prompt,
            limit=prompt + sampling.max_new_tokens,
            key=request.key,
            priority=request.priority,
            deadline=None if request.timeout is None else answer.submitted + request.timeout,
            stops=self.recall.stops(request),
            # what is dropped depends on where chunks end, and that must not depend on the machine's load
            whole=prompt if self.network.settings.form == "prefix" or self.lossy else 0,
        )
        mark = carried(request, self.mark)
        chooser = Chooser(sampling, request.ids, ends=ends, stream=request.stream, steps=request.steps, mark=mark)
        writer = None if self.tokenizer is None else Writer(self.tokenizer.stream(), sampling.stop)
        self.scheduler.check(progress)
        return Running(answer, progress, chooser, writer, adapter)

    def _enter(self, run: Running) -> None:
        self.scheduler.submit(run.progress, run.answer.submitted)
        self._new.append(run)

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all of them; returns when the last is over."""
        return [answer.wait() for answer in [self.submit(replace(request, whole=True)) for request in requests]]

    def start(self) -> Engine:
        """Go on a thread of its own."""
        assert self._thread is None
        alone()
        self._thread = threading.Thread(target=self._loop, name="armillary-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests; those under way may go on for `drain` seconds, then they end."""
        with self._work:
            self._closing = time.monotonic() + drain
            self._halt()
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.busy and time.monotonic() < self._closing:
                self.step()
            with self._stepping:  # somebody who waits may be in the middle of a step
                self._end_all()

    @property
    def busy(self) -> bool:
        return bool(self._new or self._runs)

    # -- one step

    def step(self) -> bool:
        """Compute the next step; False when there was nothing to do."""
        with self._stepping:
            if not torch.is_grad_enabled():
                return self._step()
            with self._no_grad:
                return self._step()

    def _halt(self) -> None:
        self._halted[0] = 1

    def _step(self) -> bool:
        self._halted[0] = 0
        with self._lock:
            going = self._still_going()
            if going is None:
                self._take_in()
                while gone := [run for run in self._runs.values() if run.answer.cancelled]:
                    for run in gone:
                        self._end(run, "cancelled")
                    self._take_in()  # who followed one of them: a plan may choose it now
                if self.guesses is not None:
                    running = [run for run in self._runs.values() if run.progress.stage == "running"]
                    self.guesses.make([run for run in running if run.progress.decoding])
                budget = self._budget()
                plan = self.scheduler.plan(time.monotonic(), budget)
                self._place(plan)
        if going is not None:
            self.steps += self._answers([going])
            self.progressed = time.monotonic()
            return True
        if not plan.work:
            return False
        answers = [one for one in plan.work if one.sequence.decoding]
        groups: dict[Network | None, list[Work]] = {}
        for one in answers:
            groups.setdefault(self._runs[one.sequence].network, []).append(one)
        prompts = [one for one in plan.work if one not in answers]
        joined = self._joined(answers, prompts)
        pieces = [(one.count, one.sequence.computed) for one in joined]
        calls = [
            Together(works if network is not None else [*works, *joined], self._runs)
            for network, works in groups.items()
        ]
        if plan.more and len(calls) == 1 and not calls[0].scored and self.guesses is None:
            self._going, calls[0].plan = calls[0], plan
        self.steps += self._answers(calls, pieces)
        apart, failures, started = [one for one in prompts if one not in joined], self.failures, time.monotonic()
        for one in apart:
            self._compute(Together([one], self._runs))
        if self.failures == failures:
            self.pace.read(sum(one.count for one in apart), time.monotonic() - started)
        self.progressed = time.monotonic()
        return True

    def _still_going(self) -> Together | None:
        """The answers of the last step, where they just take another token each."""
        going, self._going = self._going, None
        if going is None or going.plan is None:
            return None
        for run in going.runs:
            if run.answer.cancelled or run.drafts:
                return None
        if self.scheduler.again(going.plan, time.monotonic()):
            self._going = going
        return self._going

    def _answers(self, calls: list[Together], pieces: Sequence[tuple[int, int]] = ()) -> int:
        """Running answers go on, and the pieces of prompts that joined them; returns by how many steps."""
        failures, started, rows, steps = self.failures, time.monotonic(), 0, 1
        for call in calls:
            rows += len(call.rows)
            steps = self._compute(call)
        if calls and self.failures == failures:
            took = (time.monotonic() - started) / steps
            self.pace.joined(rows - len(pieces), pieces, took) if pieces else self.pace.went(rows, took)
            if self.guesses is not None and not pieces:
                self.guesses.went([one for call in calls for one in call.works], took)
        return steps

    def _budget(self) -> int:
        """How many prompt tokens the next step may take."""
        running = [run for run in self._runs.values() if run.progress.stage == "running"]
        answers = [run for run in running if run.progress.decoding]
        prompts = [run for run in running if not run.progress.decoding]
        context = max((run.progress.computed for run in prompts), default=0)
        left = self.slots.beside - sum(1 + run.progress.drafts for run in answers)
        return self.pace.budget(len(answers), context, max(0, left) if joins(answers, prompts) else 0)

    def _joined(self, answers: list[Work], prompts: list[Work]) -> list[Work]:
        """The pieces of prompts that one call takes together with the answers' tokens; all or none."""
        if not joins([self._runs[one.sequence] for one in answers], [self._runs[one.sequence] for one in prompts]):
            return []
        fits = sum(one.count for one in [*answers, *prompts]) <= self.slots.beside
        return prompts if fits else []

    def _take_in(self) -> None:
        for run in self._new:
            self._runs[run.progress] = run
        self._new.clear()

    def _place(self, plan: Plan) -> None:
        for progress in plan.expired:
            self._end(self._runs[progress], "deadline")
        for progress in plan.preempted:
            run = self._runs[progress]
            self.recall.remember(run, progress.slot)
            progress.computed = progress.drafts = run.asked = 0
            run.drafts = []
            if self.lossy:  # tokens that came one by one come back one by one
                progress.stops = tuple(range(run.chooser.begun, len(run.ids)))
        for progress in plan.admitted:
            run = self._runs[progress]
            try:
                self.slots.begin(progress.slot, run.match, run.answer.request.source, run.network)
            except Exception as error:
                plan.work = [one for one in plan.work if one.sequence is not progress]
                self._faulty("an answer could not begin")
                self._fail(run, error, told=True)
                continue
            run.answer.begun_at = run.answer.begun_at or time.monotonic()
            run.answer.reused = max(run.answer.reused, min(progress.computed, len(run.answer.request.ids)))
            for name, values in self._side.items():
                request = run.answer.request
                values[progress.slot] = len(request.ids) if name == "prefix" else request.side.get(name, -1)
            run.match = Match()

    def _compute(self, call: Together) -> int:
        """One call of the network, and what comes of it; or several, if nobody looks at the tokens: how many."""
        works, runs, computed = call.works, call.runs, False
        before: list[Snapshot] = []
        if call.scored:
            before = [
                self.slots.snapshot(row) if one.drafts and not self.slots.divisible else {}
                for row, one in zip(call.rows, works, strict=True)
            ]
        try:
            if steps := self._go_on(call):
                return steps
            logits = self.slots.extend(
                call.rows,
                call.chunks(),
                last=not call.scored,
                side=self._side,
                taps=self.taps,
                network=call.network,
            )
            computed = True
            self._choose(call, logits, before)
            self.failing = 0
        except Exception as error:
            answers = [one for one in works if one.sequence.decoding]
            pieces = [one for one in works if one not in answers]
            if answers and pieces and not computed:
                # Joined, and nothing has been computed (`Replay.extend`): each by itself, so that the fault of one
                # does not end the others.
                self._faulty("a step that was joined failed")
                for part in [answers, *([one] for one in pieces)]:
                    self._compute(Together(part, self._runs))
                return 1
            # Rows of other sequences are untouched: they were no part of the call.
            self._faulty("a step failed")
            with self._lock:
                for run in runs:
                    if run.answer.finish is None:
                        self._fail(run, error, told=True)
        return 1

    def _go_on(self, call: Together) -> int:
        """Answers that take a token each and a plan that holds: steps in one native call, 0 where that cannot be."""
        plan = call.plan
        if plan is None or not call.plain or call.scored or call.network is not None or self.taps is not None:
            return 0
        most = min(call.ahead, 1 + plan.more)
        seconds = min(LOOK, plan.until - time.monotonic())
        ids = [run.chooser.ids[-1] for run in call.runs]
        found = self.slots.go_on_together(call.rows, ids, call.choosers, most, seconds, self._halted)
        if found is None:
            return 0
        steps = max(map(len, found))
        self.scheduler.repeated(plan, steps - 1)
        for run in call.runs:
            run.progress.computed += steps
        self._pick(call.runs, found)
        self.failing = 0
        return steps

    def _choose(self, call: Together, logits: Tensor, before: list[Snapshot]) -> None:
        if call.plain and not call.scored:
            for run in call.runs:
                run.progress.computed += 1
            self._pick(call.runs, [[found] for found in call.choosers.choose(logits)])
            return
        if call.scored:
            for place, (one, run) in enumerate(zip(call.works, call.runs, strict=True)):
                self._check_drafts(one, run, logits[place, : one.count], before[place])
            return
        ready = [place for place, one in enumerate(call.works) if one.finishes]
        for place, one in enumerate(call.works):
            one.sequence.computed += one.count
            if place not in ready:
                self.recall.paused(call.runs[place])
        if ready:
            runs = [call.runs[place] for place in ready]
            logits = logits if len(ready) == len(call.works) else logits[ready]
            self._pick(runs, [[found] for found in choose(logits, [run.chooser for run in runs])])

    def _pick(self, runs: list[Running], chosen: list[list[Choice | Exception]]) -> None:
        """Tokens for each; what steps into the choice of one answer may fail and end just that one."""
        for run, found in zip(runs, chosen, strict=True):
            problem = None if isinstance(found[-1], Choice) else found.pop()
            if found:
                if self.recall.keeps:
                    self.recall.paused(run)
                self._hand_out(run, cast("list[Choice]", found))
            if problem is not None and run.answer.finish is None:
                with self._lock:
                    self._fail(run, cast("Exception", problem))

    def _check_drafts(self, one: Work, run: Running, logits: Tensor, before: Snapshot) -> None:
        """A chunk of which every place's scores are at hand: prompts whose own are asked for, and guesses."""
        progress, start = one.sequence, one.sequence.computed
        prompt = run.answer.request.ids
        if run.answer.request.prompt_logprobs and start < run.chooser.begun - 1:
            self._score_prompt(run, logits, start, prompt)
        known, ready = one.count - one.drafts, one.finishes
        progress.computed += known
        if not ready:
            self.recall.paused(run)
            return
        if run.answer.request.prompt_logprobs and bool(torch.isnan(logits).any()):
            self._end_now(run, "error", "the network gave no finite scores")
            return
        guesses = run.drafts[: one.drafts]
        run.drafts, progress.drafts = [], 0
        given = list[Choice]()
        for choice in choose_along(logits[known - 1 :], run.chooser, guesses):
            if not isinstance(choice, Choice):
                with self._lock:
                    self._fail(run, choice)
                return
            given.append(choice)
        right = len(given) - 1
        if self.guesses is not None:
            self.guesses.came(run, guesses, given)
        if right < one.drafts:
            self._forget(run, start + known + right, start, before)
        progress.computed = start + known + right
        progress.known += right
        self.recall.paused(run)
        self._hand_out(run, given)

    def _forget(self, run: Running, length: int, start: int, before: Snapshot) -> None:
        """Take back the guesses that were wrong: cut where that can be done, else go back and read again."""
        slot = run.progress.slot
        if self.slots.divisible:
            self.slots.go_back(slot, length, {})
            return
        self.slots.go_back(slot, start, before)
        self.slots.extend([slot], [run.ids[start:length]], side=self._side, taps=self.taps, network=run.network)

    def _score_prompt(self, run: Running, logits: Tensor, start: int, prompt: tuple[int, ...]) -> None:
        # of an answer that made way, and reads its prompt again
        known = max(0, len(run.answer.prompt_choices) - start)
        given = prompt[start + known + 1 :]
        run.answer.prompt_choices += scored(logits[known:], given, run.chooser.sampling.alternatives)

    # -- answers

    def _hand_out(self, run: Running, choices: list[Choice]) -> None:
        """Tokens that were chosen, the last of which is not computed yet."""
        chooser, writer, answer = run.chooser, run.writer, run.answer
        text, kept = "", list[Choice]()
        finish: Finish | None = None
        for choice in choices:
            if choice.token in chooser.ends:
                text, finish = text + (writer.close() if writer else ""), "end"
                break
            kept.append(choice)
            if writer is not None:
                text += writer.push(choice.token)
                if writer.stopped:
                    finish = "stop"
                    break
        run.progress.known = len(chooser.ids)
        if finish is None and run.progress.known >= run.progress.limit:
            text += writer.close() if writer else ""
            finish = "stop" if writer is not None and writer.stopped else "length"
        elif finish is None and run.chooser.sieve is not None:
            if chooser.ends and run.chooser.sieve.over:  # a step would choose the end
                text, finish = text + (writer.close() if writer else ""), "end"
            elif not self.lossy:
                force(run, self._runs.values(), self.slots.together)
        if run.followers:
            self._follow(run)
        piece = Piece(text, tuple(kept), finish)
        if finish is None:
            answer.give(piece)
        else:
            self._end_now(run, finish, piece=piece)

    def _end_now(self, run: Running, finish: Finish, error: str | None = None, piece: Piece | None = None) -> None:
        with self._lock:
            self._end(run, finish, error, piece)

    def _end(self, run: Running, finish: Finish, error: str | None = None, piece: Piece | None = None) -> None:
        progress = run.progress
        for follower in run.followers:  # the first ended early: the others do without it
            self._enter(follower)
        run.followers = []
        if progress.stage == "running" and finish != "error":
            self.recall.remember(run, progress.slot)
        if progress.stage != "done":
            self.scheduler.finish(progress)
        self._runs.pop(progress, None)
        run.answer.error = error
        if piece is None:
            rest = run.writer.close() if run.writer is not None else ""
            piece = Piece(rest, (), finish)
        run.answer.give(piece)

    def _fail(self, run: Running, error: Exception, told: bool = False) -> None:
        """End an answer with what went wrong; what is not said for people (`what`) stays out of their sight, and is
        logged unless the log was told."""
        run.answer.inside = not isinstance(error, ArmillaryError)
        run.answer.own = isinstance(error, InputError) and not told  # what was told failed for all of a step
        if run.answer.inside and not told:
            log.error("an answer failed", exc_info=error)
        self._end(run, "error", f"{type(error).__name__}: {error}" if run.answer.inside else str(error))

    def _faulty(self, what: str) -> None:
        self.failures, self.failing = self.failures + 1, self.failing + 1
        log.exception(what)

    def _follow(self, run: Running) -> None:
        """The prompt has been read: its copies may begin."""
        with self._lock:
            for follower in run.followers:
                self._enter(follower)
        run.followers = []

    def _end_all(self, error: Exception | None = None) -> None:
        with self._lock:
            while self._runs or self._new:
                self._take_in()
                for run in list(self._runs.values()):
                    if error is None:
                        self._end(run, "cancelled")
                    else:
                        self._fail(run, error, told=True)

    def _reuse(self, progress: Progress) -> int:
        return self.recall.match(self._runs[progress])

    # -- around

    def _drive(self, answer: Answer) -> bool:
        """Somebody waits for an answer: go on, unless the engine goes by itself (False)."""
        if self._thread is not None:
            return False
        with self._stepping:  # who waits for another's step may find its own answer complete
            if answer.finish is None:
                worked = self.step()
                assert worked or answer.finish is not None or self.busy, "it is not complete, and nothing is left"
        return True

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._work:
                while not self.busy and self._closing is None:
                    self._work.wait(0.5)
                    self.progressed = time.monotonic()
                if self._closing is not None and (not self.busy or time.monotonic() > self._closing):
                    break
            try:
                worked = self.step()
            except Exception as error:  # of a plan or a guess: whose fault it is cannot be told
                self._faulty("a plan failed")
                self._end_all(error)
                worked = True
            for wake in tuple(self.after):
                wake()
            if not worked:
                time.sleep(0.001)
        self._end_all()
        for wake in tuple(self.after):
            wake()
