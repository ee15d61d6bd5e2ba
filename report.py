"""One page to open in the morning: how far the study is, its tables, how sure it is, doubtful labels.

    python report.py                                   writes runs/results/index.html, of Table 4's best row
    python report.py --model vit_l_32 --init imagenet  the same, of another row

The page, report.html filled in, is one file that needs no network; it says what it lacks. Beside it:
label_issues.csv (doubtful labels), scores_, reliability_, coverage_ and clinic_<model>_<init>.csv.
"""

import argparse
import base64
import io
import itertools
import json
import pathlib
import shlex
import time
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
MEANING = {"*": "the best", "": "significantly worse", ">": "significantly better"}  # of evaluate.marks
MEANING |= {"=": "not significantly different", "?": "not testable yet"}
ENOUGH = 50  # images that a class needs for its labels, or suggestions of it, to be flagged
HANDED_OVER = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of the images that go to a human
CLINIC = ("BLA", "FGC", "HAC", "PEB")  # blasts, faggot cells, hairy cells, proerythroblasts: not to be missed
SPECIFICITIES = (0.99, 0.999)
PLAIN = ("as trained", "prior-corrected")  # each also with a temperature: "as trained, temperature"
SCORES = (
    "macro precision, macro recall (balanced accuracy), macro F1, macro F1 of the common classes, "
    "weighted precision, accuracy (weighted recall), weighted F1, top-2 accuracy"
).split(", ")
TINY = np.finfo(np.float32).tiny  # probabilities come from float32: a zero was something below this
GALLERY, UNFOLDED = 200, 24  # doubtful labels on the page; how many of them before the rest folds away
SAME_CELL = 40 / 250  # of an image's side: displaced by less, two crops of a slide show the same cell
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
    """DataFrame low, high, images, confidence, share_right, ece (of all bins) of bins (low, high]."""
    edges = np.arange(bins + 1) / bins
    table = pd.DataFrame({"confidence": np.clip(confidence, 0, 1), "right": right})
    groups = table.groupby(pd.cut(table.confidence, edges, include_lowest=True), observed=False)
    images, means = groups.size().to_numpy(), groups.mean().reset_index(drop=True)
    gap = (images * abs(means.confidence - means.right)).sum() / images.sum()
    limits = {"low": edges[:-1], "high": edges[1:], "images": images}
    return pd.DataFrame(limits | {"confidence": means.confidence, "share_right": means.right, "ece": gap})


def sensitivity_at(scores, positive, specificity):
    """Highest sensitivity of at least this specificity, and the threshold that a score must exceed for it."""
    negatives = np.sort(scores[~positive])[::-1]
    allowed = int((1 - specificity) * len(negatives) + 1e-9)
    threshold = np.append(negatives, -np.inf)[allowed]
    return evaluate.moments(scores[positive] > threshold)[0], threshold


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
    rows, others = np.arange(len(labels)), np.where(np.eye(len(enough))[labels], -1, probabilities)
    suggested = others.argmax(1)
    score = log_ratio(probabilities[rows, suggested], probabilities[rows, labels])
    counted, off_diagonal = confident_joint(labels, probabilities)
    number = (off_diagonal & enough[labels] & enough[counted]).sum()
    candidates = np.flatnonzero((score > 0) & enough[labels] & enough[suggested])
    flagged = np.zeros(len(labels), bool)
    flagged[candidates[np.argsort(-score[candidates], kind="stable")[:number]]] = True
    return suggested, score, flagged


def log_ratio(suggestion, label):
    """Score of a doubtful label: log10 of the ratio of two probabilities [N]."""
    return np.log10(np.maximum(suggestion, TINY) / np.maximum(label, TINY))


def label_issues(study, run, tested, contradicted=()):
    """DataFrame of label_issues.csv, most doubtful first: images with a more probable class than the label.

    By the prior-corrected probabilities of a run's tested {fold: Predictions}. Contradicted
    {path: (label of the same cell elsewhere, why it is the same)} are flagged and come first.
    """
    classes, enough, tables = pd.Index(study.classes), study.images >= ENOUGH, []
    elsewhere = pd.DataFrame.from_dict(dict(contradicted), "index", columns=["suggested", "kind"])
    for fold, predictions in tested.items():
        labels, rows = predictions.labels, np.arange(len(predictions.labels))
        p = posterior(predictions.probabilities, frequencies(study, run, fold))
        suggested, _, flagged = doubtful(labels, p, enough)
        not_flagged = np.where(enough[labels] & enough[suggested], "no", "rare class")
        columns = {"label": classes[labels], "suggested": classes[suggested], "score": np.nan}
        columns |= {"flagged": np.where(flagged, "yes", not_flagged), "fold": fold}
        columns |= {"p_label": p[rows, labels], "p_suggested": np.nan, "kind": "prediction"}
        table = pd.DataFrame(columns, predictions.paths)
        table.update(elsewhere.assign(flagged="yes"))
        table["p_suggested"] = p[rows, classes.get_indexer(table.suggested)]
        tables.append(table.rename_axis("path").reset_index())
    table = pd.concat(tables)
    table["score"] = log_ratio(table.p_suggested, table.p_label)
    table = table[(table.score > 0) | (table.kind != "prediction")]
    return table.iloc[np.lexsort((-table.score, table.kind == "prediction"))].drop_duplicates("path")


# ---------------------------------------------------------------- one row of Table 4
def frequencies(study, run, fold):
    """Natural frequencies [C]: images outside the fold's test part (or all, if there are no others)."""
    outside = study.images - study.runs[run][fold].confusion.sum(1)
    return np.maximum(outside if outside.any() else study.images, 0.5)


def read_folds(study, run, tested):
    """([Fold] of one row of Table 4, why validation is missing or None)."""
    folds, missing, validated = [], None, {}
    try:
        for k, fold in study.runs[run].items():
            validated[k] = evaluate.read_predictions(fold.file.with_name("val_predictions.csv"))
    except ValueError as error:
        missing, validated = str(error), {}
    for k, test in tested.items():
        val, p, val_p, temperatures = validated.get(k), {}, {}, {}
        for name, prior in zip(PLAIN, (None, frequencies(study, run, k))):
            p[name] = posterior(test.probabilities, prior)
            if val:
                val_p[name] = posterior(val.probabilities, prior)
                temperatures[name] = fit_temperature(val.probabilities, val.labels, prior)
                p[f"{name}, temperature"] = posterior(test.probabilities, prior, temperatures[name])
        folds.append(Fold(test.labels, p, val and val.labels, val_p, temperatures))
    return folds, missing


def score_rows(folds, images):
    """Rows score, variant, mean, std over the folds, of SCORES."""
    rows = []
    for variant, fold in itertools.product(PLAIN, folds):
        p, share = fold.probabilities[variant], np.bincount(fold.labels, minlength=len(images))
        scores = evaluate.per_class_scores(fold.labels, p.argmax(1), len(images))
        common = evaluate.moments(scores[2][images >= evaluate.COMMON])[0]
        weighted = np.nansum(scores * (share / share.sum()), axis=1)
        top2 = (np.argsort(-p, axis=1)[:, :2] == fold.labels[:, None]).any(1).mean()
        values = *evaluate.moments(scores.T)[0], common, *weighted, top2
        rows += [{"score": name, "variant": variant, "value": value} for name, value in zip(SCORES, values)]
    groups = pd.DataFrame(rows).groupby(["score", "variant"], sort=False).value
    return groups.agg(["mean", "std"]).reset_index().to_dict("records")


def calibration_rows(folds, study):
    """Rows variant, class, bin, ECE of all test images: top label (class ""), then each common class."""
    labels, tables = np.concatenate([fold.labels for fold in folds]), {}
    for variant in sorted(folds[0].probabilities):
        p = np.concatenate([fold.probabilities[variant] for fold in folds])
        tables[variant, ""] = reliability(p.max(1), p.argmax(1) == labels)
        for c in np.flatnonzero(study.images >= evaluate.COMMON):
            tables[variant, study.classes[c]] = reliability(p[:, c], labels == c)
    return pd.concat(tables, names=["variant", "class"]).reset_index([0, 1]).to_dict("records")


def coverage_rows(folds, classes):
    """Rows variant, share planned, handed over, scores of the rest, by validation's thresholds."""
    rows = []
    for variant, share in itertools.product(PLAIN, HANDED_OVER):
        parts = []
        for fold in folds:  # hand over the share of the validation images that is least sure
            confidence = np.sort(fold.val_probabilities[variant].max(1))
            threshold = confidence[int(share * len(confidence))] if share else 0
            p = fold.probabilities[variant]
            parts.append((fold.labels, p.argmax(1), p.max(1) >= threshold))
        labels, predictions, kept = map(np.concatenate, zip(*parts))
        recall = evaluate.per_class_scores(labels[kept], predictions[kept], classes)[1]
        row = {"variant": variant, "planned": share, "handed_over": 1 - kept.mean()}
        row["accuracy"] = evaluate.moments((labels == predictions)[kept])[0]
        row |= {"macro_recall": evaluate.moments(recall)[0], "classes_left": np.isfinite(recall).sum()}
        rows.append(row)
    return rows


def clinic_rows(folds, classes):
    """Rows class, variant, scores against the rest over the folds; val_: with validation's threshold."""
    rows = []
    for name, variant in itertools.product(CLINIC, PLAIN):
        if name not in classes:
            continue
        c, scores = classes.index(name), []
        for fold in folds:
            p, positive = fold.probabilities[variant][:, c], fold.labels == c
            scores.append({"pr_auc": average_precision_score(positive, p) if positive.any() else np.nan})
            for wanted in SPECIFICITIES:
                scores[-1][f"sensitivity_{wanted}"] = sensitivity_at(p, positive, wanted)[0]
                if fold.val_labels is not None:
                    val_p = fold.val_probabilities[variant][:, c]
                    above = p > sensitivity_at(val_p, fold.val_labels == c, wanted)[1]
                    scores[-1][f"val_sensitivity_{wanted}"] = evaluate.moments(above[positive])[0]
                    scores[-1][f"val_specificity_{wanted}"] = evaluate.moments(~above[~positive])[0]
        images = sum((fold.labels == c).sum() for fold in folds)
        rows.append({"class": name, "variant": variant, "images": images})
        for key, values in pd.DataFrame(scores).items():
            rows[-1] |= {f"{key}_mean": values.mean(), f"{key}_std": values.std()}
    return rows


# ---------------------------------------------------------------- pictures and files
def inline(picture, kind="png"):
    """The src of an <img> that holds these bytes."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def plot(table, by, x, y, marks=(), **settings):
    """The src of an <img>: y against x, a line for each value of `by`, vertical ones at marks {label: x}."""
    figure, png = Figure(figsize=(4.6, 3.4)), io.BytesIO()
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.83))  # a layout engine would double the time
    styles = itertools.cycle(("o-", "s--", "^-.", "v:"))
    for label, group in pd.DataFrame(table).groupby(by or (lambda row: y), sort=False):
        axes.plot(group[x], group[y], next(styles), label=label, markersize=3.5)
    for label, where in dict(marks).items():
        axes.axvline(where, color="k", linestyle="-" if label.startswith("chosen") else ":", label=label)
    if x == "confidence":
        axes.axline((0, 0), slope=1, color="k", linestyle=":")
    axes.set(**{"xlabel": x.replace("_", " "), "ylabel": y.replace("_", " ")} | settings)
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    figure.savefig(png, dpi=120)
    return inline(png.getvalue())


def small_jpeg(side, file, folders=("",)):
    """The src of an <img>, at most side pixels high: the file from the first folder where it can be read."""
    for folder in folders:
        try:
            with Image.open(pathlib.Path(folder, file)) as image:
                if image.mode.startswith("I;16"):  # Pillow's convert would cut off all above 255
                    image = image.point(lambda value: value / 256).convert("L")
                image, jpeg = image.convert("RGB"), io.BytesIO()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        image.thumbnail((side, side))
        image.save(jpeg, "jpeg", quality=85)
        return inline(jpeg.getvalue(), "jpeg")


def read(file):
    """A JSON file's content or a CSV as a DataFrame; None if there is none that can be read."""
    try:
        return json.loads(file.read_bytes()) if file.suffix == ".json" else pd.read_csv(file)
    except (OSError, ValueError):
        return None


def progress(runs):
    """Rows network, stage, state, number of all trainings that have been begun."""
    states = Counter()
    for folder in sorted([*runs.glob("pretrain/*/*"), *runs.glob("train/*/*/fold*")]):
        log, config = read(folder / "log.csv"), read(folder / "config.json") or {}
        done, (stage, *run) = (folder / "predictions.csv").exists(), folder.relative_to(runs).parts[:3]
        state = f"at epoch {0 if log is None else len(log)} of {config.get('epochs', '?')}"
        if log is not None or config or done:
            states[title(*run), stage, "finished" if done else state] += 1
    return [dict(zip(("network", "stage", "state", "trainings"), (*key, n))) for key, n in states.items()]


def failures(runs):
    """(log, its last line) of each of the jobs of run_all.sh that failed and have not succeeded since."""
    for failed in sorted(runs.glob("logs/*.failed")):
        log = failed.with_suffix(".log")
        text = log.read_text(errors="replace") if log.exists() else "it left no log"
        yield log, text.rstrip().split("\n")[-1][:300]


# ---------------------------------------------------------------- what the page shows
def add_intervals(study, table4):
    """Add f1_low, f1_high to Table 4: macro F1's 95% interval by the corrected t-test; NaN for one fold."""
    for row in table4:
        folds = study.runs[row["model"], row["init"]].values()
        ends = evaluate.corrected_t_test(evaluate.macro_f1(folds), evaluate.split_ratio(folds))[1:3]
        row["f1_low"], row["f1_high"] = np.clip(ends, 0, 1)


def of_scores(study, run, table4):
    """Tables 4 and 5 with the paper's numbers, and the confusion matrix."""
    classes, paper4, paper5 = study.classes, {}, {}
    if set(classes) == set(evaluate.CLASSES) and (HERE / "paper/table4.csv").exists():
        paper4 = evaluate.read_table4(HERE / "paper/table4.csv")
        paper5 = pd.read_csv(HERE / "paper/table5.csv", index_col="class").to_dict("index")
    add_intervals(study, table4)
    f1 = pd.DataFrame([*table4, *(paper4[name] for name in study.runs if name in paper4)])
    f1 = 10 * f1[["f1_mean", "f1_low", "f1_high"]].stack()
    low = max(0, np.ceil(f1.min() - 1))
    axis = low / 10, max(low + 1, np.ceil(f1.max())) / 10
    comparisons = evaluate.comparison_rows(study, table4)
    matrix = evaluate.mean_confusion(study.runs[run].values())
    off = pd.DataFrame(matrix * (1 - np.eye(len(matrix))), classes, classes).stack().nlargest(8)
    values = {"table4": table4, "paper4": paper4, "paper5": paper5, "best": evaluate.best_run(table4)}
    values |= {"table5": evaluate.table5_rows(study, *run), "signs": evaluate.marks(table4, comparisons)}
    values |= {"axis": axis, "statements": evaluate.statements(study, comparisons)}
    values["confused"] = [
        f"{share:.0%} of {label} as {name}" for (label, name), share in off.items() if share
    ]
    png = evaluate.draw_confusion(matrix, study.images, classes, title(*run))
    return values | {"confusion": inline(png)}


def of_probabilities(study, run, tested, results):
    """Scores, calibration, coverage and clinic of one row of Table 4; writes each as CSV."""
    folds, missing = read_folds(study, run, tested)
    tables = {"scores": score_rows(folds, study.images), "reliability": calibration_rows(folds, study)}
    tables["coverage"] = [] if missing else coverage_rows(folds, len(study.classes))
    tables["clinic"] = clinic_rows(folds, study.classes)
    for kind, rows in tables.items():
        if rows:
            evaluate.write_csv(results / f"{kind}_{'_'.join(run)}.csv", rows)
    ece = pd.DataFrame(tables["reliability"][::BINS])  # it stands in every row of its bins
    ece["class"] = ece["class"].replace("", "most probable class")
    ece = ece.pivot_table(index="class", columns="variant", values="ece", sort=False).reset_index()
    return tables | {"folds": folds, "missing": missing, "ece": ece.to_dict("records")}


def of_training(folder, folds, results):
    """Learning curves, range test and heatmaps of the row of Table 4 in this folder."""
    logs = {f"fold {fold}": read(folder / f"fold{fold}/log.csv") for fold in folds}
    logs = {fold: log for fold, log in logs.items() if log is not None}
    measured = read(folder / "measured.json") or {}
    rates = {f"{rate:.2g}: mean recall {score:.3f}": rate for rate, score in measured.get("candidates") or ()}
    if "lr" in measured:
        rates[f"chosen: {measured['lr']:.2g}"] = measured["lr"]
    heatmaps = sorted(results.glob(f"gradcam_{folder.parent.name}_{folder.name}_*.png"))
    curves, tried = pd.concat(logs, names=["fold"]) if logs else None, read(folder / "lr_range.csv")
    return {"curves": curves, "rates": rates, "tried": tried, "heatmaps": heatmaps}


def of_overlaps(study, runs, fingerprint):
    """Duplicates, twins {(path, fold) tested with a duplicate in training}, contradicted labels."""
    scans = [read(file) or {} for file in runs.glob("data/*.json")]
    scan = next((scan for scan in scans if scan.get("fingerprint") == fingerprint), {})
    sizes, duplicates = scan.get("sizes") or {"250x250": 1}, scan.get("duplicates") or []
    pairs, contradicted, twins = [], {}, set()
    for group in duplicates:
        pairs += [(*pair, "exact duplicate") for pair in itertools.permutations(group, 2)]
    if study.overlaps:
        table = pd.read_csv(runs / "overlaps.csv", dtype={"first": str, "second": str}, **evaluate.CSV)
        same = np.hypot(table.dx, table.dy) < SAME_CELL * int(max(sizes, key=sizes.get).split("x")[0])
        for first, second in table.loc[same, ["first", "second"]].to_numpy():
            pairs += [(first, second, "same cell"), (second, first, "same cell")]
    for path, other, kind in pairs:
        if study.split is None or not {path, other} <= set(study.split.index):
            continue
        row, other_row = study.split.loc[path], study.split.loc[other]
        if row.label != other_row.label:
            contradicted[path] = other_row.label, f"{kind} as {other}"
        if kind == "exact duplicate":
            twins.update((path, fold) for fold in row.index[(row == "test") & (other_row == "train")])
    return {"duplicates": duplicates, "contradicted": contradicted, "twins": twins}


def title(model, init):
    """A row of Table 4 as the paper prints it."""
    return ", ".join(evaluate.paper_names(model, init))


def choose_run(study, table4, model, init):
    """(model, init) of the best row of this model and init, where None allows any; SystemExit if none is."""
    rows = [row for row in table4 if model in (None, row["model"]) and init in (None, row["init"])]
    if not rows:
        wanted = f"{model or 'any network'}/{init or 'any init'}"
        raise SystemExit(f"no finished fold of {wanted}; there are: {', '.join(map('/'.join, study.runs))}")
    return evaluate.best_run(rows)


def of_run(study, run, table4, runs, results, data):
    """All that the page shows of one row of Table 4; writes its CSV files."""
    tested = {k: evaluate.read_predictions(fold.file) for k, fold in study.runs[run].items()}
    config = study.runs[run][min(tested)].config
    values = {"shown": run, "config": config} | of_scores(study, run, table4)
    values |= of_probabilities(study, run, tested, results)
    values |= of_training(runs / "train" / run[0] / run[1], tested, runs / "results")
    values |= of_overlaps(study, runs, config.get("data"))
    issues = label_issues(study, run, tested, values["contradicted"])
    evaluate.write_csv(results / "label_issues.csv", issues)
    flagged = ((issues.flagged == "yes") & (issues.kind == "prediction")).sum()
    first = issues.sort_values("flagged", key=lambda flags: flags != "yes", kind="stable")[:GALLERY]
    # the class folders may lie deeper than data (BM as unpacked, crops of a COCO set); config.json knows
    roots = [pathlib.Path(config.get("root") or data), data, *data.glob("*/"), *data.glob("*/*/")]
    return values | {"issues": issues, "flagged": flagged, "doubts": first.to_dict("records"), "roots": roots}


def main():
    evaluate.prepare_terminal()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="holds train/ and split.csv")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the page; default: results in --runs")
    parser.add_argument("--model", help="network to show in detail; default: the best of Table 4")
    parser.add_argument("--init", help="its pre-training")
    parser.add_argument("--data", type=pathlib.Path, default="data/bm", help="for pictures of labels")
    args = parser.parse_args()
    if not args.runs.is_dir():
        raise SystemExit(f"{args.runs}: no such folder; name the one that train.py wrote with --runs")
    try:
        study = evaluate.read_study(args.runs)
    except ValueError as error:
        raise SystemExit(f"{error}; put the file back that the runs were made with") from None
    results, said = args.out or args.runs / "results", "no fold is finished yet"
    values = {"runs": args.runs, "data": shlex.quote(str(args.data))}
    values |= {"study": study, "shown": None, "config": {}}
    values["made"] = time.strftime("%d %B %Y, %H:%M")
    if study.runs:
        table4 = evaluate.table4_rows(study)
        run = choose_run(study, table4, args.model, args.init)
        values |= of_run(study, run, table4, args.runs, results, args.data)
        said = f"{title(*run)}; {values['flagged']} labels to look at again"
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Environment(undefined=jinja2.StrictUndefined, **options)
    page = page.from_string((HERE / "report.html").read_text(encoding="utf-8"), globals())
    # a name with bytes that are no text shows a question mark there
    evaluate.write_file(results / "index.html", page.render(values).encode("utf-8", "replace"))
    print(f"{results / 'index.html'}: {said}")
    if study.problems and not study.runs:
        raise SystemExit(f"{study.problems[0]}; it is named on the page, and no other fold is left to show")


if __name__ == "__main__":
    main()
