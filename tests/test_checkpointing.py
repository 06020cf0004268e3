"""Which checkpoints are kept, and how they are written and read. Damaged ones: tests/faults/test_damage.py."""

import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_it.checkpointing import Checkpoints, abstract
from jax_it.config import Mesh
from jax_it.sharding import make_mesh

PARAMS = {"matrix": jnp.arange(32.0).reshape(8, 4), "vector": jnp.ones(4, jnp.bfloat16)}
TRAINING = {"step": jnp.int32(3), "memory": (jax.tree.map(jnp.zeros_like, PARAMS), ())}


WHOLE = PartitionSpec()


def placed(tree, mesh=None, spec=WHOLE):
    place = NamedSharding(mesh or make_mesh(Mesh(), jax.devices()[:1]), spec)
    return abstract(tree, jax.tree.map(lambda leaf: place, tree))


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, PARAMS, TRAINING, {"step": step})
    checkpoints.wait()


@pytest.mark.parametrize(
    "keep, keep_best, scores, kept",
    [
        (1, 0, {}, [5]),
        (2, 0, {1: 9.0}, [4, 5]),
        (2, 1, {}, [4, 5]),
        (1, 1, {1: 0.5, 2: 0.9, 3: 0.1}, [2, 5]),
        (1, 2, {1: -0.5, 2: -0.9, 3: -0.1}, [1, 3, 5]),
        (2, 1, {5: 1.0, 4: 0.0}, [4, 5]),
        (9, 0, {}, [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, keep_best, scores, kept):
    with Checkpoints(tmp_path, keep, keep_best, scores.get) as checkpoints:
        save(checkpoints, 1, 2, 3, 4, 5)
        assert checkpoints.steps() == kept
    assert sorted(int(file.name) for file in tmp_path.iterdir()) == kept


def test_a_score_that_comes_later_counts_from_then_on(tmp_path):
    scores = {}
    with Checkpoints(tmp_path, 1, 1, scores.get) as checkpoints:
        save(checkpoints, 1)
        scores[1] = 0.5
        save(checkpoints, 2, 3)
        assert checkpoints.steps() == [1, 3]
        scores[3] = 0.6
        save(checkpoints, 4)
        assert checkpoints.steps() == [3, 4]


def test_all_that_was_saved_comes_back(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore_newest(placed(PARAMS), placed(TRAINING)) is None
        save(checkpoints, 7)
    step, params, training, position = Checkpoints(tmp_path, max_to_keep=1).restore_newest(
        placed(PARAMS), placed(TRAINING)
    )
    assert (step, position) == (7, {"step": 7})
    for found, expected in ((params, PARAMS), (training, TRAINING)):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)


def test_a_position_that_changes_while_it_is_written_is_kept_as_it_was(tmp_path, monkeypatch):
    dumps = json.dumps

    def dumps_late(*arguments, **named):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return dumps(*arguments, **named)

    monkeypatch.setattr(json, "dumps", dumps_late)
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        position = {"steps": 0, "totals": {}}
        checkpoints.save(1, PARAMS, TRAINING, position)
        position["totals"]["examples"] = 8
    found = Checkpoints(tmp_path).restore_newest(placed(PARAMS), placed(TRAINING))
    assert found[3] == {"steps": 0, "totals": {}}


def test_a_checkpoint_can_be_restored_on_any_mesh(tmp_path):
    wide = make_mesh(Mesh(fsdp=4, tensor=2, data=1))
    tree = {"matrix": jax.device_put(PARAMS["matrix"], NamedSharding(wide, PartitionSpec("fsdp", "tensor")))}
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(1, tree, TRAINING, {})
    for mesh, spec in ((make_mesh(Mesh(data=1), jax.devices()[:1]), ()), (wide, ("tensor",)), (wide, (None, "fsdp"))):
        found = Checkpoints(tmp_path).restore_params(1, placed(tree, mesh, PartitionSpec(*spec)))["matrix"]
        assert np.array_equal(found, PARAMS["matrix"])
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)


def test_reading_changes_nothing_and_needs_no_folder(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    assert not (tmp_path / "nowhere").exists()
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        save(checkpoints, 1, 2)
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # another process writes it
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_reader_sees_what_a_writer_adds(tmp_path):
    reader = Checkpoints(tmp_path)
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        save(checkpoints, 1)
        assert reader.steps() == [1]
        save(checkpoints, 2)
        assert reader.steps() == [1, 2]


def test_a_reader_is_not_disturbed_by_checkpoints_that_are_deleted_meanwhile(tmp_path):
    """Orbax lists the names and reads the folders afterwards: one of them may be gone by then."""
    done = threading.Event()

    def come_and_go():
        for step in itertools.count():
            (tmp_path / "new" / "params").mkdir(parents=True)
            (tmp_path / "new" / "_CHECKPOINT_METADATA").write_text("{}")
            (tmp_path / "new").rename(tmp_path / str(step))
            if step >= 5:
                shutil.rmtree(tmp_path / str(step - 5))
            time.sleep(0.1)
            if done.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(come_and_go)
        try:
            for _ in range(20):
                with Checkpoints(tmp_path) as reader:
                    for _ in range(20):
                        assert len(reader.steps()) <= 6
        finally:
            done.set()
        writer.result()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    part = tmp_path / "3.orbax-checkpoint-tmp" / "params"
    part.mkdir(parents=True)
    (part / "data").write_text("half")
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        assert list(tmp_path.iterdir()) == []
        save(checkpoints, 3)
        assert checkpoints.steps() == [3]


def test_leaving_waits_until_all_is_on_disk(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(1, PARAMS, TRAINING, {})
    assert Checkpoints(tmp_path).steps() == [1]
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(2, PARAMS, TRAINING, {})
        raise KeyboardInterrupt
    assert Checkpoints(tmp_path).steps() == [2]
