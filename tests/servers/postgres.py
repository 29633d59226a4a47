"""A private PostgreSQL server for tests: in a temporary folder, on a unix socket, nothing else.

The server comes from the system's packages (Debian's ``postgresql``). It refuses to run as root, so
root starts it as an unprivileged user. (pytest-postgresql 7 cannot: as root its initdb is refused;
nor does it end a server as a crash does.)
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import TypedDict

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from calotype.serving.database.schema.training_tables import metadata

PACKAGES = ("postgresql", "pgbouncer")
START_SECONDS = 600.0
_POOL_PORT = 6432
_UNPRIVILEGED = ("postgres", "nobody")
_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    # The data is thrown away; a test that kills the server kills a process, not the machine.
    "fsync": "off",
    "full_page_writes": "off",
}


class _ProcessOptions(TypedDict, total=False):
    cwd: str
    user: int
    group: int
    extra_groups: list[int]


def find_binaries() -> pathlib.Path | None:
    """The folder of ``initdb`` and ``postgres``; the newest of several, None without any."""
    debian = sorted(
        pathlib.Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: int(folder.parent.name) if folder.parent.name.isdigit() else 0,
    )
    on_path = shutil.which("initdb")
    known = [*debian, *([pathlib.Path(on_path).resolve().parent] if on_path else [])]
    whole = [f for f in known if (f / "initdb").exists() and (f / "postgres").exists()]
    return whole[-1] if whole else None


def install_in_ci() -> None:
    """Installs the package where a CI run may do so; does nothing elsewhere."""
    apt = shutil.which("apt-get")
    if os.environ.get("CI") != "true" or os.geteuid() != 0 or apt is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "--no-install-recommends", *PACKAGES]):
        subprocess.run(
            [apt, "-y", *command], env=environment, capture_output=True, timeout=300, check=False
        )


def empty_tables(url: str) -> None:
    """Ends all other sessions of a database and removes every row of its job tables."""
    engine = create_engine(url, poolclass=NullPool)
    names = ", ".join(table.name for table in metadata.sorted_tables)
    with engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))


class PostgresServer:
    """One server; `running` starts and ends it."""

    def __init__(self, binaries: pathlib.Path, folder: pathlib.Path, user: str | None) -> None:
        self._binaries, self._folder, self._user = binaries, folder, user
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    @classmethod
    @contextlib.contextmanager
    def running(cls, binaries: pathlib.Path) -> Iterator[PostgresServer]:
        """A fresh server, ended and removed afterwards."""
        # Not below pytest's own folder: that one is closed to the user who runs the server.
        folder = pathlib.Path(tempfile.mkdtemp(prefix="calotype-pg-"))
        user = _unprivileged_user() if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(folder, user)
        server = cls(binaries, folder, user)
        try:
            server._run("initdb", "-D", str(folder / "data"), "-U", "calotype", "-A", "trust", "-N")
            server.start()
            yield server
        finally:
            server.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        """The address of a database for SQLAlchemy."""
        return f"postgresql+psycopg://calotype@/{database}?host={self._folder}"

    def start(self) -> None:
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._binaries / "postgres"),
                    *("-D", str(self._folder / "data"), "-k", str(self._folder)),
                    *settings,
                ],
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        _wait_until_it_answers(self.url(), self._process, self._folder / "log")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends all sessions and shuts down; SIGQUIT leaves at once, as a crash would."""
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process = None

    def crash(self) -> None:
        """Ends as a crash does, and starts again."""
        self.stop(signal.SIGQUIT)
        self.start()

    def create_database(self) -> str:
        """Makes a database without tables; its name."""
        self._databases += 1
        name = f"calotype_{self._databases}"
        engine = create_engine(self.url(), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return name

    @contextlib.contextmanager
    def behind_pgbouncer(self, program: str, database: str) -> Iterator[str]:
        """The address of a database through PgBouncer, which hands out a session a transaction."""
        config = self._folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={self._folder} user=calotype\n[pgbouncer]\n"
            f"unix_socket_dir = {self._folder}\nlisten_port = {_POOL_PORT}\nlisten_addr =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n"
        )
        config.chmod(0o644)
        with (self._folder / "pgbouncer.log").open("ab") as log:
            process = subprocess.Popen(
                [program, str(config)], stdout=log, stderr=log, **self._as_user()
            )
        url = f"{self.url(database)}&port={_POOL_PORT}"
        try:
            _wait_until_it_answers(url, process, self._folder / "pgbouncer.log")
            yield url
        finally:
            process.terminate()
            process.wait(30)

    def _run(self, program: str, *arguments: str) -> None:
        run = subprocess.run(
            [str(self._binaries / program), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            **self._as_user(),
        )
        if run.returncode:
            raise RuntimeError(f"{program} failed:\n{run.stdout}{run.stderr}")

    def _as_user(self) -> _ProcessOptions:
        options = _ProcessOptions(cwd=str(self._folder))
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            options |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        return options


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    engine = create_engine(url, poolclass=NullPool)
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with engine.connect():
                return
        except OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                told = log.read_text(errors="replace")
                raise RuntimeError(f"PostgreSQL did not start:\n{told}") from None
            time.sleep(0.05)


def _unprivileged_user() -> str:
    for name in _UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise RuntimeError("PostgreSQL needs a user without privileges, such as nobody.")
