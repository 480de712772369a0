"""Trackers for tests, which are imported by the process of a tracker: they note what they are told.

Without anything that takes long to import.
"""

import time
from pathlib import Path

NOTES = Path("notes.txt")


class Fake:
    keeps_model = True

    def __init__(self, subject):
        self.note("open", subject.run_name)

    def note(self, *what) -> None:
        with NOTES.open("a") as file:
            file.write(repr(what) + "\n")

    def scalars(self, step: int, values: dict) -> None:
        self.note("scalars", step, values)

    def images(self, step: int, name: str, images) -> None:
        self.note("images", name, images.shape)

    def conclude(self, step: int, figures: dict, model: Path) -> None:
        self.note("conclude", step, figures, str(model))

    def close(self) -> None:
        self.note("close")


def fail(*_) -> None:
    raise OSError(28, "No space left on device")


class NeverOpens(Fake):
    __init__ = fail


class NeverWrites(Fake):
    scalars = fail


class NeverCloses(Fake):
    close = fail


class Hangs(Fake):
    def scalars(self, *_) -> None:
        time.sleep(600)
