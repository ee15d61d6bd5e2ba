"""One page to open in the morning: how far the study is, its tables, how sure the networks are, labels to look at again.

    python report.py                                       writes runs/results/index.html, of the best configuration so far
    python report.py --model vit_l_32 --init imagenet      the same, of another one
    python report.py --doubt vit_l_32/imagenet resnet152/imagenet+cd      doubtful labels by the mean of several networks

The page needs no network and no other file. Beside it: label_issues.csv (labels to look at again, the most doubtful first),
scores_, reliability_, coverage_ and clinic_<model>_<init>.csv. What rests on val_predictions.csv, log.csv, lr_range.png or
gradcam_*.png is left out without them, and the page says so.
"""
import argparse
import base64
import collections
import csv
import datetime
import io
import itertools
import json
import pathlib

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy import optimize, special
from sklearn.metrics import average_precision_score

import evaluate

HERE = pathlib.Path(__file__).parent
BINS = 15  # equal-width, of the reliability diagram (Guo et al. 2017)
ENOUGH = 50  # images that a class needs for its labels, or suggestions of it, to be flagged
HANDED_OVER = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of the images that go to a human
CLINIC = ("BLA", "FGC", "HAC", "PEB")  # blasts, faggot cells, hairy cells, proerythroblasts: what must not be missed
SPECIFICITIES = (0.99, 0.999)
PLAIN = ("as trained", "prior-corrected")
VARIANTS = {"as trained": (False, False), "as trained, temperature": (False, True),  # (corrected, with temperature)
            "prior-corrected": (True, False), "prior-corrected, temperature": (True, True)}
SCORES = ("macro precision", "macro recall (balanced accuracy)", "macro F1", "macro F1 of the common classes",
          "weighted precision", "accuracy (weighted recall)", "weighted F1", "top-2 accuracy")
TINY = np.finfo(np.float32).tiny  # probabilities come from float32: a zero was something below this
HEATMAPS = 8  # pictures of gradcam.py on the page
Fold = collections.namedtuple("Fold", "labels probabilities val_labels val_probabilities temperatures")


# ---------------------------------------------------------------- how sure is it
def posterior(probabilities, frequencies=None, temperature=1.0):
    """Probabilities [N,C] with the logits divided by temperature, then corrected for the classes' natural frequencies [C].

    The sampler showed all classes equally often, so by Bayes p_c becomes p_c * pi_c / (1/C), over their sum.
    """
    logits = np.log(np.maximum(probabilities, TINY)) / temperature
    return special.softmax(logits if frequencies is None else logits + np.log(np.maximum(frequencies, TINY)), axis=1)


def fit_temperature(probabilities, labels, frequencies=None):
    """The temperature in 0.05..20 of least negative log-likelihood (Guo et al. 2017), of posterior's argument."""
    logits = np.log(np.maximum(probabilities, TINY))
    prior = 0 if frequencies is None else np.log(np.maximum(frequencies, TINY))

    def loss(inverse):  # convex in 1/T
        return -special.log_softmax(inverse * logits + prior, axis=1)[np.arange(len(labels)), labels].mean()
    return 1 / optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-5}).x


def reliability(confidence, right, bins=BINS):
    """Images, mean confidence and share right, each [bins], of equal-width bins (low, high]; NaN in empty ones."""
    where = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(where, minlength=bins)
    some = np.where(images > 0, images, np.nan)
    return images, np.bincount(where, confidence, bins) / some, np.bincount(where, right, bins) / some


def calibration_error(images, confidence, right):
    """ECE of reliability's bins: the mean gap between confidence and share right, weighted by images."""
    return np.nansum(images * abs(confidence - right)) / images.sum()


def threshold_for(confidence, share):
    """The confidence from which images are kept so that this share of them, the least sure, is not."""
    return -np.inf if share == 0 else np.sort(confidence)[int(share * len(confidence))]


def sensitivity_at(scores, positive, specificity):
    """Highest sensitivity with at least this specificity, and the threshold that a score must exceed for it."""
    negatives = np.sort(scores[~positive])[::-1]
    allowed = int((1 - specificity) * len(negatives) + 1e-9)
    threshold = negatives[allowed] if allowed < len(negatives) else -np.inf
    return (scores[positive] > threshold).mean() if positive.any() else np.nan, threshold


def tolerant_scores(confusion, accepted):
    """Precision and recall, each [C], that count a prediction as right where accepted [label, prediction] is true.

    confusion [C,C] counts, rows are labels (Matek et al. 2021, Table 1). 0 if never predicted, NaN without an image.
    """
    right = confusion * (accepted | np.eye(len(confusion), dtype=bool))
    images, predicted = confusion.sum(1), confusion.sum(0)
    some = np.where(images > 0, 1.0, np.nan)
    return some * right.sum(0) / np.maximum(predicted, 1), some * right.sum(1) / np.maximum(images, 1)


def read_pairs(file, classes):
    """bool [C,C] of a CSV label,accepted: which predictions (columns) are forgiven for a label (rows).

    paper/tolerant_pairs.csv is our reading of Matek et al. (2021): consecutive stages of one line of cells, and hairy
    cells with lymphocytes. Their Table 1 lists no pairs, but its tolerant scores differ for exactly these classes.
    """
    accepted = np.zeros((len(classes), len(classes)), bool)
    if file is None:
        return accepted
    try:
        with open(file, encoding="utf-8", newline="") as handle:
            table = csv.DictReader(handle)
            pairs = [(row["label"], row["accepted"]) for row in table]
            if not {"label", "accepted"} <= set(table.fieldnames or ()):
                raise ValueError("it is empty")
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{file}: no CSV with columns label,accepted ({error}); name another with --pairs") from None
    for label, prediction in pairs:
        if label in classes and prediction in classes:
            accepted[classes.index(label), classes.index(prediction)] = True
    return accepted


# ---------------------------------------------------------------- which labels
def confident_joint(labels, probabilities):
    """Confident learning on one fold: the class [N] that each image is counted to, and whether off the diagonal.

    An image counts to its most probable class among those whose threshold it reaches, the mean probability of a class
    over the images labelled so (Northcutt et al. 2021; cleanlab's filter 'confident_learning').
    """
    own = probabilities[np.arange(len(labels)), labels]
    images = np.bincount(labels, minlength=probabilities.shape[1])
    thresholds = np.where(images > 0, np.bincount(labels, own, len(images)) / np.maximum(images, 1), np.inf)
    above = probabilities >= thresholds - 1e-6
    counted = np.where(above, probabilities, -1).argmax(1)
    return counted, above.any(1) & (counted != labels) & (probabilities.max(1) > own + 1e-6)


def doubtful(labels, probabilities, enough):
    """Suggested class [N], score [N] and flag [N] of one fold's labels; enough [C]: classes with images enough to flag.

    Score: log10 of how many times as probable the suggestion is as the label. Confident learning says how many labels
    are wrong, the score which: in simulations this had the higher precision and recall of the two ways to pick them.
    """
    rows = np.arange(len(labels))
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(1)
    score = np.log10(np.maximum(others[rows, suggested], TINY) / np.maximum(probabilities[rows, labels], TINY))
    counted, wrong = confident_joint(labels, probabilities)
    number = (wrong & enough[labels] & enough[counted]).sum()
    open_to_flags = np.flatnonzero((score > 0) & enough[labels] & enough[suggested])
    flagged = np.zeros(len(labels), bool)
    flagged[open_to_flags[np.argsort(-score[open_to_flags], kind="stable")[:number]]] = True
    return suggested, score, flagged


# ---------------------------------------------------------------- one configuration
def frequencies(study, run, fold):
    """Natural frequencies [C], as counts of the images outside the fold's test part (of all, if no other is known)."""
    outside = study.images - study.runs[run][fold].confusion.sum(1)
    return np.maximum(outside if outside.any() else study.images, 0.5)


def read_tested(file):
    """evaluate.read_predictions of a fold's test images; SystemExit if its probabilities, which no table needs, can't be right."""
    try:
        return evaluate.read_predictions(file)
    except ValueError as error:
        raise SystemExit(f"{error}; train that fold again") from None


def read_folds(study, files, run):
    """({fold: Fold} of one configuration with the VARIANTS of its probabilities, notes on what could not be had)."""
    folds, notes = {}, []
    for fold in study.runs[run]:
        test, val = read_tested(files[run][fold]), None
        priors = {False: None, True: frequencies(study, run, fold)}
        try:
            val = evaluate.read_predictions(files[run][fold].with_name("val_predictions.csv"))
        except ValueError as error:
            notes.append(f"Fold {fold} has no temperature and no thresholds: {error}.")
        heat = {key: fit_temperature(val.probabilities, val.labels, prior) for key, prior in priors.items() if val}
        tested = {name: posterior(test.probabilities, priors[corrected], heat[corrected] if tempered else 1)
                  for name, (corrected, tempered) in VARIANTS.items() if val or not tempered}
        validated = val and {name: posterior(val.probabilities, priors[VARIANTS[name][0]]) for name in PLAIN}
        folds[fold] = Fold(test.labels, tested, val and val.labels, validated, heat)
    return folds, notes


def score_rows(folds, images):
    """Rows score, variant, mean, std over the folds, of SCORES."""
    values = collections.defaultdict(list)
    for fold, variant in itertools.product(folds.values(), PLAIN):
        p, share = fold.probabilities[variant], np.bincount(fold.labels, minlength=len(images)) / len(fold.labels)
        each = np.array(evaluate.per_class_scores(fold.labels, p.argmax(1), len(images)))
        common = evaluate.moments(each[2][images >= evaluate.COMMON])[0]
        top2 = (np.argsort(-p, axis=1)[:, :2] == fold.labels[:, None]).any(1).mean()
        for name, value in zip(SCORES, (*evaluate.moments(each.T)[0], common, *np.nansum(each * share, 1), top2)):
            values[name, variant].append(value)
    return [{"score": name, "variant": variant} | spread(found) for (name, variant), found in values.items()]


def spread(values, name=""):
    """{"mean": , "std": } of values without their NaNs, sample standard deviation; name goes before the keys."""
    return dict(zip((f"{name}mean", f"{name}std"), map(float, evaluate.moments(values))))


def calibration_rows(folds, study):
    """Rows variant, class, bin, ECE of the pooled test images: top label (class ""), then one-vs-rest of common classes."""
    labels, rows = np.concatenate([fold.labels for fold in folds.values()]), []
    for variant in VARIANTS:
        if all(variant in fold.probabilities for fold in folds.values()):
            p = np.concatenate([fold.probabilities[variant] for fold in folds.values()])
            sure = {"": (p.max(1), p.argmax(1) == labels)}
            sure |= {study.classes[c]: (p[:, c], labels == c) for c in np.flatnonzero(study.images >= evaluate.COMMON)}
            for name, (confidence, right) in sure.items():
                bins = reliability(confidence, right)
                for i, (images, mean, share) in enumerate(zip(*bins)):
                    rows.append({"variant": variant, "class": name, "low": i / BINS, "high": (i + 1) / BINS,
                                 "images": int(images), "confidence": mean, "share_right": share, "ece": calibration_error(*bins)})
    return rows


def coverage_rows(folds, classes):
    """Rows variant, share planned and handed over, accuracy and macro recall of the rest; thresholds of validation."""
    rows, folds = [], [fold for fold in folds.values() if fold.val_labels is not None]
    for variant, share in itertools.product(PLAIN, HANDED_OVER if folds else ()):
        parts = []
        for fold in folds:
            threshold = threshold_for(fold.val_probabilities[variant].max(1), share)
            p = fold.probabilities[variant]
            parts.append((fold.labels, p.argmax(1), p.max(1) >= threshold))
        labels, predictions, kept = map(np.concatenate, zip(*parts))
        recall = evaluate.per_class_scores(labels[kept], predictions[kept], classes)[1]
        rows.append({"variant": variant, "planned": share, "handed_over": 1 - kept.mean(),
                     "accuracy": spread((labels == predictions)[kept])["mean"], "macro_recall": spread(recall)["mean"],
                     "classes_left": int((~np.isnan(recall)).sum())})
    return rows


def clinic_rows(folds, classes):
    """Rows class, variant and, one-vs-rest, mean and std over the folds of PR-AUC and sensitivity at SPECIFICITIES.

    sensitivity_: read off the test images' curve; val_sensitivity_, val_specificity_: with validation's threshold.
    """
    rows = []
    for name, variant in itertools.product([name for name in CLINIC if name in classes], PLAIN):
        found, c = collections.defaultdict(list), classes.index(name)
        for fold in folds.values():
            scores, positive = fold.probabilities[variant][:, c], fold.labels == c
            found["pr_auc_"].append(average_precision_score(positive, scores) if positive.any() else np.nan)
            for wanted in SPECIFICITIES:
                found[f"sensitivity_{wanted}_"].append(sensitivity_at(scores, positive, wanted)[0])
                if fold.val_labels is not None:
                    threshold = sensitivity_at(fold.val_probabilities[variant][:, c], fold.val_labels == c, wanted)[1]
                    found[f"val_sensitivity_{wanted}_"].append(spread(scores[positive] > threshold)["mean"])
                    found[f"val_specificity_{wanted}_"].append(spread(scores[~positive] <= threshold)["mean"])
        images = sum(int((fold.labels == c).sum()) for fold in folds.values())
        rows.append({"class": name, "variant": variant, "images": images})
        for key, values in found.items():
            rows[-1] |= spread(values, key)
    return rows


def doubtful_rows(study, files, runs):
    """Rows of label_issues.csv, the most doubtful first: all images with another most probable class than the label.

    By prior-corrected probabilities, averaged over the configurations runs [(model, init)], on the folds that all have. Of an
    image that a published split tests more than once the most doubtful row.
    """
    enough, rows = study.images >= ENOUGH, []
    for fold in sorted(set.intersection(*(set(study.runs[run]) for run in runs))):
        tables = []
        for run in runs:
            one = read_tested(files[run][fold])
            order = sorted(range(len(one.paths)), key=one.paths.__getitem__)
            paths, labels = [one.paths[i] for i in order], one.labels[order]
            tables.append((paths, posterior(one.probabilities, frequencies(study, run, fold))[order]))
        if any(tested != paths for tested, _ in tables):
            raise SystemExit(f"fold {fold}: the configurations of --doubt tested different images; name one of them")
        p = np.mean([table for _, table in tables], axis=0)
        suggested, score, flagged = doubtful(labels, p, enough)
        for i in np.flatnonzero(score > 0):
            a, b = labels[i], suggested[i]
            rows.append({"path": paths[i], "label": study.classes[a], "suggested": study.classes[b], "score": score[i],
                         "flagged": "yes" if flagged[i] else "no" if enough[a] and enough[b] else "rare class",
                         "fold": fold, "p_label": p[i, a], "p_suggested": p[i, b]})
    first = {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        first.setdefault(row["path"], row)
    return list(first.values())


# ---------------------------------------------------------------- pictures and files
def inline(data, kind="png"):
    """Image bytes as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot(lines, xlabel, ylabel, *, log=False, square=False):
    """A picture of lines {label: (x, y)}, as inline gives it; square: both axes from 0 to 1, with the diagonal."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes, out = figure.subplots(), io.BytesIO()
    for (label, (x, y)), style in zip(lines.items(), itertools.cycle(("o-", "s--", "^-.", "v:", "x-"))):
        axes.plot(x, y, style, label=label, markersize=3.5)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    if square:
        axes.plot([0, 1], [0, 1], "k:")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    if xlabel == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(out, dpi=120)
    return inline(out.getvalue())


def small_jpeg(file, side):
    """An image file as inline gives it, at most side pixels high and wide; None if it can't be read."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # Pillow's convert would cut off all above 255
                image = image.point(lambda value: value / 256).convert("L")
            image, out = image.convert("RGB"), io.BytesIO()
        image.thumbnail((side, side))
        image.save(out, "jpeg", quality=85)
        return inline(out.getvalue(), "jpeg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_rows(file):
    """Rows of a CSV with a header as dicts; [] if there is no such file."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        return list(csv.DictReader(handle))


def read_log(file):
    """Rows of a run's log.csv; [] if there is none, or none that can be drawn."""
    rows = read_rows(file)
    try:
        return rows if all(np.isfinite([float(row[key]) for key in ("epoch", "lr", "train_loss", "val_loss", "val_accuracy")]).all()
                           for row in rows) else []
    except (KeyError, TypeError, ValueError):
        return []


def read_json(file):
    """A run's config.json; {} if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def progress(runs, kind):
    """{(model, init): {state: [folds]}} of the fine-tunings ("train") or pre-trainings ("pretrain") begun so far."""
    states = {}
    for folder in sorted(runs.glob("train/*/*/fold*" if kind == "train" else "pretrain/*/*")):
        epochs, settings = len(read_rows(folder / "log.csv")), read_json(folder / "config.json")
        finished = (folder / "predictions.csv").exists()
        if finished or epochs or settings:
            run = (folder.parts[-3:-1] if kind == "train" else folder.parts[-2:])
            state = "finished" if finished else f"at epoch {epochs} of {settings.get('epochs', '?')}"
            states.setdefault(run, {}).setdefault(state, []).append(folder.name.removeprefix("fold"))
    return states


def failures(runs):
    """[(job, last line of its log, log file)] of the jobs of run_all.sh that failed and have not succeeded since."""
    found = []
    for file in sorted((runs / "logs").glob("*.failed")):
        log = file.with_suffix(".log")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        found.append((file.stem, lines[-1][:300] if lines else "it left no log", log))
    return found


# ---------------------------------------------------------------- the page
PAGE = r"""<!DOCTYPE html>
{% macro cell(main, small="") %}<td>{{ main }}{% if small %}<small>{{ small }}</small>{% endif %}</td>{% endmacro %}
{% macro head(main, small="") %}<th scope="row">{{ main }}{% if small %}<small>{{ small }}</small>{% endif %}</th>{% endmacro %}
{% macro table(caption, header) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ caption }}"><table><caption>{{ caption }}</caption>
<thead><tr>{% for name in header.split(" | ") %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{{ caller() }}</tbody></table></div>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Cell classification: results</title><link rel="icon" href="data:,">
<style>
body { margin: 0 auto; max-width: 1180px; padding: 0 16px 48px; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24 }
h1 { font-size: 1.7em; line-height: 1.2 } h2 { margin-top: 2.2em; border-bottom: 1px solid #c8ced6 }
p, li { max-width: 75ch; overflow-wrap: anywhere } a { color: #0b57a4 }
nav, .row { display: flex; flex-wrap: wrap; gap: 4px 16px } figure { margin: 1em 0 } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .88em; margin: .6em 0 } .wide { overflow-x: auto; max-width: 100% }
caption { text-align: left; font-weight: 600; padding: .3em 0 } thead th { background: #eef1f5 } tbody th { font-weight: 500 }
th, td { padding: .25em .6em; border-bottom: 1px solid #dfe3e8; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } small { display: block; font-size: .86em; font-weight: 400; color: #57606a }
figcaption { font-size: .88em; overflow-wrap: anywhere }
.alert { border-left: 5px solid #b42318; background: #fdeceb; padding: .4em .8em }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px }
.cell { margin: 0; border: 1px solid #c8ced6; border-radius: 6px; padding: 8px; font-size: .85em; break-inside: avoid }
.cell img, .none { width: 150px; height: 150px; object-fit: contain; background: #eef1f5 }
button { font: inherit; margin: 2px 2px 2px 0; padding: .3em .6em; border: 1px solid #57606a; border-radius: 5px }
button { background: #fff; color: inherit; cursor: pointer }
button[aria-pressed=true] { background: #0b57a4; color: #fff; border-color: #0b57a4 }
@media (max-width: 640px) {
  body { font-size: 15px; padding: 0 10px 32px } table { font-size: .72em } th, td { padding: .25em .2em }
  ul { padding-left: 1.2em } tbody th { overflow-wrap: anywhere; min-width: 5.5em }
  .cells { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
  .cell img, .none { width: 130px; height: 130px } .matrix { max-width: none; width: 720px }
}
@media print {
  nav, button, #verdicts { display: none } body { max-width: none; font-size: 10pt } table { font-size: 7.5pt }
  .wide { overflow: visible } .row img { width: 47% } thead th { print-color-adjust: exact }
  tr, figure, .alert, .row img { break-inside: avoid } h2, h3, caption { break-after: avoid }
}
</style></head><body>
<header><h1>Cell classification: results</h1>
<p>Neural networks learn to name the kind of cell on a microscope image{% if classes %}, one of {{ classes|length }}{% endif %}.
This page says how far the study is, which network does best, how far its probabilities can be trusted, and which
images may carry a wrong label. Made on {{ date }} from the folder {{ runs }}.</p>
{% if shown %}<ul>
<li>Best so far: <b>{{ best|run }}</b>, macro F1 {{ score(best, "f1") }}, accuracy {{ score(best, "accuracy") }}.
{{ tied }} of {{ table4|length - 1 }} other configurations can't be told from it.</li>
<li>Shown in detail: {{ shown|run }}. Its probabilities are {{ percent(calibration[0].ece) }} off on average as trained
{%- if calibration|length > 2 %}, {{ percent(calibration[-1].ece) }} prior-corrected and with a temperature{% endif %}.</li>
{% if rare %}<li>No class has the {{ enough }} images from which on labels are flagged.</li>{% else %}
<li>{{ flagged }} of {{ tested }} labels are flagged for a second look: by a network that is right on {{ percent(right, 0) }} of the
images, so the weaker it is, the more of them are its own errors.</li>{% endif %}</ul>
<nav aria-label="Sections">{% for name in ("Progress", "Networks", "Classes", "Clinic", "Calibration", "Training", "Heatmaps",
  "Labels") %}<a href="#{{ name|lower }}">{{ name }}</a>{% endfor %}</nav>{% endif %}</header>

<main><section id="progress"><h2>How far the study is</h2>
{% for job, line, log in failed %}<p class="alert"><b>Failed: {{ job }}.</b> {{ line }} (whole log: {{ log }})</p>{% endfor %}
{% for line in problems %}<p class="alert">Not used: {{ line }}.</p>{% endfor %}
{% for path, why in left_out %}<p class="alert">Unreadable, left out of everything: {{ path }} ({{ why }}).</p>{% endfor %}
{% for kind, states, models, inits in grids if states %}
{% call table(kind ~ " by network and pre-training", "Network | " ~ inits|map("init")|join(" | ")) %}
{% for model in models %}<tr>{{ head(model|model) }}{% for init in inits %}<td>
{% for state, folds in states.get((model, init), {}).items() %}
{% if kind == "Pre-trainings" %}{{ state }}{% elif state == "finished" %}{{ folds|length }} of {{ expected }} finished
{% else %}<small>fold {{ folds|join(", ") }} {{ state }}</small>{% endif %}
{% else %}–{% endfor %}</td>{% endfor %}</tr>{% endfor %}{% endcall %}
{% else %}<p>Nothing has been begun yet.</p>{% endfor %}
<p>The images are divided into folds: each is tested once, by a network trained on the others. An epoch is one pass over
the training images. –: not begun.{% if not shown %} Tables and pictures come with the first finished fold.{% endif %}</p></section>

{% if shown %}<section id="networks"><h2>Which network, which pre-training</h2>
<p>Each network started from given weights, its pre-training, and then learned the cell classes. Precision: of the images
given a class's name, the share labelled so. Recall: of a class's images, the share found. F1: their harmonic mean. All
classes count equally, however rare; 1 is perfect.</p>
{% call table("Table 4: mean ± standard deviation over the folds", "Network, pre-training | Precision | Recall | F1 | Mark | " ~
  "F1, common classes | Accuracy") %}
{% for row in table4 %}{% set theirs = paper4.get((row.model, row.init)) %}
<tr>{{ head(row|run, row.folds ~ " fold" ~ ("s" if row.folds > 1 else "")) }}
{% for name in ("precision", "recall", "f1") %}
{{ cell(score(row, name), ("Matek " if theirs.quoted else "paper ") ~ score(theirs, name) if theirs else "") }}
{% endfor %}{{ cell(signs[row.model, row.init]) }}{{ cell(number(row.f1_common)) }}{{ cell(score(row, "accuracy")) }}</tr>
{% endfor %}{% endcall %}
<ul>{% for line in statements %}<li>{{ line }}</li>{% endfor %}{% if paper4 %}<li>The paper used 171,374 images, this study
{{ images }}{% if images != "171,374" %}: don't compare the numbers directly{% endif %}.</li>{% endif %}</ul></section>

<section id="classes"><h2>Class by class: {{ shown|run }}</h2>
{% call table("Table 5: mean ± standard deviation over the folds", "Class | Precision | Recall | F1 | " ~
  "Tolerant precision | Tolerant recall") %}
{% for row in table5 %}{% set theirs = paper5.get(row.class) %}<tr>{{ head(row.class|class, row.images ~ " images") }}
{% for name in ("precision", "recall", "f1") %}{{ cell(score(row, name), "paper " ~ score(theirs, name) if theirs else "") }}
{% endfor %}{{ cell(score(row, "tolerant_precision")) }}{{ cell(score(row, "tolerant_recall")) }}</tr>
{% endfor %}{% endcall %}
<p>Tolerant scores forgive it when a cell is given the name of a neighbouring stage, as in Matek et al. (2021, Table 1).
The pairs that are forgiven stand in {{ pairs }} (those that ship are a reading of that table, which lists none); without
one the scores equal the strict ones.
{% if paper5 %}The paper's numbers here are those of Regnet_y_32gf, ImageNet + CD.{% endif %}</p>
<figure><div class="wide" tabindex="0" role="region" aria-label="Confusion matrix">
<img class="matrix" src="{{ confusion }}" alt="Confusion matrix. Most frequent: {{ confused }}"></div><figcaption>Rows: the
label, columns: what the network says; mean over the folds, a row adds up to 1. Most frequent: {{ confused }}.</figcaption></figure>
{% call table("All classes together, mean ± standard deviation over the folds", "Score | " ~ plain|join(" | ")) %}
{% for name, pair in scores.items() %}<tr>{{ head(name) }}{% for row in pair %}{{ cell(number(row.mean, row.std)) }}{% endfor %}</tr>
{% endfor %}{% endcall %}
<p>Macro scores count all classes equally, weighted ones by their images; common classes have {{ common }} images or more.
Top-2: the label is one of the two most probable classes. As trained, the network takes all classes to be equally frequent,
as it was shown them; prior-corrected, it knows how frequent they are.</p></section>

<section id="clinic"><h2>Cells that must not be missed</h2>
{% if clinic %}{% call table("One class against all others, mean ± standard deviation over the folds",
  "Class | Probabilities | PR-AUC | Sensitivity at 99 % specificity | Sensitivity at 99.9 % specificity") %}
{% for row in clinic %}<tr>{{ head(row.class|class, row.images ~ " images") }}{{ cell(row.variant) }}{{ cell(score(row, "pr_auc")) }}
{% for s in ("0.99", "0.999") %}{{ cell(score(row, "sensitivity_" ~ s), "threshold from validation: " ~
  number(row["val_sensitivity_" ~ s ~ "_mean"]) ~ " at " ~ percent(row["val_specificity_" ~ s ~ "_mean"], 2)
  if "val_sensitivity_" ~ s ~ "_mean" in row else "") }}{% endfor %}</tr>
{% endfor %}{% endcall %}
<p>PR-AUC: area under the precision-recall curve (average precision). Sensitivity: the share of the class's cells found when
at most 1 % (0.1 %) of all other cells raise a false alarm, read off the test images; below it, what a threshold chosen on
validation images reached.</p>
{% else %}<p>The classes looked at here are not in this data set: {{ clinic_classes|map("class")|join(", ") }}.</p>{% endif %}</section>

<section id="calibration"><h2>How sure is it?</h2>
{% for note in notes %}<p class="alert">{{ note }}</p>{% endfor %}
<p>Of the images on which a network says 90 %, 90 % should be right. ECE, the expected calibration error, is the mean
distance from that over {{ bins }} bins of equal width. A temperature, fitted on validation images, makes all probabilities
more or less extreme.</p>
{% call table("Calibration of the most probable class", "Probabilities | ECE | Temperature, by fold") %}
{% for row in calibration %}<tr>{{ head(row.variant) }}{{ cell("%.4f" % row.ece) }}{{ cell(row.temperatures) }}</tr>
{% endfor %}{% endcall %}
<figure><div class="row">{% for variant, source in reliability %}
<img src="{{ source }}" alt="Reliability diagram, {{ variant }}">{% endfor %}</div>
<figcaption>Above the dotted line the network is too modest, below it too sure. Bins of fewer than 10 images are not drawn;
all are in reliability_{{ shown|join("_") }}.csv.</figcaption></figure>
{% if one_vs_rest %}{% call table("ECE of each class against all others, classes of " ~ common ~ " images or more",
  "Class | " ~ variants|join(" | ")) %}
{% for name, rows in one_vs_rest.items() %}<tr>{{ head(name|class) }}{% for row in rows %}{{ cell("%.4f" % row.ece) }}{% endfor %}</tr>
{% endfor %}{% endcall %}
{% else %}<p>No class has the {{ common }} images from which on single classes are looked at.</p>{% endif %}
<h3>If the least sure images go to a human</h3>
{% if coverage %}{% call table("What is left to the network, with thresholds set on validation images", "Probabilities | " ~
  "Meant to hand over | Handed over | Accuracy of the rest | Macro recall of the rest | Classes left") %}
{% for row in coverage %}<tr>{{ head(row.variant) }}{{ cell(percent(row.planned, 0)) }}{{ cell(percent(row.handed_over)) }}
{{ cell(number(row.accuracy)) }}{{ cell(number(row.macro_recall)) }}{{ cell(row.classes_left) }}</tr>
{% endfor %}{% endcall %}
<div class="row">{% for name, source in coverage_plots %}
<img src="{{ source }}" alt="{{ name }} of the rest against the share handed over, as in the table">{% endfor %}</div>
{% else %}<p>There is no val_predictions.csv, from which the thresholds would come.</p>{% endif %}</section>

<section id="training"><h2>How it was trained</h2>
{% if curves %}<div class="row">{% for name, source in curves %}
<img src="{{ source }}" alt="{{ name }} by epoch, a line for each fold, from log.csv">{% endfor %}</div>
<p>Of each fold, the epoch of highest validation accuracy was tested.</p>
{% else %}<p>There is no log.csv of this configuration.</p>{% endif %}
{% if range_test %}<figure><img src="{{ range_test }}" alt="Range test: loss against learning rate, with the rate chosen">
<figcaption>Range test: the learning rate rises step by step; training starts at the rate of fastest fall.</figcaption></figure>
{% else %}<p>There is no range test (lr_range.png) of this configuration.</p>{% endif %}</section>

<section id="heatmaps"><h2>What the network looks at</h2>
{% for file, source in heatmaps %}<figure><div class="wide" tabindex="0" role="region" aria-label="{{ file }}">
<img class="matrix" src="{{ source }}" alt="Grad-CAM heatmaps, {{ file }}"></div>
<figcaption>{{ file }}: the redder a part of the cell, the more it spoke for the
class. Each map is scaled to its own maximum; where it has 7 × 7 places (ViT-L/32), believe the coarse place alone.</figcaption></figure>
{% else %}<p>No heatmaps yet of this configuration; python gradcam.py --model {{ shown[0] }} --init {{ shown[1] }} --classes ... draws them.</p>
{% endfor %}
{% if more_heatmaps %}<p>{{ more_heatmaps }} more gradcam_*.png are in the results folder.</p>{% endif %}</section>

<section id="labels"><h2>Labels to look at again</h2>
<p>Every image was tested by a network that had not seen it ({{ doubt }}). Where it finds another class far more probable
than the label, at least one of the two is wrong: the weaker the network, the more often it is the network. Confident learning
(Northcutt et al. 2021) flags {{ flagged }} of {{ tested }} labels; classes of fewer than {{ enough }} images are ranked, never flagged. All
{{ doubts }} images with another class on top are in label_issues.csv, the first {{ cells|length }} are here. Say who is right; verdicts
stay in this browser until you save them.</p>
<p id="verdicts"><button type="button" id="export">Save verdicts as CSV</button> <span id="count" role="status"></span></p>
<div class="cells">{% for row in cells %}
<figure class="cell" data-rank="{{ loop.index }}" data-path="{{ row.path }}" data-label="{{ row.label }}"
  data-suggested="{{ row.suggested }}" data-score="{{ '%.4g' % row.score }}">
{% if row.source %}<img src="{{ row.source }}" alt="Cell {{ row.path }}, labelled {{ row.label }}">
{% else %}<div class="none">image not found</div>{% endif %}
<figcaption>{{ loop.index }}. labelled <b>{{ row.label }}</b> ({{ percent(row.p_label) }}), looks like <b>{{ row.suggested }}</b>
({{ percent(row.p_suggested) }}); {{ {"yes": "flagged", "no": "not flagged", "rare class": "rare class"}[row.flagged] }}
<br>{{ row.path }}</figcaption>
<div role="group" aria-label="Verdict on {{ row.path }}">
{% for verdict, text in (("label", row.label), ("suggested", row.suggested), ("neither", "neither"), ("unsure", "can't tell")) %}
<button type="button" aria-pressed="false" data-verdict="{{ verdict }}">{{ text }}</button>{% endfor %}</div></figure>
{% endfor %}</div></section>{% endif %}</main>
<script>
"use strict";
const cells = [...document.querySelectorAll(".cell")], store = "verdicts " + location.pathname;
const id = cell => [cell.dataset.path, cell.dataset.label, cell.dataset.suggested].join("\n");
let verdicts = {};  // also of cells that an earlier version of this page showed
try { verdicts = JSON.parse(localStorage.getItem(store)) || {}; } catch { /* no storage: kept until the page closes */ }
for (const cell of cells) if (verdicts[id(cell)]) Object.assign(verdicts[id(cell)], cell.dataset);  // its rank may be another now
function show() {
  for (const cell of cells) for (const button of cell.querySelectorAll("button"))
    button.setAttribute("aria-pressed", verdicts[id(cell)]?.verdict === button.dataset.verdict);
  const judged = cells.filter(cell => verdicts[id(cell)]).length, count = document.getElementById("count");
  const earlier = Object.keys(verdicts).length - judged;
  if (count) count.textContent = `${judged} of ${cells.length} looked at`
    + (earlier ? `; ${earlier} more on earlier versions of this page, saved with them` : "");
}
for (const cell of cells) cell.addEventListener("click", event => {
  const verdict = event.target.dataset.verdict;
  if (!verdict) return;
  if (verdicts[id(cell)]?.verdict === verdict) delete verdicts[id(cell)]; else verdicts[id(cell)] = {...cell.dataset, verdict};
  try { localStorage.setItem(store, JSON.stringify(verdicts)); } catch { /* as above */ }
  show();
});
document.getElementById("export")?.addEventListener("click", () => {
  const names = ["rank", "path", "label", "suggested", "score", "verdict"], quote = text => `"${text.replaceAll('"', '""')}"`;
  const rows = Object.values(verdicts).sort((a, b) => a.rank - b.rank).map(row => names.map(name => row[name]));
  const link = document.createElement("a"), lines = [names, ...rows].map(row => row.map(quote).join(",") + "\r\n");
  link.href = URL.createObjectURL(new Blob(lines, {type: "text/csv"}));
  link.download = "verdicts.csv";
  link.click();
});
show();
</script></body></html>
"""


def render(values):
    """PAGE as bytes; a name with bytes that are no text shows a question mark there."""
    def number(mean, std=np.nan):
        return evaluate.mean_std(float(mean), float(std)).replace("± ", "±\N{NO-BREAK SPACE}") or "–"
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {
        "model": lambda name: evaluate.MODELS.get(name, name), "init": lambda name: evaluate.INITS.get(name, name),
        "class": lambda name: f"{evaluate.CLASSES[name]} ({name})" if name in evaluate.CLASSES else name,
        "run": lambda run: title(*((run["model"], run["init"]) if isinstance(run, dict) else run))}
    page.globals |= {"percent": percent, "number": number,
                     "score": lambda row, name: number(row[f"{name}_mean"], row[f"{name}_std"])}
    return page.from_string(PAGE).render(values).encode("utf-8", "replace")


def title(model, init):
    """A configuration as the paper prints it."""
    return f"{evaluate.MODELS.get(model, model)}, {evaluate.INITS.get(init, init)}"


def percent(value, digits=1):
    """0.123 as '12.3 %'."""
    return "–" if np.isnan(value) else f"{100 * value:.{digits}f} %"


def confusions(matrix, classes, most=8):
    """The largest entries off the diagonal of a mean confusion matrix, as text."""
    off = np.nan_to_num(matrix * (1 - np.eye(len(classes))))
    largest = [np.unravel_index(i, off.shape) for i in np.argsort(-off, axis=None, kind="stable")[:most]]
    return "; ".join(f"{percent(off[i, j], 0)} of {classes[i]} as {classes[j]}" for i, j in largest if off[i, j]) or "none"


def grouped(rows, key):
    """{value of key: the rows that have it}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def lines_of(groups, x, y):
    """Columns x and y of groups of rows, as plot takes them; '' is a missing value."""
    return {label: [[float("nan" if row[key] == "" else row[key]) for row in rows] for key in (x, y)]
            for label, rows in groups.items()}


# ---------------------------------------------------------------- what the page shows
def of_study(study, paper):
    """Table 4, its marks and sentences, the paper's Table 4 beside (paper: its folder, None for other data)."""
    table4 = evaluate.table4_rows(study)
    comparisons = evaluate.comparison_rows(study, table4)
    signs, best = evaluate.marks(table4, comparisons), evaluate.best_run(table4)
    return {"table4": table4, "signs": signs, "statements": evaluate.statements(study, table4, comparisons),
            "best": next(row for row in table4 if (row["model"], row["init"]) == best), "images": f"{study.images.sum():,}",
            "tied": sum(sign == "=" for sign in signs.values()),
            "paper4": evaluate.read_table4(paper / "table4.csv") if paper else {}}


def of_probabilities(study, files, run, results):
    """Scores, calibration, coverage and clinic of one configuration; writes each as CSV."""
    folds, notes = read_folds(study, files, run)
    scores, bins = score_rows(folds, study.images), calibration_rows(folds, study)
    coverage, clinic = coverage_rows(folds, len(study.classes)), clinic_rows(folds, study.classes)
    for kind, rows in (("scores", scores), ("reliability", bins), ("coverage", coverage), ("clinic", clinic)):
        if rows:
            evaluate.write_csv(results / f"{kind}_{'_'.join(run)}.csv", rows)
    calibration = bins[::BINS]  # ECE stands in every row of its bins
    for row in calibration:
        corrected, tempered = VARIANTS[row["variant"]]
        heat = [fold.temperatures[corrected] for fold in folds.values()] if tempered else []
        row["temperatures"] = f"{min(heat):.2f} to {max(heat):.2f}" if heat else "–"
    drawn = grouped([row for row in bins if not row["class"] and row["images"] >= 10], "variant")
    reliability = {plain: {name: rows for name, rows in drawn.items() if name.startswith(plain)} for plain in PLAIN}
    by_variant = grouped(coverage, "variant")
    return {"notes": notes, "scores": grouped(scores, "score"), "plain": PLAIN, "variants": list(grouped(bins, "variant")),
            "bins": BINS, "common": evaluate.COMMON, "tested": f"{sum(len(fold.labels) for fold in folds.values()):,}",
            "calibration": [row for row in calibration if not row["class"]],
            "one_vs_rest": grouped([row for row in calibration if row["class"]], "class"),
            "reliability": [(plain, plot(lines_of(rows, "confidence", "share_right"), "confidence", "share right", square=True))
                            for plain, rows in reliability.items()],
            "coverage": coverage, "clinic": clinic, "clinic_classes": CLINIC,
            "coverage_plots": [(name, plot(lines_of(by_variant, "handed_over", key), "share handed over", name))
                               for key, name in (("accuracy", "accuracy"), ("macro_recall", "macro recall")) if coverage]}


def of_run(study, run, results, paper, pairs):
    """Table 5 with tolerant scores, confusion matrix, learning curves, range test and heatmaps of one configuration."""
    folder, table5 = results.parent / "train" / run[0] / run[1], evaluate.table5_rows(study, *run)
    accepted, matrix = read_pairs(pairs, study.classes), evaluate.mean_confusion(study.runs[run])
    tolerant = np.array([tolerant_scores(fold.confusion, accepted) for fold in study.runs[run].values()])
    for c, row in enumerate(table5):
        row |= spread(tolerant[:, 0, c], "tolerant_precision_") | spread(tolerant[:, 1, c], "tolerant_recall_")
    logs = {f"fold {k}": rows for k in study.runs[run] if (rows := read_log(folder / f"fold{k}/log.csv"))}
    heatmaps = sorted(results.glob(f"gradcam_{'_'.join(run)}_*.png"))
    return {"shown": run, "table5": table5, "pairs": pairs.name if pairs else "no file",
            "paper5": {row["class"]: row for row in read_rows(paper / "table5.csv")} if paper else {},
            "confusion": inline(evaluate.draw_confusion(matrix, study.images, study.classes, title(*run))),
            "confused": confusions(matrix, study.classes),
            "curves": [(name, plot(lines_of(logs, "epoch", key), "epoch", name, log=key == "lr")) for key, name in (
                ("train_loss", "training loss"), ("val_loss", "validation loss"), ("val_accuracy", "validation accuracy"),
                ("lr", "learning rate")) if logs],
            "range_test": small_jpeg(folder / "lr_range.png", 1000),
            "heatmaps": [(file.name, source) for file in heatmaps[:HEATMAPS] if (source := small_jpeg(file, 1400))],
            "more_heatmaps": max(0, len(heatmaps) - HEATMAPS)}


def of_labels(study, files, runs, results, data, number):
    """Doubtful labels by the mean of the configurations runs, the first ones with thumbnails; writes label_issues.csv."""
    rows = doubtful_rows(study, files, runs)
    columns = ["path", "label", "suggested", "score", "flagged", "fold", "p_label", "p_suggested"]
    evaluate.write_csv(results / "label_issues.csv", [columns, *(row.values() for row in rows)])
    config = read_json(files[runs[0]][min(study.runs[runs[0]])].with_name("config.json"))
    # the class folders may lie deeper than data (BM as unpacked, crops of a COCO set); config.json says where they were
    roots = [data, *sorted(data.glob("*/")), *sorted(data.glob("*/*/")), pathlib.Path(config.get("root") or data)]
    cells = [row | {"source": next(filter(None, (small_jpeg(root / row["path"], 150) for root in roots)), None)}
             for row in rows[:number]]
    right = np.mean([np.trace(fold.confusion) / fold.confusion.sum() for run in runs for fold in study.runs[run].values()])
    return {"doubt": "; ".join(title(*run) for run in runs), "doubts": f"{len(rows):,}", "enough": ENOUGH, "right": right,
            "rare": bool((study.images < ENOUGH).all()), "cells": cells,
            "flagged": sum(row["flagged"] == "yes" for row in rows), "left_out": config.get("left_out") or []}


def choose(study, model, init):
    """The configuration to show: the best of Table 4 among those that fit model and init; SystemExit if none does."""
    rows = [row for row in evaluate.table4_rows(study) if model in (None, row["model"]) and init in (None, row["init"])]
    if not rows:
        raise SystemExit(f"no finished fold of {model or 'any network'}, {init or 'any pre-training'}; there are: "
                         + ", ".join(map("/".join, study.runs)))
    return evaluate.best_run(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="folder that holds train/ and split.csv")
    parser.add_argument("--model", help="network to show in detail; default: the best of Table 4")
    parser.add_argument("--init", help="its pre-training")
    parser.add_argument("--doubt", nargs="+", metavar="MODEL/INIT",
                        help="configurations whose mean finds doubtful labels; default: the one shown")
    parser.add_argument("--data", type=pathlib.Path, default="data/bm", help="the data set, for pictures of doubtful labels")
    parser.add_argument("--pairs", type=pathlib.Path, default=next(HERE.glob("paper/tolerant_pairs.csv"), None),
                        help="CSV label,accepted of predictions to forgive")
    parser.add_argument("--gallery", type=int, default=200, help="doubtful labels to show")
    args = parser.parse_args()
    if not args.runs.is_dir():
        raise SystemExit(f"{args.runs}: no such folder; name the one that train.py wrote with --runs")
    if args.gallery < 0:
        parser.error("--gallery has to be 0 or more")
    try:
        study, files, results = evaluate.read_study(args.runs), evaluate.find_runs(args.runs), args.runs / "results"
    except ValueError as error:  # of split.csv
        raise SystemExit(f"{error}; put the split back that the runs were made with") from None
    split = read_rows(args.runs / "split.csv")
    grids = []
    for kind, folder in (("Fine-tunings", "train"), ("Pre-trainings", "pretrain")):
        states = progress(args.runs, folder)
        grids.append((kind, states, *(evaluate.in_order({run[i] for run in states}, known)
                                      for i, known in enumerate((evaluate.MODELS, evaluate.INITS)))))
    values = {"date": f"{datetime.datetime.now():%d %B %Y, %H:%M}", "runs": args.runs, "classes": study.classes,
              "problems": study.problems, "failed": failures(args.runs), "grids": grids, "shown": None, "left_out": [],
              "expected": len(split[0]) - 2 if split else max(map(len, study.runs.values()), default=0)}
    if study.runs:
        run = choose(study, args.model, args.init)
        doubt = [tuple(name.split("/", 1)) for name in args.doubt or ()] or [run]
        for one in doubt:
            if one not in study.runs:
                raise SystemExit(f"--doubt {'/'.join(one)}: no finished fold; there are: {', '.join(map('/'.join, study.runs))}")
        known = set(study.classes) == set(evaluate.CLASSES) and (HERE / "paper/table4.csv").exists()
        paper = HERE / "paper" if known else None
        values |= of_study(study, paper) | of_run(study, run, results, paper, args.pairs)
        values |= of_probabilities(study, files, run, results)
        values |= of_labels(study, files, doubt, results, args.data, args.gallery)
    evaluate.write_file(results / "index.html", render(values))
    said = f"{title(*run)}; {values['flagged']} labels to look at again" if study.runs else "no fold is finished yet"
    print(f"{results / 'index.html'}: {said}")
    if study.problems and not study.runs:
        raise SystemExit(f"{study.problems[0]}; it is named on the page, and no other fold is left to show")


if __name__ == "__main__":
    main()
