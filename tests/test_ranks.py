"""One run over several processes (torchrun): the same protocol, and an end in every case."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_rows, until

pytestmark = pytest.mark.long
# without batch norm and dropout: what each rank computes does not depend on how a batch is shared
VIT = "--model vit_b_32 --init random --fold 0 --image-size 64 --batch-size 16 --lr 0.003 --epochs 2"
SMALL = "--model shufflenet_v2_x0_5 --init random --fold 0 --image-size 32 --batch-size 8"


@pytest.fixture(scope="module")
def cells(demo, tmp_path_factory):
    """27 synthetic cells of three classes."""
    folder = tmp_path_factory.mktemp("ranks") / "few"
    for label in ("NGB", "LYT", "EOS"):
        shutil.copytree(next(demo.glob(f"bm/*/{label}")), folder / label)
    return folder


class Run:
    """train.py on a number of ranks, in a session of its own."""

    def __init__(self, ranks, cells, runs, arguments):
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
        command = ["env", "--default-signal=INT", sys.executable, *(torchrun if ranks > 1 else [])]
        command += [ROOT / "train.py", *f"{arguments} --amp off --device cpu --workers 0".split()]
        runs.mkdir(parents=True, exist_ok=True)
        self.output = runs / "output.txt"
        with open(self.output, "a") as output:
            options = {"stdout": output, "stderr": output, "start_new_session": True}
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command += ["--data", cells, "--runs", runs]
            self.process = subprocess.Popen([*map(str, command)], env=environment, **options)

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
        return sorted(pid for pid in found if b"train.py" in read_bytes(pid))

    def wait_for(self, condition):
        """Wait until condition() holds."""
        until(lambda: condition() or self.process.poll() is not None, self.output.read_text, 900)
        assert self.process.poll() is None, self.output.read_text()


def read_bytes(pid):
    """The command line of a process, nothing once it is gone."""
    file = pathlib.Path(f"/proc/{pid}/cmdline")
    return file.read_bytes() if file.exists() else b""


def curve(runs, column):
    """A column of the one log.csv in runs."""
    return [float(row[column]) for row in read_rows(next(runs.glob("train/*/random/fold0/log.csv")))]


def probabilities(runs):
    """Array [N, 3] of the test images in file order."""
    rows = read_rows(next(runs.glob("train/*/random/fold0/predictions.csv")))
    return np.array([[float(value) for key, value in row.items() if key.startswith("p_")] for row in rows])


def gone(pids):
    """No process of these ids runs any more."""
    return not any(map(read_bytes, pids))


REFUSED = [("--batch-size 7", "--batch-size 7: must be a multiple of the 2 ranks")]
REFUSED += [("--compile", "--compile: not together with torchrun")]


@pytest.mark.parametrize("more, why", REFUSED)
def test_what_ranks_cannot_do_is_refused(cells, tmp_path, more, why):
    status, output = Run(2, cells, tmp_path, f"{SMALL} {more}").end()
    assert status != 0 and "exitcode  : 2" in output and f"error: {why}" in output, output
    assert 'train.py", line' not in output
    assert not (tmp_path / "train").exists()


def test_ctrl_c_ends_all_ranks_and_the_run_goes_on(cells, tmp_path):
    run = Run(2, cells, tmp_path, f"{SMALL} --lr 0.01 --epochs 1000")
    log = tmp_path / "train/shufflenet_v2_x0_5/random/fold0/log.csv"
    run.wait_for(lambda: len(read_rows(log)) >= 1)
    pids = run.rank_pids()
    assert len(pids) == 2
    os.killpg(run.process.pid, signal.SIGINT)
    status, output = run.end(30)
    assert status != 0 and gone(pids), output
    epochs = len(read_rows(log))
    again = Run(2, cells, tmp_path, f"{SMALL} --lr 0.01 --epochs 1000")
    again.wait_for(lambda: len(read_rows(log)) > epochs)
    os.killpg(again.process.pid, signal.SIGTERM)
    assert "resumes after epoch" in again.end(30)[1]


def test_range_test_on_two_ranks_ends_with_the_rate_of_one_process(cells, tmp_path):
    arguments = f"{SMALL} --batch-size 16 --epochs 1"
    for ranks in (1, 2):
        status, output = Run(ranks, cells, tmp_path / str(ranks), arguments).end()
        assert status == 0, output
    folders = [tmp_path / n / "train/shufflenet_v2_x0_5/random" for n in "12"]
    one, two = (json.loads((folder / "measured.json").read_text()) for folder in folders)
    assert two["lr"] == pytest.approx(one["lr"])
    assert curve(tmp_path / "2", "lr") == [pytest.approx(two["lr"])]


@pytest.fixture(scope="module")
def pair(cells, tmp_path_factory):
    """Folders of the same run of vit_b_32 by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    for ranks in (1, 2):
        status, output = Run(ranks, cells, folder / str(ranks), VIT).end()
        assert status == 0, output
    return folder / "1", folder / "2"


def test_two_ranks_have_the_losses_of_one_process(pair):
    one, two = pair
    for column in ("train_loss", "val_loss"):
        assert len(curve(two, column)) == 2
        np.testing.assert_allclose(curve(two, column), curve(one, column), rtol=1e-3)
    np.testing.assert_allclose(probabilities(two), probabilities(one), atol=1e-3)


def test_two_ranks_predict_each_image_of_the_split_once(pair):
    folder = pair[1] / "train/vit_b_32/random/fold0"
    split = read_rows(pair[1] / "split.csv")
    for part, name in (("test", "predictions.csv"), ("val", "val_predictions.csv")):
        tested = sorted(row["path"] for row in read_rows(folder / name))
        assert tested == sorted(row["path"] for row in split if row["fold0"] == part)


def test_killed_rank_ends_the_run_which_goes_on_with_any_number(pair, cells, tmp_path):
    killed = tmp_path / "killed"
    run = Run(2, cells, killed, VIT)
    folder = killed / "train/vit_b_32/random/fold0"
    run.wait_for(lambda: read_rows(folder / "log.csv"))  # written last of an epoch
    pids = run.rank_pids()
    os.kill(pids[1], signal.SIGKILL)
    status, output = run.end(60)
    assert status != 0 and gone(pids), output
    assert len(read_rows(folder / "log.csv")) == 1 and not (folder / "predictions.csv").exists()
    shutil.copytree(killed, tmp_path / "other")
    for ranks, runs in ((2, killed), (1, tmp_path / "other")):
        status, output = Run(ranks, cells, runs, VIT).end()
        assert status == 0 and "resumes after epoch 1" in output, output
        for column in ("train_loss", "val_loss"):
            np.testing.assert_allclose(curve(runs, column), curve(pair[1], column), rtol=1e-3)
        np.testing.assert_allclose(probabilities(runs), probabilities(pair[1]), atol=1e-3)
