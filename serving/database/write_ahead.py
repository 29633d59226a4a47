"""What SQLite committed survives a power cut: its write-ahead log on the disk, once for many.

With ``synchronous = NORMAL`` a commit survives the death of every process, but the last ones may be
lost when the machine loses power. ``FULL`` would flush inside of each transaction, while all other
writers wait. So the log is flushed after the commit, and callers that come meanwhile share the next
flush. A checkpoint that moves the log into the database flushes both itself.
"""

from __future__ import annotations

import os
import pathlib
import threading

from calotype.serving.core.errors import StorageFailed


class WriteAheadLog:
    """The log of one database.

    Args:
        database: the database's file; the log lies beside it.
    """

    def __init__(self, database: pathlib.Path) -> None:
        self._path = database.with_name(f"{database.name}-wal")
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._asked = self._flushed = 0
        self._named = False

    def flush(self) -> None:
        """Returns when everything that was committed before the call is on the disk.

        Raises:
            StorageFailed: the disk did not take it.
        """
        with self._count:
            self._asked += 1
            mine = self._asked
        with self._turn:
            if self._flushed >= mine:
                return
            with self._count:
                upto = self._asked
            try:
                self._to_disk()
            except OSError as error:
                raise StorageFailed(
                    f"The job database cannot be written: {error.strerror or error}.", retry_after=2
                ) from error
            self._flushed = upto

    def _to_disk(self) -> None:
        try:
            # SQLite holds no lock on this file, which closing it would release.
            handle = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return  # the last connection moved it into the database
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if not self._named:
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._named = True
