"""overlaps.py against crops whose places are known, known pairs of real cells, and components by hand."""

import collections
import csv
import shutil
import sys

import cv2
import numpy as np
import pytest

import datasets
import overlaps
from overlap_data import shared_rectangle, write_crops


def read_csv(file):
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


def draw_picture(rng, height, width):
    """A picture with structure of all sizes: blurred noise, uint8 RGB."""
    picture = np.zeros((height, width, 3))
    for blur in (1.5, 4, 12):
        noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), blur)
        picture += noise / noise.std()
    return np.clip(128 + 25 * picture, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Two classes, 40 crops of one picture and one of each of 40 others; and the places of the first 40."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("crops")
    places = rng.integers(0, 700, (40, 2))
    write_crops(draw_picture(rng, 950, 950), places, folder / "A", rng=rng)
    for number in range(40):
        write_crops(draw_picture(rng, 250, 250), [(0, 0)], folder / "B" / f"{number}", rng=rng)
    return folder, {f"A/{number:05d}.jpg": place for number, place in enumerate(places)}


def test_pairs_are_those_whose_places_overlap(crops):
    folder, places = crops
    rows = overlaps.find_overlaps(datasets.open_dataset(folder))
    found = {frozenset(row[:2]) for row in rows}
    assert len(found) == len(rows)
    for first, second, dx, dy, difference, area in rows:
        assert (dx, dy) == tuple(places[second] - places[first])
        assert area == pytest.approx(np.prod(shared_rectangle(places[first], places[second])) / 250**2)
        assert difference < 6
    wanted = set()
    for first, here in places.items():
        for second, there in places.items():
            width, height = shared_rectangle(here, there)
            if first < second and min(width, height) >= 30:
                wanted.add(frozenset((first, second)))
    assert len(wanted) > 50 and wanted <= found


def test_command_lists_every_image_once(crops, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(crops[0], data)
    (data / "B" / "broken.jpg").write_bytes((data / "B" / "0" / "00000.jpg").read_bytes()[:3000])
    shutil.copy(data / "B" / "1" / "00000.jpg", data / "A" / "copy.jpg")
    for name in ("flat", "flat_too"):
        cv2.imwrite(str(data / "A" / f"{name}.png"), np.full((250, 250, 3), 200, np.uint8))
    monkeypatch.setattr(sys, "argv", ["overlaps.py", "--data", str(data), "--runs", str(tmp_path / "runs")])
    overlaps.main()
    said = "".join(capsys.readouterr())
    assert "broken.jpg" in said and "2 images have no corner" in said
    pairs, groups = read_csv(tmp_path / "runs" / "overlaps.csv"), read_csv(tmp_path / "runs" / "groups.csv")
    group = {row["path"]: row["group"] for row in groups}
    assert sorted(group) == sorted(datasets.open_dataset(data).paths) and len(groups) == len(group)
    assert group["A/copy.jpg"] == group["B/1/00000.jpg"] and group["A/flat.png"] == group["A/flat_too.png"]
    sizes = collections.Counter(group.values())
    assert sizes[group["B/broken.jpg"]] == sizes[group["B/2/00000.jpg"]] == 1
    for pair in pairs:
        assert group[pair["first"]] == group[pair["second"]]
    assert len(set(group.values())) == len(group) - len(join_by_hand(group, pairs))
    assert cv2.imread(str(tmp_path / "runs" / "results" / "overlaps.png")) is not None


def join_by_hand(paths, pairs):
    """The pairs that join two groups when one after the other is joined: as many groups fewer."""
    group, joining = {path: {path} for path in paths}, []
    for pair in pairs:
        first, second = group[pair["first"]], group[pair["second"]]
        if first is not second:
            joining.append(pair)
            first |= second
            group.update(dict.fromkeys(second, first))
    return joining


def test_groups_are_connected_components():
    groups = overlaps.find_groups(list("abcdefg"), [("f", "b"), ("a", "c"), ("b", "g"), ("g", "f")])
    assert [groups[0] == groups[2], len(set(groups[[1, 5, 6]])), len(set(groups))] == [True, 1, 4]


def test_two_sides_of_a_triangle_say_the_third():
    places = np.array([(40, 7), (0, 0), (-30, 90)])  # of images 0, 1 and 2 on the slide
    rows = [(0, 1, *(places[1] - places[0]), 0.2, 0.5), (1, 2, *(places[2] - places[1]), 0.2, 0.5)]
    assert overlaps.third_sides(rows) == [(0, 2, *(places[2] - places[0]))]


KINDS = ("png", 3, 250), ("png", 1, 250), ("jpg", 3, 96), ("png", 3, 48)


@pytest.mark.parametrize("kind, channels, size", KINDS)
def test_other_kinds_of_images(tmp_path, kind, channels, size):
    rng = np.random.default_rng(1)
    picture = draw_picture(rng, 3 * size, 3 * size)
    if channels == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None]
    shift = size // 4
    places = [(size, size), (size + shift, size - shift)]
    write_crops(picture, places, tmp_path / "A", size, rng=rng, kind=kind)
    write_crops(picture, [(0, 2 * size)], tmp_path / "B", size, rng=rng, kind=kind)
    rows = overlaps.find_overlaps(datasets.open_dataset(tmp_path))
    assert [row[:4] for row in rows] == [(f"A/00000.{kind}", f"A/00001.{kind}", shift, -shift)]


def test_text_and_bars_are_no_overlap(tmp_path):
    rng = np.random.default_rng(2)
    for number in range(12):
        picture = draw_picture(rng, 250, 250)
        cv2.rectangle(picture, (150, 225), (240, 232), (0, 0, 0), -1)
        cv2.putText(picture, "10 um", (160, 220), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1)
        write_crops(picture, [(0, 0)], tmp_path / "AB"[number % 2] / str(number), rng=rng)
    assert overlaps.find_overlaps(datasets.open_dataset(tmp_path)) == []


def draw_smear(rng):
    """Red cells, soft discs of nearly one size and colour on an even background, uint8 RGB [250,250,3]."""
    picture = np.full((250, 250, 3), (232, 222, 214), np.float32) + rng.normal(0, 2)
    for x, y in rng.uniform(0, 250, (12, 2)):
        width, height = rng.uniform(32, 46, 2)
        box = (x, y), (width, height), rng.uniform(0, 180)
        cv2.ellipse(picture, box, (np.array((214, 168, 170)) + rng.normal(0, 5)).tolist(), -1)
    grain = cv2.GaussianBlur(rng.normal(0, 6, picture.shape), (0, 0), 1)
    return np.clip(cv2.GaussianBlur(picture, (0, 0), 2.5) + grain, 0, 255).astype(np.uint8)


class Pictures(list):
    """Pictures in memory, for what reads Cells by number."""

    root = "memory"


@pytest.mark.long
def test_candidates_of_smooth_look_alikes_grow_linearly():
    rng = np.random.default_rng(3)
    pictures = [draw_smear(rng) for _ in range(600)]
    few, many = (len(overlaps.find_candidates(Pictures(pictures[:images]))) for images in (150, 600))
    assert 0 < many <= 5 * few  # all pairs would be 16 times as many


def test_copies_are_found_however_many(tmp_path):
    """30 files of one picture: each of their words is a stop word."""
    picture = draw_smear(np.random.default_rng(4))
    for name in "AB":
        write_crops(picture, [(0, 0)] * 15, tmp_path / name, kind="png")
    rows = overlaps.find_overlaps(datasets.open_dataset(tmp_path))
    assert len(rows) == 30 * 29 / 2 and all(row[2:] == (0, 0, 0, 1) for row in rows)


def test_known_pairs_of_real_cells(real_cells):
    """The pairs were found by another program, and looked at."""
    known = read_csv(real_cells / "bm_cells_overlaps.csv")
    cells = datasets.open_dataset(real_cells / "bm_cells")
    in_pairs = np.isin(cells.paths, [row[end] for row in known for end in ("first", "second")])
    found, others = set(), np.arange(len(cells)) % 10 == 0
    for first, second, dx, dy, *_ in overlaps.find_overlaps(cells.subset(in_pairs | others)):
        found |= {(first, second, dx, dy), (second, first, -dx, -dy)}
    wanted = {(row["first"], row["second"], int(row["dx"]), int(row["dy"])) for row in known}
    assert len(wanted) == 53 and len(wanted & found) >= 52
