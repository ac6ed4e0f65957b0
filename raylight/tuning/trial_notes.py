"""Notes of a trial in the folder of its run: which version is its own, and what ended it for good."""

from __future__ import annotations

import json
from typing import Any

from raylight.contract import errors
from raylight.contract.errors import MissingFile, RaylightError, WorkerFailed
from raylight.storage.damage import set_aside
from raylight.storage.filesystem import Storage
from raylight.storage.json_text import parse_object

FOLDER = "trials"


class Notes:
    """Of one trial; `run` is the storage of the run. Imports neither torch nor the user's code."""

    def __init__(self, run: Storage, trial_id: str):
        self._folder, self._file = run.child(FOLDER), f"{trial_id}.json"

    def read(self) -> dict[str, Any]:
        """Empty if the trial is new."""
        try:
            facts = parse_object(self._folder.read_bytes(self._file))
            if not isinstance(facts.get("version", 0), int) or not _is_error(facts.get("error")):
                raise ValueError("an entry is of the wrong kind")
        except MissingFile:
            return {}
        except ValueError as error:
            lost = "The trial begins from the start, in a version of its own."
            set_aside(self._folder, self._file, str(error), lost)
            return {}
        return facts

    def write(self, **facts: object) -> None:
        """Adds to what is there."""
        self._folder.write(self._file, [json.dumps({**self.read(), **facts}).encode()])

    def write_error(self, error: BaseException, session: str) -> None:
        kind = type(error).__name__
        text = str(error) if isinstance(error, RaylightError) else f"{kind}: {error}"
        self.write(error={"kind": kind, "text": text, "session": session})

    def raise_again(self, session: str) -> None:
        """A mistake of user code comes again: if Tune tries the trial once more, it ends at once. A resumed
        sweep is another session, and tries in earnest."""
        error = self.read().get("error")
        if error is not None and error["session"] == session:
            kind = getattr(errors, error["kind"], WorkerFailed)
            raise kind(error["text"])


def _is_error(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("kind", "text", "session"))
