"""The commands of the README, one after the other, on the demo's cells: output, status, files.

Names, columns and keys stand here once more by hand; counts come from the files of the data sets themselves.
"""

import collections
import contextlib
import csv
import hashlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT

import train

MODEL = "shufflenet_v2_x0_5"
SMALL = "--epochs 1 --image-size 32 --batch-size 16 --lr 0.01 --workers 0 --device cpu --amp off"
TRAIN = f"train.py --model {MODEL} {SMALL} --init".split()
# Table 5's order
CLASSES = "NGB NGS LYT MON EOS BAS MMZ MYB PMO BLA PLM KSC OTH ART NIF PEB EBO HAC ABE LYI FGC".split()
SCORES = [f"{score}_{what}" for score in ("precision", "recall", "f1") for what in ("mean", "std")]


def call(script, *args):
    """A script's own `if __name__` part, run in this process: a CompletedProcess."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    redirect, status = contextlib.redirect_stdout(out), 0
    with pytest.MonkeyPatch.context() as patch, redirect, contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(*[end.code] * isinstance(end.code, str), sep="\n", end="", file=err)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(args, status, *texts)


def start(script, *args):
    """A script that has to end with status 0 and without a traceback."""
    done = call(script, *args)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def read(file):
    """Header and rows (dicts) of a CSV file."""
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as handle:
        table = csv.DictReader(handle)
        return table.fieldnames, list(table)


def training(demo, runs):
    return [*TRAIN, "random", "--fold", 0, 1, "--data", demo / "bm", "--runs", runs]


@pytest.fixture(scope="module")
def study(demo, tmp_path_factory):
    """(runs folder, {script: its CompletedProcess}) of train.py, evaluate.py, gradcam.py and report.py."""
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
    names = "config.json log.csv best.pt predictions.csv val_predictions.csv lock"
    assert {file.name for file in fold[1].iterdir()} == set(names.split())
    assert {file.name for file in fold[1].parent.iterdir()} == {"fold0", "fold1"}
    assert {"data/bm.json", "split.csv"} <= {str(file.relative_to(runs)) for file in runs.rglob("*")}
    assert not list(runs.rglob("*.tmp*"))


def test_log_has_one_row_an_epoch(fold):
    header, rows = read(fold[1] / "log.csv")
    assert header == "epoch lr train_loss val_loss val_accuracy images_per_second seconds".split()
    assert [(row["epoch"], float(row["lr"])) for row in rows] == [("1", 0.01)]
    for key in ("train_loss", "val_loss", "images_per_second", "seconds"):
        assert float(rows[0][key]) > 0


def test_config_says_what_was_run(fold):
    config = json.loads((fold[1] / "config.json").read_text())
    wanted = {
        "model": MODEL,
        "init": "random",
        "fold": fold[0],
        "epochs": 1,
        "image_size": 32,
        "batch_size": 16,
    }
    wanted |= {"lr": 0.01, "seed": 0, "amp": "off"}
    assert {key: config[key] for key in wanted} == wanted and config["weights"] is None


def test_best_pt_is_a_plain_dict_of_a_bare_torchvision_network(study, fold):
    best = torch.load(fold[1] / "best.pt", weights_only=True)
    keys = "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts"
    assert set(best) == set(keys.split())
    net = torchvision.models.get_model(MODEL, num_classes=21)
    assert net.load_state_dict(best["state_dict"]).missing_keys == []
    expected = (MODEL, "random", fold[0], 1, 32)
    assert tuple(best[key] for key in "model init fold epoch image_size".split()) == expected
    assert best["classes"] == CLASSES and len(best["mean"]) == len(best["std"]) == 3
    assert best["val_accuracy"] == float(read(fold[1] / "log.csv")[1][0]["val_accuracy"])
    rows = read(study[0] / "split.csv")[1]
    trained = collections.Counter(row["label"] for row in rows if row[f"fold{fold[0]}"] == "train")
    assert best["train_counts"] == [trained[label] for label in CLASSES]


@pytest.mark.parametrize("name, part", [("predictions.csv", "test"), ("val_predictions.csv", "val")])
def test_each_image_of_a_part_is_predicted_once_with_probabilities_that_add_up_to_1(study, fold, name, part):
    header, rows = read(fold[1] / name)
    assert header == ["path", "label", "prediction", *(f"p_{label}" for label in CLASSES)]
    rows_of_part = [row for row in read(study[0] / "split.csv")[1] if row[f"fold{fold[0]}"] == part]
    wanted = {row["path"]: row["label"] for row in rows_of_part}
    assert {row["path"]: row["label"] for row in rows} == wanted and len(rows) == len(wanted) > 0
    p = np.array([[float(row[f"p_{label}"]) for label in CLASSES] for row in rows])
    assert (p >= 0).all() and np.abs(p.sum(1) - 1).max() < 1e-5
    assert [row["prediction"] for row in rows] == [CLASSES[i] for i in p.argmax(1)]


def test_a_second_call_does_nothing_and_says_so(study, demo):
    runs, _ = study

    def state():
        files = [file for file in runs.rglob("*") if file.is_file() and not file.name.endswith("lock")]
        return {file: file.stat().st_mtime_ns for file in files}

    before = state()
    done = start(*training(demo, runs))
    folder = f"{runs}/train/{MODEL}/random"
    for k in (0, 1):
        assert done.stdout.count(f"{folder}/fold{k}: finished, nothing to do\n") == 1
    assert "epoch" not in done.stdout and state() == before


def test_training_does_without_git(tmp_path, monkeypatch):
    """A container often has no git: the commit is recorded as unknown."""
    assert len(train.versions()["commit"] or "") in (0, 40)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.versions()["commit"] is None


ENDS = {
    "disk": (
        OSError(28, "No space left on device", "runs/log.csv"),
        "runs/log.csv: No space left on device; ",
    ),
    "disk, no file": (
        OSError("a: cannot be written, disk full?"),
        "a: cannot be written, disk full?; put it right",
    ),
    "no word": (TimeoutError(), "TimeoutError; put it right"),
    "memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
        "out of memory (CUDA out of memory. Tr",
    ),
    "none of these": (RuntimeError("mat1 and mat2 shapes"), None),
}


@pytest.mark.parametrize("error, line", ENDS.values(), ids=ENDS)
def test_a_full_memory_and_an_oserror_end_in_one_line(error, line):
    """All else keeps Python's own traceback."""

    def main():
        raise error

    with pytest.raises(SystemExit if line else RuntimeError) as caught:
        train.run_main(main)
    text = str(caught.value)
    assert text.startswith(line or "mat1") and "\n" not in text


def test_a_finished_fold_is_not_taken_for_one_of_other_settings(study, demo):
    """A quick trial of fold 0, then the real run into the same folder: the trial would count as one."""
    runs, _ = study
    done = call(*training(demo, runs), "--epochs", 3)
    line = f"{runs}/train/{MODEL}/random/fold0: begun with other settings"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(line)
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
    """B/0.png is A/0.png once more, tested while its twin is trained on; A/1.png overlaps with one."""
    for label in "AB":
        (tmp_path / "mine" / label).mkdir(parents=True)
        for i in range(4):
            image = np.random.default_rng([i, i and ord(label)]).integers(0, 256, (32, 32, 3), np.uint8)
            cv2.imwrite(str(tmp_path / "mine" / label / f"{i}.png"), image)
    parts = {"A/0.png": "train", "A/1.png": "test", "B/0.png": "test", "A/3.png": "val"}
    paths = [f"{label}/{i}.png" for label in "AB" for i in range(4)]
    rows = [(path, path[0], parts.get(path, "train")) for path in paths]
    overlaps = [("B/2.png", "A/1.png", 3, 4, 0.1, 0.8), ("B/2.png", "B/3.png", 1, 1, 0.1, 0.9)]
    tables = {
        "split.csv": [("path", "label", "fold0"), *rows],
        "overlaps.csv": ["first,second,dx,dy,difference,area".split(","), *overlaps],
    }
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, table in tables.items():
        with open(runs / name, "w", newline="") as file:
            csv.writer(file).writerows(table)
    done = start(*TRAIN, "random", "--data", tmp_path / "mine", "--runs", runs)
    assert "test images that overlap with a training image, by fold: [1]" in done.stdout
    assert "test images that are copies of a training image, by fold: [1]" in done.stdout
    assert "1 groups of equal images have several labels, e.g. " in done.stderr


def test_no_network_starts_from_one_that_has_seen_its_test_images(study, demo):
    runs, _ = study
    best = runs / "train" / MODEL / "random" / "fold0" / "best.pt"
    done = call(*TRAIN, f"mine={best}", "--data", demo / "bm", "--runs", runs)
    assert done.returncode == 1 and f"{best}: was trained on the very images of" in done.stderr
    assert not (runs / "train" / MODEL / "mine").exists()


# ---------------------------------------------------------------- evaluate.py, report.py, gradcam.py
def test_tables_have_the_columns_that_others_read(study):
    results = study[0] / "results"
    header, rows = read(results / "table4.csv")
    last = ["accuracy_mean", "accuracy_std", "f1_fold_std", "f1_common"]
    assert header == ["model", "init", "folds", *SCORES, *last]
    assert [(row["model"], row["init"], row["folds"]) for row in rows] == [(MODEL, "random", "2")]
    header, rows = read(results / f"table5_{MODEL}_random.csv")
    assert header[: 2 + len(SCORES)] == ["class", "images", *SCORES]
    assert [row["class"] for row in rows] == CLASSES
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
    assert len(paper) == 25 and MODEL in text and "Regnet_y_32gf" in text
    assert study[1]["evaluate.py"].stderr == ""


def test_pictures_and_page_are_there(study):
    runs, done = study
    for name in ("confusion_{}_random.png", "gradcam_{}_random_BAS.png", "gradcam_{}_random_FGC.png"):
        assert min(cv2.imread(str(runs / "results" / name.format(MODEL))).shape[:2]) > 300, name
    assert str(runs / f"results/gradcam_{MODEL}_random_BAS.png") in done["gradcam.py"].stdout
    page = (runs / "results/index.html").read_text(encoding="utf-8")
    assert done["report.py"].stdout.startswith(f"{runs}/results/index.html: ")
    assert page.rstrip().endswith("</html>")
    assert page.count(f"gradcam_{MODEL}_random_") >= 2 and MODEL in page


# ---------------------------------------------------------------- datasets.py
def counted(demo):
    """{data set: {class: images}} by hand: files in folders, boxes of more than one pixel, HDF5 labels."""
    folders = (demo / "bm").glob("*/*")
    bm = {folder.name: sum(file.is_file() for file in folder.rglob("*")) for folder in folders}
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
    command = [sys.executable, "report.py", "--runs", study[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (study[0] / "results" / "index.html").stat().st_mtime >= (tmp_path / "report.py").stat().st_mtime


# ---------------------------------------------------------------- pretrain.py
@pytest.mark.long
def test_fine_tuning_starts_from_the_pretrainings_best_pt_by_name_or_by_path(demo, tmp_path):
    """config.json has the file's SHA-256; the same weights, seed and fold give the same predictions."""
    runs = tmp_path / "runs"
    options = ["--model", MODEL, *SMALL.split(), "--init", "cd"]
    start("pretrain.py", *options, "--data", demo / "cd", "--runs", runs)
    source = runs / "pretrain" / MODEL / "cd"
    names = {"config.json", "log.csv", "best.pt", "predictions.csv"}
    assert {file.name for file in source.iterdir()} >= names
    header, rows = read(source / "predictions.csv")
    shown = collections.Counter(row["label"] for row in rows)
    assert len(header) == 3 + 11
    assert sum(shown.values()) < sum(counted(demo)["cd"].values()) / 3  # validation images alone
    predictions = []
    for init in ("cd", f"mine={source / 'best.pt'}"):
        start(*TRAIN, init, "--fold", 0, "--data", demo / "bm", "--runs", runs)
        fold = runs / "train" / MODEL / init.split("=")[0] / "fold0"
        config = json.loads((fold / "config.json").read_text())
        assert config["weights"] == hashlib.sha256((source / "best.pt").read_bytes()).hexdigest()
        assert torch.load(fold / "best.pt", weights_only=True)["init"] == config["init"] == fold.parent.name
        predictions.append((fold / "predictions.csv").read_bytes())
    assert predictions[0] == predictions[1]
