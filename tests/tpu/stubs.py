"""Programs that stand in for gcloud, kubectl, sbatch and the like: they log how they were called and play a cloud.

The stub of gcloud keeps a queued resource whose workers are folders of this machine: what is sent to a worker lands in
its folder, and a command over ssh runs there, in a session that ends with the connection. So the scripts' own worker
side runs for real; only uv and jax-it are stubs on the workers too.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GCLOUD = r"""
import json, os, pathlib, shutil, signal, subprocess, sys
stub = pathlib.Path(os.environ["STUB"])
words = sys.argv[1:]
with open(stub / "calls", "a") as calls:
    calls.write(json.dumps(["gcloud", *words]) + "\n")
settings = json.loads((stub / "settings").read_text())
state = stub / "state"
group, verb, target = words[2], words[3], words[4]
option = lambda name: next((word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")), None)

def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)

def nodes():
    return (stub / "nodes").read_text().split()

if group == "queued-resources":
    if verb == "create":
        if state.exists():
            fail("ERROR: ALREADY_EXISTS")
        if settings["refuse"]:
            fail("ERROR: quota exceeded")
        count = option("node-count")
        names = [option("node-id")] if not count else [f"{option('node-prefix')}-{n}" for n in range(int(count))]
        (stub / "nodes").write_text(" ".join(names))
        state.write_text(settings["first_state"])
    elif not state.exists():
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource was not found.")
    elif verb == "describe":
        if settings["outages"]:
            settings["outages"] -= 1
            (stub / "settings").write_text(json.dumps(settings))
            fail("ERROR: 503 the service is currently unavailable")
        now = state.read_text()
        print(now)
        after = {"ACCEPTED": "PROVISIONING", "PROVISIONING": "ACTIVE", "SUSPENDING": "SUSPENDED"}
        state.write_text(after.get(now, now))
    elif verb == "delete":
        assert "--force" in words and "--quiet" in words  # without them it asks, or leaves the nodes
        state.unlink()
        for name in nodes():
            shutil.rmtree(stub / "machines" / name, ignore_errors=True)
else:
    assert group == "tpu-vm"
    node = next(word for word in words[4:] if not word.startswith("--") and "/" not in word).rstrip(":")
    if not state.exists() or state.read_text() != "ACTIVE" or node not in nodes():
        fail(f"ERROR: {node} cannot be reached", 255)
    if verb == "describe":
        print("READY")
        sys.exit()
    number = option("worker")
    chosen = range(settings["workers"]) if number == "all" else [int(number)]
    failed = 0
    for worker in chosen:
        home = stub / "machines" / node / str(worker)
        home.mkdir(parents=True, exist_ok=True)
        if verb == "scp":
            for word in words[4:]:
                if "/" in word and not word.startswith("--"):
                    shutil.copy(word, home)
            continue
        environment = {"HOME": str(home), "PATH": f"{stub}/worker-bin:/usr/bin:/bin", "STUB": str(stub),
                       "WORKER": f"{node}/{worker}"}
        ssh = subprocess.Popen(["bash", "-c", option("command")], cwd=home, env=environment, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        text = ssh.communicate()[0]
        try:
            os.killpg(ssh.pid, signal.SIGHUP)  # the connection ends
        except ProcessLookupError:
            pass
        if not state.exists():
            fail(f"ERROR: {node} was deleted meanwhile", 255)  # so its files may have gone before it was asked
        failed = failed or ssh.returncode
        folder = option("output-directory")
        if folder:
            pathlib.Path(folder, f"{worker}.log").write_text(text)
        else:
            sys.stdout.write(text)
    sys.exit(failed)
"""

UV = r"""
import os, pathlib, sys
words = sys.argv[1:]
if words[0] == "venv":
    folder = pathlib.Path(words[-1], "bin")
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
else:
    home, stub = pathlib.Path(os.environ["HOME"]), pathlib.Path(os.environ["STUB"])
    assert pathlib.Path(words[words.index("-c") + 1]).is_file(), words
    (home / "installed").write_text(words[-1])
    program = home / "jax-it/venv/bin/jax-it"
    program.unlink(missing_ok=True)
    program.symlink_to(stub / "worker-bin/jax-it")
"""

# What a run does: settings["runs"] has an entry for each start, with what each worker does in it. A number is an exit
# code, which all workers that have one reach together; "hang" runs until SIGTERM; "preempt" takes the TPU away.
JAX_IT = r"""
import json, os, pathlib, signal, sys, time
if sys.argv[1:] == ["--help"]:
    sys.exit()
stub = pathlib.Path(os.environ["STUB"])
settings = json.loads((stub / "settings").read_text())
worker = os.environ.get("WORKER") or os.environ["SLURM_PROCID"]
name = worker.replace("/", "-")
attempt = len(list(stub.glob(f"argv-{name}-*")))
(stub / f"argv-{name}-{attempt}").write_text(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))
print(f"step {attempt} of {worker}", flush=True)
everyone = settings["everyone"]
does = settings["runs"][attempt][everyone.index(worker)]
if does == "hang":
    def save(*_):
        time.sleep(0.2)
        (stub / f"saved-{name}").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (stub / f"hangs-{name}").touch()
    time.sleep(60)
    sys.exit(1)  # nobody has stopped it: its TPU is gone
if does == "preempt":
    (stub / "state").write_text("SUSPENDING")
    sys.exit(137)
(stub / f"ready-{attempt}-{name}").touch()
together = sum(what not in ("hang", "preempt") for what in settings["runs"][attempt])
until = time.monotonic() + 60
while len(list(stub.glob(f"ready-{attempt}-*"))) < together and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(does)
"""

KUBECTL = r"""
import json, os, pathlib, sys
stub = pathlib.Path(os.environ["STUB"])
words = sys.argv[1:]
with open(stub / "calls", "a") as calls:
    calls.write(json.dumps(["kubectl", *words]) + "\n")
settings = json.loads((stub / "settings").read_text())
words = [word for word in words if not word.startswith(("--context", "--namespace"))]
if words[0] == "create":
    (stub / "applied").write_text(sys.stdin.read())
elif words[:2] == ["get", "jobset"]:
    if not (stub / "applied").exists():
        sys.exit('Error from server (NotFound): jobsets.jobset.x-k8s.io "x" not found')
    print(settings["states"].pop(0) if len(words) > 3 else "", end="")
    (stub / "settings").write_text(json.dumps(settings))
elif words[:2] == ["get", "pods"]:
    print(settings["codes"], end="")
"""

# Slurm copies the script, runs it from elsewhere, and runs it again when it is asked to.
SBATCH = r"""
import json, os, pathlib, shutil, subprocess, sys
stub = pathlib.Path(os.environ["STUB"])
words = sys.argv[1:]
with open(stub / "calls", "a") as calls:
    calls.write(json.dumps(["sbatch", *words]) + "\n")
at = next(n for n, word in enumerate(words) if not word.startswith("-"))
spool = stub / "spool"
spool.mkdir()
shutil.copy(words[at], spool / "slurm_script")
environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": os.getcwd(),
                            "SLURM_NTASKS": str(json.loads((stub / "settings").read_text())["tasks"])}
for count in range(10):
    if count:
        environment["SLURM_RESTART_COUNT"] = str(count)
    (stub / "requeued").unlink(missing_ok=True)
    code = subprocess.run(["bash", spool / "slurm_script", *words[at + 1:]], env=environment).returncode
    if not (stub / "requeued").exists():
        sys.exit(code)
"""

SRUN = r"""
import json, os, pathlib, signal, subprocess, sys, time
stub = pathlib.Path(os.environ["STUB"])
words = sys.argv[1:]
with open(stub / "calls", "a") as calls:
    calls.write(json.dumps(["srun", *words]) + "\n")
command = words[next(n for n, word in enumerate(words) if not word.startswith("-")):]
settings = json.loads((stub / "settings").read_text())
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(n)}, start_new_session=True)
         for n in range(settings["tasks"])]
does = settings["runs"][int(os.environ.get("SLURM_RESTART_COUNT", 0))]
hanging = [n for n, what in enumerate(does) if what == "hang"]
while not all((stub / f"hangs-{n}").exists() for n in hanging):
    time.sleep(0.01)
time_is_up = hanging and settings["time_is_up"]
if time_is_up:
    for task in tasks:
        os.killpg(task.pid, signal.SIGTERM)
codes = [None] * len(tasks)
while None in codes:
    time.sleep(0.01)
    codes = [task.poll() for task in tasks]
    if any(codes) and "--kill-on-bad-exit=1" in words and not time_is_up:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
for task in tasks:  # Slurm leaves nothing of a task whose first process has ended
    try:
        os.killpg(task.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = r"""
import json, os, pathlib, sys
stub = pathlib.Path(os.environ["STUB"])
with open(stub / "calls", "a") as calls:
    calls.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\n")
(stub / "requeued").touch()
"""

ROOT = Path(__file__).parents[2]


@dataclass
class Cloud:
    """A copy of the scripts in a checkout of their own, and the stubs that they call."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """What a user types in the checkout, with the stubs on PATH."""
        (self.folder / "settings.new").write_text(json.dumps(self.settings))
        (self.folder / "settings.new").replace(self.folder / "settings")  # a run of an earlier call may be reading it
        path = f"{self.folder}/bin:/usr/bin:/bin"
        return subprocess.run(
            [script, *words],
            cwd=self.checkout,
            env={"PATH": path, "HOME": str(self.folder), "STUB": str(self.folder)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """The words of each call of a stub, in order."""
        if not (self.folder / "calls").exists():
            return []
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def steps(self) -> list[str]:
        """The calls that change something, each by its verb and, of ssh, what it runs on the workers."""
        found = []
        for _, _, _, group, verb, *words in self.calls():
            if verb == "ssh":
                command = next(word for word in words if word.startswith("--command="))
                verb = f"ssh {command.split('bash jax-it-worker.sh ')[1].split()[0].strip(';')}"
            if verb not in ("describe", "ssh status"):
                found.append(verb if group == "tpu-vm" else verb.upper())
        return found

    def started(self, worker: str, attempt: int = 0) -> tuple[list[str], dict[str, str], str]:
        """What jax-it got there: its words, its environment, its folder."""
        words, environment, folder = json.loads((self.folder / f"argv-{worker}-{attempt}").read_text())
        return words, environment, folder


def make_cloud(folder: Path) -> Cloud:
    programs = {"gcloud": GCLOUD, "kubectl": KUBECTL, "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}
    for place, sources in (("bin", programs | {"jax-it": JAX_IT}), ("worker-bin", {"uv": UV, "jax-it": JAX_IT})):
        (folder / place).mkdir()
        for name, source in sources.items():
            program = folder / place / name
            program.write_text(f"#!{sys.executable} -SE\n{source}")
            program.chmod(0o755)
    cloud = Cloud(folder)
    for name in ("tpu", "configs", "constraints"):
        shutil.copytree(ROOT / name, cloud.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (cloud.checkout / "jax_it-0.1.0-py3-none-any.whl").write_text("a wheel")
    return cloud
