"""The split: every image tested once, 20/16/64% of each class and fold, groups kept whole, the same on any
machine.

Truth comes from the class counts that the paper prints (paper/table5.csv), from scikit-learn's
StratifiedKFold and StratifiedGroupKFold, from counts by hand, and, for the file, from Python's csv module
read by eye.
"""

import csv
import itertools
import json
import os
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.sparse.csgraph
from conftest import ROOT, read_rows
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

import datasets
import splits

PUBLISHED = {row["class"]: int(row["images"]) for row in read_rows(ROOT / "paper/table5.csv")}
TARGETS = np.repeat(np.arange(len(PUBLISHED)), list(PUBLISHED.values()))
SHARES = {"test": 0.20, "val": 0.16, "train": 0.64}


def counts(targets, parts, part):
    """Images of each class and fold in a part, int [classes, folds]."""
    return np.array([(parts[targets == label] == part).sum(0) for label in range(targets.max() + 1)])


@pytest.fixture(scope="module")
def bm():
    """The split at the paper's class counts."""
    return splits.make_splits(TARGETS)


@pytest.fixture
def command(monkeypatch, capsys):
    """splits.py's main() called with arguments, without a new Python's seconds: (exit status, stdout,
    stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["splits.py", *map(str, arguments)])
        status = message = None
        try:
            status = splits.main()
        except SystemExit as end:
            status, message = (end.code, "") if isinstance(end.code, int) else (1, f"{end.code}\n")
        out, err = capsys.readouterr()
        return status or 0, out, err + (message or "")

    return call


def write_tree(root, names, order=None):
    """A folder of class folders with tiny images, the files created in the order given."""
    picture = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    for name in order or names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)


# ---------------------------------------------------------------- the paper's counts
def test_the_papers_class_counts_are_171374_images_of_21_classes(bm):
    assert (len(PUBLISHED), len(TARGETS), PUBLISHED["ABE"]) == (21, 171374, 8)
    assert bm.shape == (171374, 5) and set(np.unique(bm)) == {"train", "val", "test"}


def test_every_image_is_tested_exactly_once(bm):
    assert ((bm == "test").sum(1) == 1).all()


@pytest.mark.parametrize("part", SHARES)
def test_every_class_and_fold_lies_within_one_image_of_20_16_64_percent(bm, part):
    expected = SHARES[part] * np.array(list(PUBLISHED.values()))[:, None]
    assert np.abs(counts(TARGETS, bm, part) - expected).max() <= 1


def test_validation_is_a_fifth_of_the_rest_rounded(bm):
    rest = np.array(list(PUBLISHED.values()))[:, None] - counts(TARGETS, bm, "test")
    assert (np.abs(counts(TARGETS, bm, "val") - 0.2 * rest) <= 0.5).all()


def test_the_47_faggot_cells_are_tested_9_or_10_a_fold(bm):
    assert sorted(counts(TARGETS, bm, "test")[list(PUBLISHED).index("FGC")]) == [9, 9, 9, 10, 10]


def test_test_counts_agree_with_stratified_k_fold_of_scikit_learn(bm):
    folds = StratifiedKFold(5).split(TARGETS, TARGETS)
    theirs = np.transpose([np.bincount(TARGETS[test], minlength=21) for _, test in folds])
    ours = counts(TARGETS, bm, "test")
    assert np.array_equal(np.sort(ours, 1), np.sort(theirs, 1)), "the same sizes but for their order"


def test_folds_hold_different_images_for_validation(bm):
    """Validation is drawn anew in each fold: an image is in it in 0 to 4 of them, on average in 0.8."""
    times = (bm == "val").sum(1)
    assert times.max() >= 3 and abs(times.mean() - 0.8) < 0.001


def test_the_split_is_random_within_a_class(bm):
    """Neighbours in a class fall in the same test part with probability 1/5, not by their place in the
    list."""
    fold = (bm == "test").argmax(1)
    neighbours = (fold[1:] == fold[:-1])[TARGETS[1:] == TARGETS[:-1]]
    assert abs(neighbours.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / len(neighbours))


# ---------------------------------------------------------------- seeds and machines
def test_the_same_seed_gives_the_same_split_in_another_process_and_another_seed_another(bm):
    small = np.repeat([0, 1], [30, 12])
    code = "import splits; print(','.join(splits.make_splits([0] * 30 + [1] * 12, seed=7).ravel()))"
    options = {"cwd": ROOT, "text": True, "env": dict(os.environ, PYTHONHASHSEED="1")}
    other = subprocess.check_output([sys.executable, "-c", code], **options).strip()
    assert other == ",".join(splits.make_splits(small, seed=7).ravel())
    assert other != ",".join(splits.make_splits(small, seed=8).ravel())


def test_the_split_is_dealt_by_numbers_that_numpy_promises_never_to_change():
    """The raw output of PCG64 for entropy (5, 3), written down here: image 4 has the least number, image 7
    the greatest.

    Class 3 under seed 5, alone, is so dealt to folds 0, 1, 0, 1, ... in the order 4, 1, 5, 3, 2, 0, 6, 7.
    """
    raw = "B63A2786F89F39E5 0B83DDAE49336C0E A39BA47CF6A33BD2 64030DD80A5378BF "
    raw += "06B582AB5DB39855 271A352DF747EC0D E0F4C8DB6E16B513 EB0C6991C153592E"
    assert sorted(range(8), key=raw.split().__getitem__) == [4, 1, 5, 3, 2, 0, 6, 7]
    tested = (splits.make_splits(np.full(8, 3), folds=2, seed=5) == "test").argmax(1)
    assert tested.tolist() == [1, 1, 0, 1, 0, 0, 0, 1]


def test_a_class_keeps_its_draw_when_other_classes_come_or_go():
    """Images of one class that are tested together stay together if another class grows (fold numbers may
    turn)."""
    alone = splits.make_splits(np.repeat([0, 2], [9, 50]))[9:]
    beside = splits.make_splits(np.repeat([0, 1, 2], [9, 33, 50]))[42:]
    ours = {frozenset(np.flatnonzero(column == "test")) for column in alone.T}
    assert ours == {frozenset(np.flatnonzero(column == "test")) for column in beside.T}


def test_the_order_in_which_a_file_system_lists_files_changes_nothing(tmp_path, command):
    names = [f"{label}/{folder}/{i}.png" for label in "AB" for folder in ("1-9", "10-19") for i in range(15)]
    shuffled = random.Random(1).sample(names, len(names))
    for folder, order in (("one", names), ("two", names[::-1]), ("three", shuffled)):
        write_tree(tmp_path / folder, names, order)
        assert command("--data", tmp_path / folder, "--out", tmp_path / f"{folder}.csv")[0] == 0
    files = {(tmp_path / f"{folder}.csv").read_bytes() for folder in ("one", "two", "three")}
    assert len(files) == 1 and files.pop().count(b"\n") == 61


# ---------------------------------------------------------------- tiny classes
@pytest.mark.parametrize("images, tested, validated", [(1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 1)])
def test_classes_of_1_to_4_images_are_split_as_far_as_they_go(images, tested, validated):
    """By hand: as many folds test one image as there are images; a rest of two or more gives one to
    validation."""
    parts = splits.make_splits(np.repeat([0, 1], [images, 40]))[:images]
    assert ((parts == "test").sum(1) == 1).all() and (parts == "test").any(0).sum() == tested
    rest = images - (parts == "test").sum(0)
    assert (parts == "val").sum(0).tolist() == [validated if r >= 2 else 0 for r in rest]
    assert (parts == "train").sum(0).tolist() == [r - validated if r >= 2 else r for r in rest]


def test_tiny_classes_are_named_in_one_line(tmp_path, command):
    sizes = {"one": 1, "two": 2, "four": 4, "five": 5, "many": 30}
    names = [f"{label}/{i}.png" for label in sizes for i in range(sizes[label])]
    write_tree(tmp_path / "data", names)
    status, out, _ = command("--data", tmp_path / "data", "--out", tmp_path / "split.csv")
    named = [line for line in out.splitlines() if "too few" in line]
    assert status == 0 and len(named) == 1
    assert named[0].endswith(": four (4), one (1), two (2)"), "five images suffice for five folds"


def test_folds_and_validation_share_can_be_chosen():
    """Ten folds of 100 images: 10 tested, and a third of the other 90 for validation."""
    parts = splits.make_splits(np.zeros(100, int), folds=10, val=1 / 3)
    for part, number in {"test": 10, "val": 30, "train": 60}.items():
        assert (parts == part).sum(0).tolist() == [number] * 10


@pytest.mark.parametrize("settings", [{"folds": 1}, {"val": 0}, {"val": 1}, {"seed": -1}])
def test_a_split_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match="at least 2, between 0 and 1"):
        splits.make_splits(np.zeros(100, int), **settings)


# ---------------------------------------------------------------- groups
def patients(seed=0, number=150):
    """Cells of patients who each have their own mix of six classes: (targets, groups)."""
    rng = np.random.default_rng(seed)
    mixes = rng.dirichlet([4, 2, 1, 0.5, 0.2, 0.1], number)
    sizes = rng.lognormal(3, 1, number).astype(int) + 1
    targets = [rng.choice(6, n, p=p) for n, p in zip(sizes, mixes)]
    return np.concatenate(targets), np.repeat(np.arange(number), sizes)


def test_a_group_is_never_in_two_parts_of_a_fold_and_each_image_still_tested_once():
    targets, groups = patients()
    parts = splits.make_splits(targets, groups=groups)
    for group in np.unique(groups):
        assert len(np.unique(parts[groups == group], axis=0)) == 1
    assert ((parts == "test").sum(1) == 1).all()
    assert all(set(column) == {"train", "val", "test"} for column in parts.T)


def test_groups_are_spread_as_evenly_as_scikit_learn_spreads_them():
    """Chi-square of the test parts' class counts against a fifth each, beside StratifiedGroupKFold's, in 12
    data sets."""
    ratios = []
    for seed in range(12):
        targets, groups = patients(seed)
        expected = np.bincount(targets)[:, None] / 5
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(targets, targets, groups)
        theirs = np.transpose([np.bincount(targets[test], minlength=6) for _, test in folds])
        ours = counts(targets, splits.make_splits(targets, seed=seed, groups=groups), "test")
        ratios.append(np.divide(*[((table - expected) ** 2 / expected).sum() for table in (ours, theirs)]))
    assert np.exp(np.log(ratios).mean()) < 1


def test_groups_of_one_image_give_the_shares_of_the_plain_split():
    targets = np.repeat([0, 1, 2], [200, 47, 8])
    parts = splits.make_splits(targets, groups=np.arange(255))
    for part, share in SHARES.items():
        assert np.abs(counts(targets, parts, part) - share * np.array([[200], [47], [8]])).max() <= 2


def test_groups_are_split_alike_with_the_same_seed_and_differently_with_another():
    targets, groups = patients()
    once, again, other = (splits.make_splits(targets, seed=seed, groups=groups) for seed in (3, 3, 4))
    assert (once == again).all() and (once != other).any()


def test_as_many_groups_as_folds_are_enough_and_fewer_are_refused():
    targets = np.tile([0, 1], 50)
    parts = splits.make_splits(targets, groups=np.arange(100) // 20)
    assert all(set(column) == {"train", "val", "test"} for column in parts.T)
    with pytest.raises(ValueError, match="4 groups are too few for 5 folds"):
        splits.make_splits(targets, groups=np.arange(100) // 25)


@pytest.mark.parametrize("source", ["csv", r"patient(\d+)_"])
def test_a_regular_expression_or_a_table_names_the_patient(tmp_path, command, source):
    names = [f"{label}/patient{p}_{i}.png" for label in "AB" for p in range(12) for i in range(4)]
    write_tree(tmp_path / "data", names)
    patients = [name.split("patient")[1].split("_")[0] for name in names]
    if source == "csv":
        source = write_csv(
            tmp_path / "g.csv", [("path", "group"), *zip(names, [f"p, {p}" for p in patients])]
        )
    assert command("--data", tmp_path / "data", "--out", tmp_path / "s.csv", "--groups", source)[0] == 0
    parts = read_parts(tmp_path / "s.csv")
    places = {(patient, parts[name]) for name, patient in zip(names, patients)}
    assert len(places) == 12 and len(parts) == 96


def write_csv(file, rows):
    """Writes rows; returns the file."""
    with open(file, "w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return file


def read_parts(file):
    """{path: tuple of parts}"""
    return {path: tuple(parts) for path, _, *parts in map(dict.values, read_rows(file))}


def test_several_sources_of_groups_are_joined(tmp_path, command):
    """Patients by a regular expression and overlaps by a CSV: scipy's connected components of both, none of
    them torn."""
    names = [f"{label}/p{i // 4}_{i}.png" for label in "AB" for i in range(100)]
    write_tree(tmp_path / "data", names)
    piece = np.arange(200) // 2 % 90
    file = write_csv(tmp_path / "groups.csv", [("path", "group"), *zip(names, piece)])
    patient = [name.split("/p")[1].split("_")[0] for name in names]
    ends = np.concatenate([200 + piece, 300 + np.unique(patient, return_inverse=True)[1]])
    graph = scipy.sparse.coo_matrix((np.ones(400), (np.tile(np.arange(200), 2), ends)), (400, 400))
    component = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:200]
    groups = splits.read_groups([r"/p(\d+)_", str(file)], names)
    assert len({*zip(groups, component)}) == len({*groups}) == len({*component}) < 25
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "s.csv", "--groups", r"/p(\d+)_", file)
    status, out, err = command(*arguments)
    assert status == 0, err
    parts = read_parts(tmp_path / "s.csv")
    assert len({(group, parts[name]) for name, group in zip(names, groups)}) == len({*groups})
    sizes = np.unique(groups, return_counts=True)[1]
    assert f"{len(sizes)} groups, the largest of {sizes.max()} images" in out
    assert "test images that share a group with a training image, by fold: [0, 0, 0, 0, 0]" in out


def test_groups_of_one_image_each_are_a_warning(tmp_path, command):
    """The regular expression took the image's number instead of the patient's."""
    write_tree(tmp_path / "data", [f"{label}/p{i // 4}_{label}{i}.png" for label in "AB" for i in range(20)])
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "s.csv", "--groups")
    status, out, _ = command(*arguments, r"_(\w+).png")
    assert status == 0 and "40 groups, the largest of 1 images" in out
    assert "does the regular expression take the image's number" in out
    _, out, _ = command(*arguments, r"p(\d+)_")
    assert "5 groups, the largest of 8 images" in out and "image's number" not in out


def test_without_groups_the_twins_of_training_images_are_counted(tmp_path, command):
    """Test images of each fold that overlap with a training image by overlaps.csv, or equal one by
    data/<name>.json."""
    names = [f"{label}/{i}.png" for label in "AB" for i in range(30)]
    write_tree(tmp_path / "mine", names)
    rng, runs = np.random.default_rng(1), tmp_path / "runs"
    pairs = [[names[i] for i in rng.choice(60, 2, replace=False)] for _ in range(40)]
    twins = [[names[i] for i in rng.choice(60, 3, replace=False)] for _ in range(5)]
    (runs / "data").mkdir(parents=True)
    header = ("first", "second", "dx", "dy", "difference", "area")
    write_csv(runs / "overlaps.csv", [header, *([*pair, 3, 4, 0.2, 0.5] for pair in pairs)])
    (runs / "data/mine.json").write_text(json.dumps({"duplicates": twins}))
    status, out, err = command("--data", tmp_path / "mine", "--out", runs / "split.csv")
    assert status == 0, err
    parts = read_parts(runs / "split.csv")
    for what, groups in (("overlap with", pairs), ("are copies of", twins)):
        leaks = [set() for _ in range(5)]
        for fold, group in itertools.product(range(5), groups):
            if "train" in [parts[path][fold] for path in group]:
                leaks[fold] |= {path for path in group if parts[path][fold] == "test"}
        expected = [*map(len, leaks)]
        assert sum(expected) and f"test images that {what} a training image, by fold: {expected}" in out


# ---------------------------------------------------------------- the file
NAMES = [
    "plain",
    "with space",
    "comma, too",
    '"quoted"',
    "#hash",
    "line\nbreak",
    "return\rhere",
    "'; --",
    " leading",
]
NAMES = [f"A/{name}.png" for name in [*NAMES, "Zelle-äöü-細胞", "not-utf8-\udcff\udc80"]]


def test_file_names_of_every_kind_read_back(tmp_path):
    parts = splits.make_splits(np.zeros(len(NAMES), int))
    labels = [f'class, {i % 2} "x"\n' for i in range(len(NAMES))]
    splits.write_splits(tmp_path / "runs" / "split.csv", NAMES, labels, parts)
    paths, read_labels, read_parts = splits.read_splits(tmp_path / "runs" / "split.csv")
    order = np.argsort(np.array(NAMES))
    assert paths == [NAMES[i] for i in order] and read_labels == [labels[i] for i in order]
    assert (read_parts == parts[order]).all() and os.listdir(tmp_path / "runs") == ["split.csv"]


def test_the_command_writes_class_names_and_paths_of_files_of_every_kind(tmp_path, command):
    write_tree(tmp_path / "data", NAMES + [name.replace("A/", "B/") for name in NAMES])
    assert command("--data", tmp_path / "data", "--out", tmp_path / "split.csv")[0] == 0
    with open(tmp_path / "split.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "label", "fold0", "fold1", "fold2", "fold3", "fold4"]
    assert {row[0] for row in rows} == set(NAMES) | {name.replace("A/", "B/") for name in NAMES}
    assert all(row[1] == row[0][0] for row in rows), "labels are class names"


@pytest.mark.parametrize(
    "content, where, what",
    [
        ("", "path,label,fold0", "anew"),
        ("path,label,fold0\r\n", "header", "anew"),
        ("file,label,fold0\r\na,A,test\r\n", "header", "'file'"),
        ("path,label\r\na,A\r\n", "header", "['path', 'label']"),
        ("path,label,fold0,fold2\r\na,A,test,val\r\n", "not fold0,fold2", "fold0,fold1"),
        ("path,label,fold0\r\na,A,test\r\nb,B,testing\r\n", "'b'", "'testing'"),
        ("path,label,fold0\r\na,A,test\r\nb,B\r\n", "['b', 'B']", "incomplete"),
        ("path,label,fold0\r\na,A,test\r\nb,,train\r\n", "['b', '', 'train']", "incomplete"),
        ("path,label,fold0\r\na,A,test\r\nb,B,train,val\r\n", "['b', 'B', 'train', 'val']", "too long"),
        ("path,label,fold0\r\na,A,test\r\nb,B,val\r\na,A,train\r\n", "['a', 'A', 'test']", "second one"),
        ("path,label,fold0\r\na,A,te\0st\r\n", "", ""),
    ],
)
def test_a_damaged_split_is_refused_with_one_line_that_names_file_and_place(tmp_path, content, where, what):
    file = tmp_path / "split.csv"
    file.write_text(content, newline="")
    with pytest.raises(SystemExit) as refused:
        splits.read_splits(file)
    message = str(refused.value)
    assert str(file) in message and where in message and what in message and "\n" not in message


def test_a_published_split_from_a_spreadsheet_is_read_as_it_stands(tmp_path):
    """With a byte order mark, Unix line ends, a blank last line, quoted fields, and three folds of its own
    kind."""
    file, content = tmp_path / "split.csv", b'"B/1, a.png",B,test,train,train\nA/1.png,A,val,val,test\n\n'
    file.write_bytes(b"\xef\xbb\xbfpath,label,fold0,fold1,fold2\n" + content)
    paths, labels, parts = splits.read_splits(file)
    assert (paths, labels) == (["B/1, a.png", "A/1.png"], ["B", "A"])
    assert parts.tolist() == [["test", "train", "train"], ["val", "val", "test"]]


@pytest.mark.parametrize("how", ["semicolon", "tab", "cp1252", "utf-16", "blank"])
def test_a_spreadsheet_may_have_saved_the_split_and_the_groups(tmp_path, how):
    """An umlaut that became Windows-1252 is known by the file's name; a blank row is no row."""
    names = [f"{label}/ä{i}.png" for label in ("A", "Bä") for i in range(10)]
    write_tree(tmp_path / "data", names)
    cells = datasets.open_dataset(tmp_path / "data")
    _, before = splits.open_split(tmp_path / "split.csv", cells)
    encoding, delimiter = {"cp1252": "cp1252", "utf-16": "utf-16"}.get(how, "utf-8-sig"), ","
    delimiter = {"semicolon": ";", "tab": "\t", "utf-16": "\t"}.get(how, ",")
    groups = [["path", "group"], *([name, name[:2]] for name in names)]
    for file, rows in (("split.csv", None), ("groups.csv", groups)):
        rows = rows or list(csv.reader((tmp_path / file).read_text("utf-8").splitlines()))
        rows += [[""] * len(rows[0])] * 2 * (how == "blank")
        with open(tmp_path / file, "w", newline="", encoding=encoding) as handle:
            csv.writer(handle, delimiter=delimiter).writerows(rows)
    _, after = splits.open_split(tmp_path / "split.csv", cells)
    assert (after == before).all()
    assert len(set(splits.read_groups([str(tmp_path / "groups.csv")], cells.paths.tolist()))) == 2


# ---------------------------------------------------------------- official parts
def official(tmp_path, parts, groups=None):
    """Cells of two classes with these official parts, half of each class a."""
    number = len(parts)
    paths = [f"{'AB'[i % 2]}/{i}.png" for i in range(number)]
    return datasets.Cells(tmp_path, "mine", "AB", paths, np.arange(number) % 2, groups=groups, parts=parts)


def test_official_parts_are_the_one_fold(tmp_path, capsys):
    parts = ["train", "val", "test", "train", "train", "train"] * 5
    cells = official(tmp_path, parts)
    assert splits.open_split(tmp_path / "split.csv", cells)[1][:, 0].tolist() == parts
    assert splits.read_splits(tmp_path / "split.csv")[2].shape == (30, 1) and capsys.readouterr().err == ""
    published = splits.make_splits(cells.targets, folds=3)
    splits.write_splits(tmp_path / "other.csv", cells.paths, np.array(["A", "B"])[cells.targets], published)
    assert (splits.open_split(tmp_path / "other.csv", cells)[1] == published).all()
    assert "not the official split" in capsys.readouterr().err


@pytest.mark.parametrize("grouped", [False, True])
def test_without_official_validation_a_stratified_fifth_of_train_validates(tmp_path, capsys, grouped):
    """No test image moves, no group is torn, and the only image of a class stays to be trained on."""
    parts, groups = ["train"] * 80 + ["test"] * 20, np.arange(100) // 2 // 2 if grouped else None
    split = splits.official_split(official(tmp_path, parts, groups))[:, 0]
    assert (split[80:] == "test").all() and (split[:80] == "val").sum() == 16
    assert [(split[label:80:2] == "val").sum() for label in (0, 1)] == [8, 8]
    if grouped:
        assert all(len(set(split[groups == group])) == 1 for group in groups[:80])
    assert "a stratified fifth of train validates" in capsys.readouterr().err
    cells = official(tmp_path, ["train"] * 11)
    cells.targets = np.array([0] * 10 + [1])
    assert splits.official_split(cells)[10, 0] == "train"
    assert "validation images are predicted" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is of train"):
        splits.official_split(official(tmp_path, ["test"] * 4))


def test_folds_pool_the_official_parts_aloud(tmp_path, command):
    names = [f"{part}/{label}/{i}.png" for part in ("train", "test") for label in "AB" for i in range(10)]
    write_tree(tmp_path / "data", names)
    arguments = ("--data", f"{tmp_path}/data/{{part}}/{{class}}", "--out")
    assert command(*arguments, tmp_path / "official.csv")[0] == 0
    paths, _, parts = splits.read_splits(tmp_path / "official.csv")
    tested = [path.split("/")[0] == "test" for path in paths]
    assert parts.shape == (40, 1) and ((parts[:, 0] == "test") == tested).all()
    status, _, err = command(*arguments, tmp_path / "pooled.csv", "--folds", 5)
    assert status == 0 and "official parts are pooled" in err
    assert ((splits.read_splits(tmp_path / "pooled.csv")[2] == "test").sum(1) == 1).all()


def test_a_split_that_is_there_is_never_overwritten(tmp_path, command):
    write_tree(tmp_path / "data", [f"{label}/{i}.png" for label in "AB" for i in range(10)])
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "split.csv")
    assert command(*arguments)[0] == 0
    before = (tmp_path / "split.csv").read_bytes()
    assert command(*arguments)[0] == 0, "the same again is no error"
    status, _, err = command(*arguments, "--seed", 1)
    assert status == 1 and "another split" in err and err.count("\n") == 1
    assert (tmp_path / "split.csv").read_bytes() == before


def test_training_uses_a_published_split_as_it_stands(tmp_path):
    """Two folds that no stratified split would give: all parts come back, in the data set's order of
    images."""
    names = [f"{label}/{i}.png" for label in "AB" for i in range(6)]
    write_tree(tmp_path / "data", names)
    kinds = [("test", "train")] * 2 + [("val", "test")] + [("train", "train")] * 3
    published = dict(zip(names, kinds * 2))
    rows = [(name, name[0], *parts) for name, parts in sorted(published.items(), reverse=True)]
    write_csv(tmp_path / "split.csv", [("path", "label", "fold0", "fold1"), *rows])
    before = (tmp_path / "split.csv").read_bytes()
    cells, parts = splits.open_split(tmp_path / "split.csv", datasets.open_dataset(tmp_path / "data"), set())
    assert {path: tuple(row) for path, row in zip(cells.paths.tolist(), parts.tolist())} == published
    assert (tmp_path / "split.csv").read_bytes() == before


def test_training_refuses_a_split_that_tears_the_groups_of_its_images(tmp_path, capsys):
    """It was made before they were named; parts that were published so are trained on, and counted aloud."""
    groups, file = np.repeat(np.arange(20), 4), tmp_path / "split.csv"
    cells = official(tmp_path, ["train"] * 80)
    cells.parts = None
    splits.open_split(file, cells)
    cells = official(tmp_path, ["train"] * 38 + ["test"] * 42, groups)
    published, cells.parts = cells.parts, None
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="share one of 20 groups with a training image; remove it"):
        splits.open_split(file, cells)
    assert file.read_bytes() == before
    file.unlink()
    capsys.readouterr()
    splits.open_split(file, cells)
    assert "no test images share one of 20 groups" in capsys.readouterr().out
    cells.parts = published
    splits.open_split(tmp_path / "official.csv", cells)
    assert "2 test images share one of 20 groups" in capsys.readouterr().out


def test_groups_that_no_path_names_end_in_one_line(tmp_path, command):
    """(Other mistakes: test_bad_input.py.)"""
    write_tree(tmp_path / "data", [f"{label}/{i}.png" for label in "AB" for i in range(6)])
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "out.csv", "--groups", r"nothing(\d+)")
    status, _, err = command(*arguments)
    assert status == 1 and not (tmp_path / "out.csv").exists()
    assert err.count("\n") == 1 and "no group for 12 of 12 images" in err


def test_a_class_too_small_to_be_tested_in_each_fold_is_named_by_training(tmp_path, capsys):
    """Two images are tested in two of five folds; ten are in all. Named once, when the split is made."""
    paths = [f"{i}.png" for i in range(12)]
    cells = datasets.Cells(tmp_path, "small", ["ABE", "LYT"], paths, np.arange(12) >= 2)
    _, parts = splits.open_split(tmp_path / "split.csv", cells, [])
    tested = (parts == "test").any(0)
    assert ((parts[:2] == "test").any(0).sum(), (parts[2:] == "test").any(0).sum(), tested.sum()) == (2, 5, 5)
    assert "fewer than 5 images, so not tested in each fold: ABE (2)\n" in capsys.readouterr().err
    splits.open_split(tmp_path / "split.csv", cells, [])
    assert capsys.readouterr().err == ""
