"""A process beside training that scores each of a run's checkpoints once, in their order, until the run has ended.

A step is scored if it has a metrics.json, which is written last and atomically: a follower that is killed continues
where it was. One follower writes to a folder; it tells training how far it is (see `follower_heartbeat`).
"""

import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from jax_it import files, hosts
from jax_it.checkpointing import Unreadable
from jax_it.errors import Interrupted, UserError
from jax_it.evaluation.evaluator import Scored
from jax_it.evaluation.results import complete, failures
from jax_it.evaluation.run import OWN, Request, Scorer
from jax_it.follower_heartbeat import Position, position
from jax_it.run_dir import SCORES, RunDir
from jax_it.stopping import on_signals

APPEARS = 600.0  # seconds in which a run's folder should come to be
POLL = 0.2, 10.0  # seconds between two looks at the folder, at first and at most
TRIES = 3  # readings of a checkpoint: one that is being deleted may look damaged for a moment
STOPPED = "; run the same command to continue"

Report = Callable[[int, Scored], None]


def follow(
    workdir: str | Path, request: Request = OWN, timeout: float = 0, report: Report = lambda step, scored: None
) -> dict[int, str]:
    """Scores each checkpoint that has no scores yet, and reports it, until training has ended.

    With a `timeout` it gives up where nothing new has come for so many seconds; without, it waits for a run that
    has stopped, and APPEARS seconds for one that is not there yet. Returns why steps, or tasks of them, failed.
    Raises UserError where another process follows, Interrupted at SIGTERM and where it gives up.
    """
    hosts.start()
    place = RunDir(files.locate(workdir))
    failed: dict[int, str] = {}
    with on_signals("eval", STOPPED) as stopping:
        if hosts.from_first(lambda: _wait_for(place, timeout or APPEARS)) != "there":
            raise UserError(
                f"{place.path} holds no run after {timeout or APPEARS:.0f} s; start one with jax-it train, or fix "
                "--workdir"
            )
        with _alone(place, request) as followed:
            watch = _Watch(place, request, timeout, followed)
            scorer = _open(place, request)
            watch.open(scorer)
            while True:
                what, _, number = hosts.from_first(watch.next).partition(" ")
                if what == "ended":
                    return failed
                if what == "quiet":
                    raise Interrupted(
                        f"nothing new has come to {place.path} for {timeout:.0f} s; run the same command to continue"
                    )
                if what == "anew":
                    _say(f"{place.path} holds another run now")
                    scorer = _open(place, request)
                    watch.open(scorer)
                    continue
                step = int(number)
                _say(f"scoring checkpoint {step}")
                try:
                    scored = scorer(step, stopping)
                except Unreadable as error:
                    if why := hosts.from_first(partial(watch.unreadable, step, error)):
                        _say(why)
                        failed[step] = why
                    continue
                watch.scored(step)
                if hosts.is_first():
                    report(step, scored)
                if reasons := failures(scored):
                    failed[step] = "; ".join(f"step {step}: {task}: {why}" for task, why in reasons.items())
                    _say(failed[step])


def _open(place: RunDir, request: Request) -> Scorer:
    config = request.resolve(place.open()[0])
    every = config.eval.every
    if every.value and not request.name and not request.output:
        raise UserError(
            f"the run in {place.path} is scored while it trains (config.eval.every={str(every)!r}); follow a run "
            "that is not, or score it on something else with --config or --output"
        )
    scorer = Scorer(place, request)
    if (board := request.board(place)) is not None:
        complete(board, {step: request.folder(place, step) for step in place.scored_steps()})
    return scorer


def _wait_for(place: RunDir, seconds: float) -> str:
    """ "there" when the folder holds a run, "" where it does not in time."""
    until = time.monotonic() + seconds
    if not place.holds_a_run():
        _say(f"waiting for a run in {place.path}")
    while not place.holds_a_run():
        if time.monotonic() > until:
            return ""
        time.sleep(POLL[0])
    return "there"


@contextmanager
def _alone(place: RunDir, request: Request) -> Iterator[Position | None]:
    """Holds the folder that the scores go to for this process, and says that it follows. On the first host."""
    if not hosts.is_first():
        yield None
        return
    folder = files.locate(request.output) if request.output else place.path / "eval"
    file = folder / f".follow{'-' * bool(request.name)}{request.name}.lock"
    with position(place.followers / f"{zlib.crc32(str(file).encode()):08x}.json") as own:
        refusal = f"follows the run in {place.path} already; stop it, or name another --output"
        with files.locked(file, refusal, "fix that, or name an --output"):
            yield own


class _Watch:
    """What the first host sees of the run's folder."""

    def __init__(self, place: RunDir, request: Request, timeout: float, followed: Position | None):
        self._place, self._request, self._timeout, self._followed = place, request, timeout, followed

    def open(self, scorer: Scorer) -> None:
        """Looks at this run from now on."""
        self._config = self._config_text()
        # Orbax makes its manager on all hosts together, and then tells each one the steps by itself.
        self._checkpoints, self._total = scorer.checkpoints, scorer.total_steps
        self._seen: set[int] = set()  # steps that had a checkpoint and no scores
        self._tried: dict[tuple[float, ...], int] = {}
        self._changed = time.monotonic()
        self._doubted = ""

    def _config_text(self) -> str:
        try:
            return files.read_text(self._place.path / "config.json")
        except (OSError, ValueError):
            return ""

    def next(self) -> str:
        """Waits until there is something to do: "score STEP", "ended", "anew" for another run, or "quiet"."""
        wait, told = POLL[0], False
        while True:
            found = self._look()
            if found:
                return found
            if self._timeout and time.monotonic() > self._changed + self._timeout:
                return "quiet"
            if not told and wait > 1:
                _say(f"{self._scored()}; waiting for the next checkpoint")
                told = True
            time.sleep(min(wait, self._timeout or wait))
            wait = min(wait * 1.5, POLL[1])

    def _look(self) -> str:
        config = self._config_text()
        if not config:  # the folder is gone; it may come back
            return ""
        if config != self._config:
            return "anew"
        ended = self._ended()  # before the steps: its checkpoint is there when it is written
        steps = self._checkpoints.steps()
        missing = [step for step in steps if not self._is_scored(step)]
        for step in sorted(self._seen.difference(steps)):
            if not self._is_scored(step):
                _say(_deleted(step))
        self._seen = set(missing)
        for step in missing:
            tried = self._tried.get(self._key(step), 0)
            if tried < TRIES:
                if self._followed:
                    self._followed.move(step)
                time.sleep(tried)
                return f"score {step}"
        if self._followed and steps:
            self._followed.move(steps[-1] + 1)
        newest = steps[-1] if steps else 0
        if steps and (newest >= self._total or newest == ended):
            _say(f"{self._scored()}, and training has ended")
            return "ended"
        if ended is not None:
            self._doubt(
                f"{self._place.path / 'ended.json'} says that training ended at step {ended}, but the newest "
                f"checkpoint is that of step {newest}; waiting: remove it, or restore what is missing"
            )
        return ""

    def _ended(self) -> int | None:
        try:
            return self._place.ended()
        except UserError as error:
            self._doubt(str(error))
            return None

    def _doubt(self, text: str) -> None:
        """Says once why this still waits where training may have ended."""
        if text != self._doubted:
            _say(text)
        self._doubted = text

    def unreadable(self, step: int, error: Unreadable) -> str:
        """Notes that a checkpoint could not be read; why not, where it is still there and not tried again."""
        if step not in self._checkpoints.steps():
            self._seen.discard(step)
            _say(_deleted(step))
            return ""
        key = self._key(step)
        self._tried[key] = self._tried.get(key, 0) + 1
        why = str(error).removesuffix("; name another with --checkpoint")
        return f"{why}; it is left out" if self._tried[key] == TRIES else ""

    def scored(self, step: int) -> None:
        self._changed = time.monotonic()

    def _is_scored(self, step: int) -> bool:
        return files.is_regular(self._request.folder(self._place, step) / SCORES)

    def _scored(self) -> str:
        number = sum(map(self._is_scored, {*self._place.scored_steps(), *self._checkpoints.steps()}))
        return f"{number} checkpoint{'s' * (number != 1)} scored"

    def _key(self, step: int) -> tuple[float, ...]:
        """A checkpoint's folder: a run that is resumed may make it anew, or somebody restore it from a copy."""
        try:
            found = os.stat(self._checkpoints.folder / str(step))
            return step, found.st_ino, found.st_mtime
        except OSError:  # it is gone, or lies in an object store
            return (step,)


def _deleted(step: int) -> str:
    return f"checkpoint {step} was deleted before it was scored; a larger config.train.keep_unscored lets more wait"


def _say(text: str) -> None:
    if hosts.is_first():
        print(f"jax-it eval: {text}", file=sys.stderr, flush=True)
