"""What a GPU would meet, rehearsed without one: see pretended_gpu.py."""

import inspect
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, paint
from PIL import Image
from pretended_gpu import GPU, gpu_facts, pretended_gpu

import ddpm
import modules
from benchmarks import peers
from benchmarks.h100 import correct, norms
from machinery import command_line, devices, journal, session
from machinery.basics import UserError
from tools import evaluate

WORDS = [word for word in TINY if not word.startswith("--device")]
WORDS += ["--dataset=sorted", "--conditional"]


def train(device: str, **options) -> None:
    """Train the tiny run by the command line."""
    words = [
        *WORDS,
        f"--device={device}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    command_line.plan("ddpm.py", {"train": ddpm.train}, ["train", *words])()


def train_three_ways(device: str) -> None:
    """Train, resume and start from another run, with all that a step can have."""
    how = {"precision": "float32", "dropout": 0.1, "grad_checkpointing": "yes", "micro_batch": 3}
    train(device, run_name=device, epochs=1, **how)
    train(device, run_name=device, epochs=2, **how)
    train(device, run_name=f"{device}_fine", init_from=device, epochs=1, precision="float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with runs that were trained on a pretended GPU and on the CPU: made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setattr(ddpm, "USUAL", ddpm.USUAL._replace(steps=1))  # of the previews
        for name in ("cats", "dogs"):
            paint(Path("sorted", name), count=4, first_seed=ord(name[0]))
        with pretended_gpu():
            train_three_ways("cuda")
        train_three_ways("cpu")
        return Path.cwd()


@pytest.fixture
def pictures(place, monkeypatch) -> None:
    """Two classes of two pictures: a training of one step, whose previews have one, too."""
    monkeypatch.setattr(ddpm, "USUAL", ddpm.USUAL._replace(steps=1))
    for name in ("cats", "dogs"):
        paint(Path("sorted", name), count=2, first_seed=ord(name[0]))


def weights_of(run_name: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("models", run_name, "checkpoint.pt"), weights_only=True)["average"]


def images_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("sample_*.png"))])


# ---- the whole program ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "_fine"])
def test_a_gpu_learns_what_the_cpu_does(here, end):
    """Resumed, from other weights, in micro-batches, with classes, dropout and recomputing."""
    ours, theirs = weights_of(f"cuda{end}"), weights_of(f"cpu{end}")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


WAYS = {sampler: [f"--sampler={sampler}"] for sampler in ddpm.SAMPLERS}
WAYS["inpainting"] = ["--init_image=image.png", "--mask=mask.png", "--gif"]


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_makes_the_images_of_the_cpu(here, run, way):
    """By every sampler, with guidance, and from an image with a mask."""
    for name in ("image.png", "mask.png"):
        shutil.copyfile(next(Path("sorted", "cats").iterdir()), name)
    words = ["sample", "--run_name=cpu", "--n_img=3", "--steps=3", "--precision=float32"]
    assert run(*words, "--device=cpu", *WAYS[way]).status == 0
    with pretended_gpu():
        result = run(*words, "--device=cuda", *WAYS[way])
    assert result.status == 0, result.err
    folder = Path("results", "cpu")
    assert (images_in(folder / "samples") == images_in(folder / "samples_2")).all()


def test_a_gpu_judges_as_the_cpu_does(here, run_main, monkeypatch):
    extract = lambda images: images.float().mean(dim=(2, 3))  # noqa: E731
    features = evaluate.Features("FD", "of colors", extract)
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", lambda device: features)
    monkeypatch.setattr(evaluate, "FEWEST", 4)
    monkeypatch.setitem(evaluate.LIMITS, "n_img", (4, 10))
    words = ["--run_name=cpu", "--n_img=4", "--steps=1", "--precision=float32"]
    told = [run_main(evaluate.main, *words, "--device=cpu")]
    shutil.rmtree("datasets")  # features are kept there
    with pretended_gpu():
        told.append(run_main(evaluate.main, *words, "--device=cuda"))
    assert [result.status for result in told] == [0, 0], told[1].err
    assert told[0].out == told[1].out


def test_a_t4_learns_in_float16(pictures):
    """It has tensor cores and no bfloat16, so `auto` takes float16, with loss scaling."""
    with pretended_gpu():
        train("cuda", run_name="cuda", epochs=1)
    train("cpu", run_name="cpu", epochs=1, precision="float16")
    stored = [torch.load(Path("models", name, "checkpoint.pt")) for name in ("cuda", "cpu")]
    assert stored[0]["loss_scale_steps"] == 1
    assert all(map(torch.equal, *(each["average"].values() for each in stored)))


# ---- what a GPU would wait for -------------------------------------------------------------------


def waits_of_training(monkeypatch, **options) -> dict[str, Counter]:
    """What a GPU is waited for in steps (`advance`) and between them (`note`)."""
    within = {"advance": Counter(), "note": Counter()}

    def counted(method, waits, found):
        def call(*inputs):
            before = waits.copy()
            answer = method(*inputs)
            found.update(waits - before)
            return answer

        return call

    with pretended_gpu() as waits:
        for kind, name in ((ddpm.Training, "advance"), (session.Session, "note")):
            monkeypatch.setattr(kind, name, counted(getattr(kind, name), waits, within[name]))
        train("cuda", run_name="run", **options)
    return within


@pytest.mark.parametrize("bytes_free", [2**35, 0])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_gpu_is_waited_for_by_rows_and_saves_alone(pictures, monkeypatch, bytes_free, precision):
    """Also where the data set does not fit on it and is left on the disk."""
    rows = 3
    monkeypatch.setattr(journal, "ROW_EVERY", 2)
    monkeypatch.setattr(devices, "free_memory", lambda device: bytes_free)
    monkeypatch.setattr(session.Session, "preview", lambda self: None)
    within = waits_of_training(monkeypatch, epochs=2 * rows, precision=precision)
    assert not within["advance"]
    # both also check the sums, and a save in float16 reads two more numbers
    expected = {
        "_local_scalar_dense at journal.py:check": rows + 1,
        "tolist at journal.py:row": rows,
    }
    if precision == "float16":
        expected |= {
            "_local_scalar_dense at devices.py:remark": rows,
            "_local_scalar_dense at devices.py:facts": 2,
        }
    assert within["note"] == expected


# ---- planted bugs --------------------------------------------------------------------------------


def plant(monkeypatch, place, name: str, right: str, wrong: str) -> None:
    """Put `wrong` in the place of `right` in the source of a function or method."""
    function = getattr(place, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{name} has changed"
    found = {}
    exec(source.replace(right, wrong), function.__globals__, found)
    monkeypatch.setattr(place, name, found[name])


# a place, a function, what is right in it, and what one may write instead
BUGS = {
    "t": (ddpm.Diffusion, "draw", "(shape[0],), device=device", "(shape[0],)"),
    "a table": (
        ddpm.Diffusion,
        "__init__",
        "self.noise = (1 - self.alpha_bar).sqrt().float().to(device)",
        "self.noise = (1 - self.alpha_bar).sqrt().float()",
    ),
    "frequencies": (modules, "timestep_embedding", "half, device=t.device", "half"),
    "quarters": (journal.Log, "__init__", "QUARTERS, device=device", "QUARTERS"),
    "labels of a batch": (
        ddpm.Training,
        "compute_gradient",
        "devices.send(labels, self.device).where",
        "labels.where",
    ),
    "labels of images": (ddpm, "generate", "labels.to(device)", "labels"),
    "images": (ddpm.Training, "preview", "to_bytes(x_t).cpu()", "to_bytes(x_t)"),
}


@pytest.mark.parametrize("what", BUGS)
def test_what_is_left_on_the_other_side_is_found(pictures, monkeypatch, what):
    """In a training of one step, with its data set on the disk, and its preview."""
    monkeypatch.setattr(devices, "free_memory", lambda device: 0)
    plant(monkeypatch, *BUGS[what])
    with pretended_gpu(), pytest.raises((RuntimeError, TypeError), match=r"same device|numpy"):
        train("cuda", run_name="run", epochs=1, precision="float32")


def test_queries_of_an_evaluation_that_are_left_behind_are_found(monkeypatch):
    samples = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    plant(monkeypatch, evaluate, "find_nearest", "part.to(device)", "part")
    with pretended_gpu(), pytest.raises(RuntimeError, match="same device"):
        evaluate.find_nearest(samples, samples.numpy(), 1, GPU)


def test_a_number_that_is_read_in_a_step_is_counted(pictures, monkeypatch):
    plant(monkeypatch, ddpm.Training, "advance", "self.step += 1", "self.step += int(t[0] > 0)")
    within = waits_of_training(monkeypatch, epochs=1, precision="float32")
    assert within["advance"] == {"_local_scalar_dense at <string>:advance": 1}


# ---- which GPU, and what suits it ----------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, name, precision, layout",
    [
        ((7, 5), "Tesla T4", torch.float16, torch.channels_last),
        ((7, 5), "NVIDIA GeForce RTX 2080 Ti", torch.float16, torch.channels_last),
        ((7, 5), "NVIDIA GeForce GTX 1660 Ti", torch.float32, torch.contiguous_format),
        ((7, 5), "NVIDIA T1000 8GB", torch.float32, torch.contiguous_format),
        ((6, 1), "NVIDIA GeForce GTX 1080", torch.float32, torch.contiguous_format),
        ((8, 6), "NVIDIA GeForce RTX 3060", torch.bfloat16, torch.channels_last),
        ((9, 0), "NVIDIA H100", torch.bfloat16, torch.channels_last),
    ],
)
def test_precision_and_layout_are_those_of_the_gpu(capability, name, precision, layout):
    with gpu_facts(capability, name):
        assert devices.best_precision(GPU) == devices.precision_of("auto", GPU) == precision
        assert devices.precision_of("float32", GPU) == torch.float32
        assert devices.layout(GPU) == layout


def test_radeons_have_the_plain_layout(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with gpu_facts((11, 0), "AMD Radeon"):
        assert devices.layout(GPU) == torch.contiguous_format
        assert not devices.lacks_kernels("cuda")
    assert devices.layout(torch.device("cpu")) == torch.channels_last


@pytest.mark.parametrize(
    "capability, built, is_usable",
    [
        ((7, 0), ["sm_75", "sm_80"], False),  # V100
        ((6, 0), ["sm_75", "sm_80"], False),  # P100
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_80", "sm_86", "sm_90a"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((12, 0), ["sm_90", "sm_120f"], True),
        ((12, 1), ["sm_90", "compute_90"], True),  # by way of PTX
        ((12, 1), ["sm_90"], False),
    ],
)
def test_a_gpu_without_kernels_is_passed_over_or_refused(
    monkeypatch, capsys, capability, built, is_usable
):
    with gpu_facts(capability, "an old one"):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        assert devices.pick_device("auto").type == ("cuda" if is_usable else "cpu")
        said = "not used: this PyTorch has no kernels for an old one"
        assert capsys.readouterr().out.startswith(said) != is_usable
        if is_usable:
            assert devices.pick_device("cuda") == torch.device("cuda")
            return
        with pytest.raises(UserError, match=r"no kernels for an old one \(sm_\d+\), only for sm_"):
            devices.pick_device("cuda:0")


def test_intel_and_apple_gpus_are_taken_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    assert devices.pick_device("auto") == torch.device("xpu")
    assert devices.pick_device("xpu:0") == torch.device("xpu", 0)
    with pytest.raises(UserError, match="--device=xpu:1 is not on this machine"):
        devices.pick_device("xpu:1")


@pytest.mark.parametrize(
    "words",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "MPS backend out of memory (MPS allocated: 8.00 GB)",
        "UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    ],
)
def test_what_gpus_say_without_memory_is_understood(words):
    """PyTorch has a type for its own allocator's errors; libraries have words."""
    assert devices.is_out_of_memory(RuntimeError(words))
    sizes = []

    def work(part: slice) -> None:
        sizes.append(part.stop - part.start)
        if len(sizes) == 1:
            raise RuntimeError(words)

    devices.MicroBatches(range(4), "auto").run(work, reset=list)
    assert sizes == [4, 2, 2]


def test_other_errors_of_gpus_are_not_taken_for_that():
    for words in ("CUDNN_STATUS_EXECUTION_FAILED", "no kernel image is available"):
        assert not devices.is_out_of_memory(RuntimeError(words))


def test_only_the_generators_in_use_are_seeded(monkeypatch):
    """`torch.manual_seed` also prepares those of all other kinds of GPU, which takes long."""
    seeded = []
    for kind in ("cuda", "xpu", "mps"):
        for name in ("manual_seed", "manual_seed_all"):
            note = lambda number, kind=kind: seeded.append((kind, number))  # noqa: E731
            monkeypatch.setattr(getattr(torch, kind), name, note, raising=False)
    for kind in ("cpu", "cuda", "xpu"):
        devices.seed(torch.device(kind), 5)
        first = torch.randn(3)
        torch.default_generator.manual_seed(5)
        assert torch.equal(first, torch.randn(3))
    assert seeded == [("cuda", 5), ("xpu", 5)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputing_keeps_the_generators_only_where_something_is_dropped(monkeypatch, dropout):
    """Their state is copied from the GPU and back, for every block."""
    kept = []
    compute = modules.checkpoint
    monkeypatch.setattr(
        modules,
        "checkpoint",
        lambda *what, **how: kept.append(how["preserve_rng_state"]) or compute(*what, **how),
    )
    shape = {"img_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention_size": 4}
    network = modules.UNet(**shape, dropout=dropout)
    network.recompute = True
    network(torch.zeros(1, 3, 8, 8), torch.ones(1)).sum().backward()
    assert set(kept) == {dropout > 0}


# ---- what grows with a GPU's speed ---------------------------------------------------------------


def test_the_rows_of_a_log_thin_out():
    """As many as ever in the first 40,000 steps; 1,000 more for each doubling from there on."""
    rows = [step for step in range(1, 1_000_001) if step % journal.row_every(step) == 0]
    assert rows[:2000] == [20 * number for number in range(1, 2001)]
    ends = [40_000, 80_000, 160_000, 320_000, 640_000]
    assert [sum(step <= end for step in rows) for end in ends] == [2000, 3000, 4000, 5000, 6000]
    assert 6500 < len(rows) < 6600


def test_rows_of_other_lengths_are_means_of_their_steps(place, run, monkeypatch):
    """Also in a run that is resumed within a row, and in one whose rows were always as many."""
    paint(Path("pictures"))
    monkeypatch.setattr(journal, "ROW_EVERY", 2)
    monkeypatch.setattr(journal, "DENSE_ROWS", 2)
    monkeypatch.setattr(ddpm, "USUAL", ddpm.USUAL._replace(steps=1))
    words = [word.replace("warmup=5", "warmup=0") for word in TINY]
    words += ["--dataset=pictures", "--lr_decay=none"]

    def log_of(name: str, *epochs: int) -> list[list]:
        for number in epochs:
            assert run("train", *words, f"--run_name={name}", f"--epochs={number}").status == 0
        rows = torch.load(Path("models", name, "checkpoint.pt"), weights_only=True)["log"]
        return [row[:-1] for row in rows]  # the last is the clock's

    whole = log_of("whole", 10)  # 25 steps
    assert [row[0] for row in whole] == [2, 4, 8, 16, 25]
    assert log_of("parts", 1, 2, 5, 7, 10) == whole
    monkeypatch.setattr(journal, "DENSE_ROWS", 2000)
    every_other = log_of("dense", 10)
    loss = journal.COLUMNS.index("loss")
    assert whole[2][loss] == pytest.approx((every_other[2][loss] + every_other[3][loss]) / 2)
    log_of("older", 4)
    monkeypatch.setattr(journal, "DENSE_ROWS", 2)
    older = log_of("older", 10)
    assert [row[0] for row in older] == [2, 4, 6, 8, 10, 16, 25]
    assert older[-1] == whole[-1]


def test_previews_take_two_minutes_and_then_a_twentieth_of_the_time(monkeypatch):
    """A second each, after epochs of ten seconds: what a small data set gives a fast GPU."""
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    monkeypatch.setattr(session, "time", clock)
    how = {"epochs": 10_000, "max_minutes": 0, "save_every": 10, "sample_every": 1, "minutes": 0.0}
    progress = session.Progress(count=10, batch_size=10, step=0, began=0.0, previews=16, **how)
    shown = []
    for step in range(1, 3001):
        clock.seconds += 10
        if progress.is_preview_due(step):
            with progress.previewing(step):
                clock.seconds += 1
            shown.append(step)
    assert shown[:120] == list(range(1, 121))
    assert len(shown) == pytest.approx(clock.seconds / 20, abs=2)


# ---- the programs for the day a GPU is here ------------------------------------------------------


@pytest.mark.parametrize("kind", [norms.LowPrecisionNorm, norms.ChannelSumsNorm])
def test_candidates_for_group_norm_compute_it(kind):
    network = peers.our_network(peers.SMALL | {"img_size": 8, "width": 16})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        expected = network(x, t)
        error = (norms.replace_norms(network, kind)(x, t) - expected).abs().max()
    assert error < 1e-4 < expected.abs().max()


def test_the_checks_of_a_gpu_go_through_on_a_cpu_and_find_what_is_wrong(place, monkeypatch, capsys):
    """All but those that start programs; then with a network that answers otherwise."""
    tiny = {"img_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention_size": 4}
    monkeypatch.setattr(peers, "SMALL", tiny)
    checks = [check for check in correct.CHECKS if check.__name__ not in ("check_commands",)]
    monkeypatch.setattr(correct, "CHECKS", checks)
    correct.correct(device="cpu", quick=True)
    out = capsys.readouterr().out
    assert out.endswith("all ok\n") and out.count("  ok\n") >= 10
    images_of = correct.images_of
    calls = []

    def other_images(*inputs) -> torch.Tensor:
        calls.append(1)
        return images_of(*inputs) + 0.1 * (len(calls) % 2)

    monkeypatch.setattr(correct, "images_of", other_images)
    monkeypatch.setattr(correct, "CHECKS", [correct.check_images, correct.check_resume])
    with pytest.raises(SystemExit):
        correct.correct(device="cpu", quick=True)
    out = capsys.readouterr().out
    assert out.count("FAIL\n") == len(ddpm.SAMPLERS)
    assert "against one that was not stopped" in out
