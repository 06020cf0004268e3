"""`jax-it eval --follow`: a process that scores each checkpoint of a run once, in order, until training has ended.

A step is scored if it has a metrics.json, which is written last and atomically: a process that is killed continues
where it was. One process writes to a folder; it tells training which checkpoints it needs (see `follower_heartbeat`).
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
from jax_it.evaluation.evaluate import OWN, CheckpointScorer, EvalOptions, open_config
from jax_it.evaluation.results import failures, write_missing_events
from jax_it.follower_heartbeat import Heartbeat, heartbeat
from jax_it.metrics import Result
from jax_it.run_dir import SCORES, RunDir
from jax_it.stopping import on_signals

START_TIMEOUT = 600.0  # seconds to wait for a run's folder
POLL = 0.2, 10.0  # seconds between two looks at the folder, at first and at most
TRIES = 3  # to read a checkpoint: one that is being deleted may look damaged for a moment
STOPPED = "; run the same command to continue"


def follow(
    workdir: str | Path,
    options: EvalOptions = OWN,
    timeout: float = 0,
    report: Callable[[int, Result], None] = lambda step, result: None,
) -> dict[int, str]:
    """Score each checkpoint that has no scores yet, and report it, until training has ended.

    With a `timeout` it gives up after that many seconds without a new checkpoint; without one, it waits for a run that
    has stopped, and START_TIMEOUT seconds for one that does not exist yet. Returns why steps, or tasks of them, failed.
    Raises UserError where another process follows, and Interrupted at SIGTERM and where it gives up.
    """
    hosts.start()
    run_dir = RunDir(files.locate(workdir))
    failed: dict[int, str] = {}
    with on_signals("eval", STOPPED) as stopping:
        if hosts.from_first(lambda: _wait_for_run(run_dir, timeout or START_TIMEOUT)) != "found":
            raise UserError(
                f"{run_dir.path} has no run after {timeout or START_TIMEOUT:.0f} s; start one with jax-it train, or "
                "fix --workdir"
            )
        with _locked(run_dir, options) as heartbeat:
            watch = _Watch(run_dir, options, timeout, heartbeat)
            scorer = _open(run_dir, options)
            watch.open(scorer)
            while True:
                event, _, number = hosts.from_first(watch.next).partition(" ")
                if event == "ended":
                    return failed
                if event == "timeout":
                    raise Interrupted(
                        f"no new checkpoint in {run_dir.path} for {timeout:.0f} s; run the same command to continue"
                    )
                if event == "replaced":
                    _log(f"the run in {run_dir.path} has been replaced or changed; opening it again")
                    scorer = _open(run_dir, options)
                    watch.open(scorer)
                    continue
                step = int(number)
                _log(f"scoring checkpoint {step}")
                try:
                    result = scorer(step, stopping)
                except Unreadable as error:
                    if reason := hosts.from_first(partial(watch.unreadable, step, error)):
                        _log(reason)
                        failed[step] = reason
                    continue
                watch.restart_timeout()
                if hosts.is_first():
                    report(step, result)
                if reasons := failures(result):
                    failed[step] = "; ".join(f"step {step}: {task}: {reason}" for task, reason in reasons.items())
                    _log(failed[step])


def _open(run_dir: RunDir, options: EvalOptions) -> CheckpointScorer:
    config, resolved = open_config(run_dir, options)
    every = config.eval.every
    if every.value and not options.name and not options.output:
        raise UserError(
            f"the run in {run_dir.path} is scored while it trains (config.eval.every={str(every)!r}); follow a run "
            "that is not, or score it on something else with --config or --output"
        )
    scorer = CheckpointScorer(run_dir, options, config, resolved)
    if (tensorboard_dir := options.tensorboard(run_dir)) is not None:
        write_missing_events(tensorboard_dir, {step: options.folder(run_dir, step) for step in run_dir.scored_steps()})
    return scorer


def _wait_for_run(run_dir: RunDir, seconds: float) -> str:
    """Wait until the folder holds a run: "found", or "" where it does not in time."""
    until = time.monotonic() + seconds
    if not run_dir.holds_a_run():
        _log(f"waiting for a run in {run_dir.path}")
    while not run_dir.holds_a_run():
        if time.monotonic() > until:
            return ""
        time.sleep(POLL[0])
    return "found"


@contextmanager
def _locked(run_dir: RunDir, options: EvalOptions) -> Iterator[Heartbeat | None]:
    """Lock the folder of the scores, and keep telling training that this process follows. On the first host."""
    if not hosts.is_first():
        yield None
        return
    folder = files.locate(options.output) if options.output else run_dir.path / "eval"
    file = folder / f".follow{'-' * bool(options.name)}{options.name}.lock"
    with heartbeat(run_dir.followers / f"{zlib.crc32(str(file).encode()):08x}.json") as beating:
        refusal = f"follows the run in {run_dir.path} already; stop it, or name another --output"
        with files.locked(file, refusal, "fix that, or name an --output"):
            yield beating


class _Watch:
    """Watches the run's folder, on the first host."""

    def __init__(self, run_dir: RunDir, options: EvalOptions, timeout: float, heartbeat: Heartbeat | None):
        self._run_dir, self._options, self._timeout, self._heartbeat = run_dir, options, timeout, heartbeat

    def open(self, scorer: CheckpointScorer) -> None:
        """Watch this run from now on."""
        self._config = self._config_text()
        # Orbax makes its manager on all hosts together, and then tells each one the steps by itself.
        self._checkpoints, self._total = scorer.checkpoints, scorer.total_steps
        self._unscored: set[int] = set()  # steps that had a checkpoint and no scores at the last look
        self._tries: dict[tuple[float, ...], int] = {}  # failed reads of each folder, by `_key`
        self._warning = ""
        self.restart_timeout()

    def restart_timeout(self) -> None:
        self._changed = time.monotonic()

    def _config_text(self) -> str:
        try:
            return files.read_text(self._run_dir.path / "config.json")
        except (OSError, ValueError):
            return ""

    def next(self) -> str:
        """Wait for something to do: "score STEP", "ended", "replaced" (by another run) or "timeout"."""
        wait, logged = POLL[0], False
        while True:
            if event := self._look():
                return event
            if self._timeout and time.monotonic() > self._changed + self._timeout:
                return "timeout"
            if not logged and wait > 1:
                _log(f"{self._count()}; waiting for the next checkpoint")
                logged = True
            time.sleep(min(wait, self._timeout or wait))
            wait = min(wait * 1.5, POLL[1])

    def _look(self) -> str:
        config = self._config_text()
        if not config:  # the folder is gone; it may come back
            return ""
        if config != self._config:
            return "replaced"
        ended = self._ended()  # before the steps: the last checkpoint is there when it is written
        steps = self._checkpoints.steps()
        unscored = [step for step in steps if not self._is_scored(step)]
        for step in sorted(self._unscored.difference(steps)):
            if not self._is_scored(step):
                _log(_deleted(step))
        self._unscored = set(unscored)
        for step in unscored:
            # Taken before the folder is read: one that replaces it meanwhile has tries of its own.
            self._tried = self._key(step)
            tries = self._tries.get(self._tried, 0)
            if tries < TRIES:
                if self._heartbeat:
                    self._heartbeat.move(step)
                time.sleep(tries)
                return f"score {step}"
        if self._heartbeat and steps:
            self._heartbeat.move(steps[-1] + 1)
        newest = steps[-1] if steps else 0
        if steps and (newest >= self._total or newest == ended):
            _log(f"{self._count()}, and training has ended")
            return "ended"
        if ended is not None:
            self._warn(
                f"{self._run_dir.path / 'ended.json'} says that training ended at step {ended}, but the newest "
                f"checkpoint is that of step {newest}; waiting: remove it, or restore what is missing"
            )
        return ""

    def _ended(self) -> int | None:
        try:
            return self._run_dir.ended()
        except UserError as error:
            self._warn(str(error))
            return None

    def _warn(self, text: str) -> None:
        """Log once why this still waits although training may have ended."""
        if text != self._warning:
            _log(text)
        self._warning = text

    def unreadable(self, step: int, error: Unreadable) -> str:
        """Count a failed read of the checkpoint of `next`. Returns why it failed if it exists and is given up."""
        if step not in self._checkpoints.steps():
            self._unscored.discard(step)
            _log(_deleted(step))
            return ""
        tries = self._tries[self._tried] = self._tries.get(self._tried, 0) + 1
        return f"{error.reason}; it is skipped" if tries == TRIES else ""

    def _is_scored(self, step: int) -> bool:
        return files.is_regular(self._options.folder(self._run_dir, step) / SCORES)

    def _count(self) -> str:
        number = sum(map(self._is_scored, {*self._run_dir.scored_steps(), *self._checkpoints.steps()}))
        return f"{number} checkpoint{'s' * (number != 1)} scored"

    def _key(self, step: int) -> tuple[float, ...]:
        """Identify a checkpoint's folder: a resumed run may write it again, or somebody restore it from a copy."""
        try:
            found = os.stat(self._checkpoints.folder / str(step))
            return step, found.st_ino, found.st_mtime
        except OSError:  # it is gone, or lies in an object store
            return (step,)


def _deleted(step: int) -> str:
    return f"checkpoint {step} was deleted before it was scored; raise config.train.keep_unscored to keep more of them"


def _log(text: str) -> None:
    if hosts.is_first():
        print(f"jax-it eval: {text}", file=sys.stderr, flush=True)
