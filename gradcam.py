"""Grad-CAM heatmaps of test cells (Figs. 5 and 6), and predictions with heatmaps for new images.

    python gradcam.py --model regnet_y_32gf --init imagenet+cd --classes FGC BAS     # runs/results/gradcam_..._FGC.png
    python gradcam.py --model regnet_y_32gf --init imagenet+cd --prior train         # Tables 4 and 5 by another prior
    python gradcam.py --checkpoint best.pt --images FOLDER --out FOLDER              # new images; no GPU needed

A test cell is shown by the network of the fold that tested it. A heatmap is scaled to its own maximum: it says where a
network sees evidence for a class, not how much. Of new images, looked for in all sub-folders, --out gets
predictions.csv, heatmaps/, left_out.csv, differential.csv (counts in each sub-folder with Wilson 95% intervals: the
chance of meeting just these cells, not the network's errors) and, where folders are named as the classes or --map says
which is which, table4.csv, table5.csv and a confusion matrix, without images that a checkpoint was trained or chosen on
(training and validation part of its fold; PCam's and pre-training's images are not looked for).
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import json
import os
import pathlib
import re
import warnings

import numpy as np
import torch
from matplotlib import colormaps, image, rc_context
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from tqdm import tqdm

import datasets
import models

LEAST_GRID = 4  # places along a side that a heatmap has at least; 224 pixels give the paper's architectures 7 or 14
PICTURE = 320  # pixels: the longer side of an image as it is shown
NOTE = ("From blue to red: how much each of {0} x {0} places speaks for the class named above the map (Grad-CAM); each map"
        " is scaled to its own maximum.\nPercentages: the network's probability of that class.")


# ---------------------------------------------------------------- heatmaps
def layer_for(net, images):
    """models.cam_layer(net) and its places along a side, or of the last stage with 4 x 4, where images are so small."""
    layer, seen = models.cam_layer(net), []
    stages = [layer, *net.children()]
    stages += [part for stage in net.children() if isinstance(stage, torch.nn.Sequential) for part in stage]
    hooks = [stage.register_forward_hook(lambda module, inputs, output: seen.append((module, output.shape)))
             for stage in dict.fromkeys(stages) if not isinstance(stage, torch.nn.AdaptiveAvgPool2d)]
    with torch.no_grad():
        net.eval()(images[:1])
    for hook in hooks:
        hook.remove()
    sides = {stage: shape[2] for stage, shape in seen if len(shape) == 4 and shape[2] == shape[3]}
    fine = [stage for stage, side in sides.items() if side >= LEAST_GRID]
    if models.cam_reshape(net):
        return layer, net.image_size // net.patch_size
    return (layer, sides[layer]) if layer in fine or not fine else (fine[-1], sides[fine[-1]])


def heatmaps(net, images, classes):
    """Grad-CAM maps, float32 [N,H,W] in 0..1, of normalised images float32 [N,3,H,W] for one class (int) each.

    A map is scaled to its own maximum, and 0 everywhere if nothing speaks for the class. Gradients go from the logits
    down to models.cam_layer and no further: net is left in eval mode with its parameters frozen.
    """
    layer, _ = layer_for(net.requires_grad_(False), images)
    start = layer.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_().clone())
    try:
        with GradCAM(net, [layer], models.cam_reshape(net)) as cam:
            return cam(images, [ClassifierOutputTarget(int(label)) for label in classes])
    finally:
        start.remove()


def overlay(picture, heat):
    """Heat [h,w] in 0..1 as colours over a paled picture uint8 [H,W,3]: uint8 [H,W,3]."""
    heat = datasets.resize(np.repeat(np.uint8(255 * heat)[..., None], 3, 2), *picture.shape[:2])[..., 0]
    return np.uint8(0.55 * picture + 0.45 * 255 * colormaps["jet"](heat)[..., :3])


def read_cell(cells, size, index):
    """(image as the network sees it, uint8 [3,size,size]; as it is shown, uint8 [H,W,3], the longer side PICTURE)."""
    cell = cells[index]
    shape = (max(1, round(PICTURE / max(cell.shape) * side)) for side in cell.shape[:2])
    return torch.from_numpy(datasets.resize(cell, size)).permute(2, 0, 1), datasets.resize(cell, *shape)


def batch_for(info, cells, device):
    """What read_cell gave as a batch for the network of a checkpoint (info): normalised, float32 [N,3,size,size]."""
    return datasets.normalise(torch.stack([small for small, _ in cells]).to(device), info["mean"], info["std"])


def batched(items, size):
    """Slices of a list, size items each."""
    return (items[i:i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------- test cells of a run
def read_run(folder):
    """(classes, the test cells of all finished folds: dicts of path, label, prediction, fold (Path), p (float [C]))."""
    cells, classes = [], None
    for file in sorted(folder.glob("fold*/predictions.csv")):
        try:
            with open(file, encoding="utf-8", errors="surrogateescape", newline="") as handle:
                header, *rows = list(csv.reader(handle)) or [[]]
            names = [name.removeprefix("p_") for name in header[3:]]
            if header[:3] != ["path", "label", "prediction"] or not names or names != (classes or names):
                raise ValueError("columns other than path,label,prediction,p_<CLASS>... or than the other folds'")
            for path, label, prediction, *p in rows:
                if len(p) != len(names) or not {label, prediction} <= set(names):
                    raise ValueError(f"the row of {path!r} is cut short or of another class")
                cells.append({"path": path, "label": label, "prediction": prediction, "fold": file.parent,
                              "p": np.array(p, float)})
        except (ValueError, csv.Error) as error:
            raise SystemExit(f"{file}: no predictions of a finished fold ({error}); train it again") from None
        classes = names
    if not cells:
        raise SystemExit(f"{folder}: no finished fold there; first run train.py")
    return classes, cells


def choose(cells, count):
    """At most count of the cells: the half of highest confidence and the half of lowest, highest first."""
    cells = sorted(cells, key=lambda cell: -cell["p"].max())
    return cells if len(cells) <= count else cells[:(count + 1) // 2] + cells[len(cells) - count // 2:]


def add_heat(cells, classes, data, device, batch_size):
    """Give each cell its picture and its heat {class: map} for prediction and label, by the network of its fold."""
    place, jobs = {path: i for i, path in enumerate(data.paths)}, collections.defaultdict(list)
    for cell in cells:
        jobs[cell["fold"]] += [(cell, label) for label in {cell["label"], cell["prediction"]}]
    with tqdm(total=sum(map(len, jobs.values())), desc="heatmaps", unit="map", disable=None) as bar:
        for fold, of_fold in jobs.items():
            net, info = models.load_checkpoint(fold / "best.pt")
            for some in batched(of_fold, batch_size):
                try:
                    read = [read_cell(data, info["image_size"], place[cell["path"]]) for cell, _ in some]
                except (KeyError, ValueError) as error:
                    raise SystemExit(f"{data.root}: no test image {error}; name the run's own data by --data") from None
                labels = [classes.index(label) for _, label in some]
                batch = batch_for(info, read, device)
                maps, (_, side) = heatmaps(net.to(device), batch, labels), layer_for(net, batch)
                for (cell, label), (_, picture), heat in zip(some, read, maps):
                    cell["picture"], cell["heat"], cell["side"] = picture, cell.get("heat", {}) | {label: heat}, side
                bar.update(len(some))


@rc_context({"text.parse_math": False})  # a $ in a file name is no formula
def draw_figure(file, title, classes, right, wrong):
    """One class's figure; right, wrong: (heading, cells) of its left and, with two heatmaps each, its right half."""
    rows = max(1, len(right[1]), len(wrong[1]))
    figure = Figure(figsize=(13, 2 + 2.6 * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=15)
    figure.supxlabel(NOTE.format((right[1] + wrong[1])[0]["side"]), fontsize=9)
    halves = figure.subfigures(1, 2, width_ratios=(2, 3), wspace=0.04)
    for half, columns, (heading, cells) in zip(halves, (2, 3), (right, wrong)):
        half.suptitle(heading, fontsize=12)
        axes = half.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for (first, *others), cell in zip(axes, cells):
            first.imshow(cell["picture"])
            first.set_title(f"{printable(cell['path'])}\n{cell['fold'].name}, true class: {cell['label']}", fontsize=8)
            for axis, label in zip(others, dict.fromkeys((cell["prediction"], cell["label"]))):
                heat, p = cell["heat"][label], cell["p"][classes.index(label)]
                axis.imshow(overlay(cell["picture"], heat))
                axis.set_title(f"{'predicted' if label == cell['prediction'] else 'true'}: {label}, {p:.1%}"
                               + ("" if heat.any() else "\n(the map is empty)"), fontsize=8)
    with datasets.open_atomic(file) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks
        figure.savefig(handle, format="png")


def printable(path, width=30):
    """The end of a file name, in characters that can be drawn."""
    name = "".join(c if c.isprintable() else "?" for c in path.split("/")[-1])
    return name if len(name) <= width else "…" + name[1 - width:]


def draw_classes(runs, model, init, data, labels, paths, count, device, batch_size):
    """Write results/gradcam_<model>_<init>_<CLASS>.png for each of labels, or of the chosen paths' classes."""
    classes, cells = read_run(runs / "train" / model / init)
    chosen = {cell["path"]: cell["label"] for cell in cells if cell["path"] in paths}
    unknown = [label for label in labels if label not in classes] + [path for path in paths if path not in chosen]
    if unknown:
        raise SystemExit(f"{unknown[0]}: no class ({', '.join(classes)}), no tested image (e.g. {cells[0]['path']})")
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        root = json.loads((cells[0]["fold"] / "config.json").read_bytes()).get("root", "")
        data = data or (root if os.path.isdir(root) else None)
    figures = {}
    for label in labels or sorted(set(chosen.values())):
        of_class = [cell for cell in cells if cell["label"] == label]
        for right, name in ((True, "Correctly classified"), (False, "Misclassified")):
            group = [cell for cell in of_class if (cell["prediction"] == label) == right]
            some = [cell for cell in group if cell["path"] in chosen] if paths else choose(group, count)
            kind = "chosen" if paths else "most and least confident" if len(some) < len(group) else "all"
            heading = f"{name}: {len(group)} of {len(of_class)} test cells\n{len(some)} shown ({kind})"
            figures.setdefault(label, []).append((heading, some))
    shown = [cell for halves in figures.values() for _, some in halves for cell in some]
    add_heat(shown, classes, datasets.open_dataset(data or "data/bm"), device, batch_size)
    for label, halves in figures.items():
        if not any(some for _, some in halves):
            print(f"{label}: no test cell in the finished folds, no figure")
            continue
        file = runs / "results" / f"gradcam_{model}_{init}_{label}.png"
        draw_figure(file, f"{label}   ({model}, {init})", classes, *halves)
        print(file)


# ---------------------------------------------------------------- priors and scores
def prior_ratio(prior, classes, counts):
    """π/q, float [C]: wanted class frequencies over those of training, where all classes came equally often.

    prior: 'uniform' (as trained), 'train' (as frequent as in counts, int [C]), or a CSV file of class,frequency.
    """
    if prior == "uniform":
        return np.ones(len(classes))
    given = dict(zip(classes, counts)) if prior == "train" else read_pairs(prior)
    try:
        wanted = np.array([float(given[name]) for name in classes]) * (np.array(counts) > 0)
        if not (np.isfinite(wanted).all() and wanted.min() >= 0 and wanted.any()):
            raise ValueError("not all are numbers of at least 0")
    except (KeyError, ValueError) as error:
        why = f"there is none for {error.args[0]}" if isinstance(error, KeyError) else error
        raise SystemExit(f"{prior}: has to give a class,frequency for each of {', '.join(classes)} ({why})") from None
    return wanted / wanted.sum() * np.count_nonzero(counts)


def read_pairs(file):
    """A CSV file of two columns as a dict of str."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            rows = [[cell.strip() for cell in row[:2]] for row in csv.reader(handle) if row]
            return {name: value for name, value in rows if [name.lower(), value.lower()] != ["folder", "class"]}
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or ("a row has one" if "unpack" in str(error) else error)
        raise SystemExit(f"{file}: can't be read as a CSV file of two columns ({why})") from None


def correct(p, ratio):
    """Probabilities float [N,C] for another prior: p_c π_c/q_c, renormalised."""
    p = np.maximum(p, 1e-300) * ratio
    return p / p.sum(1, keepdims=True)


def scores(folds, n_classes):
    """Means over folds [(truth [N], p [N,C]), ...]: (precision, recall, F1: float [3,C]; images [C]; accuracy).

    As in Tables 4 and 5: 0 where a class is never predicted; left out of the mean, or NaN, where it has no image.
    """
    found = np.array([precision_recall_fscore_support(truth, p.argmax(1), labels=range(n_classes), zero_division=0)
                      for truth, p in folds])
    values = np.ma.masked_array(found[:, :3], np.repeat(found[:, 3:] == 0, 3, 1)).mean(0).filled(np.nan)
    return values, found[:, 3].sum(0).astype(int), np.mean([np.mean(truth == p.argmax(1)) for truth, p in folds])


def score_tables(classes, folds, ratios, prior):
    """(Table 5, Table 4) as rows, header first, of folds [(truth, p), ...], as trained and for a prior of these ratios.

    A class without images has no row.
    """
    table4 = [["prior", "images", "precision", "recall", "f1", "accuracy"]]
    table5 = [["prior", "class", "images", "precision", "recall", "f1"]]
    for name in dict.fromkeys(("uniform", prior)):
        of_prior = [(t, p if name == "uniform" else correct(p, ratio)) for (t, p), ratio in zip(folds, ratios)]
        values, images, accuracy = scores(of_prior, len(classes))
        table5 += [[name, label, n, *row] for label, n, row in zip(classes, images, values.T) if n]
        table4.append([name, images.sum(), *np.nanmean(values, 1), accuracy])
    return table5, table4


def show_table(rows):
    """Print rows (header first) as aligned text, numbers with three decimals."""
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows) + "\n")


def show_prior(folder, prior):
    """Print Tables 4 and 5 of a run's finished folds as trained and for another prior."""
    classes, cells = read_run(folder)
    folds, ratios = [], []
    for fold in sorted({cell["fold"] for cell in cells}):
        mine = [cell for cell in cells if cell["fold"] == fold]
        truth = np.array([classes.index(cell["label"]) for cell in mine])
        folds.append((truth, np.array([cell["p"] for cell in mine])))
        ratios.append(prior_ratio(prior, classes, models.read_checkpoint(fold / "best.pt")["train_counts"]))
    for table in score_tables(classes, folds, ratios, prior):
        show_table(table)


# ---------------------------------------------------------------- new images
def load_networks(checkpoints, device):
    """[(network on the device, info), ...]; SystemExit unless all have the same classes and image size."""
    nets = [models.load_checkpoint(file) for file in tqdm(checkpoints, desc="networks", disable=None)]
    for file, (_, info) in zip(checkpoints, nets):
        for key in ("classes", "image_size"):
            if info[key] != nets[0][1][key]:
                raise SystemExit(f"{file}: another {key} than of {checkpoints[0]}; these can't be averaged")
    return [(net.to(device), info) for net, info in nets]


def trained_on(checkpoints, nets, cells, digests):
    """The paths among cells that a checkpoint was trained on, or chosen on (training and validation part of its fold).

    The split is looked for where train.py leaves it, four folders above best.pt. Images are compared by content if the
    training images still lie where config.json says, else by class folder and name.
    """
    sizes, contents, names = {(cells.root / path).stat().st_size for path in cells.paths}, set(), set()
    for checkpoint, (_, info) in zip(checkpoints, nets):
        try:
            place = pathlib.Path(checkpoint).resolve()
            root = pathlib.Path(json.loads(place.with_name("config.json").read_bytes())["root"])
            with open(place.parents[4] / "split.csv", encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
                used = [row["path"] for row in csv.DictReader(handle) if row[f"fold{info['fold']}"] != "test"]
        except (OSError, IndexError, KeyError, ValueError) as error:  # a best.pt that was moved
            print(f"{checkpoint}: what it was trained on is not known ({error}); images of that here would be scored")
            continue
        if not root.is_dir():
            print(f"{checkpoint}: what it was trained on is not in {root} any more; images of that are known by class folder and name alone")
        for path in used:
            if not (root / path).is_file():
                names.add(path)
            elif (root / path).stat().st_size in sizes:
                contents.add(hashlib.sha1((root / path).read_bytes()).digest())
    return {path for path, digest in zip(cells.paths, digests)
            if digest in contents or any(path.split("/", i)[-1] in names for i in range(path.count("/")))}


def folder_labels(paths, names):
    """(class or None, smear) of each path: by the first folder in names {folder: class}; the folders above that."""
    found = []
    for path in paths:
        folders = path.split("/")[:-1]
        at = next((i for i, folder in enumerate(folders) if folder in names), len(folders))
        found.append((names[folders[at]] if at < len(folders) else None, "/".join(folders[:at]) or "."))
    return found


def predict(nets, cells, rows, ratio, device, batch_size, maps):
    """Probabilities as trained, float [N,C], of the images rows of cells: the networks' mean.

    Unless maps is None, heatmaps of the class predicted by the prior of ratio are written there, each beside its image.
    """
    size, out = nets[0][1]["image_size"], []
    progress = tqdm(total=len(rows), desc="predicting", unit="image", disable=None)
    with progress as bar, concurrent.futures.ThreadPoolExecutor(4) as pool:
        for some in batched(rows, batch_size):
            read = list(pool.map(functools.partial(read_cell, cells, size), some))
            batches = [(net, batch_for(info, read, device)) for net, info in nets]
            with torch.inference_mode():
                p = np.mean([net(images).double().softmax(1).cpu().numpy() for net, images in batches], 0)
            out.append(p)
            if maps is not None:
                labels = correct(p, ratio).argmax(1)
                heats = np.mean([heatmaps(net, images, labels) for net, images in batches], 0)
                for index, (_, picture), heat in zip(some, read, heats):
                    with datasets.open_atomic(maps / f"{cells.paths[index]}.png") as handle:
                        image.imsave(handle, np.hstack([picture, overlay(picture, heat)]), format="png", pil_kwargs={"compress_level": 1})
            bar.update(len(some))
    return np.concatenate(out)


def differential(smears, predicted, classes):
    """Rows smear, class, cells, percent, low, high, of; low and high: Wilson's 95% interval of the percentage."""
    rows = [["smear", "class", "cells", "percent", "low", "high", "of"]]
    counts = collections.Counter(zip(smears, predicted))
    for smear, n in sorted(collections.Counter(smears).items()):
        for label in classes:
            share, interval = counts[smear, label] / n, binomtest(counts[smear, label], n).proportion_ci(method="wilson")
            rows.append([smear, label, counts[smear, label], *(f"{100 * value:.2f}" for value in (share, *interval)), n])
    return rows


def write_csv(file, rows):
    """Write rows, header first, as a CSV file, whole or not at all."""
    with datasets.open_atomic(file, "w") as handle:
        csv.writer(handle).writerows(rows)


@rc_context({"text.parse_math": False})
def write_scores(out, classes, truth, p, ratio, prior):
    """Write and print table5.csv and table4.csv; confusion.csv (rows: truth) and .png for the prior."""
    table5, table4 = score_tables(classes, [(truth, p)], [ratio], prior)
    for name, table in (("table5", table5), ("table4", table4)):
        show_table(table)
        write_csv(out / f"{name}.csv", table)
    counts = confusion_matrix(truth, correct(p, ratio).argmax(1), labels=range(len(classes)))
    rows = ([label, *row] for label, row in zip(classes, counts))
    write_csv(out / "confusion.csv", [["true class", *classes], *rows])
    figure = Figure(figsize=(3 + 0.42 * len(classes), 2.5 + 0.42 * len(classes)), dpi=110, layout="constrained")
    axis, share = figure.subplots(), counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), [f"{label} ({n})" for label, n in zip(classes, counts.sum(1))])
    axis.set(xlabel="predicted class", ylabel="true class (images)", title="Share of each true class, %")
    for (row, column), value in np.ndenumerate(np.round(100 * share).astype(int)):
        if value:
            colour = "white" if value > 55 else "black"
            axis.text(column, row, value, ha="center", va="center", fontsize=8, color=colour)
    with datasets.open_atomic(out / "confusion.png") as handle:
        figure.savefig(handle, format="png")


def judge_images(checkpoints, folder, out, mapping, prior, device, batch_size, maps):
    """Predictions, heatmaps (if maps is true), differential and scores of all images below folder, written to out."""
    if folder.resolve() == out.resolve():
        raise SystemExit(f"{out}: the images' own folder; name another one with --out")
    ours = f"{os.path.relpath(out.resolve(), folder.resolve())}/"  # pictures of an earlier call
    paths = [path for path in datasets.find_images(folder) if not path.startswith(ours)] if folder.is_dir() else []
    if not paths:
        raise SystemExit(f"{folder}: no image found there ({', '.join(datasets.IMAGE_TYPES)})")
    nets = load_networks(checkpoints, device)
    classes = nets[0][1]["classes"]
    ratio = prior_ratio(prior, classes, np.sum([info["train_counts"] for _, info in nets], 0))
    names = read_pairs(mapping) if mapping else {}
    if set(names.values()) - {*classes, ""}:
        raise SystemExit(f"{mapping}: {min(set(names.values()) - {*classes, ''})} is no class of {', '.join(classes)}")
    cells = datasets.Cells(folder, folder.name, classes, paths, np.zeros(len(paths)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = pool.map(functools.partial(datasets.inspect, cells), range(len(cells)))
        checked = list(tqdm(jobs, total=len(cells), desc="checking", unit="image", disable=None))
    left_out = [(path, f"unreadable: {why}") for path, (why, *_) in zip(paths, checked) if why]
    rows = [i for i, (why, *_) in enumerate(checked) if not why]
    if not rows:
        raise SystemExit(f"{folder}: none of {len(paths)} images can be read, e.g. {': '.join(left_out[0])}")
    p = predict(nets, cells, rows, ratio, device, batch_size, out / "heatmaps" if maps else None)
    final, cells = correct(p, ratio), cells.subset(rows)
    predicted = [classes[i] for i in final.argmax(1)]
    labels, smears = zip(*folder_labels(cells.paths, {label: label for label in classes} | names))
    write_csv(out / "differential.csv", differential(smears, predicted, classes))
    known = np.array([label in classes for label in labels])
    seen = trained_on(checkpoints, nets, cells, [checked[i][1] for i in rows])
    unreadable = len(left_out)
    left_out += [(path, "not scored, though counted: a checkpoint was trained or chosen on it") for path in sorted(seen)]
    scored = known & ~np.isin(cells.paths, list(seen))
    for path, why in left_out[:10]:
        print(f"{path}: {why}")
    write_csv(out / "left_out.csv", [("path", "why"), *left_out])
    if scored.any():
        truth = np.array([classes.index(label) for label, score in zip(labels, scored) if score])
        write_scores(out, classes, truth, p[scored], ratio, prior)
    else:
        print("no scores: " + ("the checkpoint was trained on all these images" if known.any() else
                               f"no folder is named as a class ({', '.join(classes)}); see --map"))
    header = ["path", "prediction", "confidence", *(f"p_{label}" for label in classes)]
    write_csv(out / "predictions.csv", [header, *([path, label, *(f"{v:.7g}" for v in (row.max(), *row))]
                                                  for path, label, row in zip(cells.paths, predicted, final))])
    print(f"{out}/predictions.csv: {len(cells)} images (prior: {prior}), {len(seen)} of which a checkpoint was trained or chosen on; "
          f"{unreadable} unreadable; see left_out.csv")


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of a run, with --init")
    parser.add_argument("--init")
    parser.add_argument("--classes", nargs="+", default=[], help="one figure each")
    parser.add_argument("--paths", nargs="+", default=[], help="test images to show in the figures")
    parser.add_argument("--count", type=int, default=6, help="cells a figure shows of right and of wrong ones")
    parser.add_argument("--runs", default="runs", type=pathlib.Path)
    parser.add_argument("--data", help="the run's data set (default: where it was, else data/bm)")
    parser.add_argument("--checkpoint", nargs="+", help="best.pt of one or more networks, which are averaged")
    parser.add_argument("--images", type=pathlib.Path, help="folder of new images")
    parser.add_argument("--out", type=pathlib.Path, help="folder for what is found out about them")
    parser.add_argument("--map", help="CSV: name of their folder, class of ours")
    parser.add_argument("--prior", help="uniform (as trained), train (as frequent as there) or a CSV: class, frequency")
    parser.add_argument("--no-heatmaps", action="store_true", help="predictions alone, for new images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
    if device != "cpu" and not (cuda and int(cuda[1] or 0) < torch.cuda.device_count()):
        parser.error(f"--device {args.device}: no such device here; use cpu")
    if args.batch_size < 1 or args.count < 1:
        parser.error("--batch-size and --count have to be at least 1")
    try:
        if args.checkpoint and args.images and args.out and not args.model:
            judge_images(args.checkpoint, args.images, args.out, args.map, args.prior or "uniform", device,
                         args.batch_size, not args.no_heatmaps)
        elif args.model and args.init and (args.classes or args.paths or args.prior) and not args.checkpoint:
            if args.classes or args.paths:
                draw_classes(args.runs, args.model, args.init, args.data, args.classes, args.paths, args.count, device,
                             args.batch_size)
            if args.prior:
                show_prior(args.runs / "train" / args.model / args.init, args.prior)
        else:
            parser.error("give --model, --init and --classes, --paths or --prior; or --checkpoint, --images and --out")
    except OSError as error:
        raise SystemExit(f"{error.filename or args.out or args.runs}: {error.strerror or error}; see to it, or name another") from None


if __name__ == "__main__":
    main()
