"""Starts one container: `python launch.py SPEC.json`, run by the process node as root.

This process joins the namespaces of the pod and stays outside the container; its child is process 1
of a new process namespace, on a root of its own, and becomes the container's command. The exit code
is the command's, or 128 and the signal. Only the standard library, imported before the user is
changed: afterwards root's files may not be readable.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import warnings  # noqa: F401  os.execvpe imports it, and it cannot be found any more by then

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, LAST_CAPABILITY = 1, 24, 38, 40
# What a container sees of the machine; everything else at the top is an empty folder.
SYSTEM = {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "opt", "srv", "var"}
OWN = {"proc", "sys", "dev"}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = (("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr"))
CANNOT_RUN, NOT_FOUND = 128, 127
OPEN_FILES = 1 << 20  # what container runtimes give
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [word.encode() or None for word in (source, target, kind, data)]
    check(libc.mount(words[0], words[1], words[2], flags, words[3]), f"mount {source} {target}")


def bind(source: str, target: str, readonly: bool, folder: bool) -> None:
    if folder:
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(source, target, flags=MS_BIND | MS_REC)
    if readonly:
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def build_root(spec: dict) -> list[str]:
    """Mounts the container's root; returns the folders in memory that belong to it."""
    root = spec["root"]
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    layers = f"lowerdir=/,upperdir={spec['upper']},workdir={spec['work']}"
    mount("overlay", root, "overlay", data=layers)
    covered = []
    for name in sorted(os.listdir("/")):
        path = f"/{name}"
        if name not in SYSTEM | OWN and os.path.isdir(path) and not os.path.islink(path):
            mode = "1777" if name == "tmp" else "755"
            mount("tmpfs", root + path, "tmpfs", data=f"mode={mode}")
            covered.append(path)
    mount("proc", f"{root}/proc", "proc")
    bind("/sys", f"{root}/sys", readonly=True, folder=True)
    mount("tmpfs", f"{root}/dev", "tmpfs", data="mode=755")
    for device in DEVICES:
        bind(f"/dev/{device}", f"{root}/dev/{device}", readonly=False, folder=False)
    for source, name in LINKS:
        os.symlink(source, f"{root}/dev/{name}")
    os.makedirs(f"{root}/dev/shm")
    mount("tmpfs", f"{root}/dev/shm", "tmpfs", data="size=64m,mode=1777")
    return covered


def enter_root(spec: dict, covered: list[str]) -> None:
    """Opens the sources of the mounts, changes the root, and mounts them there: a link such as
    /var/run must lead to the container's /run and not to the machine's."""
    opened = [
        (os.open(source, os.O_PATH), os.path.isdir(source), target, readonly)
        for source, target, readonly in spec["mounts"]
    ]
    os.chroot(spec["root"])
    os.chdir("/")
    for handle, folder, target, readonly in opened:
        bind(f"/proc/self/fd/{handle}", target, readonly, folder)
        os.close(handle)
    os.makedirs(spec["home"], exist_ok=True)
    if spec["home"] != "/":
        os.chown(spec["home"], spec["uid"], spec["gid"])
    if spec["readonlyRoot"]:
        for path in ["/", *(path for path in covered if path not in spec["writable"])]:
            mount("", path, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def become(spec: dict) -> None:
    """Takes the container's user and gives up what its security context says."""
    if spec["dropCapabilities"]:
        for capability in range(LAST_CAPABILITY + 1):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    except ValueError:  # root of a container of CI may not raise its own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.setgroups(spec["groups"])
    os.setgid(spec["gid"])
    os.setuid(spec["uid"])
    if spec["noNewPrivileges"]:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it


def run(spec: dict) -> None:
    """Process 1: never returns."""
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        enter_root(spec, build_root(spec))
        os.makedirs(spec["folder"], exist_ok=True)
        os.chdir(spec["folder"])
        become(spec)
        for ignored in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(ignored, signal.SIG_DFL)
        os.environ["PATH"] = spec["env"]["PATH"]  # execvpe looks the command up in ours
        os.execvpe(spec["command"][0], spec["command"], spec["env"])
    except BaseException as error:
        sys.stderr.write(f"process node: cannot start {spec['command'][:1]}: {error}\n")
        sys.stderr.flush()
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN)


def main() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    for name, flag in (("net", CLONE_NEWNET), ("uts", CLONE_NEWUTS), ("ipc", CLONE_NEWIPC)):
        handle = os.open(f"/proc/{spec['sandbox']}/ns/{name}", os.O_RDONLY)
        check(libc.setns(handle, flag), f"setns {name}")
        os.close(handle)
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID), "unshare")
    child = os.fork()
    if not child:
        run(spec)
    with open(spec["state"] + ".new", "w") as file:
        file.write(str(child))
    os.rename(spec["state"] + ".new", spec["state"])
    status = os.waitpid(child, 0)[1]
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
