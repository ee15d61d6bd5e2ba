"""Invalid files: evaluate.py names each with its reason in one line, makes its tables of the rest, and ends
with status 1.

Truth is what was done to the file; the tables that remain are compared with those of a study that never
had it.
"""

import itertools
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
from test_metrics import command, read_csv, simulate, write_csv, write_predictions

import evaluate

COUNTS = {"BLA": 12, "LYT": 18, "NGB": 15}
GOOD, BAD = ("resnet152", "random"), ("vit_l_32", "imagenet")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A study of two runs with three folds of 15 images each; read only."""
    runs = tmp_path_factory.mktemp("sound") / "runs"
    simulate(runs, COUNTS, {GOOD: 0.6, BAD: 0.8}, folds=3)
    return runs


@pytest.fixture
def runs(sound, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(sound, tmp_path / "runs")


def file_of(runs, run=BAD, fold=1):
    """predictions.csv of a run; that of the second run's fold 1 is the one to be damaged."""
    return runs.joinpath("train", *run, f"fold{fold}", "predictions.csv")


def tables(runs):
    """{name: content} of everything in results/, which is then removed."""
    options = {"encoding": "utf-8", "errors": "surrogateescape"}
    contents = {file.name: file.read_text(**options) for file in (runs / "results").iterdir()}
    shutil.rmtree(runs / "results")
    return contents


def assert_left_out(runs, file, *reasons):
    """The command names the file and the reasons in one line, and writes the tables of a study without that
    file."""
    status, out, err = command("--runs", runs)
    assert status == 1 and err.count("\n") == 1 and err.startswith(f"{file}: ")
    assert all(reason in err for reason in reasons), err
    with_it = tables(runs)
    shutil.rmtree(file.parent)
    assert command("--runs", runs) == (0, out, "") and tables(runs) == with_it
    assert {row.split(",")[2] for row in with_it["table4.csv"].splitlines()[1:]} == {"2", "3"}
    assert not re.search(r"\b(nan|inf|none)\b", "".join([out, *with_it.values()]), re.IGNORECASE)


# ---------------------------------------------------------------- one file alone
def replace(old, new):
    """A damage to the file's bytes that must find what it replaces."""

    def damage(content):
        assert old in content
        return content.replace(old, new, 1)

    return damage


def row(number, change):
    """A damage to one row, given as its list of fields."""

    def damage(content):
        lines = content.split(b"\r\n")
        lines[number] = b",".join(change(lines[number].split(b",")))
        return b"\r\n".join(lines)

    return damage


HALF, NO_TABLE = "ends in the middle of a row", "is no table of path,label,prediction,p_<CLASS>..."
NO_SUM = "'BLA/4.jpg' has probabilities that don't add up to 1"
NO_CLASS = "'BLA/4.jpg' has a class that is not in the header"
DAMAGES = {
    "empty": (lambda content: b"", HALF),
    "zeros after a power failure": (lambda content: b"\0" * len(content), HALF),
    "header alone": (lambda content: content[: content.index(b"\n") + 1], NO_TABLE),
    "zeros and a line end": (lambda content: content[:-40] + b"\0" * 39 + b"\n", ""),
    "of another program": (lambda content: b"image;class\r\n1.jpg;BLA\r\n", NO_TABLE),
    "UTF-16": (lambda content: content.decode().encode("utf-16") + b"\n", ""),
    "no header": (lambda content: content[content.index(b"\n") + 1 :], NO_TABLE),
    "no classes": (lambda content: b"path,label,prediction\r\n1,BLA,BLA\r\n", ""),
    "class twice": (replace(b"p_LYT", b"p_BLA"), ""),
    "row too short": (row(3, lambda fields: fields[:-1]), "could not convert"),
    "row too long": (row(3, lambda fields: [*fields, b"0"]), "Expected 6 fields in line 4, saw 7"),
    "file twice": (lambda content: content + content[content.index(b"\n") + 1 :], "appears more than once"),
    "unknown label": (row(2, lambda fields: [fields[0], b"ABE", *fields[2:]]), NO_CLASS),
    "unknown prediction": (row(2, lambda fields: [*fields[:2], b"7", *fields[3:]]), NO_CLASS),
    "open quote": (row(2, lambda fields: [b'"' + fields[0], *fields[1:]]), "EOF inside string"),
    "one NaN": (row(2, lambda fields: [*fields[:-1], b"NaN"]), NO_SUM),
    "negative": (row(2, lambda fields: [*fields[:4], b"-0.05", b"0.15"]), "'BLA/4.jpg'"),
    "logits": (row(2, lambda fields: [*fields[:3], b"4.1", b"2.5", b"-3"]), NO_SUM),
    "another class is highest": (row(2, lambda fields: [*fields[:3], b"0.3", b"0.3", b"0.4"]), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_tables_are_made_of_the_rest(runs, damage):
    file, (change, reason) = file_of(runs), DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    assert_left_out(runs, file, reason)


def test_a_folder_in_the_place_of_a_file_is_named_too(runs):
    file_of(runs).unlink()
    file_of(runs).mkdir()
    assert_left_out(runs, file_of(runs), "directory")


def test_ties_and_rounding_are_no_damage(tmp_path):
    """Two equal probabilities, and seven digits that add up to 0.9999999."""
    lines = "path,label,prediction,p_a,p_b,p_c 1,a,b,0.3333333,0.3333333,0.3333333 "
    lines += "2,a,c,0.4999999,0.0000001,0.4999999 3,b,a,1,0,1e-30"
    file = write_csv(tmp_path / "predictions.csv", [line.split(",") for line in lines.split()])
    assert evaluate.read_predictions(file).predictions.tolist() == [1, 2, 0]


def test_a_file_cut_at_any_byte_is_named(runs):
    """From nothing to the last byte but one: also where a whole row ends, by the split's number of test
    images."""
    shutil.rmtree(runs.joinpath("train", *GOOD))
    file = file_of(runs)
    content = file.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", content)]
    lengths = {*range(0, len(content), 7), *range(len(content) - 30, len(content)), *ends}
    for length in lengths - {len(content)}:
        file.write_bytes(content[:length])
        study = evaluate.read_study(runs)
        (problem,) = study.problems
        assert problem.startswith(f"{file}: ") and "\n" not in problem and list(study.runs[BAD]) == [0, 2]


def test_bytes_overwritten_at_random_never_give_a_traceback_or_a_nan(runs):
    """The file is either refused in one line or read as whole rows of numbers from 0 to 1."""
    rng, file, refused = random.Random(0), file_of(runs), 0
    content = file.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            new = rng.choices(b'\0\n\r,"nai-+e.0919 \xff\xc3BLANGBp_', k=rng.randint(0, 2))
            damaged[place : place + rng.randint(0, 2)] = bytes(new)
        file.write_bytes(damaged)
        try:
            one = evaluate.read_predictions(file)
        except ValueError as error:
            message = str(error)
        else:
            p, shape = one.probabilities, (len(one.paths), len(one.classes))
            assert p.shape == shape and p.min() >= 0 and p.max() <= 1.001
            assert one.labels.shape == one.predictions.shape == shape[:1]
            assert max(one.labels.max(), one.predictions.max()) < shape[1]
            continue
        assert message.startswith(f"{file}: ") and len(message.splitlines()) == 1
        refused += 1
    assert 100 < refused < 400


def test_several_damaged_files_give_a_line_each(runs):
    files = [file_of(runs, GOOD, 0), file_of(runs, BAD, 0), file_of(runs, BAD, 1), file_of(runs, BAD, 2)]
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    status, _, err = command("--runs", runs)
    assert status == 1 and [line.split(": ")[0] for line in err.splitlines()] == list(map(str, files))
    (row,) = read_csv(runs / "results/table4.csv")
    assert (row["model"], row["folds"]) == ("resnet152", "2")


# ---------------------------------------------------------------- files that contradict each other
def rows_of(file):
    """[[path, label, prediction]] of a predictions.csv."""
    return [[one["path"], one["label"], one["prediction"]] for one in read_csv(file)]


def test_another_set_of_classes(runs):
    """The first file's are the study's."""
    file = write_predictions(runs, BAD, 1, rows_of(file_of(runs)), [*COUNTS, "ABE"])
    assert_left_out(runs, file, "its 4 classes are not the 3 of files before it")


def test_a_label_that_differs_from_the_split(runs):
    rows = rows_of(file_of(runs))
    rows[0][1] = "NGB"
    file = write_predictions(runs, BAD, 1, rows, list(COUNTS))
    reason = "1 images are not in the test part of fold1 with this label, e.g. 'BLA/1.jpg'"
    assert_left_out(runs, file, reason)


def test_images_of_another_fold(runs):
    """A file that was copied into the wrong fold."""
    shutil.copy(file_of(runs, fold=2), file_of(runs, fold=1))
    assert_left_out(runs, file_of(runs), "15 images are not in the test part of fold1")


def test_fewer_rows_than_the_split_has_test_images(runs):
    file = write_predictions(runs, BAD, 1, rows_of(file_of(runs))[:-2], list(COUNTS))
    assert_left_out(runs, file, "has 13 rows for 15 test images")


@pytest.mark.parametrize("split", [True, False])
def test_the_runs_own_record_tells_how_many_rows_there_should_be(runs, split):
    """config.json of train.py: fewer than the split's where images can't be read; without a split it alone
    tells."""
    if not split:
        (runs / "split.csv").unlink()
    file = write_predictions(runs, BAD, 1, rows_of(file_of(runs))[:-2], list(COUNTS))
    file.with_name("config.json").write_text(json.dumps({"test_images": 13}))
    assert command("--runs", runs)[0] == 0
    tables(runs)
    file.with_name("config.json").write_text(json.dumps({"test_images": 14}))
    assert_left_out(runs, file, "has 13 rows for 14 test images")


def test_a_split_as_a_spreadsheet_saves_it_is_the_same_split(runs):
    """A byte-order mark and an empty last line: train.py reads that, so the tables have to."""
    sound = command("--runs", runs), tables(runs)
    (runs / "split.csv").write_bytes(b"\xef\xbb\xbf" + (runs / "split.csv").read_bytes() + b"\r\n")
    assert (command("--runs", runs), tables(runs)) == sound


def notes_on_settings(runs, **changes):
    """The notes that name a setting; all six config.json alike but for changes {run's model and fold: its own
    settings}."""
    config = {"epochs": 75, "image_size": 224, "lr": 0.01, "data": "abc", "optimizer": "sgd"}
    for run, fold in itertools.product((GOOD, BAD), range(3)):
        text = json.dumps(config | changes.get(f"{run[0]}{fold}", {}))
        file_of(runs, run, fold).with_name("config.json").write_text(text)
    status, out, err = command("--runs", runs)
    assert (status, err) == (0, "")
    notes = [line.split(": ")[1] for line in out.splitlines() if "used different settings" in line]
    return notes[0].rstrip(".").split(", ") if notes else []


def test_settings_that_differ_between_folds_or_rows_are_named_below_the_table(runs):
    """A learning rate of its own is each row's right, not each fold's."""
    assert notes_on_settings(runs) == []
    one_fold = {f"{BAD[0]}1": {"epochs": 3, "lr": 0.5}}
    assert notes_on_settings(runs, **one_fold) == ["epochs", "lr of vit_l_32/imagenet"]
    own = {"image_size": 64, "lr": 0.5, "optimizer": "adamw"}
    whole_row = {f"{BAD[0]}{fold}": own for fold in range(3)}
    assert notes_on_settings(runs, **whole_row) == ["image_size", "optimizer"]


def test_images_that_cant_be_read_are_no_images_of_the_data_set(runs):
    """splits.py lists files that nobody has opened yet; what train.py then leaves out is in no table."""
    with open(runs / "split.csv", "a") as file:
        file.write("LYT/broken.jpg,LYT,train,train,train\n")
    table5, left_out = (
        runs / f"results/table5_{'_'.join(BAD)}.csv",
        [["LYT/broken.jpg", "OSError: cut short"]],
    )
    for config, more in (({}, 1), ({"left_out": left_out}, 0)):
        file_of(runs).with_name("config.json").write_text(json.dumps(config))
        command("--runs", runs)
        counted = {row["class"]: int(row["images"]) for row in read_csv(table5)}
        assert counted == COUNTS | {"LYT": COUNTS["LYT"] + more}


@pytest.mark.parametrize("config", ["{", "null", "[1, 2]", "\xff"])
def test_a_damaged_config_is_no_traceback(runs, config):
    (runs / "split.csv").unlink()
    file_of(runs).with_name("config.json").write_bytes(config.encode("latin-1"))
    status, _, err = command("--runs", runs)
    named = status == 1 and err.count("\n") == 1 and str(file_of(runs)) in err
    assert (status, err) == (0, "") or named


@pytest.mark.parametrize("content", ["", "path,label,fold1\n1,a,test\n", 'path,label,fold0\n"1,a,test\n'])
def test_a_split_that_cant_be_right_ends_it_in_one_line(runs, content):
    """There is no rest to make tables of: every run is measured by it."""
    (runs / "split.csv").write_text(content)
    status, out, err = command("--runs", runs)
    assert (status, out) == (1, "") and err.startswith(f"{runs / 'split.csv'}: ") and err.count("\n") == 1
    assert not (runs / "results").exists()


# ---------------------------------------------------------------- nothing, and names of every kind
@pytest.mark.parametrize("made", ["nothing", "folder", "empty run", "only damaged"])
def test_nothing_to_read_at_all_ends_in_one_line_more(tmp_path, made):
    runs = tmp_path / "runs"
    if made == "folder":
        (runs / "train").mkdir(parents=True)
    if made in ("empty run", "only damaged"):
        file_of(runs).parent.mkdir(parents=True)
    if made == "only damaged":
        file_of(runs).write_text("")
    status, out, err = command("--runs", runs)
    assert (status, out) == (1, "") and err.count("\n") == (2 if made == "only damaged" else 1)
    assert err.splitlines()[-1].startswith(f"{runs}: no finished run") and not (runs / "results").exists()


def test_the_script_itself_prints_no_traceback(runs, run):
    """In a process of its own, in a locale that has no ±: one line, status 1, tables."""
    file_of(runs).write_bytes(b"half\xff")
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONWARNINGS="error")
    done = run("evaluate.py", "--runs", runs, env=environment)
    assert done.returncode == 1 and "ResNet-152" in done.stdout
    assert done.stderr == f"{file_of(runs)}: ends in the middle of a row\n"
    assert (runs / "results" / "confusion_resnet152_random.png").read_bytes().startswith(b"\x89PNG")


NASTY = ["plain", "comma, too", 'a "quoted" one', "new\nline", "carriage\rreturn", "ä-細胞", " space "]
NASTY += ["$x_1$", "'; --", "not UTF-8 \udcff\udc80", "a|b", "nan", "#hash", "p_nan"]


def test_names_of_every_kind_read_back(tmp_path):
    """As classes, images and an initialisation; what is printed holds each on one line."""
    init = "a,\"b'\nc\udcff|d"
    rows, split = [], [["path", "label", "fold0", "fold1"]]
    for i, (name, other) in enumerate(itertools.product(NASTY, NASTY)):
        rows.append((f"{name}/{other}", name, name if i % 3 else other))
        split.append([f"{name}/{other}", name, *("test", "train", "test")[i % 2 : i % 2 + 2]])
    for fold in (0, 1):
        write_predictions(tmp_path, ("mine", init), fold, rows[fold::2], NASTY)
    write_csv(tmp_path / "split.csv", split)
    read = evaluate.read_predictions(file_of(tmp_path, ("mine", init), 0))
    names = np.array(read.classes, object)
    assert list(zip(read.paths, names[read.labels], names[read.predictions])) == rows[::2]
    status, out, err = command("--runs", tmp_path)
    assert (status, err) == (0, "") and "a,\"b\\'\\nc\\udcff\\|d" in out
    table5 = read_csv(tmp_path / f"results/table5_mine_{init}.csv")
    assert [(row["class"], int(row["images"])) for row in table5] == [
        (name, len(NASTY)) for name in sorted(NASTY)
    ]
    right = {name: sum(label == prediction == name for _, label, prediction in rows) for name in NASTY}
    for row in table5:  # 7 images a fold
        assert float(row["recall_mean"]) == pytest.approx(right[row["class"]] / len(NASTY), rel=1e-5)
    assert read_csv(tmp_path / "results/table4.csv")[0]["init"] == init
    lines = (tmp_path / f"results/table5_mine_{init}.md").read_text().splitlines()
    assert len(lines) == 2 + len(NASTY) and {re.sub(r"\\\|", "", line).count("|") for line in lines} == {8}


def test_an_image_of_any_name_is_named_in_one_line(tmp_path):
    """Also where the folder's own name has a line end."""
    runs = tmp_path / "new\nline"
    rows = [("a\nb\udcff", "x", "x"), ("c", "y", "x"), ("a\nb\udcff", "x", "y")]
    write_predictions(runs, GOOD, 0, rows, "xy")
    write_predictions(runs, BAD, 0, [("1", "x", "x"), ("2", "y", "y")], "xy")
    status, _, err = command("--runs", runs)
    assert status == 1 and err.count("\n") == 1 and "new\\nline" in err
    assert "'a\\nb\\udcff' appears more than once" in err


def test_both_line_ends_and_quotes_around_everything_are_read_alike(runs):
    file = file_of(runs)
    before, content = evaluate.read_predictions(file), file.read_bytes()
    quoted = re.sub(rb"[^,\r\n]+", rb'"\g<0>"', content)
    for other in (content.replace(b"\r\n", b"\n"), quoted, quoted.replace(b"\r\n", b"\n")):
        file.write_bytes(other)
        after = evaluate.read_predictions(file)
        assert before.paths == after.paths and before.classes == after.classes
        assert all(np.array_equal(a, b) for a, b in zip(before[1:4], after[1:4]))
