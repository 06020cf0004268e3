"""What tpu/ has for a server in production: every metric it names is exported, every path and option there is."""

import json
import re
from pathlib import Path

import pytest
import yaml

from jax_it import cli
from jax_it.serving.engines import EngineOptions
from jax_it.serving.metrics import Metrics
from jax_it.serving.worker import Workers

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu"
MONITORING = TPU / "monitoring"
BOARD = MONITORING / "grafana" / "board.json"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((TPU / name).read_text()))


def of_kind(kind: str) -> dict:
    (found,) = (each for each in documents("serve.yaml") if each["kind"] == kind)
    return found


@pytest.fixture(scope="module")
def exported() -> set[str]:
    families = list(Metrics(Workers({}, EngineOptions(8, 8, 1))).registry.collect())
    return {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("file", ["serve.yaml", "monitoring/grafana/board.json"])
def test_every_metric_that_is_named_is_exported(file, exported):
    named = set(re.findall(r"vllm:\w+", (TPU / file).read_text()))
    assert named and named <= exported


def test_every_panel_of_the_board_asks_the_data_source_that_is_provisioned():
    board = json.loads(BOARD.read_text())
    (source,) = documents("monitoring/grafana/datasources.yaml")[0]["datasources"]
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_compose_mounts_files_that_exist_and_prometheus_asks_the_server():
    (compose,) = documents("monitoring/compose.yaml")
    services = compose["services"]
    mounts = [mount for each in services.values() for mount in each["volumes"]]
    here = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert here and all((MONITORING / name).is_file() for name in here)
    (prometheus,) = documents("monitoring/prometheus.yaml")
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["jax-it:8000"]
    assert (
        services["grafana"]["volumes"][2].split(":")[1].rsplit("/", 1)[0]
        == (documents("monitoring/grafana/dashboards.yaml")[0]["providers"][0]["options"]["path"])
    )
    cli.make_parser().parse_args(services["jax-it"]["command"][1:])


def test_the_deployment_starts_a_server_whose_port_and_paths_the_others_name():
    pod = of_kind("Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    # A bucket's name is checked only where the libraries for it are installed.
    words = [word.replace("gs://", "runs/") for word in container["command"]]
    options = cli.make_parser().parse_args(words[1:])
    (port,) = container["ports"]
    assert options.port == port["containerPort"] and options.host == "0.0.0.0"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    stopping = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + options.drain_timeout
    assert pod["spec"]["terminationGracePeriodSeconds"] > stopping
    (endpoint,) = of_kind("PodMonitoring")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    labels = pod["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitoring"):
        assert of_kind(kind)["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    (secret,) = pod["spec"]["volumes"]
    assert options.api_key_file == f"{container['volumeMounts'][0]['mountPath']}/keys"
    assert secret["secret"]["secretName"] == endpoint["authorization"]["credentials"]["secret"]["name"]
    scaled = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert scaled["name"] == of_kind("Deployment")["metadata"]["name"]
