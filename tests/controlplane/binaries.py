"""The programs of a Kubernetes control plane: where they are, and how missing ones are built.

`python binaries.py` builds what is missing into a cache outside the checkout, one folder for each
go.sum: a changed pin gives a new folder, a second checkout builds nothing. $CALOTYPE_GO is the go
command where it is not on PATH. Standard library only.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Name of the program -> its package in go.mod. The one that takes longest comes last.
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
    "helm": "helm.sh/helm/v4/cmd/helm",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
}
VERSION_ARGUMENTS = {"kubectl": ["version", "--client"], "helm": ["version"]}
GO = "/usr/local/go/bin/go"
MISSING = "no control plane on this machine: `make test-cluster` builds it (lacking: {names})"
NO_GO = """\
cannot build {names}: this needs Go {wanted} or newer, and there is {found}.
Get it with one of
  apt-get install golang-go                 (where the distribution has Go {wanted})
  the archive from https://go.dev/dl/       (unpack into /usr/local, so that {go} exists)
or give the folder that holds the programs: export KUBEBUILDER_ASSETS=/folder"""


def cache() -> Path:
    """The folder of this checkout's go.sum; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("CALOTYPE_CACHE") or Path(home) / "calotype")
    digest = hashlib.sha256((HERE / "go.sum").read_bytes()).hexdigest()[:16]
    return root / "controlplane" / digest


def find(name: str) -> Path | None:
    """$KUBEBUILDER_ASSETS, then the cache, then PATH where it has the pinned minor version."""
    if given := os.environ.get("KUBEBUILDER_ASSETS"):
        if os.access(Path(given, name), os.X_OK):
            return Path(given, name).resolve()
    if os.access(cache() / name, os.X_OK):
        return cache() / name
    if (found := shutil.which(name)) and minor_of(found, name) == pinned(name).rpartition(".")[0]:
        return Path(found).resolve()
    return None


def find_all() -> dict[str, Path]:
    """Every program by its name; FileNotFoundError, in one sentence, where some are missing."""
    found = {name: path for name in PACKAGES if (path := find(name))}
    if lacking := [name for name in PACKAGES if name not in found]:
        raise FileNotFoundError(MISSING.format(names=", ".join(lacking)))
    return found


def pinned(name: str) -> str:
    """The version of go.mod without its v, as in 1.37.1."""
    package, text = PACKAGES[name], (HERE / "go.mod").read_text()
    for module, version in re.findall(r"^\s+(\S+) v(\S+)", text, re.MULTILINE):
        if package == module or package.startswith(module + "/"):
            return version
    raise LookupError(f"go.mod requires no module that holds {package}")


def minor_of(path: str, name: str) -> str | None:
    """Major and minor version that a program states of itself, as in 1.37."""
    arguments = VERSION_ARGUMENTS.get(name, ["--version"])
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v?(\d+\.\d+)\.\d+", done.stdout)
    return match[1] if match else None


def go_tool(names: list[str]) -> str:
    """The go command; SystemExit says how to get it."""
    wanted = re.search(r"^go (\d+)\.(\d+)", (HERE / "go.mod").read_text(), re.MULTILINE)
    assert wanted
    go = os.environ.get("CALOTYPE_GO") or shutil.which("go") or GO
    found = re.match(r"go version go(\d+)\.(\d+)", _output([go, "version"]))
    if found and tuple(map(int, found.groups())) >= tuple(map(int, wanted.groups())):
        return go
    raise SystemExit(
        NO_GO.format(
            names=", ".join(names),
            wanted=".".join(wanted.groups()),
            found=".".join(found.groups()) if found else "none",
            go=GO,
        )
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def build(name: str, go: str) -> None:
    """Builds one program and moves it into the cache whole; its log stays beside it."""
    folder, started = cache(), time.monotonic()
    stage, log = folder / f".build-{name}", folder / f"{name}.log"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    major, minor, _ = pinned("kube-apiserver").split(".")
    version = "k8s.io/component-base/version.git"
    flags = f"-s -w -X {version}Version=v{pinned('kube-apiserver')}"
    flags += f" -X {version}Major={major} -X {version}Minor={minor}"
    command = [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o"]
    print(f"building {name} {pinned(name)}, log {log}", flush=True)
    with open(log, "w") as out:
        done = subprocess.run(
            [*command, str(stage / name), PACKAGES[name]],
            cwd=HERE,
            env={**os.environ, "CGO_ENABLED": "0"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"go build of {name} failed with {done.returncode}, see {log}:\n{tail}")
    os.replace(stage / name, folder / name)
    stage.rmdir()
    print(f"built {name} in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    if os.environ.get("CALOTYPE_TEST_CLUSTER", "") not in ("", "0"):
        return  # a cluster that is not ours needs only kubectl and helm on PATH
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build waits, and then finds everything there
        lacking = [name for name in PACKAGES if not find(name)]
        if lacking:
            print(f"{len(lacking)} programs to build; from nothing it takes about 25 minutes")
            go = go_tool(lacking)
            for name in lacking:
                build(name, go)
    for name, path in find_all().items():
        print(f"{name:<24}{path}")


if __name__ == "__main__":
    main()
