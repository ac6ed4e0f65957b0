"""Random numbers: seeding them, and taking their state as plain values that any checkpoint can hold."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.rank_zero import rank_zero_info

MAX_SEED = 2**32 - 1  # numpy's limit
_SEED_VARIABLE = "PL_GLOBAL_SEED"  # Lightning's name, so that launch scripts that set it go on working

RNGState = dict[str, Any]
"""The return value of `rng_state`."""

_last_seed: int | None = None


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seeds torch (CPU and GPUs), numpy and random of this process and returns the seed.

    `seed` is from 0 to 2**32 - 1; None takes the environment's PL_GLOBAL_SEED, else 0. A later `fit` without a `seed`
    of its own takes this one for the order of samples, and its hooks continue the script's random numbers. `workers` is
    accepted and changes nothing: loader workers are always seeded. Raises InvalidArguments.
    """
    global _last_seed
    given: int | str = os.environ.get(_SEED_VARIABLE, 0) if seed is None else seed
    source = _SEED_VARIABLE if seed is None else "seed"
    try:
        seed = int(given)
    except (TypeError, ValueError):
        raise InvalidArguments(f"{source}={given!r} is no whole number") from None
    if not 0 <= seed <= MAX_SEED:
        raise InvalidArguments(f"{source}={given!r} is out of range; allowed is 0 to {MAX_SEED}")
    seed_process(seed)
    _last_seed = seed
    if verbose:
        rank_zero_info(f"Seed set to {seed}")
    return seed


def seed_process(seed: int) -> None:
    """Seeds the same generators for one rank of a run; `seed` may be larger, such as the run's plus the rank. A later
    `fit` does not take it."""
    random.seed(seed)
    np.random.seed(seed % (MAX_SEED + 1))
    torch.manual_seed(seed)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Gives one step of one rank random numbers of its own, so that a worker which replaces another in the middle of a
    run draws what that one would have drawn. Costs about 15 microseconds."""
    mixed = (seed * 0x9E3779B97F4A7C15 + rank * 0xC2B2AE3D27D4EB4F + step * 0x165667B19E3779F9) & (2**63 - 1)
    mixed ^= mixed >> 31
    random.seed(mixed)
    np.random.seed(mixed & MAX_SEED)
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(mixed)


def last_seed() -> int | None:
    """The last seed of `seed_everything` in this process; None if it was not called."""
    return _last_seed


def rng_state(with_gpu: bool = True) -> RNGState:
    """The state of random, numpy, torch and, if wanted, this process' GPU: tensors, numbers, strings, lists and dicts
    only, so that `torch.load(weights_only=True)` reads it."""
    version, words, gauss = random.getstate()
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": _to_plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    # The current device alone: asking for all of them would create a context on each.
    if with_gpu and torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: RNGState) -> None:
    """Puts back what `rng_state` returned; a GPU's state is left out if there is no GPU."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(_to_numpy(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Restores the state of all generators on exit, so that code inside draws without a trace."""
    state = rng_state(include_cuda)
    try:
        yield
    finally:
        set_rng_state(state)


def _to_plain(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    # int64: torch stores uint32, but cannot copy or compare it on every device.
    return torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value


def _to_numpy(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    return value.cpu().numpy().astype(np.uint32) if isinstance(value, torch.Tensor) else value
