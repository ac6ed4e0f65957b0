"""Decisions after failures, as tables: no process is needed for them."""

from __future__ import annotations

import uuid

import pytest

from raylight.contract.config import Config
from raylight.contract.messages import Died, Failure, PeerLost
from raylight.driver.driver import Driver
from raylight.driver.restart import BACKOFF_S, Action, Decision, History, decide, find_first, make_error
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version
from tests.faults_storage import uri_at


def failure(
    kind: str = "KeyError", text: str = "x", step: int = 3, stage: str = "train", is_permanent: bool = False
) -> Failure:
    return Failure(kind, text, "Traceback ...", step, stage, None, is_permanent)


DEAD, LOST, GONE = Died("killed"), PeerLost(3, "closed"), Died("node died", node_lost=True)


def ask(failures, history=None, world_size=2, step=3, stage="fit", max_restarts=3) -> Decision:
    return decide(failures, world_size, step, stage, max_restarts, history or History())


@pytest.mark.parametrize(
    ("failures", "action"),
    [
        ({0: LOST, 1: DEAD}, Action.RECOVER),
        ({0: DEAD, 1: DEAD}, Action.RESTART),
        ({0: failure(), 1: LOST}, Action.RECOVER),
        ({0: failure(is_permanent=True), 1: LOST}, Action.GIVE_UP),
        ({0: failure(stage="setup"), 1: LOST}, Action.GIVE_UP),
    ],
)
def test_what_is_left_decides(failures, action):
    assert ask(failures).action is action


def test_an_exception_without_a_text_is_told_by_its_kind():
    assert ask({0: failure("MemoryError", ""), 1: LOST}).reason == "MemoryError"
    assert ask({0: failure("KeyError", "\nx\ny"), 1: LOST}).reason == "KeyError: x"


def test_what_fails_when_training_has_ended_is_not_tried_again():
    assert ask({0: failure(stage="ending"), 1: LOST}).action is Action.GIVE_UP


def test_evaluation_is_not_restarted():
    assert ask({0: LOST, 1: DEAD}, stage="test").action is Action.GIVE_UP


def test_the_same_exception_at_the_same_step_ends_the_run():
    history = History()
    first = ask({0: failure(), 1: LOST}, history)
    history.note(failure(), 3, first)
    assert ask({0: failure(), 1: LOST}, history).action is Action.GIVE_UP
    assert ask({0: failure(step=4), 1: LOST}, history, step=4).action is Action.RECOVER
    assert ask({0: failure(text="y"), 1: LOST}, history).action is Action.RECOVER


def test_the_budget_counts_all_but_lost_nodes():
    history = History()
    for step in range(3):
        decision = ask({0: LOST, 1: DEAD}, history, step=step)
        assert decision.action is Action.RECOVER
        history.note(DEAD, step, decision)
    assert ask({0: LOST, 1: DEAD}, history, step=9).action is Action.GIVE_UP
    assert ask({0: LOST, 1: GONE}, history, step=9).action is Action.RECOVER
    assert ask({0: LOST, 1: DEAD}, max_restarts=0).action is Action.GIVE_UP


def test_attempts_without_progress_wait_longer():
    history, delays = History(), []
    for step in (5, 5, 5, 6):
        decision = ask({0: LOST, 1: DEAD}, history, step=step, max_restarts=9)
        delays.append(decision.delay_s)
        history.note(DEAD, step, decision)
    assert delays == [BACKOFF_S[0], BACKOFF_S[1], BACKOFF_S[2], BACKOFF_S[0]]


@pytest.mark.parametrize(
    ("failures", "rank"),
    [({0: LOST, 1: failure()}, 1), ({0: LOST, 1: DEAD}, 1), ({0: DEAD, 1: failure()}, 1), ({0: DEAD, 1: DEAD}, 0)],
)
def test_the_first_cause_is_what_the_user_reads(failures, rank):
    assert find_first(failures) == rank


def test_the_log_is_named_as_it_can_be_opened(s3_port):
    version = claim_version(Storage(uri_at(s3_port, uuid.uuid4().hex)), "run")
    run = Driver(version, Config(name="run"), 2, [], [])
    error = make_error({1: failure()}, run, "the same would happen again")
    assert error.log == version.storage.uri_of("logs/rank-1.log")
    assert f"Log: {error.log}" in str(error)
