"""One file of the operator's, as its volume or the API server has it."""

from __future__ import annotations

import asyncio
import pathlib

from calotype.serving.cluster.config_map import ConfigMapReader


class FollowedFile:
    """Says what is new of a file.

    Args:
        newest: knows what will be in the file, and is believed where it answers.
    """

    def __init__(self, path: pathlib.Path, newest: ConfigMapReader | None = None) -> None:
        self.path = path
        self.used: bytes | None = None
        """The content that is in use."""
        self._newest = newest
        self._heard = False
        """Whether ``newest`` has ever answered: the file may be older than what we have then."""

    async def read(self) -> bytes | None:
        """Content that is not in use yet; None = nothing is new.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        found = None if self._newest is None else await self._newest.read()
        if found is not None:
            self._heard = True
        elif not self._heard:
            found = await asyncio.to_thread(self.path.read_bytes)
        return None if found == self.used else found

    async def close(self) -> None:
        if self._newest is not None:
            await self._newest.close()
