"""One page to open in the morning: how far the study is, its tables, how sure it is, doubtful labels.

    python report.py                                   writes runs/results/index.html, of Table 4's best row
    python report.py --model vit_l_32 --init imagenet  the same, of another row
    python report.py --doubt vit_l_32/cd resnet152/cd  doubtful labels by the mean of several rows

The page, report.html filled in, is one file that needs no network. Beside it: label_issues.csv (doubtful
labels), scores_, reliability_, coverage_ and clinic_<model>_<init>.csv. What rests on val_predictions.csv,
log.csv, lr_range.csv or gradcam_*.png is left out without them, and the page says so.
"""
import argparse
import base64
import csv
import datetime
import io
import itertools
import json
import pathlib
import signal
from collections import Counter, namedtuple

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from scipy import optimize, special
from sklearn.metrics import average_precision_score

import evaluate

HERE = pathlib.Path(__file__).parent
BINS = 15  # of equal width, in the reliability diagram (Guo et al. 2017)
ENOUGH = 50  # images that a class needs for its labels, or suggestions of it, to be flagged
HANDED_OVER = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of the images that go to a human
CLINIC = ("BLA", "FGC", "HAC", "PEB")  # blasts, faggot cells, hairy cells, proerythroblasts: not to be missed
SPECIFICITIES = (0.99, 0.999)
PAPER_RATIO = 0.20 / 0.64  # test to training images, for runs that don't tell
PLAIN = ("as trained", "prior-corrected")  # each also with a temperature: "as trained, temperature"
SCORES = ("macro precision", "macro recall (balanced accuracy)", "macro F1", "macro F1 of the common classes",
          "weighted precision", "accuracy (weighted recall)", "weighted F1", "top-2 accuracy")
TINY = np.finfo(np.float32).tiny  # probabilities come from float32: a zero was something below this
HEATMAPS, CELLS = 8, 24  # pictures of gradcam.py on the page; doubtful labels before the rest folds away
SAME_CELL = 40 / 250  # of an image's side: displaced by less, two crops of a slide show the same cell
MARKS = {"*": "the best", "=": "not significantly different", "": "significantly different",
         "?": "not testable"}
Fold = namedtuple("Fold", "labels probabilities val_labels val_probabilities temperatures")


# ---------------------------------------------------------------- how sure is it
def posterior(probabilities, frequencies=None, temperature=1.0):
    """Probabilities [N,C] with the logits divided by temperature, then corrected for natural frequencies [C].

    The sampler showed all classes equally often, so by Bayes p_c becomes p_c * pi_c / (1/C), over their sum.
    """
    logits = np.log(np.maximum(probabilities, TINY)) / temperature
    prior = 0 if frequencies is None else np.log(np.maximum(frequencies, TINY))
    return special.softmax(logits + prior, axis=1)


def fit_temperature(probabilities, labels, frequencies=None):
    """The temperature in 0.05..20 of least negative log-likelihood (Guo et al. 2017), for posterior."""
    def loss(inverse):  # convex in 1/T
        own = posterior(probabilities, frequencies, 1 / inverse)[np.arange(len(labels)), labels]
        return -np.log(np.maximum(own, np.finfo(float).tiny)).mean()
    return 1 / optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-5}).x


def reliability(confidence, right, bins=BINS):
    """DataFrame low, high, images, confidence, share_right, ece of bins (low, high]; NaN in empty ones.

    ece: the mean gap between confidence and share right, weighted by images; the same in every row.
    """
    edges = np.arange(bins + 1) / bins
    table = pd.DataFrame({"confidence": np.clip(confidence, 0, 1), "right": right})
    groups = table.groupby(pd.cut(table.confidence, edges, include_lowest=True), observed=False)
    table = groups.agg(images=("right", "size"), confidence=("confidence", "mean"),
                       share_right=("right", "mean"))
    gap = (table.images * abs(table.confidence - table.share_right)).sum() / table.images.sum()
    return table.reset_index(drop=True).assign(low=edges[:-1], high=edges[1:], ece=gap)


def sensitivity_at(scores, positive, specificity):
    """Highest sensitivity of at least this specificity, and the threshold that a score must exceed for it."""
    negatives = np.sort(scores[~positive])[::-1]
    allowed = int((1 - specificity) * len(negatives) + 1e-9)
    threshold = negatives[allowed] if allowed < len(negatives) else -np.inf
    return (scores[positive] > threshold).mean() if positive.any() else np.nan, threshold


def tolerant_scores(confusion, accepted):
    """Precision and recall, each [C], that take a prediction for right where accepted [label, prediction].

    confusion [C,C]: counts, rows are labels (Matek et al. 2021). 0 if never predicted, NaN without images.
    """
    right = confusion * (accepted | np.eye(len(confusion), dtype=bool))
    images, predicted = confusion.sum(1), confusion.sum(0)
    some = np.where(images > 0, 1.0, np.nan)
    return some * right.sum(0) / np.maximum(predicted, 1), some * right.sum(1) / np.maximum(images, 1)


def read_pairs(file, classes):
    """bool [C,C] of a CSV label,accepted: predictions (columns) forgiven for a label (rows); SystemExit.

    paper/tolerant_pairs.csv is our reading of Matek et al. (2021), Table 1, which differs for these classes:
    consecutive stages of a line of cells, hairy cells and lymphocytes.
    """
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        pairs = set(zip(table["label"], table["accepted"]))
    except (OSError, KeyError, ValueError):
        raise SystemExit(f"{file}: no CSV with columns label,accepted; name another with --pairs") from None
    return np.array([[(label, prediction) in pairs for prediction in classes] for label in classes])


# ---------------------------------------------------------------- which labels
def confident_joint(labels, probabilities):
    """Confident learning on one fold: the class [N] that each image counts to, and whether off the diagonal.

    It counts to the most probable class of those whose threshold it reaches, a class's mean probability over
    the images labelled so (Northcutt et al. 2021; cleanlab's filter 'confident_learning').
    """
    own = probabilities[np.arange(len(labels)), labels]
    images = np.bincount(labels, minlength=probabilities.shape[1])
    thresholds = np.where(images > 0, np.bincount(labels, own, len(images)) / np.maximum(images, 1), np.inf)
    above = probabilities >= thresholds - 1e-6
    counted = np.where(above, probabilities, -1).argmax(1)
    return counted, above.any(1) & (counted != labels) & (probabilities.max(1) > own + 1e-6)


def doubtful(labels, probabilities, enough):
    """Suggested class [N], score [N], flag [N] of a fold's labels; enough [C]: classes that may be flagged.

    Score: log10 of how many times as probable the suggestion is as the label. Confident learning says how
    many labels are wrong, the score which: in simulations its choice had the higher precision and recall.
    """
    rows, others = np.arange(len(labels)), probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(1)
    odds = np.maximum(others[rows, suggested], TINY) / np.maximum(probabilities[rows, labels], TINY)
    score = np.log10(odds)
    counted, wrong = confident_joint(labels, probabilities)
    number = (wrong & enough[labels] & enough[counted]).sum()
    candidates = np.flatnonzero((score > 0) & enough[labels] & enough[suggested])
    flagged = np.zeros(len(labels), bool)
    flagged[candidates[np.argsort(-score[candidates], kind="stable")[:number]]] = True
    return suggested, score, flagged


def doubtful_rows(study, tested, contradicted={}):
    """Rows of label_issues.csv, the most doubtful first: images with a more probable class than the label.

    By prior-corrected probabilities, averaged over the rows of Table 4 in tested {(model, init): {fold:
    Predictions}}, on the folds that all have. Of an image tested more than once the most doubtful row.
    contradicted {path: (label of the same cell elsewhere, why it is the same)} are flagged and come first.
    """
    classes, enough, rows = study.classes, study.images >= ENOUGH, {}
    for fold in sorted(set.intersection(*map(set, tested.values()))):
        p, paths = [], None
        for run, folds in tested.items():
            order, before = np.argsort(folds[fold].paths), paths
            paths, labels = np.array(folds[fold].paths)[order].tolist(), folds[fold].labels[order]
            if before not in (None, paths):
                raise SystemExit(f"fold {fold}: --doubt names rows that tested different images")
            p.append(posterior(folds[fold].probabilities, frequencies(study, run, fold))[order])
        p = np.mean(p, axis=0)
        suggested, score, flagged = doubtful(labels, p, enough)
        for i, path in enumerate(paths):
            a, b, kind = labels[i], suggested[i], "prediction"
            flag = "yes" if flagged[i] else "no" if enough[a] and enough[b] else "rare class"
            if path in contradicted:
                other, kind = contradicted[path]
                b, flag = classes.index(other), "yes"
            elif score[i] <= 0:
                continue
            row = {"path": path, "label": classes[a], "suggested": classes[b], "flagged": flag, "kind": kind,
                   "score": np.log10(max(p[i, b], TINY) / max(p[i, a], TINY)), "fold": fold,
                   "p_label": p[i, a], "p_suggested": p[i, b]}
            rows[path] = max(rows.get(path, row), row, key=lambda row: row["score"])
    return sorted(rows.values(), key=lambda row: (row["kind"] == "prediction", -row["score"]))


# ---------------------------------------------------------------- one row of Table 4
def frequencies(study, run, fold):
    """Natural frequencies [C]: images outside the fold's test part (or all, if there are no others)."""
    outside = study.images - study.runs[run][fold].confusion.sum(1)
    return np.maximum(outside if outside.any() else study.images, 0.5)


def read_folds(study, run, files, tested):
    """([Fold] of one row of Table 4, why validation is missing or None)."""
    folds, missing, validated = [], None, {}
    try:
        for fold in tested:
            validated[fold] = evaluate.read_predictions(files[fold].with_name("val_predictions.csv"))
    except ValueError as error:
        missing, validated = str(error), {}
    for fold, test in tested.items():
        val, p, val_p, temperatures = validated.get(fold), {}, {}, {}
        for name, prior in zip(PLAIN, (None, frequencies(study, run, fold))):
            p[name] = posterior(test.probabilities, prior)
            if val:
                temperature = fit_temperature(val.probabilities, val.labels, prior)
                temperatures[f"{name}, temperature"] = temperature
                p[f"{name}, temperature"] = posterior(test.probabilities, prior, temperature)
                val_p[name] = posterior(val.probabilities, prior)
        folds.append(Fold(test.labels, p, val and val.labels, val_p, temperatures))
    return folds, missing


def score_rows(folds, images):
    """Rows score, variant, mean, std over the folds, of SCORES."""
    rows = []
    for variant, fold in itertools.product(PLAIN, folds):
        p, share = fold.probabilities[variant], np.bincount(fold.labels, minlength=len(images))
        each = np.array(evaluate.per_class_scores(fold.labels, p.argmax(1), len(images)))
        common = evaluate.moments(each[2][images >= evaluate.COMMON])[0]
        weighted = np.nansum(each * (share / share.sum()), axis=1)
        top2 = (np.argsort(-p, axis=1)[:, :2] == fold.labels[:, None]).any(1).mean()
        values = *evaluate.moments(each.T)[0], common, *weighted, top2
        rows += [{"score": name, "variant": variant, "value": value} for name, value in zip(SCORES, values)]
    groups = pd.DataFrame(rows).groupby(["score", "variant"], sort=False).value
    return groups.agg(["mean", "std"]).reset_index().to_dict("records")


def calibration_rows(folds, study):
    """Rows variant, class, bin, ECE of all test images: top label (class ""), then each common class."""
    labels, tables = np.concatenate([fold.labels for fold in folds]), []
    for variant in sorted(folds[0].probabilities):
        p = np.concatenate([fold.probabilities[variant] for fold in folds])
        sure = {"": (p.max(1), p.argmax(1) == labels)}
        for c in np.flatnonzero(study.images >= evaluate.COMMON):
            sure[study.classes[c]] = p[:, c], labels == c
        for name, (confidence, right) in sure.items():
            tables.append(reliability(confidence, right).assign(**{"variant": variant, "class": name}))
    columns = ["variant", "class", "low", "high", "images", "confidence", "share_right", "ece"]
    return pd.concat(tables)[columns].to_dict("records")


def coverage_rows(folds, classes):
    """Rows variant, share planned, handed over, scores of the rest, by validation's thresholds."""
    rows = []
    for variant, share in itertools.product(PLAIN, HANDED_OVER):
        parts = []
        for fold in folds:  # hand over the share of the validation images that is least sure
            sure, p = np.sort(fold.val_probabilities[variant].max(1)), fold.probabilities[variant]
            kept = p.max(1) >= (sure[int(share * len(sure))] if share else 0)
            parts.append((fold.labels, p.argmax(1), kept))
        labels, predictions, kept = map(np.concatenate, zip(*parts))
        recall = evaluate.per_class_scores(labels[kept], predictions[kept], classes)[1]
        rows.append({"variant": variant, "planned": share, "handed_over": 1 - kept.mean(),
                     "accuracy": evaluate.moments((labels == predictions)[kept])[0],
                     "macro_recall": evaluate.moments(recall)[0], "classes_left": (~np.isnan(recall)).sum()})
    return rows


def clinic_rows(folds, classes):
    """Rows class, variant and, against the rest, mean and std of PR-AUC and sensitivity at SPECIFICITIES.

    sensitivity_: off the test images' curve; val_sensitivity_, val_specificity_: with validation's threshold.
    """
    rows = []
    for name, variant in itertools.product([name for name in CLINIC if name in classes], PLAIN):
        c, found = classes.index(name), []
        for fold in folds:
            scores, positive = fold.probabilities[variant][:, c], fold.labels == c
            one = {"pr_auc": average_precision_score(positive, scores) if positive.any() else np.nan}
            for wanted in SPECIFICITIES:
                one[f"sensitivity_{wanted}"] = sensitivity_at(scores, positive, wanted)[0]
                if fold.val_labels is not None:
                    sure = fold.val_probabilities[variant][:, c]
                    above = scores > sensitivity_at(sure, fold.val_labels == c, wanted)[1]
                    one[f"val_sensitivity_{wanted}"] = evaluate.moments(above[positive])[0]
                    one[f"val_specificity_{wanted}"] = evaluate.moments(~above[~positive])[0]
            found.append(one)
        images = sum((fold.labels == c).sum() for fold in folds)
        rows.append({"class": name, "variant": variant, "images": images})
        for key, values in pd.DataFrame(found).items():
            rows[-1] |= {f"{key}_mean": values.mean(), f"{key}_std": values.std()}
    return rows


# ---------------------------------------------------------------- pictures and files
def inline(picture, kind="png"):
    """The src of an <img> that holds these bytes."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def plot(table, by, x, y, *, square=False, marks={}, **settings):
    """The src of an <img>: y against x of a DataFrame, a line for each value of `by`, or one without it.

    square: both axes from 0 to 1, with the diagonal; marks {label: x}; settings: of matplotlib's axes.
    """
    figure, png = Figure(figsize=(4.6, 3.4)), io.BytesIO()
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.83))  # a layout engine would double the time
    styles = itertools.cycle(("o-", "s--", "^-.", "v:"))
    for label, group in pd.DataFrame(table).groupby(by or (lambda row: y), sort=False):
        axes.plot(group[x], group[y], next(styles), label=label, markersize=3.5)
    for label, where in marks.items():
        axes.axvline(where, color="k", linestyle="-" if label.startswith("chosen") else ":", label=label)
    if square:
        axes.axline((0, 0), slope=1, color="k", linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set(**{"xlabel": x.replace("_", " "), "ylabel": y.replace("_", " ")} | settings)
    axes.xaxis.get_major_locator().set_params(**{"integer": True} if x == "epoch" else {})
    axes.legend(fontsize=8)
    figure.savefig(png, dpi=120)
    return inline(png.getvalue())


def small_jpeg(file, side):
    """The src of an <img>: an image file, at most side pixels high and wide; None if it can't be read."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # Pillow's convert would cut off all above 255
                image = image.point(lambda value: value / 256).convert("L")
            image, jpeg = image.convert("RGB"), io.BytesIO()
        image.thumbnail((side, side))
        image.save(jpeg, "jpeg", quality=85)
        return inline(jpeg.getvalue(), "jpeg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_json(file):
    """A run's config.json or measured.json; {} if there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_table(file):
    """A CSV of numbers as a DataFrame; None if there is none that can be read."""
    try:
        return pd.read_csv(file)
    except (OSError, ValueError):
        return None


def progress(runs):
    """Rows network, stage, state of all trainings that have been begun."""
    states = {}
    for folder in sorted([*runs.glob("pretrain/*/*"), *runs.glob("train/*/*/fold*")]):
        log, config = read_table(folder / "log.csv"), read_json(folder / "config.json")
        state = f"at epoch {0 if log is None else len(log)} of {config.get('epochs', '?')}"
        if (folder / "predictions.csv").exists():
            state = "finished"
        if log is not None or config or state == "finished":
            states.setdefault(folder.relative_to(runs).parts[:3], Counter())[state] += 1
    return [{"network, pre-training": title(*run), "stage": stage,
             "state": ", ".join(f"{number} {state}" for state, number in found.items())}
            for (stage, *run), found in states.items()]


def failures(runs):
    """[(log, its last line)] of the jobs of run_all.sh that failed and have not succeeded since."""
    found = []
    for log in sorted(file.with_suffix(".log") for file in runs.glob("logs/*.failed")):
        text = log.read_text(errors="replace").rstrip() if log.exists() else ""
        found.append((log, text.split("\n")[-1][:300] or "it left no log"))
    return found


# ---------------------------------------------------------------- what the page shows
def add_intervals(study, table4, theirs):
    """Add f1_low, f1_high to Table 4, the 95% interval of macro F1 over the folds; returns the axis' ends.

    It counts in that the folds share training images (Nadeau and Bengio 2003). NaN for a single fold.
    """
    ends = []
    for row in table4:
        run = row["model"], row["init"]
        folds = study.runs[run].values()
        ratio = np.mean([fold.confusion.sum() / fold.train_images for fold in folds])
        error = row["f1_fold_std"] * np.sqrt(1 / len(folds) + (PAPER_RATIO if np.isnan(ratio) else ratio))
        half = special.stdtrit(len(folds) - 1, 0.975) * error
        row |= {"f1_low": max(row["f1_mean"] - half, 0.0), "f1_high": min(row["f1_mean"] + half, 1.0)}
        ends += [row["f1_mean"], row["f1_low"], row["f1_high"], theirs.get(run, row)["f1_mean"]]
    return np.floor(10 * np.nanmin(ends)) / 10, np.ceil(10 * np.nanmax(ends)) / 10


def readable(rows, columns=None, theirs={}):
    """Rows of text: a mean and its std in one cell, the paper's (theirs) below, names in full."""
    names = evaluate.MODELS | evaluate.INITS | {"": "most probable class"}
    names |= {key: f"{name} ({key})" for key, name in evaluate.CLASSES.items()}
    table = []
    for row in rows:
        table.append({})
        paper = theirs.get(row.get("class", (row.get("model"), row.get("init"))), {})
        for key in columns or row:
            value, std = row[key], key.removesuffix("mean") + "std"
            text = number(value, row.get(std, np.nan)) if isinstance(value, float) else str(value)
            if std in paper:
                text += f"\npaper {number(paper[key], paper[std])}"
            if not key.endswith("std") or f"{key[:-3]}mean" not in row:
                table[-1][key.removesuffix("_mean").replace("_", " ")] = names.get(text, text)
    return table


def of_scores(study, run, paper, pairs):
    """Tables 4 and 5 with the paper's numbers, tolerant scores and the confusion matrix."""
    folds, table4, table5 = study.runs[run], evaluate.table4_rows(study), evaluate.table5_rows(study, *run)
    comparisons, matrix = evaluate.comparison_rows(study, table4), evaluate.mean_confusion(folds)
    theirs = evaluate.read_table4(paper / "table4.csv") if paper else {}
    accepted = read_pairs(pairs, study.classes) if pairs else np.eye(len(table5), dtype=bool)
    mean, std = evaluate.moments([tolerant_scores(fold.confusion, accepted) for fold in folds.values()])
    for c, row in enumerate(table5):
        for i, name in enumerate(("tolerant_precision", "tolerant_recall")):
            row |= {f"{name}_mean": mean[i, c], f"{name}_std": std[i, c]}
    off, confused = np.nan_to_num(matrix * (1 - np.eye(len(matrix)))), []
    for i, j in zip(*np.unravel_index(np.argsort(-off, axis=None, kind="stable")[:8], off.shape)):
        if off[i, j]:
            confused.append(f"{off[i, j]:.0%} of {study.classes[i]} as {study.classes[j]}")
    return {"table4": table4, "table5": table5, "signs": evaluate.marks(table4, comparisons),
            "best": evaluate.best_run(table4), "statements": evaluate.statements(study, table4, comparisons),
            "paper4": theirs, "axis": add_intervals(study, table4, theirs),
            "paper5": pd.read_csv(paper / "table5.csv", index_col="class").to_dict("index") if paper else {},
            "confusion": inline(evaluate.draw_confusion(matrix, study.images, study.classes, title(*run))),
            "confused": confused}


def of_probabilities(study, run, files, tested, results):
    """Scores, calibration, coverage and clinic of one row of Table 4; writes each as CSV."""
    folds, missing = read_folds(study, run, files, tested)
    classes = study.classes
    tables = {"scores": score_rows(folds, study.images), "reliability": calibration_rows(folds, study),
              "coverage": [] if missing else coverage_rows(folds, len(classes)),
              "clinic": clinic_rows(folds, classes)}
    for kind, rows in tables.items():
        if rows:
            evaluate.write_csv(results / f"{kind}_{'_'.join(run)}.csv", rows)
    ece = pd.DataFrame(tables["reliability"][::BINS])  # it stands in every row of its bins
    ece = ece.pivot_table(index="class", columns="variant", values="ece", sort=False).reset_index()
    return tables | {"folds": folds, "missing": missing, "ece": ece.to_dict("records"),
                     "tested": sum(len(fold.labels) for fold in folds)}


def of_training(folder, folds, results):
    """Learning curves, range test and heatmaps of the row of Table 4 in this folder."""
    logs = {fold: read_table(folder / f"fold{fold}/log.csv") for fold in folds}
    curves = [log.assign(fold=f"fold {fold}") for fold, log in logs.items() if log is not None]
    measured = read_json(folder / "measured.json")
    rates = {f"tried {rate:.2g}: {score:.3g}": rate for rate, score in measured.get("candidates") or ()}
    rates |= {f"chosen: {measured['lr']:.2g}": measured["lr"]} if "lr" in measured else {}
    return {"curves": pd.concat(curves) if curves else None, "rates": rates,
            "tried": read_table(folder / "lr_range.csv"),
            "heatmaps": sorted(results.glob(f"gradcam_{folder.parent.name}_{folder.name}_*.png"))}


def of_overlaps(runs, fingerprint):
    """Overlaps and exact duplicates of images: counts, and the images of one cell that have two labels.

    twins: (image, fold) tested with a duplicate in training; contradicted: as doubtful_rows takes it.
    """
    paths, labels, parts = evaluate.read_split(runs / "split.csv")
    split = dict(zip(paths, zip(labels, [] if parts is None else parts)))
    scans = [read_json(file) for file in runs.glob("data/*.json")]
    scan = next((scan for scan in scans if scan.get("fingerprint") == fingerprint), {})
    sizes, duplicates = scan.get("sizes") or {"250x250": 1}, scan.get("duplicates") or []
    pairs = [(*pair, "exact duplicate") for group in duplicates for pair in itertools.permutations(group, 2)]
    file, note, contradicted, twins = runs / "overlaps.csv", None, {}, set()
    if file.exists() and split:
        note = evaluate.read_overlaps(file, paths, parts)[1]
        table = pd.read_csv(file, dtype={"first": str, "second": str}, **evaluate.CSV)
        same = np.hypot(table.dx, table.dy) < SAME_CELL * int(max(sizes, key=sizes.get).split("x")[0])
        for first, second in table.loc[same, ["first", "second"]].to_numpy():
            pairs += [(first, second, "same cell"), (second, first, "same cell")]
    for one, other, kind in pairs:
        if one in split and other in split:
            (label, part), (other_label, other_part) = split[one], split[other]
            if label != other_label:
                contradicted[one] = other_label, f"{kind} as {other}"
            if kind == "exact duplicate":
                twins.update((one, k) for k in np.flatnonzero((part == "test") & (other_part == "train")))
    return {"overlaps": note, "duplicates": duplicates, "contradicted": contradicted, "twins": twins,
            "sheet": runs / "results/overlaps.png"}


def of_labels(study, tested, contradicted, config, results, data, number):
    """Doubtful labels by the mean of the rows of Table 4 in tested; writes label_issues.csv."""
    rows = doubtful_rows(study, tested, contradicted)
    columns = ["path", "label", "suggested", "score", "flagged", "fold", "p_label", "p_suggested", "kind"]
    table = [[row[name] for name in columns] for row in rows]
    evaluate.write_csv(results / "label_issues.csv", [columns, *table])
    # the class folders may lie deeper than data (BM as unpacked, crops of a COCO set); config.json knows
    roots = [pathlib.Path(config.get("root") or data), data, *data.glob("*/"), *data.glob("*/*/")]
    for row in rows[:number]:
        row["source"] = next(filter(None, (small_jpeg(root / row["path"], 150) for root in roots)), None)
    return {"doubts": rows, "left_out": config.get("left_out") or [],
            "flagged": sum(row["flagged"] == "yes" for row in rows)}


def title(model, init):
    """A row of Table 4 as the paper prints it."""
    return f"{evaluate.MODELS.get(model, model)}, {evaluate.INITS.get(init, init)}"


def number(mean, std=np.nan):
    """A score as the tables print it, '–' for NaN."""
    return evaluate.mean_std(float(mean), float(std)).replace(" ", "\N{NO-BREAK SPACE}") or "–"


def render(values):
    """report.html filled in, as bytes; a name with bytes that are no text shows a question mark there."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                              undefined=jinja2.StrictUndefined)
    page.globals |= globals()
    template = page.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    return template.render(values).encode("utf-8", "replace")


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="holds train/ and split.csv")
    parser.add_argument("--model", help="network to show in detail; default: the best of Table 4")
    parser.add_argument("--init", help="its pre-training")
    parser.add_argument("--doubt", nargs="+", metavar="MODEL/INIT",
                        help="rows of Table 4 whose mean finds doubtful labels; default: the one shown")
    parser.add_argument("--data", type=pathlib.Path, default="data/bm", help="for pictures of labels")
    parser.add_argument("--pairs", type=pathlib.Path, help="CSV label,accepted of predictions to forgive",
                        default=next(HERE.glob("paper/tolerant_pairs.csv"), None))
    parser.add_argument("--gallery", type=int, default=200, help="doubtful labels to show")
    args = parser.parse_args()
    if not args.runs.is_dir():
        raise SystemExit(f"{args.runs}: no such folder; name the one that train.py wrote with --runs")
    try:
        study, files = evaluate.read_study(args.runs), evaluate.find_runs(args.runs)
    except ValueError as error:  # of split.csv
        raise SystemExit(f"{error}; put the split back that the runs were made with") from None
    results, said = args.runs / "results", "no fold is finished yet"
    values = {"date": datetime.datetime.now(), "shown": None, "left_out": [], "study": study,
              "failed": failures(args.runs), "progress": progress(args.runs)} | vars(args)
    if study.runs:
        rows = [row for row in evaluate.table4_rows(study)
                if args.model in (None, row["model"]) and args.init in (None, row["init"])]
        run = evaluate.best_run(rows) if rows else (args.model or "any network", args.init or "any init")
        doubt = [tuple(name.split("/", 1)) for name in args.doubt or ()] or [run]
        for name in [run, *doubt]:
            if name not in study.runs:
                names = ", ".join(map("/".join, study.runs))
                raise SystemExit(f"no finished fold of {'/'.join(name)}; there are: {names}")
        tested = {name: {fold: evaluate.read_predictions(files[name][fold]) for fold in study.runs[name]}
                  for name in {run, *doubt}}
        known = set(study.classes) == set(evaluate.CLASSES) and (HERE / "paper/table4.csv").exists()
        doubted, folder = {name: tested[name] for name in doubt}, args.runs / "train" / run[0] / run[1]
        config = read_json(files[run][min(tested[run])].with_name("config.json"))
        values |= of_scores(study, run, HERE / "paper" if known else None, args.pairs)
        values |= of_probabilities(study, run, files[run], tested[run], results)
        values |= of_training(folder, tested[run], results)
        values |= of_overlaps(args.runs, config.get("data"))
        values |= of_labels(study, doubted, values["contradicted"], config, results, args.data, args.gallery)
        values |= {"shown": run, "doubt": doubt}
        said = f"{title(*run)}; {values['flagged']} labels to look at again"
    evaluate.write_file(results / "index.html", render(values))
    print(f"{results / 'index.html'}: {said}")
    if study.problems and not study.runs:
        raise SystemExit(f"{study.problems[0]}; it is named on the page, and no other fold is left to show")


if __name__ == "__main__":
    main()
