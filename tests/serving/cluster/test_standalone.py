"""The gateway's process: what it reads, what it waits for, and what it never imports."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from calotype.serving.api.state.settings import read_settings
from calotype.serving.cluster.gateway_process import GatewayOptions, build_gateway
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.core.errors import InvalidRequest, StorageFailed
from calotype.serving.database.database import open_database

pytestmark = pytest.mark.slow

TOKEN = "internal-token"


def test_settings_come_from_the_environment() -> None:
    given = {
        "CALOTYPE_GATEWAY_PUBLIC_URL": "https://pictures.example",
        "CALOTYPE_GATEWAY_REQUEST_TIMEOUT": "60",
        "CALOTYPE_GATEWAY_OUTBOUND_NETWORKS": '["10.0.0.0/8"]',
        "CALOTYPE_API_KEY": "ct_live_not_a_setting",
    }
    settings = read_settings(given)
    assert settings.public_url == "https://pictures.example"
    assert (settings.request_timeout, settings.outbound_networks) == (60, ("10.0.0.0/8",))
    with pytest.raises(InvalidRequest, match="public_urls is not a field"):
        read_settings({"CALOTYPE_GATEWAY_PUBLIC_URLS": "x"})
    with pytest.raises(InvalidRequest, match="request_timeout"):
        read_settings({"CALOTYPE_GATEWAY_REQUEST_TIMEOUT": "soon"})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "CALOTYPE_INTERNAL_TOKEN must be set"),
        ({"CALOTYPE_INTERNAL_TOKEN": "short"}, "at least 8"),
        ({"CALOTYPE_INTERNAL_TOKEN": TOKEN, "CALOTYPE_BLOB_URL": "ftp://x/y"}, "CALOTYPE_BLOB_URL"),
    ],
)
def test_an_environment_that_lacks_something_is_named(variables: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        ClusterEnvironment.read(variables)


def test_the_secret_of_signed_addresses_is_the_given_one(tmp_path: pathlib.Path) -> None:
    environment = ClusterEnvironment.read(
        {"CALOTYPE_DATA_DIR": str(tmp_path), "CALOTYPE_INTERNAL_TOKEN": TOKEN}
    )
    options = GatewayOptions(
        tmp_path / "gateway.json", "127.0.0.1", 0, environment, signing_secret="one for all"
    )
    assert "one for all" not in repr(options) and TOKEN not in repr(options)
    database = open_database(environment.database_url, print)
    app = build_gateway(options, database)
    assert app.state.gateway.url_secret == b"one for all"
    database.close()


def test_a_database_that_starts_late_is_waited_for(tmp_path: pathlib.Path) -> None:
    folder, said = tmp_path / "later", list[str]()
    folder.write_text("in the way")

    def sleep(seconds: float) -> None:
        folder.unlink(missing_ok=True)

    open_database(f"sqlite:///{folder}/calotype.db", said.append, sleep=sleep).close()
    assert said and "Waiting for the job database" in said[0]
    (tmp_path / "never").write_text("in the way")
    with pytest.raises(StorageFailed):
        open_database(f"sqlite:///{tmp_path}/never/calotype.db", said.append, patience=0)


@pytest.mark.parametrize(
    "module", ["cluster.gateway_process", "cluster.model_app_process", "deployments.service"]
)
def test_processes_that_outlive_ray_import_neither_torch_nor_ray(module: str) -> None:
    probe = (
        f"import calotype.serving.commands.cluster, calotype.serving.{module}, sys;"
        "print([m for m in ('torch', 'ray', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
