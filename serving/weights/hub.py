"""Repositories of a Hugging Face hub, at the commit that a branch or tag means now.

Listed by huggingface_hub; files are fetched by `transfer`, which resumes and verifies. The hub's
address is HF_ENDPOINT; HF_TOKEN opens gated and private repositories.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from calotype.serving.weights.transfer import PAUSES, Interrupted
from calotype.serving.weights.web import PASSING, WebFile, open_client
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed

HUB = "https://huggingface.co"
_SECONDS = 60.0
"""For an answer about a repository."""
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
        # False: no token that happens to lie in this machine's home folder.
        self._api = HfApi(self._endpoint, token=self._token or False)

    def close(self) -> None:
        self.client.close()

    def find(self, repo: str, revision: str) -> Repository:
        """The repository at the commit that ``revision`` means.

        Raises:
            FetchFailed: there is no such repository or revision, or it is not for this token.
        """
        try:
            found = self._ask(repo, revision)
            commit = found.sha or ""
            files = tuple(self._file(repo, commit, one) for one in found.siblings or ())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unusable(repo) from error
        if COMMIT.fullmatch(commit) is None:
            raise self._unusable(repo)
        card = found.card_data
        licence = None if card is None else card.get("license_name") or card.get("license")
        return Repository(repo, commit, files, str(licence) if licence else None, bool(found.gated))

    def _file(self, repo: str, commit: str, sibling: RepoSibling) -> WebFile:
        large = sibling.lfs
        return WebFile(
            self.client,
            f"{self._endpoint}/{repo}/resolve/{commit}/{quote(sibling.rfilename)}",
            sibling.rfilename,
            size=sibling.size if large is None else large.size,
            sha256=None if large is None else large.sha256,
            version=commit,
        )

    def _ask(self, repo: str, revision: str) -> ModelInfo:
        problem = Interrupted("")
        for pause in (*PAUSES, None):
            try:
                return self._api.model_info(
                    repo, revision=revision, files_metadata=True, timeout=_SECONDS
                )
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in PASSING:
                    raise self._refusal(error.response, repo, revision) from error
                problem = Interrupted(f"the hub answers with status {status}.")
            except HFValidationError as error:
                raise failed(Fault.SOURCE_INVALID, f"{repo} names no repository.") from error
            except OfflineModeIsEnabled as error:
                raise failed(Fault.UNREACHABLE, "HF_HUB_OFFLINE forbids to ask the hub.") from error
            except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
                raise failed(
                    Fault.SOURCE_INVALID, f"{self._endpoint} is no address of a hub: {error}."
                ) from error
            except httpx2.HTTPError as error:
                detail = str(error) or type(error).__name__
                problem = Interrupted(f"{self._endpoint} cannot be reached ({detail}).")
            if pause is not None:
                self._sleep(pause)
        raise failed(Fault.UNREACHABLE, f"{repo} could not be resolved: {problem}")

    def _unusable(self, repo: str) -> FetchFailed:
        return failed(Fault.FETCH_FAILED, f"{self._endpoint} says nothing usable of {repo}.")

    def _refusal(self, answer: httpx2.Response, repo: str, revision: str) -> FetchFailed:
        code, status = answer.headers.get("x-error-code", ""), answer.status_code
        if code == "RevisionNotFound" or (status == 404 and code != "RepoNotFound"):
            return failed(Fault.NOT_FOUND, f"The repository {repo} has no revision {revision!r}.")
        if code == "GatedRepo" or (status in (401, 403) and self._token):
            return failed(
                Fault.CREDENTIALS_REJECTED,
                f"The repository {repo} is not open to this HF_TOKEN: ask for access on its page "
                "with the token's account, or correct the token.",
            )
        if status in (401, 404):
            # The hub says 401 to whoever shows no token, also of what does not exist.
            hint = "" if self._token else " If it is private or gated, HF_TOKEN must be given."
            return failed(
                Fault.NOT_FOUND if self._token else Fault.CREDENTIALS_REJECTED,
                f"There is no repository {repo} on {self._endpoint}.{hint}",
            )
        return failed(
            Fault.FETCH_FAILED, f"{self._endpoint} answers with status {status} for {repo}."
        )
