"""run_all.sh: which jobs it has, in what order, on which GPU; what it does when one fails, hangs or is taken.

The scripts that it calls are replaced by one program named python, which notes how it was called, obeys the
files of a folder `plan` and leaves what a run leaves; nvidia-smi, sbatch, df and sleep are stand-ins too.
What a job really does is tested elsewhere (test_command_line.py, test_slurm.py).
"""

import collections
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, until

PYTHON = r"""#!{python} -S
import os, pathlib, subprocess, sys, time
plan, call = pathlib.Path(os.environ["PLAN"]), sys.argv[1:]
def value(option):
    return call[call.index(option) + 1]
with open(plan / "calls", "a") as handle:
    words = [os.environ.get("CUDA_VISIBLE_DEVICES", "-"), *call]
    handle.write(" ".join(words).replace("\n", " ") + "\n")
if call[0] == "models.py":
    sys.exit((plan / ("no-weights-" + call[-1])).exists())
if call[0] == "splits.py":
    out = pathlib.Path(value("--out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(not out.write_text("path,label,fold0,fold1,fold2,fold3,fold4\n"))
runs = pathlib.Path(value("--runs"))
ends = []
if call[0] == "train.py":
    after = call[call.index("--fold") + 1:]
    folds = after[:next(i for i, word in enumerate(after) if word.startswith("--"))]
    place = runs / "train" / value("--model") / value("--init")
    ends = [place / ("fold" + fold) / "predictions.csv" for fold in folds]
elif call[0] == "pretrain.py":
    ends = [runs / "pretrain" / value("--model") / value("--init") / "predictions.csv"]
elif call[0] == "overlaps.py":
    ends = [runs / "groups.csv"]
elif call[0] == "report.py":
    ends = [runs / "results" / "index.html"]
name = "-".join([call[0], *(ends[0].parts[-4:-1] if call[0] == "train.py" else [])])
if (plan / ("orphan-" + name)).exists():
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.Popen(["/bin/sleep", "600"], close_fds=False, **quiet)
if (plan / ("status-" + name)).exists():  # of this try and the next ones
    statuses = (plan / ("status-" + name)).read_text().split()
    (plan / ("status-" + name)).write_text(" ".join(statuses[1:] or statuses))
    if statuses[0] != "0":
        print("what went wrong")
        sys.exit(int(statuses[0]))
while (plan / ("hold-" + name)).exists():
    time.sleep(.01)
for end in ends:
    end.parent.mkdir(parents=True, exist_ok=True)
    log = "epoch,lr,train_loss,val_loss,val_accuracy,images_per_second,seconds\n"
    (end.parent / "log.csv").write_text(log + "1,1,1,1,1,1,7200\n2,1,1,1,1,1,7200\n")
    end.write_text("")
"""
SLEEP = '#!/bin/sh\necho $PPID >> "$PLAN/slept"\nexec /bin/sleep 0.1\n'
SBATCH = r"""#!/bin/sh
for word; do echo "$word"; done >> "$PLAN/sbatch"
echo -- >> "$PLAN/sbatch"
echo $((100 + $(grep -c -e '^--$' "$PLAN/sbatch")))
"""
TWO_GPUS = "#!/bin/sh\nprintf 'GPU 0: Tesla (UUID: GPU-aa)\\nGPU 1: Tesla (UUID: GPU-bb)\\n'\n"
MIG = r"""#!/bin/sh
printf 'GPU 0: A100 (UUID: GPU-aa)\n  MIG 3g.20gb     Device  0: (UUID: MIG-c1)\n'
printf '  MIG 3g.20gb     Device  1: (UUID: MIG-c2)\n'
"""
NO_DRIVER = "#!/bin/sh\necho couldn\\'t communicate with the NVIDIA driver\nexit 9\n"
PAPER = ("vgg19_bn", "resnet152", "regnet_y_32gf", "vit_l_32")


class Place:
    """A folder with run_all.sh, stand-ins on the PATH, data sets, and a plan."""

    def __init__(self, folder):
        self.folder, self.plan, self.bin = folder, folder / "plan", folder / "bin"
        self.data, self.runs = folder / "all the data", folder / "my runs"
        self.plan.mkdir()
        self.bin.mkdir()
        for name in ("bm", "cd", "pcam"):
            (self.data / name).mkdir(parents=True)
        shutil.copy(ROOT / "run_all.sh", folder)
        (folder / "train.py").touch()
        python = PYTHON.replace("{python}", sys.executable)
        programs = {"python": python, "sleep": SLEEP, "sbatch": SBATCH, "nvidia-smi": NO_DRIVER}
        for name, text in programs.items():
            self.program(name, text)
        self.environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PLAN": self.plan, "HOME": folder}
        self.environment |= {"DATA": self.data, "RUNS": self.runs}

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments, **environment):
        command = ["env", "--default-signal=INT", "bash", self.folder / "run_all.sh", *map(str, arguments)]
        environment = self.environment | environment
        environment = {name: str(value) for name, value in environment.items() if value is not None}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=self.folder, start_new_session=True, **pipes)

    def run(self, *arguments, **environment):
        """(status, stdout, stderr)"""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def calls(self, *scripts):
        """[(CUDA_VISIBLE_DEVICES, words of the call)] in order."""
        file = self.plan / "calls"
        lines = [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []
        return [(gpu, words) for gpu, *words in lines if not scripts or words[0] in scripts]

    def jobs(self):
        """[script/model/init/fold,...] of the jobs that were started, in order."""
        found = []
        for _, words in self.calls("train.py", "pretrain.py", "overlaps.py"):
            options = re.findall(r"--(?:model|init|fold) ((?:(?!--)\S+ ?)+)", " ".join(words))
            found.append("/".join([words[0], *(value.strip().replace(" ", ",") for value in options)]))
        return found

    def hold(self, *folds):
        """Jobs of these folds go on only once released."""
        for fold in folds:
            (self.plan / f"hold-{FOLD}{fold}").touch()

    def release(self, *folds):
        for fold in folds:
            (self.plan / f"hold-{FOLD}{fold}").unlink()


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "Anna M & Co"  # as under WSL
    folder.mkdir()
    return Place(folder)


CPU = ("--device", "cpu")
ONE = {"MODELS": "resnet18", "INITS": "random", "FOLDS": "0 1", "OVERLAPS": "no"}
FOLD = "train.py-resnet18-random-fold"


# ---------------------------------------------------------------- where it is called, on which cells
def test_the_folds_are_those_of_the_split(place):
    """Ten folds in split.csv are ten jobs."""
    place.runs.mkdir()
    (place.runs / "split.csv").write_text("path,label," + ",".join(f"fold{k}" for k in range(10)) + "\n")
    one = {"MODELS": "resnet18", "INITS": "random", "OVERLAPS": "no"}
    assert place.run(*CPU, **one)[0] == 0
    assert place.jobs() == [f"train.py/resnet18/random/{k}" for k in range(10)]
    assert not place.calls("splits.py")


@pytest.mark.parametrize("target", ["mine", "mine/Patient_{group}/{class}/*.jpg", "cells.csv"])
def test_the_study_on_other_cells(place, target):
    """TARGET is what --data takes: a folder, a pattern or a table, relative to where run_all.sh is called."""
    (place.folder / "mine").mkdir()
    (place.folder / "cells.csv").touch()
    assert place.run(*CPU, **ONE, TARGET=target)[0] == 0
    calls = place.calls("splits.py", "train.py")  # the split is made first
    assert [words[0] for _, words in calls] == ["splits.py", "train.py", "train.py"]
    assert all(f"--data {target} " in " ".join(words) for _, words in calls)


def test_a_link_works_and_a_lone_copy_says_where_it_belongs(place, tmp_path):
    """A link in ~/bin finds the scripts; Slurm runs a copy in its spool, which cannot."""
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "link").symlink_to(place.folder / "run_all.sh")
    shutil.copy(place.folder / "run_all.sh", spool / "slurm_script")
    for name, status in (("link", 0), ("slurm_script", 1)):
        environment = {key: str(value) for key, value in place.environment.items()}
        command = ["bash", spool / name, "--list"]
        done = subprocess.run(command, env=environment, cwd=spool, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert (f"{place.folder}/train.py" in done.stdout.replace("\\", "")) == (status == 0)
    assert done.stderr.count("\n") == 1 and "call run_all.sh where it lies" in done.stderr


def test_its_own_variables_are_checked_and_others_do_not_matter(place):
    """FOLDS is numbers; JOBS is a variable of many a site, and none of ours."""
    assert place.run("--list", **ONE | {"FOLDS": "all"})[0] == 2
    assert place.run(*CPU, **ONE, JOBS="max")[0] == 0


# ---------------------------------------------------------------- the list
def listed(text):
    """(number, state, script, options) of each line of --list."""
    for line in text.splitlines():
        number, state, python, script, *rest = line.split()
        assert python == "python"
        yield int(number), state, script, dict(zip(rest[::2], rest[1::2]))


def test_the_study_has_125_fine_tunings_and_16_pretrainings_and_the_pass_for_overlaps(place):
    (place.folder / "overlaps.py").touch()
    status, out, err = place.run("--list", DATA=None, RUNS=None)
    jobs = list(listed(out))
    assert status == 0 and err == "" and [number for number, *_ in jobs] == list(range(1, 143))
    assert jobs[-1][2:] == ("overlaps.py", {"--data": "data/bm", "--runs": "runs"})
    runs = {"train.py": collections.Counter(), "pretrain.py": collections.Counter()}
    for _, _, script, job in jobs[:-1]:
        runs[script][job["--model"], job["--init"]] += 1
    made = ("pcam", "cd", "imagenet+pcam", "imagenet+cd")
    pretrained = {(model, init): 1 for model in PAPER for init in made}
    assert runs["pretrain.py"] == pretrained
    plain = {(model, init): 5 for model in PAPER for init in ("random", "imagenet")}
    assert runs["train.py"] == plain | dict.fromkeys(pretrained, 5) | {("resnext50_32x4d", "random"): 5}
    assert sum(runs["train.py"].values()) == 125 and sum(runs["pretrain.py"].values()) == 16
    folds = collections.defaultdict(str)
    for _, _, script, job in jobs:
        folds[script, job.get("--model"), job.get("--init")] += job.get("--fold", "")
        own = "data/" + job.get("--init", "").split("+")[-1]
        assert job["--data"] == (own if script == "pretrain.py" else "data/bm")
    assert {numbers for (script, *_), numbers in folds.items() if script == "train.py"} == {"01234"}
    assert not place.calls() and not (place.folder / "runs").exists()
    assert len(place.run("--list", OVERLAPS="no")[1].splitlines()) == 141


def test_numbers_do_not_depend_on_states(place):
    before = place.run("--list")[1]
    for _, state, script, job in listed(before):
        waits = script == "train.py" and job["--init"] not in ("random", "imagenet")
        assert state == ("waits" if waits else "todo")
    folder = place.runs / "pretrain/resnet152/cd"
    folder.mkdir(parents=True)
    (folder / "predictions.csv").touch()
    (place.runs / "logs").mkdir()
    (place.runs / "logs/pretrain-vit_l_32-imagenet+cd.failed").touch()
    shutil.rmtree(place.data / "pcam")
    out = place.run("--list")[1]
    drop = [re.sub(r"(?m)^(\d+ +)\w+ +", r"\1", text) for text in (before, out)]
    assert drop[0] == drop[1]
    special = {("resnet152", "cd"): ("done", "todo"), ("vit_l_32", "imagenet+cd"): ("failed", "blocked")}
    for _, state, script, job in listed(out):
        init, train = job["--init"], script == "train.py"
        wanted = "waits" if train and init not in ("random", "imagenet") else "todo"
        if init.endswith("pcam"):
            wanted = "missing"
        wanted = special.get((job["--model"], init), (wanted, wanted))[train]
        assert state == wanted, (script, job)


# ---------------------------------------------------------------- the night
def test_every_job_is_done_once_and_after_its_pretraining(place):
    (place.folder / "overlaps.py").touch()
    models, inits = ["resnet18", "resnet34"], ["random", "imagenet", "cd", "imagenet+cd"]
    chosen = {"MODELS": " ".join(models), "INITS": " ".join(inits), "FOLDS": "0 1,2"}
    status, out, err = place.run(*CPU, "--epochs=2", JOBS_PER_GPU="3", **chosen)
    assert (status, err) == (0, "")
    jobs = place.jobs()
    runs = list(itertools.product(models, inits))
    wanted = [f"train.py/{model}/{init}/{fold}" for model, init in runs for fold in ("0", "1,2")]
    wanted += [f"pretrain.py/{model}/{init}" for model, init in runs if init in inits[2:]] + ["overlaps.py"]
    assert sorted(jobs) == sorted(wanted)
    for job in jobs:
        script, *rest = job.split("/")
        if script == "train.py" and rest[1] in inits[2:]:
            assert jobs.index(f"pretrain.py/{rest[0]}/{rest[1]}") < jobs.index(job)
    first, later = "train.py/resnet34/imagenet/0", "train.py/resnet18/random/1,2"
    assert jobs.index(first) < jobs.index(later)  # whole tables soon
    for gpu, words in place.calls("train.py"):
        assert gpu == "" and words[-4:] == ["--epochs", "2", *CPU]
    assert sorted(words[2] for _, words in place.calls("models.py")) == models  # fetched before the night
    assert [words[0] for _, words in place.calls()][-3:] == ["evaluate.py", "gradcam.py", "report.py"]
    assert out.splitlines()[-1] == f"Open {place.runs}/results/index.html"
    assert not any("--compare" in words for _, words in place.calls("evaluate.py"))
    log = (place.runs / "logs/train-resnet18-cd-fold1,2.log").read_text()
    assert "python train.py --model resnet18 --init cd --fold 1 2" in log
    (place.plan / "calls").unlink()
    status, out, err = place.run(*CPU, **chosen)
    assert (status, err) == (0, "") and "Nothing left to do" in out and not place.calls()


def test_the_papers_table_stands_beside_where_the_cells_are_bone_marrow(place):
    place.runs.mkdir()
    (place.runs / "split.csv").write_text("path,label,fold0,fold1\nFGC/1.jpg,FGC,test,train\n")
    place.run(*CPU, **ONE)
    assert place.calls("evaluate.py")[-1][1][-2:] == ["--compare", "paper/table4.csv"]


def test_the_time_left_is_said(place):
    """Two epochs of 2 h a run: after the first of three, 8 h are left."""
    out = place.run(*CPU, **ONE | {"FOLDS": "0 1 2"})[1]
    shown = [line[line.index("[") : line.index("]") + 1] for line in out.splitlines() if "[" in line]
    assert shown == [
        "[0 runs done, 3 to go]",
        "[1 runs done, 2 to go, about 8 h 00 min]",
        "[2 runs done, 1 to go, about 4 h 00 min]",
    ]


def test_a_second_copy_waits_for_the_first(place):
    """All jobs are taken: it ends with the first, well, and has done nothing twice."""
    place.hold(0, 1)
    first = place.start(*CPU, JOBS_PER_GPU="2", **ONE)
    until(lambda: len(place.calls("train.py")) == 2)
    assert [state for _, state, *_ in listed(place.run("--list", **ONE)[1])] == ["running", "running"]
    second = place.start(*CPU, **ONE)
    until(lambda: (place.plan / "slept").exists() or second.poll() is not None)
    assert second.poll() is None
    place.release(0, 1)
    for copy in (first, second):
        out, err = copy.communicate(timeout=60)
        assert (copy.returncode, err) == (0, "") and "Open " in out
    assert len(place.jobs()) == 2


def test_a_failed_job_is_tried_again_after_all_others(place):
    (place.plan / f"status-{FOLD}0").write_text("1 0")
    status, _, err = place.run(*CPU, **ONE)
    assert status == 0 and place.jobs() == [f"train.py/resnet18/random/{fold}" for fold in (0, 1, 0)]
    assert err == "run_all.sh: failed (status 1): train-resnet18-random-fold0: what went wrong\n"


def test_what_fails_twice_is_named_and_what_it_feeds_is_not_run(place):
    (place.plan / "status-pretrain.py").write_text("1")
    chosen = ONE | {"INITS": "cd random", "FOLDS": "0"}
    status, _, err = place.run(*CPU, **chosen)
    jobs = ["pretrain.py/resnet18/cd", "train.py/resnet18/random/0", "pretrain.py/resnet18/cd"]
    assert status == 1 and place.jobs() == jobs
    for words in ("failed pretrain resnet18 cd", "blocked train resnet18 cd fold0", f"see {place.runs}/logs"):
        assert words in err
    (place.plan / "status-pretrain.py").unlink()
    assert place.run(*CPU, **chosen)[0] == 0


def test_a_job_that_leaves_no_predictions_has_failed(place):
    place.program("python", (place.bin / "python").read_text().replace('end.write_text("")', "pass"))
    status, _, err = place.run(*CPU, **ONE)
    assert status == 1 and len(place.jobs()) == 4 and "failed (status 1)" in err


def test_wrong_arguments_stop_all_of_it(place):
    (place.plan / f"status-{FOLD}0").write_text("2")
    status, _, err = place.run(*CPU, "--momentum", 0.8, **ONE)
    assert status == 2 and len(place.jobs()) == 1 and err.endswith("fold0: what went wrong\n")


def test_a_run_that_is_held_elsewhere_is_looked_at_again_after_minutes(place):
    """Started by hand on another machine, say: train.py's own lock knows, status 75."""
    (place.plan / f"status-{FOLD}0").write_text("75 0")
    process = place.start(*CPU, **ONE)
    busy = place.runs / "logs/train-resnet18-random-fold0.busy"
    until(lambda: (place.plan / "slept").exists())
    assert place.jobs() == [f"train.py/resnet18/random/{fold}" for fold in (0, 1)]
    os.utime(busy, (time.time() - 360,) * 2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and len(place.jobs()) == 3


def test_a_data_worker_that_outlives_its_job_holds_no_lock(place):
    (place.plan / f"orphan-{FOLD}0").touch()
    (place.plan / f"status-{FOLD}0").write_text("1 0")
    process = place.start(*CPU, **ONE)
    try:
        _, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and len(place.jobs()) == 3
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_without_locks_it_is_said_once_and_done(place):
    place.program("flock", "#!/bin/sh\necho flock: No locks available >&2\nexit 71\n")
    status, _, err = place.run(*CPU, JOBS_PER_GPU="1", **ONE)
    assert status == 0 and err.count("\n") == 1 and "cannot lock" in err and len(place.jobs()) == 2


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
@pytest.mark.parametrize("mode", [[], ["--task", "1"]])
def test_signals_reach_the_jobs(place, number, group, mode):
    """SIGTERM to run_all.sh alone, Ctrl-C to all: each job is ended and waited for; the status is 128 + n."""
    place.hold(0, 1)
    process = place.start(*mode, *CPU, JOBS_PER_GPU="2", **ONE)
    jobs = 1 if mode else 2
    until(lambda: len(place.calls("train.py")) == jobs)
    (os.killpg if group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.count("stopped") == (0 if mode else 1)
    assert not list((place.runs / "logs").glob("*.failed"))


# ---------------------------------------------------------------- GPUs
@pytest.mark.parametrize(
    "smi, arguments, environment, seen",
    [
        (TWO_GPUS, "", {}, "0"),
        (TWO_GPUS, "--device cuda", {"GPUS": "1"}, "1"),
        (TWO_GPUS, "--device=cuda:1", {}, "1"),
        (TWO_GPUS, "--device cuda:1", {"CUDA_VISIBLE_DEVICES": "2,3"}, "3"),
        (TWO_GPUS, "", {"CUDA_VISIBLE_DEVICES": "2,3"}, "2"),
        (TWO_GPUS, "", {"CUDA_VISIBLE_DEVICES": "GPU-bb"}, "GPU-bb"),
        (NO_DRIVER, "", {"GPUS": "0"}, "0"),  # a container without nvidia-smi
        (MIG, "", {}, "MIG-c1"),
        (MIG, "--device cuda:1", {}, "MIG-c2"),
        (TWO_GPUS, "--device cpu", {}, ""),
    ],
)
def test_the_gpu_of_a_task(place, smi, arguments, environment, seen):
    place.program("nvidia-smi", smi)
    assert place.run("--task", 1, *arguments.split(), **ONE | environment)[0] == 0
    ((gpu, words),) = place.calls("train.py")
    assert gpu == seen and words[-2:] == ["--device", "cpu" if seen == "" else "cuda"]


@pytest.mark.parametrize(
    "smi, arguments, environment",
    [
        (TWO_GPUS, "", {"CUDA_VISIBLE_DEVICES": ""}),
        (NO_DRIVER, "", {}),
        (NO_DRIVER, "--device cuda", {}),
        (NO_DRIVER, "--task 1", {}),
        (TWO_GPUS, "--device cuda:2", {}),
    ],
)
def test_no_gpu_is_said_in_one_line(place, smi, arguments, environment):
    place.program("nvidia-smi", smi)
    status, _, err = place.run(*arguments.split(), **ONE | environment)
    assert status == 1 and err.count("\n") == 1
    assert all(word in err for word in ("no CUDA GPU found", "--demo", "--device cpu")) and not place.calls()


def test_each_gpu_has_its_worker(place):
    place.program("nvidia-smi", TWO_GPUS)
    place.hold(0, 1)
    process = place.start(**ONE)
    until(lambda: len(place.calls("train.py")) == 2)
    place.release(0, 1)
    assert process.wait(60) == 0
    assert sorted(gpu for gpu, _ in place.calls("train.py")) == ["0", "1"]


def test_a_gpu_that_fails_its_jobs_leaves_them_to_the_second_try(place):
    """Broken in mid-night, or too small for a model: the jobs are tried once more at the end."""
    place.program("nvidia-smi", TWO_GPUS)
    for fold in (0, 1):
        (place.plan / f"status-{FOLD}{fold}").write_text("1 0")
    status, _, err = place.run(**ONE | {"FOLDS": "0 1 2 3"})
    assert status == 0 and err.count("failed (status 1)") == 2 and len(place.jobs()) == 6


def test_slurms_allocation_goes_before_an_exported_choice_of_gpus(place):
    place.run("--task", 1, GPUS="0 1", CUDA_VISIBLE_DEVICES="3", SLURM_ARRAY_TASK_ID="1", **ONE)
    assert [gpu for gpu, _ in place.calls("train.py")] == ["3"]


def test_heatmaps_are_drawn_on_a_gpu_of_ours(place):
    assert place.run(GPUS="3", **ONE)[0] == 0
    assert [gpu for gpu, _ in place.calls("gradcam.py")] == ["3"]


# ---------------------------------------------------------------- before the night
BEFORE = {
    "task out of range": ({}, "--task 999 --device cpu", 2, "--task '999': no such job|--list"),
    "task without number": ({}, "--task --device cpu", 2, "--task '--device'|--list"),
    "model given": ({}, "--model resnet18", 2, "--model is set by MODELS"),
    "runs given": ({}, "--runs=elsewhere", 2, "--runs is set by|RUNS"),
    "name given": ({}, "--name mine", 2, "--name is set by"),
    "no jobs": ({"JOBS_PER_GPU": "0"}, "--device cpu", 2, "JOBS_PER_GPU='0'|number from 1"),
    "demo on a cluster": ({}, "--demo --slurm", 2, "--demo runs here"),
    "runs can't be made": ({"RUNS": "/proc/no"}, "--device cpu", 1, "cannot write to /proc/no|RUNS"),
    "no data": ({"DATA": "nowhere"}, "--device cpu", 1, "nowhere/bm is missing|README|--demo"),
}


@pytest.mark.parametrize("environment, rest, status, words", BEFORE.values(), ids=BEFORE)
def test_the_study_is_not_begun(place, environment, rest, status, words):
    """Wrong before the night, not after it: one line, and no job is started."""
    done = place.run(*rest.split(), **environment)
    assert done[0] == status and done[2].count("\n") == 1 and not place.jobs(), done
    assert done[2].startswith("run_all.sh: ") and all(word in done[2] for word in words.split("|"))


def test_what_cannot_be_had_is_named_and_skipped(place):
    shutil.rmtree(place.data / "pcam")
    (place.plan / "no-weights-resnet34").touch()
    chosen = {"MODELS": "resnet18 resnet34", "INITS": "imagenet imagenet+cd pcam", "FOLDS": "0"}
    chosen["OVERLAPS"] = "no"
    status, out, _ = place.run(*CPU, **chosen)
    skipped = [line for line in out.splitlines() if line.startswith("skipped")]
    lines = [f"pcam, since {place.data}/pcam is missing", "ImageNet weights of resnet34"]
    assert skipped == [f"skipped: {line}" for line in lines]
    jobs = ["pretrain.py/resnet18/imagenet+cd", "train.py/resnet18/imagenet+cd/0"]
    assert status == 0 and sorted(place.jobs()) == [*jobs, "train.py/resnet18/imagenet/0"]


def test_too_small_a_disk_is_said_before_the_night(place):
    """25 checkpoints of 0.57 GB and a few more while they are written need more than 14 GB."""
    folds = "0 1 2 3 4 " + ",".join(map(str, range(5, 25)))
    for gigabytes, wanted in ((14, 1), (20, 0)):
        size = f"disk 1 1 {gigabytes * 2**20} 1% /"
        place.program("df", f"#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho {size}\n")
        status, _, err = place.run(*CPU, MODELS="vgg19_bn", INITS="random", FOLDS=folds)
        assert status == wanted and ("MB free" in err) == (not place.jobs()) == (wanted == 1)


# ---------------------------------------------------------------- a cluster
def test_a_task_before_its_pretraining_and_a_done_one_end_at_once(place):
    chosen = ONE | {"INITS": "cd", "FOLDS": "0"}
    said = "run_all.sh: job 2 waits for its pre-training, which is not finished\n"
    assert place.run("--task", 2, *CPU, **chosen)[::2] == (1, said)
    assert place.run("--task", 1, *CPU, **chosen)[0] == 0
    assert place.run("--task", 1, *CPU, **chosen)[:2] == (0, "job 1 is done\n")
    assert place.run("--task", 2, *CPU, **chosen)[0] == 0
    assert place.jobs() == ["pretrain.py/resnet18/cd", "train.py/resnet18/cd/0"]
    last = [words[0] for _, words in place.calls()][-3:]
    assert last == ["evaluate.py", "gradcam.py", "report.py"]


def test_slurm_gets_arrays_with_their_dependencies(place):
    chosen = {"MODELS": "resnet18 resnet34", "INITS": "random cd imagenet+cd", "FOLDS": "0 1"}
    numbers = {}
    for number, _, script, job in listed(place.run("--list", **chosen)[1]):
        numbers.setdefault((script, job["--model"], job["--init"]), []).append(str(number))
    done = place.runs / "pretrain/resnet34/cd/predictions.csv"
    done.parent.mkdir(parents=True)
    done.touch()
    given = {"SBATCH": "--partition=gpu --time=1:00:00"} | chosen
    status, _, err = place.run("--slurm", "--stop-lr", "0.005", "--lr=a b", **given)
    assert status == 0, err
    submitted = [text.strip().splitlines() for text in (place.plan / "sbatch").read_text().split("--\n")][:-1]
    arrays = {}
    for place_in_order, words in enumerate(submitted, 1):
        (array,) = (word.split("=")[1] for word in words if word.startswith("--array="))
        arrays[array] = 100 + place_in_order, [word for word in words if word.startswith("--dependency")]
        assert "--requeue" in words and "--signal=B:USR1@120" in words and "--gres=gpu:1" in words
        assert words.index("--time=24:00:00") < words.index("--time=1:00:00") and "--partition=gpu" in words
        assert r"--wrap=exec bash run_all.sh --stop-lr 0.005 --lr a\ b --task $SLURM_ARRAY_TASK_ID" in words
    later = (("resnet18", "cd"), ("resnet18", "imagenet+cd"), ("resnet34", "imagenet+cd"))
    free = (("resnet18", "random"), ("resnet34", "random"), ("resnet34", "cd"))
    free = [numbers["train.py", *run] for run in free] + [numbers["pretrain.py", *run] for run in later]
    free = ",".join(sorted(itertools.chain(*free), key=int))
    assert arrays.pop(free) == (101, [])
    wanted = {",".join(numbers["train.py", *run]): f"101_{numbers['pretrain.py', *run][0]}" for run in later}
    wanted = {array: [f"--dependency=afterok:{first}"] for array, first in wanted.items()}
    assert {array: needed for array, (_, needed) in arrays.items()} == wanted


@pytest.mark.long
def test_a_small_study_with_the_scripts_themselves(demo, tmp_path):
    """As under WSL: DATA and RUNS below a folder of first and last name."""
    (tmp_path / "Anna M & Co").mkdir()
    data, runs = tmp_path / "Anna M & Co/data", tmp_path / "Anna M & Co/my runs"
    data.symlink_to(demo)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    chosen = os.environ | {"DATA": str(data), "RUNS": str(runs), "PATH": path, "FOLDS": "0,1"}
    chosen |= {"MODELS": "shufflenet_v2_x0_5", "INITS": "random cd"}
    options = "--device cpu --epochs 1 --image-size 32 --lr 0.01 --workers 0 --amp off".split()
    for last in (f"Open {runs}/results/index.html", f"Nothing left to do: see {runs}/results/index.html"):
        command = ["bash", ROOT / "run_all.sh", *options]
        done = subprocess.run(command, env=chosen, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == last, done.stdout + done.stderr
    names = {path.relative_to(runs).as_posix() for path in runs.rglob("*")}
    for run in ("random/fold0", "random/fold1", "cd/fold0", "cd/fold1"):
        assert f"train/shufflenet_v2_x0_5/{run}/predictions.csv" in names
    assert {"groups.csv", "results/table4.csv", "results/index.html"} < names
    assert any(name.startswith("results/gradcam_") for name in names)
    logs = [file.read_bytes() for file in (runs / "logs").glob("*.log")]
    assert not any(b"\r" in log for log in logs)  # no progress bars in files


def test_slurm_without_options_passes_none_on(place):
    assert place.run("--slurm", **ONE)[0] == 0
    lines = (place.plan / "sbatch").read_text().splitlines()
    assert "--wrap=exec bash run_all.sh --task $SLURM_ARRAY_TASK_ID" in lines


def test_a_clone_by_git_for_windows_starts(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    clone = "git -c core.autocrlf=true -c safe.directory=* clone -q --no-hardlinks"
    subprocess.run([*clone.split(), ROOT, tmp_path / "clone"], check=True)
    script = tmp_path / "clone/run_all.sh"
    done = subprocess.run(["bash", script, "--list"], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 141, done.stderr
    assert b"\r" not in script.read_bytes() + script.with_name(".ci").joinpath("run").read_bytes()
