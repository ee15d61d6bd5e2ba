"""Grad-CAM heatmaps of a run's test cells (Figs. 5 and 6).

    python gradcam.py                                              # Table 4's best row; FGC and BAS
    python gradcam.py --model regnet_y_32gf --init imagenet+cd --classes FGC BAS EOS

A cell is shown by the network of the fold that tested it. A heatmap is scaled to its own maximum: it says
where evidence for a class is seen, not how much. Writes runs/results/gradcam_<model>_<init>_<CLASS>.png.
"""

import argparse
import pathlib
import re
import signal
import sys

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tqdm import tqdm

import datasets
import models

FIGURES = ("FGC", "BAS")  # the classes of Figs. 5 and 6
LEAST_GRID = 7  # places along a side that a heatmap has if possible, as the paper's networks: 7 or 14
PICTURE = 320  # pixels: the longer side of an image as it is shown
MOST, ACROSS = 24, 6  # right cells, and wrong ones, that a figure holds; pictures side by side
BATCH_SIZE = 32
NOTE = (
    "From blue to red: how much each of {0} x {0} places speaks for the class above the map (Grad-CAM);"
    " each map is scaled to its own maximum.\nPercentages: the network's probability of that class.{1}"
)
COARSE = " So few places cannot show a cell's structures."


# ---------------------------------------------------------------- heatmaps
def layer_for(net, images):
    """models.cam_layer(net) and its places along a side, or the last stage's that has LEAST_GRID of them."""
    layer, sides = models.cam_layer(net), {}
    if models.cam_reshape(net):
        theirs = getattr(net, "patch_embed", None)  # timm's
        return layer, theirs.grid_size[0] if theirs else net.image_size // net.patch_size

    def keep(module, inputs, output):
        if torch.is_tensor(output) and output.ndim == 4 and output.shape[2] == output.shape[3]:
            sides[module] = output.shape[2]

    with torch.nn.modules.module.register_module_forward_hook(keep), torch.no_grad():
        net.eval()(images[:1])
    stages = {layer, *net.children()}.union(*(stage.children() for stage in net.children()))
    fine = [stage for stage, side in sides.items() if side >= LEAST_GRID and stage in stages]
    if fine and layer not in fine:
        layer = fine[-1]
    return layer, sides[layer]


def heatmaps(net, images, classes):
    """Maps, float32 [N,H,W] in 0..1, of normalised images float32 [N,3,H,W], of one class (int) each.

    A map is scaled to its own maximum, and 0 everywhere if nothing speaks for the class. Gradients end at the
    layer, which saves most of their time: net is left in eval mode with its parameters frozen.
    """
    layer, _ = layer_for(net.requires_grad_(False), images)
    start = layer.register_forward_hook(lambda module, inputs, out: out.detach().requires_grad_().clone())
    try:
        with GradCAM(net, [layer], models.cam_reshape(net)) as cam:
            return cam(images, [ClassifierOutputTarget(int(label)) for label in classes])
    finally:
        start.remove()


def overlay(picture, heat):
    """A heatmap [h,w] in 0..1 as colours over a paled picture uint8 [H,W,3]: uint8 [H,W,3]."""
    heat = datasets.resize(np.repeat(np.uint8(255 * heat)[..., None], 3, 2), *picture.shape[:2])[..., 0]
    return np.uint8(0.55 * picture + 0.45 * 255 * colormaps["jet"](heat)[..., :3])


def read_cell(cells, size, index):
    """Image index as the network sees it, uint8 [3,size,size], and as it is shown, [H,W,3], PICTURE long."""
    cell = cells[index]
    shape = (max(1, round(PICTURE / max(cell.shape) * side)) for side in cell.shape[:2])
    return torch.from_numpy(datasets.resize(cell, size)).permute(2, 0, 1), datasets.resize(cell, *shape)


def batch_for(info, cells, device):
    """Pairs of read_cell as a batch for the network of info: normalised, float32 [N,3,size,size]."""
    images = torch.stack([small for small, _ in cells])
    return datasets.normalise(images.to(device), info["mean"], info["std"])


# ---------------------------------------------------------------- test cells of a run
def best_run(runs):
    """(model, init) of Table 4's best row: most folds, then highest F1."""
    file = runs / "results" / "table4.csv"
    if not file.exists():
        raise SystemExit(f"{file}: no such file; first run evaluate.py, or name --model and --init")
    rows = pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records")
    best = max(rows, key=lambda row: (int(row["folds"]), float(row["f1_mean"] or 0)))
    return best["model"], best["init"]


def read_run(folder):
    """Classes and tested cells of a run: dicts of path, label, prediction, fold (Path), p (float [C])."""
    cells, classes, text = [], [], ["path", "label", "prediction"]
    options = {"keep_default_na": False, "encoding_errors": "surrogateescape"}  # a class may be called NA
    for file in sorted(folder.glob("fold*/predictions.csv")):
        if not re.fullmatch(r"fold(0|[1-9][0-9]*)", file.parent.name):  # as for evaluate.py
            continue
        try:
            table = pd.read_csv(file, dtype=dict.fromkeys(text, str), **options)
            classes = classes or [name[2:] for name in table if name.startswith("p_")]
            p = table[[f"p_{name}" for name in classes]].to_numpy(float)
            if not {*table.label, *table.prediction} <= {*classes} or not np.allclose(p.sum(1), 1, atol=1e-3):
                raise ValueError("another class, or probabilities that don't add up to 1")
            cells += table[text].assign(fold=file.parent, p=list(p)).to_dict("records")
        except (AttributeError, KeyError, ValueError) as error:
            raise SystemExit(f"{file}: invalid predictions ({error}); train that fold again") from None
    if not cells:
        raise SystemExit(f"{folder}: no finished fold there; first run train.py")
    return classes, cells


def open_images(data, fold, paths):
    """Cells of data, or else of what fold was trained on; SystemExit if one of paths is not there."""
    config = {} if data else datasets.read_json(fold / "config.json")
    images = datasets.open_dataset(data or config.get("source") or config["root"])
    missing = set(paths).difference(images.paths)
    if missing:
        raise SystemExit(f"{images.root}: no test image {min(missing)!r}; see --data")
    return images


def choose(cells, count):
    """At most count of the cells: the half of highest confidence and the half of lowest, highest first."""
    cells = sorted(cells, key=lambda cell: -cell["p"].max())
    return cells if len(cells) <= count else cells[: (count + 1) // 2] + cells[len(cells) - count // 2 :]


def add_heatmaps(cells, classes, data, device):
    """Add to each cell its picture, its grid's side and heatmaps {class: map} for prediction and label."""
    place = {path: i for i, path in enumerate(data.paths)}
    for fold in tqdm(sorted({cell["fold"] for cell in cells}), "heatmaps", unit="fold", disable=None):
        net, info = models.load_checkpoint(fold / "best.pt")
        jobs = [(cell, cell["prediction"]) for cell in cells if cell["fold"] == fold]
        jobs += [(cell, cell["label"]) for cell, label in jobs if cell["label"] != label]
        for start in range(0, len(jobs), BATCH_SIZE):
            batch = jobs[start : start + BATCH_SIZE]
            images = [read_cell(data, info["image_size"], place[cell["path"]]) for cell, _ in batch]
            inputs = batch_for(info, images, device)
            maps = heatmaps(net.to(device), inputs, [classes.index(label) for _, label in batch])
            side = layer_for(net, inputs)[1]
            for (cell, label), (_, picture), heatmap in zip(batch, images, maps):
                cell.setdefault("heatmaps", {})[label] = heatmap
                cell.update(picture=picture, side=side)


def drawable(names):
    """Names as a picture can show them, escaped and cut, or numbers where the font lacks a character."""
    glyphs = font_manager.get_font(font_manager.findfont(None)).get_charmap().keys()
    texts = [repr(name)[1:-1][:40] for name in names]
    return [text if glyphs >= set(map(ord, text)) else f"class {i}" for i, text in enumerate(texts, 1)]


@rc_context({"text.parse_math": False})  # a $ in a file name is no formula
def draw_figure(file, label, row, classes, right, wrong):
    """A class's figure; right and wrong are (heading, cells), wrong ones with two heatmaps each."""
    names, side = dict(zip(classes, drawable(classes))), (right[1] + wrong[1])[0]["side"]
    rows = [-(-len(right[1]) * 2 // ACROSS), -(-len(wrong[1]) * 3 // ACROSS)]
    figure = Figure(figsize=(15, 2.4 + 2.7 * sum(rows)), dpi=100, layout="constrained")
    figure.suptitle(f"{names[label]}   ({', '.join(row)})", fontsize=15)
    figure.supxlabel(NOTE.format(side, COARSE if side < LEAST_GRID else ""), fontsize=9)
    halves = figure.subfigures(2, 1, height_ratios=[row or 0.2 for row in rows], hspace=0.02)
    for half, columns, row, (heading, cells) in zip(halves, (2, 3), rows, (right, wrong)):
        half.suptitle(heading, fontsize=12)
        axes = (
            half.subplots(row, ACROSS, subplot_kw={"frame_on": False, "xticks": (), "yticks": ()}).flat
            if row
            else []
        )
        for i, cell in enumerate(cells):
            first, *others = axes[i * columns : (i + 1) * columns]
            name = pathlib.PurePath(cell["path"]).name[-30:].encode("ascii", "replace").decode()
            first.imshow(cell["picture"])
            first.set_title(f"{name}\n{cell['fold'].name}, true class: {names[cell['label']]}", fontsize=8)
            for axis, (label, heatmap) in zip(others, cell["heatmaps"].items()):
                kind = "predicted" if label == cell["prediction"] else "true"
                empty = "" if heatmap.any() else "\n(the map is empty)"
                p = cell["p"][classes.index(label)]
                axis.imshow(overlay(cell["picture"], heatmap))
                axis.set_title(f"{kind}: {names[label]}, {p:.1%}{empty}", fontsize=8)
    with datasets.open_atomic(file) as handle:
        figure.savefig(handle, format="png")


def draw_classes(runs, model, init, data, labels, paths, count, device):
    """Write results/gradcam_<model>_<init>_<CLASS>.png for each of labels, or of the classes of paths."""
    classes, cells = read_run(runs / "train" / model / init)
    chosen = {cell["path"]: cell["label"] for cell in cells if cell["path"] in paths}
    unknown = [*set(labels).difference(classes), *set(paths).difference(chosen)]
    if unknown:
        known = f"no class ({', '.join(classes)}), no tested image (e.g. {cells[0]['path']})"
        raise SystemExit(f"{unknown[0]}: {known}")
    labels = labels or sorted(set(chosen.values())) or [c for c in FIGURES if c in classes] or classes[:2]
    figures, shown = {label: [] for label in labels}, []
    for label, halves in figures.items():
        of_class = [cell for cell in cells if cell["label"] == label]
        for right, name in ((True, "Correctly classified"), (False, "Misclassified")):
            group = [cell for cell in of_class if (cell["prediction"] == label) == right]
            picked = [cell for cell in group if cell["path"] in chosen] if paths else group[:]
            drawn = choose(picked, MOST if paths else min(count, MOST))
            kind = "chosen" if paths else "most and least confident" if len(drawn) < len(group) else "all"
            counts = f"{len(group)} of {len(of_class)} test cells, {len(drawn)} shown ({kind})"
            halves.append((f"{name}: {counts}", drawn))
            shown += drawn
            if len(drawn) == MOST < min(len(picked), len(paths) or count):
                print(f"{label}, {name.lower()}: {MOST} of {len(picked)} shown, the most that a figure holds")
    images = open_images(data, cells[0]["fold"], [cell["path"] for cell in shown])
    add_heatmaps(shown, classes, images, device)
    for label, (right, wrong) in figures.items():
        if not right[1] + wrong[1]:
            print(f"{label}: no test cell in the finished folds, no figure")
            continue
        file = runs / "results" / f"gradcam_{model}_{init}_{label}.png"
        draw_figure(file, label, (model, init), classes, right, wrong)
        print(file)


def find_device(parser, name):
    """The device that --device names, auto: CUDA where there is one; parser.error if it isn't there."""
    device = name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device != "cpu" and not (cuda and int(cuda[1] or 0) < torch.cuda.device_count()):
        parser.error(f"--device {name}: no such device here; use cpu")
    return device


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: that of Table 4's best row")
    parser.add_argument("--init")
    parser.add_argument("--classes", nargs="+", default=[], help="default: FGC BAS, or the first two")
    parser.add_argument("--paths", nargs="+", default=[], help="test images to show")
    parser.add_argument("--count", type=int, default=6, help="cells shown of right and of wrong ones, each")
    parser.add_argument("--runs", default="runs", type=pathlib.Path)
    parser.add_argument("--data", help="default: where the run found it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args()
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    device = find_device(parser, args.device)
    if args.count < 1:
        parser.error(f"--count {args.count}: at least 1")
    if bool(args.model) != bool(args.init):
        parser.error("--model and --init go together; without both, Table 4's best row is shown")
    try:
        model, init = (args.model, args.init) if args.model else best_run(args.runs)
        draw_classes(args.runs, model, init, args.data, args.classes, args.paths, args.count, device)
    except OSError as error:
        place = error.filename or args.runs
        raise SystemExit(f"{place}: {error.strerror or error}; make room or name another --runs") from None


if __name__ == "__main__":
    main()
