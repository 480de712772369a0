"""Files are whole or not there at all, and what is written has one owner."""

import csv
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import ROOT, TINY, files_below, paint, refused

import ddpm
import tools.exchange
from machinery import basics, checkpoints, command_line, runs
from machinery.basics import UserError
from tools import evaluate

TRAIN = ["train", "--dataset=pictures", "--noise_steps=8", *TINY]
CHECKPOINT = Path("models/run/checkpoint.pt")
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files or signals")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A place with a run of one epoch, and its pictures."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paint(Path("pictures"))
        words = [*TRAIN, "--run_name=run", "--epochs=1"]
        command_line.plan("ddpm.py", {"train": ddpm.train}, words)()
    return place


# ---- two writers ---------------------------------------------------------------------------------


def test_a_file_written_while_another_writes_it_is_one_of_the_two(place):
    """With one name for what is unfinished, the second would tear what the first has written."""

    def write_first(file) -> None:
        file.write(b"first, ")
        basics.write_whole(Path("file"), lambda other: other.write(b"second, whole"))
        assert Path("file").read_bytes() == b"second, whole"
        file.write(b"whole")

    basics.write_whole(Path("file"), write_first)
    assert Path("file").read_bytes() == b"first, whole"
    assert files_below(place) == {"file"}


@posix
@pytest.mark.parametrize("name", ["file.unfinished", "file.unfinished_00000000"])
def test_a_link_in_the_place_of_what_is_unfinished_is_not_followed(place, monkeypatch, name):
    Path("target").write_text("mine")
    os.symlink("target", name)
    basics.write_whole(Path("file"), lambda file: file.write(b"new"))
    assert (Path("target").read_text(), Path("file").read_text()) == ("mine", "new")
    assert os.path.islink(name)


@posix
def test_no_name_that_is_taken_is_written_to(place, monkeypatch):
    """Be it a link to somewhere else."""
    Path("target").write_text("mine")
    os.symlink("target", "file.unfinished_taken")
    monkeypatch.setattr(basics.secrets, "token_hex", lambda _: "taken")
    with pytest.raises(FileExistsError):
        basics.write_whole(Path("file"), lambda file: file.write(b"new"))
    assert Path("target").read_text() == "mine"


@posix
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(place):
    """Dead is whose lock is gone."""
    code = """import sys, time; from pathlib import Path; from machinery import basics
def write(file): file.write(b"half"); file.flush(); print("writing", flush=True); time.sleep(600)
basics.write_whole(Path("file"), write)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    writers = [
        subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        assert all(writer.stdout.readline() == b"writing\n" for writer in writers)
        assert len(list(place.glob("file.unfinished_*"))) == 2
        writers[0].kill()
        writers[0].wait()
        basics.write_whole(Path("file"), lambda file: file.write(b"whole"))
        [left] = place.glob("file.unfinished_*")
        assert left.read_bytes() == b"half"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    basics.sweep(".")
    assert files_below(place) == {"file"}


@pytest.mark.parametrize(
    "words",
    [
        ["publish", "--run_name=run", "--to=new"],
        ["import", "--source=model", "--run_name=new"],
    ],
    ids=lambda words: words[0],
)
def test_a_run_that_came_while_another_was_made_is_not_overwritten(
    exchange, here, monkeypatch, words
):
    """It was not there when this one looked, and is there when this one has the lock."""
    assert exchange("export", "--run_name=run", "--to=model").status == 0
    lock_run = runs.lock_run

    def lock_later(folder: Path):
        shutil.copytree("models/run", "models/new")
        return lock_run(folder)

    monkeypatch.setattr(runs, "lock_run", lock_later)
    assert "models/new holds a run" in refused(exchange(*words)).replace(os.sep, "/")
    assert Path("models/new/checkpoint.pt").read_bytes() == CHECKPOINT.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["publish", "--run_name=run", "--to=new"],
        ["import", "--source=model", "--run_name=new"],
    ],
    ids=lambda words: words[0],
)
def test_no_run_is_made_where_another_process_trains(exchange, here, words):
    assert exchange("export", "--run_name=run", "--to=model").status == 0
    with runs.lock_run(Path("models/new")):
        assert "another process is training this run" in refused(exchange(*words))
        assert files_below(Path("models/new")) == {".lock"}
    assert not Path("models/new").exists()
    assert exchange(*words).status == 0
    assert ddpm.load_run("new")


# ---- safety measures that are not supported ------------------------------------------------------


def fail_for_folders(monkeypatch, number: int) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@posix
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF"])
def test_a_folder_that_cannot_be_flushed_stops_nothing(here, run, monkeypatch, name):
    fail_for_folders(monkeypatch, getattr(errno, name))
    assert run(*TRAIN, "--run_name=run", "--epochs=2").status == 0
    assert checkpoints.load("run")["step"] == 5


@posix
def test_a_folder_that_may_not_be_opened_is_not_flushed(place, monkeypatch):
    def fail(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", fail)
    basics.flush_folder(place)


@posix
def test_a_folder_on_a_broken_disk_is_an_error(place, monkeypatch):
    fail_for_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError):
        basics.write_whole(Path("file"), lambda file: file.write(b"new"))


@pytest.mark.parametrize("name", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_a_lock_that_cannot_be_had_says_what_follows(here, run, monkeypatch, name):
    def fail(lock, **_):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number)) if name != "ENOSYS" else NotImplementedError

    (here / "datasets").rename("cached")
    monkeypatch.setattr(runs.FileLock, "acquire", fail)
    result = run(*TRAIN, "--run_name=other", "--epochs=1")
    assert result.status == 0, result.err
    for folder in (Path("models/other"), Path("datasets/.cache")):
        assert result.out.count(f"{folder}: files cannot be locked here; nothing keeps") == 1
    assert result.out.count("files cannot be locked here") == result.out.count("start none") == 2


def test_a_folder_that_may_not_be_locked_is_an_error(place, monkeypatch):
    def fail(lock, **_):
        raise PermissionError(errno.EACCES, "Permission denied", "models/run/.lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(PermissionError), runs.lock_run(Path("models/run")):
        pass
    assert files_below(place) == set()


# ---- a place is no setting -----------------------------------------------------------------------


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_run_resumes_under_another_name_as_under_its_own(here, run, move):
    for kind in ("models", "results"):
        move(f"{kind}/run", f"{kind}/moved")
    result = run(*TRAIN, "--run_name=moved", "--epochs=2")
    assert result.status == 0, result.err
    assert "3 steps are done" in result.out
    assert "run_name=moved" in result.out
    moved = checkpoints.load("moved")
    assert moved["settings"]["run_name"] == "moved"
    assert run(*TRAIN, "--run_name=straight", "--epochs=1").status == 0
    assert run(*TRAIN, "--run_name=straight", "--epochs=2").status == 0
    for name, weight in checkpoints.load("straight")["average"].items():
        assert torch.equal(weight, moved["average"][name])


def test_what_really_differs_is_refused_under_another_name_too(here, run):
    shutil.copytree("models/run", "models/copy")
    line = refused(run(*TRAIN, "--run_name=copy", "--epochs=2", "--seed=5"))
    assert "--seed was 0, is now 5" in line
    assert "--run_name was" not in line


def test_another_run_to_begin_from_is_passed_over_once_a_run_has_begun(here, run):
    words = [*TRAIN, "--run_name=tuned"]
    assert run(*words, "--epochs=1", "--init_from=run").status == 0
    shutil.rmtree("models/run")
    for epochs, more in ((2, []), (3, ["--init_from=run"]), (4, ["--init_from=gone"])):
        result = run(*words, f"--epochs={epochs}", *more)
        assert result.status == 0, result.err
        assert ("passed over" in result.out) == (more == ["--init_from=gone"])
        assert checkpoints.load("tuned")["settings"]["init_from"] == "run"


# ---- tables --------------------------------------------------------------------------------------

COLUMNS = ("name", "number")


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(newline="")))


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_row_that_was_cut_off_is_taken_out_and_told(place, capsys, cut):
    """No row is glued to it, wherever it was cut: '1,2' may have been '1,234'."""
    table = Path("new/table.csv")
    basics.append_rows(table, COLUMNS, [["one", 1], ["two", 22]])
    table.write_bytes(table.read_bytes()[:-cut])
    basics.append_rows(table, COLUMNS, [["three", 3]])
    assert rows_of(table) == [list(COLUMNS), ["one", "1"], ["three", "3"]]
    assert ("cut off" in capsys.readouterr().out) == (cut < 7)  # 7 are a whole row


def test_cells_are_kept_and_none_is_empty(place):
    table = Path("table.csv")
    for cell in ("a,b", 'a "b"', "a\nb", None, 0.5):
        basics.append_rows(table, COLUMNS, [[cell, 1]])
    assert rows_of(table) == [
        list(COLUMNS),
        *([cell, "1"] for cell in ("a,b", 'a "b"', r"a\nb", "", "0.5")),
    ]
    assert b"\r" not in table.read_bytes()  # line ends as git and cut take them


@posix
def test_a_full_disk_adds_no_part_of_a_row(place):
    resource = pytest.importorskip("resource")
    table = Path("table.csv")
    basics.append_rows(table, COLUMNS, [["one", 1]])
    before = table.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
        with pytest.raises(OSError) as caught:
            basics.append_rows(table, COLUMNS, [["a longer name", 2]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(table)
    assert table.read_bytes() == before


def test_the_tables_of_evaluations_are_whole(place):
    table = Path("results/run/evaluation.csv")
    row = dict.fromkeys(evaluate.COLUMNS, 1.5)
    evaluate.add_row(table, row)
    table.write_bytes(table.read_bytes()[:-3])
    evaluate.add_row(table, row)
    assert [len(row) for row in rows_of(table)] == [len(evaluate.COLUMNS)] * 2


# ---- found before work ---------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS = {"a folder": Path.mkdir, "a pipe": make_pipe}


@posix
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_what_is_no_file_in_the_place_of_a_checkpoint_is_found_before_training(
    here, run, monkeypatch, kind, name
):
    """Not by the save at the end. A pipe would be waited for."""
    monkeypatch.setattr(ddpm.Training, "advance", lambda *_: pytest.fail("it trains"))
    path = Path("models/run", name)
    if path.exists():
        path.rename("models/run/checkpoint.previous.pt")  # a good one to fall back on
    kind(path)
    before = files_below(here)
    line = refused(run(*TRAIN, "--run_name=run", "--epochs=2"))
    assert f"{path} cannot be read as a checkpoint (it is no regular file)" in line
    assert files_below(here) == before


@posix
@pytest.mark.parametrize("words", [["sample"], ["sample", "--run_name=run"]])
def test_no_reader_waits_for_a_pipe(here, run, words):
    CHECKPOINT.unlink()
    os.mkfifo(CHECKPOINT)
    refused(run(*words))


@posix
@pytest.mark.parametrize("name", ["evaluation.csv", "evaluation.png"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_no_file_in_the_place_of_an_evaluation_is_found_before_it(
    here, run_main, monkeypatch, kind, name
):
    monkeypatch.setattr(evaluate, "make_samples", lambda *_: pytest.fail("it samples"))
    kind(Path("results/run", name))
    line = refused(run_main(evaluate.main, "--run_name=run", "--n_img=16", "--steps=2"))
    assert f"{name} is no regular file" in line


@posix
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_no_import_waits_for_a_pipe(exchange, here, name):
    assert exchange("export", "--run_name=run", "--to=model").status == 0
    Path("model", name).unlink()
    os.mkfifo(Path("model", name))
    assert "no regular file" in refused(exchange("import", "--source=model", "--run_name=new"))


@pytest.mark.parametrize("n_img, batch_size", [(10**9, 10**9), (10**8, 10**8)])
def test_a_batch_beyond_all_memory_is_refused_at_once(here, run, n_img, batch_size):
    before = files_below(here)
    began = time.monotonic()
    numbers = [f"--n_img={n_img}", f"--batch_size={batch_size}", "--img_size=1024"]
    line = refused(run("sample", "--run_name=run", *numbers, "--steps=2", "--device=cpu"))
    assert "out of memory; a smaller --batch_size" in line
    assert time.monotonic() - began < 5
    assert files_below(here) == before


def test_many_images_take_no_list(here, run, monkeypatch):
    def stop(*_, **__):
        raise UserError("so far")

    monkeypatch.setattr(ddpm, "generate", stop)
    began = time.monotonic()
    words = ["sample", "--run_name=run", "--n_img=1e9", "--steps=2", "--batch_size=1"]
    assert "so far" in refused(run(*words))
    assert time.monotonic() - began < 3


REFUSALS = [
    ["--seed=5", "--epochs=2"],
    ["--resume=no"],
    ["--dataset=broken"],
    ["--run_name=new", "--dataset=broken"],
    ["--run_name=new", "--init_from=run", "--width=32"],
]


@pytest.mark.parametrize("words", REFUSALS, ids=" ".join)
def test_a_refused_training_leaves_nothing_behind(here, run, words):
    """No lock, no folder."""
    Path("models/run/.lock").unlink()
    shutil.rmtree("results")
    Path("broken").mkdir()
    for name in ("a.png", "b.png"):
        Path("broken", name).write_text("no picture")
    flags = {word.partition("=")[0]: word for word in [*TRAIN[1:], "--run_name=run", *words]}
    before = files_below(Path("models"))
    refused(run("train", *flags.values()))
    assert files_below(Path("models")) == before
    assert not Path("results").exists()


def test_a_lock_beside_which_something_was_saved_stays(here):
    """So the next one to lock it waits for the same file."""
    with runs.lock_run(Path("models/new")):
        Path("models/new/checkpoint.pt").write_text("saved")
    assert files_below(Path("models/new")) == {".lock", "checkpoint.pt"}


# ---- ~ and .. ------------------------------------------------------------------------------------


@posix
def test_a_home_folder_is_meant_wherever_a_path_is_read(here, run, run_main, exchange, monkeypatch):
    """Behind an equals sign no shell expands it."""
    home = here / "home"
    paint(home / "pictures")
    monkeypatch.setenv("HOME", str(home))
    words = [word for word in TRAIN if not word.startswith("--dataset")]
    assert run(*words, "--dataset=~/pictures", "--run_name=new", "--epochs=1").status == 0
    assert checkpoints.load("new")["settings"]["dataset"] == str(home / "pictures")
    assert exchange("export", "--run_name=run", "--to=~/deep/model").status == 0
    assert exchange("import", "--source=~/deep/model", "--run_name=again").status == 0
    picture = "~/pictures/picture_0000.png"
    flags = [f"--init_image={picture}", f"--mask={picture}", "--steps=2", "--device=cpu"]
    assert run("sample", "--run_name=run", "--n_img=1", *flags).status == 0
    monkeypatch.setitem(evaluate.FEATURES, "efficientnet", lambda device: None)
    words = ["--run_name=run", "--n_img=16", "--steps=2", "--dataset=~/pictures"]
    assert "the data set holds 10 images" in refused(run_main(evaluate.main, *words))
    assert not list(here.glob("~*"))


@posix
def test_nobodys_home_is_no_path(exchange, here):
    assert "is not a path" in refused(exchange("export", "--run_name=run", "--to=~no-one/model"))
    assert not list(here.glob("~*"))


@pytest.mark.parametrize("to", ["a/..", ".", "models/..", "a/../models", "results/run/."])
def test_what_exists_by_another_name_exists(exchange, here, to):
    before = files_below(here)
    assert f"--to={to} exists" in refused(exchange("export", "--run_name=run", f"--to={to}"))
    assert files_below(here) == before


def test_what_does_not_exist_by_another_name_is_written(exchange, here):
    assert exchange("export", "--run_name=run", "--to=new/../model").status == 0
    assert Path("model/README.md").exists()
    assert not Path("new").exists()


@posix
def test_what_a_killed_export_left_is_removed_by_the_next(exchange, here):
    """And what a living one writes is not."""
    Path("out/.unfinished_k1ll3d__/model").mkdir(parents=True)
    with basics.unfinished_folder(Path("out")) as living:
        assert exchange("export", "--run_name=run", "--to=out/model").status == 0
        assert {path.name for path in Path("out").iterdir()} == {"model", living.name}
    assert {path.name for path in Path("out").iterdir()} == {"model"}
    assert json.loads(Path("out/model/unet/config.json").read_text())


def test_an_export_that_fails_leaves_no_folders(exchange, here, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tools.exchange, "write_card", fail)
    assert "No space left" in refused(exchange("export", "--run_name=run", "--to=deep/er/model"))
    assert not Path("deep").exists()


@pytest.mark.parametrize("name", ["models", "results", "datasets"])
def test_a_file_where_a_folder_must_be_is_named_itself(here, run, name):
    paint(Path("pictures"))
    shutil.rmtree(name, ignore_errors=True)
    Path(name).write_text("x")
    line = refused(run(*TRAIN, "--run_name=run", "--epochs=1"))
    assert f"{name} must be a folder, but is a file; move it away" in line
    assert Path(name).read_text() == "x"


def test_a_folder_without_a_model_is_refused_by_what_is_missing(here, exchange):
    Path("bare").mkdir()
    line = refused(exchange("import", "--source=bare", "--run_name=new"))
    assert "--source=bare holds no model of diffusers: no bare" in line
    assert "Errno" not in line
