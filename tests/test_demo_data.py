"""The synthetic cells have the formats of the real data sets, show what they claim to, and never change."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import demo_data

ROOT = Path(__file__).resolve().parents[1]
with open(ROOT / "paper" / "table5.csv", newline="") as table:
    TABLE5 = [row["class"] for row in csv.DictReader(table)]
CD_CLASSES = {*"ascus asch lsil hsil scc agc trichomonas candida flora herps actinomyces".split()}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return demo_data.make(tmp_path_factory.mktemp("cells"), size="tiny", seed=3)


@pytest.fixture(scope="module")
def drawn():
    """Three pictures and masks of each class, dict code -> list of (rgb, mask)."""
    return {code: [demo_data.draw_cell(code, 0, number) for number in (1, 2, 3)] for code in TABLE5}


def contents(folder):
    files = filter(Path.is_file, folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def coco(cells):
    return {split: json.loads((cells / "cd" / f"{split}.json").read_text()) for split in ("train", "test")}


def test_bm_lies_as_unpacked_from_tcia(cells):
    root = cells / "bm" / "BM_cytomorphology_data"
    assert [path.name for path in (cells / "bm").iterdir() if not path.name.startswith(".")] == [root.name]
    assert {path.name for path in root.iterdir()} == set(TABLE5)
    files = sorted(root.rglob("*.jpg"))
    for file in files:
        code, number = file.stem.split("_")
        assert file.relative_to(root).parts[:2] == (code, "0001-1000") and re.fullmatch("0[0-9]{4}", number)
    counts = Counter(file.stem[:3] for file in files)
    assert counts["ABE"] == 8 and min(counts.values()) >= 6 and max(counts.values()) <= 12
    for file in files[::5]:
        with Image.open(file) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (250, 250))


def test_the_demo_has_the_long_tail_of_table_5():
    counts = demo_data.bm_counts("demo")
    assert list(counts) == TABLE5
    assert 900 <= sum(counts.values()) <= 1100
    assert min(counts, key=counts.get) == "ABE" and counts["ABE"] == 8
    with open(ROOT / "paper" / "table5.csv", newline="") as table:
        real = [int(row["images"]) for row in csv.DictReader(table)]
    ranks = np.argsort(np.argsort(real)), np.argsort(np.argsort(list(counts.values())))
    assert np.corrcoef(*ranks)[0, 1] > 0.9  # common classes are common here too (Spearman)
    assert max(counts.values()) >= 10 * counts["ABE"]


def test_cd_is_coco_detection_with_the_published_flaws(cells):
    thin, beyond, classes = 0, 0, Counter()
    for split, content in coco(cells).items():
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert set(names.values()) == CD_CLASSES
        sizes = {}
        for entry in content["images"]:
            with Image.open(cells / "cd" / split / entry["file_name"]) as image:
                image.load()
                assert image.size == (entry["width"], entry["height"]) and image.mode == "RGB"
                sizes[entry["id"]] = image.size
        ids = [box["id"] for box in content["annotations"]]
        assert len(set(ids)) == len(ids)
        for box in content["annotations"]:
            (x, y, w, h), (width, height) = box["bbox"], sizes[box["image_id"]]
            assert x < width and y < height and x + w > 0 and y + h > 0 and w * h == box["area"]
            thin += min(w, h) == 1
            beyond += x < 0 or y < 0 or x + w > width or y + h > height
            classes[names[box["category_id"]]] += min(w, h) > 1
    assert thin >= 2 and beyond >= 2
    assert set(classes) == CD_CLASSES and min(classes.values()) >= 3
    assert 70 <= sum(classes.values()) <= 100


def test_a_cd_box_fits_its_cell(cells):
    """Around a box the picture is plain ground; what lies inside is further from the median."""
    content, within, around = coco(cells)["train"], [], []
    for entry in content["images"]:
        with Image.open(cells / "cd" / "train" / entry["file_name"]) as image:
            rgb = np.asarray(image, np.float32)
        distance = np.abs(rgb - np.median(rgb, (0, 1))).mean(2)
        for x, y, w, h in (box["bbox"] for box in content["annotations"] if box["image_id"] == entry["id"]):
            room = min(x, y, entry["width"] - x - w, entry["height"] - y - h)
            if min(w, h) > 1 and room > 12:
                inner, outer = np.zeros(distance.shape, bool), np.zeros(distance.shape, bool)
                inner[y : y + h, x : x + w], outer[y - 8 : y + h + 8, x - 8 : x + w + 8] = True, True
                within.append(distance[inner].mean())
                around.append(distance[outer & ~inner].mean())
    assert len(within) > 30
    assert np.mean(np.array(within) > 1.5 * np.array(around)) > 0.9


def test_pcam_is_the_published_hdf5_with_the_label_of_the_middle(cells):
    for split, count in {"train": 64, "valid": 16, "test": 16}.items():
        with h5py.File(cells / "pcam" / f"camelyonpatch_level_2_split_{split}_x.h5") as file:
            x = file["x"][:]
        with h5py.File(cells / "pcam" / f"camelyonpatch_level_2_split_{split}_y.h5") as file:
            y = file["y"][:]
        assert x.shape == (count, 96, 96, 3) and x.dtype == np.uint8
        assert y.shape == (count, 1, 1, 1) and y.sum() == count // 2
        patches, tumours = zip(*(demo_data.draw_patch(3, split, number) for number in range(1, count + 1)))
        assert np.array_equal(np.stack(patches), x)
        middle = np.stack(tumours)[:, 32:64, 32:64].any((1, 2))
        assert np.array_equal(middle, y.ravel() == 1)
        outside = np.stack(tumours)
        outside[:, 32:64, 32:64] = False
        assert outside[y.ravel() == 0].any((1, 2)).mean() > 0.3  # tumour around the middle says nothing


def test_pcam_nuclei_can_be_seen_where_the_mask_says():
    gaps = []
    for number in range(1, 41):
        rgb, tumour = demo_data.draw_patch(0, "train", number)
        if 0.1 < tumour.mean() < 0.9:
            gaps.append(rgb[~tumour][:, 0].mean() - rgb[tumour][:, 0].mean())
    assert len(gaps) > 15 and min(gaps) > 10  # chromatin takes up the red light


def test_every_mask_lies_in_the_picture_and_shows_less_than_half_of_it(drawn):
    for code, pictures in drawn.items():
        for rgb, mask in pictures:
            assert rgb.shape == (250, 250, 3) and rgb.dtype == np.uint8
            assert mask.shape == (250, 250) and mask.dtype == bool
            assert 0.003 < mask.mean() < 0.6, code


def test_what_decides_the_class_has_its_colour(drawn):
    for code in ("FGC", "EOS", "BAS", "EBO"):
        for rgb, mask in drawn[code]:
            red, green, blue = rgb[mask].mean(0)
            if code == "FGC":  # crimson rods
                assert red > green + 40 and red > blue
            elif code == "EOS":  # red-orange granules
                assert red > green + 40 > blue + 40
            else:  # dark granules, dense nucleus: much darker than plasma and red cells
                assert rgb[mask].mean() < 0.6 * np.median(rgb)


def test_rare_look_alikes_differ_in_what_defines_them(drawn):
    """Abnormal eosinophils have dark granules among the orange ones, normal eosinophils have none."""
    dark = {code: [(rgb[mask].mean(1) < 90).mean() for rgb, mask in drawn[code]] for code in ("EOS", "ABE")}
    assert min(dark["ABE"]) > 2 * max(dark["EOS"])


def test_hairs_make_a_long_outline(drawn):
    def roughness(mask):
        edge = sum(np.count_nonzero(np.diff(mask, axis=axis)) for axis in (0, 1))
        return edge**2 / mask.sum()

    smooth = max(roughness(mask) for code in ("PEB", "PLM") for _, mask in drawn[code])
    assert min(roughness(mask) for _, mask in drawn["HAC"]) > 3 * smooth


def test_the_mask_follows_the_size():
    rgb, mask = demo_data.draw_cell("FGC", 0, 5)
    small, small_mask = demo_data.draw_cell("FGC", 0, 5, size=125)
    assert small.shape == (125, 125, 3) and small_mask.shape == (125, 125)
    rows, columns = (np.nonzero(mask)[axis].mean() / 2 for axis in (0, 1))
    assert np.allclose([np.nonzero(small_mask)[axis].mean() for axis in (0, 1)], [rows, columns], atol=2)
    assert abs(small.mean() - rgb.mean()) < 2


@pytest.mark.parametrize("pair", sorted(set(demo_data.NEIGHBOURS)))
def test_neighbours_share_a_piece_of_their_field_pixel_for_pixel(pair):
    one, two = demo_data.draw_field(*pair.split(), seed=0, number=1)
    assert one.shape == two.shape == (250, 250, 3)
    starts = {one[y, x : x + 24].tobytes(): (x, y) for y in range(250) for x in range(226)}
    shifts = Counter()
    for y in range(250):
        for x in range(226):
            if found := starts.get(two[y, x : x + 24].tobytes()):
                shifts[found[0] - x, found[1] - y] += 1
    (dx, dy), _ = shifts.most_common(1)[0]
    width, height = 250 - abs(dx), 250 - abs(dy)
    ours = one[max(dy, 0) : max(dy, 0) + height, max(dx, 0) : max(dx, 0) + width]
    theirs = two[max(-dy, 0) : max(-dy, 0) + height, max(-dx, 0) : max(-dx, 0) + width]
    assert np.array_equal(ours, theirs) and 0.15 < width * height / 250**2 < 0.65


def test_the_demo_has_32_pairs_of_neighbours_and_as_many_images_as_before(tmp_path, monkeypatch):
    fields, plain = [], np.zeros((250, 250, 3), np.uint8)
    monkeypatch.setattr(demo_data, "draw_cell", lambda *_: (plain, None))
    monkeypatch.setattr(demo_data, "draw_field", lambda *names: fields.append(names) or (plain, plain))
    demo_data.write_bm(tmp_path, "demo", 0)
    counts = Counter(file.stem[:3] for file in tmp_path.rglob("*.jpg"))
    assert counts == demo_data.bm_counts("demo") and len(set(fields)) == 32
    across = sum(first != second for first, second, *_ in fields)
    assert across >= 16  # as half of the real ones


def test_a_picture_depends_on_its_key_alone(cells, tmp_path):
    again = demo_data.make(tmp_path / "again", size="tiny", seed=3, sets=("pcam", "cd"))
    assert contents(again / "cd") == contents(cells / "cd")
    for file in (again / "pcam").glob("*.h5"):
        with h5py.File(file) as one, h5py.File(cells / "pcam" / file.name) as two:
            assert np.array_equal(one[file.stem[-1]][:], two[file.stem[-1]][:])
    assert np.array_equal(demo_data.draw_cell("MON", 3, 7)[0], demo_data.draw_cell("MON", 3, 7)[0])
    assert not np.array_equal(demo_data.draw_cell("MON", 3, 7)[0], demo_data.draw_cell("MON", 4, 7)[0])
    assert not np.array_equal(demo_data.draw_cell("MON", 3, 7)[0], demo_data.draw_cell("MON", 3, 8)[0])
    with Image.open(cells / "bm" / "BM_cytomorphology_data" / "MON" / "0001-1000" / "MON_00007.jpg") as image:
        written = np.asarray(image, np.float32)
    assert np.abs(written - demo_data.draw_cell("MON", 3, 7)[0]).mean() < 4  # but for JPEG


def test_a_second_call_leaves_what_is_there_and_mends_what_is_not(tmp_path):
    demo_data.make(tmp_path, size="tiny", sets=("pcam",))
    file = tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5"
    before = file.stat().st_mtime_ns, file.stat().st_ino
    demo_data.make(tmp_path, size="tiny", sets=("pcam",))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    file.unlink()
    demo_data.make(tmp_path, size="tiny", sets=("pcam",))
    with h5py.File(file) as again:
        assert again["x"].shape == (16, 96, 96, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["pcam"]


def test_the_command_line_starts_without_torch_and_spares_other_peoples_files(tmp_path):
    (tmp_path / "bm").mkdir()
    (tmp_path / "bm" / "mine.txt").write_text("precious")
    script = (
        "import sys, runpy; sys.argv = ['demo_data.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('tests/demo_data.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "--out", str(tmp_path), "--size", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.split() == ["False"]
    assert len(done.stderr.strip().splitlines()) == 1 and "--out" in done.stderr
    assert contents(tmp_path) == {"bm/mine.txt": b"precious"}


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^[^\n]*file[^\n]*--out$"):
        demo_data.make(tmp_path / "file", size="tiny", sets=("bm",))
    assert (tmp_path / "file").read_text() == ""
