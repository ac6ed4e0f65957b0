"""Random failures, in a bounded form; `make soak` runs the long one."""

from __future__ import annotations

import os
import random

import pytest

from tests.end_to_end.soak import draw_plan, soak


@pytest.mark.slow
def test_a_run_survives_what_a_seed_draws(tmp_path):
    report = soak(tmp_path, seed=11, num_steps=24, num_faults=3)
    print(report)
    assert "1 of the driver" in report


@pytest.mark.slow
def test_an_exception_between_forward_and_backward_costs_no_number(tmp_path):
    """The DDP of the group before must not reduce beside the new one; seed 9101 has such a fault."""
    soak(tmp_path, seed=9101, num_steps=60, num_faults=6)


def test_a_seed_draws_the_same_faults_again():
    assert draw_plan(7, 200, 30) == draw_plan(7, 200, 30)
    assert draw_plan(7, 200, 30) != draw_plan(8, 200, 30)


@pytest.mark.soak
def test_long_runs_survive(tmp_path):
    seed = int(os.environ.get("RAYLIGHT_SOAK_SEED", random.randrange(1 << 31)))
    print(f"RAYLIGHT_SOAK_SEED={seed}")
    num_steps = int(os.environ.get("RAYLIGHT_SOAK_STEPS", 1000))
    print(soak(tmp_path, seed, num_steps, num_faults=num_steps // 20))
