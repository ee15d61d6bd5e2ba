"""Tables 4 and 5, Fig. 4 and significance tests between the rows, from the predictions of all finished runs.

    python evaluate.py                              every finished run in runs/, also of an unfinished study
    python evaluate.py --compare paper/table4.csv   also prints the published numbers (or another table4.csv)
    python evaluate.py --tta                        of predictions_tta.csv, tested against predictions.csv

Reads predictions.csv and config.json of runs/train/<model>/<init>/fold<k>, runs/split.csv, overlaps.csv and
groups.csv; writes into runs/results. An invalid file is named on stderr and left out (status 1).
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.figure import Figure
from scipy import special

# Models, inits and classes in the order of Tables 4 and 5, with the names that the paper prints
MODELS = {"vgg19_bn": "VGG-19 BN", "resnet152": "ResNet-152", "regnet_y_32gf": "Regnet_y_32gf"}
MODELS |= {"vit_l_32": "ViT_l_32", "resnext50_32x4d": "ResNeXt-50"}
INITS = {"random": "Random", "imagenet": "ImageNet", "pcam": "PCam", "cd": "CD"}
INITS |= {"imagenet+pcam": "ImageNet + PCam", "imagenet+cd": "ImageNet + CD"}
CLASS_NAMES = """NGB Band neutrophils, NGS Segmented neutrophils, LYT Lymphocytes, MON Monocytes,
EOS Eosinophils, BAS Basophils, MMZ Metamyelocytes, MYB Myelocytes, PMO Promyelocytes, BLA Blasts,
PLM Plasma cells, KSC Smudge cells, OTH Other cells, ART Artefacts, NIF Not identifiable,
PEB Proerythroblasts, EBO Erythroblasts, HAC Hairy cells, ABE Abnormal eosinophils,
LYI Immature lymphocytes, FGC Faggot cells"""
CLASSES = dict(entry.split(maxsplit=1) for entry in CLASS_NAMES.split(","))
SCORES = ("precision", "recall", "f1")
COLUMNS = [f"{score}_{what}" for score in SCORES for what in ("mean", "std")]
COMPARISON = "family model init against_model against_init folds difference low high p p_holm".split()
MOST_DRAWN = 50  # classes of a confusion matrix with numbers; of more, only as many are named
COMMON = 100  # f1_common averages the classes of at least so many images
LEVEL = 0.05  # significance level; intervals cover 1 - LEVEL
PAPER_RATIO = 0.20 / 0.64  # test images / training images of the paper's split, used without a split.csv
# Settings in config.json that all folds of all rows should share
SETTINGS = "amp batch_size data epochs image_size optimizer schedule seed stop_lr".split()
# As text, since a class may be called NA or 01; file names may hold bytes that are not UTF-8
CSV = {"keep_default_na": False, "encoding_errors": "surrogateescape"}
# paths list; labels, predictions int64 [N]; probabilities float64 [N,C]; classes list, in class_order
Predictions = namedtuple("Predictions", "paths labels predictions probabilities classes")
# confusion int64 [C,C], rows are labels; scores [3,C] of it; train_images NaN if unknown; no_overlap:
# confusion of images that overlap with none in training, or None; ece: expected calibration error
Fold = namedtuple("Fold", "confusion scores train_images no_overlap file config ece", defaults=[None] * 4)
# images int64 [C] of the data set; runs {(model, init): {fold: Fold}}; problems, notes: lists of sentences;
# split: of read_split, or None; overlaps, groups: two of the notes, or None;
# plain: runs of the same networks without test-time augmentation, where this is the Study of those with it
FIELDS = "classes images runs problems notes split overlaps groups plain"
Study = namedtuple("Study", FIELDS, defaults=(None, None, None, {}))


# ---------------------------------------------------------------- files
def rank(name, order):
    """Sort key: the names that `order` holds, as they stand there, then the others alphabetically."""
    return list(order).index(name) if name in order else len(order), name


def class_order(names):
    """Table 5's order if all names are bone marrow classes, else alphabetical."""
    return sorted(names, key=lambda name: rank(name, CLASSES if set(names) <= set(CLASSES) else ()))


def run_order(runs):
    """(model, init) in the paper's order, list."""
    return sorted(runs, key=lambda run: (rank(run[0], MODELS), rank(run[1], INITS)))


def write_file(file, content):
    """Write text or bytes so that the file appears whole or not at all; SystemExit where that fails."""
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    beside = Path(f"{file}.tmp{os.getpid()}")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = f"{error.strerror}; make room or name another --out"
        raise SystemExit(f"{file} can't be written: {reason}") from None


def write_csv(file, table):
    """Write a DataFrame, or rows as dicts of the same keys; NaN and None become empty cells."""
    table = pd.DataFrame(table)
    write_file(file, table.to_csv(index=False, float_format="%.6g", lineterminator="\r\n"))


@contextlib.contextmanager
def error_context(file):
    """Turn an error about a file into a ValueError of one line that begins with the file's name."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{printable(str(file))}: {reason}") from None


def find_runs(runs, name="predictions.csv"):
    """Finished runs as {(model, init): {fold: Path of predictions.csv}}, in the paper's order."""
    files = {}
    for file in Path(runs, "train").glob(f"*/*/fold*/{name}"):
        if re.fullmatch(r"fold(0|[1-9][0-9]*)", file.parent.name):
            files.setdefault(file.parts[-4:-2], {})[int(file.parent.name[4:])] = file
    return {run: dict(sorted(files[run].items())) for run in run_order(files)}


def read_predictions(file):
    """Predictions of a predictions.csv, whatever its columns' order; ValueError for an invalid file."""
    text = ("path", "label", "prediction")
    with error_context(file):
        content = Path(file).read_bytes()
        if not content.endswith(b"\n"):
            raise ValueError("ends in the middle of a row")
        table = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(text, str), **CSV)
        classes = class_order([column[2:] for column in table.columns[3:]])
        if table.empty or not classes or set(table.columns) != {*text, *("p_" + name for name in classes)}:
            raise ValueError("is no table of path,label,prediction,p_<CLASS>...")
        labels, predictions = (pd.Index(classes).get_indexer(table[key]) for key in text[1:])
        p = table[["p_" + name for name in classes]].to_numpy(float)
        valid = (p >= 0).all(1) & (abs(p.sum(1) - 1) < 0.001)
        valid &= p[np.arange(len(p)), predictions] > p.max(1) - 1e-5
        problems = {
            "appears more than once": table.path.duplicated(),
            "has a class that is not in the header": np.minimum(labels, predictions) < 0,
            "has probabilities that don't add up to 1 or don't fit the prediction": ~valid,
        }
        for reason, rows in problems.items():
            if rows.any():
                raise ValueError(f"{table.path.iloc[rows.argmax()]!r} {reason}")
        return Predictions(table.path.tolist(), labels, predictions, p, classes)


def read_split(file):
    """DataFrame label, fold0, fold1, ... (train, val or test) of a split.csv, by path; ValueError."""
    with error_context(file):
        table = pd.read_csv(file, dtype=str, **CSV)
        folds = [f"fold{k}" for k in range(len(table.columns) - 2)]
        if not folds or list(table) != ["path", "label", *folds] or table.path.duplicated().any():
            raise ValueError("is no table of path,label,fold0,fold1,... with each path once")
        if not table[folds].isin(("train", "val", "test")).all(axis=None):
            raise ValueError("has folds other than train, val and test")
        return table.set_index("path")


def read_overlaps(file, split):
    """bool DataFrame [N, folds]: test images that overlap with a training image of their fold; a sentence.

    Validation images don't count: they chose the epoch, but no weight was fitted to them. ValueError.
    """
    with error_context(file):
        pairs = pd.read_csv(file, dtype=str, usecols=["first", "second"], **CSV)
    in_split = pairs[pairs.isin(split.index).all(axis=1)]
    first, second = (split.index.get_indexer(in_split[column]) for column in ("first", "second"))
    parts = split.drop(columns="label")
    trained, tested, shared = (parts == "train").to_numpy(), parts == "test", np.zeros(parts.shape, bool)
    np.logical_or.at(shared, first, trained[second])
    np.logical_or.at(shared, second, trained[first])
    shared = tested & shared
    note = f"{shared.sum().sum():,} of {tested.sum().sum():,} test images share pixels with a training image "
    note += f"of their fold ({len(in_split):,} pairs); the last columns of Table 4 omit them, but don't "
    note += "measure what the overlap does: these may be harder or easier cells."
    if len(pairs) > len(in_split):
        note += f" {len(pairs) - len(in_split):,} pairs are ignored: their images are not in split.csv."
    return shared, note


def group_note(file, split):
    """A sentence on the groups (patients, say) that a groups.csv puts the test images into; ValueError."""
    with error_context(file):
        table = pd.read_csv(file, dtype=str, usecols=["path", "group"], **CSV)
        group = table.set_index("path").group.reindex(split.index)
    tested, shared, parts = set(), 0, split.drop(columns="label")
    for part in parts.to_numpy().T:
        in_test = group[part == "test"].dropna()
        tested |= set(in_test)
        shared += in_test.isin(group[part == "train"].dropna()).sum()
    note = f"The test images are of {len(tested):,} groups ({file.name}; {group.isna().sum():,} images in "
    note += (
        f"none); {shared:,} of them have an image of their group in training. Intervals over images would "
    )
    return note + "be too narrow, since images of a group resemble each other."


def read_study(runs, name="predictions.csv"):
    """Study of all finished runs; ValueError if split.csv, overlaps.csv or groups.csv is invalid."""
    split = shared = overlaps = groups = None
    classes, study, problems, left_out, empty, tested = [], {}, [], set(), set(), {}
    files = [Path(runs, f"{what}.csv") for what in ("split", "overlaps", "groups")]
    if files[0].exists():
        split = read_split(files[0])
        shared, overlaps = read_overlaps(files[1], split) if files[1].exists() else (None, None)
        groups = group_note(files[2], split) if files[2].exists() else None
    for run, folds in find_runs(runs, name).items():
        for k, file in folds.items():
            try:
                fold, classes = read_fold(file, k, classes, split, shared)
            except ValueError as error:
                problems.append(str(error))
                continue
            study.setdefault(run, {})[k] = fold
            left_out |= {path for path, _ in fold.config.get("left_out") or []}
            images = fold.confusion.sum(1)
            empty |= {(k, c) for c in np.flatnonzero(images == 0)}
            tested[run] = tested.get(run, 0) + images
    images = max(tested.values(), key=sum, default=np.zeros(0, int))
    if split is not None:
        counts = split.label.drop(list(left_out), errors="ignore").value_counts()
        images = counts.reindex(classes, fill_value=0).to_numpy()
    notes = list(filter(None, [overlaps, groups, setting_note(study)]))
    for k, c in sorted(empty):
        notes.append(f"Fold {k} has no test image of {printable(classes[c])}: left out of that class's mean.")
    return Study(classes, images, study, problems, notes, split, overlaps, groups)


def read_fold(file, k, classes, split, shared):
    """Fold k of a run and its classes; ValueError if these are not `classes`, or the split contradicts it."""
    tested, column, config, no_overlap = read_predictions(file), f"fold{k}", {}, None
    n, expected = len(tested.classes), len(tested.paths)
    with contextlib.suppress(OSError, ValueError, TypeError):  # less is checked without it
        config = dict(json.loads(file.with_name("config.json").read_text(encoding="utf-8")))
    train_images = config.get("train_images", np.nan)
    with error_context(file):
        if classes and tested.classes != classes:
            raise ValueError(f"its {n} classes are not the {len(classes)} of files before it")
        if split is not None:
            rows = split.reindex(tested.paths)
            differs = rows.label != np.array(tested.classes, object)[tested.labels]
            differs |= rows.get(column) != "test"
            if differs.any():
                where = f"in the test part of {column} with this label, e.g. {differs.idxmax()!r}"
                raise ValueError(f"{differs.sum()} images are not {where}")
            expected, train_images = ((split[column] == part).sum() for part in ("test", "train"))
        expected = config.get("test_images", expected)  # fewer than the split's if some can't be read
        if len(tested.paths) != expected:
            raise ValueError(f"has {len(tested.paths)} rows for {expected} test images")
    confusion = count_confusion(tested.labels, tested.predictions, n)
    if shared is not None:
        alone = ~shared[column].loc[tested.paths].to_numpy()
        no_overlap = count_confusion(tested.labels[alone], tested.predictions[alone], n)
    scores, ece = confusion_scores(confusion), calibration_error(tested)
    return Fold(confusion, scores, float(train_images), no_overlap, file, config, ece), tested.classes


def setting_note(runs):
    """A sentence on the settings that folds or rows should share but don't, or ""."""
    rows = []
    for run, folds in runs.items():
        for k, fold in folds.items():
            rows.append({key: fold.config.get(key) for key in SETTINGS})
            rows[-1][f"lr of {'/'.join(run)}"] = fold.config.get("lr")
            rows[-1][f"split of fold {k}"] = fold.config.get("split")
    names = ", ".join(key for key, values in pd.DataFrame(rows).items() if values.nunique() > 1)
    return names and f"Folds or rows used different settings, so tests may not hold: {names}."


# ---------------------------------------------------------------- scores
def count_confusion(labels, predictions, n_classes):
    """int64 [C,C]: confusion matrix of class numbers; rows are labels."""
    counts = np.bincount(np.asarray(labels) * n_classes + predictions, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)


def confusion_scores(confusion):
    """Precision, recall, F1 [3,C] of a confusion matrix, rows are labels; NaN for a class without images."""
    images, predicted = confusion.sum(1), confusion.sum(0)
    totals = np.stack([predicted, images, (images + predicted) / 2])
    return np.where(images > 0, np.diag(confusion) / np.maximum(totals, 1), np.nan)


def per_class_scores(labels, predictions, n_classes):
    """Precision, recall, F1 [3,C]: 0 for a class never predicted, NaN for one without images in labels."""
    return confusion_scores(count_confusion(labels, predictions, n_classes))


def calibration_error(predictions, bins=15):
    """ECE (Guo et al. 2017): mean distance of confidence and share right, over equal bins (low, high]."""
    confidence, right = predictions.probabilities.max(1), predictions.labels == predictions.predictions
    place = np.ceil(confidence.clip(0, 1) * bins).astype(int)
    return abs(np.bincount(place, confidence - right)).sum() / len(right)


def moments(values):
    """Mean and sample std (ddof=1) over axis 0 without NaNs; NaN where none or fewer than two remain."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NaNs alone
        return np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)


def macro_f1(folds):
    """float64 [F] of Folds: mean F1 over the classes that each fold's test set holds.

    Where these differ between folds, all are shifted by the same, so that their mean is that of Table 4.
    """
    f1 = np.array([fold.scores[2] for fold in folds])
    means = moments(f1.T)[0]
    return means - means.mean() + moments(moments(f1)[0])[0]


def accuracy(confusions):
    """Mean and sample std over confusion matrices of the share that is right."""
    return moments([np.trace(confusion) / (confusion.sum() or np.nan) for confusion in confusions])


def table4_rows(study):
    """One dict a run, keys as in table4.csv; means over classes of Table 5's means and stds, as printed."""
    rows = []
    for (model, init), folds in study.runs.items():
        folds = list(folds.values())
        mean, std = moments([fold.scores for fold in folds])
        row = {"model": model, "init": init, "folds": len(folds)}
        row |= zip(COLUMNS, moments(np.stack([mean, std], 1).reshape(6, -1).T)[0])
        row["accuracy_mean"], row["accuracy_std"] = accuracy([fold.confusion for fold in folds])
        row["f1_fold_std"] = moments(macro_f1(folds))[1]
        row["f1_common"] = moments(mean[2, study.images >= COMMON])[0]
        alone = [fold.no_overlap for fold in folds if fold.no_overlap is not None]
        if alone:
            f1 = moments([confusion_scores(confusion)[2] for confusion in alone])[0]
            row["f1_no_overlap"], row["accuracy_no_overlap"] = moments(f1)[0], accuracy(alone)[0]
        rows.append(row)
    return rows


def table5_rows(study, model, init):
    """One dict a class, keys as in table5_<model>_<init>.csv; the recall's interval is corrected_t_test's."""
    folds = list(study.runs[model, init].values())
    scores, rows = np.array([fold.scores for fold in folds]), []
    for c, (name, images) in enumerate(zip(study.classes, study.images)):
        row = {"class": name, "images": images}
        row |= zip(COLUMNS, np.transpose(moments(scores[..., c])).flat)
        recall = scores[np.isfinite(scores[:, 1, c]), 1, c]
        ends = corrected_t_test(recall, split_ratio(folds))[1:3] if len(recall) else (np.nan, np.nan)
        row["recall_low"], row["recall_high"] = np.clip(ends, 0, 1)
        rows.append(row)
    return rows


def mean_confusion(folds):
    """float64 [C,C]: confusion matrices with rows summing to 1, mean over Folds with the class (Fig. 4)."""
    counts = np.array([fold.confusion for fold in folds], float)
    images = counts.sum(2, keepdims=True)
    return moments(counts / np.where(images > 0, images, np.nan))[0]


def drawable(names):
    """Names as a picture can show them, escaped and cut, or numbers where the font lacks a character."""
    glyphs = font_manager.get_font(font_manager.findfont(None)).get_charmap().keys()
    texts = [repr(name)[1:-1][:40] for name in names]
    return [text if glyphs >= set(map(ord, text)) else f"class {i}" for i, text in enumerate(texts, 1)]


def draw_confusion(matrix, images, classes, title):
    """PNG bytes of Fig. 4: the matrix [C,C] with its numbers, beside it each class's images, log scale."""
    n, names, step = len(classes), drawable(classes), -(-len(classes) // MOST_DRAWN)
    label, rows = 0.6 + 0.09 * max(map(len, names)), min(n, MOST_DRAWN)  # inches; a layout engine is slow
    width, height = label + 0.44 * rows + 2.6, label + 0.36 * rows + 0.4
    figure, bottom, high = Figure(figsize=(width, height)), label / height, 0.36 * rows / height
    cells = figure.add_axes((label / width, bottom, 0.44 * rows / width, high))
    bars = figure.add_axes((1 - 2.3 / width, bottom, 2.1 / width, high), sharey=cells)
    bars.tick_params(labelleft=False)
    cells.imshow(np.nan_to_num(matrix), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    drawn_bars = bars.barh(range(n), images, color="tab:gray")
    if step == 1:
        bars.bar_label(drawn_bars, fontsize=8, padding=2)
        for i, j in zip(*np.nonzero(np.nan_to_num(matrix) >= 0.005)):
            colour = "white" if matrix[i, j] > 0.715 else "black"  # a contrast of at least 4.5 : 1
            cells.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    cells.set_xticks(range(0, n, step), names[::step], rotation=90, parse_math=False)
    cells.set_yticks(range(0, n, step), names[::step], parse_math=False)
    cells.set(xlabel="Predicted class", ylabel="True class")
    size = min(12, 115 * width / (len(title) + 1))
    figure.suptitle(title, y=1 - 0.2 / height, va="center", parse_math=False, fontsize=size)
    bars.set(xscale="log", xlabel="Images", xlim=(0.8, 9 * max(images)))
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


# ---------------------------------------------------------------- significance tests
def corrected_t_test(differences, ratio):
    """Mean, ends of its interval, two-sided p, of the differences [..., k] of k folds.

    Nadeau and Bengio (2003): variance s² (1/k + ratio), ratio = test images / training images, k - 1 degrees
    of freedom. NaN, apart from the mean, for fewer than two folds or no variance.
    """
    k, mean = np.shape(differences)[-1], np.mean(differences, -1)
    variance = np.var(differences, -1, ddof=1) if k > 1 else np.zeros_like(mean)
    error = np.sqrt(np.where(variance > 1e-20, variance, np.nan) * (1 / k + ratio))  # less is rounding
    half = special.stdtrit(k - 1, 1 - LEVEL / 2) * error
    return mean, mean - half, mean + half, 2 * special.stdtr(k - 1, -abs(mean) / error)


def holm(p):
    """Holm's step-down adjusted p-values [m]; NaN stays NaN and is not counted."""
    p = pd.Series(p, dtype=float)
    steps = p.sort_values() * np.arange(p.count(), p.count() - p.size, -1)
    return steps.cummax().clip(upper=1).sort_index().to_numpy()


def wilson(correct, total):
    """Ends of Wilson's score interval of proportions; NaN for a total of 0."""
    z, n = special.ndtri(1 - LEVEL / 2), np.where(np.asarray(total) > 0, total, np.nan)
    half = z * np.sqrt(correct * (n - correct) / n + z * z / 4)
    return (correct + z * z / 2 - half) / (n + z * z), (correct + z * z / 2 + half) / (n + z * z)


def best_run(table4):
    """(model, init) of the highest F1 among the rows with the most folds."""
    row = max(table4, key=lambda row: (row["folds"], row["f1_mean"]))
    return row["model"], row["init"]


def split_ratio(folds):
    """Test images / training images of Folds; the paper's where these are unknown."""
    ratio = sum(fold.confusion.sum() for fold in folds) / sum(fold.train_images for fold in folds)
    return PAPER_RATIO if np.isnan(ratio) else ratio


def comparison_rows(study, table4):
    """comparisons.csv, DataFrame: macro F1 against the best row and against ImageNet, in the shared folds.

    With test-time augmentation also against the same networks without it (family plain).
    """
    rows, best = [], best_run(table4)
    for family, run in itertools.product(("best", "imagenet", "plain"), study.runs):
        against = {"best": best, "imagenet": (run[0], "imagenet"), "plain": run}[family]
        others = (study.plain if family == "plain" else study.runs).get(against, {})
        shared = [k for k in study.runs[run] if k in others]
        if shared and (run != against or family == "plain"):
            folds, others = [study.runs[run][k] for k in shared], [others[k] for k in shared]
            test = corrected_t_test(macro_f1(folds) - macro_f1(others), split_ratio(folds))
            rows.append((family, *run, *against, len(shared), *test, np.nan))
    table = pd.DataFrame(rows, columns=COMPARISON)
    for _, rows in table.groupby("family"):
        table.loc[rows.index, "p_holm"] = holm(rows.p)
    return table


def marks(table4, comparisons):
    """{(model, init): "*" best, "=" not significantly different, "" worse, ">" better, "?" not testable}."""
    signs = {(row["model"], row["init"]): "?" for row in table4} | {best_run(table4): "*"}
    for row in comparisons[comparisons.family == "best"].dropna(subset="p").itertuples():
        signs[row.model, row.init] = "=" if row.p_holm >= LEVEL else ">" if row.difference > 0 else ""
    return signs


def tta_statements(study, comparisons):
    """Yield a sentence a run on test-time augmentation: macro F1 and ECE of the folds with and without it."""
    for row in comparisons[comparisons.family == "plain"].itertuples():
        folds, plain = study.runs[row.model, row.init], study.plain[row.model, row.init]
        before, after = np.mean([(plain[k].ece, folds[k].ece) for k in folds if k in plain], 0)
        interval = f"{row.low:+.3f} to {row.high:+.3f}, p {row.p_holm:.2g} by Holm"
        test = "not testable" if np.isnan(row.p) else interval
        line = f"{' '.join(paper_names(row.model, row.init))}, mean of eight views against one: macro F1 "
        line += f"{row.difference:+.3f} ({test}), ECE (calibration) {before:.3f} without and "
        yield f"{line}{after:.3f} with."


def statements(study, comparisons):
    """The sentences that belong below Table 4, list of str."""
    spread = "± is the mean over classes of the std over folds (ddof = 1), as in the paper; f1_fold_std is "
    spread += "the std of macro F1"
    if max(map(len, study.runs.values())) == 1:
        spread = "A single fold has no ±, no interval and no test between rows"
    lines = [f"{spread}; f1_common is over the classes of at least {COMMON} images."]
    lines += tta_statements(study, comparisons)
    tested = comparisons.dropna(subset="p")
    best, imagenet = (tested[tested.family == family] for family in ("best", "imagenet"))
    if len(best):
        line = "* best F1 of the rows with the most folds; = not significantly different from the best; > "
        line += "significantly better, in fewer folds; ? not testable (corrected resampled t-test of macro "
        lines.append(f"{line}F1 over the folds, Holm over {len(best)} rows, level {LEVEL}).")
    if len(imagenet):
        rows = imagenet[imagenet.p_holm < LEVEL].itertuples()
        names = [f"{' '.join(paper_names(row.model, row.init))} {row.difference:+.3f}" for row in rows]
        line = f"Significantly different from ImageNet of the same model (Holm over {len(imagenet)}): "
        lines.append(f"{line}{', '.join(names) or 'none'}.")
    if len(comparisons):
        line = (
            "The p-values hold for each row's one pre-training and one learning rate, and don't correct for "
        )
        lines.append(f"{line}choosing the best by the same scores.")
    line = (
        "Unless the split keeps patients apart, scores and intervals are of further cells of these patients, "
    )
    return [*lines, f"{line}and too high for those of new ones.", *study.notes]


# ---------------------------------------------------------------- text
def printable(text):
    """A name on one line, with escapes for bytes that are no text."""
    return repr(text)[1:-1]


def paper_names(model, init):
    """[model, init] as the paper prints them."""
    return [printable(MODELS.get(model, model)), printable(INITS.get(init, init))]


def mean_std(mean, std=np.nan):
    """'0.787 ± 0.060'; '0.787' without a std; '' without a mean."""
    return "" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def aligned(rows):
    """Rows of str cells, the header first, as aligned text that is Markdown too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


def text_rows(rows, published=()):
    """Rows as dicts of text, names in full; published: rows by (model, init) or class, printed below ours."""
    names = MODELS | INITS | {key: f"{name} ({key})" for key, name in CLASSES.items()}
    published, table = dict(published), []
    for row in rows:
        cells, paper = {}, published.get(row.get("class", (row.get("model"), row.get("init"))), {})
        for key, value in row.items():
            name, std = key.removesuffix("_mean"), f"{key.removesuffix('mean')}std"
            if key.endswith("std") and f"{key[:-3]}mean" in row:
                continue
            cells[name] = printable(names.get(value, str(value)))
            if isinstance(value, float):
                cells[name] = mean_std(value, row.get(std, np.nan))
            if std in paper:
                cells[name] += f"\npaper {mean_std(paper[key], paper[std])}"
        table.append(cells)
    return table


def table_text(rows):
    """Rows of Table 4 or 5 as Markdown."""
    table = text_rows(rows)
    return aligned([table[0], *(cells.values() for cells in table)])


def read_table4(file):
    """{(model, init): {"precision_mean": float, ..., "f1_std": float}} of a table4.csv; ValueError."""
    with error_context(file):
        table = pd.read_csv(file, dtype=str, **CSV)
        if table.empty or not {"model", "init", *COLUMNS} <= set(table):
            raise ValueError("is no table4.csv (model,init,precision_mean,...)")
        table[COLUMNS] = table[COLUMNS].replace("", "nan").astype(float)
        return table.set_index(["model", "init"]).to_dict("index")


def compare_text(table4, published):
    """Our means, those of read_table4 and the differences, as aligned text; none from a quoted row."""
    ours = {(row["model"], row["init"]): row for row in table4}
    rows = ["model init precision theirs diff. recall theirs diff. f1 theirs diff.".split()]
    for run in run_order({*ours, *published}):
        row, other, cells = ours.get(run, {}), published.get(run, {}), paper_names(*run)
        quoted = run[0] == "resnext50_32x4d" and other and "folds" not in other  # folds: of our own files
        for key in COLUMNS[::2]:
            mean, other_mean = row.get(key, np.nan), other.get(key, np.nan)
            difference = "" if np.isnan(mean - other_mean) else f"{mean - other_mean:+.3f}"
            cells += [mean_std(mean), mean_std(other_mean), "quoted" if quoted else difference]
        rows.append(cells)
    note = "\nquoted: from Matek et al. (2021), who trained and averaged differently; no difference.\n"
    text = aligned(rows)
    return text + note * ("quoted" in text)


def write_tables(study, results):
    """Write everything into the folder `results`; returns table4_rows and Table 4's text."""
    table4 = table4_rows(study)
    comparisons = comparison_rows(study, table4)
    signs = marks(table4, comparisons)
    text = table_text([row | {"best": signs[row["model"], row["init"]]} for row in table4])
    text += "".join(f"\n- {line}" for line in statements(study, comparisons)) + "\n"
    write_csv(results / "table4.csv", table4)
    write_file(results / "table4.md", text)
    if len(comparisons):
        write_csv(results / "comparisons.csv", comparisons)
    for run, folds in study.runs.items():
        name, table5, matrix = "_".join(run), table5_rows(study, *run), mean_confusion(folds.values())
        write_csv(results / f"table5_{name}.csv", table5)
        write_file(results / f"table5_{name}.md", table_text(table5))
        table = pd.DataFrame(matrix, study.classes, study.classes).rename_axis("class")
        write_csv(results / f"confusion_{name}.csv", table.reset_index(allow_duplicates=True))
        title = f"{', '.join(paper_names(*run))} (mean of {len(folds)} fold{'s' * (len(folds) > 1)})"
        png = draw_confusion(matrix, study.images, study.classes, title)
        write_file(results / f"confusion_{name}.png", png)
    return table4, text


def prepare_terminal():
    """Ctrl-C and `| head` end a script without a traceback; what the terminal can't show is escaped."""
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):  # Windows has no SIGPIPE
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")


def main():
    prepare_terminal()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs", help="folder that holds train/ and split.csv")
    parser.add_argument("--out", type=Path, help="folder for the tables; default: results in --runs")
    parser.add_argument("--compare", metavar="TABLE4.CSV", help="print these numbers beside ours")
    parser.add_argument("--tta", action="store_true", help="of predictions_tta.csv, into results/tta")
    args = parser.parse_args()
    name = "predictions_tta.csv" if args.tta else "predictions.csv"
    try:
        published = read_table4(args.compare) if args.compare else None
        study = read_study(args.runs, name)
        if args.tta:
            study = study._replace(plain=read_study(args.runs).runs)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for problem in study.problems:
        print(problem, file=sys.stderr)
    if not study.runs:
        raise SystemExit(f"{args.runs}: no finished run in train/<model>/<init>/fold<k>/{name}")
    results = args.out or args.runs / "results" / ("tta" if args.tta else "")
    table4, text = write_tables(study, results)
    print(text)
    if published:
        print(compare_text(table4, published))
    sys.exit(1 if study.problems else 0)


if __name__ == "__main__":
    main()
