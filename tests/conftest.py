"""Fixtures of the test suite: synthetic cells in the three formats, real cells where there are any, a way to call the scripts."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: on a busy machine its threads wait for each other
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than 20 seconds; run by python -m pytest -m long")
    config.addinivalue_line(
        "markers", "cuda: needs a CUDA GPU, and is skipped without one; run by python -m pytest -m cuda"
    )
    if not config.option.markexpr and not any("::" in arg for arg in config.args):
        config.option.markexpr = "not long"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with the synthetic bm, cd and pcam of tests/demo_data.py, tiny; read only."""
    import demo_data

    folder = tmp_path_factory.mktemp("cells")
    demo_data.make(folder, size="tiny", seed=0)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, demo):
    """Two trained folds of a small network on the demo's bone marrow cells: (runs folder, its data); read only."""
    import datasets
    import splits
    import train

    runs, cells = tmp_path_factory.mktemp("trained"), datasets.open_dataset(demo / "bm")
    labels = [cells.classes[target] for target in cells.targets]
    splits.write_splits(runs / "split.csv", cells.paths, labels, splits.make_splits(cells.targets, folds=2))
    options = (
        "--model",
        "shufflenet_v2_x0_5",
        "--init",
        "random",
        "--data",
        demo / "bm",
        "--runs",
        runs,
        "--epochs",
        2,
        "--image-size",
        64,
        "--lr",
        0.05,
        "--workers",
        0,
        "--device",
        "cpu",
        "--amp",
        "off",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        train.main()
    return runs, cells


@pytest.fixture(autouse=True)
def sigpipe():
    """A script's main() lets `| head` end it; pytest itself goes on."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture(scope="session")
def real_cells():
    """Folder of real cell images (cd_crops/, bm_images/), named by the environment variable REAL_CELLS."""
    folder = pathlib.Path(os.environ.get("REAL_CELLS", "/nowhere"))
    if not (folder / "cd_crops").is_dir():
        pytest.skip("REAL_CELLS names no folder of real cells")
    return folder


@pytest.fixture
def run():
    """Call a script: run("train.py", "--model", ...) gives a CompletedProcess with stdout and stderr as text."""

    def call(script, *args, **options):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    return call


@pytest.fixture
def without_rights():
    """(a new folder that all can reach, a context manager): `with context():` this process is nobody, and not root."""

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
