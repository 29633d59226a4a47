"""Whoever takes a pod of a model has that model's jobs and pictures, and nothing else."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from servers.internal_port import INTERNAL, OURS, THEIRS, House, refused, token
from servers.loopback import served
from sqlalchemy import update
from tests.operator.pure.parts import model, owner, settings, training

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests import rayservice, singlepod, trainingjob
from calotype.operator.manifests.model_secret import build_model_secret, model_secret_name
from calotype.operator.manifests.pods import Volumes
from calotype.operator.settings import ResourceProfile
from calotype.serving import dispatch
from calotype.serving.cluster.job_store_api import build_job_store_api
from calotype.serving.cluster.remote_job_store import RemoteJobStore
from calotype.serving.core.errors import (
    PermissionDenied,
    StorageFailed,
    Unauthenticated,
)
from calotype.serving.database.accounts.teams import TeamOwner
from calotype.serving.database.database import Database
from calotype.serving.database.schema.tables import teams
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.records import AssetRecord, Checkpoint, PreviewRecord
from calotype.serving.jobs.result import GenerationResult, ImageResult, JobOutput
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety
from calotype.serving.wire.model_token import ModelIdentity, make_model_token
from calotype.serving.wire.team_owners import TEAMS_PATH, TeamOwners, operator_token

DISPATCH = pathlib.Path(dispatch.__file__).parent


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A database with tables and without rows."""
    file = tmp_path_factory.mktemp("jobs") / "empty.db"
    Database.open(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def house(empty: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[House]:
    found = House(pathlib.Path(shutil.copy(empty, tmp_path / "jobs.db")))
    app = build_job_store_api(found.database, found.blobs, found.catalog, INTERNAL)
    with served(app) as found.url:
        yield found
    found.close()


@pytest.fixture
def ours(house: House) -> RemoteJobStore:
    return house.store()


def stored(house: House, job_id: str, key: str, team: str | None = None) -> Ending:
    """An ending that names one picture."""
    image = ImageResult("asset_1", key, 0, 7, 128, 128, "image/png", "0" * 64)
    row = AssetRecord(
        *("asset_1", job_id, team or house.team, key, "image/png", 128, 128, 7, "0" * 64),
        *(1.0, None),
    )
    return Ending("succeeded", output=JobOutput([image]), stored=[row])


async def test_a_dispatcher_works_through_the_gateways(house: House, ours: RemoteJobStore) -> None:
    job_id = house.job("shapes")
    policy = DispatchPolicy(sweep_seconds=None)
    dispatcher = Dispatcher(
        *(ours, ScriptedSafety(), ManualClock(), policy, "shapes")  # type: ignore[arg-type]
    )
    await dispatcher.start()
    [lease] = await dispatcher.lease("r1", 1, 600)
    assert lease.job_id == job_id and lease.request.prompt == "a dog"
    key = f"{house.team}/ab/picture.png"
    house.pictures().put(key, b"picture")
    image = ImageResult("asset_1", key, 0, 7, 128, 128, "image/png", "0" * 64)
    assert await dispatcher.complete(job_id, lease.fence, GenerationResult([image]))
    assert await dispatcher.complete(job_id, lease.fence, GenerationResult([image]))
    await dispatcher.stop()
    job = house.database.jobs.get_job(job_id)
    assert job is not None and job.status == "succeeded"
    assert house.database.files.get_asset("asset_1") is not None


def test_jobs_of_other_models_do_not_exist(house: House, ours: RemoteJobStore) -> None:
    theirs, queued = house.running("flux"), house.job("flux")
    before = [house.database.jobs.get_job(job_id) for job_id in (theirs, queued)]
    assert ours.jobs.get_job(theirs) is None
    assert ours.jobs.open_jobs("flux", "running") == ours.jobs.open_jobs("flux", "queued") == []
    assert ours.jobs.queued_job_ids("flux") == []
    assert ours.jobs.expired_leases("flux", 1e13) == []
    assert ours.jobs.start_job(queued, "r9", 1e12) is None
    assert ours.jobs.requeue_job(theirs, 1) is None
    assert ours.jobs.finish_job(theirs, Ending("canceled")) is None
    key = f"{house.team}/checkpoints/{theirs}-1-3.checkpoint"
    assert not ours.intermediates.save_checkpoint(Checkpoint(theirs, 1, 3, key))
    preview = PreviewRecord(theirs, 0, 0, 1, 3, f"{house.team}/ab/p.png", "image/png")
    assert not ours.intermediates.add_preview(preview)
    ours.intermediates.drop_checkpoint(theirs)
    assert [house.database.jobs.get_job(job_id) for job_id in (theirs, queued)] == before


def test_an_ending_names_no_picture_of_others(house: House, ours: RemoteJobStore) -> None:
    ours_job, done = house.running("shapes"), house.running("flux")
    taken = f"{house.team}/ab/taken.png"
    house.database.jobs.finish_job(done, stored(house, done, taken))
    for key in (taken, "team_of_others/ab/secret.png"):
        with pytest.raises(PermissionDenied, match="not one of this job's own"):
            ours.jobs.finish_job(ours_job, stored(house, ours_job, key))
    fresh = stored(house, done, f"{house.team}/ab/fresh.png", team="team_of_others")
    row = replace(fresh.stored[0], id="asset_2")
    assert ours.jobs.finish_job(ours_job, replace(fresh, stored=[row]))
    asset = house.database.files.get_asset("asset_2")
    assert asset is not None and (asset.job_id, asset.team_id) == (ours_job, house.team)


def test_a_job_is_shown_without_what_only_gateways_need(house: House, ours: RemoteJobStore) -> None:
    found = ours.jobs.get_job(house.job("shapes"))
    assert found is not None
    assert (found.webhook, found.api_key_id, found.idempotency) == (None, None, None)
    with house.database.engine.begin() as connection:
        connection.execute(update(teams).values(webhook_secret="whsec"))
    team = ours.teams.get_team(house.team)
    assert team is not None and team.webhook_secret is None


def test_pictures_are_read_where_a_running_job_is_drawn_from_them(house: House) -> None:
    given, other = f"{house.team}/ab/given.png", f"{house.team}/ab/other.png"
    for key in (given, other):
        house.blobs.put(key, b"picture")
    mine, theirs = house.pictures(), house.pictures(THEIRS)
    assert refused(lambda: mine.get(given)), "no job of it runs"
    job_id = house.running("shapes", image=given)
    checkpoint = f"{house.team}/checkpoints/{job_id}-1-3.checkpoint"
    mine.put(checkpoint, b"latents")
    assert (mine.get(given), mine.get(checkpoint)) == (b"picture", b"latents")
    assert refused(lambda: mine.get(other))
    assert refused(lambda: theirs.get(given)) and refused(lambda: theirs.get(checkpoint))
    house.running("flux")
    assert refused(lambda: theirs.get(checkpoint))


def test_pictures_are_written_where_none_is_and_deleted_where_no_row_names_them(
    house: House, ours: RemoteJobStore
) -> None:
    job_id = house.running("shapes")
    mine = house.pictures()
    key, others = f"{house.team}/ab/mine.png", f"{house.team}/ab/others.png"
    house.blobs.put(others, b"others")
    mine.put(key, b"mine")
    mine.put(key, b"mine")  # the answer was lost
    assert refused(lambda: mine.put(others, b"replaced"))
    assert refused(lambda: mine.put("team_of_others/ab/x.png", b"x"))
    assert house.blobs.get(others) == b"others"
    assert ours.jobs.finish_job(job_id, stored(house, job_id, key)) is not None
    mine.delete(key)
    assert house.blobs.get(key) == b"mine", "a row names it"
    assert refused(lambda: mine.put(f"{house.team}/ab/late.png", b"x")), "its job is over"


@pytest.mark.parametrize(
    "shown",
    [
        "nothing",
        INTERNAL,
        token(OURS)[:-1] + "x",
        token(ModelIdentity("shop", "shapes")),
        make_model_token("another-release", OURS),
    ],
    ids=["nonsense", "internal", "forged", "namesake", "other-release"],
)
def test_no_other_token_opens_the_store(house: House, shown: str) -> None:
    store = RemoteJobStore(house.url, shown)
    with pytest.raises(Unauthenticated):
        store.jobs.open_jobs(None, "queued")
    store.close()
    answer = httpx.get(
        f"{house.url}/internal/v1/blobs/a/b.png",
        headers={"authorization": f"Bearer {shown}"},
        timeout=600,
    )
    assert answer.status_code == 401


def test_a_preview_is_taken_once_and_of_the_jobs_team(house: House, ours: RemoteJobStore) -> None:
    job_id = house.running("shapes")
    foreign = PreviewRecord(job_id, 0, 0, 1, 3, "team_of_others/ab/p.png", "image/png")
    assert not ours.intermediates.add_preview(foreign)
    preview = replace(foreign, blob_key=f"{house.team}/ab/p.png")
    assert ours.intermediates.add_preview(preview)
    assert not ours.intermediates.add_preview(preview)  # the answer was lost


def test_a_model_that_is_deleted_ends_its_jobs(house: House, ours: RemoteJobStore) -> None:
    job_id = house.running("shapes")
    house.catalog.replace([])
    key = f"{house.team}/ab/last.png"
    house.pictures().put(key, b"picture")
    assert ours.jobs.finish_job(job_id, stored(house, job_id, key)) is not None


def test_whose_teams_are_is_for_the_operator_alone(house: House) -> None:
    house.database.teams.claim("hats", TeamOwner("shop", "u1"))
    path = f"{house.url}{TEAMS_PATH}"
    for shown in (token(OURS), INTERNAL, "nothing"):
        answer = httpx.get(path, headers={"authorization": f"Bearer {shown}"}, timeout=600)
        assert answer.status_code == 401
    headers = {"authorization": f"Bearer {operator_token(INTERNAL)}"}
    found = TeamOwners.model_validate_json(httpx.get(path, headers=headers, timeout=600).content)
    assert {(t.name, t.namespace, t.uid) for t in found.teams} == {
        ("shoes", None, None),
        ("hats", "shop", "u1"),
    }


def test_calls_that_are_not_there_or_make_no_sense_are_refused(house: House) -> None:
    headers = {"authorization": f"Bearer {token(OURS)}"}
    for name in ("_job", "calls", "__init__", "nothing"):
        answer = httpx.post(
            f"{house.url}/internal/v1/store/{name}", json={}, headers=headers, timeout=600
        )
        assert answer.status_code == 404, name
    path = f"{house.url}/internal/v1/store/get_job"
    assert httpx.post(path, json={"wrong": 1}, headers=headers, timeout=600).status_code == 400


def test_a_gateway_that_is_away_is_a_database_that_is_away() -> None:
    store = RemoteJobStore("http://127.0.0.1:1", token(OURS))
    with pytest.raises(StorageFailed):
        store.jobs.get_job("job_1")
    store.close()


# --- what the pods hold -------------------------------------------------------------------------


def pods() -> Iterator[tuple[str, Manifest]]:
    """Name and spec of every pod that runs a model's or a training's code."""
    config = settings(
        internalTokenSecretRef={"name": "calotype-internal", "key": "token"},
        dataClaim="calotype-data",
    )
    volumes = Volumes(data="calotype-data")
    obj, gpu = owner("ImageModel", "shapes"), ResourceProfile(gpus=1)
    single = singlepod.build_deployment(obj, gpu, volumes, config, suspended=False)
    yield "single pod", single["spec"]["template"]["spec"]
    groups = rayservice.groups_of(model(), gpu, None)
    cluster = rayservice.build_cluster("shapes", groups, volumes, config)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield f"Ray {group.get('groupName', 'head')}", group["template"]["spec"]
    job = trainingjob.build_rayjob(owner("LoRATraining", "sneaker"), training(), gpu, config)
    for group in (
        job["spec"]["rayClusterSpec"]["headGroupSpec"],
        *job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ):
        yield f"training {group.get('groupName', 'head')}", group["template"]["spec"]


@pytest.mark.parametrize(("name", "spec"), [pytest.param(*pod, id=pod[0]) for pod in pods()])
def test_pods_hold_their_models_secret_alone_and_no_folder_of_others(
    name: str, spec: Manifest
) -> None:
    (container,) = spec["containers"]
    assert "envFrom" not in container
    named = {
        ref["name"]
        for entry in container["env"]
        if (ref := (entry.get("valueFrom") or {}).get("secretKeyRef")) is not None
    }
    assert named == (set() if name.startswith("training") else {model_secret_name("shapes")})
    release = {
        volume["name"]
        for volume in spec["volumes"]
        if volume.get("persistentVolumeClaim", {}).get("claimName") == "calotype-data"
    }
    folders = {
        mount.get("subPath") for mount in container["volumeMounts"] if mount["name"] in release
    }
    assert release and folders <= {"cache", "audit", "provenance"}
    assert "training" not in name or folders == {"cache"}
    assert "secret" not in {kind for volume in spec["volumes"] for kind in volume}


def test_the_secret_of_a_model_holds_its_own_token_and_not_the_releases() -> None:
    config = settings()
    secrets = [
        build_model_secret(owner("ImageModel", name, namespace), INTERNAL, config)
        for namespace, name in (("calotype", "shapes"), ("shop", "shapes"), ("calotype", "flux"))
    ]
    assert len({secret["data"]["token"] for secret in secrets}) == 3
    assert len({secret["data"]["marks-secret"] for secret in secrets}) == 1
    assert INTERNAL not in json.dumps(secrets)


def test_the_remote_store_has_all_that_a_dispatcher_calls() -> None:
    sources = " ".join(file.read_text() for file in DISPATCH.glob("*.py"))
    called = set(re.findall(r"_database\.(\w+)\.(\w+)", sources))
    called |= {("jobs", name) for name in re.findall(r"self\._jobs\.(\w+)\b", sources)}
    called -= {("jobs", name) for name in ("get", "pop", "items")}  # of dictionaries
    store = RemoteJobStore("http://127.0.0.1:1", "nothing")
    assert called and not {
        f"{part}.{name}" for part, name in called if not hasattr(getattr(store, part), name)
    }
    store.close()
