"""`python -m controlplane.node SETTINGS.json`: the process node, inside a network namespace."""

import asyncio
import json
import sys
from pathlib import Path

from controlplane.client.api_client import ApiClient
from controlplane.node.agent import Agent
from controlplane.node.claims import Claims
from controlplane.node.images import Images
from controlplane.node.pods.pod import Node
from controlplane.node.services import Services


async def main(file: Path) -> None:
    settings = json.loads(file.read_text())
    async with ApiClient(Path(settings["kubeconfig"])) as api:
        agent: Agent
        services = Services(settings["apiPort"], lambda: agent.services_changed())
        node = Node(
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
        agent = Agent(node, claims, node.scratch / "hosts")
        await agent.run(Path(settings["certificate"]), Path(settings["key"]))


asyncio.run(main(Path(sys.argv[1])))
