"""A Kubernetes control plane as child processes: etcd, API server, controllers and scheduler.

Ports are random, RBAC and Pod Security are on, and every call of a user who is not part of the
control plane itself is in the audit log.
"""

import json
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from controlplane.child_process import ChildProcess
from controlplane.client.objects import Object
from controlplane.processes.certificates import CertificateAuthority, write_private
from controlplane.processes.network import SERVICE_RANGE, HostNetwork, Network, free_ports

# The first address of the Service range is the Service `kubernetes`, which pods dial.
API_SERVICE = "10.96.0.1"
SYSTEM_GROUPS = ["system:masters", "system:nodes", "system:serviceaccounts:kube-system"]
SYSTEM_USERS = [f"system:{name}" for name in ("kube-controller-manager", "kube-scheduler")]
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "users": [*SYSTEM_USERS, "system:apiserver"]},
        {"level": "None", "userGroups": SYSTEM_GROUPS},
        {"level": "Metadata"},
    ],
}
# Stopped first come those that call the others.
ORDER = ("kwok", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
READY_SECONDS = 240.0


class ControlPlane:
    """Started by `start`, ended by `stop`; `folder` keeps the logs after that, and no state."""

    def __init__(
        self, binaries: Mapping[str, Path], folder: Path, network: Network | None = None
    ) -> None:
        self.binaries, self.folder = dict(binaries), folder
        self.network: Network = network or HostNetwork()
        self.children: dict[str, ChildProcess] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = CertificateAuthority(folder / "certificates")
        self._etcd_port, self._peer_port, self.port, *self._controllers = self.network.call(
            lambda: free_ports(5)
        )
        self.url = f"https://127.0.0.1:{self.port}"
        self.audit_file = folder / "audit.jsonl"
        self.admin: Path
        self._commands: dict[str, list[str]] = {}
        self._environments: dict[str, Mapping[str, str] | None] = {}
        self._admin_tls: ssl.SSLContext

    def start(self) -> None:
        """Starts everything and returns when everything is healthy; RuntimeError with a log."""
        self.start_api()
        self.start_controllers()

    def start_api(self) -> None:
        """Starts the API server and its store only."""
        self._prepare()
        for name in ("etcd", "kube-apiserver"):  # the server repeats until etcd answers
            self.spawn(name, self._commands[name])
        self.await_api()

    def start_controllers(self) -> None:
        """Starts the rest. The garbage collector knows the kinds of this moment at once, and others
        only half a minute after they were made."""
        controllers = ("kube-controller-manager", "kube-scheduler")
        for name in controllers:
            self.spawn(name, self._commands[name])
        for name, port in zip(controllers, self._controllers, strict=True):
            self.await_health(name, f"https://127.0.0.1:{port}/healthz")

    def stop(self) -> None:
        """Ends everything in order and removes the state; the logs stay."""
        slow = [name for name in ORDER if name in self.children and not self.end(name)]
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)
        if slow:
            raise RuntimeError(f"ended only by SIGKILL: {', '.join(slow)}; logs in {self.folder}")

    def spawn(
        self, name: str, arguments: list[str], env: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """Starts one of the programs in this control plane's network."""
        command = [*self.network.prefix, str(self.binaries[name]), *arguments]
        self._commands[name], self._environments[name] = arguments, env
        self.children[name] = ChildProcess(name, command, self.folder / f"{name}.log", env)
        return self.children[name]

    def end(self, name: str, grace: float = 60.0) -> bool:
        """Ends one component; says whether SIGTERM was enough."""
        return self.children.pop(name).end(grace)

    def restart(self, name: str, sign: int | None = None) -> None:
        """Ends one component (by a signal such as SIGKILL, if given) and starts it again."""
        if sign is not None:
            self.children[name].signal(sign)
            self.children[name].process.wait(60)
        self.end(name)
        self.spawn(name, self._commands[name], self._environments[name])
        if name in ("kube-apiserver", "etcd"):
            self.await_api()

    def kubeconfig(
        self, file: str, user: str, groups: tuple[str, ...] = (), inside: bool = False
    ) -> Path:
        """A kubeconfig for a new client certificate: for the test process, or for processes that
        run inside this control plane's network."""
        port = self.port if inside else self.network.forward("127.0.0.1", self.port)
        server = f"https://127.0.0.1:{port}"
        return self.authority.kubeconfig(self.folder / f"{file}.kubeconfig", server, user, groups)

    def audit(self, user: str = "") -> Iterator[Object]:
        """Every call of users outside the control plane, or of one whose name begins like this:
        user, verb, objectRef, responseStatus."""
        with self.audit_file.open() as lines:
            for line in lines:
                # Most lines are not asked for: parsing them would take seconds.
                if f'"username":"{user}' in line and line.endswith("}\n"):
                    yield json.loads(line)

    def await_api(self) -> None:
        """Returns when the API server is ready."""
        self.await_health("kube-apiserver", f"{self.url}/readyz", self._admin_tls)

    def await_health(self, name: str, url: str, tls: ssl.SSLContext | None = None) -> None:
        """Returns when `url` answers 200; RuntimeError when the process ends or time is over."""
        # The controllers sign their own certificate in memory; they listen on loopback only.
        context = tls or ssl.create_default_context()
        if tls is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        deadline, answer = time.monotonic() + READY_SECONDS, "nothing"
        while time.monotonic() < deadline:
            self.children[name].check()
            answer = self.network.call(lambda: _ask(url, context))
            if answer == "200":
                return
            time.sleep(0.05)
        tail = self.children[name].tail()
        raise RuntimeError(f"{name}: {url} answered {answer} for {READY_SECONDS:.0f} s:\n{tail}")

    def _prepare(self) -> None:
        sign, folder = self.authority, self.folder
        self.admin = self.kubeconfig("admin", "admin", ("system:masters",))
        self._admin_tls = ssl.create_default_context(cadata=sign.pem.decode())
        certificates = sign.folder / "admin.crt", sign.folder / "admin.key"
        self._admin_tls.load_cert_chain(*certificates)
        policy = write_private(folder / "audit-policy.json", json.dumps(AUDIT_POLICY).encode())
        self.audit_file.touch()
        private, public = sign.signing_key()
        self._commands["etcd"] = self._etcd()
        self._commands["kube-apiserver"] = [
            *self._api_server(),
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit_file}",
            f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={private}",
        ]
        manager = "kube-controller-manager"
        self._commands[manager] = [
            *self._controller(manager, self._controllers[0]),
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={private}",
            f"--root-ca-file={sign.file}",
        ]
        scheduler = "kube-scheduler"
        self._commands[scheduler] = self._controller(scheduler, self._controllers[1])

    def _etcd(self) -> list[str]:
        certificate, key = self.authority.server("etcd", ["127.0.0.1"])
        client = f"https://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        return [
            f"--data-dir={self.folder / 'etcd'}",
            "--log-level=warn",
            "--unsafe-no-fsync",  # the state lives as long as the tests
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--client-cert-auth",
            f"--trusted-ca-file={self.authority.file}",
            f"--cert-file={certificate}",
            f"--key-file={key}",
        ]

    def _api_server(self) -> list[str]:
        names = ["127.0.0.1", API_SERVICE, "localhost", "kubernetes.default.svc"]
        certificate, key = self.authority.server("apiserver", names)
        client_certificate, client_key = self.authority.client("etcd-client", "apiserver")
        return [
            f"--etcd-servers=https://127.0.0.1:{self._etcd_port}",
            f"--etcd-cafile={self.authority.file}",
            f"--etcd-certfile={client_certificate}",
            f"--etcd-keyfile={client_key}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # a loopback address is no valid endpoint
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.authority.file}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--anonymous-auth=false",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=true",  # it is Pod Security that refuses
            "--profiling=false",
            "--shutdown-delay-duration=0s",
        ]

    def _controller(self, name: str, port: int) -> list[str]:
        kubeconfig = self.kubeconfig(name, f"system:{name}", inside=True)
        return [
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--leader-elect=false",
            "--profiling=false",
        ]


def _ask(url: str, context: ssl.SSLContext) -> str:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=5) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return str(error)
