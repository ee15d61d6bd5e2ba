"""What users get wrong: each mistake ends in one line that names it, with status 2 for arguments and 1 for
data.

No traceback, and nothing is left that looks finished. Each command is the script's own `if __name__` part,
run in this
process, since PyTorch takes seconds to import; one of each script is started for real as well, and has to end
the same.
"""

import collections
import json
import os
import pathlib
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import traceback

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

MODEL = "shufflenet_v2_x0_5"
SMALL = "--image-size 32 --batch-size 8 --epochs 1 --lr 0.01 --workers 0 --device cpu --amp off"
TRAIN = f"train.py --model {MODEL} --init random --data {{cells}} --runs {{tmp}}/runs {SMALL}"
PRETRAIN = f"pretrain.py --model {MODEL} --init mine --data {{cells}} --runs {{tmp}}/runs {SMALL}"
DATASETS, SPLITS = "datasets.py --runs {tmp}/runs --data", "splits.py --data {cells} --out {tmp}/split.csv"
EVALUATE, REPORT = "evaluate.py --runs {tmp}/runs", "report.py --runs {tmp}/runs --data {cells}"
FIGURES = f"gradcam.py --model {MODEL} --init random --runs {{tmp}}/runs --data {{cells}} --device cpu"
FIGURES += " --classes A B C"
JUDGE = "predict.py --checkpoint {tmp}/best.pt --images {cells} --out {tmp}/out --device cpu --no-heatmaps"
FOLD = f"train/{MODEL}/random/fold0"
PREDICTIONS = f"{FOLD}/predictions.csv"
START = TRAIN + " --init mine={tmp}/best.pt"
PCAM = "camelyonpatch_level_2_split"
PATHS = [f"{label}/{i}.png" for label in "ABC" for i in range(8)]
Kit = collections.namedtuple("Kit", "cells runs cd pcam")


# ---------------------------------------------------------------- what lies there before
def write_cells(folder, classes="ABC", images=8):
    """A folder of class folders with random pictures, the same ones for each name."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for i in range(images):
            picture = np.random.default_rng([ord(label), i]).integers(0, 256, (16, 16, 3), np.uint8)
            (folder / label / f"{i}.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())


def put(name, content):
    """Writes a file of the case's folder."""

    def prepare(folder, kit):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def cells(classes, images):
    """Makes the data set bm in the case's folder."""
    return lambda folder, kit: write_cells(folder / "bm", classes, images)


def copied(source, name=None, change=None):
    """Copies a data set or the runs of Kit, one file rewritten by change (bytes to bytes), or removed without
    it."""

    def prepare(folder, kit):
        shutil.copytree(getattr(kit, source), folder / source)
        for file in folder.glob(f"{source}/{name}") if name else ():
            content = change(file.read_bytes()) if change else file.unlink()
            if content is not None:
                file.write_bytes(content)

    return prepare


def saved(change, name="best.pt"):
    """Saves a trained network's best.pt, a dict, as change returns it."""

    def prepare(folder, kit):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(change(torch.load(kit.runs / FOLD / "best.pt", weights_only=True)), folder / name)

    return prepare


def both(*preparations):
    """One after the other."""
    return lambda folder, kit: [prepare(folder, kit) for prepare in preparations]


def unreadable(folder, kit):
    """Two classes of files that are no pictures."""
    for label in "AB":
        put(f"bm/{label}/1.jpg", "<html>please log in</html>")(folder, kit)


def empty(folder, kit):
    (folder / "bm").mkdir()


def rotten(folder, kit):
    """A data set whose files were overwritten, at the same size, after the pass over them."""
    write_cells(folder / "bm")
    assert called(folder, kit, DATASETS + " {tmp}/bm")[0] == 0
    for file in folder.glob("bm/*/*.png"):
        file.write_bytes(bytes(file.stat().st_size))


def without_pictures(folder, kit):
    """A COCO set whose image folders did not come along."""
    (folder / "cd").mkdir()
    for file in kit.cd.glob("*.json"):
        shutil.copy(file, folder / "cd")


def half(content):
    return content[: len(content) // 2]


def no_name(content):
    """A COCO file whose images have no file_name."""
    coco = json.loads(content)
    return json.dumps(coco | {"images": [{"id": image["id"]} for image in coco["images"]]}).encode()


def one_box_a_class(content):
    coco = json.loads(content)
    return json.dumps(
        coco | {"annotations": list({box["category_id"]: box for box in coco["annotations"]}.values())}
    ).encode()


def split(part):
    """A split whose only fold puts every image in one part."""
    return put(
        "runs/split.csv", "path,label,fold0\n" + "".join(f"{path},{path[0]},{part}\n" for path in PATHS)
    )


def patches_of_32_pixels(folder, kit):
    copied("pcam")(folder, kit)
    with h5py.File(folder / f"pcam/{PCAM}_train_x.h5", "w") as file:
        file["x"] = np.zeros((4, 32, 32, 3), np.uint8)


def to_go_on(name, content):
    """A run that is not finished and has a file of that name to go on from."""
    return both(copied("runs", PREDICTIONS), put(f"runs/{FOLD}/{name}", content))


def begun(folder, kit):
    """A pre-training that stopped before its end."""
    saved(lambda best: best, f"runs/pretrain/{MODEL}/cd/best.pt")(folder, kit)


def case(name, command, status, words, prepare=None):
    """A row of the table: words, separated by |, are all in the last line of stderr."""
    return pytest.param(command, status, words, prepare, id=name)


ARGUMENTS = [
    case("unknown model", TRAIN + " --model resnet_50", 2, "resnet_50: no classification model"),
    case("no model", "train.py --init random", 2, "required: --model"),
    case("unknown init", TRAIN + " --init imagnet", 2, "--init imagnet|imagenet+cd|{tmp}/runs/pretrain"),
    case("init named by a path", TRAIN + " --init ../mine=x.pt", 2, "--init ../mine=x.pt|NAME=PATH"),
    case("fold out of range", TRAIN + " --fold 9", 2, "--fold 9|folds 0 to 4"),
    case("fold below 0", TRAIN + " --fold 0 -1", 2, "--fold 0 -1|folds 0 to 4"),
    case("epochs below 0", TRAIN + " --epochs -1", 2, "--epochs -1|at least 1"),
    case("half an epoch", TRAIN + " --epochs 1.5", 2, "--epochs|'1.5'|int"),
    case("batch of 0", TRAIN + " --batch-size 0", 2, "--batch-size 0|at least 1"),
    case("rate below 0", TRAIN + " --lr -1", 2, "--lr -1|above 0"),
    case("rate no number", TRAIN + " --lr fast", 2, "--lr fast|auto or a number"),
    case("rate nan", TRAIN + " --lr nan", 2, "--lr nan|auto or a number"),
    case("images of 0 pixels", TRAIN + " --image-size 0", 2, "--image-size 0|at least 1"),
    case("alexnet at 32", TRAIN + " --model alexnet --image-size 32", 2, "alexnet cannot be|of 32 pixels"),
    case("Inception at 64", TRAIN + " --model inception_v3 --image-size 64", 2, "cannot be|of 64 pixels"),
    case("ViT patch", TRAIN + " --model vit_b_16 --image-size 100", 2, "cannot be|of 100 pixels"),
    case("a batch of 1", TRAIN + " --model resnet18 --image-size 32 --batch-size 1", 2, "1 images|1 value"),
    case("workers below 0", TRAIN + " --workers -1", 2, "--workers -1|whole number"),
    case("unknown device", TRAIN + " --device gpu", 2, "--device gpu|cuda:1"),
    case("no CUDA", TRAIN + " --device cuda", 2, "no such CUDA device|--device cpu"),
    case("unknown precision", TRAIN + " --amp half", 2, "--amp|'half'|bf16"),
    case("stop-lr above 1", TRAIN + " --stop-lr 2", 2, "--stop-lr 2|from 0 to 1"),
    case(
        "stop-lr with a cosine", TRAIN + " --stop-lr 0.1 --schedule cosine", 2, "--stop-lr 0.1|unless|plateau"
    ),
    case("row named by a path", TRAIN + " --name ../mine", 2, "--name ../mine|letters"),
    case("unknown optimizer", TRAIN + " --optimizer lion", 2, "--optimizer|lion|adamw"),
    case("seed below 0", TRAIN + " --seed -1", 2, "--seed -1|at least 0"),
    case("unknown weights", TRAIN + " --init imagenet --weights IMAGENET1K_V9", 2, "IMAGENET1K_V9"),
    case("unknown option", TRAIN + " --momentum 0.8", 2, "unrecognized arguments: --momentum"),
    case("pre-training for random", PRETRAIN + " --init random", 2, "--init random|imagenet+"),
    case("pre-training from another", PRETRAIN + " --init pcam+cd", 2, "--init pcam+cd|imagenet+"),
    case("pre-training without epochs", PRETRAIN + " --epochs 0", 2, "--epochs 0|at least 1"),
    case("one fold", SPLITS + " --folds 1", 2, "folds 1|at least 2"),
    case("validation share above 1", SPLITS + " --val 1.5", 2, "val 1.5|between 0 and 1"),
    case("regular expression", SPLITS + " --groups '(['", 2, "--groups ([|regular expression"),
    case("datasets without a folder", "datasets.py --data", 2, "--data|expected at least one argument"),
    case("evaluate, unknown option", EVALUATE + " --model resnet18", 2, "unrecognized arguments: --model"),
    case("gradcam, model without init", "gradcam.py --model resnet18", 2, "--model and --init go together"),
    case("gradcam, unknown device", FIGURES + " --device cpu:x", 2, "--device cpu:x|use cpu"),
    case("gradcam, no cell", FIGURES + " --count 0", 2, "--count 0|at least 1"),
    case("predict without anything", "predict.py", 2, "--checkpoint, --images and --out"),
    case("predict, unknown device", JUDGE + " --device gpu", 2, "--device gpu|use cpu"),
    case("fetch an unknown model", "models.py --fetch resnet_50", 2, "resnet_50: no classification model"),
    case("fetch unknown weights", "models.py --fetch resnet18 --weights V9", 2, "V9"),
]
DATA = [
    case("no bm", TRAIN + " --data {tmp}/bm", 1, "{tmp}/bm: no such folder|TCIA|unpack it there"),
    case(
        "no cd",
        PRETRAIN + " --init cd --data {tmp}/cd",
        1,
        "{tmp}/cd: no such folder|github.com/kuku-sichuan",
    ),
    case("no pcam", DATASETS + " {tmp}/pcam", 1, "{tmp}/pcam: no such folder|github.com/basveeling/pcam"),
    case("no folder of one's own", SPLITS + " --data {tmp}/mine", 1, "{tmp}/mine: no such folder|--data"),
    case(
        "empty folder", TRAIN + " --data {tmp}/bm", 1, "{tmp}/bm: 0 class(es) with images|at least 2", empty
    ),
    case("a file", TRAIN + " --data {tmp}/bm", 1, "{tmp}/bm: no table of path", put("bm", "tar")),
    case(
        "class folders in parts",
        TRAIN + " --data {tmp}/bm",
        1,
        "{tmp}/bm: |look like parts|type --data '{tmp}/bm/{{part}}/{{class}}'",
        lambda folder, kit: [write_cells(folder / "bm" / part, "AB", 2) for part in ("train", "test")],
    ),
    case("a pattern without a class", TRAIN + " --data '{tmp}/*/*.png'", 1, "fits none|below {tmp}"),
    case(
        "a part that is none",
        SPLITS + " --data '{cells}/{{part}}/[0-4].png'",
        1,
        "no {{class}} or label, e.g. of A/0.png",
    ),
    case(
        "a table without its images",
        DATASETS + " {tmp}/cells.csv",
        1,
        "{tmp}/cells.csv: none of its 1 rows has an image|e.g. x.png",
        put("cells.csv", "path,label\nx.png,A\n"),
    ),
    case("one class", TRAIN + " --data {tmp}/bm", 1, "{tmp}/bm/A: 0 class(es)|8 ./*.png", cells("A", 8)),
    case("no image to validate with", TRAIN + " --data {tmp}/bm", 1, "{tmp}/bm", cells("AB", 1)),
    case(
        "all images unreadable",
        TRAIN + " --data {tmp}/bm",
        1,
        "{tmp}/bm: none of the 1 images of class A can be read|A/1.jpg",
        unreadable,
    ),
    case(
        "images gone bad since",
        TRAIN + " --data {tmp}/bm",
        1,
        "{tmp}/bm: none of the 8 images of class A can be read",
        rotten,
    ),
    case(
        "pass over the data damaged",
        TRAIN,
        1,
        "runs/data/cells.json: damaged|remove it",
        copied("runs", "data/cells.json", half),
    ),
    case(
        "split cut short",
        TRAIN,
        1,
        "{tmp}/runs/split.csv|train, val or test",
        put("runs/split.csv", "path,label,fold0\nA/0.png,A,te"),
    ),
    case("split with other columns", TRAIN, 1, "{tmp}/runs/split.csv", put("runs/split.csv", "file;label\n")),
    case(
        "split with other images",
        TRAIN,
        1,
        "{tmp}/runs/split.csv: 2 of its 2 images are not in {cells}|A/x.png",
        put("runs/split.csv", "path,label,fold0\nA/x.png,A,test\nA/y.png,A,train\n"),
    ),
    case(
        "split with other labels",
        TRAIN,
        1,
        "{tmp}/runs/split.csv: 1 labels differ|A/0.png",
        put("runs/split.csv", "path,label,fold0\nA/0.png,B,test\nA/1.png,A,train\n"),
    ),
    case("split without training images", TRAIN, 1, "0 images to train on|split.csv", split("test")),
    case("split without validation images", TRAIN, 1, "0 to validate with|split.csv", split("train")),
    case(
        "another split stands there",
        SPLITS + " --seed 1",
        1,
        "{tmp}/split.csv: another split|remove it",
        lambda folder, kit: called(folder, kit, SPLITS),
    ),
    case(
        "groups that lack images",
        SPLITS + " --groups {tmp}/g.csv",
        1,
        "no group for 23 of 24 images|A/1.png",
        put("g.csv", "path,group\nA/0.png,1\n"),
    ),
    case(
        "groups with other columns",
        SPLITS + " --groups {tmp}/g.csv",
        1,
        "{tmp}/g.csv|path,group",
        put("g.csv", "a,b\n1,2\n"),
    ),
    case("groups that are not there", SPLITS + " --groups groups.csv", 1, "groups.csv: cannot be read"),
    case("one group", SPLITS + " --groups png", 2, "1 groups are too few for 5 folds"),
    case("runs is a file", TRAIN, 1, "{tmp}/runs/|Not a directory|--runs", put("runs", "")),
    case("runs can't be made", PRETRAIN + " --runs /proc/nothing/runs", 1, "/proc/nothing"),
    case("a run's folder is a file", TRAIN, 1, f"{{tmp}}/runs/{FOLD}|--runs", put(f"runs/{FOLD}", "")),
    case("datasets' runs is a file", DATASETS + " {cells}", 1, "{tmp}/runs|Not a directory", put("runs", "")),
    case(
        "split can't be written",
        SPLITS + " --out /proc/nothing/split.csv",
        1,
        "/proc/nothing/split.csv: cannot be written|--out",
    ),
    case("split is a folder", SPLITS + " --out {cells}", 1, "{cells}: cannot be read|Is a directory"),
    case(
        "evaluate's results is a file",
        EVALUATE,
        1,
        "{tmp}/runs/results/table4.csv can't be written|File exists",
        both(copied("runs"), put("runs/results", "")),
    ),
    case(
        "report's results is a file",
        REPORT,
        1,
        "{tmp}/runs/results/|can't be written|File exists",
        both(copied("runs"), put("runs/results", "")),
    ),
    case(
        "gradcam's results is a file",
        FIGURES,
        1,
        "{tmp}/runs/results: File exists",
        both(copied("runs"), put("runs/results", "")),
    ),
    case(
        "predict's out is a file",
        JUDGE + " --out {tmp}/o",
        1,
        "{tmp}/o: File exists",
        both(saved(dict), put("o", "")),
    ),
    case(
        "COCO file cut short",
        DATASETS + " {tmp}/cd",
        1,
        "{tmp}/cd/train.json: damaged|fetch it again",
        copied("cd", "train.json", half),
    ),
    case(
        "COCO images without names",
        DATASETS + " {tmp}/cd",
        1,
        "{tmp}/cd/train.json|'file_name'",
        copied("cd", "train.json", no_name),
    ),
    case("COCO without its images", DATASETS + " {tmp}/cd", 1, "{tmp}/cd: no box", without_pictures),
    case(
        "COCO of two cells a class",
        PRETRAIN + " --init cd --data {tmp}/cd",
        1,
        "{tmp}/cd|at least 5",
        copied("cd", "*.json", one_box_a_class),
    ),
    case(
        "PCam cut short",
        PRETRAIN + " --init pcam --data {tmp}/pcam",
        1,
        f"{{tmp}}/pcam: the train part|truncated|fetch {PCAM}_train_x.h5",
        copied("pcam", f"{PCAM}_train_x.h5", half),
    ),
    case(
        "PCam file missing",
        DATASETS + " {tmp}/pcam",
        1,
        f"{{tmp}}/pcam: the valid part|{PCAM}_valid_y.h5|No such file|fetch",
        copied("pcam", f"{PCAM}_valid_y.h5"),
    ),
    case(
        "PCam file is a web page",
        DATASETS + " {tmp}/pcam",
        1,
        f"the train part|signature|fetch {PCAM}_train_x.h5",
        copied("pcam", f"{PCAM}_train_y.h5", lambda content: b"<html>quota exceeded</html>"),
    ),
    case("PCam of another size", DATASETS + " {tmp}/pcam", 1, f"{PCAM}_train_x.h5", patches_of_32_pixels),
    case(
        "no new images", JUDGE + " --images {tmp}/bm", 1, "{tmp}/bm: no image found", both(saved(dict), empty)
    ),
    case(
        "no new image readable",
        JUDGE + " --images {tmp}/bm",
        1,
        "{tmp}/bm: none of 2 images",
        both(saved(dict), unreadable),
    ),
    case(
        "figures of other data",
        FIGURES + " --data {tmp}/bm",
        1,
        "{tmp}/bm: no test image|--data",
        both(copied("runs"), cells("XY", 3)),
    ),
]
CHECKPOINTS = [
    case("init's file is missing", TRAIN + " --init mine={tmp}/none.pt", 1, "{tmp}/none.pt|no file|best.pt"),
    case("init's path is empty", TRAIN + " --init mine=", 1, "--init mine=|no file|best.pt"),
    case(
        "another program's",
        START,
        1,
        "{tmp}/best.pt: not the weights of|Missing key(s)|name a best.pt",
        saved(lambda best: {"epoch": 3, "model_state": best["state_dict"]}),
    ),
    case(
        "pickled code",
        START,
        1,
        "{tmp}/best.pt: damaged|holds more than tensors|nothing of it was run",
        saved(lambda best: best | {"net": torch.nn.Linear(1, 1)}),
    ),
    case(
        "cut short",
        START,
        1,
        "{tmp}/best.pt: damaged or cut short",
        lambda folder, kit: put("best.pt", half((kit.runs / FOLD / "best.pt").read_bytes()))(folder, kit),
    ),
    case(
        "cut after its first page",
        START,
        1,
        "{tmp}/best.pt: damaged or cut short",
        lambda folder, kit: put("best.pt", (kit.runs / FOLD / "best.pt").read_bytes()[:4096])(folder, kit),
    ),
    case(
        "of another model",
        START + " --model resnet18",
        1,
        "{tmp}/best.pt: not the weights of resnet18",
        saved(dict),
    ),
    case(
        "with a tensor missing",
        START,
        1,
        "{tmp}/best.pt: not the weights|Missing key(s)|conv1.0.weight",
        saved(
            lambda best: (
                best | {"state_dict": {k: v for k, v in best["state_dict"].items() if k != "conv1.0.weight"}}
            )
        ),
    ),
    case("pre-training not begun", TRAIN + " --init cd", 1, "no finished pre-training"),
    case(
        "pre-training not finished",
        TRAIN + " --init cd",
        1,
        f"{{tmp}}/runs/pretrain/{MODEL}/cd: no finished pre-training",
        begun,
    ),
    case(
        "last.pt cut short",
        TRAIN,
        1,
        f"{FOLD}/last.pt: damaged or of another version|remove",
        to_go_on("last.pt", b"PK\3\4 half a file"),
    ),
    case(
        "last.pt of another program",
        TRAIN,
        1,
        f"{FOLD}/last.pt: damaged or of another version|KeyError|remove",
        both(copied("runs", PREDICTIONS), saved(dict, f"runs/{FOLD}/last.pt")),
    ),
    case(
        "config.json cut short",
        TRAIN,
        1,
        f"{FOLD}/config.json: damaged|remove it",
        to_go_on("config.json", '{"model": "shuff'),
    ),
    case("predict, missing", JUDGE, 1, "{tmp}/best.pt: No such file|best.pt that train.py"),
    case(
        "predict, another program's",
        JUDGE,
        1,
        "{tmp}/best.pt: no checkpoint of ours",
        saved(lambda best: {"weights": best["state_dict"]}),
    ),
    case(
        "predict, pickled code", JUDGE, 1, "{tmp}/best.pt: damaged", saved(lambda best: torch.nn.Linear(1, 1))
    ),
    case(
        "predict, of other classes",
        JUDGE,
        1,
        "{tmp}/best.pt|size mismatch",
        saved(lambda best: best | {"classes": ["A", "B"]}),
    ),
    case(
        "gradcam, best.pt of a fold gone",
        FIGURES,
        1,
        f"{{tmp}}/runs/{FOLD}/best.pt: No such file",
        copied("runs", f"{FOLD}/best.pt"),
    ),
    case(
        "predict, two that don't fit",
        JUDGE + " --checkpoint {tmp}/best.pt {tmp}/other.pt",
        1,
        "{tmp}/other.pt: of different classes",
        both(saved(dict), saved(lambda best: best | {"classes": ["X", "Y", "Z"]}, "other.pt")),
    ),
]
TABLES = [
    case("evaluate, nothing there", EVALUATE, 1, "{tmp}/runs: no finished run"),
    case(
        "evaluate, all cut short",
        EVALUATE,
        1,
        "{tmp}/runs: no finished run in train/",
        copied("runs", "train/*/*/*/predictions.csv", half),
    ),
    case(
        "evaluate, split cut short",
        EVALUATE,
        1,
        "{tmp}/runs/split.csv: has folds other than train",
        copied("runs", "split.csv", half),
    ),
    case(
        "compare with another table",
        EVALUATE + " --compare {tmp}/t.csv",
        1,
        "{tmp}/t.csv: is no table4.csv|model,init",
        both(copied("runs"), put("t.csv", "a,b\n1,2\n")),
    ),
    case(
        "compare with words for numbers",
        EVALUATE + " --compare {tmp}/t.csv",
        1,
        "{tmp}/t.csv: could not convert|'high",
        both(
            copied("runs"),
            put("t.csv", (ROOT / "paper/table4.csv").read_bytes().replace(b",0.", b",high", 1)),
        ),
    ),
    case(
        "compare with nothing",
        EVALUATE + " --compare {tmp}/t.csv",
        1,
        "{tmp}/t.csv: No such file",
        copied("runs"),
    ),
    case(
        "compare with a picture",
        EVALUATE + " --compare {cells}/A/0.png",
        1,
        "{cells}/A/0.png: ",
        copied("runs"),
    ),
    case("report, no folder", REPORT, 1, "{tmp}/runs: no such folder|--runs"),
    case(
        "report, all cut short",
        REPORT,
        1,
        f"{{tmp}}/runs/{PREDICTIONS}: ends in the middle|no other fold",
        copied("runs", "train/*/*/*/predictions.csv", half),
    ),
    case(
        "report, split of another program",
        REPORT,
        1,
        "{tmp}/runs/split.csv: is no table of path,label",
        copied("runs", "split.csv", lambda content: b"a,b\n1,2\n"),
    ),
    case(
        "report, unknown model", REPORT + " --model alexnet", 1, "no finished fold of alexnet", copied("runs")
    ),
    case(
        "gradcam, no run at all",
        "gradcam.py --runs {tmp}/runs",
        1,
        "{tmp}/runs/results/table4.csv: no such file|evaluate.py",
    ),
    case("gradcam, no run", FIGURES, 1, f"{{tmp}}/runs/train/{MODEL}/random: no finished fold|train.py"),
    case("gradcam, cut short", FIGURES, 1, f"{{tmp}}/runs/{PREDICTIONS}", copied("runs", PREDICTIONS, half)),
    case(
        "gradcam, empty",
        FIGURES,
        1,
        f"{{tmp}}/runs/{PREDICTIONS}|invalid predictions",
        copied("runs", PREDICTIONS, lambda content: b""),
    ),
    case(
        "gradcam, a class of none",
        FIGURES,
        1,
        f"{{tmp}}/runs/{PREDICTIONS}|another class",
        copied("runs", PREDICTIONS, lambda content: content.replace(b",A,", b",Z,", 1)),
    ),
    case("gradcam, unknown class", FIGURES + " --classes FGC", 1, "FGC: no class (A, B, C)", copied("runs")),
    case("gradcam, unknown image", FIGURES + " --paths A/99.png", 1, "A/99.png", copied("runs")),
    case(
        "map to no class",
        JUDGE + " --map {tmp}/m.csv",
        1,
        "{tmp}/m.csv: FGC is no class of A, B, C",
        both(saved(dict), put("m.csv", "x,FGC\n")),
    ),
    case(
        "map of one column",
        JUDGE + " --map {tmp}/m.csv",
        1,
        "{tmp}/m.csv|two columns",
        both(saved(dict), put("m.csv", "A\nB\n")),
    ),
    case("map is missing", JUDGE + " --map {tmp}/m.csv", 1, "{tmp}/m.csv|No such file", saved(dict)),
    case(
        "prior without a class",
        JUDGE + " --prior {tmp}/p.csv",
        1,
        "{tmp}/p.csv|A, B, C|'C'",
        both(saved(dict), put("p.csv", "A,1\nB,2\n")),
    ),
    case(
        "prior below 0",
        JUDGE + " --prior {tmp}/p.csv",
        1,
        "{tmp}/p.csv|at least 0",
        both(saved(dict), put("p.csv", "A,1\nB,2\nC,-1\n")),
    ),
    case(
        "prior in words",
        JUDGE + " --prior {tmp}/p.csv",
        1,
        "{tmp}/p.csv|'rare'",
        both(saved(dict), put("p.csv", "A,1\nB,2\nC,rare\n")),
    ),
]
TABLE = ARGUMENTS + DATA + CHECKPOINTS + TABLES
ONE_OF_EACH = (
    "no pcam",
    "one fold",
    "pre-training from another",
    "evaluate, all cut short",
    "report, unknown model",
    "gradcam, unknown device",
)


# ---------------------------------------------------------------- one command
@pytest.fixture(scope="module")
def kit(demo, tmp_path_factory):
    """Three classes of eight cells, two trained folds on them, and the demo's cd (without crops) and pcam."""
    folder = tmp_path_factory.mktemp("kit")
    write_cells(folder / "cells")
    shutil.copytree(demo / "cd", folder / "cd", ignore=shutil.ignore_patterns(".crops*"))
    kit = Kit(folder / "cells", folder / "runs", folder / "cd", demo / "pcam")
    for command in (SPLITS + " --out {tmp}/runs/split.csv --folds 2", TRAIN):
        status, text = called(folder, kit, command)
        assert status == 0, text
    return kit


def arguments(folder, kit, command):
    """The command as a list, its places filled in."""
    return shlex.split(command.format(tmp=folder, cells=kit.cells))


def called(folder, kit, command):
    """(exit status, what Python prints at the end) of a script's `if __name__` part, run in this process."""
    script, *rest = arguments(folder, kit, command)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    }
    timeout = socket.getdefaulttimeout()
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / script), *rest])
        patch.setattr(
            os, "_exit", sys.exit
        )  # train.py leaves without an ordinary exit, which would end these tests
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            return 0, ""
        except SystemExit as end:
            return (end.code or 0, "") if isinstance(end.code, (int, type(None))) else (1, f"{end.code}\n")
        except Exception:
            return 1, traceback.format_exc()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            socket.setdefaulttimeout(timeout)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.benchmark = benchmark


def check(folder, kit, before, status, words, ended, out, err):
    """It ended with that status and those words in its last line, without a traceback and without anything
    finished."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert "Traceback" not in out + err and ended == status, out + err
    for word in words.format(tmp=folder, cells=kit.cells).split("|"):
        assert word in lines[-1], lines[-1]
    assert lines[-1].split(": ")[0].endswith(".py") == (status == 2), (
        "argparse names the script, a message the culprit"
    )
    left = files(folder) - before - {"runs/results/index.html"}  # a page may say what it could not read
    assert not [
        name
        for name in left
        if name.startswith(("runs/results/", "out/", "split.csv", "home/"))
        or ".tmp" in name
        or pathlib.Path(name).name in ("predictions.csv", "val_predictions.csv", "best.pt", "measured.json")
    ], left


def files(folder):
    """Names of all files below folder."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def mistake(kit, tmp_path, monkeypatch, capfd):
    """mistake(command, prepare) calls it in this process: (files before, exit status, stdout, stderr)."""

    def call(command, prepare=None):
        if "--device cuda" in command and torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        if prepare:
            prepare(tmp_path, kit)
        before = files(tmp_path)
        capfd.readouterr()
        status, text = called(tmp_path, kit, command)
        out, err = capfd.readouterr()
        return before, status, out, err + text

    return call


@pytest.mark.parametrize("command, status, words, prepare", TABLE)
def test_a_mistake_ends_in_one_line_that_names_it(command, status, words, prepare, mistake, kit, tmp_path):
    before, *ended = mistake(command, prepare)
    check(tmp_path, kit, before, status, words, *ended)


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(half, "ends in the middle of a row", id="cut short"),
        pytest.param(
            lambda content: b"\n".join(content.split(b"\n")[:5]) + b"\n",
            "has 4 rows for 12 test images",
            id="rows missing",
        ),
        pytest.param(
            lambda content: b"image,class\n1.png,A\n",
            "is no table of path,label,prediction",
            id="of another program",
        ),
    ],
)
def test_evaluate_names_a_bad_file_and_makes_its_tables_of_the_rest(change, words, mistake, tmp_path):
    _, status, out, err = mistake(EVALUATE, copied("runs", PREDICTIONS, change))
    assert status == 1 and err.count("\n") == 1 and f"{tmp_path}/runs/{PREDICTIONS}: {words}" in err
    header, row = (
        line.split(",") for line in (tmp_path / "runs/results/table4.csv").read_text().splitlines()
    )
    assert dict(zip(header, row))["folds"] == "1" and "Traceback" not in out


def test_names_in_a_coco_file_lead_to_no_place_outside_the_data_set(mistake, tmp_path):
    """Classes, images and boxes named like paths, even to the root of the disk, are cropped below .crops all
    the same."""
    coco = {
        "categories": [
            {"id": 1, "name": ".."},
            {"id": 2, "name": "../../up"},
            {"id": 3, "name": f"{tmp_path}/root"},
        ],
        "images": [{"id": 1, "file_name": "one.png"}],
        "annotations": [
            {"id": box, "image_id": 1, "category_id": 1 + i % 3, "bbox": [i, i, 9, 9]}
            for i, box in enumerate(["stray", "../../stray", f"{tmp_path}/stray", "/stray", 5, 6])
        ],
    }
    put("cd/instances.json", json.dumps(coco))(tmp_path, None)
    cv2.imwrite(str(tmp_path / "cd/one.png"), np.full((20, 20, 3), 99, np.uint8))
    _, status, _out, err = mistake(DATASETS + " {tmp}/cd")
    assert status == 0, err
    outside = {name for name in files(tmp_path) if not name.startswith("cd/.crops")}
    assert outside == {"cd/instances.json", "cd/one.png", "runs/data/cd.json", "runs/data/cd.lock"}
    assert (
        not [*pathlib.Path("/").glob("*stray*"), *tmp_path.parent.glob("*stray*")]
        and len(list(tmp_path.glob("cd/.crops/*/*.png"))) == 6
    )


# ---------------------------------------------------------------- processes of their own
@pytest.mark.long
@pytest.mark.parametrize("command, status, words, prepare", [row for row in TABLE if row.id in ONE_OF_EACH])
def test_the_script_itself_ends_the_same(
    command, status, words, prepare, mistake, kit, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")  # of argparse's usage
    before, _, _, err = mistake(command, prepare)
    script, *rest = arguments(tmp_path, kit, command)
    done = subprocess.run([sys.executable, ROOT / script, *rest], capture_output=True, text=True, check=False)
    check(tmp_path, kit, before, status, words, done.returncode, done.stdout, done.stderr)
    assert done.stderr == err


def test_without_data_train_says_where_it_is_to_be_had_before_anything_is_fetched(tmp_path):
    """The README's command on a new machine: one line, no ImageNet weights, no look at the network."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "names = ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto')\n"
        f"log = {str(tmp_path / 'network')!r}\n"
        "sys.addaudithook(lambda name, args: name in names and print(name, args, file=open(log, 'a')))\n"
    )
    environment = dict(
        os.environ, TORCH_HOME=str(tmp_path / "home"), PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *"--model vit_l_32 --init imagenet --device cpu".split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    for word in (
        "data/bm: no such folder",
        "doi.org/10.7937/TCIA.AXH3-T579",
        "unpack it there",
        "bash run_all.sh --demo",
    ):
        assert word in done.stderr
    assert files(tmp_path) == {"sitecustomize.py"}
