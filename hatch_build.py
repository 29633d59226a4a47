"""Makes ``pip install -e .`` expose serving/, moderation/ and operator/ as ``calotype.*``.

Hatchling renames folders inside a wheel but refuses to in an editable install, so the editable
install points at ``.editable/calotype``, a git-ignored folder of three links.
"""

import pathlib
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinkPackages(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        package = pathlib.Path(self.root, ".editable", "calotype")
        package.mkdir(parents=True, exist_ok=True)
        for folder in ("serving", "moderation", "operator"):
            link = package / folder
            if not link.is_symlink():
                link.symlink_to(pathlib.Path("..", "..", folder), target_is_directory=True)
