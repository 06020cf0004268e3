"""A checkpoint that has lost or changed a file is never taken for a whole one: the one before it is used instead."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.checkpointing import Checkpoints
from jax_it.errors import UserError
from tests.tiny_run import copy, fails, losses, start


def state(step):
    """Params and the rest of a state: large and small arrays, zeros, and integers."""
    params = {
        "large": jax.random.normal(jax.random.key(step), (64, 32)),
        "small": {"vector": jnp.arange(7.0) + step, "zeros": jnp.zeros((5,), jnp.bfloat16)},
    }
    return params, {"step": jnp.int32(step), "memory": (jax.tree.map(lambda x: 2 * x, params), jnp.int32(step))}


def shapes(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def equal(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2. To be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, max_to_keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *state(step), {"step": step})
    return folder


def restored(folder):
    """The step of the checkpoint in use, which must hold what was saved at that step."""
    with Checkpoints(folder, max_to_keep=2) as checkpoints:
        step, params, training, position = checkpoints.restore_newest(*map(shapes, state(2)))
        assert equal((params, training), state(step)) and position == {"step": step}
        return step


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def delete(file):
    file.unlink()


def empty(file):
    os.truncate(file, 0)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [delete, empty, cut])
def test_no_file_can_be_lost_or_cut_without_notice(saved, tmp_path, capfd, damage):
    used = []
    for i, file in enumerate(files(saved / "2")):
        folder = copy(saved, tmp_path / str(i) / "checkpoints")
        damage(folder / file.relative_to(saved))
        used.append(restored(folder))
        if used[-1] == 1:
            line = capfd.readouterr().err.splitlines()[-1]
            assert f"{folder}/2 cannot be read" in line and "continues from step 1" in line
            assert (folder.parent / "damaged-checkpoint-2").is_dir() and not (folder / "2").exists()
        else:
            assert equal(Checkpoints(folder).restore_params(2, shapes(state(2)[0])), state(2)[0])
    assert used.count(1) > 8


def test_no_byte_of_an_array_can_change_without_notice(saved, tmp_path):
    used = []
    for file in files(saved / "2"):
        if "/d/" not in str(file) or file.stat().st_size < 4000:  # the files with the arrays
            continue
        for part in range(1, 4):
            folder = copy(saved, tmp_path / str(len(used)))
            content = bytearray((folder / file.relative_to(saved)).read_bytes())
            content[part * len(content) // 4] ^= 1
            (folder / file.relative_to(saved)).write_bytes(content)
            used.append(restored(folder))
    assert used == [1] * len(used) and len(used) >= 6


def test_whatever_byte_of_a_checkpoint_changes_what_is_read_is_what_was_saved(saved, tmp_path):
    used = []
    for i, file in enumerate(files(saved / "2")):
        folder = copy(saved, tmp_path / str(i) / "checkpoints")
        changed = folder / file.relative_to(saved)
        if not (content := bytearray(changed.read_bytes())):
            continue
        content[len(content) // 2] ^= 1
        changed.write_bytes(content)
        with Checkpoints(folder, max_to_keep=2) as checkpoints:
            step, params, training, _ = checkpoints.restore_newest(*map(shapes, state(2)))
        assert equal((params, training), state(step))
        used.append(step)
    assert used.count(1) > 4


def test_a_folder_of_a_checkpoint_can_be_lost_as_well(saved, tmp_path):
    for name in ("params", "training", "position", "checksums"):
        folder = copy(saved, tmp_path / name)
        shutil.rmtree(folder / "2" / name)
        assert restored(folder) == 1
    folder = copy(saved, tmp_path / "all")
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    assert restored(folder) == 1


def test_a_checkpoint_is_taken_for_that_of_its_own_step_alone(saved, tmp_path):
    folder = copy(saved, tmp_path / "renamed")
    (folder / "2").rename(folder / "3")
    with pytest.raises(UserError, match=r"checkpoints?/?.*3 cannot be read: it belongs to step 2; choose another"):
        Checkpoints(folder).restore_params(3, shapes(state(2)[0]))
    assert restored(folder) == 1
    folder = copy(saved, tmp_path / "changed")
    position = folder / "2" / "position" / "metadata"
    position.write_text(position.read_text().replace("2", "1"))
    with pytest.raises(UserError, match="its position differs from what was saved"):
        Checkpoints(folder).restore_params(2, shapes(state(2)[0]))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_in_a_checkpoint_is_damage_and_hangs_nothing(saved, tmp_path, make):
    for name in ("params/_METADATA", "training/manifest.ocdbt", "position/metadata", "checksums/metadata"):
        folder = copy(saved, tmp_path / name.split("/")[0])
        (folder / "2" / name).unlink()
        make(folder / "2" / name)
        assert restored(folder) == 1


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_among_the_metadata_is_named(saved, tmp_path, make):
    folder = copy(saved, tmp_path / "checkpoints")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    make(folder / "1" / "_CHECKPOINT_METADATA")
    with pytest.raises(UserError, match=r"checkpoints/1/_CHECKPOINT_METADATA cannot be read: Not a regular file; rem"):
        Checkpoints(folder)


def test_a_checkpoint_with_other_arrays_is_named_with_those_that_differ(saved, capfd):
    params = state(2)[0]
    other = {"large": params["large"], "small": {"vector": params["small"]["vector"], "ones": jnp.ones(5)}}
    with pytest.raises(UserError, match=r"it has other arrays than this run: small.ones, small.zeros differ; choose"):
        Checkpoints(saved).restore_params(2, shapes(other))
    other = params | {"large": jnp.ones((64, 31))}
    with pytest.raises(UserError, match=r"it has an array of shape \(64, 32\) where this run has \(64, 31\); choose"):
        Checkpoints(saved).restore_params(2, shapes(other))


def test_a_damaged_checkpoint_is_not_given_out_for_evaluation_or_export(saved, tmp_path):
    folder = copy(saved, tmp_path / "checkpoints")
    shutil.rmtree(folder / "2" / "params" / "d")
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read: .*; choose another with --checkpoint"):
        Checkpoints(folder).restore_params(2, shapes(state(2)[0]))
    assert equal(Checkpoints(folder).restore_params(1, shapes(state(1)[0])), state(1)[0])


def test_where_all_checkpoints_are_damaged_none_is_touched_and_one_line_says_so(saved, tmp_path, capfd):
    folder = copy(saved, tmp_path / "checkpoints")
    for step in (1, 2):
        (folder / str(step) / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError) as error, Checkpoints(folder, max_to_keep=2) as checkpoints:
        checkpoints.restore_newest(*map(shapes, state(2)))
    line = str(error.value)
    assert f"none of the checkpoints in {folder} can be read: 2: " in line and "; 1: " in line and "\n" not in line
    assert sorted(f.name for f in folder.iterdir()) == ["1", "2"] and "cannot" not in capfd.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_repeats_its_losses(config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    lost = max(files(run / "checkpoints" / "60" / "params"), key=lambda file: file.stat().st_size)
    lost.unlink()
    done = start("train", "--config", config, "--workdir", run)
    output = done.communicate()[0]
    assert done.returncode == 0, output
    first, second = output.splitlines()[:2]
    assert f"{run}/checkpoints/60 cannot be read" in first and "continues from step 45" in first
    assert "steps 46 to 60" in second
    assert losses(run) == losses(finished)
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["45", "60"]
    assert (run / "damaged-checkpoint-60").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(capfd, config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    for step in ("45", "60"):
        shutil.rmtree(run / "checkpoints" / step / "training")
    line = fails(capfd, "train", "--config", config, "--workdir", run)
    assert "none of the checkpoints" in line and "restore one from a backup, or start over in another --workdir" in line
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["45", "60"]
    assert losses(run) == losses(finished)


@pytest.mark.parametrize(
    "content", ['{"custom_metadata": 5}', '{"init_timestamp_nsecs": "x", "commit_timestamp_nsecs": []}']
)
def test_metadata_of_wrong_types_is_named(saved, tmp_path, content):
    folder = copy(saved, tmp_path / "checkpoints")
    (folder / "1" / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(UserError, match=r"the metadata of a checkpoint in .*/checkpoints is damaged \(Object must be"):
        Checkpoints(folder, max_to_keep=1)
