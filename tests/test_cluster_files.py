"""Every file of cluster/ is one that its reader takes: Ray's launcher, Kubernetes and KubeRay, bash, Grafana."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster"
LAUNCHER = ["on-prem", "aws", "gcp", "azure"]
CLOUDS = ["aws", "gcp", "azure"]
RAY_VERSION = re.search(r"FROM rayproject/ray:([\d.]+)-", (CLUSTER / "Dockerfile").read_text())[1]  # type: ignore[index]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def load_all(name: str) -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    return {document["kind"]: document for document in documents}


# ---- Ray's launcher


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_it(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_token_is_demanded_and_travels_by_ssh(name: str) -> None:
    config = load(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(re.search(r"RAY_AUTH_MODE=token\b.*\bray start", start) for start in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHER)
def test_dashboard_and_client_are_closed_to_the_network(name: str) -> None:
    _, start, after = load(name)["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in start
    assert after.startswith("pkill -f 'ray[.]util[.]client[.]server'")


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_from_nothing_on_the_spot_market_and_the_head_stays(name: str) -> None:
    types = load(name)["available_node_types"]
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["max_workers"] == load(name)["max_workers"]
    head, gpu = json.dumps(types["head"]["node_config"]).lower(), json.dumps(types["gpu"]["node_config"]).lower()
    assert "spot" in gpu
    assert "spot" not in head
    assert types["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*")), ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path: Path) -> None:
    if path.is_dir():
        return
    text = path.read_text()
    assert not re.search(r"PRIVATE KEY|AKIA[0-9A-Z]{16}|(?i:secret_?access_?key|password)\s*[:=]\s*\S", text)
    assert not re.search(r"\b[0-9a-f]{40,}\b", text)


# ---- EC2, played by moto


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        for name in ("raylight-head", "raylight-worker"):  # as cluster/README.md makes them
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name=load("aws")["provider"]["region"])


@pytest.mark.slow
def test_ray_sets_up_aws_and_starts_nodes_as_the_file_says(aws: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = load("aws")
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["ImageId"] = aws.describe_images()["Images"][0]["ImageId"]
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config)))
    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-node-type": name}, 1)
    instances = [one for each in aws.describe_instances()["Reservations"] for one in each["Instances"]]
    started = {next(tag["Value"] for tag in one["Tags"] if tag["Key"] == "ray-node-type"): one for one in instances}
    assert started["gpu"]["InstanceLifecycle"] == "spot"
    assert started["head"].get("InstanceLifecycle") != "spot"
    assert started["gpu"]["InstanceType"] == "g6.xlarge"
    assert started["gpu"]["IamInstanceProfile"]["Arn"].endswith("/raylight-worker")
    assert {one["Placement"]["AvailabilityZone"] for one in instances} == {"us-west-2a"}
    [group] = aws.describe_security_groups(GroupIds=[started["head"]["SecurityGroups"][0]["GroupId"]])["SecurityGroups"]
    open_to_all = [rule["FromPort"] for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert open_to_all == [22]


def test_azure_names_only_what_rays_template_takes() -> None:
    import ray.autoscaler._private._azure as azure

    template = json.loads((Path(azure.__path__[0]) / "azure-vm-template.json").read_text())
    for node_type in load("azure")["available_node_types"].values():
        assert set(node_type["node_config"]["azure_arm_parameters"]) <= set(template["parameters"])


# ---- Kubernetes

# The fields of KubeRay 1.6.2's own resources, after its API reference; pod templates are checked by Kubernetes' schema.
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
INTEGER, BOOLEAN, STRING, ANY = {"type": "integer"}, {"type": "boolean"}, {"type": "string"}, {"type": "object"}


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


GROUP = dict(rayStartParams=STRINGS, template=ANY, resources=STRINGS, labels=STRINGS)
RAY_CLUSTER_SPEC = fields(
    ["headGroupSpec"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=fields([], mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        [], idleTimeoutSeconds=INTEGER, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]}, resources=ANY, image=STRING, imagePullPolicy=STRING, securityContext=ANY,
        env={"type": "array"}, envFrom={"type": "array"}, volumeMounts={"type": "array"},
    ),
    headGroupSpec=fields(
        ["template"], serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, headService=ANY,
        enableIngress=BOOLEAN, **GROUP,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "template"], groupName=STRING, replicas=INTEGER, minReplicas=INTEGER, maxReplicas=INTEGER,
            numOfHosts=INTEGER, idleTimeoutSeconds=INTEGER, suspend=BOOLEAN, scaleStrategy=ANY, **GROUP,
        ),
    },
    headServiceAnnotations=STRINGS, gcsFaultToleranceOptions=ANY, upgradeStrategy=ANY, suspend=BOOLEAN,
    managedBy=STRING,
)  # fmt: skip
RAY_JOB_SPEC = fields(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=STRING, rayClusterSpec=RAY_CLUSTER_SPEC, shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER, backoffLimit=INTEGER, activeDeadlineSeconds=INTEGER,
    preRunningDeadlineSeconds=INTEGER, runtimeEnvYAML=STRING, jobId=STRING, metadata=STRINGS, clusterSelector=STRINGS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, submitterPodTemplate=ANY,
    submitterConfig=fields([], backoffLimit=INTEGER), deletionStrategy=ANY, managedBy=STRING, suspend=BOOLEAN,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=STRING,
)  # fmt: skip


def ray_cluster_specs() -> dict[str, dict[str, Any]]:
    return {
        "raycluster": load_all("raycluster")["RayCluster"]["spec"],
        "rayjob": load_all("rayjob")["RayJob"]["spec"]["rayClusterSpec"],
    }


def pod_templates() -> Iterator[dict[str, Any]]:
    for spec in ray_cluster_specs().values():
        yield spec["headGroupSpec"]["template"]
        yield from (group["template"] for group in spec["workerGroupSpecs"])


@pytest.mark.parametrize(("name", "kind", "schema"), [
    ("raycluster", "RayCluster", RAY_CLUSTER_SPEC), ("rayjob", "RayJob", RAY_JOB_SPEC),
])  # fmt: skip
def test_kuberay_knows_every_field(name: str, kind: str, schema: dict[str, Any]) -> None:
    resource = load_all(name)[kind]
    assert resource["apiVersion"] == "ray.io/v1"
    jsonschema.validate(resource["spec"], schema)


def test_kubernetes_takes_the_pods_and_the_rest() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    resources = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **pod} for pod in pod_templates()]
    assert len(resources) == 4
    resources.append(load_all("raycluster")["NetworkPolicy"])
    resources.append(load_all("rayjob")["PersistentVolumeClaim"])
    for resource in resources:
        kubernetes.validate(resource, "1.31", strict=True)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_rays_autoscaler_reads_the_kubernetes_cluster(name: str) -> None:
    metadata = {"name": "raylight", "namespace": "default"}
    config = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": ray_cluster_specs()[name]})
    assert config["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert (gpu["min_workers"], gpu["max_workers"]) == {"raycluster": (0, 8), "rayjob": (2, 2)}[name]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kubernetes_clusters_demand_the_token_and_are_not_exposed(name: str) -> None:
    spec = ray_cluster_specs()[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


# ---- all together


def test_one_version_of_ray_and_one_image_everywhere() -> None:
    assert importlib.metadata.version("ray") >= RAY_VERSION
    specs = ray_cluster_specs()
    assert {spec["rayVersion"] for spec in specs.values()} == {RAY_VERSION}
    images = {container["image"] for pod in pod_templates() for container in pod["spec"]["containers"]}
    assert images | {load(cloud)["docker"]["image"] for cloud in CLOUDS} == {"REGISTRY/raylight:0.1.0"}


def test_dockerfile_copies_what_there_is() -> None:
    copied = re.findall(r"^COPY (\S+) ", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["dist/raylight-*.whl", "examples"]  # the first is what `pip wheel` writes
    assert (CLUSTER.parent / "examples" / "digits.py").exists()


def test_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)


def test_dashboard_asks_for_metrics_that_there_are() -> None:
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as rays_own

    known_to_ray = Path(rays_own.__file__).read_text()
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {re.search(r"(?:ray|autoscaler)_\w+", expression)[0] for expression in asked}  # type: ignore[index]
    assert {name.removeprefix("ray_raylight_") for name in names if "raylight" in name} == {
        "step", "samples_per_s", "loss", "data_wait_ratio", "checkpoint_stall_s", "world_size", "restarts",
    }  # fmt: skip
    assert [name for name in names if "raylight" not in name and name not in known_to_ray] == []
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
