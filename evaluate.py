"""Tables 4 and 5, Fig. 4 and tests between strategies, out of the predictions that finished runs left.

    python evaluate.py                                  every finished run in runs/, however far the study has come
    python evaluate.py --compare paper/table4.csv       the same, with the published numbers (or another table4.csv) beside
    python evaluate.py --runs /scratch/bm/runs

Reads runs/train/<model>/<init>/fold<k>/predictions.csv, and where they are there runs/split.csv and each fold's config.json.
Writes into runs/results/: table4.csv and .md, table5_<model>_<init>.csv and .md, confusion_<model>_<init>.csv and .png,
recall.csv (each class's recall pooled over the folds, with Wilson's interval), comparisons.csv.
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

# Order and names of Tables 4 and 5: printed tables have the names, CSVs the keys.
MODELS = {"vgg19_bn": "VGG-19 BN", "resnet152": "ResNet-152", "regnet_y_32gf": "Regnet_y_32gf", "vit_l_32": "ViT_l_32",
          "resnext50_32x4d": "ResNeXt-50"}
INITS = {"random": "Random", "imagenet": "ImageNet", "pcam": "PCam", "cd": "CD", "imagenet+pcam": "ImageNet + PCam",
         "imagenet+cd": "ImageNet + CD"}
CLASSES = {"NGB": "Band neutrophils", "NGS": "Segmented neutrophils", "LYT": "Lymphocytes", "MON": "Monocytes",
           "EOS": "Eosinophils", "BAS": "Basophils", "MMZ": "Metamyelocytes", "MYB": "Myelocytes", "PMO": "Promyelocytes",
           "BLA": "Blasts", "PLM": "Plasma cells", "KSC": "Smudge cells", "OTH": "Other cells", "ART": "Artefacts",
           "NIF": "Not identifiable", "PEB": "Proerythroblasts", "EBO": "Erythroblasts", "HAC": "Hairy cells",
           "ABE": "Abnormal eosinophils", "LYI": "Immature lymphocytes", "FGC": "Faggot cells"}
SCORES = {"precision": "Precision", "recall": "Recall", "f1": "F1 score"}
COMMON = 100                    # images from which on a class counts for f1_common
LEVEL = 0.05                    # of the tests; intervals cover 1 - LEVEL
TEST_TO_TRAIN = 0.20 / 0.64     # test images to images fitted on in the paper's split, for runs that tell neither

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
        raise SystemExit(f"{file} can't be written: {error.strerror}; free some room or give another --runs") from None


def write_csv(file, rows):
    """Rows: dicts of the same keys, or sequences of which the first is the header. NaN and None become empty cells."""
    if isinstance(rows[0], dict):
        rows = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["" if cell is None or cell != cell else f"{cell:.6g}" if isinstance(cell, float) else cell
                                 for cell in row] for row in rows])
    write_file(file, text.getvalue())


@contextlib.contextmanager
def naming(file):
    """Whatever is wrong with a file's content becomes a ValueError of one line that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: can't be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: {error}") from None


def require(fine, reason):
    """ValueError(reason) unless it is fine."""
    if not fine:
        raise ValueError(reason)


def find_runs(runs):
    """Finished runs as {(model, init): {fold: Path of predictions.csv}}, in the paper's order; {} if there is none."""
    found = {}
    for file in Path(runs, "train").glob("*/*/fold*/predictions.csv"):
        fold = re.fullmatch(r"fold(0|[1-9]\d*)", file.parent.name)
        if fold:
            found.setdefault(file.parts[-4:-2], {})[int(fold[1])] = file
    models, inits = in_order({model for model, _ in found}, MODELS), in_order({init for _, init in found}, INITS)
    return {run: dict(sorted(found[run].items())) for model in models for init in inits if (run := (model, init)) in found}


def read_predictions(file, probabilities=True):
    """Predictions(paths list, labels int64 [N], predictions int64 [N], probabilities float64 [N,C], classes list).

    Classes and columns are in class_order, whatever the header's order. Without `probabilities` they are None and not
    parsed, which takes a tenth of the time. ValueError(file and reason, one line) for a file that can't be right.
    """
    with naming(file):
        text = Path(file).read_bytes().decode("utf-8", "surrogateescape")
        header, rows, parsed = parse_predictions(text, probabilities)
        names = [column[2:] for column in header[3:]]
        classes = class_order(names)
        number = {name: i for i, name in enumerate(classes)}
        unknown = {name for row in rows for name in row[1:3]}.difference(classes)
        require(not unknown, f"class {min(unknown, default='')!r} is not in the header")
        path, times = Counter(row[0] for row in rows).most_common(1)[0]
        require(times == 1, f"{path!r} stands in {times} rows")
        labels, predictions = (np.array([number[row[i]] for row in rows]) for i in (1, 2))
        if not parsed:
            return Predictions([row[0] for row in rows], labels, predictions, None, classes)
        table = np.array([row[3:] for row in rows], float)[:, [names.index(name) for name in classes]]
        chosen = table[np.arange(len(rows)), predictions]
        for wrong, reason in ((~((table >= 0) & (table <= 1.001)).all(1), "are not all between 0 and 1"),
                              (abs(table.sum(1) - 1) > 0.001, "don't add up to 1"),
                              (chosen < table.max(1) - 1e-5, "are not highest for its prediction")):
            require(not wrong.any(), f"the probabilities of {rows[wrong.argmax()][0]!r} {reason}")
        return Predictions([row[0] for row in rows], labels, predictions, table if probabilities else None, classes)


def parse_predictions(text, probabilities):
    """Header, rows (lists of str), and whether the rows' probabilities are split up, as they are too where one looks odd."""
    require(text.strip("\0\r\n "), "is empty")
    require(text[-1] == "\n", "ends in the middle of a row")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader)
    require(len(header) > 3 and header[:3] == ["path", "label", "prediction"] and all(c[:2] == "p_" for c in header[3:]),
            "the header is not path,label,prediction,p_<CLASS>...")
    require(len(set(header)) == len(header), "the header names a class twice")
    lowered = text.lower()
    parsed = probabilities or any(mark in lowered for mark in (",nan", ",inf", ",-", ",,", ",\r", ",\n"))
    if parsed or '"' in text:
        rows = list(reader)
        widths = [len(row) for row in rows]
    else:                           # nothing is quoted: a line is a row, a comma separates
        lines = text.split("\n")[1:-1]
        rows = [line.split(",", 3) for line in lines]
        widths = [line.count(",") + 1 for line in lines]
    require(rows, "holds no row")
    wrong = next((i for i, width in enumerate(widths) if width != len(header)), None)
    require(wrong is None, f"row {wrong} after the header has not {len(header)} fields")
    return header, rows, parsed


def read_split(file):
    """Paths list, labels list, parts str [N, folds] of a split.csv; [], [], None without one; ValueError for a bad one."""
    if not Path(file).exists():
        return [], [], None
    with naming(file), open(file, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.reader(stream, strict=True))
        header = ["path", "label"] + [f"fold{k}" for k in range(len(rows[0]) - 2)] if rows else None
        require(header and rows[0] == header, "the header is not path,label,fold0,fold1,...")
        require({len(row) for row in rows} == {len(header)}, f"has rows of other than {len(header)} fields")
        require(len({row[0] for row in rows}) == len(rows), "names an image twice")
        return [row[0] for row in rows[1:]], [row[1] for row in rows[1:]], np.array([row[2:] for row in rows[1:]])


def read_study(runs):
    """Study of all finished runs, without the files that can't be right.

    classes list[str]; images int64 [C] of the data set (split.csv; without it, of the images tested so far); runs {(model,
    init): {fold: Fold}}; problems and notes, lists of one-line texts. Fold: ids (an image's is the same in every run),
    labels, predictions int64 [N]; confusion int64 [C,C], rows are labels; train_images float, NaN where nothing tells it.
    """
    problems, read, good = [], {}, {}
    paths, names, parts = [], [], None
    try:
        paths, names, parts = read_split(Path(runs, "split.csv"))
    except ValueError as error:
        problems.append(str(error))
    index = {path: i for i, path in enumerate(paths)}
    for run, folds in find_runs(runs).items():
        for fold, file in folds.items():
            try:
                one = read_predictions(file, probabilities=False)
                read[run, fold, file] = one._replace(paths=np.array([index.setdefault(p, len(index)) for p in one.paths]))
            except ValueError as error:
                problems.append(str(error))
    sets = Counter(tuple(one.classes) for one in read.values())
    classes = list(max(sets, key=sets.get)) if sets else []         # those of most files; the others are the odd ones
    truth = np.array([classes.index(name) if name in classes else -1 for name in names] + [-2] * (len(index) - len(names)), int)
    paths = list(index)
    for (run, fold, file), one in read.items():
        try:
            with naming(file):
                require(one.classes == classes, f"its {len(one.classes)} classes are not the {len(classes)} of most runs")
                tested = [other.ids for other in good.get(run, {}).values()]
                train = check_images(one, fold, truth, parts, np.concatenate(tested) if tested else [], paths, config(file))
        except ValueError as error:
            problems.append(str(error))
            continue
        truth[one.paths] = one.labels
        confusion = np.bincount(one.labels * len(classes) + one.predictions, minlength=len(classes) ** 2)
        good.setdefault(run, {})[fold] = Fold(one.paths, one.labels, one.predictions, confusion.reshape(len(classes), -1), train)
    return Study(classes, np.bincount(truth[truth >= 0], minlength=len(classes)), good, problems, notes(good, classes, parts))


def config(file):
    """The config.json beside a predictions.csv; {} if there is none that can be read."""
    try:
        return dict(json.loads(file.with_name("config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_images(one, fold, truth, parts, tested, paths, config):
    """Number of images that this fold's network was fitted on; ValueError if its test images contradict what is known.

    truth: classes of all images by the split or by other runs (-1 none of the classes, -2 not known yet); parts: those of
    the split; tested: ids in the run's other folds; paths: of all images, by id.
    """
    ids, expected = one.paths, config.get("test_images", len(one.paths))
    require(len(ids) == expected, f"has {len(ids)} rows, but its config.json counts {expected} test images")
    other = ids[(truth[ids] != -2) & (truth[ids] != one.labels)]
    require(not len(other), f"{paths[other[0]]!r} has another label in {'other runs' if parts is None else 'split.csv'}" if len(other) else "")
    if parts is None:
        twice = np.intersect1d(ids, tested)
        require(not len(twice), f"{paths[int(twice[0])]!r} was tested in another fold too" if len(twice) else "")
        return float(config.get("train_images") or np.nan)
    require(fold < parts.shape[1], f"split.csv has no fold{fold}")
    part = np.array([parts[i, fold] if i < len(parts) else "absent" for i in ids])
    foreign = np.flatnonzero(part != "test")
    require(not len(foreign), f"{paths[ids[foreign[0]]]!r} is {part[foreign[0]]}, not test, in fold{fold} of split.csv" if len(foreign) else "")
    return float((parts[:, fold] == "train").sum())


def notes(runs, classes, parts):
    """What a reader of the tables has to know of this study, one sentence each."""
    absent, missing, lines = {}, 0, []
    for folds in runs.values():
        for k, fold in folds.items():
            for i in np.flatnonzero(fold.confusion.sum(1) == 0):
                absent.setdefault(classes[i], set()).add(k)
            missing = max(missing, 0 if parts is None else (parts[:, k] == "test").sum() - len(fold.ids))
    if absent:
        lines.append("No test image, and so left out of the class's mean: " + "; ".join(
            f"{printable(name)} in fold {', '.join(map(str, sorted(absent[name])))}" for name in in_order(absent, classes)))
    if missing:
        lines.append(f"Up to {missing} of a fold's test images in split.csv have no prediction")
    if parts is None:
        lines.append("Without split.csv a class's images are those tested so far")
    return lines


# ---------------------------------------------------------------- scores

def confusion_scores(confusion):
    """Precision, recall, F1 float64 [3,C] of a confusion matrix [C,C], rows are labels: see per_class_scores."""
    hits, images, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    scores = np.array([hits / np.maximum(predicted, 1), hits / np.maximum(images, 1), 2 * hits / np.maximum(images + predicted, 1)])
    return np.where(images > 0, scores, np.nan)


def per_class_scores(labels, predictions, n_classes):
    """Precision, recall, F1, each float64 [C]: 0 for a class never predicted, NaN for one without an image in labels."""
    confusion = np.bincount(np.asarray(labels) * n_classes + predictions, minlength=n_classes ** 2)
    return tuple(confusion_scores(confusion.reshape(n_classes, n_classes)))


def fold_scores(folds):
    """float64 [F,3,C] of {fold: Fold}: precision, recall, F1 of each class on each fold's test images."""
    return np.array([confusion_scores(fold.confusion) for fold in folds.values()])


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

    The printed mean is that over classes of Table 5's means, the ± the mean over classes of its stds: so Table 5's last row.
    """
    rows = []
    for (model, init), folds in study.runs.items():
        mean, std = moments(fold_scores(folds))
        row = {"model": model, "init": init, "folds": len(folds)}
        for name, m, s in zip(SCORES, mean, std):
            row |= {f"{name}_mean": moments(m)[0], f"{name}_std": moments(s)[0]}
        accuracy = moments([(fold.labels == fold.predictions).mean() for fold in folds.values()])
        rows.append(row | {"accuracy_mean": accuracy[0], "accuracy_std": accuracy[1], "f1_fold_std": moments(macro_f1(folds))[1],
                           "f1_common": moments(mean[2][study.images >= COMMON])[0]})
    return rows


def table5_rows(study, model, init):
    """One dict a class, keys as in table5_<model>_<init>.csv, NaN for an empty cell."""
    mean, std = moments(fold_scores(study.runs[model, init]))
    return [{"class": name, "images": int(study.images[i])} | {
        f"{score}_{what}": values[j][i] for j, score in enumerate(SCORES) for what, values in (("mean", mean), ("std", std))}
        for i, name in enumerate(study.classes)]


def recall_rows(study):
    """One dict a run and class: recall pooled over the folds, with Wilson's 95% interval."""
    rows = []
    for (model, init), folds in study.runs.items():
        confusion = sum(fold.confusion for fold in folds.values())
        for name, correct, images in zip(study.classes, np.diag(confusion), confusion.sum(1)):
            low, high = wilson(correct, images)
            rows.append({"model": model, "init": init, "class": name, "images": int(images), "correct": int(correct),
                         "recall": correct / images if images else np.nan, "low": low, "high": high})
    return rows


def mean_confusion(folds):
    """float64 [C,C]: each fold's confusion matrix with rows summing to 1, mean over the folds that hold the class (Fig. 4)."""
    counts = np.array([fold.confusion for fold in folds.values()], float)
    images = counts.sum(2, keepdims=True)
    return moments(np.where(images > 0, counts / np.maximum(images, 1), np.nan))[0]


def draw_confusion(matrix, images, classes, title):
    """PNG bytes of Fig. 4: the matrix [C,C] with its numbers, and each class's images on a log scale at the side."""
    n, names = len(classes), [printable(name) for name in classes]
    figure = Figure(figsize=(4.5 + 0.42 * n, 2.2 + 0.38 * n), layout="constrained")
    cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(n + 2, 2 + n / 8))
    cells.imshow(np.nan_to_num(matrix), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(np.nan_to_num(matrix) >= 0.005)):
        cells.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color="w" if matrix[i, j] > 0.5 else "k")
    cells.set_xticks(range(n), names, rotation=90, parse_math=False)
    cells.set_yticks(range(n), names, parse_math=False)
    cells.set(xlabel="Predicted class", ylabel="True class")
    cells.set_title(title, parse_math=False)
    bars.barh(range(n), images, color="tab:gray")
    bars.set(xscale="log", xlabel="Images")
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


# ---------------------------------------------------------------- tests between strategies

def corrected_t_test(differences, ratio):
    """Mean, ends of its interval, two-sided p, standard error of the differences [..., k] of k folds.

    Nadeau and Bengio (2003): variance s² (1/k + ratio), ratio = test images / images fitted on, k-1 degrees of freedom.
    NaN, apart from the mean, for fewer than two folds or without any variance.
    """
    differences = np.asarray(differences, float)
    k, mean = differences.shape[-1], differences.mean(-1)
    variance = differences.var(-1, ddof=1) if k > 1 else np.zeros_like(mean)
    error = np.sqrt(np.where(variance > 1e-20, variance, np.nan) * (1 / k + ratio))     # not rounding errors of equal ones
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
    """Exact two-sided p from the numbers of images that only one of two networks has right; NaN where there are none."""
    fewer, total = np.minimum(only_first, only_second), np.add(only_first, only_second)
    return np.where(total > 0, np.minimum(1, 2 * special.bdtr(fewer, np.maximum(total, 1), 0.5)), np.nan)


def wilson(correct, total):
    """Ends of Wilson's score interval for a proportion; NaN for a total of 0."""
    z, n = special.ndtri(1 - LEVEL / 2), total if total else np.nan
    centre, half = correct + z * z / 2, z * np.sqrt(correct * (n - correct) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def compare_runs(classes, first, second):
    """Rows (dicts) for two runs {fold: Fold}: macro F1 over their common folds, then each class on the pooled images."""
    common = [k for k in first if k in second]
    a, b = ([run[k] for k in common] for run in (first, second))
    train = moments([fold.train_images for fold in a + b])[0]
    ratio = TEST_TO_TRAIN if np.isnan(train) else moments([len(fold.ids) for fold in a + b])[0] / train
    difference, low, high, p, error = corrected_t_test(macro_f1({k: first[k] for k in common}) - macro_f1({k: second[k] for k in common}), ratio)
    right = []
    for one, other in zip(a, b):
        if np.array_equal(one.ids, other.ids):
            i = j = slice(None)
        else:
            _, i, j = np.intersect1d(one.ids, other.ids, return_indices=True)
        right.append((one.labels[i], one.predictions[i] == one.labels[i], other.predictions[j] == other.labels[j]))
    labels, ours, theirs = map(np.concatenate, zip(*right))
    images, only_first, only_second = (np.bincount(labels[which], minlength=len(classes))
                                       for which in (slice(None), ours & ~theirs, theirs & ~ours))
    rows = [{"class": "", "folds": len(common), "images": len(labels), "difference": difference, "low": low, "high": high, "p": p,
             "p_holm": None, "smallest_difference": error, "only_first": None, "only_second": None}]
    p = mcnemar(only_first, only_second)
    for i, adjusted in enumerate(holm(p)):
        rows.append({"class": classes[i], "folds": len(common), "images": images[i],
                     "difference": (only_first[i] - only_second[i]) / images[i] if images[i] else np.nan, "low": None, "high": None,
                     "p": p[i], "p_holm": adjusted, "smallest_difference": None, "only_first": only_first[i], "only_second": only_second[i]})
    return rows


def best_run(table4):
    """(model, init) of the highest F1 among the rows with the most folds."""
    row = max(table4, key=lambda row: (row["folds"], row["f1_mean"]))
    return row["model"], row["init"]


def comparison_rows(study, table4):
    """Rows of comparisons.csv: two families, every run against the best and every init against ImageNet of its model.

    class "": difference of macro F1, its interval, p of the corrected t-test, adjusted over the family; smallest_difference:
    what this pair would have had to reach. A class's name: difference of pooled recall, McNemar's p, adjusted over classes.
    """
    runs, best, rows = study.runs, best_run(table4), []
    families = {"best": [(run, best) for run in runs if run != best],
                "imagenet": [(run, (run[0], "imagenet")) for run in runs if run[1] != "imagenet" and (run[0], "imagenet") in runs]}
    for family, pairs in families.items():
        pairs = [(run, other) for run, other in pairs if set(runs[run]) & set(runs[other])]
        compared = [compare_runs(study.classes, runs[run], runs[other]) for run, other in pairs]
        adjusted = holm([part[0]["p"] for part in compared])
        tested = max(1, (~np.isnan(adjusted)).sum())
        for (run, other), part, p in zip(pairs, compared, adjusted):
            part[0]["p_holm"] = p
            part[0]["smallest_difference"] *= special.stdtrit(part[0]["folds"] - 1, 1 - LEVEL / 2 / tested)
            names = dict(zip(("family", "model", "init", "against_model", "against_init"), (family, *run, *other)))
            rows += [names | row for row in part]
    return rows


def marks(table4, comparisons):
    """{(model, init): "*" the best, "=" not told from the best, "?" couldn't be tested, "" told from it}."""
    p = {(row["model"], row["init"]): row["p_holm"] for row in comparisons if row["family"] == "best" and row["class"] == ""}
    signs = {run: "?" if np.isnan(value) else "=" if value >= LEVEL else "" for run, value in p.items()}
    return {run: "*" if run == best_run(table4) else signs.get(run, "?") for run in ((row["model"], row["init"]) for row in table4)}


def statements(study, table4, comparisons):
    """The sentences that belong below Table 4."""
    macro = {family: [row for row in comparisons if row["family"] == family and row["class"] == "" and not np.isnan(row["p"])]
             for family in ("best", "imagenet")}
    lines = ["± is the mean over classes of the standard deviation over folds (ddof = 1), as in the paper; 'fold std' that of macro F1",
             f"F1 >= {COMMON}: over the classes of at least {COMMON} images"]
    if macro["best"]:
        needed = sorted(row["smallest_difference"] for row in macro["best"])
        lines += ["* best F1 of the rows with most folds; = not told from it; ? can't be tested (corrected resampled t-test of macro F1, "
                  f"Holm over {len(needed)}, level {LEVEL})",
                  f"The smallest difference that could have been shown: {np.median(needed):.3f} (median; {needed[0]:.3f} to {needed[-1]:.3f})"]
    if macro["imagenet"]:
        shown = [f"{MODELS.get(row['model'], row['model'])} {INITS.get(row['init'], row['init'])} {row['difference']:+.3f}"
                 for row in macro["imagenet"] if row["p_holm"] < LEVEL]
        lines.append(f"Against ImageNet within its model, shown in {len(shown)} of {len(macro['imagenet'])}: " + (", ".join(shown) or "none"))
    if any(macro.values()):
        lines.append("The p-values hold for these pre-trained weights and these learning rates, of which each configuration has one; "
                     "another pre-training or range test may differ by more. The best row was chosen by the same scores.")
    return [line + ("" if line.endswith(".") else ".") for line in lines + study.notes]


# ---------------------------------------------------------------- text

def printable(text):
    """A name on one line, without bytes that are no text."""
    return repr(text)[1:-1]


def mean_std(mean, std):
    """'0.787 ± 0.060'; '0.787' without a std; '' without a mean."""
    return "" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def text_table(header, rows):
    """Aligned text of str cells, the columns parted by two blanks."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, ["-" * width for width in widths], *rows))


def markdown_table(header, rows):
    """Markdown of str cells."""
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in (header, ["---"] * len(header), *rows))


def table4_cells(table4, signs):
    """Header and rows of str for Table 4 as it is printed."""
    header = ["Model", "Pre-training", "Folds", *SCORES.values(), "", "Accuracy", "F1 fold std", f"F1 >= {COMMON}"]
    rows = [[MODELS.get(row["model"], row["model"]), INITS.get(row["init"], row["init"]), str(row["folds"]),
             *(mean_std(row[f"{score}_mean"], row[f"{score}_std"]) for score in SCORES), signs[row["model"], row["init"]],
             mean_std(row["accuracy_mean"], row["accuracy_std"]), mean_std(row["f1_fold_std"], np.nan), mean_std(row["f1_common"], np.nan)]
            for row in table4]
    return header, [[printable(cell) for cell in row] for row in rows]


def table5_cells(table5, recall):
    """Header and rows of str for a Table 5 as it is printed, with Wilson's intervals; the last row holds the means."""
    rows = [[f"{CLASSES[row['class']]} ({row['class']})" if row["class"] in CLASSES else printable(row["class"]), f"{row['images']:,}",
             *(mean_std(row[f"{score}_mean"], row[f"{score}_std"]) for score in SCORES),
             f"{pooled['low']:.3f} to {pooled['high']:.3f}" if pooled["images"] else ""] for row, pooled in zip(table5, recall)]
    mean = [mean_std(*(moments([row[f"{score}_{what}"] for row in table5])[0] for what in ("mean", "std"))) for score in SCORES]
    return ["Class", "Images", *SCORES.values(), "Recall, pooled (95%)"], [*rows, ["mean", "", *mean, ""]]


def read_table4(file):
    """{(model, init): dict of floats, and "quoted": whether it is the row that the paper takes from Matek et al.}."""
    with naming(file), open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
        names = [f"{score}_{what}" for score in SCORES for what in ("mean", "std")]
        require(rows and {"model", "init", *names} <= set(rows[0]), "is no table4.csv: columns model, init, precision_mean, ... are missing")
        return {(row["model"], row["init"]): {name: float(row[name] or "nan") for name in names} |
                {"quoted": row["model"] == "resnext50_32x4d" and "folds" not in row} for row in rows}


def compare_table(table4, theirs):
    """Aligned text: our means, theirs, and the differences."""
    ours = {(row["model"], row["init"]): row for row in table4}
    models, inits = (in_order({run[i] for run in (*ours, *theirs)}, known) for i, known in enumerate((MODELS, INITS)))
    rows = []
    for run in ((model, init) for model in models for init in inits if (model, init) in ours or (model, init) in theirs):
        quoted = run in theirs and theirs[run]["quoted"]
        cells = [MODELS.get(run[0], run[0]) + " [Matek]" * quoted, INITS.get(run[1], run[1])]
        for score in SCORES:
            pair = [table[run][f"{score}_mean"] if run in table else np.nan for table in (ours, theirs)]
            known = not quoted and not np.isnan(pair).any()
            cells += [*(mean_std(value, np.nan) for value in pair), f"{pair[0] - pair[1]:+.3f}" if known else ""]
        rows.append(cells)
    header = ["Model", "Pre-training"] + [name for score in SCORES.values() for name in (score, "theirs", "diff.")]
    return text_table(header, rows) + ("\n[Matek]: quoted from Matek et al. (2021), who trained and averaged otherwise: no difference.")


def write_tables(study, results):
    """Write all of the results; the text of Table 4 with its sentences."""
    table4, recall = table4_rows(study), recall_rows(study)
    comparisons = comparison_rows(study, table4)
    header, rows = table4_cells(table4, marks(table4, comparisons))
    below = statements(study, table4, comparisons)
    write_csv(results / "table4.csv", table4)
    write_file(results / "table4.md", markdown_table(header, rows) + "\n" + "\n".join(f"- {line}" for line in below) + "\n")
    write_csv(results / "recall.csv", recall)
    if comparisons:
        write_csv(results / "comparisons.csv", comparisons)
    for (model, init), folds in study.runs.items():
        table5 = table5_rows(study, model, init)
        write_csv(results / f"table5_{model}_{init}.csv", table5)
        own = [row for row in recall if (row["model"], row["init"]) == (model, init)]
        write_file(results / f"table5_{model}_{init}.md", markdown_table(*table5_cells(table5, own)))
        matrix = mean_confusion(folds)
        write_csv(results / f"confusion_{model}_{init}.csv", [["class", *study.classes],
                                                              *([name, *row] for name, row in zip(study.classes, matrix))])
        title = f"{MODELS.get(model, model)}, {INITS.get(init, init)} (mean of {len(folds)} folds)"
        write_file(results / f"confusion_{model}_{init}.png", draw_confusion(matrix, study.images, study.classes, title))
    return text_table(header, rows) + "\n\n" + "\n".join(below)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs", help="folder that holds train/ and split.csv")
    parser.add_argument("--compare", type=Path, metavar="TABLE4.CSV", help="print these numbers beside ours")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        theirs = read_table4(args.compare) if args.compare else None
    except ValueError as error:
        raise SystemExit(str(error))
    study = read_study(args.runs)
    print(*study.problems, sep="\n", end="\n" * bool(study.problems), file=sys.stderr)
    if not study.runs:
        raise SystemExit(f"no finished run in {args.runs / 'train'}: train.py leaves <model>/<init>/fold<k>/predictions.csv there")
    print(write_tables(study, args.runs / "results"))
    if theirs:
        print("\n" + compare_table(table4_rows(study), theirs))
    sys.exit(1 if study.problems else 0)


if __name__ == "__main__":
    main()
