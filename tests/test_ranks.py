"""One run over several processes (torchrun): the same protocol, and an end in every case."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# without batch norm and dropout: what each rank computes does not depend on how a batch is shared
VIT = [
    "--model",
    "vit_b_32",
    "--init",
    "random",
    "--fold",
    0,
    "--image-size",
    64,
    "--batch-size",
    16,
    "--lr",
    0.003,
    "--epochs",
    2,
]
SMALL = [
    "--model",
    "shufflenet_v2_x0_5",
    "--init",
    "random",
    "--fold",
    0,
    "--image-size",
    32,
    "--batch-size",
    8,
]


@pytest.fixture(scope="module")
def cells(demo, tmp_path_factory):
    """27 synthetic cells of three classes."""
    folder = tmp_path_factory.mktemp("ranks") / "few"
    for label in ("NGB", "LYT", "EOS"):
        shutil.copytree(next(demo.glob(f"bm/*/{label}")), folder / label)
    return folder


class Run:
    """train.py on a number of ranks, in a session of its own."""

    def __init__(self, ranks, cells, runs, *arguments):
        launcher = (
            [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        )
        command = [
            sys.executable,
            *launcher,
            ROOT / "train.py",
            *arguments,
            "--data",
            cells,
            "--runs",
            runs,
            "--amp",
            "off",
            "--device",
            "cpu",
            "--workers",
            0,
        ]
        runs.mkdir(parents=True, exist_ok=True)
        self.output = runs / "output.txt"
        with open(self.output, "a") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def end(self, seconds=1200):
        """(exit status, all that was printed); whatever still runs then is killed, and the test fails."""
        try:
            return self.process.wait(seconds), self.output.read_text()
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def rank_pids(self):
        """Process ids of the ranks, in the order of their start."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        for task in children.parent.parent.iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return sorted(
            pid for pid in found if b"train.py" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def wait_for(self, condition, seconds=900):
        """Wait until condition() holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()
            time.sleep(0.05)


def table(file):
    """Rows of a CSV, or none while there is none."""
    if not file.exists():
        return []
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


def curve(runs, column):
    """A column of the one log.csv in runs."""
    return [float(row[column]) for row in table(next(runs.glob("train/*/random/fold0/log.csv")))]


def probabilities(runs):
    """Array [N, 3] of the test images in file order."""
    rows = table(next(runs.glob("train/*/random/fold0/predictions.csv")))
    return np.array([[float(value) for key, value in row.items() if key.startswith("p_")] for row in rows])


def gone(pids):
    """No process of these ids runs any more."""
    files = [pathlib.Path(f"/proc/{pid}/cmdline") for pid in pids]
    return not any(file.exists() and file.read_bytes() for file in files)


@pytest.mark.long
def test_batch_that_the_ranks_cannot_share_is_refused(cells, tmp_path):
    status, output = Run(2, cells, tmp_path, *SMALL, "--batch-size", 7).end()
    assert status != 0 and "exitcode  : 2" in output, output
    assert "error: --batch-size 7: must be a multiple of the 2 ranks" in output
    assert 'train.py", line' not in output
    assert not (tmp_path / "train").exists()


@pytest.mark.long
def test_ctrl_c_ends_all_ranks_and_the_run_goes_on(cells, tmp_path):
    run = Run(2, cells, tmp_path, *SMALL, "--lr", 0.01, "--epochs", 1000)
    log = tmp_path / "train/shufflenet_v2_x0_5/random/fold0/log.csv"
    run.wait_for(lambda: len(table(log)) >= 1)
    pids = run.rank_pids()
    assert len(pids) == 2
    os.killpg(run.process.pid, signal.SIGINT)
    status, output = run.end(30)
    assert status != 0 and gone(pids)
    assert "the same command resumes" in output and 'train.py", line' not in output, output
    epochs = len(table(log))
    again = Run(2, cells, tmp_path, *SMALL, "--lr", 0.01, "--epochs", 1000)
    again.wait_for(lambda: len(table(log)) > epochs)
    os.killpg(again.process.pid, signal.SIGTERM)
    assert "resumes after epoch" in again.end(30)[1]


@pytest.mark.long
def test_range_test_on_two_ranks_ends_with_the_rate_of_one_process(cells, tmp_path):
    arguments = [*SMALL, "--batch-size", 16, "--epochs", 1]
    for ranks in (1, 2):
        status, output = Run(ranks, cells, tmp_path / str(ranks), *arguments).end()
        assert status == 0, output
    one, two = (
        json.loads((tmp_path / n / "train/shufflenet_v2_x0_5/random/measured.json").read_text()) for n in "12"
    )
    assert two["lr"] == pytest.approx(one["lr"])
    assert curve(tmp_path / "2", "lr") == [pytest.approx(two["lr"])]


@pytest.fixture(scope="module")
def pair(cells, tmp_path_factory):
    """Folders of the same run of vit_b_32 by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    for ranks in (1, 2):
        status, output = Run(ranks, cells, folder / str(ranks), *VIT).end()
        assert status == 0, output
    return folder / "1", folder / "2"


@pytest.mark.long
def test_two_ranks_have_the_losses_of_one_process(pair):
    one, two = pair
    for column in ("train_loss", "val_loss"):
        assert len(curve(two, column)) == 2
        print(column, curve(one, column), curve(two, column))
        np.testing.assert_allclose(curve(two, column), curve(one, column), rtol=1e-3)
    np.testing.assert_allclose(probabilities(two), probabilities(one), atol=1e-3)


@pytest.mark.long
def test_two_ranks_predict_each_image_of_the_split_once(pair):
    folder = pair[1] / "train/vit_b_32/random/fold0"
    split = table(pair[1] / "split.csv")
    for part, name in (("test", "predictions.csv"), ("val", "val_predictions.csv")):
        tested = sorted(row["path"] for row in table(folder / name))
        assert tested == sorted(row["path"] for row in split if row["fold0"] == part)


@pytest.mark.long
def test_killed_rank_ends_the_run_which_goes_on_with_any_number(pair, cells, tmp_path):
    killed = tmp_path / "killed"
    run = Run(2, cells, killed, *VIT)
    folder = killed / "train/vit_b_32/random/fold0"
    run.wait_for(lambda: "epoch 1/2: " in run.output.read_text())  # its checkpoint is not lost
    pids = run.rank_pids()
    os.kill(pids[1], signal.SIGKILL)
    status, output = run.end(60)
    assert status != 0 and gone(pids), output
    assert len(table(folder / "log.csv")) == 1 and not (folder / "predictions.csv").exists()
    shutil.copytree(killed, tmp_path / "other")
    for ranks, runs in ((2, killed), (1, tmp_path / "other")):
        status, output = Run(ranks, cells, runs, *VIT).end()
        assert status == 0 and "resumes after epoch 1" in output, output
        for column in ("train_loss", "val_loss"):
            np.testing.assert_allclose(curve(runs, column), curve(pair[1], column), rtol=1e-3)
        np.testing.assert_allclose(probabilities(runs), probabilities(pair[1]), atol=1e-3)
