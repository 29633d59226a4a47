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
from controlplane.cluster import Object
from controlplane.world import World

pytestmark = pytest.mark.cluster

SECURE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def pod(name: str, *command: str, image: str = "tools", **more: Any) -> Object:
    """A pod of one container that Pod Security admits; `more` is its container's or its own."""
    of_pod = ("volumes", "restartPolicy", "serviceAccountName", "initContainers", "hostAliases")
    inner = {key: value for key, value in more.items() if key not in of_pod}
    outer = {key: value for key, value in more.items() if key in of_pod}
    container = {"name": "main", "image": image, "command": list(command)}
    container |= {"securityContext": SECURE, **inner}
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 2}
    spec |= {"securityContext": POD_SECURITY, "containers": [container], **outer}
    meta = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def run(world: World, namespace: str, document: Object, seconds: float = 30) -> tuple[str, Object]:
    """Creates a pod, waits for its end; what it wrote, and its object."""
    world.create(document, namespace)
    name = document["metadata"]["name"]
    ended = world.wait("pod", name, ended_state, namespace, seconds)
    return world.logs(name, namespace), ended


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
    world: World, world_namespace: str
) -> None:
    page = {"name": "page", "configMap": {"name": "page"}}
    server = pod(
        "web",
        *("python", "-m", "http.server", "8000", "--directory", "/page"),
        image=world.image("calotype-gateway"),
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
    world.apply(
        [
            config_map("page", **{"index.html": "first"}),
            {"apiVersion": "apps/v1", "kind": "Deployment", **web, "spec": spec},
            {"apiVersion": "v1", "kind": "Service", **web, "spec": service},
        ],
        "-n",
        world_namespace,
    )
    world.kubectl("rollout", "status", "deployment/web", "-n", world_namespace, "--timeout=30s")

    with world.forward("svc/web", 80, world_namespace) as url:
        assert httpx.get(f"{url}/index.html").text == "first"
        through_api = f"/api/v1/namespaces/{world_namespace}/services/web:80/proxy/index.html"
        assert world.api.get(through_api).text == "first"

        world.apply(config_map("page", **{"index.html": "second"}), "-n", world_namespace)
        both = world.items("pods", world_namespace)
        for one in both:
            with world.forward(f"pod/{one['metadata']['name']}", 8000, world_namespace) as direct:
                changed = lambda at=direct: httpx.get(f"{at}/index.html").text == "second"  # noqa: E731
                world.until(changed, "the pod serves the changed ConfigMap", 20)

    hosts = {one["status"]["podIP"] for one in both}
    assert len(hosts) == 2
    for name in ("web", f"web.{world_namespace}", f"web.{world_namespace}.svc.cluster.local"):
        document = pod("client-" + str(len(name)), "wget", "-q", "-O-", f"http://{name}/index.html")
        assert run(world, world_namespace, document)[0] == "second"


def test_a_container_is_restarted_and_its_last_words_are_in_the_status(
    world: World, world_namespace: str
) -> None:
    script = "echo starting; echo -n '{\"ok\": false}' > /dev/termination-log; exit 3"
    document = pod("loop", "bash", "-c", script, restartPolicy="Always")
    world.create(document, world_namespace)
    seen = world.wait("pod", "loop", waiting_for("CrashLoopBackOff"), world_namespace)
    last = state(seen, "lastState")["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", '{"ok": false}')
    twice = lambda found: found["status"]["containerStatuses"][0]["restartCount"] >= 2  # noqa: E731
    world.wait("pod", "loop", twice, world_namespace)
    before = world.kubectl("logs", "--previous", "loop", "-n", world_namespace)
    assert before == "starting\n"


def test_a_failing_liveness_probe_restarts_and_a_failing_readiness_probe_does_not(
    world: World, world_namespace: str
) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/well"]}, "periodSeconds": 1}
    sleep = ("bash", "-c", "trap 'exit 0' TERM; touch /tmp/well; while :; do sleep 0.1; done")
    world.create(
        pod("ready", *sleep, readinessProbe={**probe, "failureThreshold": 1}), world_namespace
    )
    alive = {**probe, "failureThreshold": 2}
    world.create(pod("live", *sleep, livenessProbe=alive, restartPolicy="Always"), world_namespace)
    world.wait("pod", "ready", "Ready", world_namespace)
    world.wait("pod", "live", "Ready", world_namespace)
    for name in ("ready", "live"):
        assert world.exec(name, "rm", "/tmp/well", namespace=world_namespace).code == 0

    found = world.wait("pod", "ready", "Ready=False", world_namespace)
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0
    restarted = lambda found: found["status"]["containerStatuses"][0]["restartCount"] == 1  # noqa: E731
    world.wait("pod", "live", restarted, world_namespace)
    assert "Unhealthy" in {event["reason"] for event in world.events("live", world_namespace)}


def test_environment_and_words_come_from_secrets_fields_and_services(
    world: World, world_namespace: str
) -> None:
    world.apply([secret("keys", token="s3cret", extra="x")], "-n", world_namespace)
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
    words, ended = run(world, world_namespace, document)
    assert words.split() == [
        "s3cret-$(TOKEN)-$(NOBODY)",
        *("s3cret", "x", "env", ended["status"]["podIP"], "2", "s3cretenv", "10.96.0.1"),
    ]


def test_a_missing_secret_is_waited_for_and_an_unknown_image_cannot_be_pulled(
    world: World, world_namespace: str
) -> None:
    reference = {"secretKeyRef": {"name": "later", "key": "word"}}
    document = pod("waits", "printenv", "WORD", env=[{"name": "WORD", "valueFrom": reference}])
    world.create(document, world_namespace)
    reason = waiting_for("CreateContainerConfigError")
    message = state(world.wait("pod", "waits", reason, world_namespace))["waiting"]["message"]
    assert message == 'secret "later" not found'
    world.apply([secret("later", word="here")], "-n", world_namespace)
    world.wait("pod", "waits", ended_state, world_namespace)
    assert world.logs("waits", world_namespace) == "here\n"

    world.create(pod("unknown", "true", image="example.test/no/such:1"), world_namespace)
    world.wait("pod", "unknown", waiting_for("ImagePullBackOff"), world_namespace)


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
    world: World, world_namespace: str
) -> None:
    where = ("-n", world_namespace)
    world.kubectl("create", "serviceaccount", "reader", *where)
    world.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", *where)
    account = f"--serviceaccount={world_namespace}:reader"
    world.kubectl("create", "rolebinding", "reader", "--role=reader", account, *where)
    image = world.image("calotype-operator")
    document = pod("caller", "python", "-c", CALL, image=image, serviceAccountName="reader")
    words, _ = run(world, world_namespace, document)
    assert json.loads(words) == {"configmaps": 200, "secrets": 403}


def test_a_container_sees_its_image_and_nothing_of_the_machine(
    world: World, world_namespace: str, tmp_path: Path
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
    lines = run(world, world_namespace, document)[0].splitlines()
    assert lines[:4] == ["4711", "0", "0", "wrote /scratch/file"]
    assert re.fullmatch(r"CapBnd:\t0+NoNewPrivs:\t1", lines[4])
    assert int(lines[5]) <= 5  # this script's processes and no others
    assert lines[6] == "inside"


def test_a_pod_reaches_no_address_outside_the_world(world: World, world_namespace: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as outside:
        port = outside.getsockname()[1]
        script = f"""
        for host in 127.0.0.1 {own_address()} 1.1.1.1; do
          timeout 2 bash -c "</dev/tcp/$host/{port}" 2>/dev/null && echo reached $host
        done; echo done
        """
        words, _ = run(world, world_namespace, pod("curious", "bash", "-c", script))
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
    world: World, world_namespace: str
) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    document = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": claim}
    world.create({**document, "metadata": {"name": "shared"}}, world_namespace)
    never = {**claim, "storageClassName": "nobody-provisions-this"}
    world.create({**document, "metadata": {"name": "never"}, "spec": never}, world_namespace)

    def user(name: str, claim: str, *command: str) -> Object:
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim}}
        mount = {"name": "data", "mountPath": "/var/lib/calotype", "subPath": "deep"}
        found = pod(name, *command, volumes=[volume], volumeMounts=[mount])
        found["spec"]["securityContext"] = {**POD_SECURITY, "fsGroup": 10001}
        return found

    world.create(user("stuck", "never", "true"), world_namespace)
    writer = user("writer", "shared", "bash", "-c", "echo kept > /var/lib/calotype/file")
    assert run(world, world_namespace, writer)[1]["status"]["phase"] == "Succeeded"
    reader = user("reader", "shared", "cat", "/var/lib/calotype/file")
    assert run(world, world_namespace, reader)[0] == "kept\n"
    folder = world.claim_folder("shared", world_namespace)
    assert (folder / "deep" / "file").read_text() == "kept\n"

    for name in ("writer", "reader"):
        world.delete("pod", name, world_namespace, grace=0)
        world.wait_gone("pod", name, world_namespace)
    world.delete("pvc", "shared", world_namespace)
    world.until(lambda: not folder.exists(), "the folder of the deleted claim is gone")
    assert world.get("pod", "stuck", world_namespace)["status"]["phase"] == "Pending"
    messages = " ".join(event["message"] for event in world.events("stuck", world_namespace))
    assert "unbound immediate PersistentVolumeClaims" in messages


HUNGRY = "held = bytearray(200_000_000); import time; time.sleep(60)"


def test_who_needs_more_memory_than_its_limit_is_killed_for_it(
    world: World, world_namespace: str
) -> None:
    limit = {"limits": {"memory": "100Mi"}}
    image = world.image("calotype-serve")
    document = pod("hungry", "python", "-c", HUNGRY, image=image, resources=limit)
    _, ended = run(world, world_namespace, document)
    terminated = state(ended)["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (137, "OOMKilled")


def test_init_containers_run_first_and_a_deleted_pod_is_asked_to_end(
    world: World, world_namespace: str
) -> None:
    mounts = [{"name": "out", "mountPath": "/out"}]
    first = {"name": "first", "image": "tools", "command": ["bash", "-c", "echo 1 > /out/order"]}
    first |= {"securityContext": SECURE, "volumeMounts": mounts}
    script = "trap 'echo asked to end; exit 0' TERM; cat /out/order; while :; do sleep 0.1; done"
    document = pod(
        "main",
        *("bash", "-c", script),
        initContainers=[first],
        volumeMounts=mounts,
        volumes=[{"name": "out", "emptyDir": {}}],
    )
    world.create(document, world_namespace)
    found = world.wait("pod", "main", running, world_namespace)
    assert found["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    process = world.pid("main", world_namespace)
    assert os.path.exists(f"/proc/{process}")
    follow = world.kubectl("get", "pod", "main", "-n", world_namespace, "-o", "wide")
    assert "process-node" in follow
    log = world.plane.folder / "logs" / f"{world_namespace}_main_main_0.log"
    world.until(lambda: log.read_text() == "1\n", "the init container's file is read")
    world.delete("pod", "main", world_namespace)
    world.wait_gone("pod", "main", world_namespace)
    assert log.read_text() == "1\nasked to end\n"
    assert not os.path.exists(f"/proc/{process}")


def test_a_job_ends_and_is_tried_again(world: World, world_namespace: str) -> None:
    out = {"volumes": [{"name": "out", "emptyDir": {}}], "restartPolicy": "OnFailure"}
    script = "test -e /out/again || { touch /out/again; exit 1; }"
    mounts = [{"name": "out", "mountPath": "/out"}]
    attempt = pod("job", "bash", "-c", script, volumeMounts=mounts, **out)
    spec = {"backoffLimit": 2, "template": {"spec": attempt["spec"]}}
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    world.create(document, world_namespace)
    world.wait("job", "job", "Complete", world_namespace)
    [found] = world.items("pods", world_namespace, "batch.kubernetes.io/job-name=job")
    assert found["status"]["containerStatuses"][0]["restartCount"] == 1
    assert found["status"]["phase"] == "Succeeded"
