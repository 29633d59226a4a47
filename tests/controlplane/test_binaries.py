"""Where the control plane's programs are looked for, and what is said when they are missing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from controlplane import binaries

SCRIPT = "#!/bin/sh\necho '{}'\n"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache, nothing on PATH, and no assets."""
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.delenv("CALOTYPE_TEST_CLUSTER", raising=False)
    return tmp_path


def program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(SCRIPT.format(says))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_a_machine_without_them_is_told_what_to_type(empty: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`make test-cluster` builds it") as missing:
        binaries.find_all()
    assert "etcd, kubectl" in str(missing.value)


def test_given_assets_go_before_the_cache_and_the_cache_before_path(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = binaries.pinned("helm").rpartition(".")[0] + ".99"
    on_path = program(empty / "path", "helm", f"v{same}")
    assert binaries.find("helm") == on_path
    cached = program(binaries.cache(), "helm", "")
    assert binaries.find("helm") == cached
    given = program(empty / "assets", "helm", "")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(empty / "assets"))
    assert binaries.find("helm") == given


@pytest.mark.parametrize("says", ["Client Version: v1.2.3", "no version at all"])
def test_a_program_on_path_of_another_minor_version_is_not_taken(empty: Path, says: str) -> None:
    program(empty / "path", "kubectl", says)
    assert binaries.find("kubectl") is None


def test_every_program_is_pinned() -> None:
    for name in binaries.PACKAGES:
        assert binaries.pinned(name).count(".") == 2


def test_another_go_sum_is_another_cache(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = binaries.cache()
    (tmp_path / "go.sum").write_text("something else\n")
    monkeypatch.setattr(binaries, "HERE", tmp_path)
    assert binaries.cache() != before
    assert binaries.cache().parent == before.parent


def test_a_build_without_go_says_how_to_get_it(empty: Path) -> None:
    done = build({"CALOTYPE_GO": str(empty / "no-go")})
    assert done.returncode == 1
    assert "needs Go 1.26 or newer, and there is none" in done.stderr
    assert "apt-get install golang-go" in done.stderr


def test_a_failed_build_names_its_log_and_leaves_nothing_that_looks_built(empty: Path) -> None:
    go = empty / "go"
    go.write_text(
        '#!/bin/sh\n[ "$1" = version ] && echo go version go1.99.0 linux && exit\n'
        "echo this cannot be compiled; exit 1\n"
    )
    go.chmod(0o755)
    done = build({"CALOTYPE_GO": str(go)})
    assert done.returncode == 1
    assert "go build of etcd failed with 1" in done.stderr
    assert "this cannot be compiled" in done.stderr
    assert binaries.find("etcd") is None


def build(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, binaries.__file__]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
