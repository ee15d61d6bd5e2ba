"""Tables 4 and 5: each score, mean, ± and column of evaluate.py.

Truth comes from scikit-learn's precision_recall_fscore_support, f1_score and accuracy_score, from Python's
statistics module, from counts by hand, and from the paper: its Table 5 has to give its Table 4
(paper/table4.csv, paper/table5.csv).
"""

import contextlib
import csv
import io
import random
import re
import shutil
import signal
import statistics
import sys
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from conftest import read_rows as read_csv
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

import evaluate
import report

SCORES = ("precision", "recall", "f1")
TABLE4 = "model init folds precision_mean precision_std recall_mean recall_std f1_mean f1_std".split()
TABLE4 += "accuracy_mean accuracy_std f1_fold_std f1_common".split()
TABLE5 = "class,images,precision_mean,precision_std,recall_mean,recall_std,f1_mean,f1_std".split(",")


# ---------------------------------------------------------------- files as train.py leaves them
def write_csv(file, rows):
    """Rows of any names, as Python's csv module writes them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def write_predictions(runs, run, fold, rows, classes):
    """predictions.csv of rows (path, label, prediction): 0.9 for the prediction, the rest shared."""
    rest = f"{0.1 / (len(classes) - 1):.7g}"
    table = [["path", "label", "prediction", *(f"p_{name}" for name in classes)]]
    for row in rows:
        table.append([*row, *("0.9" if name == row[2] else rest for name in classes)])
    return write_csv(runs.joinpath("train", *run, f"fold{fold}", "predictions.csv"), table)


def simulate(runs, counts, networks, folds=5, seed=0):
    """A study of `counts` {class: images}, split.csv and all; `networks` {(model, init): share that is right,
    the others at random}.

    Images of a class are dealt to the folds in turn. Returns {((model, init), fold): (labels,
    predictions)}, lists of names.
    """
    rng, classes, answers = np.random.default_rng(seed), list(counts), {}
    images = [(f"{name}/{i}.jpg", name, i % folds) for name, number in counts.items() for i in range(number)]
    table = [["path", "label", *(f"fold{k}" for k in range(folds))]]
    for path, name, fold in images:
        table.append([path, name, *("test" if k == fold else "train" for k in range(folds))])
    write_csv(runs / "split.csv", table)
    for run, right in networks.items():
        for k in range(folds):
            rows = []
            for path, name in [image[:2] for image in images if image[2] == k]:
                guess = name if rng.random() < right else classes[rng.integers(len(classes))]
                rows.append((path, name, guess))
            write_predictions(runs, run, k, rows, classes)
            answers[run, k] = [row[1] for row in rows], [row[2] for row in rows]
    return answers


def command(*arguments, pictures=False):
    """evaluate.py's main() without a new Python's seconds, nor a picture's: (exit status, stdout, stderr)."""
    out, err, status, message = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO(), 0, ""
    draw = evaluate.draw_confusion if pictures else lambda *_: b""
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(signal, "signal"),
        mock.patch.object(evaluate, "draw_confusion", draw),
    ):
        try:
            with mock.patch.object(sys, "argv", ["evaluate.py", *map(str, arguments)]):
                evaluate.main()
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                status, message = 1, f"{status}\n"
    out.flush()
    return status, out.buffer.getvalue().decode(), err.getvalue() + message


# ---------------------------------------------------------------- one study, read through its files
COUNTS = {"FGC": 23, "LYT": 99, "NGB": 120, "ABE": 3, "BLA": 100, "HAC": 1, "EOS": 60}  # in no order
NETWORKS = {
    ("vit_l_32", "imagenet"): 0.8,
    ("resnet152", "mine"): 0.5,
    ("resnet152", "random"): 0.7,
    ("resnext50_32x4d", "random"): 0.6,
    ("alexnet", "random"): 0.02,
    ("vit_l_32", "random"): 0.3,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(runs, answers, stdout of --compare paper/table4.csv); resnet152 mine has four folds, alexnet one,
    vit_l_32 random two."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    answers = simulate(runs, COUNTS, NETWORKS)
    gone = [("resnet152", "mine", 1), *(("alexnet", "random", fold) for fold in (0, 1, 2, 4))]
    for model, init, fold in [*gone, *(("vit_l_32", "random", fold) for fold in (0, 3, 4))]:
        shutil.rmtree(runs / f"train/{model}/{init}/fold{fold}")
        del answers[(model, init), fold]
    pretraining = runs.joinpath("pretrain"), ("vgg19_bn", "cd"), 0  # is no run
    write_predictions(*pretraining, [("NGB/0.jpg", "NGB", "EOS")], list(COUNTS))
    write_csv(runs / "train/vgg19_bn/cd/fold0/val_predictions.csv", [["unfinished"]])
    for name in ("fold01", "fold0_old", "fold"):
        write_csv(runs / f"train/vgg19_bn/cd/{name}/predictions.csv", [["a copy of somebody's"]])
    status, out, err = command("--runs", runs, "--compare", ROOT / "paper/table4.csv")
    assert (status, err) == (0, "")
    return runs, answers, out


def by_scikit_learn(answers, run):
    """{class: {score: one value for each fold whose test set holds the class}}."""
    values = {name: {score: [] for score in SCORES} for name in COUNTS}
    for (of_run, _), (labels, predictions) in answers.items():
        if of_run == run:
            present = sorted(set(labels))
            columns = precision_recall_fscore_support(labels, predictions, labels=present, zero_division=0)
            for score, column in zip(SCORES, columns):
                for name, value in zip(present, column):
                    values[name][score].append(float(value))
    return values


def number(cell):
    """A cell of a CSV; NaN for an empty one, and nothing else."""
    assert cell.lower() not in ("nan", "none", "inf")
    return float(cell or "nan")


def row_of(runs, run):
    """A run's row of table4.csv."""
    rows = read_csv(runs / "results/table4.csv")
    return next(row for row in rows if (row["model"], row["init"]) == run)


def near(value, rel=1e-5):
    """pytest.approx for the six digits of a CSV, where NaN equals NaN."""
    return pytest.approx(value, rel=rel, nan_ok=True)


def std(values):
    """Sample standard deviation by Python's statistics; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def mean(values):
    """Mean of those that are no NaN; NaN of none."""
    values = [value for value in values if value == value]
    return statistics.fmean(values) if values else float("nan")


# ---------------------------------------------------------------- scores of one fold
@pytest.mark.parametrize("seed", range(5))
def test_scores_of_a_class_agree_with_scikit_learn(seed):
    """Up to 21 classes, often some of them never predicted or absent."""
    rng = np.random.default_rng(seed)
    classes, images = rng.integers(2, 22), rng.integers(1, 60)
    labels, predictions = rng.integers(0, classes, (2, images))
    options = {"labels": range(classes), "zero_division": 0}
    theirs = np.array(precision_recall_fscore_support(labels, predictions, **options)[:3])
    theirs[:, np.bincount(labels, minlength=classes) == 0] = np.nan
    np.testing.assert_allclose(evaluate.per_class_scores(labels, predictions, classes), theirs, rtol=1e-12)


def test_scores_by_hand():
    """Class 2 is never predicted: zero. Class 3 has no image: left out, though one image of class 0 was taken
    for it."""
    labels, predictions = [0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 3, 1, 0, 0]
    precision, recall, f1 = evaluate.per_class_scores(labels, predictions, 4)
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert precision.tolist() == [2 / 4, 1 / 2, 0, nan]
    assert recall.tolist() == [2 / 4, 1 / 2, 0, nan]
    assert f1.tolist() == [2 / 4, 1 / 2, 0, nan]


def test_the_standard_deviation_is_the_samples():
    """Of 1, 2, 4: mean 7/3, squares 16/9 + 1/9 + 25/9 = 14/3, over n - 1 = 2 it is 7/3."""
    assert evaluate.moments([1, 2, 4]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))


# ---------------------------------------------------------------- the paper's own numbers
@pytest.fixture
def published():
    """The paper's Table 5 as scores of two folds; ResNeXt's columns left aside."""
    table5 = read_csv(ROOT / "paper/table5.csv")
    columns = [[float(row[key]) for row in table5] for key in TABLE5[2:]]
    average, spread = np.array(columns[::2]), np.array(columns[1::2])
    folds = [average - spread / 2**0.5, average + spread / 2**0.5]  # two values of this mean and sample std
    run = {k: evaluate.Fold(np.eye(21, dtype=int), scores, 1.0) for k, scores in enumerate(folds)}
    images = np.array([int(row["images"]) for row in table5])
    runs = {("regnet_y_32gf", "imagenet+cd"): run}
    return table5, evaluate.Study([row["class"] for row in table5], images, runs, [], [])


def test_the_published_table_5_gives_the_published_table_4(published):
    """Mean over classes of the means, ± the mean over classes of the stds."""
    (row,) = evaluate.table4_rows(published[1])
    rows = {(row["model"], row["init"]): row for row in read_csv(ROOT / "paper/table4.csv")}
    theirs = [rows["regnet_y_32gf", "imagenet+cd"][key] for key in TABLE5[2:]]
    assert theirs == "0.787 0.060 0.755 0.061 0.762 0.050".split()
    assert [f"{row[key]:.3f}" for key in TABLE5[2:]] == theirs


def test_four_classes_of_the_paper_have_fewer_than_100_images(published):
    """f1_common leaves KSC, ABE, LYI and FGC out; the mean of the other 17 by hand."""
    table5, study = published
    rare = {row["class"] for row in table5 if int(row["images"]) < 100}
    assert rare == {"KSC", "ABE", "LYI", "FGC"}
    common = statistics.fmean(float(row["f1_mean"]) for row in table5 if row["class"] not in rare)
    assert evaluate.table4_rows(study)[0]["f1_common"] == pytest.approx(common)


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("run", NETWORKS)
def test_table_5_holds_mean_and_std_over_the_folds_that_test_the_class(study, run):
    """ABE's 3 images are tested in folds 0 to 2, the one HAC in fold 0: of one value there is no std, of none
    no mean."""
    values, rows = by_scikit_learn(study[1], run), read_csv(study[0] / f"results/table5_{'_'.join(run)}.csv")
    assert list(rows[0]) == [*TABLE5, "recall_low", "recall_high"]
    assert {row["class"]: int(row["images"]) for row in rows} == COUNTS
    for row in rows:
        for score, of_folds in values[row["class"]].items():
            assert number(row[f"{score}_mean"]) == near(mean(of_folds))
            assert number(row[f"{score}_std"]) == near(std(of_folds))


@pytest.mark.parametrize("run", NETWORKS)
def test_table_4_is_the_mean_over_classes_of_table_5(study, run):
    """f1_fold_std: the std of each fold's macro F1; f1_common: without the classes of 99 images and fewer."""
    row, values = row_of(study[0], run), by_scikit_learn(study[1], run)
    assert list(row) == TABLE4
    for score in SCORES:
        assert number(row[f"{score}_mean"]) == near(mean(mean(one[score]) for one in values.values()))
        assert number(row[f"{score}_std"]) == near(mean(std(one[score]) for one in values.values()))
    folds = [answer for (of_run, _), answer in study[1].items() if of_run == run]
    accuracies, macro = [accuracy_score(*answer) for answer in folds], []
    for labels, guesses in folds:
        options = {"labels": sorted(set(labels)), "average": "macro", "zero_division": 0}
        macro.append(f1_score(labels, guesses, **options))
    assert int(row["folds"]) == len(folds)
    assert number(row["accuracy_mean"]) == near(mean(accuracies))
    assert number(row["accuracy_std"]) == near(std(accuracies))
    assert number(row["f1_fold_std"]) == near(std(macro), rel=1e-4)
    assert number(row["f1_common"]) == near(mean(mean(values[name]["f1"]) for name in ("NGB", "BLA")))


def test_a_study_that_has_come_halfway_says_how_many_folds_a_row_has(study):
    """Neither a pre-training, nor an unfinished fold, nor a folder called fold01 or fold0_old is a run."""
    folds = {(row["model"], row["init"]): row["folds"] for row in read_csv(study[0] / "results/table4.csv")}
    fewer = {("resnet152", "mine"): "4", ("vit_l_32", "random"): "2", ("alexnet", "random"): "1"}
    assert folds == dict.fromkeys(NETWORKS, "5") | fewer
    assert not list((study[0] / "results").glob("*vgg19_bn*"))


def test_a_class_that_a_fold_does_not_test_is_named(study):
    for text in (study[2], (study[0] / "results/table4.md").read_text()):
        found = re.findall(r"^- Fold (\d) has no test image of (\w+): left out", text, re.MULTILINE)
        assert found == [("1", "HAC"), ("2", "HAC"), ("3", "HAC"), ("3", "ABE"), ("4", "HAC"), ("4", "ABE")]


def test_a_class_left_out_of_a_fold_by_hand(tmp_path):
    """a: recalls 1 and 1/2. b is tested in fold 0 alone and right there: 1, without a std. c never predicted:
    0 and 0."""
    write_predictions(tmp_path, ("m", "i"), 0, [("1", "a", "a"), ("2", "b", "b"), ("3", "c", "a")], "abc")
    write_predictions(tmp_path, ("m", "i"), 1, [("4", "a", "a"), ("5", "a", "b"), ("6", "c", "a")], "abc")
    assert command("--runs", tmp_path)[0] == 0
    rows = read_csv(tmp_path / "results/table5_m_i.csv")
    assert [number(row["recall_mean"]) for row in rows] == [0.75, 1, 0]
    assert [row["recall_std"] for row in rows[1:]] == ["", "0"]
    row = row_of(tmp_path, ("m", "i"))
    assert number(row["recall_mean"]) == near((0.75 + 1 + 0) / 3)
    assert number(row["recall_std"]) == near((0.5**0.5 / 2 + 0) / 2)  # of 1 and 1/2: sqrt(1/8)


def test_a_class_counts_by_its_images_in_the_split_not_by_those_tested_so_far(tmp_path):
    """100 of a and 99 of b, of which fold 0, the only one so far, tests 50 each, all taken for a: of a 1/2
    and 1, so F1 is 2/3. Without a split they are the 50 tested."""
    simulate(tmp_path, {"a": 100, "b": 99}, {("m", "i"): 1}, folds=2)
    shutil.rmtree(tmp_path / "train/m/i/fold1")
    tested = read_csv(tmp_path / "train/m/i/fold0/predictions.csv")
    write_predictions(tmp_path, ("m", "i"), 0, [(row["path"], row["label"], "a") for row in tested], "ab")
    for images, f1_common in ((["100", "99"], 2 / 3), (["50", "50"], np.nan)):
        assert command("--runs", tmp_path)[0] == 0
        assert [row["images"] for row in read_csv(tmp_path / "results/table5_m_i.csv")] == images
        assert number(row_of(tmp_path, ("m", "i"))["f1_common"]) == near(f1_common)
        (tmp_path / "split.csv").unlink(missing_ok=True)


# ---------------------------------------------------------------- where nothing overlaps
def overlapping_study(runs, seed=0):
    """A study with a validation part and pairs of overlapping images; returns what the files say, as dicts
    and lists."""
    rng = np.random.default_rng(seed)
    answers = simulate(runs, COUNTS, {("vit_l_32", "cd"): 0.7, ("resnet152", "cd"): 0.5})
    split = read_csv(runs / "split.csv")
    for row in split:
        row |= {key: "val" for key in row if row[key] == "train" and rng.random() < 0.2}
    write_csv(runs / "split.csv", [list(split[0]), *(row.values() for row in split)])
    pairs = [[split[i]["path"] for i in rng.integers(len(split), size=2)] for _ in range(60)]
    pairs.append(["NGB/0.jpg", "gone/1.jpg"])
    rows = [[*pair, 3, -4, 0.2, 0.5] for pair in pairs]
    write_csv(runs / "overlaps.csv", ["first second dx dy difference area".split(), *rows])
    return split, pairs, answers


def test_scores_where_nothing_overlaps_are_those_of_the_images_without_a_partner_in_training(tmp_path):
    """By hand, image by image: partners in the fold's validation part don't count, and neither do images the
    split has not."""
    split, pairs, answers = overlapping_study(tmp_path)
    status, out, err = command("--runs", tmp_path)
    assert (status, err) == (0, "")
    both_ways, left_out = [*pairs, *(pair[::-1] for pair in pairs)], 0
    for run in (("resnet152", "cd"), ("vit_l_32", "cd")):
        f1, accuracies = {name: [] for name in COUNTS}, []
        for k in range(5):
            part = {row["path"]: row[f"fold{k}"] for row in split}
            shared = {path for path, partner in both_ways if part.get(partner) == "train"}
            tested = [path for path in part if part[path] == "test"]
            kept = [answer for path, *answer in zip(tested, *answers[run, k]) if path not in shared]
            left_out += len(tested) - len(kept)
            labels, guesses = zip(*kept)
            present = sorted(set(labels))
            accuracies.append(accuracy_score(labels, guesses))
            values = f1_score(labels, guesses, labels=present, average=None, zero_division=0)
            for name, value in zip(present, values):
                f1[name].append(value)
        row = row_of(tmp_path, run)
        assert list(row) == [*TABLE4, "f1_no_overlap", "accuracy_no_overlap"]
        assert number(row["f1_no_overlap"]) == near(mean(map(mean, f1.values()))) != number(row["f1_mean"])
        assert number(row["accuracy_no_overlap"]) == near(mean(accuracies)) != number(row["accuracy_mean"])
    shown = f"{left_out // 2} of {len(split)} test images share pixels with a training image"
    assert left_out > 40 and shown in out and "(60 pairs)" in out and "1 pairs are ignored" in out


@pytest.mark.parametrize("name", ["overlaps.csv", "groups.csv"])
@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_an_invalid_list_of_overlaps_or_groups_ends_it_in_one_line(tmp_path, name, content):
    overlapping_study(tmp_path)
    (tmp_path / name).write_text(content)
    status, out, err = command("--runs", tmp_path)
    assert (status, out) == (1, "") and err.startswith(f"{tmp_path / name}: ") and err.count("\n") == 1


def test_groups_are_counted_by_hand(tmp_path):
    """In fold 0 patient p has an image in training, q not; in fold 1 q has one, r not."""
    rows = (
        "1 a test train p,2 a train train p,3 b test train q,4 b val test q,5 b train test r,6 a train test"
    )
    rows = [row.split() for row in rows.split(",")]
    write_csv(tmp_path / "split.csv", [["path", "label", "fold0", "fold1"], *(row[:4] for row in rows)])
    groups = [[row[0], row[4]] for row in rows if row[4:]]
    write_csv(tmp_path / "groups.csv", [["path", "group"], *groups])
    write_predictions(tmp_path, ("m", "i"), 0, [("1", "a", "a"), ("3", "b", "b")], "ab")
    status, out, err = command("--runs", tmp_path)
    # image 1 has 2 in training; in fold 1, image 4 has 3 there
    expected = "The test images are of 3 groups (groups.csv; 1 images in none); 2 of them have an image"
    assert (status, err) == (0, "") and expected in out
    assert "A single fold has no ±, no interval" in out and "± is the mean" not in out


def test_a_study_that_may_only_be_read_gets_its_tables_elsewhere(without_rights):
    folder, nobody = without_rights
    write_predictions(folder / "runs", ("m", "i"), 0, [("1", "a", "a"), ("2", "b", "b")], "ab")
    (folder / "mine").mkdir()
    (folder / "mine").chmod(0o777)
    argv = ["report.py", "--runs", f"{folder}/runs", "--out", f"{folder}/mine"]
    with nobody(), mock.patch.object(sys, "argv", argv):
        assert "another --out" in command("--runs", folder / "runs")[2]
        assert command("--runs", folder / "runs", "--out", folder / "mine/tables")[0] == 0
        report.main()
    assert (folder / "mine/tables/table4.csv").exists() and (folder / "mine/index.html").exists()
    assert [file.name for file in (folder / "runs").iterdir()] == ["train"]


def cells_of(text):
    """Rows of the tables in a Markdown text, as lists of cells."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [list(map(str.strip, cells)) for cells in lines]


def agree(cells, row):
    """Are the cells '0.787 ± 0.060' for the three scores the numbers of a row of a CSV, to three decimals?"""
    for cell, score in zip(cells, SCORES, strict=True):
        numbers = [number(row[f"{score}_{what}"]) for what in ("mean", "std")]
        shown = cell.split(" ± ") if cell else []
        assert {*map(len, shown)} <= {5}
        shown += ["nan"] * (2 - len(shown))
        assert list(map(float, shown)) == pytest.approx(numbers, abs=0.000501, nan_ok=True)
    return True


def test_the_tables_in_markdown_hold_the_numbers_of_the_csv(study):
    results = study[0] / "results"
    header, rule, *rows = cells_of((results / "table4.md").read_text())
    table4 = read_csv(results / "table4.csv")
    assert header[:6] == ["model", "init", "folds", *SCORES] and set("".join(rule)) == {"-"}
    assert [row[2] for row in rows] == [row["folds"] for row in table4] == ["5", "4", "2", "5", "5", "1"]
    assert all(agree(row[3:6], one) for row, one in zip(rows, table4, strict=True))
    assert ["ViT_l_32", "ImageNet"] in [row[:2] for row in rows]
    for row in table4:
        name = f"table5_{row['model']}_{row['init']}"
        _, _, *rows = cells_of((results / f"{name}.md").read_text())
        for cells, one in zip(rows, read_csv(results / f"{name}.csv"), strict=True):
            assert cells[0].endswith(f"({one['class']})") and cells[1] == one["images"]
            assert agree(cells[2:5], one)


# ---------------------------------------------------------------- order
def test_bone_marrow_classes_stand_in_the_order_of_the_papers_table_5(study):
    """Others, or with one other, in alphabetical order."""
    order = [row["class"] for row in read_csv(ROOT / "paper/table5.csv")]
    shuffled = random.Random(0).sample(order, 21)
    assert shuffled != order and evaluate.class_order(shuffled) == order
    written = [row["class"] for row in read_csv(study[0] / "results/table5_vit_l_32_imagenet.csv")]
    assert written == [name for name in order if name in COUNTS] == "NGB LYT EOS BLA HAC ABE FGC".split()
    assert evaluate.class_order(["NGB", "BLA", "zebra"]) == ["BLA", "NGB", "zebra"]


def test_the_order_of_a_files_columns_changes_nothing(tmp_path):
    rows = [("1", "NGB", "NGB"), ("2", "BLA", "FGC"), ("3", "FGC", "FGC"), ("4", "FGC", "NGB")]
    for order in (["NGB", "BLA", "FGC"], ["FGC", "NGB", "BLA"]):
        one = evaluate.read_predictions(write_predictions(tmp_path, ("m", "i"), 0, rows, order))
        assert one.classes == ["NGB", "BLA", "FGC"] and one.paths == ["1", "2", "3", "4"]
        assert one.labels.tolist() == [0, 1, 2, 2] and one.predictions.tolist() == [0, 2, 2, 0]
        assert one.probabilities.argmax(1).tolist() == [0, 2, 2, 0]


def test_rows_stand_in_the_order_of_the_papers_table_4_then_by_name(tmp_path):
    paper = [(row["model"], row["init"]) for row in read_csv(ROOT / "paper/table4.csv")]
    mine = "resnet152/imagenet+mine resnet152/mine alexnet/cd mobilenet_v3_large/random".split()
    mine = [tuple(name.split("/")) for name in mine]
    for model, init in random.Random(0).sample(paper + mine, 29):
        for fold in (10, 2):
            write_csv(tmp_path / "train" / model / init / f"fold{fold}" / "predictions.csv", [])
    found = evaluate.find_runs(tmp_path)
    assert [run for run in found if run not in mine] == paper and set(found) == {*paper, *mine}
    assert [init for model, init in found if model == "resnet152"][-2:] == ["imagenet+mine", "mine"]
    assert list(found)[-2:] == mine[-2:] and all(list(folds) == [2, 10] for folds in found.values())


# ---------------------------------------------------------------- beside the published numbers
def comparison_in(out):
    """The comparison that --compare prints below Table 4: {(model, pre-training): cells in groups of ours,
    theirs, difference}."""
    lines = out.splitlines()
    start = max(i for i, line in enumerate(lines) if "theirs" in line and line.startswith("|"))
    table = cells_of("\n".join(lines[start:]))
    assert table[0] == ["model", "init", *(cell for score in SCORES for cell in (score, "theirs", "diff."))]
    return {tuple(row[:2]): [row[i : i + 3] for i in (2, 5, 8)] for row in table[2:]}


def test_compare_prints_ours_theirs_and_the_difference(study):
    """No difference where one side is missing, nor from ResNeXt's row, quoted from Matek et al.: other
    training, population std, F1 of the mean precision and recall."""
    rows, lines = comparison_in(study[2]), study[2].rstrip().splitlines()
    for name, run, theirs in (
        (("ViT_l_32", "ImageNet"), ("vit_l_32", "imagenet"), ("0.769", "0.687", "0.712")),
        (("ResNet-152", "Random"), ("resnet152", "random"), ("0.670", "0.731", "0.689")),
    ):
        for cells, score, published in zip(rows[name], SCORES, theirs):
            mine = number(row_of(study[0], run)[f"{score}_mean"])
            expected = pytest.approx((mine, mine - float(published)), abs=0.000501)
            assert cells[1] == published and cells[2][0] in "+-"
            assert (float(cells[0]), float(cells[2])) == expected
    assert rows["Regnet_y_32gf", "ImageNet + CD"] == [["", "0.787", ""], ["", "0.755", ""], ["", "0.762", ""]]
    assert all(cells[0] and cells[1:] == ["", ""] for cells in rows["ResNet-152", "mine"])
    assert len(rows) == 25 + 2, "the paper's, and the two that it has not"
    cells = rows["ResNeXt-50", "Random"]
    assert [cell[1:] for cell in cells] == [["0.510", "quoted"], ["0.689", "quoted"], ["0.545", "quoted"]]
    assert all(cell[0] for cell in cells) and lines[-1].startswith("quoted: from Matek et al.")
    assert study[2].count("quoted") == 4, "in no other row"


def test_a_study_of_ones_own_is_compared_in_all_rows(study):
    """Beside itself every difference is zero, ResNeXt's too, which is no quotation there."""
    status, out, _ = command("--runs", study[0], "--compare", study[0] / "results/table4.csv")
    assert status == 0 and "quoted" not in out
    numbers = np.array(list(comparison_in(out).values()), float)
    assert len(numbers) == 6 and abs(numbers[..., 0] - numbers[..., 1]).max() <= 0.0011
    assert abs(numbers[..., 2]).max() == 0


def test_rows_may_be_called_like_missing_values(tmp_path):
    """A row of --name NA, and the classes NA and 01, are compared as such."""
    rows = [("1", "NA", "NA"), ("2", "01", "NA"), ("3", "01", "01")]
    for init in ("NA", "01"):
        write_predictions(tmp_path, ("nan", init), 0, rows, ["NA", "01"])
    assert command("--runs", tmp_path)[0] == 0
    status, out, _ = command("--runs", tmp_path, "--compare", tmp_path / "results/table4.csv")
    assert status == 0 and [row[0] for row in comparison_in(out)["nan", "NA"]] == ["0.750", "0.750", "0.667"]
    assert [row["class"] for row in read_csv(tmp_path / "results/table5_nan_01.csv")] == ["01", "NA"]


@pytest.mark.parametrize("content", ["", "model,init,precision_mean\nm,i,0.5\n"])
def test_a_file_that_is_no_table_4_is_refused_in_one_line(study, tmp_path, content):
    (tmp_path / "other.csv").write_text(content)
    status, out, err = command("--runs", study[0], "--compare", tmp_path / "other.csv")
    assert (status, out) == (1, "") and err.count("\n") == 1 and err.startswith(f"{tmp_path / 'other.csv'}: ")
