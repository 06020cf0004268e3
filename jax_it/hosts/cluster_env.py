"""Detect which process of which run this is: by JAX_… variables, Slurm, Cloud TPU or a Kubernetes Job."""

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_it.errors import Interrupted, UserError, first_line

START_TIMEOUT_VAR = "JAX_IT_START_TIMEOUT"  # seconds that a start waits for missing hosts
LOST_AFTER_VAR = (
    "JAX_IT_LOST_AFTER"  # seconds after which a silent host is lost; a host whose process ends counts as lost at once
)
_DEFAULTS = {START_TIMEOUT_VAR: 600.0, LOST_AFTER_VAR: 60.0}
RUN_ALONE = "start the same command on all hosts, or set JAX_NUM_PROCESSES=1 for a process on its own"


@dataclass(frozen=True)
class ClusterEnv:
    """Which process of which run this is, in the words of `jax.distributed.initialize`."""

    process_id: int
    num_processes: int
    coordinator_address: str  # HOST:PORT of process 0
    names: dict[int, str] = field(default_factory=dict)  # of the hosts by process, as far as they are known
    local_device_ids: list[int] | None = None  # this process's, if several share a host

    def name(self, index: int) -> str:
        """Return "HOST (process INDEX)", as far as the host is known."""
        known = self.names.get(index)
        return f"{known} (process {index})" if known else f"process {index}"


def detect() -> ClusterEnv | None:
    """Return what the environment says about the run, None if it names no other process.

    Raises UserError if it is incomplete, Interrupted if Slurm, Cloud TPU or Kubernetes does not tell the other hosts.
    """
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(os.environ)
    from jax._src import clusters

    kinds: list[Any] = [clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster]
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        kinds.append(clusters.K8sCluster)  # it asks Kubernetes; other pods run alone
    for kind in kinds:
        if not kind.is_env_present():
            continue
        try:
            count, index = kind.get_process_count(), kind.get_process_id()
            if kind is clusters.SlurmCluster:
                count = int(os.environ.get("SLURM_STEP_NUM_TASKS", count))
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = kind.get_coordinator_address(int(seconds(START_TIMEOUT_VAR)), port)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise Interrupted(f"cannot find the other hosts of this run: {first_line(error)}; {RUN_ALONE}") from error
        names, devices = host_names(index, count), None
        if kind is clusters.SlurmCluster:
            devices = _slurm_devices(count)
        return ClusterEnv(index, count, address, names, devices)
    return None


def _explicit(environment: Mapping[str, str]) -> ClusterEnv:
    address = environment["JAX_COORDINATOR_ADDRESS"]
    index = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX", ""))
    count = environment.get("JAX_NUM_PROCESSES", "")
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS: {address!r} is not HOST:PORT, the address of process 0")
    for name, value in (("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", index)):
        if not value.isdecimal():
            raise UserError(f"{name}: {value!r} is not a number; JAX_COORDINATOR_ADDRESS needs it as well")
    if int(index) >= int(count):
        raise UserError(f"JAX_PROCESS_ID: {index} must be less than JAX_NUM_PROCESSES, which is {count}")
    return ClusterEnv(int(index), int(count), address, host_names(int(index), int(count)))


def host_names(index: int, count: int) -> dict[int, str]:
    """Return the names of the run's hosts by process, as far as the environment tells them."""
    environment = os.environ
    if nodes := environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST"):
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
        each = [n for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for n in [int(size)] * int(times or 1)]
        names = expand_nodes(nodes)
        each = each if len(each) == len(names) else [count // max(len(names), 1)] * len(names)
        flat = [name for name, tasks_there in zip(names, each, strict=True) for _ in range(tasks_there)]
        return dict(enumerate(flat)) if len(flat) == count else {}
    if workers := environment.get("TPU_WORKER_HOSTNAMES"):
        mine = [name.strip().split(":")[0] for name in workers.split(",")]
        first = int(environment.get("MEGASCALE_SLICE_ID") or 0) * len(mine)  # it does not name those of other slices
        if all(re.fullmatch(r"[\w.-]+", name) for name in mine) and len(mine) > 1:  # not libtpu's warning
            return {first + i: name for i, name in enumerate(mine) if first + i < count}
    pod, number = environment.get("HOSTNAME", ""), environment.get("JOB_COMPLETION_INDEX")
    if number == str(index) and (job := re.fullmatch(rf"(.+)-{index}", pod)):  # an Indexed Job's pods
        return {i: f"{job[1]}-{i}" for i in range(count)}
    return {index: socket.gethostname()}


def expand_nodes(text: str) -> list[str]:
    """Expand Slurm's list of nodes: "gpu1,n[07-08]" -> ["gpu1", "n07", "n08"]."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        made = [""]
        for plain, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            ends = [plain]
            if inside:
                ends = []
                for span in inside.split(","):
                    low, _, high = span.partition("-")
                    ends += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
            made = [name + end for name in made for end in ends]
        names += made
    return names


def _slurm_devices(count: int) -> list[int] | None:
    """Return the task's own device if tasks share a host and see all its devices, None for all that it sees."""
    hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return [int(os.environ["SLURM_LOCALID"])] if count > hosts and len(visible) > 1 else None


def seconds(name: str) -> float:
    """Return the value of START_TIMEOUT_VAR or LOST_AFTER_VAR."""
    text = os.environ.get(name)
    try:
        return float(text) if text else _DEFAULTS[name]
    except ValueError:
        raise UserError(f"{name}: {text!r} is not a number of seconds") from None
