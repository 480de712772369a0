"""Lines of a name, a number and ok or FAIL, of which none stops the others, in limited time."""

import contextlib
import time
from collections.abc import Iterator

LIMITS = {"minutes": (0.1, 60)}


class Report:
    """What was found so far.

    Args:
        minutes: after these, nothing more is begun.

    Attributes:
        failed: the names of lines that say FAIL.
    """

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes
        self.failed = []

    def line(self, name: str, number: float, unit: str = "", ok: bool = True) -> None:
        """Print a figure, and whether it is as it should be."""
        if not ok:
            self.failed.append(name)
        figure = f"{number:.4g} {unit}".rstrip()
        print(f"{name:62} {figure:>18}  {'ok' if ok else 'FAIL'}", flush=True)

    def leave_out(self, name: str, reason: str) -> None:
        print(f"{name:62} {'-':>18}  left out: {reason}", flush=True)

    def has_time(self, seconds: float = 0) -> bool:
        return time.monotonic() + seconds < self.deadline

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within this block, whatever is raised is a line that says FAIL."""
        try:
            yield
        except Exception as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            self.failed.append(name)
            print(f"{name:62} {'-':>18}  FAIL: {text[:200]}", flush=True)

    def close(self) -> None:
        """Print what failed.

        Raises:
            SystemExit: with status 1, where anything did.
        """
        if self.failed:
            print(f"FAIL: {', '.join(self.failed)}")
            raise SystemExit(1)
        print("all ok")
