"""Mixed precision: what `--precision` changes, and float16's loss scaling."""

import itertools
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, paint, refused, start
from PIL import Image

import ddpm
from machinery import checkpoints, devices, journal, optimizers
from machinery.basics import UserError
from tools import evaluate

CPU = torch.device("cpu")
FLAGS = dict(word.removeprefix("--").split("=") for word in TINY)
FLAGS |= {"dataset": "pictures", "run_name": "run", "noise_steps": 8}
FLAGS |= {"lr_decay": "none", "warmup": 0}  # which do not depend on how long a training is to be


def words(**options) -> list[str]:
    """The command line of the tiny run, with other or more options."""
    return ["train", *(f"--{name}={value}" for name, value in (FLAGS | options).items())]


@pytest.fixture
def train(run, place, monkeypatch):
    """Train the tiny run by the command line, with a row of the log for every second step."""
    paint(place / "pictures")
    monkeypatch.setattr(journal, "ROW_EVERY", 2)
    monkeypatch.setattr(ddpm, "USUAL", ddpm.USUAL._replace(steps=1))  # of the preview
    return lambda **options: run(*words(**options))


def stored(run_name: str = "run") -> dict:
    return torch.load(Path("models", run_name, "checkpoint.pt"), weights_only=True)


def losses(checkpoint: dict) -> np.ndarray:
    return np.array([row[journal.COLUMNS.index("loss")] for row in checkpoint["log"]])


def assert_same(one: dict, two: dict) -> None:
    """To the bit: weights, moments, and everything of the log but the clock's column."""
    for part in ("network", "average"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], two["optimizer"]["state"][number][k]) for k in moments)
    assert [row[:-1] for row in one["log"]] == [row[:-1] for row in two["log"]]
    for name in ("step", "loss_scale", "loss_scale_steps"):
        assert one.get(name) == two.get(name)


# ---- what is computed in what --------------------------------------------------------------------


@pytest.mark.parametrize("bfloat16, tensor_cores, expected", [
    (True, True, torch.bfloat16),
    (False, True, torch.float16),
    (False, False, torch.float32),
])  # fmt: skip
def test_auto_is_what_the_hardware_has(monkeypatch, bfloat16, tensor_cores, expected):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(devices, "has_tensor_cores", lambda device: tensor_cores)
    assert devices.precision_of("auto", CPU) == expected
    assert devices.precision_of("float32", CPU) == torch.float32


@pytest.fixture
def seen(monkeypatch) -> set[torch.dtype]:
    """The types in which pixels look at pixels."""
    found = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(q, k, v):
        found.add(q.dtype)
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_training_computes_in_what_it_was_told(train, seen, precision):
    """Its matrix products have that type; losses, weights and moments are float32."""
    result = train(epochs=1, precision=precision)
    assert result.status == 0
    assert f"on cpu in {precision}" in result.out
    assert seen == {getattr(torch, precision)}  # in the steps and in the preview
    checkpoint = stored()
    tensors = [*checkpoint["network"].values(), *checkpoint["average"].values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert ("loss_scale" in checkpoint) == (precision == "float16")


def test_without_the_flag_a_run_is_what_it_was(train):
    """`auto` is the precision of older versions, and nothing else is kept for it."""
    assert train(epochs=2).status == 0
    whole = stored()
    assert not {"loss_scale", "loss_scale_steps"} & whole.keys()
    Path("models", "run", "checkpoint.pt").unlink()
    assert train(epochs=1).status == 0
    older = stored()
    del older["format"], older["settings"]["precision"]
    checkpoints.save("run", **older)  # as an earlier version would have
    result = train(epochs=2)
    assert result.status == 0, result.err
    assert_same(stored(), whole)
    # by the name of what this machine takes it is the same again
    Path("models", "run", "checkpoint.pt").unlink()
    Path("models", "run", "checkpoint.previous.pt").unlink()
    best = str(devices.best_precision(CPU)).removeprefix("torch.")
    assert train(epochs=2, precision=best).status == 0
    assert_same(stored(), whole)


def test_samples_are_computed_in_what_they_were_told(train, run_main, seen, monkeypatch):
    """Those of an evaluation, too. The command in a PNG names the precision."""
    assert train(epochs=1).status == 0
    extract = lambda images: images.float().mean(dim=(2, 3))  # noqa: E731
    features = evaluate.Features("FD", "of colors", extract)
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", lambda device: features)
    monkeypatch.setattr(evaluate, "FEWEST", 4)
    monkeypatch.setitem(evaluate.LIMITS, "n_img", (4, 10))
    for precision in ("float32", "bfloat16", "float16"):
        how = ["--run_name=run", "--n_img=4", "--steps=1", "--device=cpu"]
        how += [f"--precision={precision}"]
        commands = (ddpm.main, ["sample", *how, f"--name={precision}"]), (evaluate.main, how)
        for main, line in commands:
            seen.clear()
            result = run_main(main, *line)
            assert result.status == 0, result.err
            assert seen == {getattr(torch, precision)}
        with Image.open(Path("results", "run", precision, "sample_0001.png")) as image:
            assert f"--precision={precision}" in image.text["command"]


def test_other_names_of_precisions_are_refused(run):
    refusal = refused(run(*words(precision="fp16")))
    assert "--precision=fp16 is not one of: auto, float32, bfloat16, float16" in refusal
    assert "did you mean --precision?" in refused(run(*words(mixed_precision="fp16")))


# ---- float16 in training -------------------------------------------------------------------------


def test_the_loss_in_float16_follows_that_in_float32(train):
    """Thirty steps: three digits of each row's loss are the same."""
    assert train(epochs=12, precision="float32").status == 0
    exact = losses(stored())
    assert train(epochs=12, run_name="half", precision="float16").status == 0
    assert len(exact) == 15
    assert losses(stored("half")) / exact == pytest.approx(1, abs=5e-3)
    assert exact[-3:].mean() < 0.8 * exact[:3].mean()  # and it does learn


def test_a_resumed_run_in_float16_equals_one_that_was_never_stopped(train, monkeypatch):
    """To the bit, also where the scale is doubled and halved on the way."""
    scales = []
    scaler = torch.amp.GradScaler.__init__

    def eager(self, device, init_scale, enabled):
        scaler(self, device, 2.0**20, growth_interval=3, enabled=enabled)

    def update(self) -> None:
        update_scale(self)
        scales.append(self.get_scale())

    update_scale = torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", eager)
    monkeypatch.setattr(torch.amp.GradScaler, "update", update)
    assert train(epochs=6, precision="float16").status == 0
    whole = stored()
    ways = {later / earlier for earlier, later in itertools.pairwise([2.0**20, *scales])}
    assert ways == {0.5, 1, 2}
    for epochs in (1, 3, 6):
        assert train(epochs=epochs, run_name="parts", precision="float16").status == 0
    assert_same(stored("parts"), whole)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_in_float16_learn_the_same(train, micro_batch):
    assert train(epochs=4, precision="float16").status == 0
    result = train(epochs=4, run_name="parts", precision="float16", micro_batch=micro_batch)
    assert result.status == 0
    whole, parts = stored(), stored("parts")
    assert whole["loss_scale"] == parts["loss_scale"]
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-3)


def test_two_processes_in_float16_learn_the_same(train, place):
    assert train(epochs=4, precision="float16").status == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = words(run_name="two", epochs=4, precision="float16")
    both = [
        start(*command, cwd=place, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    whole, two = stored(), stored("two")
    assert (two["step"], two["loss_scale"]) == (whole["step"], whole["loss_scale"])
    for name, weight in whole["average"].items():
        assert (weight - two["average"][name]).abs().max() < 2e-3  # two steps' worth of 1e-3


def test_a_step_whose_gradient_is_infinite_is_skipped_and_told_once(train, monkeypatch):
    """A step that halves the scale changes no weight, every other one does, whichever they are.

    At a scale of 2^40 float16 overflows, and at 2^39, and so on; later again, as gradients grow.
    """
    monkeypatch.setattr(devices.LossScaler, "FIRST", 2.0**26)
    changed, kept = [], []
    step, update = optimizers.Muon.step, devices.LossScaler.update

    def note(optimizer) -> None:
        weights = optimizer.param_groups[0]["params"]
        before = [weight.clone() for weight in weights]
        step(optimizer)
        changed.append(not all(map(torch.equal, before, weights)))

    def note_scale(scaler: devices.LossScaler) -> None:
        before = scaler.get_scale()
        update(scaler)
        kept.append(scaler.get_scale() == before)

    monkeypatch.setattr(optimizers.Muon, "step", note)
    monkeypatch.setattr(devices.LossScaler, "update", note_scale)
    result = train(epochs=8, precision="float16")
    assert result.status == 0
    checkpoint = stored()
    skipped = round(math.log2(2.0**26 / checkpoint["loss_scale"]))
    assert 2 <= skipped <= 15
    assert changed == kept and (len(kept), kept.count(False)) == (20, skipped)
    assert kept[:2] == [False, False]
    assert result.out.count("float16: a step was skipped, the loss scale is") == 1
    assert np.isfinite(losses(checkpoint)).all()
    assert checkpoint["optimizer"]["state"][0]["step"] == 20 - skipped


def test_a_gradient_that_no_scale_can_help_ends_the_run(train, monkeypatch):
    """Else it would go on for ever and learn nothing."""
    scaler = devices.LossScaler(CPU, torch.float16)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**-15})
    with pytest.raises(UserError, match="infinite or NaN, whatever its scale"):
        scaler.remark()
    assert devices.LossScaler(CPU, torch.bfloat16).remark() == ""


def test_a_run_may_change_its_precision(train):
    """As it may change its device: each time the scale begins anew, or is passed over."""
    for epochs, precision in enumerate(("float16", "float32", "float16", "bfloat16"), 1):
        result = train(epochs=epochs, precision=precision)
        assert result.status == 0, result.err
        assert ("loss_scale" in stored()) == (precision == "float16")


@pytest.mark.parametrize(
    "fact",
    [
        {"loss_scale": 0.0},
        {"loss_scale": math.nan},
        {"loss_scale": "1"},
        {"loss_scale_steps": -1},
        {"loss_scale_steps": 1.5},
    ],
)
def test_a_checkpoint_of_another_scale_is_refused(train, fact):
    assert train(epochs=1, precision="float16").status == 0
    checkpoint = stored()
    del checkpoint["format"]
    checkpoints.save("run", **checkpoint | fact)
    assert f"({next(iter(fact))})" in refused(train(epochs=2, precision="float16"))
