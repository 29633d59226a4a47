"""`python -m controlplane.node SETTINGS.json`: the process node, inside a network namespace."""

import asyncio
import json
import sys
from pathlib import Path

from ..api import Api
from .agent import Agent
from .claims import Claims
from .images import Images
from .pod import Machine
from .services import Services


async def main(file: Path) -> None:
    settings = json.loads(file.read_text())
    async with Api(Path(settings["kubeconfig"])) as api:
        agent: Agent
        services = Services(settings["apiPort"], lambda: agent.services_changed())
        machine = Machine(
            api=api,
            name=settings["name"],
            address=settings["address"],
            bridge=settings["bridge"],
            capacity=settings["capacity"],
            images=Images.load(Path(settings["images"])),
            services=services,
            scratch=Path(settings["scratch"]),
            logs=Path(settings["logs"]),
            refresh=settings["refresh"],
            delay_scale=settings["delayScale"],
        )
        claims = Claims(api, Path(settings["claims"]))
        agent = Agent(machine, claims, machine.scratch / "hosts")
        await agent.run(Path(settings["certificate"]), Path(settings["key"]))


asyncio.run(main(Path(sys.argv[1])))
