"""tpu/gke.sh: the JobSet it fills in, and what it asks of kubectl (a stub)."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.tpu.stubs import Cloud

RUN = ("--name=run1", "--type=v5e", "--topology=4x4", "--image=eu.pkg.dev/p/r/jax-it:tpu",
       "--config=configs/flan_t5.py", "--workdir=gs://bucket/run1", "--poll=0")  # fmt: skip


def rendered(cloud: Cloud, *words: str) -> dict[str, Any]:
    done = cloud.run("tpu/gke.sh", "render", *RUN, *words)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\$\{[A-Z_]{2,}\}|# (only|end)", done.stdout)
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return found


def test_the_jobset_has_the_fields_that_jobset_v1alpha2_and_jobs_document(cloud: Cloud) -> None:
    words = ("--slices=2", "--spot", "--secret=s", "--service-account=a", "--env=A=b")
    jobset = rendered(cloud, *words)
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert set(job) == {"parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"}
    assert set(pod(jobset)) == {
        "restartPolicy", "terminationGracePeriodSeconds", "hostNetwork", "dnsPolicy", "serviceAccountName",
        "nodeSelector", "tolerations", "containers",
    }  # fmt: skip
    (container,) = pod(jobset)["containers"]
    assert set(container) == {"name", "image", "command", "env", "envFrom", "resources"}


def test_exit_codes_1_and_2_end_the_jobset_and_all_others_restart_it(cloud: Cloud) -> None:
    jobset = rendered(cloud, "--max-restarts=7")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "jax-it", "operator": "In", "values": [1, 2]}
    assert rule["onExitCodes"]["containerName"] == pod(jobset)["containers"][0]["name"]
    # Kubernetes allows a podFailurePolicy with this restartPolicy only; one lost host fails its Job at once.
    assert (pod(jobset)["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


@pytest.mark.parametrize(
    ("words", "accelerator", "hosts", "chips"),
    [
        (("--type=v5e", "--topology=16x16"), "tpu-v5-lite-podslice", 64, 4),
        (("--type=v5e", "--topology=2x4", "--chips-per-host=8"), "tpu-v5-lite-podslice", 1, 8),
        (("--type=v5e", "--topology=1x1"), "tpu-v5-lite-podslice", 1, 1),
        (("--type=v5p", "--topology=2x2x4"), "tpu-v5p-slice", 4, 4),
        (("--type=v6e", "--topology=8x8"), "tpu-v6e-slice", 16, 4),
        (("--type=v4", "--topology=2x2x2"), "tpu-v4-podslice", 2, 4),
    ],
)
def test_a_slice_has_a_pod_for_each_host_with_all_its_chips(
    cloud: Cloud, words: tuple[str, ...], accelerator: str, hosts: int, chips: int
) -> None:
    jobset = rendered(cloud, *words)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert pod(jobset)["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    selector = pod(jobset)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == words[1].partition("=")[2]
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset["metadata"]["annotations"][exclusive] == "cloud.google.com/gke-nodepool"


def test_blocks_that_do_not_apply_are_left_out(cloud: Cloud) -> None:
    plain = rendered(cloud)
    assert not {"hostNetwork", "dnsPolicy", "serviceAccountName"} & set(pod(plain))
    assert "envFrom" not in pod(plain)["containers"][0]
    assert "cloud.google.com/gke-spot" not in str(plain)
    spot = rendered(cloud, "--spot")
    assert pod(spot)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_words_reach_the_container_as_they_were_written(cloud: Cloud) -> None:
    rest = ['--config.x=it\'s a "b" \\ {{c}} # d: e', "--config.y=$HOME $(id)", ""]
    container = pod(rendered(cloud, '--env=A=yes: "no"', "--env=B=${A}", "--", *rest))["containers"][0]
    # Kubernetes reads $$( as $( and does not run it
    expected = [word.replace("$(", "$$(") for word in rest]
    assert container["command"] == [
        "jax-it", "train", "--config", "configs/flan_t5.py", "--workdir", "gs://bucket/run1", *expected
    ]  # fmt: skip
    assert container["env"] == [
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/jax_cache"},
        {"name": "A", "value": 'yes: "no"'},
        {"name": "B", "value": "${A}"},
    ]


def watches(cloud: Cloud, *states: str, codes: str = "") -> None:
    cloud.settings = {"states": states, "codes": codes}


def test_run_creates_the_jobset_and_watches_it_to_its_end(cloud: Cloud) -> None:
    watches(cloud, " ", " 1", "Completed 1")
    done = cloud.run("tpu/gke.sh", "run", *RUN, "--context=c", "--namespace=n")
    assert done.returncode == 0, done.stderr
    assert "completed after 1 restarts" in done.stderr
    assert yaml.safe_load((cloud.folder / "applied").read_text()) == rendered(cloud)
    state = ["kubectl", "--context=c", "--namespace=n", "get", "jobset", "run1"]
    assert [words[:6] for words in cloud.calls()] == [
        state, ["kubectl", "--context=c", "--namespace=n", "create", "-f", "-"], state, state, state
    ]  # fmt: skip


def test_run_takes_up_a_jobset_that_is_there(cloud: Cloud) -> None:
    watches(cloud, "Completed 0")
    (cloud.folder / "applied").touch()
    assert cloud.run("tpu/gke.sh", "run", *RUN).returncode == 0
    assert not any("create" in words for words in cloud.calls())


@pytest.mark.parametrize(("codes", "code"), [("2 137 75", 2), ("137 1 137", 1), ("75 75", 75), ("", 75)])
def test_a_failed_jobset_gives_the_exit_code_of_its_pods(cloud: Cloud, codes: str, code: int) -> None:
    watches(cloud, " ", "Failed 3", codes=codes)
    (cloud.folder / "applied").touch()
    done = cloud.run("tpu/gke.sh", "watch", "--name=run1", "--poll=0")
    assert done.returncode == code, done.stderr


def test_logs_status_and_delete_name_the_jobset(cloud: Cloud) -> None:
    watches(cloud)
    (cloud.folder / "applied").touch()
    for verb in ("logs", "status", "delete"):
        assert cloud.run("tpu/gke.sh", verb, "--name=run1").returncode == 0
    host = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    assert cloud.calls() == [
        ["kubectl", "logs", f"--selector=jobset.sigs.k8s.io/jobset-name=run1,{host}", "--container=jax-it",
         "--tail=100"],
        ["kubectl", "get", "jobset", "run1"],
        ["kubectl", "get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=run1", "--output=wide"],
        ["kubectl", "delete", "jobset", "run1", "--ignore-not-found"],
    ]  # fmt: skip


def test_a_dry_run_prints_the_jobset_and_every_command_and_calls_nothing(cloud: Cloud) -> None:
    watches(cloud)
    done = cloud.run("tpu/gke.sh", "run", *RUN, "--dry-run")
    assert done.returncode == 0, done.stderr
    jobset, create, get = done.stdout.partition("kubectl create -f -\n")
    assert create and yaml.safe_load(jobset)["kind"] == "JobSet"
    assert get.startswith("kubectl get jobset run1 ")
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "a verb is missing"),
        (("run",), "--name is missing"),
        (("run", "--name=run1"), "--type is missing"),
        (("run", *RUN, "--type=v5litepod"), "v4, v5e, v5p or v6e is needed"),
        (("run", *RUN, "--topology=2x2x4"), "a v5e slice has two sides"),
        (("run", *RUN, "--type=v5p"), "a v5p slice has three sides"),
        (("run", *RUN, "--topology=3x3"), "9 chips are not a multiple of 4 a host"),
        (("run", *RUN, "--topology=2x2", "--slices=2"), "GKE joins only slices of several hosts"),
        (("run", *RUN, "--workdir=runs/x"), "a pod's disk dies with it"),
        (("run", *RUN, "--env=A"), "NAME=VALUE is needed"),
        (("run", *RUN, "seed=1"), "options for jax-it go after --"),
        (("watch", "--name=run1"), "no JobSet is named run1"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(cloud: Cloud, words: tuple[str, ...], says: str) -> None:
    watches(cloud)
    done = cloud.run("tpu/gke.sh", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    assert not any("create" in json.dumps(words) for words in cloud.calls())
