"""The harm that weeks of training meet, done for real: kills, signals, full disks, second copies, dead workers, changed settings.

A run that was killed anywhere, however often, must end with the bits of one that was left alone (on a CPU). Nothing of
the scripts is replaced: where a kill or a full disk has to hit one certain moment, the operating system's own call does
the harm. Each script is a process of its own, forked from one that has imported PyTorch, since an import takes seconds.
"""

import csv
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import datasets
import models
import engine
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = "--image-size 32 --batch-size 8 --workers 0 --device cpu --amp off --epochs 3 --lr 0.01".split()
FINISHED = {"best.pt", "config.json", "lock", "log.csv", "predictions.csv", "val_predictions.csv"}
PATIENCE = 120  # seconds that a small step may take on a busy machine before a test counts it as hanging

SERVER = r"""
import gc, json, os, runpy, sys
sys.path.insert(0, os.getcwd())
import h5py, matplotlib.pyplot, scipy.stats, sklearn.model_selection, torch_lr_finder, torchvision, tqdm
import datasets, models, splits
gc.collect()
gc.freeze()
for line in sys.stdin:
    ask = json.loads(line)
    if "wait" in ask:
        pid, status = os.waitpid(ask["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    ready, leads = os.pipe()
    pid = os.fork()
    if not pid:
        break
    os.close(leads)
    os.read(ready, 1)  # returns when the child leads its session: only then can its group be killed
    os.close(ready)
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
os.close(ready)
os.close(leads)
for number, name in ((0, os.devnull), (1, ask["output"] + ".out"), (2, ask["output"] + ".err")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
exec(ask["before"])
sys.argv = ask["argv"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# before a script: die at the n-th time that it asks the operating system to sync, rename or remove a file
DIE_AT_CALL = """
import os, signal
calls = 0
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {n}:
            os.killpg(0, signal.SIGKILL) if {group} else os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.fsync, os.replace, os.unlink = map(dying, (os.fsync, os.replace, os.unlink))
"""
# die when the n-th image is decoded
DIE_AT_IMAGE = """
import os, signal, cv2
decode, images = cv2.imdecode, 0
def dying(*args):
    global images
    images += 1
    if images == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*args)
cv2.imdecode = dying
"""
# fill the disk of a folder just before the n-th renaming, so that the next file finds no room
FILL_AT_CALL = """
import os
replace, calls = os.replace, 0
def filling(*args):
    global calls
    calls += 1
    replace(*args)
    if calls == {n}:
        with open({filler!r}, "wb", buffering=0) as handle:
            try:
                while True:
                    handle.write(bytes(4096))
            except OSError:
                pass
os.replace = filling
"""


class Starter:
    """Starts scripts of the repository in processes of their own, each the leader of a session of its own."""

    def __init__(self, folder):
        environment = dict(
            os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", GIT_CEILING_DIRECTORIES="/"
        )
        self.folder, self.number = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **question):
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *argv, before=""):
        self.number += 1
        output = self.folder / str(self.number)
        for end in (".out", ".err"):
            output.with_name(output.name + end).touch()
        return Script(
            self, output, self.ask(argv=[script, *map(str, argv)], output=str(output), before=before)
        )

    def run(self, script, *argv, before=""):
        """Start and wait; the ended Script."""
        started = self.start(script, *argv, before=before)
        started.wait()
        return started


class Script:
    """A started script: .pid, .status once it has ended (negative: the signal that ended it), .out and .err as text."""

    def __init__(self, starter, output, pid):
        self.starter, self.output, self.pid, self.status = starter, output, pid, None

    def poll(self):
        if self.status is None:
            self.status = self.starter.ask(wait=self.pid)
        return self.status

    def wait(self, patience=PATIENCE):
        until(lambda: self.poll() is not None, self, patience)
        return self.status

    def kill(self, number=signal.SIGKILL, group=True):
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def out(self):
        return self.output.with_name(self.output.name + ".out").read_text(errors="surrogateescape")

    @property
    def err(self):
        return self.output.with_name(self.output.name + ".err").read_text(errors="surrogateescape")

    @property
    def epochs(self):
        """The epochs that it has finished, by its own account."""
        return [int(line.split("/")[0][6:]) for line in self.out.splitlines() if line.startswith("epoch ")]

    def family(self):
        """Processes of its session: the data workers and itself."""
        found = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                found.append(int(folder.name))
        return found


def until(condition, script=None, patience=PATIENCE):
    """Wait for a condition, asking 200 times a second; fails, and ends the script, after `patience` seconds."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            text = f"{script.out}{script.err}" if script else ""
            if script:
                script.kill()
            pytest.fail(f"nothing happened for {patience} s; {text[-2000:]}")
        time.sleep(0.005)


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    found = Starter(tmp_path_factory.mktemp("output"))
    yield found
    found.server.stdin.close()
    found.server.wait()


@pytest.fixture(scope="module")
def cells(demo, tmp_path_factory):
    """Folder of 4 classes of 8 cells: 3 steps of 8 an epoch."""
    folder = tmp_path_factory.mktemp("four") / "bm"
    for name in ("EBO", "EOS", "LYT", "NGS"):
        files = sorted((demo / "bm").glob(f"*/{name}/**/*.jpg"))[:8]
        assert len(files) >= 5
        (folder / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / name)
    return folder


def command(cells, runs, *more, model="squeezenet1_1"):
    """train.py's arguments for fold 0."""
    return [
        "train.py",
        "--model",
        model,
        "--init",
        "random",
        "--fold",
        0,
        "--data",
        cells,
        "--runs",
        runs,
        *OPTIONS,
        *more,
    ]


def fold_of(runs, model="squeezenet1_1"):
    return runs / "train" / model / "random" / "fold0"


@pytest.fixture(scope="module")
def undisturbed(starter, cells, tmp_path_factory):
    """undisturbed(*more options, model=...) is the runs folder of a run that was left alone, made once."""
    made = {}

    def make(*more, model="squeezenet1_1"):
        if (model, *more) not in made:
            runs = made[model, *more] = tmp_path_factory.mktemp("undisturbed")
            done = starter.run(*command(cells, runs, *more, model=model))
            assert done.status == 0, done.err
        return made[model, *more]

    return make


def log(folder):
    """log.csv without its two columns of time."""
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv", newline="") as handle:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in csv.DictReader(handle)
        ]


def assert_same(runs, reference, model="squeezenet1_1"):
    """Two finished runs are equal: log.csv but for time, best.pt tensor by tensor, predictions byte by byte; nothing is left over."""
    ours, theirs = fold_of(runs, model), fold_of(reference, model)
    assert {file.name for file in ours.iterdir()} == FINISHED
    assert log(ours) == log(theirs)
    for name in ("predictions.csv", "val_predictions.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    a, b = (torch.load(folder / "best.pt", weights_only=True) for folder in (ours, theirs))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(tensor, b["state_dict"][key]) for key, tensor in a["state_dict"].items())
    assert {k: v for k, v in a.items() if k != "state_dict"} == {
        k: v for k, v in b.items() if k != "state_dict"
    }


def one_line(script, *parts):
    """Its stderr is one line (of a parser: after the usage), without a traceback, that has all parts."""
    lines = [line for line in script.err.splitlines() if line.strip()]
    if lines and lines[0].startswith("usage:"):
        lines = lines[-1:]
    assert "Traceback" not in script.err and len(lines) == 1, script.err
    for part in parts:
        assert part in lines[0], lines[0]


# ---------------------------------------------------------------- kills
@pytest.mark.long
def test_a_run_is_the_same_from_a_fresh_interpreter(run, cells, undisturbed, tmp_path):
    """The processes that these tests fork behave as `python train.py` does, which is killed here once as well."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    arguments = [sys.executable, *map(str, command(cells, tmp_path))]
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        until(lambda: len(log(fold_of(tmp_path))) >= 1 or killed.poll() is not None)
        killed.kill()
    done = run(*command(cells, tmp_path), cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("model", ["squeezenet1_1", "shufflenet_v2_x0_5"])  # dropout; batch norm
def test_killed_in_epochs_validation_and_prediction(starter, cells, undisturbed, tmp_path, model):
    """SIGKILL in the middle of a training step, in validation, and while both predictions are being made."""
    reference = undisturbed(model=model)
    config = json.loads((fold_of(reference, model) / "config.json").read_text())
    epoch, val, test = -(-config["train_images"] // 8) * 8, config["val_images"], config["test_images"]
    shutil.copytree(reference / "data", tmp_path / "data")  # its pass over the images is not repeated
    shutil.copy(reference / "split.csv", tmp_path)
    points = [
        epoch // 2,  # epoch 1
        epoch + 1,  # validation of epoch 1, again from the beginning
        epoch + val + 3,  # epoch 2
        epoch + val + epoch + 1,
    ]  # validation of epoch 2 or 3
    finish = [("val_predictions.csv", 2 * (epoch + val) + 1), ("predictions.csv", test)]
    for number, n in enumerate([*points, finish[0][1]]):
        logged = len(log(fold_of(tmp_path, model)))
        killed = starter.run(*command(cells, tmp_path, model=model), before=DIE_AT_IMAGE.format(n=n))
        assert killed.status in (-signal.SIGKILL, 0), killed.err
        assert all(done > logged for done in killed.epochs)
        assert number == len(points) or killed.status != 0
        assert killed.status == 0 or not (fold_of(tmp_path, model) / "predictions.csv").exists()
    done = starter.run(*command(cells, tmp_path, model=model))
    assert done.status == 0, done.err
    assert_same(tmp_path, reference, model)


def test_killed_while_predictions_are_made(starter, cells, undisturbed, tmp_path):
    """All epochs are trained: a kill during the predictions costs no epoch, and none of them stands there half written."""
    reference = undisturbed()
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    config = json.loads((fold_of(reference) / "config.json").read_text())
    run = fold_of(tmp_path)
    for file in run.glob("*"):
        file.unlink()
    trained = 3 * (-(-config["train_images"] // 8) * 8 + config["val_images"])
    for n in (trained + 1, 1, config["val_images"] + 1):  # val's predictions; again; the test images'
        killed = starter.run(*command(cells, tmp_path), before=DIE_AT_IMAGE.format(n=n))
        assert killed.status == -signal.SIGKILL and not (run / "predictions.csv").exists()
        assert killed.epochs == ([1, 2, 3] if n > trained else [])
    assert (run / "val_predictions.csv").exists() and len(log(run)) == 3
    done = starter.run(*command(cells, tmp_path))
    assert done.status == 0 and done.epochs == []
    assert_same(tmp_path, reference)


def test_killed_at_one_write_after_the_other(starter, cells, undisturbed, tmp_path):
    """One run, killed at the 4th, 5th, 6th, ... sync, renaming or removal of each new start, until it comes through."""
    reference = undisturbed()
    shutil.copytree(reference / "data", tmp_path / "data")
    shutil.copy(reference / "split.csv", tmp_path)
    for n in itertools.count(4):
        logged = len(log(fold_of(tmp_path)))
        killed = starter.run(*command(cells, tmp_path), before=DIE_AT_CALL.format(n=n, group=n % 2))
        assert killed.status in (-signal.SIGKILL, 0), killed.err
        assert all(done > logged for done in killed.epochs)
        if killed.status == 0:
            break
    assert n > 8
    assert_same(tmp_path, reference)


def test_another_optimizer_and_schedule_resume_exactly(starter, cells, undisturbed, tmp_path):
    """AdamW's two moments and step counts, and the place on the cosine, are in last.pt."""
    more = ("--optimizer", "adamw", "--schedule", "cosine")
    killed = starter.run(*command(cells, tmp_path, *more), before=DIE_AT_CALL.format(n=20, group=False))
    assert killed.status == -signal.SIGKILL and len(log(fold_of(tmp_path))) in (1, 2)
    assert starter.run(*command(cells, tmp_path, *more)).status == 0
    assert_same(tmp_path, undisturbed(*more))


@pytest.mark.long
def test_killed_at_every_write_of_a_run(starter, cells, undisturbed, tmp_path):
    """A fresh run for each sync, renaming and removal from the first to the last, killed there once and then finished."""
    reference = undisturbed("--epochs", 2)
    for n in itertools.count(1):
        runs = tmp_path / str(n)
        killed = starter.run(
            *command(cells, runs, "--epochs", 2), before=DIE_AT_CALL.format(n=n, group=n % 2)
        )
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.err
        logged = len(log(fold_of(runs)))
        done = starter.run(*command(cells, runs, "--epochs", 2))
        assert done.status == 0, done.err
        assert all(epoch > logged for epoch in done.epochs)
        assert_same(runs, reference)
        shutil.rmtree(runs)
    print(f"killed at each of {n - 1} calls")
    assert n > 25


@pytest.mark.long
def test_killed_in_the_range_test(starter, cells, tmp_path):
    """The rate is measured once: killed in the middle, in the trial and at both files, the same comes out as undisturbed."""
    more = ("--lr", "auto", "--batch-size", 2, "--epochs", 48, "--stop-lr", 1)
    reference, runs = tmp_path / "reference", tmp_path / "runs"
    done = starter.run(*command(cells, reference, *more))
    assert done.status == 0, done.err
    shutil.copytree(reference / "data", runs / "data")
    shutil.copy(reference / "split.csv", runs)
    measured = runs / "train" / "squeezenet1_1" / "random"
    # lr_range.csv and measured.json are synced, renamed, and the file beside is removed: 3 calls each
    for before in (
        *(DIE_AT_IMAGE.format(n=n) for n in (101, 301)),
        *(DIE_AT_CALL.format(n=n, group=False) for n in (1, 3, 5)),
    ):
        killed = starter.run(*command(cells, runs, *more), before=before)
        assert killed.status == -signal.SIGKILL and not (measured / "measured.json").exists()
    assert starter.run(*command(cells, runs, *more)).status == 0
    for name in ("measured.json", "lr_range.csv"):
        assert (measured / name).read_bytes() == (
            reference / "train" / "squeezenet1_1" / "random" / name
        ).read_bytes()
    assert_same(runs, reference)


@pytest.mark.long
def test_fifty_random_kills(starter, cells, undisturbed, tmp_path):
    """50 SIGKILLs at random moments, every second one of the main process alone: equal, and at most one epoch again a kill."""
    epochs, kills, moment, trained, orphans = 120, 0, random.Random(0), 0, []
    more = ("--epochs", epochs, "--workers", 1)
    reference = undisturbed(*more, model="shufflenet_v2_x0_5")
    run = fold_of(tmp_path, "shufflenet_v2_x0_5")
    start = time.monotonic()
    first = starter.start(*command(cells, tmp_path, *more, model="shufflenet_v2_x0_5"))
    until(lambda: len(log(run)) >= 1, first)
    reach = time.monotonic() - start  # from the start to the first logged epoch
    while kills < 50:
        script = (
            first
            if kills == 0
            else starter.start(*command(cells, tmp_path, *more, model="shufflenet_v2_x0_5"))
        )
        logged, end = len(log(run)), time.monotonic() + moment.uniform(0, 1.6 * reach)
        while (
            time.monotonic() < end and len(log(run)) < logged + 2
        ):  # a later start is faster than the first one
            time.sleep(0.005)
        assert script.poll() is None, f"ended by itself after {kills} kills: {script.err}"
        script.kill(group=kills % 2 == 0)
        assert script.wait() == -signal.SIGKILL
        kills, orphans, trained = kills + 1, [*orphans, script], trained + len(script.epochs)
        logged = len(log(run))
        assert not script.epochs or logged >= script.epochs[-1] - 1
    done = starter.run(*command(cells, tmp_path, *more, model="shufflenet_v2_x0_5"))
    assert done.status == 0, done.err
    again = trained + len(done.epochs) - epochs
    print(
        f"{kills} kills, {again} finished epochs trained again, {len(done.epochs)} epochs after the last kill"
    )
    assert 0 <= again <= kills
    assert_same(tmp_path, reference, "shufflenet_v2_x0_5")
    until(
        lambda: not any(script.family() for script in orphans)
    )  # data workers whose parent was killed are gone


# ---------------------------------------------------------------- signals, locks, workers
@pytest.mark.parametrize(
    "number, group, workers",
    [(signal.SIGINT, True, 1), (signal.SIGTERM, False, 0), (signal.SIGTERM, True, 1)],
)
def test_stopped_by_a_signal(starter, cells, tmp_path, number, group, workers):
    """Ctrl-C (of a terminal: to the whole group) and SIGTERM end a run within a step, with one line and status 128 + n."""
    script = starter.start(*command(cells, tmp_path, "--epochs", 1000, "--workers", workers))
    until(lambda: len(log(fold_of(tmp_path))) >= 2 or script.poll() is not None, script)
    before = len(script.epochs)
    script.kill(number, group)
    script.kill(number, group)  # an impatient user's second one changes nothing
    assert script.wait() == 128 + number
    one_line(script, f"stopped by {number.name}", "resumes")
    assert len(script.epochs) <= before + 2
    assert len(log(fold_of(tmp_path))) >= before  # what was being written was finished
    assert not list(fold_of(tmp_path).glob(".*.tmp"))
    until(lambda: not script.family())


AT_FORK = """
import multiprocessing, os, signal, time
import engine
import train
signal.signal(signal.SIGTERM, train.interrupt)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    multiprocessing.get_context("fork").Process(target=int).start()
    time.sleep(20)
    print("swallowed")
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_while_a_data_worker_is_forked_is_not_lost():
    """What is raised in Python's fork hooks is ignored there (os.register_at_fork)."""
    done = subprocess.run(
        [sys.executable, "-c", AT_FORK], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_stopped_in_the_range_test(starter, cells, tmp_path):
    """Also in the range test, whose own output is kept off the screen, the line is seen."""
    script = starter.start(*command(cells, tmp_path, "--lr", "auto", "--batch-size", 64, "--epochs", 1000))
    until(
        lambda: (tmp_path / "train/squeezenet1_1/random/measured.lock").exists() or script.poll() is not None,
        script,
    )
    time.sleep(0.5)
    script.kill(signal.SIGTERM, group=False)
    assert script.wait() == 143
    one_line(script, "stopped by SIGTERM")
    assert not (tmp_path / "train/squeezenet1_1/random/measured.json").exists()


def test_one_process_a_run(starter, cells, tmp_path):
    """A second train.py of the fold gets 75 at once; a lock is free as soon as its holder is killed, workers alive or not."""
    first = starter.start(*command(cells, tmp_path, "--epochs", 1000, "--workers", 1))
    until(lambda: len(log(fold_of(tmp_path))) >= 1 or first.poll() is not None, first)
    second = starter.run(*command(cells, tmp_path, "--epochs", 1000))
    assert second.status == 75
    one_line(second, "fold0", "busy")
    first.kill(group=False)
    assert first.wait() == -signal.SIGKILL
    third = starter.start(*command(cells, tmp_path, "--epochs", 1000))
    until(lambda: "resumes after epoch" in third.out or third.poll() is not None, third)
    third.kill()
    assert third.wait() == -signal.SIGKILL, third.err


@pytest.mark.parametrize("script", ["datasets.py", "overlaps.py"])
def test_ctrl_c_in_a_script_that_only_reads(starter, cells, tmp_path, script):
    """One line, as a signal ends a program, and no part of a result."""
    ended = starter.run(
        script,
        "--data",
        cells,
        "--runs",
        tmp_path / "runs",
        before=DIE_AT_IMAGE.replace("SIGKILL", "SIGINT").format(n=20),
    )
    assert ended.status == -signal.SIGINT
    one_line(ended, "stopped")
    assert not [file for file in (tmp_path / "runs").rglob("*") if file.is_file() and file.suffix != ".lock"]


AT_BIRTH = (
    "import os, signal; os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGKILL))"
)


def test_killed_while_a_data_worker_starts(starter, cells, tmp_path):
    """PyTorch's workers ask who their parent is once they have started: one born as its parent dies would wait for ever."""
    killed = starter.run(*command(cells, tmp_path, "--workers", 1), before=AT_BIRTH)
    assert killed.status == -signal.SIGKILL
    until(lambda: not killed.family())


def test_a_data_worker_dies(starter, cells, tmp_path):
    """The OOM killer takes a data worker: the run ends with a line, and leaves no process behind."""
    # epochs of a second: the signal must not come while the workers of a validation are forked, where Python ignores what
    # PyTorch's handler raises, and the loader would wait for its timeout of ten minutes
    script = starter.start(
        *command(cells, tmp_path, "--epochs", 1000, "--workers", 1, "--image-size", 224, "--batch-size", 2)
    )
    until(lambda: len(log(fold_of(tmp_path))) >= 1 or script.poll() is not None, script)
    for pid in script.family():
        if pid != script.pid:
            os.kill(pid, signal.SIGKILL)
    assert script.wait(60) == 1
    one_line(script, "DataLoader", "resumes")
    until(lambda: not script.family())


# ---------------------------------------------------------------- training that goes wrong
def test_a_loss_that_is_not_finite(starter, cells, tmp_path):
    """One line with epoch and rate at the end of the epoch; nothing looks finished."""
    script = starter.run(*command(cells, tmp_path, "--lr", "1e6"))
    assert script.status == 1
    one_line(script, "epoch 1", "1e+06", "--lr")
    assert not {"predictions.csv", "best.pt", "last.pt", "log.csv"} & {
        file.name for file in fold_of(tmp_path).iterdir()
    }


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs; small_disk(size) mounts it or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(text):
        mounted = os.path.ismount(folder)
        options = (
            ["-o", f"remount,size={text}"] if mounted else ["-t", "tmpfs", "-o", f"size={text}", "tmpfs"]
        )
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield size
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_in_the_second_checkpoint(starter, cells, undisturbed, small_disk):
    """Room for one epoch's files and not for the next ones beside: the first stay whole, and with room the run goes on."""
    disk = small_disk("10m")  # last.pt has 5.8 MB, and 8.7 MB where another epoch was best
    script = starter.run(*command(cells, disk))
    assert script.status == 1
    one_line(script, "disk full", "resumes")
    run = fold_of(disk)
    assert len(torch.load(run / "last.pt", weights_only=True)["history"]) == len(log(run)) >= 1
    assert not list(run.glob(".*.tmp")) and not (run / "predictions.csv").exists()
    logged = len(log(run))
    small_disk("40m")
    done = starter.run(*command(cells, disk))
    assert done.status == 0 and done.epochs[0] == logged + 1
    assert_same(disk, undisturbed())


def check_full_disk(starter, cells, disk, reference, n):
    """The disk is full from the n-th renaming on; False if there are fewer."""
    for entry in disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    script = starter.run(*command(cells, disk), before=FILL_AT_CALL.format(n=n, filler=str(disk / "filler")))
    if not (disk / "filler").exists():
        assert script.status == 0
        return False
    finished = (fold_of(disk) / "predictions.csv").exists()
    assert script.status == (0 if finished else 1), script.err
    if not finished:
        one_line(script, "resumes")
        assert "disk full" in script.err or "No space left" in script.err
        kept = {
            name: (fold_of(disk) / name).read_bytes()
            for name in ("log.csv", "config.json")
            if (fold_of(disk) / name).exists()
        }
        assert all(kept.values()) and not list((disk / "train").rglob("*.tmp*"))
    (disk / "filler").unlink()
    done = starter.run(*command(cells, disk))
    assert done.status == 0, done.err
    assert_same(disk, reference)
    return True


@pytest.mark.parametrize("n", [1, 4])
def test_disk_full(starter, cells, undisturbed, small_disk, n):
    """The split finds no room; log.csv finds none."""
    assert check_full_disk(starter, cells, small_disk("40m"), undisturbed(), n)


@pytest.mark.long
def test_disk_full_at_any_write(starter, cells, undisturbed, small_disk):
    """Full from the 2nd, 3rd, ... renaming on: configuration, last, log, best, predictions."""
    disk, n = small_disk("40m"), 2
    while check_full_disk(starter, cells, disk, undisturbed(), n):
        n += 1
    assert n > 9


# ---------------------------------------------------------------- machines that lack something
def test_too_little_shared_memory_is_named_before_anything_is_read(starter, cells, tmp_path):
    """Docker's /dev/shm has 64 MB; here it has 1 MB, in a mount namespace of the process alone."""
    before = (
        "import ctypes, subprocess\nassert ctypes.CDLL(None).unshare(0x20000) == 0\n"
        "for what in (['--make-rprivate', '/'], ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', '/dev/shm']):\n"
        "    subprocess.run(['mount', *what], check=True)"
    )
    script = starter.run(*command(cells, tmp_path, "--workers", 4, "--image-size", 224), before=before)
    if "AssertionError" in script.err or "CalledProcessError" in script.err:
        pytest.skip("no mount namespaces here")
    assert script.status == 1 and not list(tmp_path.iterdir())
    one_line(script, "/dev/shm has 1 MB", "4 data workers", "--shm-size", "--workers")


def test_a_file_system_without_locks(starter, cells, tmp_path):
    """The run's own lock cannot be had: its file and the system's reason are named."""
    before = (
        "import errno, fcntl\ndef lockf(*_):\n    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.lockf = lockf"
    )
    script = starter.run(*command(cells, tmp_path), before=before)
    assert script.status == 1 and "Traceback" not in script.err
    assert all(word in script.err.splitlines()[-1] for word in ("fold0/lock", "No locks available", "--runs"))


def test_output_that_nobody_reads_any_more(starter, cells, tmp_path):
    """`python train.py ... | head`: the status of SIGPIPE, and no word."""
    before = "import os\nreader, writer = os.pipe()\nos.dup2(writer, 1)\nos.close(reader)"
    script = starter.run(*command(cells, tmp_path), before=before)
    assert script.status == 128 + signal.SIGPIPE and script.err.strip().count("\n") == 0


@pytest.mark.long
def test_compiling_without_a_compiler_is_one_line(starter, cells, tmp_path):
    before = (
        f"import os\nos.environ.update(PATH='/nowhere', CXX='/nowhere/g++', CC='/nowhere/gcc', "
        f"TORCHINDUCTOR_CACHE_DIR={str(tmp_path / 'cache')!r})"
    )
    script = starter.run(*command(cells, tmp_path, "--compile"), before=before)
    assert script.status == 1
    one_line(script, "--compile", "g++")


# ---------------------------------------------------------------- a run is what it says it is
def begun(starter, cells, runs, undisturbed):
    """A run killed after its first epoch's checkpoint; the folder."""
    shutil.copytree(undisturbed() / "data", runs / "data")
    shutil.copy(undisturbed() / "split.csv", runs)
    script = starter.start(*command(cells, runs), before=DIE_AT_CALL.format(n=9, group=False))
    assert script.wait() == -signal.SIGKILL
    assert (fold_of(runs) / "last.pt").exists()
    return fold_of(runs)


def test_other_settings_are_refused(starter, cells, undisturbed, tmp_path):
    """Each setting of which the results depend is named when it has changed; those of the machine may change."""
    run = begun(starter, cells, tmp_path, undisturbed)
    before = {
        file.name: file.read_bytes()
        for file in run.iterdir()
        if file.name != "lock" and file.suffix != ".tmp"
    }
    changed = {
        "seed": ("--seed", 1),
        "epochs": ("--epochs", 4),
        "batch_size": ("--batch-size", 4),
        "lr": ("--lr", 0.02),
        "image_size": ("--image-size", 64),
        "stop_lr": ("--stop-lr", 0.5),
        "amp": ("--amp", "bf16"),
        "memory_format": ("--memory-format", "contiguous"),
        "optimizer": ("--optimizer", "adamw"),
        "schedule": ("--schedule", "cosine"),
    }
    for key, more in changed.items():
        script = starter.run(*command(cells, tmp_path, *more))
        assert script.status == 1, (key, script.err)
        one_line(script, f"{key} was ", "is now", "--runs")
    split = (tmp_path / "split.csv").read_text()
    (tmp_path / "split.csv").write_text(
        split.replace(",train,", ",val,", 1).replace(",val,", ",train,", 1)
        if ",val," in split.split(",train,")[0]
        else split.replace("train", "val", 1)
    )
    script = starter.run(*command(cells, tmp_path))
    assert script.status == 1
    one_line(script, "begun with other split;")
    (tmp_path / "split.csv").write_text(split)
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.name != "lock"} == before
    assert starter.run(*command(cells, tmp_path, "--workers", 1)).status == 0
    assert_same(tmp_path, undisturbed())


def test_other_weights_and_data_are_refused(starter, cells, undisturbed, tmp_path):
    """The checkpoint of --init NAME=PATH was made anew, or an image was exchanged: the run does not go on."""
    data, runs, weights = tmp_path / "bm", tmp_path / "runs", tmp_path / "start.pt"
    shutil.copytree(cells, data)
    shutil.copy(fold_of(undisturbed()) / "best.pt", weights)
    arguments = command(data, runs, "--init", f"mine={weights}")
    assert starter.run(*arguments, before=DIE_AT_CALL.format(n=16, group=False)).status == -signal.SIGKILL
    assert list((runs / "train/squeezenet1_1/mine/fold0").glob("*.pt"))
    content = torch.load(weights, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, weights)
    script = starter.run(*arguments)
    assert script.status == 1
    one_line(script, "begun with other initial weights;")
    shutil.copy(fold_of(undisturbed()) / "best.pt", weights)
    one, other = sorted(data.glob("EBO/*"))[0], sorted(data.glob("LYT/*"))[0]
    shutil.copy(other, one)
    script = starter.run(*arguments)
    assert script.status == 1
    assert "begun with other images" in script.err and "Traceback" not in script.err


def test_fit_itself_refuses_other_images_and_settings_and_says_when_nothing_is_left(cells, tmp_path, capsys):
    """As a notebook calls it, where no config.json stands guard."""
    data = datasets.open_dataset(cells)
    one, two = data.subset(np.arange(0, len(data), 2)), data.subset(np.arange(1, len(data), 2))
    options = {
        "lr": 0.01,
        "epochs": 1,
        "batch_size": 8,
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    net = models.build_model("squeezenet1_1", len(data.classes), None, 32)
    rows = engine.fit(tmp_path / "run", net, one, two, **options)
    capsys.readouterr()
    assert (
        engine.fit(tmp_path / "run", net, one, two, **options) == rows
        and "nothing left to train" in capsys.readouterr().out
    )
    for images, more, word in (
        ((two, one), {}, "images"),
        ((one, two), {"lr": 0.1}, "lr"),
        ((one, two), {"seed": 3}, "seed"),
    ):
        with pytest.raises(SystemExit, match=f"begun with other {word};"):
            engine.fit(tmp_path / "run", net, *images, **options | more)


def test_images_gone_and_new(starter, cells, undisturbed, tmp_path):
    """Images that the split names and that are gone end it, those that it does not know are left out; both are said."""
    data, runs = tmp_path / "bm", tmp_path / "runs"
    shutil.copytree(cells, data)
    runs.mkdir()
    shutil.copy(undisturbed() / "split.csv", runs)
    gone = sorted(data.glob("EOS/*"))[:2]
    for file in gone:
        file.rename(tmp_path / file.name)
    script = starter.run(*command(data, runs))
    assert script.status == 1
    one_line(script, "2 of its", f"EOS/{gone[0].name}")
    assert not fold_of(runs).exists()
    for file in gone:
        (tmp_path / file.name).rename(file)
    shutil.copy(gone[0], data / "EOS" / "new, and äß.JPG")
    script = starter.run(*command(data, runs, "--epochs", 1))
    assert script.status == 0
    assert "1 images" in script.err and "new, and äß.JPG" in script.err and "left out" in script.err
    assert "new, and" not in (fold_of(runs) / "predictions.csv").read_text()


def test_what_config_json_records(undisturbed, cells):
    """Arguments, versions, device, the data's and the split's fingerprint, the hash of the weights and the counts."""
    config = json.loads((fold_of(undisturbed()) / "config.json").read_text())
    assert (
        config["versions"]["torch"] == torch.__version__.split("+")[0]
        or config["versions"]["torch"] == torch.__version__
    )
    assert {"python", "torchvision", "numpy", "commit"} <= set(config["versions"])
    assert (
        config["device"] == "cpu"
        and config["gpu"] is None
        and config["weights"] is None
        and config["lr"] == 0.01
    )
    assert len(config["data"]) == len(config["split"]) == 64
    assert config["data"] == json.loads((undisturbed() / "data" / "bm.json").read_text())["fingerprint"]
    assert config["train_images"] + config["val_images"] + config["test_images"] == len(
        list(cells.glob("*/*.jpg"))
    )


# ---------------------------------------------------------------- data sets
KILL_AT_CROP = """
import datasets, os, signal, cv2
encode, calls = cv2.imencode, []
def kill(*arguments):
    calls.append(arguments)
    if len(calls) > {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
cv2.imencode = kill
"""


def test_cropping_killed_and_done_twice_at_once(starter, demo, tmp_path):
    """The crops of a COCO set: two processes at once make one set, a killed one begins anew, both equal an undisturbed one."""

    def crops(folder):
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted((folder / ".crops").rglob("*.png"))
        }

    names = ("alone", "killed", "shared")
    folders = {name: tmp_path / name / "cd" for name in names}
    for folder in folders.values():
        shutil.copytree(demo / "cd", folder, ignore=shutil.ignore_patterns(".crops*"))
    arguments = {
        name: ["datasets.py", "--data", folders[name], "--runs", tmp_path / name / "runs"] for name in names
    }
    assert starter.run(*arguments["alone"]).status == 0
    assert crops(folders["alone"])
    for n in (1, 8):
        killed = starter.run(*arguments["killed"], before=KILL_AT_CROP.format(n=n))
        assert killed.status == -signal.SIGKILL and not (folders["killed"] / ".crops").exists()
    assert starter.run(*arguments["killed"]).status == 0
    both = [starter.start(*arguments["shared"]) for _ in range(2)]
    assert [script.wait() for script in both] == [0, 0], both[0].err + both[1].err
    for name in ("killed", "shared"):
        assert crops(folders[name]) == crops(folders["alone"])
        assert not (folders[name] / ".crops.part").exists()
