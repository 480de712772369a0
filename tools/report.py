"""A page per run that a browser opens, and one of all runs side by side.

    python -m tools.report
    python -m tools.report --run_name=my_run

`train` writes the page of its run by itself; this is for runs of older versions, and for samples
and evaluations that have come since.
"""

import ddpm
from machinery import checkpoints, command_line, page, runs
from machinery.basics import UserError


def facts_of(run_name: str) -> dict:
    """What a run's checkpoint tells, for its page."""
    stored = ddpm.load_run(run_name)
    weights = sum(weight.numel() for weight in stored["average"].values())
    return {name: stored[name] for name in page.FACTS if name in stored} | {"weights": weights}


def report(run_name: str = "") -> None:
    """Write pages that a browser opens: of each run, and of all runs side by side.

        python -m tools.report

    Writes results/RUN/index.html and results/index.html. They need no server and no network.

    Args:
        run_name: the run to write a page of, a folder in models/; if left out, all of them.

    Raises:
        UserError: there is no such run, or none at all.
    """
    names = checkpoints.run_names()
    if run_name:
        command_line.check_name("run_name", run_name)
        facts_of(run_name)  # or refuse it
    elif not names:
        runs.runs_table()  # refuses, and says where it looked
    found = {}
    for name in names:
        try:
            found[name] = facts_of(name)
        except UserError as error:
            print(f"left out: {error}")
    index = page.write_index(found)
    for name, stored in found.items():
        if run_name in ("", name):
            print(page.write_page(name, stored))
    print(index)


def main() -> None:
    command_line.run_command_line("-m tools.report", {"report": report}, {})


if __name__ == "__main__":
    main()
