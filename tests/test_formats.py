"""The three forms of a data set, and the tables that a run writes: each cell is the piece of the file that it
should be.

Truth comes from slices of the NumPy arrays that the pictures, boxes and patches were made of, from h5py, from
counts by hand, from SciPy's softmax and from what was written into a table.
"""

import contextlib
import csv
import errno
import itertools
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image

import datasets
import engine
import evaluate

CATEGORIES = {3: "hsil", 7: "lsil"}


def picture(number, height=60, width=80):
    """Every pixel tells its place: red the column, green the row, blue the picture's number."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([columns, rows, np.full_like(rows, number)]).astype(np.uint8)


def write_coco(folder, name, images, boxes, categories=CATEGORIES):
    """<name>.json with boxes [(id, image id, category id, bbox)] and images {id: (file name, its picture's
    number or None for none)}."""
    for file, number in images.values():
        if number is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number)).save(folder / file)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"categories": [{"id": i, "name": label} for i, label in categories.items()]}
    names = {i: file.removeprefix(f"{name}/") for i, (file, _) in images.items()}
    content["images"] = [{"id": i, "file_name": names[i], "width": 80, "height": 60} for i in images]
    keys = ("id", "image_id", "category_id", "bbox")
    content["annotations"] = [dict(zip(keys, box)) for box in boxes]
    (folder / f"{name}.json").write_text(json.dumps(content))


def crops(cells):
    """{(label, path): image} of all cells; the path without its class folder."""
    assert [path.split("/")[0] for path in cells.paths] == [cells.classes[i] for i in cells.targets]
    return {tuple(path.split("/", 1)): cells[i] for i, path in enumerate(cells.paths.tolist())}


def stamps(folder):
    """{file: (inode, size, time of the last change)} of everything below folder."""
    states = {str(file.relative_to(folder)): file.stat() for file in folder.rglob("*")}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states.items()}


BOXES = [(1, 1, 3, [10, 20, 30, 25]), (2, 1, 7, [0, 0, 80, 60]), (3, 1, 3, [10.4, 5.6, 20.2, 10.3])]


# ---------------------------------------------------------------- COCO detection
def test_a_crop_is_the_boxs_pixels(tmp_path):
    """x, y, width, height from the left upper corner; the fractions of the third go to the nearest pixel: x
    10 to 31, y 6 to 16."""
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, BOXES)
    cells, whole = datasets.open_dataset(tmp_path / "cd"), picture(5)
    found = crops(cells)
    assert cells.classes == ["hsil", "lsil"] and cells.name == "cd" and cells.notes == []
    assert found.keys() == {("hsil", "one_1.png"), ("lsil", "one_2.png"), ("hsil", "one_3.png")}
    assert np.array_equal(found["hsil", "one_1.png"], whole[20:45, 10:40])
    assert np.array_equal(found["lsil", "one_2.png"], whole)
    assert np.array_equal(found["hsil", "one_3.png"], whole[6:16, 10:31])


def test_boxes_over_the_border_are_clipped_and_boxes_outside_dropped(tmp_path):
    boxes = [(4, 1, 3, [-10, -5, 30, 25]), (5, 1, 3, [70, 50, 500, 500]), (6, 1, 7, [-9, 10, 300, 10])]
    boxes += [*BOXES, (7, 1, 7, [80, 60, 20, 20]), (8, 1, 7, [-30, -30, 20, 20])]
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, boxes)
    cells, whole = datasets.open_dataset(tmp_path / "cd"), picture(5)
    found = crops(cells)
    assert np.array_equal(found["hsil", "one_4.png"], whole[0:20, 0:20])
    assert np.array_equal(found["hsil", "one_5.png"], whole[50:60, 70:80])
    assert np.array_equal(found["lsil", "one_6.png"], whole[10:20])
    assert len(found) == 6 and cells.notes == ["2 boxes dropped: outside the image"]


def test_boxes_without_a_cell_are_dropped_and_counted(tmp_path, capfd):
    """Width or height of 1 (the publisher's warning), 0 or less, no number, no box; each reason with its
    count, on stderr as well."""
    nan, thin = float("nan"), [[5, 5, 1, 30], [5, 5, 30, 1], [5, 5, 1.0, 1.0], [5, 5, 0, 9], [5, 5, -4, 9]]
    thin += [[5, 5, nan, 9], [5, 5, 9], None]
    boxes = BOXES + [(10 + i, 1, 3, box) for i, box in enumerate(thin)]
    boxes += [(30, 1, 99, [5, 5, 9, 9]), (31, 1, 98, [5, 5, 9, 9]), (32, 55, 3, [5, 5, 9, 9])]
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, boxes)
    cells = datasets.open_dataset(tmp_path / "cd")
    assert len(cells) == 3 and sorted(cells.notes) == [
        "1 boxes dropped: of an unknown image",
        "2 boxes dropped: of an unknown category",
        "8 boxes dropped: width or height of 1 or less, no cell",
    ]
    with contextlib.chdir(tmp_path):
        datasets.open_checked("cd", "runs")
    assert "8 boxes dropped" in capfd.readouterr().err
    again = datasets.open_dataset(tmp_path / "cd")
    assert again.notes == cells.notes  # nor are they forgotten when nothing is cropped any more


def test_images_that_are_missing_or_broken_are_counted(tmp_path):
    images = {1: ("one.png", 5), 2: ("two.png", None), 3: ("three.png", 7)}
    boxes = [*BOXES, (4, 2, 3, [1, 2, 9, 9]), (5, 2, 7, [3, 4, 9, 9]), (6, 3, 7, [5, 6, 9, 9])]
    write_coco(tmp_path / "cd", "all", images, boxes)
    (tmp_path / "cd/three.png").write_bytes(b"no picture")
    cells = datasets.open_dataset(tmp_path / "cd")
    assert len(cells) == 3 and cells.notes == [
        "3 boxes dropped: their image is missing or unreadable; once it is there, remove .crops"
    ]
    for number, file in ((6, "two.png"), (7, "three.png")):
        Image.fromarray(picture(number)).save(tmp_path / "cd" / file)
    assert datasets.open_dataset(tmp_path / "cd").notes == cells.notes
    shutil.rmtree(tmp_path / "cd/.crops")
    cells = datasets.open_dataset(tmp_path / "cd")
    assert np.array_equal(crops(cells)["lsil", "two_5.png"], picture(6)[4:13, 3:12]) and cells.notes == []
    assert np.array_equal(crops(cells)["lsil", "three_6.png"], picture(7)[6:15, 5:14])


def test_several_files_may_use_the_same_names_and_numbers(tmp_path):
    """train.json and test.json beside their folders: image 1 is one.png in both, box 1 too, and category 1
    means another class."""
    train, test = {1: ("train/one.png", 5), 2: ("train/sub/two.png", 6)}, {1: ("test/one.png", 7)}
    test[2] = ("test/images/two.png", 8)
    boxes = [(1, 1, 1, [0, 0, 9, 9]), (2, 2, 2, [1, 1, 9, 9])]
    write_coco(tmp_path / "cd", "train", train, boxes, {1: "hsil", 2: "lsil"})
    boxes = [(1, 1, 2, [0, 0, 9, 9]), (2, 2, 1, [1, 1, 9, 9])]
    write_coco(tmp_path / "cd", "test", test, boxes, {1: "lsil", 2: "hsil"})
    (tmp_path / "cd/settings.json").write_text('{"images": "none of COCO"}')
    cells = datasets.open_dataset(tmp_path / "cd")
    found = [(label, image[0, 0, ::-1].tolist()) for (label, _), image in crops(cells).items()]
    assert sorted(found) == [
        ("hsil", [5, 0, 0]),
        ("hsil", [7, 0, 0]),
        ("lsil", [6, 1, 1]),
        ("lsil", [8, 1, 1]),
    ]
    assert cells.notes == [] and {cell.shape for cell in crops(cells).values()} == {(9, 9, 3)}


def test_a_box_number_used_twice_loses_no_cell(tmp_path):
    """In one image and class a number may come as often as it likes; the very same box twice is one cell."""
    boxes = [(1, 3, 0), (1, 7, 10), (2, 3, 20), (1, 3, 30), (1, 3, 40), (1, 3, 40)]
    boxes = [(1, image, category, [x, 0, 9, 9]) for image, category, x in boxes]
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5), 2: ("two.png", 6)}, boxes)
    cells = datasets.open_dataset(tmp_path / "cd")
    columns = sorted((label, int(image[0, 0, 0])) for (label, _), image in crops(cells).items())
    assert columns == [("hsil", 0), ("hsil", 20), ("hsil", 30), ("hsil", 40), ("lsil", 10)]
    assert cells.notes == ["1 boxes dropped: listed twice"]


def test_a_second_json_over_the_same_pictures_counts_no_box_twice(tmp_path):
    """A part of train.json beside it, as people make them, all pictures in images/: every box once, and one
    image stays one group."""
    images = {1: ("one.png", 5), 2: ("two.png", 6)}
    boxes = [(n, 1 + n % 2, 3 + 4 * (n > 5), [n, n, 9, 9]) for n in range(1, 7)]
    folder = tmp_path / "cd"
    write_coco(folder, "train", images, boxes)
    write_coco(folder, "small_train", images, [*boxes[:3], (7, 1, 3, [50, 50, 9, 9])])
    (folder / "images").mkdir()
    for file in folder.glob("*.png"):
        file.rename(folder / "images" / file.name)
    cells = datasets.open_dataset(folder)
    assert sorted(int(image[0, 0, 0]) for image in crops(cells).values()) == [1, 2, 3, 4, 5, 6, 50]
    assert cells.notes == ["3 boxes dropped: listed twice"]
    assert set(cells.groups) == {"one", "two"}


def save_turned(file, stored, orientation):
    """A picture whose EXIF says that it is to be turned, in a format that keeps every pixel."""
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(file, exif=exif)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_of_the_picture_as_stored_unless_its_size_says_otherwise(tmp_path, orientation):
    """By the JSON of 80 x 60 the boxes were drawn on the stored picture; by one of 60 x 80 on the one that
    viewers turn."""
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, BOXES)
    save_turned(tmp_path / "cd/one.png", picture(5), orientation)
    shown = np.rot90(picture(5), {3: 2, 6: 3, 8: 1}[orientation])
    assert np.array_equal(datasets.read_image(tmp_path / "cd/one.png"), shown)
    found = crops(datasets.open_dataset(tmp_path / "cd"))
    assert np.array_equal(found["hsil", "one_1.png"], picture(5)[20:45, 10:40])
    if orientation != 3:
        shutil.rmtree(tmp_path / "cd/.crops")
        file = tmp_path / "cd/all.json"
        file.write_text(file.read_text().replace('"width": 80, "height": 60', '"width": 60, "height": 80'))
        found = crops(datasets.open_dataset(tmp_path / "cd"))
        assert np.array_equal(found["hsil", "one_1.png"], shown[20:45, 10:40])


def test_pictures_of_another_size_than_the_json_says(tmp_path):
    """One of two: its boxes are dropped aloud; all of them: nothing is opened."""
    images = {1: ("one.png", 5), 2: ("two.png", 6)}
    write_coco(tmp_path / "cd", "all", images, [*BOXES, (4, 2, 3, [1, 1, 9, 9])])
    Image.fromarray(picture(6)).resize((40, 30)).save(tmp_path / "cd/two.png")
    cells = datasets.open_dataset(tmp_path / "cd")
    why = "boxes dropped: their image is not of the size that the JSON says"
    assert len(cells) == 3 and cells.notes == [f"1 {why}"]
    shutil.rmtree(tmp_path / "cd/.crops")
    Image.fromarray(picture(5)).resize((160, 120)).save(tmp_path / "cd/one.png")
    with pytest.raises(SystemExit, match=rf"^[^\n]*no box can be cropped \(4 {why}[^\n]*$"):
        datasets.open_dataset(tmp_path / "cd")


def test_what_annotation_programs_write(tmp_path):
    """Polygons without a box, a run-length mask without one, Windows' backslashes, images without a size, a
    Mac's ._all.json."""
    folder = tmp_path / "cd"
    write_coco(folder, "all", {1: ("sub/one.png", 5)}, BOXES)
    content = json.loads((folder / "all.json").read_text())
    content["images"] = [{"id": 1, "file_name": "sub\\one.png"}]
    shapes = [[[10, 20, 40, 20, 25, 45]], [[0, 0, 70, 0, 70, 10], [60, 10, 80, 60, 0, 60]]]
    for box, shape in zip(content["annotations"], [*shapes, {"counts": "a1", "size": [60, 80]}]):
        del box["bbox"]
        box["segmentation"] = shape
    (folder / "all.json").write_text(json.dumps(content))
    (folder / "._all.json").write_bytes(b"\0\5\26\7no JSON")
    cells = datasets.open_dataset(folder)
    found = crops(cells)
    assert np.array_equal(found["hsil", "sub-one_1.png"], picture(5)[20:45, 10:40])
    assert np.array_equal(found["lsil", "sub-one_2.png"], picture(5))
    assert len(found) == 2 and cells.notes == ["1 boxes dropped: width or height of 1 or less, no cell"]


@pytest.mark.parametrize("inside", ["ComparisonDetectorDataset", "download/ComparisonDetectorDataset"])
def test_a_set_unpacked_one_folder_too_deep_is_found(tmp_path, demo, inside):
    """COCO and HDF5 files one or two folders down: the same images and the same name as at the root."""
    for name in ("cd", "pcam"):
        place = tmp_path / name / inside
        place.parent.mkdir(parents=True)
        shutil.copytree(demo / name, place)
        (tmp_path / name / "__MACOSX").mkdir()
        deep, flat = datasets.open_dataset(tmp_path / name), datasets.open_dataset(demo / name)
        assert (deep.name, deep.classes) == (flat.name, flat.classes)
        assert deep.paths.tolist() == flat.paths.tolist()


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(*levels):
    """Paths of all combinations: names_of("AB", ("1.png", "2.png")) are A/1.png, A/2.png, B/1.png,
    B/2.png."""
    return ["/".join(combination) for combination in itertools.product(*levels)]


PNG, PATIENTS = ("cell1.png", "cell2.png"), [f"patient{i}" for i in range(6)]
PARTS = ("train", "test")
SIPAKMED = [
    f"{label}/{name}" for label in ("A/A", "B/B") for name in ("1.bmp", "CROPPED/1.bmp", "CROPPED/2.bmp")
]
LC25000 = [f"{name}/1.png" for name in "lung_sets/aca lung_sets/n colon_sets/c colon_sets/d".split()]
DEEPAPL = "0B 0C 1A 1B 2A 2C 3B 3C 4B 4C 5A 5B 6A 6C".split()
DEEPAPL = [f"P{where[0]}/Signed slides/{where[1]}/1.png" for where in DEEPAPL]
RAABIN = names_of(("TestA", "Train"), "ABC", PNG) + names_of(["TestB"], "AB", PNG)
# layouts that people unpack: paths, a pattern to be advised, what it gives: (images, classes, groups)
AMBIGUOUS = {
    "COVID-19 Radiography": (names_of("AB", ("images", "masks"), PNG), "{class}/images", (4, "A B", None)),
    "MP-IDB": (names_of("AB", ("gt", "img"), PNG), "{class}/img", (4, "A B", None)),
    "masks of one class": (names_of("AB", PNG) + names_of("A", ["mask"], PNG), "{class}/*", (4, "A B", None)),
    "Herlev": (names_of("AB", ("x1.BMP", "x1-d.bmp")), "{class}/*.BMP", (2, "A B", None)),
    "BUSI": (names_of("AB", ("x (1).png", "x (1)_mask.png")), "{class}/*[!a-z].png", (2, "A B", None)),
    "masks of another type": (names_of("AB", ("x.jpg", "x.png")), "{class}/*.jpg", (2, "A B", None)),
    "augmented": (names_of("AB", ("x1.png", "x1_rot.png")), "{class}/*[0-9].png", (2, "A B", None)),
    "SIPaKMeD": (SIPAKMED, "{class}/**/CROPPED/*", (4, "A B", None)),
    "malaria": (names_of("AB", PNG) + names_of(["all"], "AB", PNG), "{class}/*", (4, "A B", None)),
    "LC25000": (LC25000, "*/{class}", (4, "aca c d n", None)),
    "DeepAPL": (DEEPAPL, "{group}/**/{class}/*", (14, "A B C", 7)),
    "patients below": (names_of("AB", PATIENTS, PNG), "{class}/{group}", (24, "A B", 6)),
    "BreakHis": (names_of("AB", ["SOB"], ("40X", "100X"), PNG), "{class}/**/40X/*", (4, "A B", None)),
    "parts": (names_of(("Train", "Valid", "TEST"), "AB", PNG), "{part}/{class}", (12, "A B", None)),
    "parts below": (names_of("AB", ("train", "test"), PNG), "{class}/{part}", (8, "A B", None)),
    "parts and patients": (names_of(PARTS, "AB", PATIENTS, PNG), "{part}/{class}/{group}", (48, "A B", 6)),
    "Kaggle": (names_of(["train"], "AB", PNG) + names_of(["test"], PNG), "{part}/{class}", (4, "A B", None)),
    "Raabin": (RAABIN, "Train/{class}", (6, "A B C", None)),
    "masks above": (names_of(("images", "masks"), "AB", PNG), "images/{class}", (4, "A B", None)),
}
TABLE_ALONE = {
    "HAM10000": names_of(("HAM10000_images_part_1", "HAM10000_images_part_2"), PNG),
    "ChestX-ray14": names_of(("images_001", "images_002"), ["images"], PNG),
    "images and masks": names_of(("images", "masks", "readme"), PNG),
    "parts without classes": names_of(("train", "test"), PNG),
}
CLEAR = {
    "TCIA": names_of(("LYT", "EOS"), ("0001-1000", "1001-2000"), PNG),
    "one folder below": names_of(("LYT", "EOS"), ["jpg"], PNG),
    "other folders": names_of(["LYT"], "ab", PNG) + names_of(["EOS"], "cd", PNG) + ["NGS/1.png"],
    "rapid tests": names_of(("test_negative", "test_positive"), PNG),
    "a test": names_of(("test", "control"), PNG),
    "numbers": names_of("0123", PNG),
    "grades": names_of(("grade 1", "grade 2"), PNG),
    "a few in a corner": names_of("AB", ("1.png", "2.png", "3.png")) + names_of("AB", ["unsure"], ["4.png"]),
}


def seen(cells):
    """(images, class names, number of groups or None)."""
    return len(cells), " ".join(cells.classes), None if cells.groups is None else len(set(cells.groups))


@pytest.mark.parametrize("names, pattern, expected", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_an_ambiguous_folder_is_refused_with_the_pattern_to_type(tmp_path, names, pattern, expected):
    """The pattern stands in the one line, ready for the shell; typed, it gives the images counted by hand."""
    touch(tmp_path, names)
    with pytest.raises(SystemExit, match=r"^[^\n]+$") as refused:
        datasets.open_dataset(tmp_path)
    advised = shlex.split(str(refused.value).split("type --data ")[1].replace("(", "'(").replace(")", ")'"))
    assert f"{tmp_path}/{pattern}" in advised and len([word for word in advised if word[:1] == "/"]) <= 3
    assert seen(datasets.open_dataset(f"{tmp_path}/{pattern}")) == expected


@pytest.mark.parametrize("names", TABLE_ALONE.values(), ids=TABLE_ALONE)
def test_a_folder_that_no_pattern_explains_asks_for_a_table(tmp_path, names):
    touch(tmp_path, names)
    with pytest.raises(SystemExit, match=r"^[^\n]*look like parts[^\n]*table of path,label$"):
        datasets.open_dataset(tmp_path)


@pytest.mark.parametrize("names", CLEAR.values(), ids=CLEAR)
def test_class_folders_hold_images_at_any_depth(tmp_path, names):
    touch(tmp_path, names)
    cells = datasets.open_dataset(tmp_path)
    assert {*cells.classes} == {name.split("/")[0] for name in names} and sorted(cells.paths) == sorted(names)


# ---------------------------------------------------------------- patterns and tables
@pytest.mark.parametrize("order", [("NGS", "LYT", "EOS"), ("a", "b c", "é")], ids=["Table 5", "alphabet"])
def test_a_folder_and_its_pattern_are_the_same_images_in_the_same_order(tmp_path, order):
    """Paths, labels, order and fingerprint: runs on either are the same byte for byte under one split.csv."""
    for label in order:
        for i in (10, 2, 1):
            (tmp_path / "up" / label / "deep").mkdir(parents=True, exist_ok=True)
            place = tmp_path / "up" / label / ("deep" if i > 5 else ".")
            Image.fromarray(picture(i + ord(label[0]))).save(place / f"{i}.png")
    folder, pattern = (datasets.open_dataset(path) for path in (tmp_path, f"{tmp_path}/up/{{class}}"))
    assert folder.classes == pattern.classes == list(order)
    assert folder.paths.tolist() == pattern.paths.tolist() and (folder.targets == pattern.targets).all()
    infos = [datasets.check_dataset(cells, tmp_path / "runs") for cells in (folder, pattern)]
    assert infos[0]["fingerprint"] == infos[1]["fingerprint"]


PATTERNS = {  # by hand, of FILES
    "{class}/*": (3, "A B", None),
    "{class}": (8, "A B", None),
    "{class}/": (8, "A B", None),
    "{class}/**": (8, "A B", None),
    "{class}/P_{group}": (4, "A B", 2),
    "{class}/P_{group}/*.png": (3, "A B", 2),
    "{class}/P_[0-1]/*": (2, "A B", None),
    "{class}/P_[!0-1]": (2, "A B", None),
    "{class}/**/2.png": (2, "A B", None),
    "{class}/odd{{1}}/*": (1, "A", None),
}
FILES = "A/1.png A/2.jpg B/1.png A/P_1/1.png A/P_2/2.png B/P_1/2.png B/P_2/x.jpg A/odd{1}/1.png".split()
FILES.append("B/notes.txt")


@pytest.mark.parametrize("pattern, expected", PATTERNS.items())
def test_patterns_mean_what_they_say(tmp_path, pattern, expected):
    touch(tmp_path / "s e t", FILES)
    path = f"{tmp_path}/s e t/{pattern}"
    if " " not in expected[1]:
        with pytest.raises(SystemExit, match=r"1 class\(es\)"):
            datasets.open_dataset(path)
        return
    cells = datasets.open_dataset(path)
    assert seen(cells) == expected and cells.root == tmp_path / "s e t" and cells.source == path.rstrip("/")
    left = len(FILES) - expected[0]
    assert cells.notes[0].startswith(f"{left} files left out: ") and "1 *.txt" in cells.notes[0]


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("{class}/{class}", "{class} is there twice"),
        ("{group}/{class}/{group}", "{group} is there twice"),
        ("{label}/*", "{label} is none of class, group, part"),
        ("{class/*", "a single brace"),
        ("*/1.png", "no {class}"),
        ("{class}/*.gif", "fits none of the 8 images below"),
        ("{part}/{class}", "no part: A, B; parts are train, training, test, testing, val, valid"),
    ],
)
def test_a_wrong_pattern_ends_in_one_line(tmp_path, pattern, words):
    touch(tmp_path, FILES)
    with pytest.raises(SystemExit, match=r"^[^\n]+$") as refused:
        datasets.open_dataset(f"{tmp_path}/{pattern}")
    assert words in str(refused.value)


def test_parts_have_many_names(tmp_path):
    usual = {"train": "TRAIN Training", "val": "Val valid VALIDATION dev", "test": "test Testing"}
    names = {name: part for part, few in usual.items() for name in few.split()}
    touch(tmp_path, names_of(names, "AB", PNG))
    cells = datasets.open_dataset(f"{tmp_path}/{{part}}/{{class}}")
    assert [names[path.split("/")[0]] for path in cells.paths] == cells.parts.tolist()
    assert cells.subset(np.arange(3)).parts.tolist() == cells.parts[:3].tolist()


TABLE = ["path|label|group|part", "a/1.png|B|p, 1|train", 'a/2.png|A|p"2"|test', "b/ä.png|B|p3|dev"]
TABLE = [row.split("|") for row in TABLE]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path, delimiter, encoding):
    """Blank rows, empty columns, columns in another order or of no use to us."""
    touch(tmp_path, [row[0] for row in TABLE[1:]])
    order, rows = [2, 0, 3, 1], [["", "", "", ""], *TABLE, ["", "", "", ""]]
    with open(tmp_path / "cells.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([*(row[i] for i in order), "", ""] for row in rows)
    cells = datasets.open_dataset(tmp_path / "cells.csv")
    assert cells.paths.tolist() == ["a/2.png", "a/1.png", "b/ä.png"] and cells.classes == ["A", "B"]
    assert [*cells.groups] == ['p"2"', "p, 1", "p3"] and [*cells.parts] == ["test", "train", "val"]
    assert cells.targets.tolist() == [0, 1, 1] and cells.notes == [] and cells.root == tmp_path


def test_rows_without_an_image_and_images_without_a_row_are_counted(tmp_path):
    touch(tmp_path, ["1.png", "2.png", "3.png", "more/4.png", "C.zip", "notes"])
    (tmp_path / "t.csv").write_text(f"label,path\nA,./1.png\nB,{tmp_path}/2.png\nA,gone.png\nB,9.png\n")
    cells = datasets.open_dataset(str(tmp_path / "t.csv"))
    assert cells.paths.tolist() == ["1.png", "2.png"] and cells.notes == [
        "2 rows without an image: left out, e.g. gone.png",
        "2 images without a row: left out, e.g. 3.png",
        "2 files left out: 1 *.zip, 1 without an ending",
    ]


@pytest.mark.parametrize(
    "content, words",
    [
        ("path,label\n1.png,A\n2.png,B\n1.png,B\n", "['1.png', 'A']|second one"),
        ("path,label\n1.png,A\n2.png,B\n./1.png,B\n", "1.png is there twice|'A'|'B'"),
        ("path,label,group\n1.png,A,\n2.png,B,x\n", "no {group} of 1.png"),
        ("path,label\n1.png,\n2.png,B\n", "no {class} of 1.png"),
        ("path,label,part\n1.png,A,fold1\n2.png,B,train\n", "no part: fold1"),
        ("path,label\n1,A\n2,B\n", "none of its 2 rows has an image|e.g. 1"),
        ("image,dx\n1.png,A\n", "no table of path|['image', 'dx']"),
        ("path,label\n1.png,A\n2.png,A\n", "1 class"),
        ("PK\x03\x04", "no table of path"),
    ],
)
def test_a_wrong_table_ends_in_one_line(tmp_path, content, words):
    touch(tmp_path, ["1.png", "2.png"])
    (tmp_path / "cells.csv").write_text(content)
    with pytest.raises(SystemExit, match=r"^[^\n]+$") as refused:
        datasets.open_dataset(tmp_path / "cells.csv")
    assert all(word in str(refused.value) for word in words.split("|"))


def test_what_was_understood_is_printed_before_anything_is_trained(tmp_path, capsys):
    """Classes and parts with counts and an example each, the number of groups."""
    for i, name in enumerate(names_of(("train", "test"), "AB", ["p1", "p2"], ["1.png"])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / name)
    datasets.open_checked(f"{tmp_path}/{{part}}/{{class}}/{{group}}", tmp_path / "runs")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 8 images in 2 classes (A, B)",
        "  class A: 4, e.g. test/A/p1/1.png",
        "  class B: 4, e.g. test/B/p1/1.png",
        "  part test: 4, e.g. test/A/p1/1.png",
        "  part train: 4, e.g. train/A/p1/1.png",
        "  2 groups, the largest of 4 images",
        "  group p1: 4, e.g. test/A/p1/1.png",
    ]


def test_pictures_are_cropped_once_and_a_changed_json_is_said(tmp_path):
    """Two openings, of which the second touches no file; then a box has moved: one line says what to do, and
    it helps."""
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, BOXES)
    assert len(datasets.open_dataset(tmp_path / "cd")) == 3
    before = stamps(tmp_path / "cd")
    assert len(datasets.open_dataset(tmp_path / "cd")) == 3 and stamps(tmp_path / "cd") == before
    write_coco(tmp_path / "cd", "all", {1: ("one.png", 5)}, [(1, 1, 3, [11, 20, 30, 25]), BOXES[1]])
    with pytest.raises(
        SystemExit, match=r"^[^\n]*cd/.crops: the JSON files have changed since; remove[^\n]*$"
    ):
        datasets.open_dataset(tmp_path / "cd")
    shutil.rmtree(tmp_path / "cd/.crops")
    found = crops(datasets.open_dataset(tmp_path / "cd"))
    assert found.keys() == {("hsil", "one_1.png"), ("lsil", "one_2.png")}
    assert np.array_equal(found["hsil", "one_1.png"], picture(5)[20:45, 11:41])
    assert sorted(os.listdir(tmp_path / "cd")) == [".crops", ".crops.lock", "all.json", "one.png"]


def test_boxes_of_an_image_are_its_group(tmp_path, demo):
    """What a split may not tear: groups are the images of the JSON files, read here; class folders have
    none."""
    cells, names = datasets.open_dataset(demo / "cd"), {}
    for file in demo.glob("cd/*.json"):
        content = json.loads(file.read_text())
        stems = {image["id"]: os.path.splitext(image["file_name"])[0] for image in content["images"]}
        for box in content["annotations"]:
            names[f"{stems[box['image_id']]}_{box['id']}.png"] = stems[box["image_id"]]
    assert [names[path.split("/")[1]] for path in cells.paths] == cells.groups.tolist()
    assert datasets.open_dataset(demo / "bm").groups is None
    assert cells.subset([3, 0]).groups.tolist() == cells.groups[[3, 0]].tolist()


def test_a_folder_that_nothing_can_be_written_to(without_rights):
    """One line if there is still something to crop; if all is cropped already, the right to read is
    enough."""
    folder, context = without_rights
    write_coco(folder / "cd", "all", {1: ("one.png", 5)}, BOXES)
    message = r"^[^\n]*cd/.crops.lock: Permission denied[^\n]*writable[^\n]*$"
    with context(), pytest.raises(SystemExit, match=message):
        datasets.open_dataset(folder / "cd")
    assert {file.name for file in (folder / "cd").iterdir()} == {"all.json", "one.png"}
    assert len(datasets.open_dataset(folder / "cd")) == 3
    with context():
        assert len(crops(datasets.open_dataset(folder / "cd"))) == 3


# ---------------------------------------------------------------- PatchCamelyon
def write_pcam(folder, parts=(("train", 12), ("valid", 6), ("test", 4)), **options):
    """The HDF5 files with patches of noise: {path: patch}, and the labels, alternately 1 and 0."""
    folder.mkdir(parents=True)
    patches, rng = {}, np.random.default_rng(0)
    for part, count in parts:
        x = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        y = (np.arange(count) + 1).reshape(-1, 1, 1, 1).astype(np.uint8) % 2
        for kind, values in (("x", x), ("y", y)):
            with h5py.File(file_of(folder, part, kind), "w") as file:
                file.create_dataset(kind, data=values, chunks=(1, *values.shape[1:]), **options)
        patches |= {f"{part}/{i}": patch for i, patch in enumerate(x)}
    return patches


def file_of(folder, part, kind):
    return folder / f"camelyonpatch_level_2_split_{part}_{kind}.h5"


def assert_patches(cells, patches):
    """Every path gives its patch."""
    assert cells.paths.tolist() == list(patches)
    assert all(cells[i].tobytes() == patch.tobytes() for i, patch in enumerate(patches.values()))


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}], ids=["plain", "gzip"])
def test_each_path_is_its_patch_and_label(tmp_path, options):
    patches = write_pcam(tmp_path / "pcam", **options)
    cells = datasets.open_dataset(tmp_path / "pcam")
    counts = {"train": 12, "valid": 6, "test": 4}
    assert cells.paths.tolist() == [f"{part}/{i}" for part in counts for i in range(counts[part])]
    assert cells.files is None and cells.groups is None
    assert cells.classes == ["normal", "tumour"] and cells.targets.tolist() == [1, 0] * 11
    assert_patches(cells, patches)
    assert cells.parts.tolist() == ["train"] * 12 + ["val"] * 6 + ["test"] * 4
    assert cells[0].dtype == np.uint8 and cells[0].shape == (96, 96, 3)
    part = cells.subset(np.array([17, 3, 3]))
    assert all((part[i] == patches[path]).all() for i, path in enumerate(["valid/5", "train/3", "train/3"]))


def test_the_test_part_may_be_missing(tmp_path):
    patches = write_pcam(tmp_path / "pcam", (("train", 4), ("valid", 2)))
    assert_patches(datasets.open_dataset(tmp_path / "pcam"), patches)


@pytest.mark.parametrize("part, kind", [("train", "x"), ("train", "y"), ("test", "x")])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "other contents"])
def test_a_file_that_is_missing_or_broken_is_named_in_one_line(tmp_path, part, kind, harm):
    write_pcam(tmp_path / "pcam")
    file = file_of(tmp_path / "pcam", part, kind)
    content = file.read_bytes()
    file.unlink()
    if harm == "other contents":
        with h5py.File(file, "w") as new:
            new["z"] = 1
    elif harm != "missing":
        file.write_bytes(content[: len(content) * 2 // 3] if harm == "truncated" else b"")
    message = rf"^[^\n]*pcam: the {part} part cannot be read[^\n]*{file.name}[^\n]*$"
    with pytest.raises(SystemExit, match=message):
        datasets.open_dataset(tmp_path / "pcam")


@pytest.mark.parametrize(
    "kind, values",
    [
        ("y", np.zeros((11, 1, 1, 1), np.uint8)),
        ("x", np.zeros((13, 96, 96, 3), np.uint8)),
        ("x", np.zeros((12, 96, 96), np.uint8)),
        ("y", np.full((12, 1, 1, 1), 2, np.uint8)),
        ("y", np.zeros((0, 1, 1, 1), np.uint8)),
    ],
)
def test_patches_and_labels_that_do_not_fit_are_refused(tmp_path, kind, values):
    """A label too few or a patch too many would shift all that follow."""
    write_pcam(tmp_path / "pcam")
    file_of(tmp_path / "pcam", "train", kind).unlink()
    with h5py.File(file_of(tmp_path / "pcam", "train", kind), "w") as file:
        file[kind] = values
    with pytest.raises(SystemExit, match=r"^[^\n]*pcam[^\n]*expected[^\n]*$"):
        datasets.open_dataset(tmp_path / "pcam")


def test_a_patch_that_is_damaged_is_left_out(tmp_path):
    """Bytes of one compressed patch are overwritten: the file opens, the pass names the patch."""
    write_pcam(tmp_path / "pcam", compression="gzip")
    with h5py.File(file_of(tmp_path / "pcam", "train", "x")) as file:
        chunk = file["x"].id.get_chunk_info(5)
    with open(file_of(tmp_path / "pcam", "train", "x"), "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size // 2))
    cells = datasets.open_dataset(tmp_path / "pcam")
    ((path, _),) = datasets.check_dataset(cells, tmp_path / "runs")["unreadable"]
    assert path == f"train/{chunk.chunk_offset[0]}"
    with pytest.raises(ValueError, match=rf"^[^\n]*pcam, patch {path}: [^\n]*$"):
        cells[int(chunk.chunk_offset[0])]


def test_patches_on_a_mount_that_is_read_only_or_has_no_locks(tmp_path, monkeypatch):
    """HDF5's own lock is refused, as on such mounts: everything is read all the same."""
    patches, plain, refused = write_pcam(tmp_path / "pcam"), h5py.File, []

    def without_locks(name, mode="r", locking=None, **options):
        if locking is not False:
            refused.append(name)
            raise BlockingIOError(11, "unable to lock file, errno = 11, error message = 'No locks available'")
        return plain(name, mode, locking=locking, **options)

    monkeypatch.setattr(h5py, "File", without_locks)
    assert_patches(datasets.open_dataset(tmp_path / "pcam"), patches)
    assert refused


def test_a_file_system_without_locks_is_said_once_by_the_files_name(tmp_path, monkeypatch, capsys):
    """ENOLCK from lockf: what the lock protects goes on; any other error of it does not."""

    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datasets.fcntl, "lockf", refuse)
    for number in (errno.ENOLCK, errno.EOPNOTSUPP):  # noqa: B007 (read by refuse)
        with datasets.file_lock(tmp_path / "a/some.lock"):
            pass
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{tmp_path}/a/some.lock: no locks on this file system" in said
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"), datasets.file_lock(tmp_path / "a/some.lock"):
        pass


HOLDER = """
import h5py, sys
file = h5py.File(sys.argv[1], sys.argv[2])
patch = file["x"][0]
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_another_program_has_open(tmp_path, mode):
    """For reading or for writing, when it holds a lock: reading needs none."""
    patches = write_pcam(tmp_path / "pcam")
    command = [sys.executable, "-c", HOLDER, str(file_of(tmp_path / "pcam", "train", "x")), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        assert_patches(datasets.open_dataset(tmp_path / "pcam"), patches)


def test_patches_reach_every_process_by_a_fork_or_a_pickle(tmp_path):
    """The file is open here, and read at once here, in a fork and by two data workers: none gets
    another's."""
    patches = write_pcam(tmp_path / "pcam", compression="gzip")
    cells = datasets.open_dataset(tmp_path / "pcam")
    assert cells[0].tobytes() == patches["train/0"].tobytes()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for _ in range(20):
                assert_patches(cells, patches)
            os._exit(0)
        os._exit(2)
    for _ in range(20):
        assert_patches(cells, patches)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = pickle.loads(pickle.dumps(cells))
    assert_patches(again, patches)
    assert again.classes == cells.classes and np.array_equal(again.targets, cells.targets)
    rows = [range(i, i + 2) for i in range(0, 22, 2)]
    batches = datasets.loader(datasets.Batches(cells, 96), rows, workers=2)
    for (images, labels), row in zip(batches, rows, strict=True):
        assert (images.permute(0, 2, 3, 1).numpy() == [patches[str(cells.paths[i])] for i in row]).all()
        assert labels.tolist() == cells.targets[row].tolist()


# ---------------------------------------------------------------- folders of class folders
@pytest.mark.parametrize("nested", ["", "download/", "a/b/c/", "jpg.d/BM_cytomorphology_data/"])
def test_the_first_level_with_several_folders_is_the_classes(tmp_path, nested):
    """However many single folders lie above and whatever lies below; other files beside them do no harm."""
    paths = ["NGS/4.jpg", "LYT/0001-1000/1.jpg", "LYT/1001-2000/2.jpg", "EOS/0001-1000/3.jpg"]
    touch(tmp_path / "mine" / nested, paths)
    (tmp_path / "mine/abbreviations.csv").touch()
    (tmp_path / "mine/.hidden").mkdir()
    cells = datasets.open_dataset(tmp_path / "mine")
    assert cells.root == tmp_path / "mine" / nested and cells.name == "mine"
    assert cells.classes == ["NGS", "LYT", "EOS"]  # in the order of Table 5, and not of the alphabet
    assert cells.paths.tolist() == paths and cells.targets.tolist() == [0, 1, 1, 2]


def test_classes_of_another_field_are_in_alphabetical_order(tmp_path):
    touch(tmp_path / "mine", names_of(("zebra", "LYT", "10", "9", "Äpfel", "b"), ["1.png"]))
    assert datasets.open_dataset(tmp_path / "mine").classes == ["10", "9", "LYT", "b", "zebra", "Äpfel"]


def test_a_single_folder_beside_an_image_is_not_gone_down(tmp_path):
    """That image shows that this is the level of the classes: of which one is not enough."""
    touch(tmp_path / "mine", ["bm/A/1.png", "bm/B/1.png", "stray.png"])
    with pytest.raises(SystemExit, match=r"^[^\n]*mine: 1 class[^\n]*at least 2[^\n]*$"):
        datasets.open_dataset(tmp_path / "mine")
    (tmp_path / "mine/stray.png").unlink()
    assert datasets.open_dataset(tmp_path / "mine").classes == ["A", "B"]


def test_a_folder_is_pcam_before_coco_before_class_folders(tmp_path):
    """As the three lie on top of each other in one folder, taken away one after the other."""
    write_pcam(tmp_path / "mine")
    write_coco(tmp_path / "mine", "all", {1: ("images/one.png", 5)}, BOXES)
    (tmp_path / "mine/others").mkdir()
    shutil.copy(tmp_path / "mine/images/one.png", tmp_path / "mine/others")
    assert datasets.open_dataset(tmp_path / "mine").classes == ["normal", "tumour"]
    for file in (tmp_path / "mine").glob("*.h5"):
        file.unlink()
    assert datasets.open_dataset(tmp_path / "mine").classes == ["hsil", "lsil"]
    (tmp_path / "mine/all.json").write_text("[1, 2]")  # JSON, but not COCO's
    assert datasets.open_dataset(tmp_path / "mine").classes == ["images", "others"]


# ---------------------------------------------------------------- tables
NAMES = ["plain", "with space ", " ", "comma, too", 'a "quoted" one', '"', "it's", "#1", "new\nline", "tab\t"]
NAMES += ["carriage\rreturn", "both\r\n", "p_x", "äöü-細胞", "e\u0301", "\u00e9", "\u2028\x85\x0b", "\ufeff"]
NAMES += ["no text \udcff\udce4", "nan", "1", "path", "=1+1"]


def test_predictions_are_read_back_as_they_were_written(tmp_path):
    """Classes and images of all names; probabilities to seven digits, by SciPy's softmax, whatever the size
    of the logits."""
    rng = np.random.default_rng(0)
    paths = [f"{label}/{image}.png" for label in NAMES for image in NAMES]
    cells = datasets.Cells(tmp_path, "mine", NAMES, paths, np.arange(len(paths)) % len(NAMES))
    logits = rng.standard_normal((len(paths), len(NAMES))) * rng.choice([1, 30, 1000], len(paths))[:, None]
    logits = torch.from_numpy(logits.astype(np.float32))
    engine.write_predictions(tmp_path / "predictions.csv", cells, logits)
    read = evaluate.read_predictions(tmp_path / "predictions.csv")
    assert list(read.paths) == paths
    assert [read.classes[i] for i in read.labels] == [NAMES[i % len(NAMES)] for i in range(len(paths))]
    assert [read.classes[i] for i in read.predictions] == [NAMES[i] for i in logits.argmax(1)]
    order = [NAMES.index(name) for name in read.classes]
    expected = scipy.special.softmax(logits.double().numpy(), 1)[:, order]
    assert np.allclose(read.probabilities, expected, rtol=5e-7, atol=0)
