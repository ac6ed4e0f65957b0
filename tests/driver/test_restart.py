"""Decisions after failures, as tables: no process is needed for them."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import WorkerHung
from raylight.contract.messages import Died, Failure, PeerLost, Saved, Started
from raylight.driver.driver import Driver
from raylight.driver.restart import BACKOFF_S, Action, Decision, History, decide, find_first, is_of_recovery, make_error
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version
from tests.faults_storage import uri_at


def failure(
    kind: str = "KeyError", text: str = "x", step: int = 3, stage: str = "train", is_permanent: bool = False
) -> Failure:
    return Failure(kind, text, "Traceback ...", step, stage, None, is_permanent)


DEAD, LOST, GONE = Died("killed"), PeerLost(3, "closed"), Died("node died", node_lost=True)


HUNG = Died("no progress", step=7, stacks="the stacks of all ranks")


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
        ({0: LOST, 1: HUNG}, Action.RECOVER),
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


def test_a_step_that_is_not_beyond_the_last_is_no_progress_whoever_fails():
    """The first failure waits for nothing, also at step 0; the longest wait is kept however often it comes."""
    history, delays = History(), []
    for _ in range(len(BACKOFF_S) + 2):
        decision = ask({0: LOST, 1: GONE}, history, step=0, max_restarts=0)
        delays.append(decision.delay_s)
        history.note(GONE, 0, decision)
    assert delays == [*BACKOFF_S, BACKOFF_S[-1], BACKOFF_S[-1]]


def test_history_counts_what_went_on_and_keeps_each_cause():
    history = History()
    assert (history.num_restarts, history.num_charged) == (0, 0)
    for step, failures in enumerate([{0: LOST, 1: DEAD}, {0: LOST, 1: GONE}, {0: failure(is_permanent=True), 1: LOST}]):
        history.note(failures[find_first(failures)], step, ask(failures, history, step=step))
    assert history.causes == ["killed", "node died", "the same would happen again"]
    assert (history.num_restarts, history.num_charged) == (2, 1)  # neither counts one that ended the run


def test_a_hang_that_comes_again_at_its_step_ends_the_run():
    history = History()
    history.note(HUNG, 3, ask({0: LOST, 1: HUNG}, history))
    assert ask({0: LOST, 1: HUNG}, history, step=5).action is Action.GIVE_UP  # whatever others have reported since
    assert "twice at step 7" in ask({0: LOST, 1: HUNG}, history).reason
    elsewhere = Died("no progress", step=8, stacks="stacks")
    assert ask({0: LOST, 1: elsewhere}, history).action is Action.RECOVER


def test_where_a_hang_names_no_step_it_is_that_which_was_reported():
    history, hung = History(), Died("no progress", stacks="stacks")
    history.note(hung, 3, ask({0: LOST, 1: hung}, history))
    assert ask({0: LOST, 1: hung}, history, step=4).action is Action.RECOVER
    assert ask({0: LOST, 1: hung}, history, step=3).action is Action.GIVE_UP


def test_a_process_may_die_at_one_step_twice():
    history = History()
    history.note(DEAD, 3, ask({0: LOST, 1: DEAD}, history))
    assert ask({0: LOST, 1: DEAD}, history).action is Action.RECOVER


@pytest.mark.parametrize(
    ("failures", "is_of_it"),
    [
        ({0: failure(stage="recovery"), 1: LOST}, True),
        ({0: failure(stage="setup"), 1: LOST}, True),
        ({0: failure(), 1: failure(stage="recovery")}, False),
        ({0: LOST, 1: DEAD}, False),
    ],
)
def test_which_failures_came_while_another_was_handled(failures, is_of_it):
    assert is_of_recovery(failures) is is_of_it


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: LOST, 1: failure()}, 1),
        ({0: LOST, 1: DEAD}, 1),
        ({0: DEAD, 1: failure()}, 1),
        ({0: DEAD, 1: DEAD}, 0),
        ({0: DEAD, 1: HUNG}, 1),
    ],
)
def test_the_first_cause_is_what_the_user_reads(failures, rank):
    assert find_first(failures) == rank


def test_the_log_is_named_as_it_can_be_opened(s3_port):
    version = claim_version(Storage(uri_at(s3_port, uuid.uuid4().hex)), "run")
    run = Driver(version, Config(name="run"), 2, [], [])
    error = make_error({1: failure()}, run, "the same would happen again")
    assert error.log == version.storage.uri_of("logs/rank-1.log")
    assert f"Log: {error.log}" in str(error)


# ---- the error that the user reads


def make_run(tmp_path: Path, world_size: int = 2) -> Driver:
    version = claim_version(Storage(str(tmp_path)), "run")
    return Driver(version, Config(name="run", checkpoint=Checkpointing()), world_size, [], [])


def save(run: Driver) -> None:
    file = run.version.storage.write("checkpoints/step-00000002/model.pt", [b"weights"])
    run.handle(0, Saved("checkpoints/step-00000002", 2, 0, (file,), {}, False, 0.0, 0.0))
    run.wait_for_storage()


def test_an_exception_of_one_rank_is_told_with_all_that_helps(tmp_path):
    run = make_run(tmp_path, world_size=1)
    save(run)
    run.handle(0, Started("node-a", 1, "cpu"))
    cause = Failure("KeyError", "x", "Traceback of mine", 3, "train", None, evidence="failure.pt", notes=("do this",))
    error = make_error({0: cause}, run, "it came twice")
    assert str(error).splitlines() == [
        "rank 0 on node-a failed at step 3 (attempt 1; it came twice).",
        "Traceback of mine",
        "do this",
        f"Run that step again: raylight replay {run.version.storage.argument_of('failure.pt')}",
        "Resume with: raylight.fit(..., name='run', resume='last')",
    ]
    assert (error.rank, error.node, error.step, error.attempt, error.cause, error.log) == (
        0,
        "node-a",
        3,
        0,
        None,
        None,
    )


@pytest.mark.parametrize(("others", "said"), [(1, "1 other rank stopped"), (2, "2 other ranks stopped")])
def test_a_process_that_is_gone_is_told_with_its_reason_and_how_many_followed(tmp_path, others, said):
    run = make_run(tmp_path, 1 + others)
    text = str(make_error({others: DEAD} | dict.fromkeys(range(others), LOST), run, "used up"))
    assert "The process is gone: killed" in text
    assert f"{said} because of it." in text
    assert "Resume with" not in text  # there is no checkpoint
    assert "replay" not in text


def test_a_hang_is_an_error_of_its_own_and_shows_the_stacks(tmp_path):
    error = make_error({0: LOST, 1: HUNG}, make_run(tmp_path), "used up")
    assert isinstance(error, WorkerHung)
    assert error.step == 7
    assert str(error).endswith("the stacks of all ranks")
    assert type(make_error({0: LOST, 1: DEAD}, make_run(tmp_path), "used up")) is not WorkerHung


def test_what_failed_while_it_was_handled_is_told_if_it_is_another_thing(tmp_path):
    run, first = make_run(tmp_path), {0: LOST, 1: DEAD}
    another = Failure("ValueError", "y", "Traceback of the second", 5, "recovery", None, notes=("and that",))
    text = str(make_error(first, run, "used up", later={0: another, 1: LOST}))
    assert "While this was handled, rank 0 raised:\nTraceback of the second\nand that" in text
    assert "While" not in str(make_error(first, run, "used up", later={0: LOST, 1: DEAD}))
    mine = Failure("ValueError", "y", "Traceback of the first", 3, "train", None)
    assert "While" not in str(make_error({0: mine, 1: LOST}, run, "used up", later={0: another, 1: LOST}))
    other = Failure("ValueError", "z", "Traceback of the first", 5, "train", None)
    assert "While" in str(make_error({0: other, 1: LOST}, run, "used up", later={0: another, 1: LOST}))


def test_a_run_that_writes_nothing_names_no_files():
    run = Driver(None, Config(name="run"), 2, [], [])
    cause = Failure("KeyError", "x", "Traceback", 3, "train", None, evidence="failure.pt")
    error = make_error({0: cause, 1: LOST}, run, "used up")
    assert error.log is None
    assert not [word for word in ("Log:", "replay", "Resume") if word in str(error)]
