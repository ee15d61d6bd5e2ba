"""Tables 4 and 5, Fig. 4 and tests between strategies, out of the predictions that finished runs left.

    python evaluate.py                              every finished run in runs/, however far the study has come
    python evaluate.py --compare paper/table4.csv   the same, with the published numbers (or another table4.csv) beside

Reads runs/train/<model>/<init>/fold<k>/predictions.csv and, if they are there, runs/split.csv and folds' config.json.
Writes runs/results/table4.*, table5_<model>_<init>.*, confusion_<model>_<init>.* and comparisons.csv.
A file that can't be right is named on stderr and left out; the tables are made of the rest, and the exit status is 1.
"""
import argparse
import contextlib
import csv
import io
import json
import os
import re
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import special

# Tables 4 and 5: their order, and their names for what CSVs and folders call by the key
MODELS = {"vgg19_bn": "VGG-19 BN", "resnet152": "ResNet-152", "regnet_y_32gf": "Regnet_y_32gf", "vit_l_32": "ViT_l_32",
          "resnext50_32x4d": "ResNeXt-50"}
INITS = {"random": "Random", "imagenet": "ImageNet", "pcam": "PCam", "cd": "CD", "imagenet+pcam": "ImageNet + PCam",
         "imagenet+cd": "ImageNet + CD"}
CLASSES = {"NGB": "Band neutrophils", "NGS": "Segmented neutrophils", "LYT": "Lymphocytes", "MON": "Monocytes",
           "EOS": "Eosinophils", "BAS": "Basophils", "MMZ": "Metamyelocytes", "MYB": "Myelocytes",
           "PMO": "Promyelocytes", "BLA": "Blasts", "PLM": "Plasma cells", "KSC": "Smudge cells", "OTH": "Other cells",
           "ART": "Artefacts", "NIF": "Not identifiable", "PEB": "Proerythroblasts", "EBO": "Erythroblasts",
           "HAC": "Hairy cells", "ABE": "Abnormal eosinophils", "LYI": "Immature lymphocytes", "FGC": "Faggot cells"}
SCORES = {"precision": "Precision", "recall": "Recall", "f1": "F1 score"}
COMMON = 100                    # images from which on a class counts for f1_common
LEVEL = 0.05                    # of the tests; intervals cover 1 - LEVEL
TEST_TO_TRAIN = 0.20 / 0.64     # test images to images fitted on in the paper's split, for runs that don't tell
# what config.json says of a training: must rows have it in common, too, or the folds of one row alone?
SETTINGS = {"data": True, "epochs": True, "batch_size": True, "image_size": True, "stop_lr": True, "amp": True, "lr": False, "seed": False}
Predictions = namedtuple("Predictions", "paths labels predictions probabilities classes")
Fold = namedtuple("Fold", "ids labels predictions confusion train_images")
Study = namedtuple("Study", "classes images runs problems notes")


# ---------------------------------------------------------------- files
def in_order(names, known):
    """The names that `known` holds, in its order, then the others alphabetically."""
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def class_order(names):
    """Table 5's order if all names are bone marrow classes, else alphabetical."""
    return in_order(names, CLASSES) if set(names) <= set(CLASSES) else sorted(names)


def write_file(file, content):
    """Write text or bytes so that the file appears whole or not at all; SystemExit with one line where that fails."""
    beside = Path(f"{file}.tmp{os.getpid()}")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as stream:
            stream.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise SystemExit(f"{file} can't be written: {error.strerror}; see to its folder and start again") from None


def write_csv(file, rows):
    """Rows: dicts of the same keys, or sequences with the header first. NaN and None become empty cells."""
    rows = [list(rows[0]), *(row.values() for row in rows)] if isinstance(rows[0], dict) else rows
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["" if cell is None or cell != cell else f"{cell:.6g}" if isinstance(cell, float)
                                 else cell for cell in row] for row in rows])
    write_file(file, text.getvalue())


@contextlib.contextmanager
def naming(file):
    """Whatever is wrong with a file becomes a ValueError of one line that names it."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{printable(str(file))}: {getattr(error, 'strerror', None) or error}") from None


def require(fine, reason):
    """ValueError(reason) unless fine."""
    if not fine:
        raise ValueError(reason)


def find_runs(runs):
    """Finished runs as {(model, init): {fold: Path of predictions.csv}}, in the paper's order; {} if there is none."""
    found = {}
    for file in Path(runs, "train").glob("*/*/fold*/predictions.csv"):
        if re.fullmatch(r"fold(0|[1-9][0-9]*)", file.parent.name):
            found.setdefault(file.parts[-4:-2], {})[int(file.parent.name[4:])] = file
    models, inits = (in_order({run[i] for run in found}, known) for i, known in enumerate((MODELS, INITS)))
    return {(model, init): dict(sorted(found[model, init].items()))
            for model in models for init in inits if (model, init) in found}


def read_predictions(file, probabilities=True):
    """Predictions(paths list, labels int64 [N], predictions int64 [N], probabilities float64 [N,C], classes list).

    Classes and columns are in class_order, whatever the header's order. Without `probabilities` they are None and not
    parsed (unless there is a NaN or a minus), which takes a fifth of the time. ValueError for a file that can't be
    right: one line, with its name and the reason.
    """
    with naming(file):
        data = Path(file).read_bytes()
        text = data.decode("utf-8", "surrogateescape")
        require(text[:99].strip("\0\r\n "), "is empty")
        require(text[-1] == "\n", "ends in the middle of a row")
        lowered = data.lower()
        parsed = probabilities or any(start in lowered for start in (b",nan", b",inf", b",-"))
        if parsed or '"' in text:
            header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
            even = {len(row) for row in rows} <= {len(header)}
        else:           # nothing is quoted, so a line is a row; to look no further than its third comma saves the time
            header = text[:text.index("\n")].rstrip("\r").split(",")
            rows = re.findall(r"([^,\n]*),([^,\n]*),([^,\n]*),.*\n", text)[1:]
            even = (text.count("\n"), text.count(",")) == (len(rows) + 1, (len(rows) + 1) * (len(header) - 1))
        names = [column[2:] for column in header[3:]]
        require(names and header == ["path", "label", "prediction", *("p_" + name for name in names)],
                "the header is not path,label,prediction,p_<CLASS>...")
        require(len(set(names)) == len(names), "the header names a class twice")
        require(even, f"has rows of other than {len(header)} fields")
        require(rows, "holds no row")
        classes = class_order(names)
        number = {name: i for i, name in enumerate(classes)}
        paths, *columns = ([row[i] for row in rows] for i in range(3))
        unknown = set().union(*columns).difference(classes)
        require(not unknown, f"{min(unknown, default='')!r} is none of the header's classes")
        require(len(set(paths)) == len(paths), f"{Counter(paths).most_common(1)[0][0]!r} stands there more than once")
        labels, predictions = (np.array([number[name] for name in column]) for column in columns)
        if not parsed:
            return Predictions(paths, labels, predictions, None, classes)
        table = np.array([row[3:] for row in rows], float)[:, [names.index(name) for name in classes]]
        chosen = table[np.arange(len(rows)), predictions]
        for fine, reason in ((((table >= 0) & (table <= 1.001)).all(1), "are not all between 0 and 1"),
                             (abs(table.sum(1) - 1) < 0.001, "don't add up to 1"),
                             (chosen > table.max(1) - 1e-5, "are not highest for the prediction")):
            require(fine.all(), f"the probabilities of {paths[fine.argmin()]!r} {reason}")
        return Predictions(paths, labels, predictions, table if probabilities else None, classes)


def read_split(file):
    """Paths, labels (lists), parts (str [N, folds]) of a split.csv; [], [], None without one; ValueError."""
    if not Path(file).exists():
        return [], [], None
    with naming(file), open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header, *rows = list(filter(None, csv.reader(stream, strict=True))) or [[]]
        require(header[2:] and header == ["path", "label", *(f"fold{k}" for k in range(len(header) - 2))] and
                {len(row) for row in rows} == {len(header)}, "is no table of path,label,fold0,fold1,...")
        paths, labels, *parts = zip(*rows)
        require(len(set(paths)) == len(paths), "names an image twice")
        return list(paths), list(labels), np.array(parts).T


def read_study(runs):
    """Study of all finished runs, without the files that can't be right; ValueError if split.csv is such a file.

    classes list[str]; images int64 [C] of the data set (of split.csv; without it, those tested so far); runs {(model,
    init): {fold: Fold}}; problems and notes, lists of one-line texts. Fold: ids (an image's is the same in every run),
    labels, predictions int64 [N]; confusion int64 [C,C], rows are labels; train_images float, NaN if nothing tells it.
    """
    problems, read, good = [], {}, {}
    paths, names, parts = read_split(Path(runs, "split.csv"))
    index = {path: i for i, path in enumerate(paths)}
    for run, folds in find_runs(runs).items():
        for fold, file in folds.items():
            try:
                one = read_predictions(file, probabilities=False)
                ids = np.array([index.setdefault(path, len(index)) for path in one.paths])
                read[run, fold, file] = Fold(ids, one.labels, one.predictions, None, None), one.classes
            except ValueError as error:
                problems.append(str(error))
    sets = Counter(tuple(classes) for _, classes in read.values())
    classes = list(max(sets, key=sets.get, default=()))     # those of most files: the others are the odd ones
    truth = np.full(len(index), -1)                         # -1: no file has told yet
    truth[:len(names)] = [classes.index(name) if name in classes else -2 for name in names]
    paths, tested, unread, settings = list(index), np.zeros(len(index), bool), set(), {}
    for (run, fold, file), (one, own) in read.items():
        try:
            with naming(file):
                require(own == classes, f"its {len(own)} classes are not the {len(classes)} of most runs")
                config = read_config(file)
                train = check_fold(fold, one, truth, parts, good.get(run, {}), paths, config)
        except ValueError as error:
            problems.append(str(error))
            continue
        truth[one.ids] = one.labels
        tested[one.ids] = True
        with contextlib.suppress(TypeError, ValueError):    # a damaged list tells nothing
            unread.update(index[path] for path, _ in config.get("left_out") or () if path in index)
        for key in set(SETTINGS) & set(config):
            settings.setdefault(key, {}).setdefault(run, set()).add(str(config[key]))
        counts = np.bincount(one.labels * len(classes) + one.predictions, minlength=len(classes) ** 2)
        good.setdefault(run, {})[fold] = one._replace(confusion=counts.reshape(len(classes), -1), train_images=train)
    absent = {(k, i) for folds in good.values() for k, one in folds.items()
              for i in np.flatnonzero(one.confusion.sum(1) == 0)}
    notes = [f"Fold {k} has no test image of {printable(classes[i])}: left out of that class's mean."
             for k, i in sorted(absent)]
    truth[[i for i in unread if not tested[i]]] = -1
    return Study(classes, np.bincount(truth[truth >= 0], minlength=len(classes)), good, problems, notes + differences(settings))


def read_config(file):
    """config.json beside a predictions.csv as a dict; {} without one that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.with_name("config.json").read_text(encoding="utf-8")))
    return {}


def differences(settings):
    """Sentences on what folds of one row, or rows, were not trained alike in; settings {key: {run: set of its folds' values}}."""
    notes = []
    for key, runs in sorted(settings.items()):
        shown = (lambda values: "") if key == "data" else (lambda values: f" ({', '.join(sorted(values))})")
        notes += [f"{' '.join(paper_names(*run))}: its folds differ in {key}{shown(values)}, so they are no repetitions of one experiment."
                  for run, values in runs.items() if len(values) > 1]
        every = set().union(*runs.values())
        if SETTINGS[key] and len(every) > max(map(len, runs.values())):
            notes.append(f"The rows differ in {key}{shown(every)}: what tells them apart may be that.")
    return notes


def check_fold(fold, one, truth, parts, others, paths, config):
    """Images the network was fitted on (float); ValueError if its test images contradict the split or other runs.

    truth int64 [images], -1 unknown; parts of the split, or None; others: Folds of the same run; paths: of all images.
    """
    other = one.ids[(truth[one.ids] != one.labels) & (truth[one.ids] != -1)]
    require(not len(other), f"{len(other)} images have another label elsewhere, as {[paths[i] for i in other[:1]]}")
    if parts is None:
        expected, train = len(one.ids), config.get("train_images") or np.nan
        strange = [i for tested in others.values() for i in np.intersect1d(one.ids, tested.ids)]
    else:
        require(fold < parts.shape[1], f"split.csv has no fold{fold}")
        expected, train = ((parts[:, fold] == part).sum() for part in ("test", "train"))
        train = config["train_images"] if isinstance(config.get("train_images"), int) else train    # some can't be read
        strange = np.setdiff1d(one.ids, np.flatnonzero(parts[:, fold] == "test"))
    require(not len(strange), f"{len(strange)} images are of no or another fold, as {[paths[i] for i in strange[:1]]}")
    expected = config.get("test_images", expected)          # less than the split's where images can't be read
    require(len(one.ids) == expected, f"has {len(one.ids)} rows for {expected} test images")
    return float(train)


# ---------------------------------------------------------------- scores
def confusion_scores(confusion):
    """Precision, recall, F1 [3,C] of a confusion matrix [C,C] whose rows are labels; NaN for a class without images."""
    images, predicted = confusion.sum(1), confusion.sum(0)
    scores = [np.diag(confusion) / np.maximum(total, 1) for total in (predicted, images, (images + predicted) / 2)]
    return np.where(images > 0, scores, np.nan)


def per_class_scores(labels, predictions, n_classes):
    """Precision, recall, F1, each float64 [C]: 0 for a class never predicted, NaN for one without images in labels."""
    counts = np.bincount(np.asarray(labels) * n_classes + predictions, minlength=n_classes ** 2)
    return tuple(confusion_scores(counts.reshape(n_classes, n_classes)))


def fold_scores(folds):
    """float64 [F,3,C] of {fold: Fold}: precision, recall, F1 of each class on each fold's test images."""
    return np.array([confusion_scores(one.confusion) for one in folds.values()])


def moments(values):
    """Mean and sample standard deviation (ddof=1) over axis 0 without NaNs; NaN where none or fewer than two remain."""
    values = np.asarray(values, float)
    count = (~np.isnan(values)).sum(0)
    mean = np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)
    std = np.sqrt(np.nansum((values - mean) ** 2, 0) / np.maximum(count - 1, 1))
    return mean[()], np.where(count > 1, std, np.nan)[()]


def macro_f1(folds):
    """float64 [F]: mean F1 over the classes that each fold's test set holds."""
    return moments(fold_scores(folds)[:, 2].T)[0]


def table4_rows(study):
    """One dict a run, keys as in table4.csv, NaN for an empty cell.

    As in the paper, means over classes of Table 5's means and of its stds; the std of the macro F1 is f1_fold_std.
    """
    rows = []
    for (model, init), folds in study.runs.items():
        mean, std = moments(fold_scores(folds))
        accuracy = moments([np.trace(one.confusion) / one.confusion.sum() for one in folds.values()])
        row = {"model": model, "init": init, "folds": len(folds)}
        for i, score in enumerate(SCORES):
            row |= {f"{score}_mean": moments(mean[i])[0], f"{score}_std": moments(std[i])[0]}
        rows.append(row | {"accuracy_mean": accuracy[0], "accuracy_std": accuracy[1],
                           "f1_fold_std": moments(macro_f1(folds))[1],
                           "f1_common": moments(mean[2, study.images >= COMMON])[0]})
    return rows


def table5_rows(study, model, init):
    """One dict a class, keys as in table5_<model>_<init>.csv, NaN for an empty cell.

    recall_low, recall_high: Wilson's interval for the recall of all folds' images together.
    """
    folds = study.runs[model, init]
    mean, std = moments(fold_scores(folds))
    confusion = sum(one.confusion for one in folds.values())
    columns = {"images": study.images}
    for i, score in enumerate(SCORES):
        columns |= {f"{score}_mean": mean[i], f"{score}_std": std[i]}
    columns["recall_low"], columns["recall_high"] = wilson(np.diag(confusion), confusion.sum(1))
    return [{"class": name} | {key: column[i].item() for key, column in columns.items()}
            for i, name in enumerate(study.classes)]


def mean_confusion(folds):
    """float64 [C,C]: confusion matrices with rows adding up to 1, mean over the folds that hold the class (Fig. 4)."""
    counts = np.array([one.confusion for one in folds.values()], float)
    images = counts.sum(2, keepdims=True)
    return moments(np.where(images > 0, counts / np.maximum(images, 1), np.nan))[0]


def draw_confusion(matrix, images, classes, title):
    """PNG bytes of Fig. 4: the matrix [C,C] with its numbers, and each class's images on a log scale at the side."""
    n, names = len(classes), [printable(name) for name in classes]
    label = 0.6 + 0.09 * max(map(len, names))               # inches; a layout engine would double the time
    width, height = label + 0.44 * n + 2.6, label + 0.36 * n + 0.4
    figure = Figure(figsize=(width, height))
    cells, bars = figure.subplots(1, 2, sharey=True, gridspec_kw={
        "left": label / width, "right": 1 - 0.2 / width, "bottom": label / height, "top": 1 - 0.4 / height,
        "width_ratios": (0.44 * n, 2.2), "wspace": 0.4 / (0.22 * n + 1.1)})
    cells.imshow(np.nan_to_num(matrix), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(np.nan_to_num(matrix) >= 0.005)):
        colour = "white" if matrix[i, j] > 0.715 else "black"           # a contrast of 4.5 : 1 or more on either side
        cells.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    cells.set_xticks(range(n), names, rotation=90, parse_math=False)
    cells.set_yticks(range(n), names, parse_math=False)
    cells.set(xlabel="Predicted class", ylabel="True class")
    figure.suptitle(title, y=1 - 0.2 / height, va="center", fontsize=min(12, 115 * width / (len(title) + 1)),
                    parse_math=False)
    bars.barh(range(n), images, color="tab:gray")
    bars.set(xscale="log", xlabel="Images", xlim=(0.8, 2 * max(images)))
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


# ---------------------------------------------------------------- tests between strategies
def corrected_t_test(differences, ratio):
    """Mean, ends of its interval, two-sided p, standard error, of the differences [..., k] of k folds.

    Nadeau and Bengio (2003): variance s² (1/k + ratio), ratio = test images / images fitted on, k - 1 degrees of
    freedom. NaN, apart from the mean, for fewer than two folds or no variance.
    """
    differences = np.asarray(differences, float)
    k, mean = differences.shape[-1], differences.mean(-1)
    variance = differences.var(-1, ddof=1) if k > 1 else np.zeros_like(mean)
    error = np.sqrt(np.where(variance > 1e-20, variance, np.nan) * (1 / k + ratio))         # below it is rounding
    half = special.stdtrit(k - 1, 1 - LEVEL / 2) * error
    return mean, mean - half, mean + half, 2 * special.stdtr(k - 1, -abs(mean) / error), error


def holm(p):
    """Holm's step-down adjusted p-values [m]; NaN stays NaN and is not counted."""
    p = np.asarray(p, float)
    order = np.argsort(p)[:(~np.isnan(p)).sum()]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def mcnemar(only_first, only_second):
    """Exact two-sided p from the numbers of images that only one of two networks has right; NaN if there are none."""
    fewer, total = np.minimum(only_first, only_second), np.add(only_first, only_second)
    return np.where(total > 0, np.minimum(1, 2 * special.bdtr(fewer, np.maximum(total, 1), 0.5)), np.nan)


def wilson(correct, total):
    """Ends of Wilson's score interval of proportions; NaN for a total of 0."""
    z, n = special.ndtri(1 - LEVEL / 2), np.where(np.asarray(total) > 0, total, np.nan)
    half = z * np.sqrt(correct * (n - correct) / n + z * z / 4)
    return (correct + z * z / 2 - half) / (n + z * z), (correct + z * z / 2 + half) / (n + z * z)


def pooled(folds):
    """Of all folds' images: keys (fold and id) int64 [N], labels int64 [N], whether predicted right bool [N]."""
    return [np.concatenate(part) for part in zip(*(
        ((fold << 32) + one.ids, one.labels, one.labels == one.predictions) for fold, one in folds.items()))]


def compare_runs(classes, first, second):
    """Rows for two runs {fold: Fold}: macro F1 over the folds that both have, then each class's recall, pooled."""
    first, second = ({k: run[k] for k in first if k in second} for run in (first, second))
    folds = [*first.values(), *second.values()]
    train = moments([one.train_images for one in folds])[0]
    ratio = TEST_TO_TRAIN if np.isnan(train) else np.mean([len(one.ids) for one in folds]) / train
    difference, low, high, p, error = corrected_t_test(macro_f1(first) - macro_f1(second), ratio)
    (keys, labels, right), (other_keys, _, other_right) = pooled(first), pooled(second)
    _, i, j = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    labels, right, other_right = labels[i], right[i], other_right[j]
    empty = dict.fromkeys(("class", "folds", "images", "difference", "low", "high", "p", "p_holm",
                           "smallest_difference", "only_first", "only_second"))
    rows = [empty | {"class": "", "folds": len(first), "images": len(labels), "difference": difference, "low": low,
                     "high": high, "p": p, "smallest_difference": error}]
    images, only_first, only_second = (np.bincount(labels[which], minlength=len(classes))
                                       for which in (slice(None), right & ~other_right, other_right & ~right))
    recall = (only_first - only_second) / np.where(images > 0, images, np.nan)
    p = mcnemar(only_first, only_second)
    for i, adjusted in enumerate(holm(p)):
        rows.append(empty | {"class": classes[i], "folds": len(first), "images": images[i], "difference": recall[i],
                             "p": p[i], "p_holm": adjusted, "only_first": only_first[i], "only_second": only_second[i]})
    return rows


def best_run(table4):
    """(model, init) of the highest F1 among the rows with the most folds."""
    row = max(table4, key=lambda row: (row["folds"], row["f1_mean"]))
    return row["model"], row["init"]


def comparison_rows(study, table4):
    """Rows of comparisons.csv: two families, every run against the best, and every init against ImageNet of its model.

    class "": macro F1, corrected t-test, p_holm over the family; smallest_difference: what Holm's first step asks for
    at this pair's spread. Other classes: recall of the pooled images, McNemar's exact test, p_holm over the classes.
    """
    runs, best, rows = study.runs, best_run(table4), []
    families = {"best": [(run, best) for run in runs], "imagenet": [(run, (run[0], "imagenet")) for run in runs]}
    for family, pairs in families.items():
        pairs = [(run, other) for run, other in pairs if run != other and set(runs[run]) & set(runs.get(other, ()))]
        compared = [compare_runs(study.classes, runs[run], runs[other]) for run, other in pairs]
        adjusted = holm([part[0]["p"] for part in compared])
        tests = max(1, (~np.isnan(adjusted)).sum())
        for (run, other), part, p in zip(pairs, compared, adjusted):
            part[0]["p_holm"] = p
            part[0]["smallest_difference"] *= special.stdtrit(part[0]["folds"] - 1, 1 - LEVEL / 2 / tests)
            pair = dict(zip(("family", "model", "init", "against_model", "against_init"), (family, *run, *other)))
            rows += [pair | row for row in part]
    return rows


def macro_rows(comparisons, family):
    """{(model, init): row} of a family's tests of macro F1."""
    return {(row["model"], row["init"]): row for row in comparisons if row["family"] == family and not row["class"]}


def marks(table4, comparisons):
    """{(model, init): "*" the best, "=" not told from it, "?" can't be tested, "" told from it}."""
    p = {run: row["p_holm"] for run, row in macro_rows(comparisons, "best").items()}
    signs = {run: "?" if np.isnan(value) else "=" if value >= LEVEL else "" for run, value in p.items()}
    signs[best_run(table4)] = "*"
    return {run: signs.get(run, "?") for run in ((row["model"], row["init"]) for row in table4)}


def statements(study, table4, comparisons):
    """The sentences that belong below Table 4, list of str."""
    best, imagenet = ([row for row in macro_rows(comparisons, family).values() if not np.isnan(row["p"])]
                      for family in ("best", "imagenet"))
    lines = ["± is the mean over classes of the std over folds (ddof = 1), as in the paper; F1 fold std of macro F1.",
             f"F1 >= {COMMON}: over the classes of at least {COMMON} images."]
    if best:
        folds, needed = max(row["folds"] for row in table4), sorted(row["smallest_difference"] for row in best)
        lines += [f"* has the best F1 of the rows with {folds} folds; = can't be told from it (corrected resampled "
                  f"t-test of macro F1, Holm over {len(best)}, level {LEVEL}); ? can't be tested.",
                  f"The smallest difference from it that {folds} folds could have shown: {up_to_1(needed[0])} to "
                  f"{up_to_1(needed[-1])}, by the row's spread, {up_to_1(np.median(needed))} in the middle."]
    if imagenet:
        shown = [f"{' '.join(paper_names(row['model'], row['init']))} {row['difference']:+.3f}"
                 for row in imagenet if row["p_holm"] < LEVEL]
        lines.append(f"Told from ImageNet of the same model (Holm over {len(imagenet)}): {', '.join(shown) or 'none'}.")
    if best or imagenet:
        lines.append("The p-values hold for these pre-trained weights and learning rates, of which each row has one: "
                     "what others would change is not in them, nor that the best was picked by the same scores.")
    return lines + study.notes


# ---------------------------------------------------------------- text
def printable(text):
    """A name on one line, without bytes that are no text."""
    return repr(text)[1:-1]


def paper_names(model, init):
    """[model, init] as the paper prints them."""
    return [printable(MODELS.get(model, model)), printable(INITS.get(init, init))]


def up_to_1(value):
    """'0.123'; 'over 1 (none)' for a difference that no two scores can have."""
    return f"{value:.3f}" if value <= 1 else "over 1 (none)"


def mean_std(mean, std=np.nan):
    """'0.787 ± 0.060'; '0.787' without a std; '' without a mean."""
    return "" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def aligned(header, rows):
    """A table of str cells as aligned text, which is Markdown too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


def table4_text(table4, signs):
    """Table 4 as it is printed; signs as of `marks`."""
    return aligned(
        ["Model", "Pre-training", "Folds", *SCORES.values(), "", "Accuracy", "F1 fold std", f"F1 >= {COMMON}"],
        [[*paper_names(row["model"], row["init"]), str(row["folds"]),
          *(mean_std(row[f"{score}_mean"], row[f"{score}_std"]) for score in SCORES), signs[row["model"], row["init"]],
          mean_std(row["accuracy_mean"], row["accuracy_std"]), mean_std(row["f1_fold_std"]), mean_std(row["f1_common"])]
         for row in table4])


def table5_text(table5):
    """Table 5 as it is printed; its last row holds the means over the classes."""
    rows = [[f"{CLASSES[row['class']]} ({row['class']})" if row["class"] in CLASSES else printable(row["class"]),
             *(mean_std(row[f"{score}_mean"], row[f"{score}_std"]) for score in SCORES), f"{row['images']:,}",
             " to ".join(filter(None, (mean_std(row["recall_low"]), mean_std(row["recall_high"]))))] for row in table5]
    means = [mean_std(*(moments([row[f"{score}_{what}"] for row in table5])[0] for what in ("mean", "std")))
             for score in SCORES]
    return aligned(["Class", *SCORES.values(), "#Images", "Recall of all folds' images, 95%"],
                   [*rows, ["mean", *means, "", ""]])


def read_table4(file):
    """{(model, init): {"precision_mean": float, ..., "quoted": is it the row that the paper has from Matek et al.}}."""
    with naming(file), open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
        keys = [f"{score}_{what}" for score in SCORES for what in ("mean", "std")]
        require(rows and {"model", "init", *keys} <= set(rows[0]), "is no table4.csv (model,init,precision_mean,...)")
        return {(row["model"], row["init"]): {key: float(row[key] or "nan") for key in keys} |
                {"quoted": row["model"] == "resnext50_32x4d" and "folds" not in row} for row in rows}


def compare_text(table4, theirs):
    """Our means, theirs (of read_table4) and the differences, as aligned text; none from a row that is only quoted."""
    ours, rows = {(row["model"], row["init"]): row for row in table4}, []
    models, inits = (in_order({run[i] for run in (*ours, *theirs)}, known) for i, known in enumerate((MODELS, INITS)))
    for run in ((model, init) for model in models for init in inits if (model, init) in {*ours, *theirs}):
        quoted = theirs.get(run, {}).get("quoted", False)
        rows.append(paper_names(*run))
        for key in (f"{score}_mean" for score in SCORES):
            a, b = (table.get(run, {}).get(key, np.nan) for table in (ours, theirs))
            rows[-1] += [mean_std(a), mean_std(b), "quoted" if quoted else "" if np.isnan(a - b) else f"{a - b:+.3f}"]
    header = ["Model", "Pre-training"] + [cell for name in SCORES.values() for cell in (name, "theirs", "diff.")]
    note = "\nquoted: from Matek et al. (2021), who trained and averaged otherwise; no difference.\n"
    return aligned(header, rows) + note * any(row["quoted"] for row in theirs.values())


def write_tables(study, results):
    """Write everything into the folder `results`; returns table4_rows and Table 4's text."""
    table4 = table4_rows(study)
    comparisons = comparison_rows(study, table4)
    lines = statements(study, table4, comparisons)
    text = table4_text(table4, marks(table4, comparisons)) + "".join(f"\n- {line}" for line in lines) + "\n"
    write_csv(results / "table4.csv", table4)
    write_file(results / "table4.md", text)
    if comparisons:
        write_csv(results / "comparisons.csv", comparisons)
    for (model, init), folds in study.runs.items():
        name, table5, matrix = f"{model}_{init}", table5_rows(study, model, init), mean_confusion(folds)
        write_csv(results / f"table5_{name}.csv", table5)
        write_file(results / f"table5_{name}.md", table5_text(table5))
        rows = [[own, *row] for own, row in zip(study.classes, matrix)]
        write_csv(results / f"confusion_{name}.csv", [["class", *study.classes], *rows])
        title = f"{', '.join(paper_names(model, init))} (mean of {len(folds)} fold{'s' * (len(folds) > 1)})"
        write_file(results / f"confusion_{name}.png", draw_confusion(matrix, study.images, study.classes, title))
    return table4, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs", help="folder that holds train/ and split.csv")
    parser.add_argument("--compare", metavar="TABLE4.CSV", help="print these numbers beside ours")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        theirs = read_table4(args.compare) if args.compare else None
        study = read_study(args.runs)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for problem in study.problems:
        print(problem, file=sys.stderr)
    if not study.runs:
        raise SystemExit(f"{args.runs}: no finished run to be read in train/<model>/<init>/fold<k>/predictions.csv")
    table4, text = write_tables(study, args.runs / "results")
    print(text)
    if theirs:
        print(compare_text(table4, theirs))
    sys.exit(1 if study.problems else 0)


if __name__ == "__main__":
    main()
