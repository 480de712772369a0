"""Several processes at one command: each function by itself, and the program under torchrun.

    python -m pytest tests/test_processes.py
    torchrun --standalone --nproc_per_node=2 tests/test_processes.py train ...   # ddpm.py without
    bfloat16 EXACT=1 torchrun ...                                                         # its
    training in float64

Started as a program, this file is a process that the tests look at: `PART WORD` is one of the parts
below, anything else a command line of ddpm.py.
"""

import contextlib
import csv
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# pytest has done so, torchrun has not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TINY, compute_in_float64, files_below, paint

import ddpm
from machinery import checkpoints, devices, processes
from machinery.basics import UserError

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


# ---- processes to look at ------------------------------------------------------------------------


def uneven(rank: int) -> list[torch.Tensor]:
    """Tensors of several types, shapes and layouts, whose sum hangs on the order of the terms."""
    generator = torch.Generator().manual_seed(rank)
    long, image = (
        torch.randn(1000, generator=generator),
        torch.randn(2, 3, 4, 5, generator=generator),
    )
    return [
        long,
        image.to(memory_format=torch.channels_last),
        torch.tensor(rank + 0.5, dtype=torch.float64),
    ]


def part_together() -> dict:
    """What every function that needs the others gives, on this process."""
    rank, came = processes.rank(), []
    tensors = uneven(rank)
    processes.add_up(tensors)
    found = {
        "sums": tensors,
        "share": processes.share(10),
        "device": str(processes.join(torch.device("cpu"))),
    }
    found["largest"] = processes.largest(rank, -rank, 0.1)
    found["gather"] = processes.gather({"rank": rank, "long": "x" * rank})
    found["from_first"] = processes.from_first([rank, None])
    with processes.first_alone():
        if rank == 0:
            time.sleep(0.3)
        came.append(time.monotonic())
    time.sleep(0.3 * (rank == 1))
    came.append(time.monotonic())
    processes.wait()
    return found | {"came": [*came, time.monotonic()]}


def part_killed() -> dict:
    """What the functions raise on the first process once the other one is no more."""
    found = {}
    calls = {
        "add_up": lambda: processes.add_up([torch.ones(100_000)]),
        "largest": lambda: processes.largest(1.0),
        "gather": lambda: processes.gather(1),
        # what is sent first gets through
        "from_first": lambda: [processes.from_first(1) for _ in range(10)],
        "wait": processes.wait,
    }
    with contextlib.suppress(processes.Abandoned):
        while True:
            calls["add_up"]()
            Path(f"busy_{processes.rank()}").touch()
    for name, call in calls.items():
        try:
            call()
        except BaseException as error:
            found[name] = repr(error)
    return found


def part_failing() -> dict:
    """The first process fails while it is alone."""
    with processes.first_alone():
        if processes.is_first():
            raise UserError("the first has failed")
    return {}


def main() -> None:
    if sys.argv[1] != "PART":
        Path(f"pid_{processes.rank()}").write_text(f"{os.getpid()}\n")
        time.sleep(float(os.environ.get("LATE", 0)) * processes.is_first())
        devices.has_bfloat16 = lambda device: False  # its rounding would hide what a fault changes
        if "EXACT" in os.environ:
            compute_in_float64(setattr)
        return ddpm.main()
    torch.set_num_threads(1)
    try:
        processes.join(torch.device("cpu"))
        found = globals()[f"part_{sys.argv[2]}"]()
        Path(f"found_{processes.rank()}").write_bytes(pickle.dumps(found))
    finally:
        processes.leave()


class Ended:
    """How a process ended: exit status, standard output, standard error."""

    def __init__(self, process: subprocess.Popen):
        out, self.err = process.communicate(timeout=60)
        lines = out.splitlines(keepends=True)
        # PyTorch 2.10 tells of every connection
        self.out = "".join(line for line in lines if not line.startswith("[Gloo]"))
        self.status = process.returncode


def start_words(command: list[str], place: Path, **environment) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *command], cwd=place, env=environment, **streams)


def start_all(count: int, words: list[str], place: Path) -> list[subprocess.Popen]:
    """Start this file in several processes as torchrun does, but as children of our own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start_words([__file__, *words], place, **shared, **numbers) for numbers in own]


def start_torchrun(words: list[str], place: Path, **environment) -> subprocess.Popen:
    """Start `ddpm.py WORDS...` in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start_words([*launcher, __file__, *words], place, **environment)


def found_by(count: int, place: Path) -> list:
    return [pickle.loads((place / f"found_{rank}").read_bytes()) for rank in range(count)]


def own_lines(ended: Ended) -> list[str]:
    """What the program itself wrote to standard error; torchrun writes there, too."""
    return [line for line in ended.err.splitlines() if line.startswith("ddpm.py: ")]


def kill(rank: int, place: Path) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have done its work
        os.kill(int((place / f"pid_{rank}").read_text()), signal.SIGKILL)


# ---- one process ---------------------------------------------------------------------------------


def test_one_process_needs_no_others():
    tensor = torch.tensor([1.0, 2.0])
    processes.add_up([tensor])
    with processes.first_alone():
        processes.wait()
    assert tensor.tolist() == [1, 2]
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    assert processes.join(torch.device("cuda:3")) == torch.device("cuda:3")
    assert (processes.largest(1, -2.5), processes.gather("a"), processes.from_first("b")) == (
        (1, -2.5),
        ["a"],
        "b",
    )
    assert processes.share(7) == range(7)
    processes.leave()
    assert not torch.distributed.is_initialized()


def as_one_of(monkeypatch, rank: int, count: int) -> None:
    """Have this process take itself for one of several, on one machine."""
    for name, number in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
    }.items():
        monkeypatch.setenv(name, str(number))


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_shares_laid_end_to_end_are_the_whole(total, count, monkeypatch):
    shares = []
    for rank in range(count):
        as_one_of(monkeypatch, rank, count)
        shares.append(processes.share(total))
    sizes = [len(share) for share in shares]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


@pytest.mark.parametrize(
    "device, gpus, advice",
    [
        ("cuda:1", 2, "--device=cuda gives each a GPU of its own"),
        ("mps", 0, "--device=cpu works everywhere"),
        ("cuda", 1, "--nproc_per_node=1"),
    ],
)
def test_a_device_that_processes_would_have_to_share_is_refused(device, gpus, advice, monkeypatch):
    as_one_of(monkeypatch, 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=f"--device={device}.*{advice}"):
        processes.join(torch.device(device))
    assert not torch.distributed.is_initialized()


GLOO = "/x/third_party/gloo/gloo/transport/tcp/pair.cc"
MISTAKES = ["The size of tensor a (2) must match", "Tensor list input to gloo cannot be empty"]
MISTAKES += [f"[enforce fail at {GLOO}:446] op.preamble.length <= op.nbytes"]


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_of_our_own_is_not_taken_for_the_end_of_another_process(text):
    with pytest.raises(RuntimeError, match=re.escape(text)), processes.noticing_an_end():
        raise RuntimeError(text)


ENDS = [RuntimeError(f"[{GLOO}:561] Connection closed by peer [127.0.0.1]:1")]
ENDS += [
    torch.distributed.DistBackendError(
        "NCCL error: ncclRemoteError: A call failed possibly due to a network"
    )
]
ENDS += [torch.distributed.DistNetworkError("failed to recv, got 0 bytes")]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_the_end_of_another_process_is_told_by_name(error):
    told = pytest.raises(processes.Abandoned, match="another process of this command has ended")
    with told, processes.noticing_an_end():
        raise error


# ---- a share in parts ----------------------------------------------------------------------------

# As CUDA's allocator, cuBLAS, Apple's GPU, a CPU and NumPy tell of it.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
]
OUT_OF_MEMORY += [
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    MemoryError("Unable to allocate"),
]
OUT_OF_MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize(
    "size, failing, sizes, later",
    [
        ("auto", {}, [7], [7]),
        ("auto", {0, 2}, [7, 4, 3, 2, 2, 2, 1], [2, 2, 2, 1]),
        (3, {}, [3, 3, 1], [3, 3, 1]),
    ],
)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:4])
def test_a_share_goes_through_in_parts_that_fit_into_memory(size, failing, sizes, later, error):
    """The tries of these numbers run out of memory, one of them after a part has been done."""
    done, tried = [], []

    def work(part: slice) -> None:
        tried.append(part.stop - part.start)
        if len(tried) - 1 in failing:
            raise error
        done.extend(range(10)[part])

    parts = devices.MicroBatches(range(2, 9), size)
    parts.run(work, reset=done.clear)
    assert (done, tried) == (list(range(2, 9)), sizes)
    done.clear()
    parts.run(work, reset=done.clear)
    assert (done, tried) == (list(range(2, 9)), sizes + later)


def test_another_error_is_not_taken_for_too_little_memory():
    def work(part: slice) -> None:
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    with pytest.raises(RuntimeError, match="dtype"):
        devices.MicroBatches(range(4), "auto").run(work, reset=lambda: pytest.fail("tried again"))


@pytest.mark.parametrize("size, tries", [(3, [3]), ("auto", [4, 2, 1])])
def test_memory_that_is_too_little_for_an_image_or_for_what_was_asked_is_an_error(size, tries):
    tried = []

    def work(part: slice) -> None:
        tried.append(part.stop - part.start)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        devices.MicroBatches(range(4), size).run(work, reset=list)
    assert tried == tries


# ---- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What three processes found when they called every function.

    They are so many that the order of additions matters.
    """
    place = tmp_path_factory.mktemp("together")
    ends = [Ended(process) for process in start_all(3, ["PART", "together"], place)]
    assert [(end.status, end.out, end.err) for end in ends] == [(0, "", "")] * 3
    return found_by(3, place)


def test_added_up_tensors_are_the_sums_and_the_same_bits_everywhere(together):
    terms = [uneven(rank) for rank in range(3)]
    for number, sums in enumerate(zip(*(found["sums"] for found in together), strict=True)):
        expected = sum(term[number].double() for term in terms)
        for found in sums:
            assert (found.dtype, found.stride()) == (
                terms[0][number].dtype,
                terms[0][number].stride(),
            )
            assert torch.equal(found, sums[0])
            # float32, numbers up to 10
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_the_largest_is_found_number_by_number(together):
    assert [found["largest"] for found in together] == [(2.0, 0.0, 0.1)] * 3


def test_objects_are_gathered_by_rank_or_taken_from_the_first(together):
    everything = [{"rank": rank, "long": "x" * rank} for rank in range(3)]
    assert [found["gather"] for found in together] == [everything] * 3
    assert [found["from_first"] for found in together] == [[0, None]] * 3


def test_each_process_knows_its_share_and_joins_once(together):
    assert [found["share"] for found in together] == [range(0, 4), range(4, 7), range(7, 10)]
    assert [found["device"] for found in together] == ["cpu"] * 3


def test_nobody_goes_on_before_the_first_has_been_alone_or_all_have_come(together):
    # one clock on one machine
    alone, before, after = zip(*(found["came"] for found in together), strict=True)
    assert alone[0] <= min(alone[1:])
    assert max(before) <= min(after)


@posix
def test_the_death_of_a_process_is_noticed_by_whatever_the_others_do(place):
    started = start_all(2, ["PART", "killed"], place)
    while not Path("busy_1").exists():
        assert started[1].poll() is None, started[1].communicate()
        time.sleep(0.05)
    started[1].kill()
    survivor, victim = (Ended(process) for process in started)
    assert (victim.status, survivor.status, survivor.err) == (-signal.SIGKILL, 0, "")
    told = "Abandoned('another process of this command has ended; its message says why')"
    assert found_by(1, place) == [
        dict.fromkeys(("add_up", "largest", "gather", "from_first", "wait"), told)
    ]


def test_if_the_first_fails_alone_the_others_are_abandoned(place):
    first, other = (Ended(process) for process in start_all(2, ["PART", "failing"], place))
    assert (first.status, other.status, files_below(place)) == (1, 1, set())
    assert first.err.endswith("UserError: the first has failed\n")
    assert "processes.Abandoned: another process of this command has ended" in other.err


# ---- the program under torchrun ------------------------------------------------------------------

TRAIN = [
    "train",
    "--dataset=pictures",
    "--run_name=run",
    "--noise_steps=8",
    "--lr_decay=none",
    "--warmup=0",
]
# without it, how far a run will go changes nothing
TRAIN += [word for word in TINY if not word.startswith("--warmup")]
KILLS = int(os.environ.get("KILLS", "1"))  # KILLS=20 kills as often


@pytest.fixture
def pictures(place, monkeypatch) -> Path:
    """A place with ten pictures, in which this process computes in float32.

    So do those that it starts.
    """
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    return paint(place / "pictures").parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, list]:
    """What 50 steps of one process, never stopped, come to."""
    place = paint(tmp_path_factory.mktemp("whole") / "pictures").parent
    ended = Ended(start_words([__file__, *TRAIN, "--epochs=20"], place, EXACT="1"))
    assert ended.status == 0, ended.err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return learned_by("run")


def learned_by(run_name: str) -> tuple[dict, list]:
    """A run's weights, and its log without the speeds."""
    stored = checkpoints.load(run_name)
    with open(Path("results", run_name, "log.csv")) as file:
        rows = [[float(value) for value in row[:-1]] for row in list(csv.reader(file))[1:]]
    assert (stored["step"], [row[0] for row in rows]) == (50, [20, 40, 50])
    return stored["network"] | {
        f"average {name}": weight for name, weight in stored["average"].items()
    }, rows


def assert_same(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    """The same but for the order of additions, in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_process_and_two_learn_the_same_and_take_over_from_one_another(
    whole, run, pictures, in_float64
):
    """Two learn all of it; then one, two and one in turn. Of two, one prints."""
    ended = Ended(start_torchrun([*TRAIN, "--epochs=20"], pictures, EXACT="1"))
    assert (ended.status, own_lines(ended)) == (0, []), ended.err
    assert [ended.out.count(word) for word in ("data ", "network ", "length ", "trained for")] == [
        1,
        1,
        1,
        1,
    ]
    assert "2 processes" in ended.out
    assert_same(learned_by("run"), whole)
    Path("models/run").rename("models/of_two")
    assert run(*TRAIN, "--epochs=8").status == 0
    ended = Ended(start_torchrun([*TRAIN, "--epochs=14"], pictures, EXACT="1"))
    assert ended.status == 0, ended.err
    assert "20 steps are done" in ended.out
    assert run(*TRAIN, "--epochs=20").status == 0
    assert_same(learned_by("run"), whole)


def test_two_processes_write_the_samples_that_one_writes(pictures, run):
    assert run(*TRAIN, "--epochs=2").status == 0
    words = [
        "sample",
        "--run_name=run",
        "--n_img=5",
        "--batch_size=2",
        "--steps=3",
        "--device=cpu",
        "--gif",
    ]
    assert run(*words, "--name=one").status == 0
    ended = Ended(start_torchrun([*words, "--name=two"], pictures))
    assert ended.status == 0, ended.err
    assert ended.out.count("5 images: ") == 1
    one, two = Path("results/run/one"), Path("results/run/two")
    assert len(files_below(one)) == 7
    assert files_below(one) == files_below(two)
    for name in files_below(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(
    "flag, advice, late",
    [("--epohcs=3", "did you mean --epochs", 0), ("--dataset=nowhere", "nowhere", 3)],
)
def test_what_is_refused_is_said_once_even_if_the_first_is_late(pictures, flag, advice, late):
    words = [word for word in TRAIN if not word.startswith(flag[:9])]
    ended = Ended(start_torchrun([*words, flag], pictures, LATE=str(late)))
    assert (ended.status, ended.out) == (1, "")  # torchrun's status, whatever the processes' own is
    assert [advice in line for line in own_lines(ended)] == [True], ended.err
    assert {path.name for path in pictures.iterdir()} <= {"pictures", "pid_0", "pid_1"}


def wait_for_a_save(processes_: list[subprocess.Popen]) -> int:
    """Wait until the training has saved: the step."""
    while not checkpoints.exists("run"):
        for process in processes_:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return checkpoints.load("run")["step"]


@posix
def test_all_stop_at_the_same_step_if_one_is_asked_to(pictures):
    started = start_all(2, [*TRAIN, "--epochs=1_000_000", "--save_every=0"], pictures)
    wait_for_a_save(started)
    started[1].send_signal(signal.SIGTERM)
    first, other = (Ended(process) for process in started)
    assert (first.status, other.status, first.err, other.out + other.err) == (143, 143, "", ""), (
        first.err + other.err
    )
    step = int(re.search(r"stopped and saved at step ([\d,]+)", first.out)[1].replace(",", ""))
    assert checkpoints.load("run")["step"] == step


def wait_for_both(process: subprocess.Popen) -> None:
    """Wait until both processes of torchrun are about to read their command line."""
    while not Path("pid_0").exists() or not Path("pid_1").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@posix
def test_a_killed_process_takes_the_others_with_it_and_the_same_command_goes_on(
    whole, run, pictures, in_float64
):
    chance, command, before = random.Random(KILLS), [*TRAIN, "--epochs=20", "--save_every=0"], 0
    for _ in range(KILLS):
        process = start_torchrun(command, pictures, EXACT="1")
        wait_for_both(process)
        before = before or wait_for_a_save([process])
        time.sleep(chance.uniform(0, 1))
        kill(rank := chance.randrange(2), pictures)
        ended = Ended(process)  # within a minute
        after = checkpoints.load("run")["step"]
        assert ended.status == 1 or (ended.status, after) == (0, 50), ended.err
        assert own_lines(ended) == [] or (
            rank,
            ended.err.count("has ended; its message says why"),
        ) == (1, 1)
        assert after >= before
        before = after
        for path in pictures.glob("pid_*"):
            path.unlink()
    assert run(*command).status == 0
    assert_same(learned_by("run"), whole)


@posix
def test_torchrun_starts_a_killed_training_again(whole, pictures):
    process = start_torchrun(
        [*TRAIN, "--epochs=20", "--save_every=0"], pictures, EXACT="1", PET_MAX_RESTARTS="1"
    )
    wait_for_both(process)
    wait_for_a_save([process])
    kill(1, pictures)
    ended = Ended(process)
    assert ended.status == 0, ended.err
    assert ended.out.count("steps are done") == 2
    assert_same(learned_by("run"), whole)


if __name__ == "__main__":
    main()
