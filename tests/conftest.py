"""Fixtures of the tests: synthetic cells in three formats, real cells where there are any, the scripts."""

import contextlib
import csv
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of a busy machine wait for each other
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than 20 seconds; run by python -m pytest -m long")
    config.addinivalue_line("markers", "cuda: skipped without a CUDA GPU; run by python -m pytest -m cuda")
    if not config.option.markexpr and not any("::" in arg for arg in config.args):
        config.option.markexpr = "not long"


def until(condition, what=lambda: "", patience=120):
    """Wait for a condition, asked 200 times a second; fails with what() after so many seconds."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"nothing happened for {patience} s; {what()}")
        time.sleep(0.005)


def read_rows(file):
    """Rows of a CSV file as dicts; none while there is no file."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as handle:
        return list(csv.DictReader(handle))


def read_log(folder):
    """log.csv without its two columns of time."""
    rows = read_rows(folder / "log.csv")
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with the synthetic bm, cd and pcam of tests/demo_data.py, tiny; read only."""
    import demo_data

    folder = tmp_path_factory.mktemp("cells")
    demo_data.make(folder, size="tiny", seed=0)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, demo):
    """Two trained folds of a small network on the demo's marrow cells: (runs folder, data); read only."""
    import datasets
    import splits
    import train

    runs, cells = tmp_path_factory.mktemp("trained"), datasets.open_dataset(demo / "bm")
    labels = [cells.classes[target] for target in cells.targets]
    splits.write_splits(runs / "split.csv", cells.paths, labels, splits.make_splits(cells.targets, folds=2))
    options = (
        "--model shufflenet_v2_x0_5 --init random --epochs 2 --image-size 64 --lr 0.05 --workers 0 --amp off"
    )
    argv = ["train.py", *options.split(), "--device", "cpu", "--data", str(demo / "bm"), "--runs", str(runs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train.main()
    return runs, cells


@pytest.fixture(autouse=True)
def signals():
    """A script that is called in this process lets signals end it; pytest itself keeps its own handlers."""
    before = {n: signal.getsignal(n) for n in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_cells():
    """Folder of real cell images (cd_crops/, bm_images/), named by the environment variable REAL_CELLS."""
    folder = pathlib.Path(os.environ.get("REAL_CELLS", "/nowhere"))
    if not (folder / "cd_crops").is_dir():
        pytest.skip("REAL_CELLS names no folder of real cells")
    return folder


@pytest.fixture
def run():
    """Call a script: run("train.py", "--model", ...) is a CompletedProcess with stdout and stderr as text."""

    def call(script, *args, **options):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    return call


@pytest.fixture
def watched_inputs(monkeypatch, tmp_path):
    """Call a script's main() for one epoch of a small network in this process: the batches, normalised, that
    the network was trained on."""
    import torch

    import models

    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # which would outlive the test
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    inputs, build = [], models.build_model

    def watch(net, args):
        if net.training and not args[0].is_meta:  # of a trial without memory
            inputs.append(args[0].detach().clone())

    def build_watched(*args, **kwargs):
        net = build(*args, **kwargs)
        net.register_forward_pre_hook(watch)
        return net

    def call(script, *arguments):
        inputs.clear()
        options = "--model shufflenet_v2_x0_5 --epochs 1 --batch-size 16 --lr 0.01 --amp off --device cpu"
        options = [*options.split(), "--workers", "0", "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr(models, "build_model", build_watched)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments), *options])
        assert script.main() == 0
        return inputs

    return call


@pytest.fixture
def without_rights():
    """(a new folder that all can reach, a context manager in which this process is nobody, not root)."""

    @contextlib.contextmanager
    def context():
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)  # nobody
        try:
            yield
        finally:
            os.seteuid(before)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder), context
