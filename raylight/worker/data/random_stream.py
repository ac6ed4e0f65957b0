"""Random numbers of the data: seeds that are a function of where they are used, and streams of their own."""

from __future__ import annotations

import hashlib
import random
from types import TracebackType

import numpy as np
import torch

from raylight.contract.seeding import RNGState, rng_state, set_rng_state


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits that depends on every part and on nothing else, on any machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_process(seed: int) -> None:
    """Seeds random, numpy and torch on the CPU; the GPUs are left alone, since data is drawn on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class RandomStream:
    """Global random numbers that a `with` block draws from, apart from those of the process.

    What the block draws continues from what an earlier block of the same stream drew, and the process finds its own
    numbers afterwards as it left them. Entering and leaving costs some 60 µs, most of it Python's 625 words.
    """

    def __init__(self, seed: int):
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._python = random.Random(seed).getstate()
        # Generators are exchanged, not states: reading numpy's state takes 100 µs. The price: numpy forgets the second
        # of a pair of normal numbers that np.random.randn had in store.
        self._numpy: np.random.BitGenerator = np.random.MT19937(seed)

    def __enter__(self) -> RandomStream:
        self._exchange()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exchange()

    def _exchange(self) -> None:
        mine = self._torch, self._python, self._numpy
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
        torch.set_rng_state(mine[0])
        random.setstate(mine[1])
        np.random.set_bit_generator(mine[2])  # type: ignore[attr-defined]

    def state_dict(self) -> RNGState:
        """Plain values that a checkpoint can hold; takes some 0.3 ms."""
        with self:
            state = rng_state()
        state.pop("cuda", None)
        return state

    def load_state_dict(self, state: RNGState) -> None:
        with self:
            set_rng_state(state)
