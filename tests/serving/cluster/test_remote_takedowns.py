"""Takedowns and heads of audit logs as a model app sees them, through the gateways."""

from __future__ import annotations

import pathlib
from dataclasses import replace

import pytest
from servers.loopback import served

from calotype.moderation.policy.categories import Category
from calotype.moderation.records.heads import Head
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.job_store_api import build_job_store_api
from calotype.serving.cluster.remote_job_store import RemoteJobStore
from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.core.decision import NEWEST_TAKEDOWN, Decision
from calotype.serving.core.errors import Conflict, PermissionDenied
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.review.image_index import Fingerprint
from calotype.serving.database.review.takedown_order import CHECKED_TOO_EARLY
from calotype.serving.database.review.takedowns import TakedownOrder, TakenDown
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.records import NewJob
from calotype.serving.jobs.result import JobOutput
from calotype.serving.testing.in_memory import MemoryBlobStore, decision
from calotype.serving.wire.model_token import ModelIdentity, make_model_token

TOKEN = "the-internal-token-of-the-release"
REQUEST = {"size": "128x128", "rendered_size": "128x128", "steps": 20, "n": 1, "prompt": "a dog"}


def test_what_a_model_app_checked_before_a_takedown_is_refused(tmp_path: pathlib.Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    catalog = Catalog([BUILT_IN_MODEL], [])
    model = ModelIdentity(BUILT_IN_MODEL.metadata.namespace, BUILT_IN_MODEL.name)
    team = database.teams.ensure_team("shop").id
    new = NewJob("job_1", team, model.name, {}, REQUEST)
    with served(build_job_store_api(database, MemoryBlobStore(), catalog, TOKEN)) as url:
        store = RemoteJobStore(url, make_model_token(TOKEN, model))
        database.jobs.create_job(new)
        database.jobs.start_job("job_1", "one", 1e12)
        known = {NEWEST_TAKEDOWN: TakenDown(store.takedowns).numbered()[0]}  # type: ignore[arg-type]
        order = TakedownOrder(Fingerprint(None, None), Category.HARASSMENT, "r", (), ())
        database.takedowns.take_down(order, "key_1")
        checked = Decision.from_payload(decision("output") | known)
        ending = Ending(
            "succeeded", output=JobOutput([]), moderation=ModerationRecord(output=(checked,))
        )
        with pytest.raises(Conflict) as caught:
            store.jobs.finish_job("job_1", ending)
        assert caught.value.code == CHECKED_TOO_EARLY
        assert TakenDown(store.takedowns).numbered()[0] == 1  # type: ignore[arg-type]
        store.audit_heads.note(Head("audit-one.jsonl", 3, "f" * 64, 1.0))
        assert database.audit_heads.unsigned() == [Head("audit-one.jsonl", 3, "f" * 64, 1.0)]
        head = Head("audit-of-another.jsonl", 3, "f" * 64, 1.0)
        database.audit_heads.note(head, "flux")
        with pytest.raises(PermissionDenied, match="another model's"):
            store.audit_heads.note(replace(head, lines=9))  # it would say that the log was cut
        store.close()
    database.close()
