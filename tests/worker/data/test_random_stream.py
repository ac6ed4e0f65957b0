from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from raylight.contract.seeding import rng_state
from raylight.worker.data.random_stream import RandomStream, derive_seed, seed_process


def draw():
    return [torch.rand(()).item(), np.random.rand(), random.random()]


def test_a_stream_goes_on_where_it_was_and_the_process_too():
    seed_process(1)
    own = [draw() for _ in range(4)]
    stream = RandomStream(7)
    with stream:
        expected = [draw() for _ in range(4)]
    seed_process(1)
    stream, mine, its = RandomStream(7), [], []
    for _ in range(4):
        mine.append(draw())
        with stream:
            its.append(draw())
    assert mine == own
    assert its == expected


def test_what_is_raised_inside_leaves_the_process_as_it_was():
    before = rng_state()
    stream = RandomStream(1)

    def fail():
        with stream:
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert str(rng_state()) == str(before)


def test_the_state_of_a_stream_is_plain_and_brings_it_back(tmp_path):
    stream = RandomStream(3)
    with stream:
        draw()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    with stream:
        expected = draw()
    other = RandomStream(4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with other:
        assert draw() == expected


def test_derived_seeds_are_fixed_and_differ():
    assert derive_seed(1, 2, "order") == derive_seed(1, 2, "order") == 234747438415144798
    seeds = {derive_seed(seed, epoch, name) for seed in range(10) for epoch in range(10) for name in ("a", "b")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
