"""What a checkpoint promises: it is on the disk whole, damage is seen, opening one is safe."""

import contextlib
import os
import pickle
import random
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from conftest import TINY, files_below, paint, refused
from hypothesis import strategies
from storm import same
from torch import Tensor

import ddpm
from machinery import basics, checkpoints, command_line
from machinery.basics import UserError
from machinery.optimizers import OPTIMIZERS, moments_of

CHECKPOINT = Path("models/run/checkpoint.pt")
TRAIN = ["train", "--dataset=pictures", "--run_name=run", "--noise_steps=8", *TINY, "--epochs=2"]
SAMPLE = ["sample", "--run_name=run", "--n_img=1", "--steps=2", "--device=cpu"]
LENGTH = int(os.environ.get("FUZZ", "1"))  # FUZZ=100 tries a hundred times as many examples


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a run that was trained for one epoch; it has one checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        paint(Path("pictures"))
        command_line.plan("ddpm.py", {"train": ddpm.train}, [*TRAIN[:-1], "--epochs=1"])()
        return Path.cwd()


@pytest.fixture
def state(trained, place) -> dict:
    """The state in the checkpoint that lies in the test's place."""
    shutil.copytree(trained, place, dirs_exist_ok=True)
    return torch.load(CHECKPOINT, weights_only=False)  # ours, and so loaded faster


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, Path("kept")])
def test_a_file_is_on_the_disk_before_it_gets_its_name(place, monkeypatch, keep):
    """Write, fsync, rename, fsync of the folder.

    In any other order a loss of power could leave an empty file.
    """
    calls, replace = [], os.replace

    def fsync(number: int) -> None:
        facts = os.fstat(number)
        calls.append(
            "fsync of the folder"
            if stat.S_ISDIR(facts.st_mode)
            else f"fsync of {facts.st_size} bytes"
        )

    def replace_and_note(old: Path, new: Path) -> None:
        calls.append(f"{re.sub('_[0-9a-f]{8}$', '', Path(old).name)} becomes {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_and_note)
    path = Path("file")
    path.write_text("before")
    basics.write_whole(path, lambda file: file.write(b"1234567"), keep)
    expected = [
        "fsync of 7 bytes",
        "file becomes kept" if keep else "",
        "file.unfinished becomes file",
    ]
    expected += ["fsync of the folder" if os.name != "nt" else ""]
    assert calls == [call for call in expected if call]
    assert path.read_text() == "1234567"
    assert not keep or keep.read_text() == "before"
    assert files_below(place) == {"file", "kept"} if keep else {"file"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_could_not_be_written_leaves_no_trace(place, error):
    def fail(file) -> None:
        file.write(b"1234567")
        raise error

    Path("file").write_text("before")
    with pytest.raises(error):
        basics.write_whole(Path("file"), fail, keep=Path("kept"))
    assert files_below(place) == {"file"}
    assert Path("file").read_text() == "before"


# ---- damage --------------------------------------------------------------------------------------


def somewhere(chance: random.Random, size: int) -> int:
    """A place in a file; every other one is in its last twentieth.

    There an archive has its table of contents.
    """
    return chance.randrange(chance.choice([0, size - size // 20]), size)


def flip_a_bit(chance: random.Random, whole: bytes) -> bytes:
    place = somewhere(chance, len(whole))
    return whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]


def cut(chance: random.Random, whole: bytes) -> bytes:
    return whole[: somewhere(chance, len(whole))]


def zero_a_block(chance: random.Random, whole: bytes) -> bytes:
    place, size = somewhere(chance, len(whole)), chance.choice([1, 64, 4096])
    return (whole[:place] + bytes(size) + whole[place + size :])[: len(whole)]


def put_garbage(chance: random.Random, whole: bytes) -> bytes:
    place, size = somewhere(chance, len(whole)), chance.choice([1, 64, 4096])
    return (whole[:place] + chance.randbytes(size) + whole[place + size :])[: len(whole)]


def change_the_archive(chance: random.Random, whole: bytes) -> bytes:
    """A sound archive that lacks a file, has two of them exchanged, or has one twice."""
    Path("whole").write_bytes(whole)
    with zipfile.ZipFile("whole") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    names = list(files)
    one, two = chance.sample(
        [name for name in names if "/data/" in name or name.endswith(".pkl")], 2
    )
    how = chance.choice(["without", "exchanged", "only"])
    kept = [one] if how == "only" else [name for name in names if how != "without" or name != one]
    renamed = (
        {one: two, two: one} if how == "exchanged" and len(files[one]) != len(files[two]) else {}
    )
    with zipfile.ZipFile("changed", "w") as archive:
        for name in kept:
            archive.writestr(renamed.get(name, name), files[name])
    return Path("changed").read_bytes()


@pytest.mark.parametrize("damage", [flip_a_bit, cut, zero_a_block, put_garbage, change_the_archive])
def test_damage_is_named_or_harmless(state, damage):
    """Sixty times each: refused in one line with the file's name, or the same to the bit.

    The latter is the case where nobody reads.
    """
    whole, harmless = CHECKPOINT.read_bytes(), 0
    for seed in range(60):
        CHECKPOINT.write_bytes(damage(random.Random(seed), whole))
        try:
            assert same(checkpoints.load("run"), state), f"seed {seed} loads something else"
            harmless += 1
        except UserError as error:
            assert str(error).startswith(f"{CHECKPOINT} cannot be read as a checkpoint ("), (
                f"seed {seed}"
            )
            assert "\n" not in str(error), f"seed {seed}"
    assert harmless < 60


def edited(data, whole: bytes) -> bytes:
    """Some bytes of a file replaced, a few times over."""
    for _ in range(data.draw(strategies.integers(1, 4))):
        start, taken = (
            data.draw(strategies.integers(0, len(whole))),
            data.draw(strategies.integers(0, 8)),
        )
        whole = whole[:start] + data.draw(strategies.binary(max_size=8)) + whole[start + taken :]
    return whole


@hypothesis.settings(
    max_examples=20 * LENGTH, deadline=None, database=None, derandomize=LENGTH == 1
)
@hypothesis.given(strategies.data())
def test_no_bytes_do_more_than_be_refused(trained, data):
    """Edited checkpoints, edited pickles in sound archives, and no checkpoints at all."""
    whole = (trained / CHECKPOINT).read_bytes()
    path = trained / "fuzzed.pt"
    kind = data.draw(strategies.sampled_from(["bytes", "edited", "pickle"]))
    if kind == "bytes":
        path.write_bytes(data.draw(strategies.binary()))
    elif kind == "edited":
        path.write_bytes(edited(data, whole))
    else:
        with (
            zipfile.ZipFile(trained / CHECKPOINT) as archive,
            zipfile.ZipFile(path, "w") as changed,
        ):
            for name in archive.namelist():
                contents = archive.read(name)
                changed.writestr(
                    name, edited(data, contents) if name.endswith("data.pkl") else contents
                )
    before = files_below(trained)
    with contextlib.suppress(UserError):
        checkpoints.read(path)
    assert files_below(trained) == before


# ---- strangers' checkpoints ----------------------------------------------------------------------


class Bomb:
    """What would make a folder if it were unpickled the careless way."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def giant(tensors: dict) -> dict:
    """The same names for tensors of 4 TB each, all of which show one number again and again."""
    return {name: torch.zeros(1).expand(10**6, 10**6) for name in tensors}


def without_setting(name: str) -> Callable[[dict], dict]:
    return lambda state: (
        state
        | {"settings": {key: value for key, value in state["settings"].items() if key != name}}
    )


def with_settings(**settings) -> Callable[[dict], dict]:
    return lambda state: {**state, "settings": state["settings"] | settings}


def giant_everywhere(state: dict) -> dict:
    """A network of terabytes with all its weights, in a few kilobytes.

    No shape contradicts another.
    """
    settings = state["settings"] | {"width": 4096, "multipliers": (64, 64)}
    with torch.device("meta"):
        network = ddpm.build(settings, "meta")[0]
    weights = {
        name: torch.zeros(1).expand(weight.shape) for name, weight in network.state_dict().items()
    }
    moments = [
        {name: torch.zeros(()).expand(shape) for name, shape in kept.items()}
        for kept in moments_of(network, settings["optimizer"])
    ]
    optimizer = state["optimizer"] | {"state": dict(enumerate(moments))}
    return state | {
        "settings": settings,
        "network": weights,
        "average": weights,
        "optimizer": optimizer,
    }


def of_other_weights(state: dict) -> dict:
    network = ddpm.build(state["settings"] | {"width": 32}, "cpu")[0].state_dict()
    return state | {"network": network, "average": network}


def with_moments(**changed: Tensor) -> Callable[[dict], dict]:
    """The same tensors for the moments of every weight."""

    def change(state: dict) -> dict:
        moments = {number: facts | changed for number, facts in state["optimizer"]["state"].items()}
        return state | {"optimizer": state["optimizer"] | {"state": moments}}

    return change


STRANGE = {
    "a bomb": lambda state: Bomb(),
    "a bomb inside": lambda state: state | {"log": Bomb()},
    "giant weights": lambda state: (
        state | {kind: giant(state[kind]) for kind in ("network", "average")}
    ),
    "a giant average": lambda state: state | {"average": giant(state["average"])},
    "a giant network": with_settings(width=4096, multipliers=(64, 64), blocks=16),
    "a giant network with giant weights": giant_everywhere,
    "a large network": with_settings(width=512, multipliers=(1, 4, 4)),
    "settings out of range": with_settings(noise_steps=10**9),
    "settings of other types": with_settings(img_size=8, multipliers="12"),
    "no settings": lambda state: state | {"settings": {}},
    "settings that are a list": lambda state: state | {"settings": [1, 2]},
    "a newer format": lambda state: state | {"format": checkpoints.FORMAT + 1},
    "a newer format with other parts": lambda state: {
        "format": checkpoints.FORMAT + 1,
        "weights": {},
    },
    "no format": lambda state: {name: value for name, value in state.items() if name != "format"},
    "weights of another width": of_other_weights,
    "weights that are numbers": lambda state: (
        state | {"average": dict.fromkeys(state["average"], 1.0)}
    ),
    "weights without values": lambda state: (
        state
        | {
            kind: {name: weight.to("meta") for name, weight in state[kind].items()}
            for kind in ("network", "average")
        }
    ),
    "weights alone": lambda state: state["network"],
    "one tensor": lambda state: torch.zeros(3),
    "one number": lambda state: 7,
}
STRANGE_TO_TRAIN = {
    "giant moments": with_moments(exp_avg=torch.zeros(1).expand(10**6, 10**6)),
    "short moments": with_moments(exp_avg=torch.zeros(1)),
    "moments of AdamW for Muon": with_settings(optimizer="adamw"),
    "an optimizer that is not known": with_settings(optimizer="sgd"),
    "an optimizer to be chosen": with_settings(optimizer="auto"),
    "an optimizer that is a number": with_settings(optimizer=3),
    "moments without a count": with_moments(step=torch.zeros(0)),
    "no moments": lambda state: state | {"optimizer": state["optimizer"] | {"state": {}}},
    "no optimizer": lambda state: state | {"optimizer": {}},
    "a setting left out": without_setting("lr"),
    "a setting that is a tensor": with_settings(flip=torch.ones(2)),
    "weights in bfloat16": lambda state: (
        state | {"average": {k: w.bfloat16() for k, w in state["average"].items()}}
    ),
    "other sums": lambda state: state | {"sums": torch.zeros(7)},
    "a step that is text": lambda state: state | {"step": "many"},
    "a log that is a number": lambda state: state | {"log": 5},
}
CASES = [(words, name) for words in (SAMPLE, TRAIN) for name in STRANGE] + [
    (TRAIN, name) for name in STRANGE_TO_TRAIN
]


def peak_memory() -> int:
    """The most memory this process has had, in bytes."""
    resource = pytest.importorskip(
        "resource", reason="this system does not tell how much memory was used"
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


@pytest.mark.parametrize("words, name", CASES, ids=[f"{words[0]}: {name}" for words, name in CASES])
def test_a_strange_checkpoint_is_refused_in_one_line(run, state, monkeypatch, words, name):
    for optimizer in OPTIMIZERS.values():
        monkeypatch.setattr(
            optimizer, "step", lambda _: pytest.fail("it trains on with what it was given")
        )
    torch.save((STRANGE | STRANGE_TO_TRAIN)[name](state), CHECKPOINT)
    before, memory = files_below(Path()), peak_memory()
    result = run(*words)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert "models/run" in result.err.replace(os.sep, "/") or "--run_name=run" in result.err
    assert files_below(Path()) == before
    # the large network would take a gigabyte, the giant ones more than there is
    assert peak_memory() - memory < 300e6


def scattered(moment: Tensor) -> Tensor:
    """The same numbers, far apart in memory.

    The last of them lies at the end of the memory they are in, the first far before it.
    """
    return torch.zeros(moment.numel() + 1)[-1:].expand(moment.shape)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_dense_moments_of_its_own_reach_the_optimizer(run, place, optimizer, monkeypatch):
    """It trusts their layout blindly: others would have it write where no moment is."""
    paint(place / "pictures")
    words = [*TRAIN[:-1], f"--optimizer={optimizer}"]
    assert run(*words, "--epochs=2").status == 0
    state = torch.load(CHECKPOINT, weights_only=True)
    for facts in state["optimizer"]["state"].values():
        facts |= {name: scattered(facts[name]) for name in facts if name != "step"}
    # as earlier versions kept it, with options of a stranger
    state["optimizer"]["param_groups"] = [{"amsgrad": True, "fused": False, "weight_decay": 9.0}]
    torch.save(state, CHECKPOINT)

    def look(optimizer) -> None:
        for weight, kept in zip(optimizer.weights, optimizer.moments, strict=True):
            strides = {each.stride() for name, each in kept.items() if name != "step"}
            assert strides == {weight.stride()}
            assert kept["step"] == state["step"]
        raise UserError("looked")

    monkeypatch.setattr(OPTIMIZERS[optimizer], "step", look)
    assert "looked" in refused(run(*words, "--epochs=9"))


@pytest.mark.parametrize("name", ["a newer format", "a newer format with other parts"])
def test_a_newer_format_is_called_newer(run, state, name):
    torch.save(STRANGE[name](state), CHECKPOINT)
    assert f"{CHECKPOINT} has format {checkpoints.FORMAT + 1}" in run(*SAMPLE).err


IMPOSSIBLE = [
    {"multipliers": (1,) * 2_000},
    {"multipliers": (10**9,)},
    {"blocks": 10**6},
    {"width": 10**6},
]


@pytest.mark.parametrize("settings", IMPOSSIBLE, ids=["levels", "multipliers", "blocks", "width"])
def test_no_network_is_built_of_settings_that_no_run_can_have(run, state, monkeypatch, settings):
    """Even in no memory, thousands of levels would take minutes."""
    torch.save(with_settings(**settings)(state), CHECKPOINT)
    monkeypatch.setattr(ddpm, "build", lambda *inputs: pytest.fail("a network is built"))
    assert run(*SAMPLE).status == 2


def write_old_format(state: dict) -> None:
    torch.save(state | {"log": Bomb()}, CHECKPOINT, _use_new_zipfile_serialization=False)


def write_a_wrong_reference(state: dict) -> None:
    """PyTorch finds such a pickle with an assert."""
    with zipfile.ZipFile(CHECKPOINT, "w") as archive:
        for name, contents in {
            "data.pkl": b"\x80\x02K\x00Q.",
            "version": b"3",
            "byteorder": b"little",
        }.items():
            archive.writestr(f"checkpoint/{name}", contents)


OTHER_FILES = {
    "an empty file": lambda state: CHECKPOINT.write_bytes(b""),
    "text": lambda state: CHECKPOINT.write_text("not a checkpoint"),
    "a folder": lambda state: (CHECKPOINT.unlink(), CHECKPOINT.mkdir()),
    "a pickle": lambda state: CHECKPOINT.write_bytes(pickle.dumps(Bomb())),
    "the format before archives": write_old_format,
    "a wrong reference": write_a_wrong_reference,
    "an archive of something else": lambda state: zipfile.ZipFile(CHECKPOINT, "w").close(),
}


@pytest.mark.parametrize("words", [SAMPLE, TRAIN], ids=lambda words: words[0])
@pytest.mark.parametrize("write", OTHER_FILES.values(), ids=OTHER_FILES)
def test_what_is_no_checkpoint_is_refused_in_one_line(run, state, words, write):
    write(state)
    before, memory = files_below(Path()), peak_memory()
    result = run(*words)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert result.err.startswith(f"ddpm.py: {CHECKPOINT} cannot be read as a checkpoint (")
    assert files_below(Path()) == before
    assert peak_memory() - memory < 300e6


def test_a_small_file_does_not_become_large_in_memory(run, state):
    """A compressed archive of less than a megabyte, most of which would be 400 of zeros."""
    torch.save(state | {"more": torch.zeros(10**8)}, "large")
    packing = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
    with zipfile.ZipFile("large") as large, zipfile.ZipFile(CHECKPOINT, "w", **packing) as small:
        for name in large.namelist():
            with large.open(name) as contents, small.open(name, "w") as file:
                shutil.copyfileobj(contents, file, 2**20)
    memory = peak_memory()
    assert run(*SAMPLE).status == 2
    assert peak_memory() - memory < 300e6
