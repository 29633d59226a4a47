"""`calotype gateway` and `calotype model-app`: the processes of a cluster's pods."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import click

from calotype.serving.commands.service_options import ray_start_option

Command = Callable[..., Any]

GATEWAY_CONFIG = pathlib.Path("/etc/calotype/gateway/gateway.json")
MODEL_CONFIG = pathlib.Path("/etc/calotype/model/model.json")

_host = click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
_port = click.option(
    "--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port."
)


def _config(default: pathlib.Path, what: str) -> Callable[[Command], Command]:
    return click.option(
        "--config",
        type=click.Path(path_type=pathlib.Path, dir_okay=False),
        default=default,
        show_default=True,
        help=what,
    )


@click.command()
@_config(GATEWAY_CONFIG, "Models and adapters; read again when it changes.")
@click.option(
    "--config-map",
    metavar="NAME",
    help="ConfigMap that the file comes from: asked for directly, its volume is minutes behind.",
)
@click.option(
    "--teams-config-map", metavar="NAME", help="The same for teams.json, which lies beside it."
)
@click.option(
    "--internal-port",
    type=click.IntRange(1, 65535),
    help="Port for model apps, which reach the jobs of their model here. Default: none.",
)
@click.option(
    "--operations-port",
    type=click.IntRange(1, 65535),
    help="Port of /healthz, /readyz, /metrics and /docs, which need no key. Default: the API's.",
)
@click.option(
    "--tls-certificate",
    type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Certificate in PEM form, with which the gateway speaks HTTPS. Default: plain HTTP.",
)
@click.option(
    "--tls-key",
    type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Key of the certificate.",
)
@_host
@_port
def gateway(
    config: pathlib.Path,
    config_map: str | None,
    teams_config_map: str | None,
    internal_port: int | None,
    operations_port: int | None,
    tls_certificate: pathlib.Path | None,
    tls_key: pathlib.Path | None,
    host: str,
    port: int,
) -> None:
    """Serve the API of a cluster, without any model inside.

    Model apps may come and go behind it.

    Needs CALOTYPE_INTERNAL_TOKEN; CALOTYPE_DATABASE_URL and CALOTYPE_BLOB_URL say where jobs and
    pictures are kept, CALOTYPE_API_KEY is recorded as a valid key, CALOTYPE_GATEWAY_PUBLIC_URL
    stands in signed addresses. CALOTYPE_TLS_CERTIFICATE and CALOTYPE_TLS_KEY are those of the
    internal port, CALOTYPE_TLS_CA those that model apps' certificates come from.
    """
    from calotype.serving.api.state.settings import read_settings
    from calotype.serving.cluster.gateway_process import GatewayOptions, run_gateway
    from calotype.serving.config.environment import ClusterEnvironment
    from calotype.serving.core.tls import tls_files

    run_gateway(
        GatewayOptions(
            config,
            host,
            port,
            ClusterEnvironment.read(),
            read_settings(),
            os.environ.get("CALOTYPE_API_KEY") or None,
            os.environ.get("CALOTYPE_SIGNING_SECRET") or None,
            config_map,
            teams_config_map,
            tls_files(tls_certificate, tls_key),
            internal_port,
            operations_port,
            say=lambda sentence: click.echo(sentence),
        )
    )


@click.command("model-app")
@_config(MODEL_CONFIG, "The application; read again when it changes.")
@_host
@_port
@ray_start_option
def model_app(config: pathlib.Path, host: str, port: int, ray_start_seconds: float) -> None:
    """Run one model in this pod, for the gateways of a cluster.

    Needs CALOTYPE_INTERNAL_TOKEN, the model's token or that of the gateways. CALOTYPE_DATABASE_URL
    and CALOTYPE_BLOB_URL are the address of the gateways' internal port, or as theirs. With
    CALOTYPE_TLS_CERTIFICATE and CALOTYPE_TLS_KEY it speaks HTTPS; CALOTYPE_TLS_CA is the authority
    of the gateways' certificate.
    """
    from calotype.serving.cluster.model_app_process import ModelAppOptions, run_model_app

    def say(sentence: str) -> None:
        click.echo(sentence)

    run_model_app(ModelAppOptions(config, host, port, ray_start_seconds, say))
