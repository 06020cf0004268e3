"""Meshes of any sizes and slices, and which rows of a batch a process has."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_it import sharding
from jax_it.config import Mesh
from jax_it.errors import UserError


def devices_of(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_what_is_left_goes_to_the_axis_at_minus_1():
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    "mesh, parts",
    [
        (Mesh(data=3, tensor=2), ["data=3 x tensor=2", "8 device", "data=4 x tensor=2 would"]),
        (Mesh(data=-1, tensor=3), ["config.mesh: tensor=3 does not fit", "tensor=8 would"]),
        (Mesh(data=3, fsdp=5), ["data=8 would"]),
        (Mesh(data=2, fsdp=2), ["data=4 x fsdp=2 or data=2 x fsdp=4", "data=2 x fsdp=2 x tensor=2 would"]),
        (Mesh(data=1, fsdp=12, tensor=6), ["fsdp=4 x tensor=2 would"]),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused_with_some_that_do(mesh, parts):
    with pytest.raises(UserError, match=r"config\.mesh") as error:
        sharding.make_mesh(mesh)
    for part in parts:
        assert part in str(error.value)


def test_every_proposal_fits():
    for sizes in np.ndindex(5, 4, 3, 3, 4):
        config = Mesh(*(int(size) or -1 if i == 0 else int(size) + 1 for i, size in enumerate(sizes)))
        given = {axis: getattr(config, axis) for axis in sharding.AXES}
        for proposal in sharding._fitting(given, 8):
            proposed = dict(part.split("=") for part in proposal.split(" x "))
            mesh = sharding.make_mesh(Mesh(**{"data": 1} | {axis: int(size) for axis, size in proposed.items()}))
            assert mesh.size == 8 and all(mesh.shape[axis] == int(size) for axis, size in proposed.items())


@pytest.mark.parametrize("across, slices", [("data", 2), ("data", 4), ("fsdp", 2)])
def test_only_the_axis_across_slices_leaves_a_slice(across, slices):
    mesh = sharding.make_mesh(Mesh(data=4, fsdp=2, slices=slices, across_slices=across))
    by_slice = np.vectorize(lambda id: id // (8 // slices))(devices_of(mesh))
    axis = sharding.AXES.index(across)
    for other in range(len(sharding.AXES)):
        if other != axis:
            assert (by_slice == by_slice.take([0], axis=other)).all()
    counts = [len(set(line)) for line in np.moveaxis(by_slice, axis, -1).reshape(-1, mesh.shape[across])]
    assert counts == [slices] * len(counts)
    assert sorted(devices_of(mesh).reshape(-1)) == list(range(8))


def test_devices_that_tell_their_slice_are_grouped_by_it():
    devices = [SimpleNamespace(id=i, slice_index=i % 2) for i in range(8)]
    assert [[d.id for d in part] for part in sharding._slices(0, devices)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(UserError, match=r"config\.mesh\.slices: 4, but the devices form 2"):
        sharding._slices(4, devices)


@pytest.mark.parametrize(
    "mesh, text",
    [
        (
            Mesh(data=1, fsdp=8, slices=2),
            r"config\.mesh\.data: 1 devices cannot be divided evenly among 2 slices.*across_slices",
        ),
        (Mesh(data=8, slices=3), r"config\.mesh\.slices: 8 devices cannot be divided evenly among 3"),
    ],
)
def test_slices_that_do_not_fit_are_refused(mesh, text):
    with pytest.raises(UserError, match=text):
        sharding.make_mesh(mesh)


class ManyProcesses:
    """A mesh of 8 devices of `processes` processes, as far as `local_parts` looks at it."""

    def __init__(self, mesh, processes):
        self.shape = mesh.shape
        self.devices = np.vectorize(lambda device: SimpleNamespace(process_index=device.id * processes // 8))(
            mesh.devices
        )


@pytest.mark.parametrize(
    "mesh, processes, parts",
    [
        (Mesh(data=8), 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (Mesh(data=2, fsdp=2, tensor=2), 2, [(0, 1), (2, 3)]),
        (Mesh(data=1, fsdp=2, tensor=4), 4, [(0,), (0,), (1,), (1,)]),  # a row's devices lie in two processes
        (Mesh(data=1, tensor=8), 2, [(0,), (0,)]),
        (Mesh(data=1, context=2, expert=4), 2, [(0, 1), (2, 3)]),
    ],
)
def test_a_process_has_the_rows_that_its_devices_take(monkeypatch, mesh, processes, parts):
    many = ManyProcesses(sharding.make_mesh(mesh), processes)
    for index, wanted in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert sharding.local_parts(many) == wanted


@pytest.mark.parametrize("config", [Mesh(data=8), Mesh(data=1, tensor=8), Mesh(data=2, fsdp=2, context=2)])
def test_rows_are_placed_in_their_order(config):
    mesh = sharding.make_mesh(config)
    rows = np.arange(16 * 3).reshape(16, 3)
    for parts in (None, sharding.local_parts(mesh)):
        placed = sharding.place({"x": rows, "y": rows[:, 0]}, mesh, parts)
        np.testing.assert_array_equal(placed["x"], rows)
        np.testing.assert_array_equal(placed["y"], rows[:, 0])
        assert placed["x"].sharding == sharding.batch_sharding(mesh)
