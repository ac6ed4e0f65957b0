from __future__ import annotations

import pytest

from raylight.contract.messages import Progress, StageStarted
from raylight.driver.hangs import FLOOR_S, HangDetector, format_stacks, waits_for_peers

IN_TORCH = '  File "/site-packages/torch/autograd/graph.py", line 1, in backward\n'
IN_USER = '  File "/home/me/train.py", line 3, in training_step\n'
IN_STDLIB = '  File "/usr/lib/python3.11/threading.py", line 3, in wait\n'
LOOP = 'Thread T:\n  File "/site-packages/raylight/worker/task_runner.py", line 1, in run\n'


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(timeout_s: float | None) -> tuple[HangDetector, Clock]:
    clock = Clock()
    return HangDetector(timeout_s, clock), clock


def train(detector: HangDetector, clock: Clock, seconds: float, num_steps: int, ranks: int = 2) -> None:
    for step in range(num_steps):
        clock.now += seconds
        assert not detector.look({rank: ("train", step, 0.0) for rank in range(ranks)})


def test_all_ranks_silent_for_longer_than_the_limit_hang():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10)
    clock.now += 4.9
    assert not detector.look({rank: ("train", 9, 4.9) for rank in (0, 1)})
    clock.now += 0.2
    assert detector.look({rank: ("train", 9, 5.1) for rank in (0, 1)})


def test_while_one_rank_makes_progress_nobody_hangs():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10)
    clock.now += 60.0
    assert not detector.look({0: ("train", 9, 60.0), 1: ("validate", 9, 0.5)})


def test_a_rank_that_does_not_answer_is_silent_since_it_last_did():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10)
    clock.now += 5.1
    assert detector.look({0: ("train", 9, 5.1), 1: None})


@pytest.mark.parametrize("stage", ["first training batch", "first batch of validate"])
def test_what_comes_first_may_take_ten_times_as_long(stage):
    detector, clock = make(5.0)
    assert not detector.look({0: (stage, 0, 0.0)})
    clock.now += 49.0
    assert not detector.look({0: (stage, 0, 49.0)})
    clock.now += 2.0
    assert detector.look({0: (stage, 0, 51.0)})


def test_a_later_first_batch_may_take_ten_times_what_the_first_one_took():
    detector, clock = make(5.0)
    detector.see(StageStarted("train", 0, 0, 10))
    clock.now += 0.1
    detector.see(Progress("train", 0, 1, 1, 2))
    detector.begin()  # after a failure
    assert not detector.look({0: ("first training batch", 1, 0.0)})
    clock.now += 9.9  # of a new process
    assert not detector.look({0: ("first training batch", 1, 9.9)})
    clock.now += 0.2
    assert detector.look({0: ("first training batch", 1, 10.1)})

    detector, clock = make(5.0)
    detector.see(StageStarted("train", 0, 0, 10))
    clock.now += 2.0  # it compiles
    detector.see(Progress("train", 0, 1, 1, 2))
    detector.begin()
    detector.look({0: ("first training batch", 1, 0.0)})
    clock.now += 19.0
    assert not detector.look({0: ("first training batch", 1, 19.0)})
    clock.now += 2.0
    assert detector.look({0: ("first training batch", 1, 21.0)})


@pytest.mark.parametrize("stage", ["end", "start"])
def test_hooks_at_both_ends_may_take_minutes(stage):
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10, ranks=1)
    detector.look({0: (stage, 9, 0.0)})
    clock.now += FLOOR_S - 1.0
    assert not detector.look({0: (stage, 9, FLOOR_S - 1.0)})
    clock.now += 2.0
    assert detector.look({0: (stage, 9, FLOOR_S + 1.0)})


def test_a_rank_that_has_never_answered_hangs_in_the_end():
    detector, clock = make(5.0)
    clock.now += FLOOR_S - 1.0
    assert not detector.look({0: None, 1: None})
    clock.now += 2.0
    assert detector.look({0: None, 1: None})


def test_a_start_may_take_minutes():
    detector, clock = make(5.0)
    detector.look({0: ("start", 0, 0.0)})
    clock.now += FLOOR_S - 1.0
    assert not detector.look({0: ("start", 0, FLOOR_S - 1.0)})
    clock.now += 2.0
    assert detector.look({0: ("start", 0, FLOOR_S + 1.0)})


def test_saving_is_no_hang():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10)
    detector.look({0: ("save", 9, 0.0), 1: ("train", 9, 0.0)})
    clock.now += 3600.0
    assert not detector.look({0: ("save", 9, 3600.0), 1: ("train", 9, 3600.0)})


def test_without_a_timeout_the_limit_follows_the_longest_silence_of_the_run():
    detector, clock = make(None)
    train(detector, clock, 1.0, 10)
    clock.now += FLOOR_S - 1
    assert not detector.look({0: ("train", 9, FLOOR_S - 1)})
    clock.now += 2
    assert detector.look({0: ("train", 9, FLOOR_S + 1)})

    detector, clock = make(None)
    train(detector, clock, 60.0, 10, ranks=1)  # so that 20 minutes are nothing unusual
    clock.now += 1100.0
    assert not detector.look({0: ("train", 9, 1100.0)})
    clock.now += 200.0
    assert detector.look({0: ("train", 9, 1300.0)})


def test_answers_about_one_sign_of_life_are_one_however_often_it_is_asked_for():
    """Each answer takes its time, and with each the moment moves a little; the silence does not begin again."""
    detector, clock = make(5.0)
    detector.look({0: ("train", 9, 0.0)})
    for _ in range(60):
        clock.now += 0.1
        is_hung = detector.look({0: ("train", 9, clock.now - 1000.009)})
    assert is_hung
    detector.look({0: ("train", 9, 0.0)})  # the same step, and another sign of life
    clock.now += 4.0
    assert not detector.look({0: ("train", 9, 4.0)})


def test_a_rank_that_waits_for_storage_alone_is_no_hang():
    detector, clock = make(5.0)
    detector.look({0: ("save", 9, 0.0)})
    clock.now += 3600.0
    assert not detector.look({0: None})


def test_ranks_that_have_not_begun_and_runs_without_ranks_do_not_hang():
    detector, clock = make(0.1)
    clock.now += 100.0
    assert not detector.look({0: None, 1: None})
    assert not detector.look({})


def test_the_rank_that_does_not_wait_for_others_is_to_blame():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10, ranks=3)
    stacks = {0: LOOP + IN_USER + IN_TORCH, 1: LOOP + IN_USER + IN_STDLIB, 2: LOOP + IN_USER + IN_TORCH}
    clock.now += 6.0
    assert detector.find_stuck(stacks) == (1, "no sign of life for 6.0 s in train at step 9", 9)


def test_of_ranks_that_all_wait_the_one_behind_is_to_blame():
    detector, clock = make(5.0)
    train(detector, clock, 0.1, 10)
    detector.look({0: ("train", 10, 0.0), 1: ("train", 9, 0.0)})
    assert detector.find_stuck({0: LOOP + IN_TORCH, 1: LOOP + IN_TORCH})[0] == 1


def test_a_rank_that_has_never_answered_is_to_blame_first():
    detector, clock = make(5.0)
    detector.look({1: ("train", 0, 0.0)})
    clock.now += 6.0
    stacks = {0: LOOP + IN_TORCH, 1: LOOP + IN_TORCH}
    assert detector.find_stuck(stacks) == (0, "no sign of life for 0.0 s in start at step 0", 0)


def test_only_the_thread_of_the_loop_tells_whether_a_rank_waits():
    assert not waits_for_peers(LOOP + IN_TORCH + IN_USER)
    assert not waits_for_peers(LOOP + IN_USER + "\n\nThread B:\n" + IN_TORCH)


def test_stacks_are_shown_by_rank():
    assert format_stacks({1: "b\n\n", 0: "a"}) == "---- rank 0\na\n---- rank 1\nb"


def test_a_rank_without_a_python_stack_is_to_blame():
    assert not waits_for_peers("no answer within 10 s: it is in native code that does not let Python run")
    assert waits_for_peers("Thread A:\n" + IN_USER + "\n\n" + LOOP + IN_TORCH)
