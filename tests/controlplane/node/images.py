"""The images of the process node: a table that says what a container of each name finds.

An image here is no file system. It is a part of this machine's that a container may see, with the
commands on its PATH, its environment and its user.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """`visible` paths are bound into the container, to be read only."""

    path: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    visible: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    folder: str = "/"
    uid: int = 0
    user: str = "root"
    home: str = "/root"

    @property
    def environment(self) -> dict[str, str]:
        """The variables before those of the pod."""
        return {"PATH": ":".join([*self.path, PATH]), "HOME": self.home, **self.env}

    @property
    def passwd(self) -> str:
        """The image's /etc/passwd."""
        people = {"root": (0, "/root"), "nobody": (65534, "/nonexistent")}
        people[self.user] = (self.uid, self.home)
        return "".join(f"{n}:x:{i}:{i}::{home}:/bin/sh\n" for n, (i, home) in people.items())


class Images:
    """Regular expressions of whole image names, and the image of each."""

    def __init__(self, table: dict[str, Image]) -> None:
        self._table = table

    @classmethod
    def load(cls, file: Path) -> "Images":
        """What `save` wrote."""
        table = json.loads(file.read_text())
        return cls({pattern: Image(**image) for pattern, image in table.items()})

    def save(self, file: Path) -> Path:
        table = {pattern: asdict(image) for pattern, image in self._table.items()}
        file.write_text(json.dumps(table, indent=1))
        return file

    def find(self, name: str) -> Image | None:
        """The first image whose pattern is the whole name, or None: it cannot be pulled."""
        for pattern, image in self._table.items():
            if re.fullmatch(pattern, name):
                return image
        return None
