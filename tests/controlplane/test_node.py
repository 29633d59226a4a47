"""The process node: what runs in a pod's container, and what it finds there."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from controlplane.client.cluster import PATIENCE
from controlplane.client.objects import Object
from controlplane.processes.pod_cluster import CHECKOUT, PodCluster

pytestmark = pytest.mark.cluster

SECURE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def pod(name: str, *command: str, image: str = "tools", **more: Any) -> Object:
    """A pod of one container that Pod Security admits; `more` is its container's or its own."""
    of_pod = ("volumes", "restartPolicy", "serviceAccountName", "initContainers", "hostAliases")
    inner = {key: value for key, value in more.items() if key not in of_pod}
    outer = {key: value for key, value in more.items() if key in of_pod}
    container: Object = {"name": "main", "image": image, "command": list(command)}
    container |= {"securityContext": SECURE, **inner}
    spec: Object = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 2}
    spec |= {"securityContext": POD_SECURITY, "containers": [container], **outer}
    meta = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def run(
    pod_cluster: PodCluster, namespace: str, document: Object, seconds: float = PATIENCE
) -> tuple[str, Object]:
    """Creates a pod, waits for its end; what it wrote, and its object."""
    pod_cluster.create(document, namespace)
    name = document["metadata"]["name"]
    ended = pod_cluster.wait("pod", name, ended_state, namespace, seconds)
    return pod_cluster.logs(name, namespace), ended


def ended_state(found: Object) -> bool:
    return found.get("status", {}).get("phase") in ("Succeeded", "Failed")


def running(found: Object) -> bool:
    return found.get("status", {}).get("phase") == "Running"


def state(found: Object, part: str = "state") -> Object:
    [status] = found["status"]["containerStatuses"]
    return dict(status[part])


def waiting_for(reason: str) -> Any:
    def check(found: Object) -> bool:
        statuses = found.get("status", {}).get("containerStatuses", [])
        return any(one["state"].get("waiting", {}).get("reason") == reason for one in statuses)

    return check


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def secret(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def test_a_deployment_serves_through_its_service_and_follows_its_config_map(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    page = {"name": "page", "configMap": {"name": "page"}}
    server = pod(
        "web",
        *("python", "-m", "http.server", "8000", "--directory", "/page"),
        image=pod_cluster.image("calotype-gateway"),
        ports=[{"name": "http", "containerPort": 8000}],
        readinessProbe={"httpGet": {"path": "/index.html", "port": "http"}, "periodSeconds": 1},
        volumeMounts=[{"name": "page", "mountPath": "/page"}],
        volumes=[page],
        restartPolicy="Always",
    )
    labels = {"app": "web"}
    template = {"metadata": {"labels": labels}, "spec": server["spec"]}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    service = {"selector": labels, "ports": [{"port": 80, "targetPort": "http"}]}
    web = {"metadata": {"name": "web"}}
    pod_cluster.apply(
        [
            config_map("page", **{"index.html": "first"}),
            {"apiVersion": "apps/v1", "kind": "Deployment", **web, "spec": spec},
            {"apiVersion": "v1", "kind": "Service", **web, "spec": service},
        ],
        "-n",
        pod_namespace,
    )
    pod_cluster.kubectl(
        "rollout", "status", "deployment/web", "-n", pod_namespace, "--timeout=250s"
    )

    with pod_cluster.forward("svc/web", 80, pod_namespace) as url:
        assert httpx.get(f"{url}/index.html").text == "first"
        through_api = f"/api/v1/namespaces/{pod_namespace}/services/web:80/proxy/index.html"
        assert pod_cluster.api.get(through_api).text == "first"

        pod_cluster.apply(config_map("page", **{"index.html": "second"}), "-n", pod_namespace)
        both = pod_cluster.items("pods", pod_namespace)
        for one in both:
            with pod_cluster.forward(
                f"pod/{one['metadata']['name']}", 8000, pod_namespace
            ) as direct:
                changed = lambda at=direct: httpx.get(f"{at}/index.html").text == "second"  # noqa: E731
                pod_cluster.until(changed, "the pod serves the changed ConfigMap")

    hosts = {one["status"]["podIP"] for one in both}
    assert len(hosts) == 2
    for name in ("web", f"web.{pod_namespace}", f"web.{pod_namespace}.svc.cluster.local"):
        document = pod("client-" + str(len(name)), "wget", "-q", "-O-", f"http://{name}/index.html")
        assert run(pod_cluster, pod_namespace, document)[0] == "second"


def test_a_container_is_restarted_and_its_last_words_are_in_the_status(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    script = "echo starting; echo -n '{\"ok\": false}' > /dev/termination-log; exit 3"
    document = pod("loop", "bash", "-c", script, restartPolicy="Always")
    pod_cluster.create(document, pod_namespace)
    seen = pod_cluster.wait("pod", "loop", waiting_for("CrashLoopBackOff"), pod_namespace)
    last = state(seen, "lastState")["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", '{"ok": false}')
    twice = lambda found: found["status"]["containerStatuses"][0]["restartCount"] >= 2  # noqa: E731
    pod_cluster.wait("pod", "loop", twice, pod_namespace)
    before = pod_cluster.kubectl("logs", "--previous", "loop", "-n", pod_namespace)
    assert before == "starting\n"


def test_a_failing_liveness_probe_restarts_and_a_failing_readiness_probe_does_not(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/well"]}, "periodSeconds": 1}
    sleep = ("bash", "-c", "trap 'exit 0' TERM; touch /tmp/well; while :; do sleep 0.1; done")
    pod_cluster.create(
        pod("ready", *sleep, readinessProbe={**probe, "failureThreshold": 1}), pod_namespace
    )
    alive = {**probe, "failureThreshold": 2}
    pod_cluster.create(
        pod("live", *sleep, livenessProbe=alive, restartPolicy="Always"), pod_namespace
    )
    pod_cluster.wait("pod", "ready", "Ready", pod_namespace)
    pod_cluster.wait("pod", "live", "Ready", pod_namespace)
    for name in ("ready", "live"):
        assert pod_cluster.exec(name, "rm", "/tmp/well", namespace=pod_namespace).code == 0

    found = pod_cluster.wait("pod", "ready", "Ready=False", pod_namespace)
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0
    restarted = lambda found: found["status"]["containerStatuses"][0]["restartCount"] == 1  # noqa: E731
    pod_cluster.wait("pod", "live", restarted, pod_namespace)
    assert "Unhealthy" in {event["reason"] for event in pod_cluster.events("live", pod_namespace)}


def test_environment_and_words_come_from_secrets_fields_and_services(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    pod_cluster.apply([secret("keys", token="s3cret", extra="x")], "-n", pod_namespace)
    document = pod(
        "env",
        *("bash", "-c", "echo $0 $TOKEN $KEY_extra $NAME $IP $CPU $BOTH $KUBERNETES_SERVICE_HOST"),
        "$(TOKEN)-$$(TOKEN)-$(NOBODY)",
        env=[
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "BOTH", "value": "$(TOKEN)$(NAME)"},
        ],
        envFrom=[{"prefix": "KEY_", "secretRef": {"name": "keys"}}],
        resources={"limits": {"cpu": "1500m"}},
    )
    words, ended = run(pod_cluster, pod_namespace, document)
    assert words.split() == [
        "s3cret-$(TOKEN)-$(NOBODY)",
        *("s3cret", "x", "env", ended["status"]["podIP"], "2", "s3cretenv", "10.96.0.1"),
    ]


def test_a_missing_secret_is_waited_for_and_an_unknown_image_cannot_be_pulled(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    reference = {"secretKeyRef": {"name": "later", "key": "word"}}
    document = pod("waits", "printenv", "WORD", env=[{"name": "WORD", "valueFrom": reference}])
    pod_cluster.create(document, pod_namespace)
    reason = waiting_for("CreateContainerConfigError")
    message = state(pod_cluster.wait("pod", "waits", reason, pod_namespace))["waiting"]["message"]
    assert message == 'secret "later" not found'
    pod_cluster.apply([secret("later", word="here")], "-n", pod_namespace)
    pod_cluster.wait("pod", "waits", ended_state, pod_namespace)
    assert pod_cluster.logs("waits", pod_namespace) == "here\n"

    pod_cluster.create(pod("unknown", "true", image="example.test/no/such:1"), pod_namespace)
    pod_cluster.wait("pod", "unknown", waiting_for("ImagePullBackOff"), pod_namespace)


CALL = """
import json, os, ssl, urllib.error, urllib.request
home = "/var/run/secrets/kubernetes.io/serviceaccount"
tls = ssl.create_default_context(cafile=f"{home}/ca.crt")
token, namespace = (open(f"{home}/{name}").read() for name in ("token", "namespace"))
codes = {}
for kind in ("configmaps", "secrets"):
    host, port = (os.environ[f"KUBERNETES_SERVICE_{part}"] for part in ("HOST", "PORT"))
    url = f"https://{host}:{port}/api/v1/namespaces/{namespace}/{kind}"
    call = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    try:
        codes[kind] = urllib.request.urlopen(call, context=tls).status
    except urllib.error.HTTPError as error:
        codes[kind] = error.code
print(json.dumps(codes))
"""


def test_a_pod_may_do_what_the_role_of_its_service_account_says(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    where = ("-n", pod_namespace)
    pod_cluster.kubectl("create", "serviceaccount", "reader", *where)
    pod_cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", *where)
    account = f"--serviceaccount={pod_namespace}:reader"
    pod_cluster.kubectl("create", "rolebinding", "reader", "--role=reader", account, *where)
    image = pod_cluster.image("calotype-operator")
    document = pod("caller", "python", "-c", CALL, image=image, serviceAccountName="reader")
    words, _ = run(pod_cluster, pod_namespace, document)
    assert json.loads(words) == {"configmaps": 200, "secrets": 403}


def test_a_container_sees_its_image_and_nothing_of_the_machine(
    pod_cluster: PodCluster, pod_namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "private").write_text("not for pods")
    script = f"""
    id -u; id -g; find /root /home {tmp_path} -mindepth 1 2>/dev/null | wc -l
    for path in /file /tmp/file /usr/file; do touch $path 2>/dev/null && echo wrote $path; done
    touch /scratch/file && echo wrote /scratch/file
    grep -E 'NoNewPrivs|CapBnd' /proc/self/status | tr -d '\\n'; echo
    ls -d /proc/[0-9]* | wc -l; cat /etc/hostname
    """
    document = pod(
        "inside",
        *("bash", "-c", script),
        securityContext={**SECURE, "readOnlyRootFilesystem": True, "runAsUser": 4711},
        volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}],
        volumes=[{"name": "scratch", "emptyDir": {}}],
    )
    lines = run(pod_cluster, pod_namespace, document)[0].splitlines()
    assert lines[:4] == ["4711", "0", "0", "wrote /scratch/file"]
    assert re.fullmatch(r"CapBnd:\t0+NoNewPrivs:\t1", lines[4])
    assert int(lines[5]) <= 5  # this script's processes and no others
    assert lines[6] == "inside"


def test_a_volume_hides_no_image_that_lies_below_it(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    """A checkout below /tmp is seen by the chart's pods, which have a volume at /tmp."""
    document = pod(
        "below",
        *("bash", "-c", f"touch {CHECKOUT.parent}/written && head -n1 {CHECKOUT}/pyproject.toml"),
        image=pod_cluster.image("calotype-gateway"),
        volumes=[{"name": "around", "emptyDir": {}}],
        volumeMounts=[{"name": "around", "mountPath": str(CHECKOUT.parent)}],
    )
    text, ended = run(pod_cluster, pod_namespace, document)
    assert (text, ended["status"]["phase"]) == ("[build-system]\n", "Succeeded")


def test_a_pod_reaches_no_address_outside_the_cluster(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as outside:
        port = outside.getsockname()[1]
        script = f"""
        for host in 127.0.0.1 {own_address()} 1.1.1.1; do
          timeout 2 bash -c "</dev/tcp/$host/{port}" 2>/dev/null && echo reached $host
        done; echo done
        """
        words, _ = run(pod_cluster, pod_namespace, pod("curious", "bash", "-c", script))
        assert words == "done\n"


def own_address() -> str:
    """An address of this machine beyond loopback, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket sends nothing for this
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def test_a_claim_is_one_folder_for_all_its_pods_and_goes_with_its_claim(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    document = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": claim}
    pod_cluster.create({**document, "metadata": {"name": "shared"}}, pod_namespace)
    never = {**claim, "storageClassName": "nobody-provisions-this"}
    pod_cluster.create({**document, "metadata": {"name": "never"}, "spec": never}, pod_namespace)

    def user(name: str, claim: str, *command: str) -> Object:
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim}}
        mount = {"name": "data", "mountPath": "/var/lib/calotype", "subPath": "deep"}
        found = pod(name, *command, volumes=[volume], volumeMounts=[mount])
        found["spec"]["securityContext"] = {**POD_SECURITY, "fsGroup": 10001}
        return found

    pod_cluster.create(user("stuck", "never", "true"), pod_namespace)
    writer = user("writer", "shared", "bash", "-c", "echo kept > /var/lib/calotype/file")
    assert run(pod_cluster, pod_namespace, writer)[1]["status"]["phase"] == "Succeeded"
    reader = user("reader", "shared", "cat", "/var/lib/calotype/file")
    assert run(pod_cluster, pod_namespace, reader)[0] == "kept\n"
    folder = pod_cluster.claim_folder("shared", pod_namespace)
    assert (folder / "deep" / "file").read_text() == "kept\n"

    for name in ("writer", "reader"):
        pod_cluster.delete("pod", name, pod_namespace, grace=0)
        pod_cluster.wait_gone("pod", name, pod_namespace)
    pod_cluster.delete("pvc", "shared", pod_namespace)
    pod_cluster.until(lambda: not folder.exists(), "the folder of the deleted claim is gone")
    assert pod_cluster.get("pod", "stuck", pod_namespace)["status"]["phase"] == "Pending"
    messages = " ".join(event["message"] for event in pod_cluster.events("stuck", pod_namespace))
    assert "unbound immediate PersistentVolumeClaims" in messages


HUNGRY = "held = bytearray(200_000_000); import time; time.sleep(60)"


def test_who_needs_more_memory_than_its_limit_is_killed_for_it(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    limit = {"limits": {"memory": "100Mi"}}
    image = pod_cluster.image("calotype-serve")
    document = pod("hungry", "python", "-c", HUNGRY, image=image, resources=limit)
    _, ended = run(pod_cluster, pod_namespace, document)
    terminated = state(ended)["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (137, "OOMKilled")


def test_init_containers_run_first_and_a_deleted_pod_is_asked_to_end(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    mounts = [{"name": "out", "mountPath": "/out"}]
    first: Object = {
        "name": "first",
        "image": "tools",
        "command": ["bash", "-c", "echo 1 > /out/order"],
    }
    first |= {"securityContext": SECURE, "volumeMounts": mounts}
    script = "trap 'echo asked to end; exit 0' TERM; cat /out/order; while :; do sleep 0.1; done"
    document = pod(
        "main",
        *("bash", "-c", script),
        initContainers=[first],
        volumeMounts=mounts,
        volumes=[{"name": "out", "emptyDir": {}}],
    )
    pod_cluster.create(document, pod_namespace)
    found = pod_cluster.wait("pod", "main", running, pod_namespace)
    assert found["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    process = pod_cluster.pid("main", pod_namespace)
    assert os.path.exists(f"/proc/{process}")
    follow = pod_cluster.kubectl("get", "pod", "main", "-n", pod_namespace, "-o", "wide")
    assert "process-node" in follow
    log = pod_cluster.processes.folder / "logs" / f"{pod_namespace}_main_main_0.log"
    pod_cluster.until(lambda: log.read_text() == "1\n", "the init container's file is read")
    pod_cluster.delete("pod", "main", pod_namespace)
    pod_cluster.wait_gone("pod", "main", pod_namespace)
    assert log.read_text() == "1\nasked to end\n"
    assert not os.path.exists(f"/proc/{process}")


def test_a_job_ends_and_is_tried_again(pod_cluster: PodCluster, pod_namespace: str) -> None:
    out: Object = {"volumes": [{"name": "out", "emptyDir": {}}], "restartPolicy": "OnFailure"}
    script = "test -e /out/again || { touch /out/again; exit 1; }"
    mounts = [{"name": "out", "mountPath": "/out"}]
    attempt = pod("job", "bash", "-c", script, volumeMounts=mounts, **out)
    spec = {"backoffLimit": 2, "template": {"spec": attempt["spec"]}}
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    pod_cluster.create(document, pod_namespace)
    pod_cluster.wait("job", "job", "Complete", pod_namespace)
    [found] = pod_cluster.items("pods", pod_namespace, "batch.kubernetes.io/job-name=job")
    assert found["status"]["containerStatuses"][0]["restartCount"] == 1
    assert found["status"]["phase"] == "Succeeded"
