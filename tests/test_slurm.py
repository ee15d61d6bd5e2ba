"""The study on a cluster: run_all.sh --slurm on a real one of two CPUs (tests/slurm_study.sh)."""

import csv
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
MISSING = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]

REASON = f"no Slurm here: {', '.join(MISSING)} not found; Debian: apt-get install slurm-wlm munge"
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=REASON)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, facts) of one run of tests/slurm_study.sh."""
    folder = tmp_path_factory.mktemp("cluster")
    command, environment = ["bash", ROOT / "tests/slurm_study.sh", folder], os.environ | {"PATH": PATH}
    with open(folder / "output.txt", "w") as output:  # a file: daemons may outlive a failure
        options = {"stdout": output, "stderr": subprocess.STDOUT, "timeout": 1500}
        status = subprocess.run(command, env=environment, **options).returncode
    text = (folder / "output.txt").read_text()
    print(text)
    assert status == 0, text[-3000:]
    return folder, dict(csv.reader((folder / "facts.csv").open()))


def test_task_before_its_pretraining_ends_at_once_with_status_1(study):
    folder, facts = study
    status, _, seconds, _ = facts["status before its pre-training"].split()
    assert status == "1" and int(seconds) <= 10
    assert "waits for its pre-training" in (folder / "early.log").read_text()


def test_pretraining_out_of_time_is_requeued_and_goes_on(study):
    folder, facts = study
    assert int(facts["restarts of the pre-training"]) >= 1
    log = (folder / "slurm/logs/pretrain-shufflenet_v2_x0_5-cd.log").read_text()
    assert log.count("--- ") == 1 + int(facts["restarts of the pre-training"])
    assert "resumes after epoch" in log
    assert log.count("epoch 24/24") == 1


def test_cancelled_task_stays_away_until_submitted_again(study):
    folder, facts = study
    assert facts["restarts of the cancelled"] == "0" and facts["state after scancel"] == "todo"
    log = (folder / "slurm/logs/train-shufflenet_v2_x0_5-random-fold1,2.log").read_text()
    assert log.count("\n--- ") + log.startswith("--- ") == 2 and "fold1: resumes after epoch" in log


def test_everything_is_finished_with_the_tables_of_a_plain_run(study):
    folder, facts = study
    assert facts["states in the end"] == "5 done"
    kinds = ("table", "confusion", "comparisons")
    names = {file.name for file in folder.glob("plain/results/*.csv") if file.name.startswith(kinds)}
    table5 = {f"table5_shufflenet_v2_x0_5_{init}.csv" for init in ("cd", "random")}
    assert {"table4.csv"} | table5 <= names
    files = [folder / "plain/results" / name for name in sorted(names)]
    runs = list(folder.glob("plain/train/*/*/fold*/predictions.csv"))
    assert len(runs) == 6
    for file in files + runs:
        assert (folder / "slurm" / file.relative_to(folder / "plain")).read_bytes() == file.read_bytes(), file
