"""Take a trained model out into the world.

    python -m tools.exchange publish --run_name=my_run --to=my_model

Reading order: publish, main.
"""

import checkpoints
import command_line
import ddpm
from utils import UserError


def publish(run_name: str = "", to: str = "") -> None:
    """Cut a run down to what sampling needs: a small file to give away.

        python -m tools.exchange publish --run_name=my_run --to=my_model

    Writes models/TO/checkpoint.pt: the averaged weights in half precision, the settings and the log. It is a run like
    any other to sample from, and to begin a new run from with --init_from, but not one to go on with.

    Args:
        run_name: the run to publish, a folder in models/.
        to: the new run's name.

    Raises:
        UserError: there is no such run, there is already one called TO, or half precision cannot hold its weights.
    """
    for flag, name in (("run_name", run_name), ("to", to)):
        if not name:
            raise UserError(f"--{flag} is missing")
        command_line.check_name(flag, name)
    stored = ddpm.load_run(run_name)
    if checkpoints.exists(to):
        raise UserError(f"--to={to}: models/{to} holds a run; delete it, or choose another name")
    average = {name: weight.half().contiguous() for name, weight in stored["average"].items()}
    if not all(weight.isfinite().all() for weight in average.values()):
        raise UserError(f"a weight of {run_name} is beyond 65,504, the largest number of half precision")
    settings = stored["settings"] | {"run_name": to}
    published = {name: stored[name] for name in checkpoints.TO_SAMPLE} | {"settings": settings, "average": average}
    checkpoints.save(to, **published)
    path = checkpoints.paths_of(to)[0]
    print(
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {sum(weight.numel() for weight in average.values()):,} weights"
    )


def main() -> None:
    command_line.run_command_line("-m tools.exchange", {"publish": publish}, {})


if __name__ == "__main__":
    main()
