"""The harm that weeks of training meet, done for real: kills, signals, full disks, second copies.

A run that was killed anywhere, however often, must end with the bits of one that was left alone (on a CPU).
Nothing of the scripts is replaced: where the harm has to come at one certain moment, the operating system's
own call does it. Each script is a process of its own, forked from one that has imported PyTorch.
"""

import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_log, until

MODEL = "squeezenet1_1"
OPTIONS = "--image-size 32 --batch-size 8 --workers 0 --device cpu --amp off --epochs 3 --lr 0.01"
FINISHED = {"best.pt", "config.json", "lock", "log.csv", "predictions.csv", "val_predictions.csv"}

SERVER = r"""
import gc, json, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background of a shell
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
# die just after the n-th time that a file of this name has appeared
DIE_AFTER = """
import os, signal
replace, count = os.replace, 0
def dying(source, target):
    global count
    replace(source, target)
    count += os.path.basename(target) == {name!r}
    if count == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
"""
# send a signal to oneself or to the group before the n-th step of the optimizer
DIE_AT_STEP = """
import os, signal, torch
step, count = torch.optim.SGD.step, 0
def dying(*args, **kwargs):
    global count
    count += 1
    if count == {n}:
        (os.killpg if {group} else os.kill)(os.getpid(), {number})
    return step(*args, **kwargs)
torch.optim.SGD.step = dying
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
    """Starts scripts of the repository, each in a process that leads a session of its own."""

    def __init__(self, folder, cells):
        environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "GIT_CEILING_DIRECTORIES": "/"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command, self.folder, self.cells, self.number = [sys.executable, "-c", SERVER], folder, cells, 0
        self.server = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)

    def ask(self, **question):
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *argv, before=""):
        self.number += 1
        output = self.folder / str(self.number)
        for end in (".out", ".err"):
            output.with_suffix(end).touch()
        pid = self.ask(argv=[*map(str, argv)], output=str(output), before=before)
        return Script(self, output, pid)

    def run(self, *argv, before=""):
        """Start and wait; the ended Script."""
        started = self.start(*argv, before=before)
        started.wait()
        return started

    def begin(self, runs, more="", before="", model=MODEL):
        """train.py of fold 0, started."""
        return self.start(*command(self.cells, runs, more, model), before=before)

    def train(self, runs, more="", before="", model=MODEL):
        """train.py of fold 0, ended: killed where `before` does so, else with status 0."""
        ended = self.run(*command(self.cells, runs, more, model), before=before)
        assert ended.status in ((0, -signal.SIGKILL) if before else (0,)), ended.err
        return ended


class Script:
    """A started script: .pid, .status once it has ended (negative: by that signal), .out and .err as text."""

    def __init__(self, starter, output, pid):
        self.starter, self.output, self.pid, self.status = starter, output, pid, None

    def poll(self):
        if self.status is None:
            self.status = self.starter.ask(wait=self.pid)
        return self.status

    def wait(self):
        self.until(lambda: False)
        return self.status

    def until(self, condition):
        """Wait until a condition holds or the script has ended."""
        try:
            until(lambda: condition() or self.poll() is not None, lambda: f"{self.out}{self.err}"[-2000:])
        finally:
            if sys.exc_info()[0]:
                self.kill()

    def kill(self, number=signal.SIGKILL, group=True):
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def out(self):
        return self.output.with_suffix(".out").read_text(errors="surrogateescape")

    @property
    def err(self):
        return self.output.with_suffix(".err").read_text(errors="surrogateescape")

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


def command(cells, runs, more="", model=MODEL):
    """train.py's arguments for fold 0."""
    arguments = f"train.py --model {model} --init random --fold 0 {OPTIONS} {more}".split()
    return [*arguments, "--data", cells, "--runs", runs]


def fold_of(runs, model=MODEL):
    return runs / "train" / model / "random" / "fold0"


@pytest.fixture(scope="module")
def starter(demo, tmp_path_factory):
    """A Starter with a folder of 4 classes of 8 cells: 3 steps of 8 an epoch."""
    cells = tmp_path_factory.mktemp("four") / "bm"
    for name in ("EBO", "EOS", "LYT", "NGS"):
        files = sorted((demo / "bm").glob(f"*/{name}/**/*.jpg"))[:8]
        assert len(files) >= 5
        (cells / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, cells / name)
    found = Starter(tmp_path_factory.mktemp("output"), cells)
    yield found
    found.server.stdin.close()
    found.server.wait()


@pytest.fixture(scope="module")
def undisturbed(starter, tmp_path_factory):
    """undisturbed(more options, model=...) is the runs folder of a run that was left alone, made once."""
    made = {}

    def make(more="", model=MODEL):
        if (model, more) not in made:
            runs = made[model, more] = tmp_path_factory.mktemp("undisturbed")
            starter.train(runs, more, model=model)
        return made[model, more]

    return make


def prepare(runs, reference):
    """A new runs folder with the split and the pass over the images of another, not to be repeated."""
    shutil.copytree(reference / "data", runs / "data")
    shutil.copy(reference / "split.csv", runs)


def assert_same(runs, reference, model=MODEL):
    """Two finished runs are equal: log.csv but for time, best.pt, predictions; nothing is left over."""
    ours, theirs = fold_of(runs, model), fold_of(reference, model)
    assert {file.name for file in ours.iterdir()} == FINISHED
    assert read_log(ours) == read_log(theirs)
    for name in ("predictions.csv", "val_predictions.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    a, b = (torch.load(folder / "best.pt", weights_only=True) for folder in (ours, theirs))
    weights, others = a.pop("state_dict"), b.pop("state_dict")
    assert a == b and weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())


def one_line(script, *parts):
    """It ended with status 1 and one line on stderr that has all parts."""
    lines = [line for line in script.err.splitlines() if line.strip()]
    assert script.status == 1 and len(lines) == 1 and "Traceback" not in script.err, script.err
    assert all(part in lines[0] for part in parts), lines[0]


# ---------------------------------------------------------------- kills
@pytest.mark.long
def test_a_run_is_the_same_from_a_fresh_interpreter(run, starter, undisturbed, tmp_path):
    """What these tests fork behaves as `python train.py` does, which is killed here once as well."""
    arguments = [sys.executable, *map(str, command(starter.cells, tmp_path))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, cwd=ROOT, **quiet) as killed:
        until(lambda: len(read_log(fold_of(tmp_path))) >= 1 or killed.poll() is not None)
        killed.kill()
    done = run(*command(starter.cells, tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("model", [MODEL, "shufflenet_v2_x0_5"])  # dropout; batch norm
def test_killed_in_epochs_validation_and_prediction(starter, undisturbed, tmp_path, model):
    """SIGKILL in the middle of a training step, in validation, and while both predictions are being made."""
    reference = undisturbed(model=model)
    config = json.loads((fold_of(reference, model) / "config.json").read_text())
    epoch, val = -(-config["train_images"] // 8) * 8, config["val_images"]
    prepare(tmp_path, reference)
    # epoch 1; its validation, again from the beginning; epoch 2; validation of epoch 2 or 3; predictions
    for n in (epoch // 2, epoch + 1, epoch + val + 3, epoch + val + epoch + 1, 2 * (epoch + val) + 1):
        logged = len(read_log(fold_of(tmp_path, model)))
        killed = starter.train(tmp_path, before=DIE_AT_IMAGE.format(n=n), model=model)
        assert all(done > logged for done in killed.epochs)
        assert (killed.status == 0) == (fold_of(tmp_path, model) / "predictions.csv").exists()
    starter.train(tmp_path, model=model)
    assert_same(tmp_path, reference, model)


@pytest.mark.long
def test_killed_while_predictions_are_made(starter, undisturbed, tmp_path):
    """A kill during the predictions costs no epoch, and none of them stands there half written."""
    reference, run = undisturbed(), fold_of(tmp_path)
    prepare(tmp_path, reference)
    config = json.loads((fold_of(reference) / "config.json").read_text())
    trained = 3 * (-(-config["train_images"] // 8) * 8 + config["val_images"])
    for n in (trained + 1, 1, config["val_images"] + 1):  # val's predictions; again; the test images'
        killed = starter.train(tmp_path, before=DIE_AT_IMAGE.format(n=n))
        assert killed.status == -signal.SIGKILL and not (run / "predictions.csv").exists()
        assert killed.epochs == ([1, 2, 3] if n > trained else [])
    assert (run / "val_predictions.csv").exists() and len(read_log(run)) == 3
    assert starter.train(tmp_path).epochs == []
    assert_same(tmp_path, reference)


def test_killed_between_the_files_of_an_epoch(starter, undisturbed, tmp_path):
    """last.pt is first, best.pt second, log.csv third; what a kill in between leaves out is made good."""
    reference, run = undisturbed(), fold_of(tmp_path)
    prepare(tmp_path, reference)
    left = [{"last.pt"}, {"last.pt", "best.pt"}]
    for name, files in zip(("last.pt", "best.pt"), left):  # of epoch 1; the second kill comes on resuming
        killed = starter.train(tmp_path, before=DIE_AFTER.format(name=name, n=1))
        assert killed.status == -signal.SIGKILL
        assert {file.name for file in run.iterdir()} - {"lock", "config.json"} == files
    killed = starter.train(tmp_path, before=DIE_AFTER.format(name="last.pt", n=1))
    assert killed.status == -signal.SIGKILL and killed.epochs[0] == 2  # epoch 1 is not trained again
    assert len(read_log(run)) == 1 and len(torch.load(run / "last.pt", weights_only=True)["log"]) == 2
    assert starter.train(tmp_path).epochs == [3]
    assert_same(tmp_path, reference)


@pytest.mark.long
def test_killed_at_one_write_after_the_other(starter, undisturbed, tmp_path):
    """Killed at the 4th, 5th, ... sync, renaming or removal of each new start, until it comes through."""
    prepare(tmp_path, undisturbed())
    for n in itertools.count(4):
        logged = len(read_log(fold_of(tmp_path)))
        killed = starter.train(tmp_path, before=DIE_AT_CALL.format(n=n, group=n % 2))
        assert all(done > logged for done in killed.epochs)
        if killed.status == 0:
            break
    assert n > 8
    assert_same(tmp_path, undisturbed())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("--optimizer adamw --schedule cosine", marks=pytest.mark.long),
        pytest.param("--smoothing 0.1", marks=pytest.mark.long),
        pytest.param("--colour 0.1", marks=pytest.mark.long),
        "--optimizer adamw --schedule cosine --smoothing 0.1 --colour 0.1",
        "--freeze",
    ],
)
def test_each_strategy_resumes_exactly(starter, undisturbed, tmp_path, more):
    """AdamW's two moments and step counts, the place on the cosine, a frozen network's one layer."""
    prepare(tmp_path, undisturbed(more))
    for n in (1, 30):  # after the first epoch; in the middle of the next
        before = DIE_AFTER.format(name="log.csv", n=1) if n == 1 else DIE_AT_IMAGE.format(n=n)
        starter.train(tmp_path, more, before=before)
    assert len(read_log(fold_of(tmp_path))) == 1
    starter.train(tmp_path, more)
    assert_same(tmp_path, undisturbed(more))


@pytest.mark.long
def test_killed_at_every_write_of_a_run(starter, undisturbed, tmp_path):
    """A fresh run for each sync, renaming and removal, killed there once and then finished."""
    more = "--epochs 2"
    for n in itertools.count(1):
        runs = tmp_path / str(n)
        if starter.train(runs, more, before=DIE_AT_CALL.format(n=n, group=n % 2)).status == 0:
            break
        logged = len(read_log(fold_of(runs)))
        assert all(epoch > logged for epoch in starter.train(runs, more).epochs)
        assert_same(runs, undisturbed(more))
        shutil.rmtree(runs)
    print(f"killed at each of {n - 1} calls")
    assert n > 25


@pytest.mark.long
def test_killed_in_the_range_test(starter, tmp_path):
    """Killed in the middle, in the trial and at both files, the rate comes out as undisturbed."""
    more, reference, runs = "--lr auto --batch-size 2 --epochs 48 --stop-lr 1", tmp_path / "a", tmp_path / "b"
    starter.train(reference, more)
    prepare(runs, reference)
    ours, theirs = (fold_of(folder).parent for folder in (runs, reference))
    moments = [DIE_AT_IMAGE.format(n=n) for n in (101, 301)]
    # lr_range.csv and measured.json are synced, renamed, and the file beside is removed: 3 calls each
    for before in moments + [DIE_AT_CALL.format(n=n, group=False) for n in (1, 3, 5)]:
        killed = starter.train(runs, more, before)
        assert killed.status == -signal.SIGKILL and not (ours / "measured.json").exists()
    starter.train(runs, more)
    for name in ("measured.json", "lr_range.csv"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert_same(runs, reference)


@pytest.mark.long
def test_fifty_random_kills(starter, undisturbed, tmp_path):
    """50 SIGKILLs, every second one of the main process alone: equal, and at most one epoch again a kill."""
    epochs, moment, trained, killed, model = 120, random.Random(0), 0, [], "shufflenet_v2_x0_5"
    more, run, start = f"--epochs {epochs} --workers 1", fold_of(tmp_path, model), time.monotonic()
    script = starter.begin(tmp_path, more, model=model)
    script.until(lambda: len(read_log(run)) >= 1)
    reach = time.monotonic() - start  # from the start to the first logged epoch; later starts are faster
    while len(killed) < 50:
        if killed:
            script = starter.begin(tmp_path, more, model=model)
        logged, end = len(read_log(run)), time.monotonic() + moment.uniform(0, 1.6 * reach)
        while time.monotonic() < end and len(read_log(run)) < logged + 2:
            time.sleep(0.005)
        script.kill(group=len(killed) % 2 == 0)
        assert script.wait() == -signal.SIGKILL, f"ended by itself after {len(killed)} kills: {script.err}"
        killed.append(script)
        trained += len(script.epochs)
        assert not script.epochs or len(read_log(run)) >= script.epochs[-1] - 1
    done = starter.train(tmp_path, more, model=model)
    again = trained + len(done.epochs) - epochs
    print(f"{len(killed)} kills, {again} finished epochs trained again, {len(done.epochs)} after the last")
    assert 0 <= again <= len(killed)
    assert_same(tmp_path, undisturbed(more, model), model)
    until(lambda: not any(script.family() for script in killed))  # data workers are gone with their parent


# ---------------------------------------------------------------- signals, locks, workers
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_and_sigterm_in_the_middle_of_an_epoch(starter, undisturbed, tmp_path, workers):
    """They end the process at once, without a word; no process is left, and the run resumes exactly.

    In the background of a shell, where Ctrl-C is ignored, as for run_all.sh's jobs, it stays ignored.
    """
    more = f"--workers {workers}"
    for number, group, n in ((signal.SIGINT, True, 2), (signal.SIGINT, False, 5), (signal.SIGTERM, False, 5)):
        before = DIE_AT_STEP.format(n=n, group=group, number=int(number))
        script = starter.run(*command(starter.cells, tmp_path, more), before=before)
        assert script.status == -number and "Traceback" not in script.err, script.err
        until(lambda script=script: not script.family())
    before = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    before += DIE_AT_STEP.format(n=2, group=True, number=int(signal.SIGINT))
    assert starter.train(tmp_path, more, before).status == 0
    assert_same(tmp_path, undisturbed())


def test_one_process_a_run(starter, tmp_path):
    """A second train.py of the fold gets 75 at once; a lock is free as soon as its holder is killed."""
    first = starter.begin(tmp_path, "--epochs 1000 --workers 1")
    first.until(lambda: len(read_log(fold_of(tmp_path))) >= 1)
    second = starter.run(*command(starter.cells, tmp_path, "--epochs 1000"))
    assert second.status == 75 and second.err.count("\n") == 1 and "fold0: busy" in second.err
    first.kill(group=False)
    assert first.wait() == -signal.SIGKILL
    third = starter.begin(tmp_path, "--epochs 1000")  # whether the first one's data worker is gone or not
    third.until(lambda: "resumes after epoch" in third.out)
    third.kill()
    assert third.wait() == -signal.SIGKILL, third.err


@pytest.mark.parametrize("script", ["datasets.py", "overlaps.py"])
def test_ctrl_c_in_a_script_that_only_reads(starter, tmp_path, script):
    """It ends as a signal ends a program, and leaves no part of a result."""
    before, runs = DIE_AT_IMAGE.replace("SIGKILL", "SIGINT").format(n=20), tmp_path / "runs"
    ended = starter.run(script, "--data", starter.cells, "--runs", runs, before=before)
    assert ended.status == -signal.SIGINT and "Traceback" not in ended.err
    assert not [file for file in runs.rglob("*") if file.is_file() and file.suffix != ".lock"]


AT_BIRTH = (
    "import os, signal; os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGKILL))"
)


def test_killed_while_a_data_worker_starts(starter, tmp_path):
    """PyTorch's workers ask who their parent is once they run: one born as it dies would wait for ever."""
    killed = starter.train(tmp_path, "--workers 1", before=AT_BIRTH)
    assert killed.status == -signal.SIGKILL
    until(lambda: not killed.family())


def test_a_data_worker_dies(starter, tmp_path):
    """The OOM killer takes a data worker: the run ends, says so last, and leaves no process behind."""
    # epochs of a second: the signal must not come while the workers of a validation are forked, where Python
    # ignores what PyTorch's handler raises, and the loader would wait for its timeout of ten minutes
    script = starter.begin(tmp_path, "--epochs 1000 --workers 1 --image-size 224 --batch-size 2")
    script.until(lambda: len(read_log(fold_of(tmp_path))) >= 1)
    for pid in script.family():
        if pid != script.pid:
            os.kill(pid, signal.SIGKILL)
    assert script.wait() == 1 and "DataLoader worker" in script.err.splitlines()[-1]
    until(lambda: not script.family())


# ---------------------------------------------------------------- training that goes wrong
def test_a_loss_that_is_not_finite(starter, tmp_path):
    """One line with epoch and rate at the end of the epoch; nothing looks finished."""
    script = starter.run(*command(starter.cells, tmp_path, "--lr 1e6"))
    one_line(script, "epoch 1", "1e+06", "--lr")
    assert {file.name for file in fold_of(tmp_path).iterdir()} == {"lock", "config.json"}


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs; small_disk(size) mounts it or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(text):
        options = f"-o remount,size={text}" if os.path.ismount(folder) else f"-t tmpfs -o size={text} tmpfs"
        done = subprocess.run(["mount", *options.split(), folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield size
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_in_the_second_checkpoint(starter, undisturbed, small_disk):
    """Room for one epoch's files and not for the next ones beside: the first stay whole, the run resumes."""
    disk = small_disk("10m")  # last.pt has 5.8 MB, best.pt 2.9 MB
    script, run = starter.run(*command(starter.cells, disk)), fold_of(disk)
    one_line(script, "disk full", "resumes")
    assert len(torch.load(run / "last.pt", weights_only=True)["log"]) == len(read_log(run)) == 1
    assert not list(run.glob(".*.tmp")) and not (run / "predictions.csv").exists()
    small_disk("40m")
    assert starter.train(disk).epochs == [2, 3]
    assert_same(disk, undisturbed())


def check_full_disk(starter, disk, reference, n):
    """The disk is full from the n-th renaming on; False if there are fewer."""
    for entry in disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    filler, run = disk / "filler", fold_of(disk)
    before = FILL_AT_CALL.format(n=n, filler=str(filler))
    script = starter.run(*command(starter.cells, disk), before=before)
    if not filler.exists():
        assert script.status == 0
        return False
    if not (run / "predictions.csv").exists():
        one_line(script, "resumes")
        assert "disk full" in script.err or "No space left" in script.err
        for name in ("log.csv", "config.json"):
            assert not (run / name).exists() or (run / name).read_bytes()
        assert not list((disk / "train").rglob("*.tmp*"))
    filler.unlink()
    starter.train(disk)
    assert_same(disk, reference)
    return True


@pytest.mark.parametrize("n", [1, 4])
def test_disk_full(starter, undisturbed, small_disk, n):
    """The split finds no room; best.pt finds none."""
    assert check_full_disk(starter, small_disk("40m"), undisturbed(), n)


@pytest.mark.long
def test_disk_full_at_any_write(starter, undisturbed, small_disk):
    """Full from the 2nd, 3rd, ... renaming on: configuration, last, best, log, predictions."""
    disk, n = small_disk("40m"), 2
    while check_full_disk(starter, disk, undisturbed(), n):
        n += 1
    assert n > 9


# ---------------------------------------------------------------- machines that lack something
def test_a_file_system_without_locks(starter, tmp_path):
    """The run's own lock cannot be had: its file and the system's reason are named."""
    before = (
        "import errno, fcntl\ndef lockf(*_):\n    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.lockf = lockf"
    )
    script = starter.run(*command(starter.cells, tmp_path), before=before)
    assert script.status == 1 and "Traceback" not in script.err
    assert all(word in script.err.splitlines()[-1] for word in ("fold0/lock", "No locks available", "--runs"))


def test_output_that_nobody_reads_any_more(starter, tmp_path):
    """`python train.py ... | head`: the status of SIGPIPE, and no word of it."""
    before = "import os\nreader, writer = os.pipe()\nos.dup2(writer, 1)\nos.close(reader)"
    script = starter.run(*command(starter.cells, tmp_path), before=before)
    assert script.status == 128 + signal.SIGPIPE and "Traceback" not in script.err


# ---------------------------------------------------------------- a run is what it says it is
def test_other_settings_are_refused(starter, undisturbed, tmp_path):
    """Each setting of which the results depend is named when it has changed; the machine's may change."""
    prepare(tmp_path, undisturbed())
    starter.train(tmp_path, before=DIE_AFTER.format(name="log.csv", n=1))

    def state():
        return {file.name: file.read_bytes() for file in fold_of(tmp_path).iterdir()}

    before, split = state(), (tmp_path / "split.csv").read_text()
    changed = "seed 1|epochs 4|batch_size 4|lr 0.02|image_size 64|stop_lr 0.5|amp bf16"
    changed += "|memory_format contiguous|optimizer adamw|schedule cosine|smoothing 0.1|colour 0.1|split"
    for key, *value in map(str.split, changed.split("|")):
        if key == "split":
            other = re.sub(r"(?m)^([^,]+,[^,]+),train,", r"\1,val,", split, count=1)
            (tmp_path / "split.csv").write_text(other)
        more = f"--{key.replace('_', '-')} {value[0]}" if value else ""
        one_line(starter.run(*command(starter.cells, tmp_path, more)), f"{key} was ", "is now", "--runs")
    (tmp_path / "split.csv").write_text(split)
    assert state() == before
    starter.train(tmp_path, "--workers 1")
    assert_same(tmp_path, undisturbed())


def test_other_weights_and_data_are_refused(starter, undisturbed, tmp_path):
    """The checkpoint of --init NAME=PATH was made anew, or an image exchanged: the run does not resume."""
    data, runs, weights = tmp_path / "bm", tmp_path / "runs", tmp_path / "start.pt"
    shutil.copytree(starter.cells, data)
    shutil.copy(fold_of(undisturbed()) / "best.pt", weights)
    arguments = command(data, runs, f"--init mine={weights}")
    killed = starter.run(*arguments, before=DIE_AFTER.format(name="log.csv", n=1))
    assert killed.status == -signal.SIGKILL and (runs / "train" / MODEL / "mine/fold0/last.pt").exists()
    content = torch.load(weights, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, weights)
    one_line(starter.run(*arguments), "begun with other settings (weights was ")
    shutil.copy(fold_of(undisturbed()) / "best.pt", weights)
    shutil.copy(min(data.glob("LYT/*")), min(data.glob("EBO/*")))
    script = starter.run(*arguments)
    assert script.status == 1 and "begun with other settings (data was " in script.err.splitlines()[-1]


def test_a_begun_fold_keeps_its_rate(starter, undisturbed, tmp_path):
    """Its config.json counts, though measured.json says another now: that is for the folds to come."""
    prepare(tmp_path, undisturbed())
    starter.train(tmp_path, "--lr auto", before=DIE_AFTER.format(name="log.csv", n=1))
    file = fold_of(tmp_path).parent / "measured.json"
    measured = json.loads(file.read_text())
    assert measured["lr"] == 0.003  # too few steps to try rates
    file.write_text(json.dumps(measured | {"lr": 0.02}))
    starter.train(tmp_path, "--lr auto --fold 0 1")
    for fold, rate in (("fold0", 0.003), ("fold1", 0.02)):
        folder = file.with_name(fold)
        assert json.loads((folder / "config.json").read_text())["lr"] == rate
        assert [float(row["lr"]) for row in read_log(folder)] == [rate] * 3


def test_images_gone_and_new(starter, undisturbed, tmp_path):
    """Images of the split that are gone end it, those that it does not know are left out; both are said."""
    data, runs = tmp_path / "bm", tmp_path / "runs"
    shutil.copytree(starter.cells, data)
    runs.mkdir()
    shutil.copy(undisturbed() / "split.csv", runs)
    gone = sorted(data.glob("EOS/*"))[:2]
    for file in gone:
        file.rename(tmp_path / file.name)
    one_line(starter.run(*command(data, runs)), "2 of its", f"EOS/{gone[0].name}")
    assert not fold_of(runs).exists()
    for file in gone:
        (tmp_path / file.name).rename(file)
    shutil.copy(gone[0], data / "EOS" / "new, and äß.JPG")
    script = starter.run(*command(data, runs, "--epochs 1"))
    assert script.status == 0
    assert all(word in script.err for word in ("1 images", "new, and äß.JPG", "left out"))
    assert "new, and" not in (fold_of(runs) / "predictions.csv").read_text()


def test_what_config_json_records(undisturbed, starter):
    """Versions, device, the data's and the split's fingerprint, the hash of the weights and the counts."""
    config = json.loads((fold_of(undisturbed()) / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy", "commit"} <= set(config["versions"])
    assert (config["device"], config["gpu"], config["weights"], config["lr"]) == ("cpu", None, None, 0.01)
    assert len(config["data"]) == len(config["split"]) == 64
    assert config["data"] == json.loads((undisturbed() / "data" / "bm.json").read_text())["fingerprint"]
    counts = [config[f"{part}_images"] for part in ("train", "val", "test")]
    assert sum(counts) == len(list(starter.cells.glob("*/*.jpg")))


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


@pytest.mark.long
def test_cropping_killed_and_done_twice_at_once(starter, demo, tmp_path):
    """Two processes at once make one set of crops, a killed one begins anew: equal to an undisturbed one."""

    def crops(folder):
        files = (folder / ".crops").rglob("*.png")
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    names = ("alone", "killed", "shared")
    folders = {name: tmp_path / name / "cd" for name in names}
    for folder in folders.values():
        shutil.copytree(demo / "cd", folder, ignore=shutil.ignore_patterns(".crops*"))
    arguments = {name: ["datasets.py", "--data", folders[name], "--runs", tmp_path / name] for name in names}
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
