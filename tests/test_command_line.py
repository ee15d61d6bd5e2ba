"""The commands of the README, one after the other, on the demo's cells: what they print, their exit status, the files they leave.

Names, columns and keys stand here once more by hand; counts come from the folders and files of the data sets themselves.
"""

import collections
import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT

MODEL = "shufflenet_v2_x0_5"
SMALL = "--epochs 1 --image-size 32 --batch-size 16 --lr 0.01 --workers 0 --device cpu --amp off".split()
CLASSES = (
    "NGB NGS LYT MON EOS BAS MMZ MYB PMO BLA PLM KSC OTH ART NIF PEB EBO HAC ABE LYI FGC".split()
)  # Table 5
SCORES = [f"{score}_{what}" for score in ("precision", "recall", "f1") for what in ("mean", "std")]


def call(script, *args):
    """A script's own `if __name__` part, run in this process: a CompletedProcess with its status and output."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    }
    status = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        patch.setattr(os, "_exit", sys.exit)  # train.py leaves that way, which would end the tests
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(*[end.code] * isinstance(end.code, str), sep="\n", end="", file=err)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(args, status, *texts)


def start(script, *args, **environment):
    """A script that has to end with status 0 and without a traceback: in this process, or with an environment of its own."""
    if script.endswith(".py") and not environment:
        done = call(script, *args)
    else:
        command = [sys.executable, ROOT / script] if script.endswith(".py") else ["bash", ROOT / script]
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in ("DATA", "RUNS", "MODELS", "INITS", "FOLDS")
        }
        clean |= {"PATH": path} | environment
        done = subprocess.run(
            [*command, *map(str, args)], env=clean, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def read(file):
    """Header and rows (dicts) of a CSV file."""
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as handle:
        table = csv.DictReader(handle)
        return table.fieldnames, list(table)


def training(demo, runs):
    return (
        "train.py",
        "--model",
        MODEL,
        "--init",
        "random",
        "--fold",
        0,
        1,
        "--data",
        demo / "bm",
        "--runs",
        runs,
        *SMALL,
    )


@pytest.fixture(scope="module")
def study(demo, tmp_path_factory):
    """(runs folder, {script: its CompletedProcess}) of train.py, evaluate.py, report.py and gradcam.py in this order."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    done = {"train.py": start(*training(demo, runs))}
    done["evaluate.py"] = start("evaluate.py", "--runs", runs, "--compare", ROOT / "paper/table4.csv")
    done["gradcam.py"] = start("gradcam.py", "--runs", runs, "--data", demo / "bm", "--device", "cpu")
    done["report.py"] = start("report.py", "--runs", runs, "--data", demo / "bm")
    return runs, done


@pytest.fixture(scope="module", params=[0, 1])
def fold(study, request):
    """(number, folder) of each trained fold."""
    return request.param, study[0] / "train" / MODEL / "random" / f"fold{request.param}"


# ---------------------------------------------------------------- train.py
def test_a_fold_leaves_these_files_and_no_other(study, fold):
    runs, _ = study
    assert {file.name for file in fold[1].iterdir()} == {
        "config.json",
        "log.csv",
        "best.pt",
        "predictions.csv",
        "val_predictions.csv",
        "lock",
    }
    assert {file.name for file in fold[1].parent.iterdir()} == {"fold0", "fold1"}
    assert {"data/bm.json", "split.csv"} <= {str(file.relative_to(runs)) for file in runs.rglob("*")}
    assert not list(runs.rglob("*.tmp*"))


def test_log_has_one_row_an_epoch(fold):
    header, rows = read(fold[1] / "log.csv")
    assert header == "epoch lr train_loss val_loss val_accuracy images_per_second seconds".split()
    assert [(row["epoch"], float(row["lr"])) for row in rows] == [("1", 0.01)]
    assert all(
        float(row[key]) > 0
        for row in rows
        for key in ("train_loss", "val_loss", "images_per_second", "seconds")
    )


def test_config_says_what_was_run(fold):
    config = json.loads((fold[1] / "config.json").read_text())
    wanted = dict(
        model=MODEL,
        init="random",
        fold=fold[0],
        epochs=1,
        image_size=32,
        batch_size=16,
        lr=0.01,
        seed=0,
        amp="off",
    )
    assert {key: config[key] for key in wanted} == wanted and config["weights"] is None


def test_best_pt_is_a_plain_dict_of_a_bare_torchvision_network(study, fold):
    best = torch.load(fold[1] / "best.pt", weights_only=True)
    assert set(best) == set(
        "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts".split()
    )
    net = torchvision.models.get_model(MODEL, num_classes=21)
    assert net.load_state_dict(best["state_dict"]).missing_keys == []
    assert (best["model"], best["init"], best["fold"], best["epoch"], best["image_size"]) == (
        MODEL,
        "random",
        fold[0],
        1,
        32,
    )
    assert best["classes"] == CLASSES and len(best["mean"]) == len(best["std"]) == 3
    assert best["val_accuracy"] == float(read(fold[1] / "log.csv")[1][0]["val_accuracy"])
    rows = read(study[0] / "split.csv")[1]
    trained = collections.Counter(row["label"] for row in rows if row[f"fold{fold[0]}"] == "train")
    assert best["train_counts"] == [trained[label] for label in CLASSES]


@pytest.mark.parametrize("name, part", [("predictions.csv", "test"), ("val_predictions.csv", "val")])
def test_each_image_of_a_part_is_predicted_once_with_probabilities_that_add_up_to_1(study, fold, name, part):
    header, rows = read(fold[1] / name)
    assert header == ["path", "label", "prediction", *(f"p_{label}" for label in CLASSES)]
    wanted = {
        row["path"]: row["label"] for row in read(study[0] / "split.csv")[1] if row[f"fold{fold[0]}"] == part
    }
    assert {row["path"]: row["label"] for row in rows} == wanted and len(rows) == len(wanted) > 0
    p = np.array([[float(row[f"p_{label}"]) for label in CLASSES] for row in rows])
    assert (p >= 0).all() and np.abs(p.sum(1) - 1).max() < 1e-5
    assert [row["prediction"] for row in rows] == [CLASSES[i] for i in p.argmax(1)]


def test_a_second_call_does_nothing_and_says_so(study, demo):
    runs, _ = study

    def state():
        return {
            file: file.stat().st_mtime_ns
            for file in runs.rglob("*")
            if file.is_file() and not file.name.endswith("lock")
        }

    before = state()
    done = start(*training(demo, runs))
    assert [line for line in done.stdout.splitlines() if "finished, nothing to do" in line] == [
        f"{runs}/train/{MODEL}/random/fold{k}: finished, nothing to do" for k in (0, 1)
    ]
    assert "epoch" not in done.stdout and state() == before


def test_training_does_without_git(tmp_path, monkeypatch):
    """A container often has no git: the commit is recorded as unknown."""
    import train

    assert len(train.versions()["commit"] or "") in (0, 40)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.versions()["commit"] is None


def test_a_finished_fold_is_not_taken_for_one_of_other_settings(study, demo):
    """A quick trial of fold 0, then the real run into the same folder: the first would count as one of the five."""
    runs, _ = study
    done = call(*training(demo, runs), "--epochs", 3)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        f"{runs}/train/{MODEL}/random/fold0: begun with other settings"
    )
    assert "epochs was 1, is now 3" in done.stderr and "Traceback" not in done.stderr


def test_another_strategy_is_a_row_of_table_4(study, demo, tmp_path):
    """--name gives it a folder and a row of its own, beside the row that starts from the same weights."""
    runs = shutil.copytree(study[0], tmp_path / "runs")
    start(*training(demo, runs), "--optimizer", "adamw", "--schedule", "cosine", "--name", "random-adamw")
    folder = runs / "train" / MODEL / "random-adamw"
    config = json.loads((folder / "fold1/config.json").read_text())
    assert (config["init"], config["name"], config["optimizer"]) == ("random", "random-adamw", "adamw")
    assert torch.load(folder / "fold1/best.pt", weights_only=True)["init"] == "random"
    start("evaluate.py", "--runs", runs)
    rows = read(runs / "results/table4.csv")[1]
    assert {(row["init"], row["folds"]) for row in rows} == {("random", "2"), ("random-adamw", "2")}


def test_training_says_which_test_images_it_has_seen(tmp_path):
    """B/0.png is A/0.png once more, tested while its twin is trained on; A/1.png overlaps with a training image."""
    for label in "AB":
        (tmp_path / "mine" / label).mkdir(parents=True)
        for i in range(4):
            image = np.random.default_rng([i, i and ord(label)]).integers(0, 256, (32, 32, 3), np.uint8)
            cv2.imwrite(str(tmp_path / "mine" / label / f"{i}.png"), image)
    parts = {"A/0.png": "train", "A/1.png": "test", "B/0.png": "test", "A/3.png": "val"}
    rows = [
        (f"{label}/{i}.png", label, parts.get(f"{label}/{i}.png", "train"))
        for label in "AB"
        for i in range(4)
    ]
    (tmp_path / "runs").mkdir()
    for name, table in (
        ("split.csv", [("path", "label", "fold0"), *rows]),
        (
            "overlaps.csv",
            [
                "first,second,dx,dy,difference,area".split(","),
                ("B/2.png", "A/1.png", 3, 4, 0.1, 0.8),
                ("B/2.png", "B/3.png", 1, 1, 0.1, 0.9),
            ],
        ),
    ):
        with open(tmp_path / "runs" / name, "w", newline="") as file:
            csv.writer(file).writerows(table)
    done = start(
        "train.py",
        "--model",
        MODEL,
        "--init",
        "random",
        "--data",
        tmp_path / "mine",
        "--runs",
        tmp_path / "runs",
        *SMALL,
    )
    assert "test images that overlap with a training image, by fold: [1]" in done.stdout
    assert "test images that are copies of a training image, by fold: [1]" in done.stdout
    assert "1 groups of equal images have several labels, e.g. " in done.stderr


def test_no_network_starts_from_one_that_has_seen_its_test_images(study, demo):
    runs, _ = study
    best = runs / "train" / MODEL / "random" / "fold0" / "best.pt"
    done = call(
        "train.py", "--model", MODEL, "--init", f"mine={best}", "--data", demo / "bm", "--runs", runs, *SMALL
    )
    assert done.returncode == 1 and f"{best}: was trained on the very images of" in done.stderr
    assert not (runs / "train" / MODEL / "mine").exists()


# ---------------------------------------------------------------- evaluate.py, report.py, gradcam.py
def test_tables_have_the_columns_that_others_read(study):
    results = study[0] / "results"
    header, rows = read(results / "table4.csv")
    assert header == [
        "model",
        "init",
        "folds",
        *SCORES,
        "accuracy_mean",
        "accuracy_std",
        "f1_fold_std",
        "f1_common",
    ]
    assert [(row["model"], row["init"], row["folds"]) for row in rows] == [(MODEL, "random", "2")]
    header, rows = read(results / f"table5_{MODEL}_random.csv")
    assert (
        header[: 2 + len(SCORES)] == ["class", "images", *SCORES]
        and [row["class"] for row in rows] == CLASSES
    )
    header, rows = read(results / f"confusion_{MODEL}_random.csv")
    assert header == ["class", *CLASSES] and [row["class"] for row in rows] == CLASSES
    header, _ = read(results / "label_issues.csv")
    assert header[:4] == ["path", "label", "suggested", "score"]


def test_accuracy_of_table_4_is_the_mean_share_of_right_rows(study):
    runs, done = study
    folds = [read(file)[1] for file in sorted(runs.glob("train/*/*/*/predictions.csv"))]
    shares = [np.mean([row["label"] == row["prediction"] for row in rows]) for rows in folds]
    row = read(runs / "results/table4.csv")[1][0]
    assert float(row["accuracy_mean"]) == pytest.approx(np.mean(shares), abs=1e-5)
    assert float(row["accuracy_std"]) == pytest.approx(np.std(shares, ddof=1), abs=1e-5)
    assert f"{np.mean(shares):.3f}" in done["evaluate.py"].stdout


def test_evaluate_prints_the_papers_table_beside_ours(study):
    text = study[1]["evaluate.py"].stdout
    paper = read(ROOT / "paper/table4.csv")[1]
    for row in paper:
        assert f"{float(row['f1_mean']):.3f}" in text
    assert (
        len(paper) == 25
        and MODEL in text
        and "Regnet_y_32gf" in text
        and study[1]["evaluate.py"].stderr == ""
    )


def test_pictures_and_page_are_there(study):
    runs, done = study
    for name in (
        f"confusion_{MODEL}_random.png",
        f"gradcam_{MODEL}_random_BAS.png",
        f"gradcam_{MODEL}_random_FGC.png",
    ):
        assert min(cv2.imread(str(runs / "results" / name)).shape[:2]) > 300, name
    assert str(runs / f"results/gradcam_{MODEL}_random_BAS.png") in done["gradcam.py"].stdout
    page = (runs / "results/index.html").read_text(encoding="utf-8")
    assert done["report.py"].stdout.startswith(f"{runs}/results/index.html: ") and page.rstrip().endswith(
        "</html>"
    )
    assert page.count(f"gradcam_{MODEL}_random_") >= 2 and MODEL in page


# ---------------------------------------------------------------- datasets.py
def counted(demo):
    """{data set: {class: images}} by hand: files in folders, boxes of more than one pixel, HDF5 labels."""
    bm = {
        folder.name: sum(file.is_file() for file in folder.rglob("*")) for folder in (demo / "bm").glob("*/*")
    }
    cd = collections.Counter()
    for file in (demo / "cd").glob("*.json"):
        coco = json.loads(file.read_text())
        names = {category["id"]: category["name"] for category in coco["categories"]}
        cd.update(names[box["category_id"]] for box in coco["annotations"] if min(box["bbox"][2:]) > 1)
    labels = []
    for file in (demo / "pcam").glob("*_y.h5"):
        with h5py.File(file) as content:
            labels += content["y"][()].ravel().tolist()
    return {"bm": bm, "cd": dict(cd), "pcam": {"normal": labels.count(0), "tumour": labels.count(1)}}


def test_datasets_prints_the_class_counts_of_all_three(demo, tmp_path):
    done = start("datasets.py", "--data", *(demo / name for name in ("bm", "cd", "pcam")), "--runs", tmp_path)
    found = {}
    for block in re.split(r"\n(?=\w)", done.stdout):
        pairs = re.findall(r"(\S+) (\d[\d,]*)(?:,|$)", block.splitlines()[3].strip())
        found[block.split(" ")[0]] = {name: int(count.replace(",", "")) for name, count in pairs}
    assert found == counted(demo)
    for name, classes in found.items():
        info = json.loads((tmp_path / "data" / f"{name}.json").read_text())
        assert dict(zip(info["classes"], info["counts"])) == classes and len(info["fingerprint"]) == 64


# ---------------------------------------------------------------- report.py alone
@pytest.mark.long
def test_the_page_needs_evaluate_py_and_no_other_file_of_ours(study, tmp_path):
    """The two files alone in a folder, as they are copied into another project."""
    for name in ("report.py", "report.html", "evaluate.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "report.py", "--runs", study[0]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (study[0] / "results" / "index.html").stat().st_mtime >= (tmp_path / "report.py").stat().st_mtime


# ---------------------------------------------------------------- pretrain.py
@pytest.mark.long
def test_fine_tuning_starts_from_the_pretrainings_best_pt_by_name_or_by_path(demo, tmp_path):
    """config.json has the file's SHA-256; of the same weights, seed and fold the same predictions come, whatever the name."""
    runs = tmp_path / "runs"
    start("pretrain.py", "--model", MODEL, "--init", "cd", "--data", demo / "cd", "--runs", runs, *SMALL)
    source = runs / "pretrain" / MODEL / "cd"
    assert {file.name for file in source.iterdir()} >= {
        "config.json",
        "log.csv",
        "best.pt",
        "predictions.csv",
    }
    header, rows = read(source / "predictions.csv")
    shown = collections.Counter(row["label"] for row in rows)
    assert (
        len(header) == 3 + 11 and sum(shown.values()) < sum(counted(demo)["cd"].values()) / 3
    )  # validation images alone
    for init in ("cd", f"mine={source / 'best.pt'}"):
        start(
            "train.py",
            "--model",
            MODEL,
            "--init",
            init,
            "--fold",
            0,
            "--data",
            demo / "bm",
            "--runs",
            runs,
            *SMALL,
        )
    folds = [runs / "train" / MODEL / name / "fold0" for name in ("cd", "mine")]
    for fold in folds:
        config = json.loads((fold / "config.json").read_text())
        assert config["weights"] == hashlib.sha256((source / "best.pt").read_bytes()).hexdigest()
        assert torch.load(fold / "best.pt", weights_only=True)["init"] == config["init"] == fold.parent.name
    assert (
        folds[0].joinpath("predictions.csv").read_bytes() == folds[1].joinpath("predictions.csv").read_bytes()
    )
