"""What training keeps for the processes that follow it."""

import json
import os
import time

import jax.numpy as jnp

from jax_it import follower_heartbeat
from jax_it.checkpointing import Checkpoints
from jax_it.follower_heartbeat import heartbeat, waiting

STEPS = [1, 2, 3, 4, 5]


def test_what_a_running_process_has_yet_to_read_is_kept_up_to_a_limit(tmp_path):
    folder = tmp_path / "followers"
    assert waiting(folder, STEPS, 2) == []
    with heartbeat(folder / "a.json") as own:
        assert waiting(folder, STEPS, 2) == [1, 2]
        own.move(3)
        assert waiting(folder, STEPS, 2) == [3, 4] and waiting(folder, STEPS, 9) == [3, 4, 5]
        assert waiting(folder, STEPS, 0) == []
        with heartbeat(folder / "b.json") as other:
            other.move(2)
            assert waiting(folder, STEPS, 2) == [2, 3]
        own.move(6)
        assert waiting(folder, STEPS, 2) == []
    assert list(folder.iterdir()) == []


def test_a_process_that_has_not_been_heard_of_for_long_is_taken_for_dead(tmp_path):
    for ago, kept in ((0, STEPS), (500, STEPS), (700, [])):
        (tmp_path / "a.json").write_text(json.dumps({"at": time.time() - ago, "step": 0}))
        assert waiting(tmp_path, STEPS, 9) == kept


def test_a_damaged_file_is_passed_over(tmp_path):
    for content in ("", "[]", '{"at": 1e99}', '{"at": null, "step": 1}'):
        (tmp_path / "a.json").write_text(content)
        assert waiting(tmp_path, STEPS, 9) == []
    (tmp_path / "a.json").unlink()
    os.mkfifo(tmp_path / "a.json")
    assert waiting(tmp_path, STEPS, 9) == []


def test_a_process_that_is_busy_is_heard_of_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(follower_heartbeat, "INTERVAL", 0.01)
    with heartbeat(tmp_path / "a.json"):
        first = json.loads((tmp_path / "a.json").read_text())["at"]
        until = time.monotonic() + 10
        while json.loads((tmp_path / "a.json").read_text())["at"] == first and time.monotonic() < until:
            time.sleep(0.01)
        assert json.loads((tmp_path / "a.json").read_text())["at"] > first


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("")
    with heartbeat(tmp_path / "file" / "a.json") as own:
        own.move(3)
    assert waiting(tmp_path / "file", STEPS, 9) == []


def test_a_checkpoint_waits_for_its_score_and_may_then_be_the_best(tmp_path):
    """The score of step 1 comes when steps 2 and 3 are there already."""
    scores, folder = {}, tmp_path / "followers"
    params = {"vector": jnp.ones(4)}

    def waiting_of(steps):
        return waiting(folder, steps, 2)

    with heartbeat(folder / "a.json") as own, Checkpoints(tmp_path / "c", 1, 1, scores.get, waiting_of) as checkpoints:

        def save(step):
            checkpoints.save(step, params, {"step": jnp.int32(step)}, {"step": step})
            checkpoints.wait()
            return checkpoints.steps()

        assert [save(1), save(2), save(3)] == [[1], [1, 2], [1, 2, 3]]
        scores[1] = 0.9
        own.move(2)
        assert save(4) == [1, 2, 3, 4]  # the best, two that wait, the newest
        scores[2] = 0.5
        own.move(3)
        assert save(5) == [1, 3, 4, 5]
        own.move(6)
        assert save(6) == [1, 6]
