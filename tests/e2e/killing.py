"""Kills every process of a service while teams draw, and checks that no job was lost or doubled.

A picture whose generator died in the middle goes on from its checkpoint and is, pixel by pixel,
what nobody disturbed would have drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from e2e.clients import Asking, Team
from samples.images import same_pixels
from servers.pods import MODEL_APP
from servers.service_process import children, replica_of
from sqlalchemy import select

from calotype.serving.database.database import Database
from calotype.serving.database.schema.tables import assets, checkpoints, jobs, usage_records

TEAMS = ("a", "b", "c")
COMPARED = 2
"""Pictures whose job was disturbed, and as many of others, that are drawn again."""
REPLICAS = ("Generator", "TextEncoder", "Moderator", "Dispatcher")
OF_RAY = {
    "controller": lambda title: title.startswith("ray::ServeController"),
    "proxy": lambda title: title.startswith("ray::ProxyActor"),
    "raylet": lambda title: "/raylet/raylet" in title.partition(" ")[0],
    "head": lambda title: "gcs_server" in title.partition(" ")[0],
}
"""The parts of Ray by their command lines."""
LOSES_GENERATORS = {"Generator", "raylet", "head", "calotype serve", MODEL_APP}


@dataclass
class Target:
    """A running service, and what of it can be killed."""

    url: str
    database: str
    assets: pathlib.Path
    root: Callable[[], int]
    """The process above Ray."""
    until: Callable[..., None]
    ready: Callable[[], bool]
    crashes: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What is not a child of Ray, and how it is killed and started again."""

    def kill(self, role: str) -> None:
        if role in self.crashes:
            return self.crashes[role]()
        self.until(lambda: self.find(role), f"{role} runs")
        victim = self.find(role)
        assert victim is not None
        victim.kill()
        self.until(lambda: not victim.is_running(), f"{role} is dead")

    def find(self, role: str) -> psutil.Process | None:
        """The process of this role among Ray's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if role in REPLICAS:
                return replica_of(self.root(), role)
            return next(children(self.root(), OF_RAY[role]), None)
        return None


def kill_everything(target: Target) -> None:
    """Kills each part of the target once while teams draw; checks what they got.

    The order is chosen by a seed, which is printed and may be given in CALOTYPE_KILL_SEED.
    """
    seed = int(os.environ.get("CALOTYPE_KILL_SEED") or time.time_ns() % 1_000_000)
    target.until(target.ready, "the model is loaded")
    order = [*REPLICAS, *(role for role in OF_RAY if target.find(role)), *target.crashes]
    random.Random(seed).shuffle(order)
    print(f"CALOTYPE_KILL_SEED={seed}: {order}")
    with contextlib.ExitStack() as opened:
        database = Database.open(target.database)
        opened.callback(database.close)
        keys = {name: database.api_keys.create(team=name)[0] for name in (*TEAMS, "waiting")}
        teams = [Team(target.url, name, keys[name]) for name in TEAMS]
        asking = Asking(target.url, keys["waiting"])
        for client in (*teams, asking):
            opened.enter_context(client)
        for role in order:
            wait_until_a_kill_is_harmless(target, database, role)
            killed = kill_at_work(target, database, role)
            target.until(partial(asking.drawn_since, killed), f"a picture after {role} died")
            drawn = asking.drawn_since(killed)
            assert drawn is not None
            seen = asking.refused_since(killed)
            print(f"{role}: a picture after {drawn.ended - killed:.1f} s, seen before it: {seen}")
        for client in (*teams, asking):
            client.stop()
        target.until(lambda: not open_jobs(database), "all jobs are over")
        check(database, teams, target.assets)
        assert {one.status for one in asking.asked} <= {0, 200, 503, 504}


def wait_until_a_kill_is_harmless(target: Target, database: Database, role: str) -> None:
    """A job that two generators die over is given up: those that were disturbed end first."""
    target.until(target.ready, "the model is loaded again")
    if role in LOSES_GENERATORS:
        target.until(lambda: not disturbed(database), "no disturbed job is left")


def kill_at_work(target: Target, database: Database, role: str) -> float:
    """Kills it while jobs run; the generator until that has cost a job its lease.

    Returns:
        The moment of the kill, of the monotonic clock in seconds.
    """
    while True:
        target.until(lambda: half_drawn(database), "a running job has left a checkpoint")
        held = {job.id: job.fence for job in open_jobs(database, "running")}
        killed = time.monotonic()
        target.kill(role)
        if role != "Generator":
            return killed

        def leased_again(held: dict[str, int] = held) -> set[str]:
            found = disturbed(database, "queued", "running", "succeeded")
            return {job.id for job in found if job.fence > held.get(job.id, 1 << 30)}

        def settled(held: dict[str, int] = held) -> bool:
            still = {job.id for job in open_jobs(database)}
            return not (still & set(held)) - leased_again(held)

        target.until(settled, "the jobs of the dead one are over or leased again")
        if leased_again():
            return killed
        wait_until_a_kill_is_harmless(target, database, role)


def open_jobs(database: Database, *states: str) -> list[Any]:
    chosen = jobs.select().where(jobs.c.status.in_(states or ("queued", "running")))
    with database.engine.connect() as connection:
        return list(connection.execute(chosen))


def disturbed(database: Database, *states: str) -> list[Any]:
    """Jobs that were leased more than once; those that are not over, where no states are given."""
    return [job for job in open_jobs(database, *states) if job.fence > 1]


def half_drawn(database: Database) -> bool:
    """Whether a job runs that has left a checkpoint."""
    found = (
        select(jobs.c.id)
        .join(checkpoints, checkpoints.c.job_id == jobs.c.id)
        .where(jobs.c.status == "running")
    )
    with database.engine.connect() as connection:
        return connection.execute(found).first() is not None


def check(database: Database, teams: list[Team], folder: pathlib.Path) -> None:
    accepted = [job_id for team in teams for job_id in team.accepted]
    assert len(set(accepted)) == len(accepted)
    theirs = {team.name: set(team.accepted) for team in teams}
    with database.engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(jobs.select()).mappings()]
        images = [dict(row) for row in connection.execute(assets.select()).mappings()]
        usage = [dict(row) for row in connection.execute(usage_records.select()).mappings()]
    ids = {team.name: team.id for team in database.teams.list_teams() if team.name in theirs}
    for name, own in theirs.items():
        found = {row["id"] for row in rows if row["team_id"] == ids[name]}
        assert found == own, "exactly the accepted jobs exist"
    rows = [row for row in rows if row["id"] in set(accepted)]
    ended = Counter(row["status"] for row in rows)
    assert ended == {"succeeded": len(accepted)}, [r for r in rows if r["status"] != "succeeded"]
    once = Counter(accepted)
    assert Counter(p["job_id"] for p in images if p["job_id"] in once) == once
    assert Counter(u["job_id"] for u in usage if u["job_id"] in once) == once
    by_job = {image["job_id"]: image for image in images}
    files = {job_id: (folder / by_job[job_id]["blob_key"]).read_bytes() for job_id in accepted}
    for job_id, data in files.items():
        assert hashlib.sha256(data).hexdigest() == by_job[job_id]["sha256"]
    resumed = [row for row in rows if row["fence"] > 1]
    assert resumed, "no job lost its generator: nobody was killed at work"
    others = [row for row in rows if row["fence"] == 1]
    for row in [*resumed[:COMPARED], *others[:COMPARED]]:
        assert same_pixels(teams[0].again(row["recipe"]), files[row["id"]])
