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


# name :: command, its first word one of the above :: words that are all in the last line of stderr
BAD_ARGUMENTS = """\
unknown model :: TRAIN --model resnet_50 :: resnet_50: no classification model
no model :: train.py --init random :: required: --model
unknown init :: TRAIN --init imagnet :: --init imagnet|imagenet+cd|{tmp}/runs/pretrain
init named by a path :: TRAIN --init ../mine=x.pt :: --init ../mine=x.pt|NAME=PATH
fold out of range :: TRAIN --fold 9 :: --fold 9|folds 0 to 4
fold below 0 :: TRAIN --fold 0 -1 :: --fold 0 -1|folds 0 to 4
epochs below 0 :: TRAIN --epochs -1 :: --epochs -1|at least 1
half an epoch :: TRAIN --epochs 1.5 :: --epochs|'1.5'|int
batch of 0 :: TRAIN --batch-size 0 :: --batch-size 0|at least 1
rate below 0 :: TRAIN --lr -1 :: --lr -1|above 0
rate no number :: TRAIN --lr fast :: --lr fast|auto or a number
rate nan :: TRAIN --lr nan :: --lr nan|auto or a number
images of 0 pixels :: TRAIN --image-size 0 :: --image-size 0|at least 1
alexnet at 32 :: TRAIN --model alexnet --image-size 32 :: alexnet cannot be trained|of 32 pixels
Inception at 64 :: TRAIN --model inception_v3 --image-size 64 :: cannot be trained|of 64 pixels
ViT patch :: TRAIN --model vit_b_16 --image-size 100 :: cannot be trained|of 100 pixels
a batch of 1 :: TRAIN --model resnet18 --image-size 32 --batch-size 1 :: with 1 images|1 value
workers below 0 :: TRAIN --workers -1 :: --workers -1|whole number
unknown device :: TRAIN --device gpu :: --device gpu|cuda:1
no CUDA :: TRAIN --device cuda :: no such CUDA device|--device cpu
unknown precision :: TRAIN --amp half :: --amp|'half'|bf16
stop-lr above 1 :: TRAIN --stop-lr 2 :: --stop-lr 2|from 0 to 1
stop-lr with a cosine :: TRAIN --stop-lr 0.1 --schedule cosine :: --stop-lr 0.1|unless|plateau
row named by a path :: TRAIN --name ../mine :: --name ../mine|letters
unknown optimizer :: TRAIN --optimizer lion :: --optimizer|lion|adamw
seed below 0 :: TRAIN --seed -1 :: --seed -1|at least 0
unknown weights :: TRAIN --init imagenet --weights IMAGENET1K_V9 :: IMAGENET1K_V9
unknown option :: TRAIN --momentum 0.8 :: unrecognized arguments: --momentum
pre-training for random :: PRETRAIN --init random :: --init random|imagenet+
pre-training from another :: PRETRAIN --init pcam+cd :: --init pcam+cd|imagenet+
pre-training without epochs :: PRETRAIN --epochs 0 :: --epochs 0|at least 1
one fold :: SPLITS --folds 1 :: folds 1|at least 2
validation share above 1 :: SPLITS --val 1.5 :: val 1.5|between 0 and 1
regular expression :: SPLITS --groups '([' :: --groups ([|regular expression
datasets without a folder :: datasets.py --data :: --data|expected at least one argument
evaluate, unknown option :: EVALUATE --model resnet18 :: unrecognized arguments: --model
gradcam, model without init :: gradcam.py --model resnet18 :: --model and --init go together
gradcam, unknown device :: FIGURES --device cpu:x :: --device cpu:x|use cpu
gradcam, no cell :: FIGURES --count 0 :: --count 0|at least 1
predict without anything :: predict.py :: --checkpoint, --images and --out
predict, unknown device :: JUDGE --device gpu :: --device gpu|use cpu
fetch an unknown model :: models.py --fetch resnet_50 :: resnet_50: no classification model
fetch unknown weights :: models.py --fetch resnet18 --weights V9 :: V9
one group :: SPLITS --groups png :: 1 groups are too few for 5 folds
"""
BAD_DATA = """\
no bm :: TRAIN --data {tmp}/bm :: {tmp}/bm: no such folder|TCIA|unpack it there
no cd :: PRETRAIN --init cd --data {tmp}/cd :: {tmp}/cd: no such folder|github.com/kuku-sichuan
no pcam :: DATASETS {tmp}/pcam :: {tmp}/pcam: no such folder|github.com/basveeling/pcam
no folder of one's own :: SPLITS --data {tmp}/mine :: {tmp}/mine: no such folder|--data
empty folder :: TRAIN --data {tmp}/bm :: {tmp}/bm: 0 class(es) with images|at least 2
a file :: TRAIN --data {tmp}/bm :: {tmp}/bm: no table of path
class folders in parts :: TRAIN --data {tmp}/bm :: {tmp}/bm: |look like parts|type --data \
'{tmp}/bm/{{part}}/{{class}}'
a pattern without a class :: TRAIN --data '{tmp}/*/*.png' :: fits none|below {tmp}
a part that is none :: SPLITS --data '{cells}/{{part}}/[0-4].png' :: no {{class}} of A/0.png
a table without its images :: DATASETS {tmp}/cells.csv :: {tmp}/cells.csv: none of its 1 rows has an \
image|e.g. x.png
one class :: TRAIN --data {tmp}/bm :: {tmp}/bm/A: 0 class(es)|8 ./*.png
no image to validate with :: TRAIN --data {tmp}/bm :: {tmp}/bm
all images unreadable :: TRAIN --data {tmp}/bm :: {tmp}/bm: none of the 1 images of class A can be \
read|A/1.jpg
images gone bad since :: TRAIN --data {tmp}/bm :: {tmp}/bm: none of the 8 images of class A can be read
pass over the data damaged :: TRAIN :: runs/data/cells.json: damaged|remove it
split cut short :: TRAIN :: {tmp}/runs/split.csv|train, val or test
split with other columns :: TRAIN :: {tmp}/runs/split.csv
split with other images :: TRAIN :: {tmp}/runs/split.csv: 2 of its 2 images are not in {cells}|A/x.png
split with other labels :: TRAIN :: {tmp}/runs/split.csv: 1 labels differ|A/0.png
split without training images :: TRAIN :: 0 images to train on|split.csv
split without validation images :: TRAIN :: 0 to validate with|split.csv
another split stands there :: SPLITS --seed 1 :: {tmp}/split.csv: another split|remove it
groups that lack images :: SPLITS --groups {tmp}/g.csv :: no group for 23 of 24 images|A/1.png
groups with other columns :: SPLITS --groups {tmp}/g.csv :: {tmp}/g.csv|path,group
groups that are not there :: SPLITS --groups groups.csv :: groups.csv: cannot be read
runs is a file :: TRAIN :: {tmp}/runs/|Not a directory|--runs
runs can't be made :: PRETRAIN --runs /proc/nothing/runs :: /proc/nothing
a run's folder is a file :: TRAIN :: {tmp}/runs/{fold}|--runs
datasets' runs is a file :: DATASETS {cells} :: {tmp}/runs|Not a directory
split can't be written :: SPLITS --out /proc/nothing/split.csv :: /proc/nothing/split.csv: cannot be \
written|--out
split is a folder :: SPLITS --out {cells} :: {cells}: cannot be read|Is a directory
evaluate's results is a file :: EVALUATE :: {tmp}/runs/results/table4.csv can't be written|File exists
report's results is a file :: REPORT :: {tmp}/runs/results/|can't be written|File exists
gradcam's results is a file :: FIGURES :: {tmp}/runs/results: File exists
predict's out is a file :: JUDGE --out {tmp}/o :: {tmp}/o: File exists
COCO file cut short :: DATASETS {tmp}/cd :: {tmp}/cd/train.json: damaged|fetch it again
COCO images without names :: DATASETS {tmp}/cd :: {tmp}/cd/train.json|'file_name'
COCO without its images :: DATASETS {tmp}/cd :: {tmp}/cd: no box
COCO of two cells a class :: PRETRAIN --init cd --data {tmp}/cd :: {tmp}/cd|at least 5
PCam cut short :: PRETRAIN --init pcam --data {tmp}/pcam :: {tmp}/pcam: the train part|truncated|fetch \
{pcam}_train_x.h5
PCam file missing :: DATASETS {tmp}/pcam :: {tmp}/pcam: the valid part|{pcam}_valid_y.h5|No such file|fetch
PCam file is a web page :: DATASETS {tmp}/pcam :: the train part|signature|fetch {pcam}_train_x.h5
PCam of another size :: DATASETS {tmp}/pcam :: {pcam}_train_x.h5
no new images :: JUDGE --images {tmp}/bm :: {tmp}/bm: no image found
no new image readable :: JUDGE --images {tmp}/bm :: {tmp}/bm: none of 2 images
figures of other data :: FIGURES --data {tmp}/bm :: {tmp}/bm: no test image|--data
init's file is missing :: TRAIN --init mine={tmp}/none.pt :: {tmp}/none.pt|no file|best.pt
init's path is empty :: TRAIN --init mine= :: --init mine=|no file|best.pt
another program's :: START :: {tmp}/best.pt: not the weights of|Missing key(s)|name a best.pt
pickled code :: START :: {tmp}/best.pt: damaged|holds more than tensors|nothing of it was run
cut short :: START :: {tmp}/best.pt: damaged or cut short
cut after its first page :: START :: {tmp}/best.pt: damaged or cut short
of another model :: START --model resnet18 :: {tmp}/best.pt: not the weights of resnet18
with a tensor missing :: START :: {tmp}/best.pt: not the weights|Missing key(s)|conv1.0.weight
pre-training not begun :: TRAIN --init cd :: no finished pre-training
pre-training not finished :: TRAIN --init cd :: {tmp}/runs/pretrain/{model}/cd: no finished pre-training
last.pt cut short :: TRAIN :: {fold}/last.pt: damaged or of another version|remove
last.pt of another program :: TRAIN :: {fold}/last.pt: damaged or of another version|KeyError|remove
config.json cut short :: TRAIN :: {fold}/config.json: damaged|remove it
predict, missing :: JUDGE :: {tmp}/best.pt: No such file|best.pt that train.py
predict, another program's :: JUDGE :: {tmp}/best.pt: no checkpoint of ours
predict, pickled code :: JUDGE :: {tmp}/best.pt: damaged
predict, of other classes :: JUDGE :: {tmp}/best.pt|size mismatch
gradcam, best.pt of a fold gone :: FIGURES :: {tmp}/runs/{fold}/best.pt: No such file
predict, two that don't fit :: JUDGE --checkpoint {tmp}/best.pt {tmp}/other.pt :: {tmp}/other.pt: of \
different classes
evaluate, nothing there :: EVALUATE :: {tmp}/runs: no finished run
evaluate, all cut short :: EVALUATE :: {tmp}/runs: no finished run in train/
evaluate, split cut short :: EVALUATE :: {tmp}/runs/split.csv: has folds other than train
compare with another table :: EVALUATE --compare {tmp}/t.csv :: {tmp}/t.csv: is no table4.csv|model,init
compare with words for numbers :: EVALUATE --compare {tmp}/t.csv :: {tmp}/t.csv: could not convert|'high
compare with nothing :: EVALUATE --compare {tmp}/t.csv :: {tmp}/t.csv: No such file
compare with a picture :: EVALUATE --compare {cells}/A/0.png :: {cells}/A/0.png:
report, no folder :: REPORT :: {tmp}/runs: no such folder|--runs
report, all cut short :: REPORT :: {tmp}/runs/{predictions}: ends in the middle|no other fold
report, split of another program :: REPORT :: {tmp}/runs/split.csv: is no table of path,label
report, unknown model :: REPORT --model alexnet :: no finished fold of alexnet
gradcam, no run at all :: gradcam.py --runs {tmp}/runs :: {tmp}/runs/results/table4.csv: no such \
file|evaluate.py
gradcam, no run :: FIGURES :: {tmp}/runs/train/{model}/random: no finished fold|train.py
gradcam, cut short :: FIGURES :: {tmp}/runs/{predictions}
gradcam, empty :: FIGURES :: {tmp}/runs/{predictions}|invalid predictions
gradcam, a class of none :: FIGURES :: {tmp}/runs/{predictions}|another class
gradcam, unknown class :: FIGURES --classes FGC :: FGC: no class (A, B, C)
gradcam, unknown image :: FIGURES --paths A/99.png :: A/99.png
map to no class :: JUDGE --map {tmp}/m.csv :: {tmp}/m.csv: FGC is no class of A, B, C
map of one column :: JUDGE --map {tmp}/m.csv :: {tmp}/m.csv|two columns
map is missing :: JUDGE --map {tmp}/m.csv :: {tmp}/m.csv|No such file
prior without a class :: JUDGE --prior {tmp}/p.csv :: {tmp}/p.csv|A, B, C|'C'
prior below 0 :: JUDGE --prior {tmp}/p.csv :: {tmp}/p.csv|at least 0
prior in words :: JUDGE --prior {tmp}/p.csv :: {tmp}/p.csv|'rare'
"""
PREPARE = {
    "empty folder": empty,
    "a file": put("bm", "tar"),
    "class folders in parts": lambda folder, kit: [
        write_cells(folder / "bm" / part, "AB", 2) for part in ("train", "test")
    ],
    "a table without its images": put("cells.csv", "path,label\nx.png,A\n"),
    "one class": cells("A", 8),
    "no image to validate with": cells("AB", 1),
    "all images unreadable": unreadable,
    "images gone bad since": rotten,
    "pass over the data damaged": copied("runs", "data/cells.json", half),
    "split cut short": put("runs/split.csv", "path,label,fold0\nA/0.png,A,te"),
    "split with other columns": put("runs/split.csv", "file;label\n"),
    "split with other images": put("runs/split.csv", "path,label,fold0\nA/x.png,A,test\nA/y.png,A,train\n"),
    "split with other labels": put("runs/split.csv", "path,label,fold0\nA/0.png,B,test\nA/1.png,A,train\n"),
    "split without training images": split("test"),
    "split without validation images": split("train"),
    "another split stands there": lambda folder, kit: called(folder, kit, SPLITS),
    "groups that lack images": put("g.csv", "path,group\nA/0.png,1\n"),
    "groups with other columns": put("g.csv", "a,b\n1,2\n"),
    "runs is a file": put("runs", ""),
    "a run's folder is a file": put(f"runs/{FOLD}", ""),
    "datasets' runs is a file": put("runs", ""),
    "evaluate's results is a file": both(copied("runs"), put("runs/results", "")),
    "report's results is a file": both(copied("runs"), put("runs/results", "")),
    "gradcam's results is a file": both(copied("runs"), put("runs/results", "")),
    "predict's out is a file": both(saved(dict), put("o", "")),
    "COCO file cut short": copied("cd", "train.json", half),
    "COCO images without names": copied("cd", "train.json", no_name),
    "COCO without its images": without_pictures,
    "COCO of two cells a class": copied("cd", "*.json", one_box_a_class),
    "PCam cut short": copied("pcam", f"{PCAM}_train_x.h5", half),
    "PCam file missing": copied("pcam", f"{PCAM}_valid_y.h5"),
    "PCam file is a web page": copied(
        "pcam", f"{PCAM}_train_y.h5", lambda content: b"<html>quota exceeded</html>"
    ),
    "PCam of another size": patches_of_32_pixels,
    "no new images": both(saved(dict), empty),
    "no new image readable": both(saved(dict), unreadable),
    "figures of other data": both(copied("runs"), cells("XY", 3)),
    "another program's": saved(lambda best: {"epoch": 3, "model_state": best["state_dict"]}),
    "pickled code": saved(lambda best: best | {"net": torch.nn.Linear(1, 1)}),
    "cut short": lambda folder, kit: put("best.pt", half((kit.runs / FOLD / "best.pt").read_bytes()))(
        folder, kit
    ),
    "cut after its first page": lambda folder, kit: put(
        "best.pt", (kit.runs / FOLD / "best.pt").read_bytes()[:4096]
    )(folder, kit),
    "of another model": saved(dict),
    "with a tensor missing": saved(
        lambda best: (
            best | {"state_dict": {k: v for k, v in best["state_dict"].items() if k != "conv1.0.weight"}}
        )
    ),
    "pre-training not finished": begun,
    "last.pt cut short": to_go_on("last.pt", b"PK\3\4 half a file"),
    "last.pt of another program": both(copied("runs", PREDICTIONS), saved(dict, f"runs/{FOLD}/last.pt")),
    "config.json cut short": to_go_on("config.json", '{"model": "shuff'),
    "predict, another program's": saved(lambda best: {"weights": best["state_dict"]}),
    "predict, pickled code": saved(lambda best: torch.nn.Linear(1, 1)),
    "predict, of other classes": saved(lambda best: best | {"classes": ["A", "B"]}),
    "gradcam, best.pt of a fold gone": copied("runs", f"{FOLD}/best.pt"),
    "predict, two that don't fit": both(
        saved(dict), saved(lambda best: best | {"classes": ["X", "Y", "Z"]}, "other.pt")
    ),
    "evaluate, all cut short": copied("runs", "train/*/*/*/predictions.csv", half),
    "evaluate, split cut short": copied("runs", "split.csv", half),
    "compare with another table": both(copied("runs"), put("t.csv", "a,b\n1,2\n")),
    "compare with words for numbers": both(
        copied("runs"), put("t.csv", (ROOT / "paper/table4.csv").read_bytes().replace(b",0.", b",high", 1))
    ),
    "compare with nothing": copied("runs"),
    "compare with a picture": copied("runs"),
    "report, all cut short": copied("runs", "train/*/*/*/predictions.csv", half),
    "report, split of another program": copied("runs", "split.csv", lambda content: b"a,b\n1,2\n"),
    "report, unknown model": copied("runs"),
    "gradcam, cut short": copied("runs", PREDICTIONS, half),
    "gradcam, empty": copied("runs", PREDICTIONS, lambda content: b""),
    "gradcam, a class of none": copied(
        "runs", PREDICTIONS, lambda content: content.replace(b",A,", b",Z,", 1)
    ),
    "gradcam, unknown class": copied("runs"),
    "gradcam, unknown image": copied("runs"),
    "map to no class": both(saved(dict), put("m.csv", "x,FGC\n")),
    "map of one column": both(saved(dict), put("m.csv", "A\nB\n")),
    "map is missing": saved(dict),
    "prior without a class": both(saved(dict), put("p.csv", "A,1\nB,2\n")),
    "prior below 0": both(saved(dict), put("p.csv", "A,1\nB,2\nC,-1\n")),
    "prior in words": both(saved(dict), put("p.csv", "A,1\nB,2\nC,rare\n")),
}


def cases(status, table):
    """pytest's parameters of a table's lines: (command, status, words, prepare)."""
    for name, command, words in (line.split(" :: ") for line in table.splitlines()):
        script, _, rest = command.partition(" ")
        command = f"{globals().get(script, script)} {rest}"
        yield pytest.param(command, status, words, PREPARE.get(name), id=name)


TABLE = [*cases(2, BAD_ARGUMENTS), *cases(1, BAD_DATA)]
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
    return shlex.split(filled(folder, kit, command))


def filled(folder, kit, text):
    """A command or words with their places filled in."""
    places = {"tmp": folder, "cells": kit.cells, "model": MODEL, "fold": FOLD}
    return text.format(predictions=PREDICTIONS, pcam=PCAM, **places)


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
    for word in filled(folder, kit, words).split("|"):
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
