"""Repositories of a Hugging Face hub, at the commit that a branch or tag means now.

The hub's address is HF_ENDPOINT; HF_TOKEN opens gated and private repositories.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from calotype.serving.weights.transfer import PAUSES, Interrupted
from calotype.serving.weights.web import PASSING, WebFile, interruption, open_client
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed

HUB = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[WebFile, ...]
    licence: str | None
    """As its card names it."""
    gated: bool


class Hub:
    """A client of one hub; close it after use."""

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        self._token = token or os.environ.get("HF_TOKEN")
        self._sleep = sleep
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        self.client = open_client(headers)

    def close(self) -> None:
        self.client.close()

    def find(self, repo: str, revision: str) -> Repository:
        """The repository at the commit that ``revision`` means.

        Raises:
            FetchFailed: there is no such repository or revision, or it is not for this token.
        """
        path = f"/api/models/{repo}/revision/{quote(revision, safe='')}"
        told = self._ask(f"{self._endpoint}{path}?blobs=true", repo, revision)
        try:
            commit = str(told["sha"])
            siblings = [dict(sibling) for sibling in told["siblings"]]
            names = [str(sibling["rfilename"]) for sibling in siblings]
        except (KeyError, TypeError, ValueError):
            commit, siblings, names = "", [], []
        if COMMIT.fullmatch(commit) is None:
            raise failed(Fault.FETCH_FAILED, f"{self._endpoint} says nothing usable of {repo}.")
        card = told.get("cardData") or {}
        licence = card.get("license_name") or card.get("license")
        files = [
            self._file(repo, commit, name, sibling)
            for name, sibling in zip(names, siblings, strict=True)
        ]
        return Repository(
            repo, commit, tuple(files), str(licence) if licence else None, bool(told.get("gated"))
        )

    def _file(self, repo: str, commit: str, name: str, sibling: dict[str, Any]) -> WebFile:
        large = sibling.get("lfs") or {}
        size = large.get("size", sibling.get("size"))
        return WebFile(
            self.client,
            f"{self._endpoint}/{repo}/resolve/{commit}/{quote(name)}",
            name,
            size=int(size) if size is not None else None,
            sha256=large.get("sha256"),
            version=commit,
        )

    def _ask(self, url: str, repo: str, revision: str) -> dict[str, Any]:
        problem = Interrupted("")
        for pause in (*PAUSES, None):
            try:
                answer = self.client.get(url)
                if answer.status_code not in PASSING:
                    return self._read(answer, repo, revision)
                problem = Interrupted(f"the hub answers with status {answer.status_code}.")
            except httpx.HTTPError as error:
                found = interruption(url, error)
                if isinstance(found, FetchFailed):
                    raise found from error
                problem = found
            if pause is not None:
                self._sleep(pause)
        raise failed(Fault.UNREACHABLE, f"{repo} could not be resolved: {problem}")

    def _read(self, answer: httpx.Response, repo: str, revision: str) -> dict[str, Any]:
        code, status = answer.headers.get("x-error-code", ""), answer.status_code
        if answer.is_success:
            try:
                told = answer.json()
            except ValueError:
                told = None
            if isinstance(told, dict):
                return told
            raise failed(Fault.FETCH_FAILED, f"{self._endpoint} says nothing usable of {repo}.")
        if code == "RevisionNotFound" or (status == 404 and code != "RepoNotFound"):
            raise failed(Fault.NOT_FOUND, f"The repository {repo} has no revision {revision!r}.")
        if code == "GatedRepo" or (status in (401, 403) and self._token):
            raise failed(
                Fault.CREDENTIALS_REJECTED,
                f"The repository {repo} is not open to this HF_TOKEN: ask for access on its page "
                "with the token's account, or correct the token.",
            )
        if status in (401, 404):
            # The hub says 401 to whoever shows no token, also of what does not exist.
            hint = "" if self._token else " If it is private or gated, HF_TOKEN must be given."
            raise failed(
                Fault.NOT_FOUND if self._token else Fault.CREDENTIALS_REJECTED,
                f"There is no repository {repo} on {self._endpoint}.{hint}",
            )
        raise failed(
            Fault.FETCH_FAILED, f"{self._endpoint} answers with status {status} for {repo}."
        )
