"""The file of an experiment: finished trials by key, each written before the next one starts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .. import outputs

FORMAT = "ezo-experiment-1"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of processes that ask for one folder one at a time, where the system has locks of folders."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which ends the lock


class Store:
    """``DIR/NAME.json``.

    Args:
        folder: made if it is not there.
        name: of the experiment.
        quick: whether its trials are cut short; a file is of one kind.

    Raises:
        ValueError: a folder that cannot be made or written to; a file that is corrupt, of another program or experiment, or
            of the other kind. Says which.
    """

    def __init__(self, folder: Path, name: str, quick: bool) -> None:
        outputs.make_folder("--out", folder)
        self.path, self.name, self.quick = folder / f"{name}.json", name, quick
        outputs.check_writable("--out", self.path)
        self.trials: dict[str, dict] = self._read() if self.path.exists() else {}
        self.table: list[dict] = []
        self.notes: list[str] = []

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: corrupt: {error}; move it away to start anew") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{self.path}: not a file of the format {FORMAT}; it is left alone")
        if found.get("experiment") != self.name:
            raise ValueError(f"{self.path}: holds the experiment {found.get('experiment')!r}, not {self.name!r}")
        if found.get("quick") is not self.quick:
            kinds = ("full trials", "trials cut short by --quick")
            raise ValueError(
                f"{self.path}: holds {kinds[bool(found.get('quick'))]}, which {kinds[self.quick]} cannot be mixed with: "
                "another --out is needed"
            )
        trials = found.get("trials")
        whole = isinstance(trials, dict) and all(
            isinstance(t, dict) and isinstance(t.get("result"), dict) and isinstance(t.get("timings"), dict)
            for t in trials.values()
        )
        if not whole:
            raise ValueError(f"{self.path}: corrupt: its trials have no result; move it away to start anew")
        return trials

    def add(self, key: str, record: dict) -> None:
        """File a finished trial; whatever happens, the file holds the old ones or all."""
        self.trials[key] = outputs.jsonable(record)
        self.write()

    def write(self) -> None:
        """Write the trials of this process and those that another one, with other arms or seeds, has filed since."""
        with locked(self.path.parent):
            if self.path.exists():
                self.trials = {**self._read(), **self.trials}
            outputs.write_lines(
                self.path,
                {
                    "format": FORMAT,
                    "experiment": self.name,
                    "quick": self.quick,
                    "table": self.table,
                    "notes": self.notes,
                    "trials": self.trials,
                },
            )
