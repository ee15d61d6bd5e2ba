"""Predictions and heatmaps for new images, and a study's own test images again as the mean of eight views.

    python predict.py --checkpoint runs/train/vit_l_32/cd/fold*/best.pt --images FOLDER --out FOLDER
    python predict.py --runs runs --model vit_l_32 --init cd --tta    # predictions_tta.csv of finished folds

An image shows one cell, cut out as the training images were. Several networks are averaged. --out gets
predictions.csv, heatmaps/, left_out.csv (images not read or not scored), differential.csv (counts in each
folder with Wilson's 95% intervals of sampling) and, where folders are named as the classes or by --map, the
tables of evaluate.py, without images of the folds' training and validation parts (not of pre-training).
"""

import argparse
import collections
import concurrent.futures
import csv
import functools
import hashlib
import itertools
import os
import pathlib

import numpy as np
import pandas as pd
import torch
from matplotlib import image
from tqdm import tqdm

import datasets
import evaluate
import gradcam
import layouts
import models


# ---------------------------------------------------------------- priors and scores
def read_pairs(file):
    """A CSV file of two columns, of which a header folder,class is left out, as a dict of str."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            pairs = dict([cell.strip() for cell in row[:2]] for row in csv.reader(handle) if row)
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{file}: no CSV file of two columns ({error})") from None
    return {name: value for name, value in pairs.items() if (name, value) != ("folder", "class")}


def prior_ratio(prior, classes, counts):
    """pi/q, float [C]: wanted class frequencies over those of training, where all classes came equally often.

    prior: 'uniform' (as trained), 'train' (as in counts, int [C]) or a CSV of class,frequency.
    """
    if prior == "uniform":
        return np.ones(len(classes))
    given = dict(zip(classes, counts)) if prior == "train" else read_pairs(prior)
    try:
        wanted = np.array([float(given[name]) for name in classes]) * (np.array(counts) > 0)
        if not (wanted.min() >= 0 and 0 < wanted.sum() < np.inf):
            raise ValueError("numbers of at least 0")
    except (KeyError, ValueError) as error:
        needed = f"class,frequency for each of {', '.join(classes)}"
        raise SystemExit(f"{prior}: needs {needed} ({error})") from None
    return wanted / wanted.sum() * np.count_nonzero(counts)


def correct(p, ratio):
    """Probabilities float [N,C] for another prior: p_c pi_c/q_c, renormalised (Saerens et al. 2002)."""
    p = np.maximum(p, 1e-300) * ratio
    return p / p.sum(1, keepdims=True)


def write_scores(out, model, classes, labels, p, ratio, prior):
    """Print the scores of labels int [N] and p [N,C], as trained and for the prior; its tables to out."""
    runs = {}
    for name, probabilities in {"uniform": p, prior: correct(p, ratio)}.items():
        confusion = evaluate.count_confusion(labels, probabilities.argmax(1), len(classes))
        fold = evaluate.Fold(confusion, evaluate.confusion_scores(confusion), np.nan)
        runs[model, f"prior_{pathlib.Path(name).stem}"] = {0: fold}
    study = evaluate.Study(classes, confusion.sum(1), runs, [], [])
    print(evaluate.table_text(evaluate.table4_rows(study)))
    evaluate.write_tables(study._replace(runs=dict([runs.popitem()])), out)


# ---------------------------------------------------------------- new images
def find_images(images, out):
    """(folder, paths of images below it, of files not read, {path: fields} of a pattern or a table).

    A picture is a folder of one.
    """
    if images.is_file() and images.name.lower().endswith(datasets.IMAGE_TYPES):
        return images.parent, [images.name], [], {}
    if not images.is_dir():
        root, rows, notes = layouts.read_rows(str(images))
        for note in notes:
            print(note)
        return pathlib.Path(root), sorted(rows), [], rows
    ours = f"{os.path.relpath(out.resolve(), images.resolve())}/"  # pictures of an earlier call
    if ours == "./":
        raise SystemExit(f"{images}: the images' own folder; name another --out")
    paths, unread = datasets.find_images(images)
    paths = [path for path in paths if not path.startswith(ours)]
    if not paths:
        raise SystemExit(f"{images}: no image found there ({', '.join(datasets.IMAGE_TYPES)})")
    return images, paths, [path for path in unread if not path.startswith(ours)], {}


def trained_on(checkpoints, infos, cells, digests):
    """The set of paths in cells that a checkpoint was trained or chosen on (its fold's train and val part).

    They are known by content if the training images still lie where config.json says, else by their names.
    """
    sizes, contents, names = {(cells.root / path).stat().st_size for path in cells.paths}, set(), set()
    for checkpoint, info in zip(checkpoints, infos):
        fold = pathlib.Path(checkpoint).resolve().parent
        try:
            root = pathlib.Path(datasets.read_json(fold / "config.json")["root"])
            split = evaluate.read_split(fold.parents[3] / "split.csv")
            used = split.index[split[f"fold{info['fold']}"] != "test"]
        except (OSError, LookupError, TypeError, ValueError, SystemExit) as error:  # a best.pt that was moved
            print(f"{checkpoint}: what it was trained on is not known ({error}); some may be scored")
            continue
        if not root.is_dir():
            print(f"{checkpoint}: its images are not in {root}; they are known by folder and name alone")
        for path in used:
            if not (root / path).is_file():
                names.add(path)
            elif (root / path).stat().st_size in sizes:
                contents.add(hashlib.sha1((root / path).read_bytes()).digest())
    seen = set()
    for path, digest in zip(cells.paths, digests):
        ends = {path.split("/", i)[-1] for i in range(path.count("/"))}
        if digest in contents or ends & names:
            seen.add(path)
    return seen


def folder_fields(path, names):
    """Fields of a path as a table would give them: the first folder in names, and the folders above that."""
    folders = path.split("/")[:-1]
    level = next((i for i, folder in enumerate(folders) if folder in names), len(folders))
    return {"class": "".join(folders[level : level + 1]), "group": "/".join(folders[:level])}


def heatmap_file(folder, path):
    """folder/<path>.png; a name that would be too long for a file system is cut and gets a digest."""
    above, name = os.path.split(path)
    if len(os.fsencode(name)) > 200:
        name = f"{name[:40]}-{hashlib.sha1(os.fsencode(name)).hexdigest()}"
    return folder / above / f"{name}.png"


def predict_batch(net, batch, tta):
    """Probabilities, float64 [N,C], of normalised images [N,3,S,S]; tta: the mean of flips and quarter turns.

    Of a cell no side is up, so that the eight views of the dihedral group show the same cell.
    """
    views = [torch.rot90(batch, turns, (2, 3)) for turns in range(4 if tta else 1)]
    if tta:
        views += [view.flip(3) for view in views]
    with torch.inference_mode():
        return torch.stack([net(view).double().softmax(1) for view in views]).mean(0).cpu().numpy()


def predict_images(nets, infos, cells, device, tta=False, maps=None, ratio=1):
    """The networks' mean probabilities as trained, float [N,C], of cells.

    Unless maps is None, heatmaps of the class predicted by the prior of ratio are written there as pictures.
    """
    read_cell, means = functools.partial(gradcam.read_cell, cells, infos[0]["image_size"]), []
    starts = range(0, len(cells), gradcam.BATCH_SIZE)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for start in tqdm(starts, "predicting", unit="batch", disable=None):
            paths = cells.paths[start : start + gradcam.BATCH_SIZE]
            images = list(pool.map(read_cell, range(start, start + len(paths))))
            batches = [gradcam.batch_for(info, images, device) for info in infos]
            p = [predict_batch(net, batch, tta) for net, batch in zip(nets, batches)]
            means.append(np.mean(p, 0))
            if maps is None:
                continue
            labels = correct(means[-1], ratio).argmax(1)
            heat = np.mean([gradcam.heatmaps(*both, labels) for both in zip(nets, batches)], 0)
            for path, (_, picture), heatmap in zip(paths, images, heat):
                both = np.hstack([picture, gradcam.overlay(picture, heatmap)])
                with datasets.open_atomic(heatmap_file(maps, path)) as handle:
                    image.imsave(handle, both, format="png", pil_kwargs={"compress_level": 1})
    return np.concatenate(means)


def differential(smears, predicted, classes):
    """DataFrame smear, class, cells, percent, low, high, of; low, high: Wilson's 95% interval of percent."""
    table = pd.crosstab(pd.Series(smears, name="smear"), pd.Series(predicted, name="class"))
    table = table.reindex(columns=classes, fill_value=0).stack().rename("cells").reset_index()
    of = table.groupby("smear").cells.transform("sum")
    for name, share in zip(("percent", "low", "high"), (table.cells / of, *evaluate.wilson(table.cells, of))):
        table[name] = np.char.mod("%.2f", 100 * share)
    return table.assign(of=of)


def load_networks(checkpoints):
    """Networks and their infos (dicts) of checkpoints that can be averaged; SystemExit if they can't."""
    nets, infos = zip(*(models.load_checkpoint(file) for file in tqdm(checkpoints, "networks", disable=None)))
    if len({(*info["classes"], info["image_size"]) for info in infos}) > 1:
        raise SystemExit(f"{', '.join(checkpoints)}: of different classes or image sizes, can't be averaged")
    return nets, infos


def read_cells(folder, paths, unread):
    """Cells of the images that can be read, their SHA-1 digests, rows (path, why) of the others."""
    cells = datasets.Cells(folder, folder.name, [], paths, np.zeros(len(paths)))
    whys, digests, _, _, notes = zip(*datasets.inspect_all(cells))
    for note, number in collections.Counter(itertools.chain(*notes)).items():
        print(f"{number} images {note}")
    left_out = [(path, "a type of file that is not read") for path in unread]
    left_out += [(path, f"unreadable: {why}") for path, why in zip(paths, whys) if why]
    if all(whys):
        raise SystemExit(f"{folder}: none of {len(paths)} images can be read, e.g. {': '.join(left_out[-1])}")
    return cells.subset([not why for why in whys]), list(filter(None, digests)), left_out


def write_predictions(file, columns, p, classes):
    """A CSV file of columns {name: values [N]} and the probabilities [N,C] in seven digits."""
    text = pd.DataFrame(np.char.mod("%.7g", p), columns=[f"p_{label}" for label in classes])
    evaluate.write_csv(file, pd.concat([pd.DataFrame(columns), text], axis=1))


def predict_folder(checkpoints, images, out, mapping, prior, device, maps, tta):
    """Predictions, heatmaps (if maps is true), differential counts and scores of images (Path), into out."""
    *in_folder, rows = find_images(images, out)
    nets, infos = load_networks(checkpoints)
    classes = infos[0]["classes"]
    ratio = prior_ratio(prior, classes, np.sum([info["train_counts"] for info in infos], 0))
    names = dict(zip(classes, classes)) | (read_pairs(mapping) if mapping else {})
    strange = set(names.values()) - {*classes, ""}
    if strange:
        raise SystemExit(f"{mapping}: {min(strange)} is no class of {', '.join(classes)}")
    cells, digests, left_out = read_cells(*in_folder)
    out.mkdir(parents=True, exist_ok=True)
    nets = [net.to(device) for net in nets]
    p = predict_images(nets, infos, cells, device, tta, out / "heatmaps" if maps else None, ratio)
    seen = trained_on(checkpoints, infos, cells, digests)
    left_out += [(path, "not scored: a checkpoint was trained or chosen on it") for path in sorted(seen)]
    evaluate.write_csv(out / "left_out.csv", pd.DataFrame(left_out, columns=["path", "why"]))
    final = correct(p, ratio)
    predicted = np.array(classes, object)[final.argmax(1)]
    columns = {"path": cells.paths, "prediction": predicted, "confidence": np.char.mod("%.7g", final.max(1))}
    write_predictions(out / "predictions.csv", columns, final, classes)
    fields = [rows[path] if rows else folder_fields(path, names) for path in cells.paths]
    smears = [field.get("group") or "." for field in fields]
    evaluate.write_csv(out / "differential.csv", differential(smears, predicted, classes))
    for path, why in left_out[:10]:
        print(f"{path}: {why}")
    labels = [names.get(field.get("class"), "") for field in fields]
    scored = [i for i, label in enumerate(labels) if label and cells.paths[i] not in seen]
    if scored:
        truth = np.array([classes.index(labels[i]) for i in scored])
        write_scores(out, infos[0]["model"], classes, truth, p[scored], ratio, prior)
    elif any(labels):
        print("no scores: a checkpoint was trained on all images of known class")
    else:
        print(f"no scores: no folder is named as a class ({', '.join(classes)}; see --map)")
    counts = collections.Counter(predicted).most_common()
    print(f"predicted: {', '.join(f'{number} {label}' for label, number in counts)}")
    print(f"{out}: {len(cells)} images (prior: {prior}); {len(left_out)} lines in left_out.csv")


def predict_run(folder, data, device):
    """Write predictions_tta.csv of a run's finished folds: their own test images, networks as they are."""
    _, tested = gradcam.read_run(folder)
    data = gradcam.open_images(data, tested[0]["fold"], [cell["path"] for cell in tested])
    place = {path: i for i, path in enumerate(data.paths)}
    for fold, cells in pd.DataFrame(tested).groupby("fold"):
        net, info = models.load_checkpoint(fold / "best.pt")
        classes = np.array(info["classes"], object)
        images = data.subset(cells.path.map(place).to_numpy())
        p = predict_images([net.to(device)], [info], images, device, tta=True)
        columns = {"path": images.paths, "label": list(cells.label), "prediction": classes[p.argmax(1)]}
        write_predictions(fold / "predictions_tta.csv", columns, p, classes)
        print(fold / "predictions_tta.csv")


def main():
    evaluate.prepare_terminal()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", help="best.pt of one or more networks, which are averaged")
    parser.add_argument("--images", type=pathlib.Path, help="folder of new images, or one image")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    parser.add_argument("--map", help="CSV: name of an images' folder, class of ours")
    parser.add_argument("--prior", default="uniform", help="uniform (as trained), train or a CSV")
    parser.add_argument("--tta", action="store_true", help="mean of the eight flips and quarter turns")
    parser.add_argument("--no-heatmaps", action="store_true")
    parser.add_argument("--model", help="with --init and --tta: the finished folds of a run")
    parser.add_argument("--init")
    parser.add_argument("--runs", default="runs", type=pathlib.Path)
    parser.add_argument("--data", help="its images; default: where the run found them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args()
    device = gradcam.find_device(parser, args.device)
    try:
        if args.checkpoint and args.images and args.out and not args.model:
            options = args.map, args.prior, device, not args.no_heatmaps, args.tta
            predict_folder(args.checkpoint, args.images, args.out, *options)
        elif args.model and args.init and args.tta and not args.checkpoint:
            predict_run(args.runs / "train" / args.model / args.init, args.data, device)
        else:
            parser.error("give --checkpoint, --images and --out; or --model, --init and --tta")
    except OSError as error:
        place = error.filename or args.out or args.runs
        raise SystemExit(f"{place}: {error.strerror or error}; check it, or name another") from None


if __name__ == "__main__":
    main()
