"""run_all.sh: which jobs it has, in what order, on which GPU, and what it does when one fails, hangs or is taken.

The scripts that it calls are replaced by one program named python, which notes how it was called, obeys the files of a
folder `plan` and leaves what a run leaves; nvidia-smi, sbatch, df and sleep are stand-ins too. What a job really does is
tested elsewhere (test_command_line.py, test_slurm.py).
"""

import collections
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

PYTHON = r"""#!{python} -S
import os, pathlib, signal, subprocess, sys, time
plan, call = pathlib.Path(os.environ["PLAN"]), sys.argv[1:]
def value(option):
    return call[call.index(option) + 1]
with open(plan / "calls", "a") as handle:
    handle.write(" ".join([os.environ.get("CUDA_VISIBLE_DEVICES", "-"), *call]).replace("\n", " ") + "\n")
if call[0] == "-c":  # does the GPU work?
    sys.exit((plan / ("broken-" + os.environ["CUDA_VISIBLE_DEVICES"])).exists())
if call[0] == "models.py":
    sys.exit((plan / ("no-weights-" + call[-1])).exists())
runs = pathlib.Path(value("--runs"))
ends = []
if call[0] == "train.py":
    after = call[call.index("--fold") + 1:]
    folds = after[:next(i for i, word in enumerate(after) if word.startswith("--"))]
    ends = [runs / "train" / value("--model") / value("--init") / ("fold" + fold) / "predictions.csv" for fold in folds]
elif call[0] == "pretrain.py":
    ends = [runs / "pretrain" / value("--model") / value("--init") / "predictions.csv"]
elif call[0] == "overlaps.py":
    ends = [runs / "groups.csv"]
elif call[0] == "report.py":
    ends = [runs / "results" / "index.html"]
name = "-".join([call[0], *(ends[0].parts[-4:-1] if call[0] == "train.py" else [])])
if (plan / ("broken-" + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))).exists() and "train.py" in call[0]:
    print("no kernel image is available")
    sys.exit(2)
small = plan / ("small-" + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
if small.exists() and call[0] in ("train.py", "pretrain.py") and value("--model") == small.read_text():
    print("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): lower --batch-size")
    sys.exit(1)
if (plan / ("orphan-" + name)).exists():
    subprocess.Popen(["/bin/sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False)
if (plan / ("status-" + name)).exists():  # of this try and the next ones
    statuses = (plan / ("status-" + name)).read_text().split()
    (plan / ("status-" + name)).write_text(" ".join(statuses[1:] or statuses))
    if statuses[0] != "0":
        print("what went wrong")
        sys.exit(int(statuses[0]))
def stopped(*_):
    print("stopped by SIGTERM", flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, stopped)
while (plan / ("hold-" + name)).exists():
    time.sleep(.01)
for end in ends:
    end.parent.mkdir(parents=True, exist_ok=True)
    (end.parent / "log.csv").write_text("epoch,lr,train_loss,val_loss,val_accuracy,images_per_second,seconds\n"
                                        "1,1,1,1,1,1,7200\n2,1,1,1,1,1,7200\n")
    end.write_text("")
"""
SLEEP = '#!/bin/sh\necho $PPID >> "$PLAN/slept"\nexec /bin/sleep 0.1\n'
SBATCH = r"""#!/bin/sh
for word; do echo "$word"; done >> "$PLAN/sbatch"
echo -- >> "$PLAN/sbatch"
echo $((100 + $(grep -c -e '^--$' "$PLAN/sbatch")))
"""
TWO_GPUS = "#!/bin/sh\nprintf 'GPU 0: Tesla (UUID: GPU-aa)\\nGPU 1: Tesla (UUID: GPU-bb)\\n'\n"
MIG = "#!/bin/sh\nprintf 'GPU 0: A100 (UUID: GPU-aa)\\n  MIG 3g.20gb     Device  0: (UUID: MIG-c1)\\n  MIG 3g.20gb     Device  1: (UUID: MIG-c2)\\n'\n"
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
        for name, text in (
            ("python", PYTHON.replace("{python}", sys.executable)),
            ("sleep", SLEEP),
            ("sbatch", SBATCH),
            ("nvidia-smi", NO_DRIVER),
        ):
            self.program(name, text)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PLAN": str(self.plan),
            "DATA": str(self.data),
            "RUNS": str(self.runs),
            "HOME": str(folder),
        }

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments, **environment):
        command = [
            "env",
            "--default-signal=INT",
            "bash",
            self.folder / "run_all.sh",
            *map(str, arguments),
        ]  # INT may be ignored here
        chosen = {
            name: value for name, value in (self.environment | environment).items() if value is not None
        }
        return subprocess.Popen(
            command,
            env=chosen,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments, **environment):
        """(status, stdout, stderr)"""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def calls(self, *scripts):
        """[(CUDA_VISIBLE_DEVICES, words of the call)] in order."""
        lines = (self.plan / "calls").read_text().splitlines() if (self.plan / "calls").exists() else []
        return [
            (gpu, words)
            for gpu, *words in (line.split(" ") for line in lines)
            if not scripts or words[0] in scripts
        ]

    def jobs(self):
        """[script/model/init/fold,...] of the jobs that were started, in order."""
        found = []
        for _, words in self.calls("train.py", "pretrain.py", "overlaps.py"):
            options = collections.defaultdict(list)
            for word in words:
                key = word if word.startswith("--") or not options else key
                options[key] += [] if word.startswith("--") else [word]
            found.append(
                "/".join(
                    [words[0]]
                    + [",".join(options[key]) for key in ("--model", "--init", "--fold") if options[key]]
                )
            )
        return found


def until(condition, patience=60):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"nothing happened for {patience} s"
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "Anna M & Co"  # as under WSL
    folder.mkdir()
    return Place(folder)


ONE = {"MODELS": "resnet18", "INITS": "random", "FOLDS": "0 1", "OVERLAPS": "no"}
FOLD = "train.py-resnet18-random-fold"


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
    runs = {
        script: collections.Counter(
            (job["--model"], job["--init"]) for _, _, name, job in jobs if name == script
        )
        for script in ("train.py", "pretrain.py")
    }
    pretrained = {
        (model, init): 1 for model in PAPER for init in ("pcam", "cd", "imagenet+pcam", "imagenet+cd")
    }
    assert runs["pretrain.py"] == pretrained
    plain = {(model, init): 5 for model in PAPER for init in ("random", "imagenet")}
    assert runs["train.py"] == plain | dict.fromkeys(pretrained, 5) | {("resnext50_32x4d", "random"): 5}
    assert sum(runs["train.py"].values()) == 125 and sum(runs["pretrain.py"].values()) == 16
    folds = collections.defaultdict(str)
    for _, _, script, job in jobs:
        folds[script, job.get("--model"), job.get("--init")] += job.get("--fold", "")
        assert job["--data"] == (
            "data/" + job["--init"].split("+")[-1] if script == "pretrain.py" else "data/bm"
        )
    assert {numbers for (script, *_), numbers in folds.items() if script == "train.py"} == {"01234"}
    assert not place.calls() and not (place.folder / "runs").exists()
    assert len(place.run("--list", OVERLAPS="no")[1].splitlines()) == 141


def test_numbers_do_not_depend_on_states(place):
    def state_by_number():
        return {number: state for number, state, *_ in listed(out)}

    before = out = place.run("--list")[1]
    states = state_by_number()
    for number, _, script, job in listed(out):
        waits = script == "train.py" and job["--init"] not in ("random", "imagenet")
        assert states[number] == ("waits" if waits else "todo")
    folder = place.runs / "pretrain/resnet152/cd"
    folder.mkdir(parents=True)
    (folder / "predictions.csv").touch()
    (place.runs / "logs").mkdir()
    (place.runs / "logs/pretrain-vit_l_32-imagenet+cd.failed").touch()
    shutil.rmtree(place.data / "pcam")
    out = place.run("--list")[1]
    drop = [" ".join(line.split()[:1] + line.split()[2:]) for line in out.splitlines()]
    assert drop == [" ".join(line.split()[:1] + line.split()[2:]) for line in before.splitlines()]
    states = state_by_number()
    for number, _, script, job in listed(out):
        model, init, train = job["--model"], job["--init"], script == "train.py"
        wanted = (
            "missing"
            if init.endswith("pcam")
            else "waits"
            if train and init not in ("random", "imagenet")
            else "todo"
        )
        if (model, init) == ("resnet152", "cd"):
            wanted = "todo" if train else "done"
        if (model, init) == ("vit_l_32", "imagenet+cd"):
            wanted = "blocked" if train else "failed"
        assert states[number] == wanted, (script, job)


# ---------------------------------------------------------------- the night
def test_every_job_is_done_once_and_after_its_pretraining(place):
    (place.folder / "overlaps.py").touch()
    models, inits = ["resnet18", "resnet34"], ["random", "imagenet", "cd", "imagenet+cd"]
    status, out, err = place.run(
        "--device",
        "cpu",
        "--epochs=2",
        MODELS=" ".join(models),
        INITS=" ".join(inits),
        FOLDS="0 1,2",
        JOBS_PER_GPU="3",
    )
    assert (status, err) == (0, "")
    jobs = place.jobs()
    wanted = [
        f"train.py/{model}/{init}/{fold}" for model in models for init in inits for fold in ("0", "1,2")
    ]
    wanted += [f"pretrain.py/{model}/{init}" for model in models for init in inits[2:]] + ["overlaps.py"]
    assert sorted(jobs) == sorted(wanted)
    for job in jobs:
        script, *rest = job.split("/")
        if script == "train.py" and rest[1] in inits[2:]:
            assert jobs.index(f"pretrain.py/{rest[0]}/{rest[1]}") < jobs.index(job)
    assert jobs.index("train.py/resnet34/imagenet/0") < jobs.index(
        "train.py/resnet18/random/1,2"
    )  # whole tables soon
    for gpu, words in place.calls("train.py"):
        assert gpu == "" and words[-4:] == ["--epochs", "2", "--device", "cpu"]
    assert sorted(words[2] for _, words in place.calls("models.py")) == models  # fetched before the night
    assert [words[0] for _, words in place.calls()][-3:] == ["evaluate.py", "gradcam.py", "report.py"]
    assert out.splitlines()[-1] == f"Open {place.runs}/results/index.html"
    assert not any("--compare" in words for _, words in place.calls("evaluate.py"))
    log = (place.runs / "logs/train-resnet18-cd-fold1,2.log").read_text()
    assert "python train.py --model resnet18 --init cd --fold 1 2" in log
    (place.plan / "calls").unlink()
    status, out, err = place.run(
        "--device", "cpu", MODELS=" ".join(models), INITS=" ".join(inits), FOLDS="0 1,2"
    )
    assert (status, err) == (0, "") and "Nothing left to do" in out and not place.calls()


def test_the_papers_table_stands_beside_where_the_cells_are_bone_marrow(place):
    (place.data / "bm/BM_cytomorphology_data/FGC").mkdir(parents=True)
    place.run("--device", "cpu", **ONE)
    assert place.calls("evaluate.py")[-1][1][-2:] == ["--compare", "paper/table4.csv"]


def test_the_time_left_is_said(place):
    """Two epochs of 2 h a run: after the first of three, 8 h are left."""
    out = place.run("--device", "cpu", **ONE | {"FOLDS": "0 1 2"})[1]
    shown = [line[line.index("[") : line.index("]") + 1] for line in out.splitlines() if "[" in line]
    assert shown == [
        "[0 runs done, 3 to go]",
        "[1 runs done, 2 to go, about 8 h 00 min]",
        "[2 runs done, 1 to go, about 4 h 00 min]",
    ]


def test_a_second_copy_waits_for_the_first(place):
    """All jobs are taken: it ends with the first, well, and has done nothing twice."""
    for fold in (0, 1):
        (place.plan / f"hold-{FOLD}{fold}").touch()
    first = place.start("--device", "cpu", JOBS_PER_GPU="2", **ONE)
    until(lambda: len(place.calls("train.py")) == 2)
    assert [state for _, state, *_ in listed(place.run("--list", **ONE)[1])] == ["running", "running"]
    second = place.start("--device", "cpu", **ONE)
    slept = place.plan / "slept"
    until(lambda: slept.exists() and len(set(slept.read_text().split())) >= 1 or second.poll() is not None)
    assert second.poll() is None
    (place.plan / f"hold-{FOLD}0").unlink()
    (place.plan / f"hold-{FOLD}1").unlink()
    for copy in (first, second):
        out, err = copy.communicate(timeout=60)
        assert (copy.returncode, err) == (0, "") and "Open " in out
    assert len(place.jobs()) == 2


def test_a_failed_job_is_tried_again_after_all_others(place):
    (place.plan / f"status-{FOLD}0").write_text("1 0")
    status, out, err = place.run("--device", "cpu", **ONE)
    assert status == 0 and place.jobs() == [f"train.py/resnet18/random/{fold}" for fold in (0, 1, 0)]
    assert err == "run_all.sh: failed (status 1): train-resnet18-random-fold0: what went wrong\n"


def test_what_fails_twice_is_named_and_what_it_feeds_is_not_run(place):
    (place.plan / "status-pretrain.py").write_text("1")
    chosen = ONE | {"INITS": "cd random", "FOLDS": "0"}
    status, out, err = place.run("--device", "cpu", **chosen)
    assert status == 1 and place.jobs() == [
        "pretrain.py/resnet18/cd",
        "train.py/resnet18/random/0",
        "pretrain.py/resnet18/cd",
    ]
    assert (
        "failed pretrain resnet18 cd" in err
        and "blocked train resnet18 cd fold0" in err
        and f"see {place.runs}/logs" in err
    )
    (place.plan / "status-pretrain.py").unlink()
    assert place.run("--device", "cpu", **chosen)[0] == 0


def test_a_job_that_leaves_no_predictions_has_failed(place):
    place.program("python", (place.bin / "python").read_text().replace('end.write_text("")', "pass"))
    status, _, err = place.run("--device", "cpu", **ONE)
    assert status == 1 and len(place.jobs()) == 4 and "failed (status 1)" in err


def test_wrong_arguments_stop_all_of_it(place):
    (place.plan / f"status-{FOLD}0").write_text("2")
    status, _, err = place.run("--device", "cpu", "--momentum", 0.8, **ONE)
    assert status == 2 and len(place.jobs()) == 1 and err.endswith("fold0: what went wrong\n")


def test_a_run_that_is_held_elsewhere_is_looked_at_again_after_minutes(place):
    """Started by hand on another machine, say: train.py's own lock knows, status 75."""
    (place.plan / f"status-{FOLD}0").write_text("75 0")
    process = place.start("--device", "cpu", **ONE)
    busy = place.runs / "logs/train-resnet18-random-fold0.busy"
    until(lambda: (place.plan / "slept").exists())
    assert place.jobs() == [f"train.py/resnet18/random/{fold}" for fold in (0, 1)]
    os.utime(busy, (time.time() - 360,) * 2)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and len(place.jobs()) == 3


def test_a_data_worker_that_outlives_its_job_holds_no_lock(place):
    (place.plan / f"orphan-{FOLD}0").touch()
    (place.plan / f"status-{FOLD}0").write_text("1 0")
    process = place.start("--device", "cpu", **ONE)
    try:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and len(place.jobs()) == 3
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_without_locks_it_is_said_once_and_done(place):
    place.program("flock", "#!/bin/sh\necho flock: No locks available >&2\nexit 71\n")
    status, _, err = place.run("--device", "cpu", JOBS_PER_GPU="1", **ONE)
    assert status == 0 and err.count("\n") == 1 and "cannot lock" in err and len(place.jobs()) == 2


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
@pytest.mark.parametrize("mode", [[], ["--task", "1"]])
def test_signals_reach_the_jobs(place, number, group, mode):
    """SIGTERM to run_all.sh alone, Ctrl-C to all: each job is asked to stop and waited for; the status is 128 + n."""
    for fold in (0, 1):
        (place.plan / f"hold-{FOLD}{fold}").touch()
    process = place.start(*mode, "--device", "cpu", JOBS_PER_GPU="2", **ONE)
    jobs = 1 if mode else 2
    until(lambda: len(place.calls("train.py")) == jobs)
    time.sleep(0.1)  # for the stand-in to be ready for the signal
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.count("stopped") == (0 if mode else 1)
    for fold in range(jobs):
        assert "stopped by SIGTERM" in (place.runs / f"logs/train-resnet18-random-fold{fold}.log").read_text()
    assert not list((place.runs / "logs").glob("*.failed"))


# ---------------------------------------------------------------- GPUs
@pytest.mark.parametrize(
    "smi, arguments, environment, seen",
    [
        (TWO_GPUS, [], {}, "0"),
        (TWO_GPUS, ["--device", "cuda"], {"GPUS": "1"}, "1"),
        (TWO_GPUS, ["--device=cuda:1"], {}, "1"),
        (TWO_GPUS, ["--device", "cuda:1"], {"CUDA_VISIBLE_DEVICES": "2,3"}, "3"),
        (TWO_GPUS, [], {"CUDA_VISIBLE_DEVICES": "2,3"}, "2"),
        (TWO_GPUS, [], {"CUDA_VISIBLE_DEVICES": "GPU-bb"}, "GPU-bb"),
        (NO_DRIVER, [], {"GPUS": "0"}, "0"),  # a container without nvidia-smi
        (MIG, [], {}, "MIG-c1"),
        (MIG, ["--device", "cuda:1"], {}, "MIG-c2"),
        (TWO_GPUS, ["--device", "cpu"], {}, ""),
    ],
)
def test_the_gpu_of_a_task(place, smi, arguments, environment, seen):
    place.program("nvidia-smi", smi)
    assert place.run("--task", 1, *arguments, **ONE | environment)[0] == 0
    ((gpu, words),) = place.calls("train.py")
    assert gpu == seen and words[-2:] == ["--device", "cpu" if seen == "" else "cuda"]


@pytest.mark.parametrize(
    "smi, arguments, environment",
    [
        (TWO_GPUS, [], {"CUDA_VISIBLE_DEVICES": ""}),
        (NO_DRIVER, [], {}),
        (NO_DRIVER, ["--device", "cuda"], {}),
        (NO_DRIVER, ["--task", "1"], {}),
        (TWO_GPUS, ["--device", "cuda:2"], {}),
    ],
)
def test_no_gpu_is_said_in_one_line(place, smi, arguments, environment):
    place.program("nvidia-smi", smi)
    status, out, err = place.run(*arguments, **ONE | environment)
    assert status == 1 and err.count("\n") == 1
    assert all(word in err for word in ("no CUDA GPU found", "--demo", "--device cpu")) and not place.calls()


def test_each_gpu_has_its_worker_and_one_that_does_not_work_is_given_up(place):
    """The job that it got is done by the other."""
    place.program("nvidia-smi", TWO_GPUS)
    (place.plan / "broken-1").touch()
    for fold in range(4):
        (place.plan / f"hold-{FOLD}{fold}").touch()
    process = place.start(**ONE | {"FOLDS": "0 1 2 3"})
    until(
        lambda: (
            any(words[0] == "-c" for _, words in place.calls())
            and ("0", "train.py") in [(gpu, words[0]) for gpu, words in place.calls()]
        )
    )
    for fold in range(4):
        (place.plan / f"hold-{FOLD}{fold}").unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err.count("GPU 1 does not work") == 1
    assert collections.Counter(gpu for gpu, _ in place.calls("train.py")) == {"0": 4, "1": 1}


def test_a_model_that_a_small_gpu_has_no_room_for_is_left_to_the_other(place):
    """GPU 1 tries it once, not at every fold, and goes on with the other model; the job counts as no failure."""
    place.program("nvidia-smi", TWO_GPUS)
    (place.plan / "small-1").write_text("resnet152")
    for fold in range(2):
        (
            place.plan / f"hold-train.py-resnet152-random-fold{fold}"
        ).touch()  # what the small GPU gets fails before that
    process = place.start(MODELS="resnet152 vit_l_32", INITS="random", FOLDS="0 1", OVERLAPS="no")
    until(lambda: (place.runs / "train/vit_l_32/random/fold1/predictions.csv").exists())
    for fold in range(2):
        (place.plan / f"hold-train.py-resnet152-random-fold{fold}").unlink()
    _, err = process.communicate(timeout=60)
    tried = collections.Counter(
        (gpu, words[words.index("--model") + 1]) for gpu, words in place.calls("train.py")
    )
    assert process.returncode == 0 and err.count("GPU 1 has no room for resnet152") == 1
    assert (
        tried["0", "resnet152"] == 2
        and tried["1", "resnet152"] == 1
        and tried["0", "vit_l_32"] + tried["1", "vit_l_32"] == 2
    )


def test_a_model_that_no_gpu_has_room_for_ends_the_night_as_failed(place):
    """Its fine-tuning waits for a pre-training that is never done: nothing hangs, and the other model's jobs are done."""
    place.program("nvidia-smi", TWO_GPUS)
    for gpu in (0, 1):
        (place.plan / f"small-{gpu}").write_text("resnet152")
    status, out, err = place.run(MODELS="resnet152 vit_l_32", INITS="cd", FOLDS="0", OVERLAPS="no")
    assert status == 1 and "failed pretrain resnet152 cd" in err and "blocked train resnet152 cd" in err
    assert (place.runs / "train/vit_l_32/cd/fold0/predictions.csv").exists()


def test_slurms_allocation_goes_before_an_exported_choice_of_gpus(place):
    place.run("--task", 1, GPUS="0 1", CUDA_VISIBLE_DEVICES="3", SLURM_ARRAY_TASK_ID="1", **ONE)
    assert [gpu for gpu, _ in place.calls("train.py")] == ["3"]


def test_heatmaps_are_drawn_on_a_gpu_of_ours(place):
    assert place.run(GPUS="3", **ONE)[0] == 0
    assert [gpu for gpu, _ in place.calls("gradcam.py")] == ["3"]


# ---------------------------------------------------------------- before the night
@pytest.mark.parametrize(
    "environment, rest, status, words",
    [
        pytest.param(
            {}, "--task 999 --device cpu", 2, "--task '999': no such job|--list", id="task out of range"
        ),
        pytest.param({}, "--task --device cpu", 2, "--task '--device'|--list", id="task without number"),
        pytest.param({}, "--model resnet18", 2, "--model is set by MODELS", id="model given"),
        pytest.param({}, "--runs=elsewhere", 2, "--runs is set by|RUNS", id="runs given"),
        pytest.param({}, "--name mine", 2, "--name is set by", id="name given"),
        pytest.param(
            {"JOBS_PER_GPU": "0"}, "--device cpu", 2, "JOBS_PER_GPU='0'|number from 1", id="no jobs"
        ),
        pytest.param({}, "--demo --slurm", 2, "--demo runs here", id="demo on a cluster"),
        pytest.param(
            {"RUNS": "/proc/nothing"},
            "--device cpu",
            1,
            "cannot write to /proc/nothing|RUNS",
            id="runs can't be made",
        ),
        pytest.param(
            {"DATA": "nowhere"}, "--device cpu", 1, "nowhere/bm is missing|README|--demo", id="no data"
        ),
    ],
)
def test_the_study_is_not_begun(place, environment, rest, status, words):
    """Wrong before the night, not after it: one line, and no job is started."""
    done = place.run(*rest.split(), **environment)
    assert done[0] == status and done[2].count("\n") == 1 and not place.jobs(), done
    assert done[2].startswith("run_all.sh: ") and all(word in done[2] for word in words.split("|"))


def test_what_cannot_be_had_is_named_and_skipped(place):
    shutil.rmtree(place.data / "pcam")
    (place.plan / "no-weights-resnet34").touch()
    chosen = {
        "MODELS": "resnet18 resnet34",
        "INITS": "imagenet imagenet+cd pcam",
        "FOLDS": "0",
        "OVERLAPS": "no",
    }
    status, out, err = place.run("--device", "cpu", **chosen)
    skipped = [line for line in out.splitlines() if line.startswith("skipped")]
    assert skipped == [
        f"skipped: pcam, since {place.data}/pcam is missing",
        "skipped: ImageNet weights of resnet34",
    ]
    assert status == 0 and sorted(place.jobs()) == [
        "pretrain.py/resnet18/imagenet+cd",
        "train.py/resnet18/imagenet+cd/0",
        "train.py/resnet18/imagenet/0",
    ]


def test_too_small_a_disk_is_said_before_the_night(place):
    """25 checkpoints of 0.57 GB and a few more while they are written need more than 14 GB."""
    chosen = {
        "MODELS": "vgg19_bn",
        "INITS": "random",
        "FOLDS": "0 1 2 3 4 5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24",
    }
    for gigabytes, wanted in ((14, 1), (20, 0)):
        place.program(
            "df",
            f"#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho disk 1 1 {gigabytes * 2**20} 1% /\n",
        )
        status, _, err = place.run("--device", "cpu", **chosen)
        assert (
            status == wanted and ("MB free" in err) == (wanted == 1) and bool(place.jobs()) == (wanted == 0)
        )


# ---------------------------------------------------------------- a cluster
def test_a_task_before_its_pretraining_and_a_done_one_end_at_once(place):
    chosen = ONE | {"INITS": "cd", "FOLDS": "0"}
    assert place.run("--task", 2, "--device", "cpu", **chosen)[::2] == (
        1,
        "run_all.sh: job 2 waits for its pre-training, which is not finished\n",
    )
    assert place.run("--task", 1, "--device", "cpu", **chosen)[0] == 0
    assert place.run("--task", 1, "--device", "cpu", **chosen)[:2] == (0, "job 1 is done\n")
    assert place.run("--task", 2, "--device", "cpu", **chosen)[0] == 0
    assert place.jobs() == ["pretrain.py/resnet18/cd", "train.py/resnet18/cd/0"]
    assert [words[0] for _, words in place.calls()][-3:] == [
        "evaluate.py",
        "gradcam.py",
        "report.py",
    ]  # the last one


def test_slurm_gets_arrays_with_their_dependencies(place):
    chosen = {"MODELS": "resnet18 resnet34", "INITS": "random cd imagenet+cd", "FOLDS": "0 1"}
    numbers = {}
    for number, _, script, job in listed(place.run("--list", **chosen)[1]):
        numbers.setdefault((script, job["--model"], job["--init"]), []).append(str(number))
    done = place.runs / "pretrain/resnet34/cd/predictions.csv"
    done.parent.mkdir(parents=True)
    done.touch()
    status, _, err = place.run(
        "--slurm", "--stop-lr", "0.005", "--lr=a b", SBATCH="--partition=gpu --time=1:00:00", **chosen
    )
    assert status == 0, err
    submitted = [text.strip().splitlines() for text in (place.plan / "sbatch").read_text().split("--\n")][:-1]
    arrays = {}
    for place_in_order, words in enumerate(submitted, 1):
        (array,) = (word.split("=")[1] for word in words if word.startswith("--array="))
        arrays[array] = 100 + place_in_order, [word for word in words if word.startswith("--dependency")]
        assert "--requeue" in words and "--signal=B:USR1@120" in words and "--gres=gpu:1" in words
        assert (
            words.index("--time=24:00:00") < words.index("--time=1:00:00") < len(words)
            and "--partition=gpu" in words
        )
        assert r"--wrap=exec bash run_all.sh --stop-lr 0.005 --lr a\ b --task $SLURM_ARRAY_TASK_ID" in words
    later = (("resnet18", "cd"), ("resnet18", "imagenet+cd"), ("resnet34", "imagenet+cd"))
    free = [
        numbers["train.py", *run]
        for run in (("resnet18", "random"), ("resnet34", "random"), ("resnet34", "cd"))
    ]
    free = ",".join(sorted(sum(free + [numbers["pretrain.py", *run] for run in later], []), key=int))
    assert arrays.pop(free) == (101, [])
    wanted = {",".join(numbers["train.py", *run]): f"101_{numbers['pretrain.py', *run][0]}" for run in later}
    assert {array: needed for array, (_, needed) in arrays.items()} == {
        array: [f"--dependency=afterok:{first}"] for array, first in wanted.items()
    }


@pytest.mark.long
def test_a_small_study_with_the_scripts_themselves(demo, tmp_path):
    """As under WSL: DATA and RUNS below a folder of first and last name."""
    (tmp_path / "Anna M & Co").mkdir()
    data, runs = tmp_path / "Anna M & Co/data", tmp_path / "Anna M & Co/my runs"
    data.symlink_to(demo)
    chosen = dict(
        os.environ,
        DATA=str(data),
        RUNS=str(runs),
        MODELS="shufflenet_v2_x0_5",
        INITS="random cd",
        FOLDS="0,1",
        PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    options = "--device cpu --epochs 1 --image-size 32 --lr 0.01 --workers 0 --amp off".split()
    for last in (f"Open {runs}/results/index.html", f"Nothing left to do: see {runs}/results/index.html"):
        done = subprocess.run(
            ["bash", ROOT / "run_all.sh", *options], env=chosen, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == last, done.stdout + done.stderr
    names = {path.relative_to(runs).as_posix() for path in runs.rglob("*")}
    assert {
        f"train/shufflenet_v2_x0_5/{init}/fold{fold}/predictions.csv"
        for init in ("random", "cd")
        for fold in (0, 1)
    } < names
    assert {"groups.csv", "results/table4.csv", "results/index.html"} < names
    assert any(name.startswith("results/gradcam_") for name in names)
    assert not any(
        b"\r" in file.read_bytes() for file in (runs / "logs").glob("*.log")
    )  # no progress bars in files


def test_slurm_without_options_passes_none_on(place):
    assert place.run("--slurm", **ONE)[0] == 0
    assert (
        "--wrap=exec bash run_all.sh --task $SLURM_ARRAY_TASK_ID"
        in (place.plan / "sbatch").read_text().splitlines()
    )


def test_a_clone_by_git_for_windows_starts(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    clone = [
        "git",
        "-c",
        "core.autocrlf=true",
        "-c",
        "safe.directory=*",
        "clone",
        "-q",
        "--no-hardlinks",
        ROOT,
        tmp_path / "clone",
    ]
    subprocess.run(clone, check=True)
    done = subprocess.run(
        ["bash", tmp_path / "clone/run_all.sh", "--list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 141, done.stderr
    assert (
        b"\r" not in (tmp_path / "clone/run_all.sh").read_bytes() + (tmp_path / "clone/.ci/run").read_bytes()
    )
