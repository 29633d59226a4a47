"""``python -m calotype.operator`` runs the operator; ``... release`` lets go of every object."""

from __future__ import annotations

import argparse
import asyncio
import logging
import pathlib
import sys

from calotype.operator.app import Operator, release_all
from calotype.operator.kube.client import HttpKubeClient
from calotype.operator.runtime.lease import LeaseLost
from calotype.operator.settings import (
    SETTINGS_FILE,
    OperatorSettings,
    SettingsError,
    load_settings,
)

log = logging.getLogger("calotype.operator")


def main() -> int:
    """Returns the exit code: 2 = wrong settings, 3 = another operator took over."""
    parser = argparse.ArgumentParser(prog="python -m calotype.operator", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "release"], default="run")
    parser.add_argument("--settings", type=pathlib.Path, default=SETTINGS_FILE)
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Kopf tells of every watch and every retry; what matters is told by `watching`.
    logging.getLogger("kopf").setLevel(logging.ERROR)
    try:
        settings = load_settings(arguments.settings)
        work = _release(settings) if arguments.command == "release" else _run(settings)
        asyncio.run(work)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except LeaseLost as error:
        log.error("stopped: %s", error)
        return 3
    return 0


async def _run(settings: OperatorSettings) -> None:
    async with HttpKubeClient() as kube:
        await Operator(settings, kube).run()


async def _release(settings: OperatorSettings) -> None:
    async with HttpKubeClient() as kube:
        operator = Operator(settings, kube)
        namespaces = None if settings.all_namespaces else settings.watched
        count = await release_all(operator.context, namespaces)
        log.info("%d objects were let go", count)


if __name__ == "__main__":
    sys.exit(main())
