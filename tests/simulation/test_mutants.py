"""The simulation finds bugs that are planted: what it says of the rest is worth something."""

from __future__ import annotations

import pytest
from simulation.test_simulation import start

SEEDS = 2000
MUTANTS = (
    "text_encoder_outage_fails_the_job",
    "poison_is_counted_on_an_outage",
    "a_loop_dies_at_its_first_fault",
    "a_lease_is_not_fenced",
    "a_cancelled_job_is_not_charged",
    "usage_is_recorded_in_another_transaction",
    "webhooks_are_announced_in_another_transaction",
    "previews_are_judged_without_references",
    "previews_are_shown_when_nobody_can_judge",
    "a_held_picture_is_shown_before_its_release",
    "an_idempotency_key_is_forgotten_at_a_restart",
    "a_restarted_dispatcher_forgets_what_runs",
    "the_sweeper_deletes_what_is_about_to_be_named",
    "a_takedown_is_two_transactions",
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_found(mutant: str) -> None:
    process = start(f"0:{SEEDS}", "--mutant", mutant, "--stop-after", "1")
    output = process.communicate()[0]
    assert "BROKEN" in output and process.returncode == 1, output
