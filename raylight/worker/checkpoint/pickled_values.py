"""What user code puts into a checkpoint and only running code rebuilds: kept apart from all else, as bytes."""

from __future__ import annotations

import io

import torch

from raylight.contract.errors import CheckpointMismatch
from raylight.contract.kinds import StateDict, Value
from raylight.worker.checkpoint.plain_values import copy_plain
from raylight.worker.checkpoint.state import State

PICKLED_KEY = "pickled"
_ADVICE = "can only be loaded by running code from the checkpoint. If you trust it, pass weights_only=False"


def set_apart(values: StateDict) -> tuple[StateDict, dict[str, bytes], dict[str, str]]:
    """The plain ones as they are; the others pickled; and those that cannot be pickled, with the reason."""
    plain: StateDict = {}
    pickled: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for key, value in values.items():
        mistakes: list[str] = []
        copy_plain(value, str(key), lambda tensor, _: tensor, mistakes)
        if not mistakes:
            plain[key] = value
            continue
        try:
            pickled[key] = _pickle(value)
        except Exception as error:  # whatever the `__reduce__` of a person's class raises
            left_out[key] = f"{type(error).__name__}: {error}"
    return plain, pickled, left_out


def put_together(state: State) -> None:
    """Rebuilds what was set apart in its place. This runs code from the checkpoint."""
    pickled = state.module.pop(PICKLED_KEY, {})
    rebuilt = {part: {key: _unpickle(data) for key, data in held.items()} for part, held in pickled.items()}
    state.module["extra"] = {**state.module.get("extra", {}), **rebuilt.get("extra", {})}
    if "callbacks" in state.replicated:
        state.replicated["callbacks"] = {**state.replicated["callbacks"], **rebuilt.get("callbacks", {})}


def find_withheld(state: State, part: str) -> list[str]:
    """The keys of "extra" or "callbacks" that are still set apart."""
    return list(state.module.get(PICKLED_KEY, {}).get(part, {}))


class Withholding(dict[str, Value]):
    """A checkpoint as hooks see it: asked for what was set apart, it says why that is missing."""

    def __init__(self, values: StateDict, withheld: list[str]):
        super().__init__(values)
        self._withheld = withheld

    def __missing__(self, key: str) -> Value:
        if key in self._withheld:
            raise CheckpointMismatch(f"{key!r} of the checkpoint {_ADVICE}")
        raise KeyError(key)


def check_callbacks(state: State, keys: list[str]) -> None:
    """Raises CheckpointMismatch where the state of one of these callbacks is set apart."""
    if withheld := [key for key in find_withheld(state, "callbacks") if key in keys]:
        raise CheckpointMismatch(f"the state of {', '.join(withheld)} {_ADVICE}")


def _pickle(value: Value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpickle(data: bytes) -> Value:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
