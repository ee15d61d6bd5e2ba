"""Images whose overlaps are known: crops of one picture, each saved as a file with its own compression.

    python tests/overlap_data.py OUT --kind planted --data data/bm --images 10000 --pairs 1167
    python tests/overlap_data.py OUT --kind stitched --data data/bm --images 2000      # or --kind fields
    python overlaps.py --data OUT --runs RUNS
    python tests/overlap_data.py OUT --score RUNS/overlaps.csv    # recall by shared area, by its shorter side

planted: pieces of a wall of other images, by strong changes of place, direction, scale and colour, so that no
two are alike but the planted pairs. stitched: crops at random places of pictures made of 16 images each;
fields: of synthetic smears.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import pathlib
import sys

import cv2
import numpy as np
from tqdm import tqdm

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]
import datasets  # noqa: E402

SIDE, WALL, CLASSES = 250, 32, 21
AREAS, SIDES = (0, 0.02, 0.05, 0.1, 0.2, 1.01), (0, 17, 20, 25, 33, 50, 100, SIDE + 1)


def write_crops(picture, places, folder, size=SIDE, quality=(85, 95), rng=None, kind="jpg"):
    """Save the squares at places (x, y) of uint8 [H,W,3] (RGB) or [H,W,1] as 00000.jpg, ... in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (x, y) in enumerate(places):
        write_image(folder / f"{number:05d}.{kind}", picture[y : y + size, x : x + size], quality, rng)


def write_image(file, picture, quality, rng):
    """Save uint8 RGB or grey; as a JPEG with a quality out of a range."""
    options = []
    if file.suffix == ".jpg":
        options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(quality[0], quality[1] + 1))]
    cv2.imwrite(str(file), picture[..., ::-1], options)


def shared_rectangle(first, second, size=SIDE):
    """(width, height) in pixels that two squares at places (x, y) share, 0 if none."""
    return tuple(max(0, size - abs(int(a) - int(b))) for a, b in zip(first, second))


def draw_canvas(rng, wall, height, width):
    """A piece of wall, uint8 [H,W,3], turned, sheared, scaled and coloured at random: [height,width,3]."""
    angle, scale, aspect, shear = rng.uniform((0, 0.75, 0.85, -0.2), (2 * np.pi, 1.5, 1.18, 0.2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ [[1, shear], [0, 1]] @ np.diag([aspect, 1 / aspect]) / scale
    size = np.array(wall.shape[1::-1])
    margin = np.minimum(2 * SIDE, size // 4)
    place = rng.uniform(margin, size - margin) - matrix @ [width / 2, height / 2]
    canvas = cv2.warpAffine(
        wall,
        np.column_stack([matrix, place]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT,
    )
    levels = np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.6, 1.6, 3) * rng.uniform(0.6, 1, 3)
    levels += rng.uniform(0, 1, 3) * (1 - levels.max(0))
    return cv2.LUT(canvas, np.round(255 * levels).astype(np.uint8)[None])[..., rng.permutation(3)]


def write_unit(folder, wall, seed, unit):
    """Write one image (unit: its number) or a pair (number, dx, dy) as that number and the next."""
    number, dx, dy = (*unit, 0, 0)[:3]
    rng = np.random.default_rng((seed, number))
    canvas = draw_canvas(rng, wall, SIDE + abs(dy), SIDE + abs(dx))
    places = [(max(0, -dx), max(0, -dy)), (max(0, dx), max(0, dy))]
    for image, (x, y) in enumerate(places[: 1 if len(unit) == 1 else 2]):
        write_image(folder / file_name(number + image), canvas[y : y + SIDE, x : x + SIDE], (85, 95), rng)


def file_name(number):
    """Relative path of an image of the planted set; classes by turns."""
    return f"C{number % CLASSES:02d}/{number:06d}.jpg"


def make_planted(cells, folder, images, pairs, seed=0):
    """A folder of so many images, of which pairs overlap (planted.csv), spread evenly over the numbers."""
    rng, folder = np.random.default_rng(seed), pathlib.Path(folder)
    shifts = rng.integers(-SIDE + 8, SIDE - 7, (pairs, 2))
    starts = np.arange(pairs) * images // max(1, pairs)
    single = np.ones(images, bool)
    single[starts] = single[starts + 1] = False
    units = [(int(number), int(dx), int(dy)) for number, (dx, dy) in zip(starts, shifts)]
    units += [(int(number),) for number in np.flatnonzero(single)]
    tiles = []
    for index in rng.permutation(len(cells))[: WALL**2]:
        tiles.append(cv2.resize(cells[int(index)], (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    across = int(len(tiles) ** 0.5)
    wall = np.vstack([np.hstack(tiles[row * across : (row + 1) * across]) for row in range(across)])
    for name in range(CLASSES):
        (folder / f"C{name:02d}").mkdir(parents=True, exist_ok=True)
    work = functools.partial(write_unit, folder, wall, seed)
    with multiprocessing.get_context("fork").Pool(initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        for _ in tqdm(pool.imap_unordered(work, units, 64), total=len(units), desc="drawing", disable=None):
            pass
    rows = [[file_name(start), file_name(start + 1), *shift] for start, shift in zip(starts, shifts)]
    write_pairs(folder, rows)


def draw_fields(rng, number):
    """Yield fields of synthetic cervical cells, uint8 RGB [540,720,3]."""
    import demo_data

    for field in range(1, number + 1):
        yield demo_data.draw_slide(int(rng.integers(1 << 30)), "train", field)[0]


def stitch(rng, number, cells, across=4):
    """Yield pictures of across x across images of cells, uint8 RGB [1000,1000,3]; each is in one of them."""
    if number * across**2 > len(cells):
        raise SystemExit(
            f"{cells.root}: {len(cells)} images are enough for {len(cells) // across**2} pictures"
        )
    order = rng.permutation(len(cells))[: number * across**2].reshape(number, -1)
    for picture in order:
        tiles = [cv2.resize(cells[int(index)], (SIDE, SIDE)) for index in picture]
        yield np.vstack([np.hstack(tiles[row * across : (row + 1) * across]) for row in range(across)])


def make_crops(pictures, folder, crops, rng, side=SIDE, grey_png=False):
    """A folder of so many crops at random places of each picture, in classes by turns, and planted.csv."""
    folder, number, rows = pathlib.Path(folder), 0, []
    for name in range(CLASSES):
        (folder / f"C{name:02d}").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        if grey_png:
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
        places = rng.integers(0, np.array(picture.shape[1::-1]) - side + 1, (crops, 2))
        for first, (x, y) in enumerate(places):
            file = folder / file_name(number + first)
            file = file.with_suffix(".png") if grey_png else file
            write_image(file, picture[y : y + side, x : x + side], (85, 95), rng)
            for second in range(first):
                if min(shared_rectangle(places[second], places[first], side)):
                    names = file_name(number + second), file_name(number + first)
                    if grey_png:
                        names = [name.replace("jpg", "png") for name in names]
                    rows.append([*names, *places[first] - places[second]])
        number += crops
    write_pairs(folder, rows)


def write_pairs(folder, rows):
    """planted.csv."""
    with open(folder / "planted.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([["first", "second", "dx", "dy"], *rows])


def read_pairs(file):
    """Pairs of a CSV of first,second,dx,dy,...: {(first, second): (dx, dy)}, each in both directions."""
    pairs = {}
    with open(file, newline="") as handle:
        for row in csv.DictReader(handle):
            dx, dy = int(row["dx"]), int(row["dy"])
            pairs[row["first"], row["second"]] = dx, dy
            pairs[row["second"], row["first"]] = -dx, -dy
    return pairs


def score(planted, found, side=SIDE):
    """Text: the share of the planted pairs (read_pairs) that was found, and what was not planted."""
    first = [pair for pair in planted if pair[0] < pair[1]]
    found_at = np.array([found.get(pair) == planted[pair] for pair in first])
    rectangle = np.array([shared_rectangle((0, 0), planted[pair], side) for pair in first])
    lines = []
    area, shorter = rectangle.prod(1) / side**2, rectangle.min(1)
    for what, values, edges in (("area", area, AREAS), ("shorter side", shorter, SIDES)):
        for low, high in itertools.pairwise(edges):
            inside = (values >= low) & (values < high)
            if inside.any():
                lines.append(f"{what} {low:g} to {high:g}: {found_at[inside].mean():.4f} of {inside.sum()}")
    wrong = {frozenset(pair) for pair in found if found[pair] != planted.get(pair)}
    right = len({frozenset(pair) for pair in found}) - len(wrong)
    total = right + len(wrong)
    lines.append(f"recall {found_at.mean():.4f} of {len(first)} pairs")
    lines.append(f"precision {right / max(1, total):.5f} of {total}")
    return "\n".join(lines + [f"  not planted: {' '.join(sorted(pair))}" for pair in list(wrong)[:20]])


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("out", type=pathlib.Path, help="folder of the planted data set")
    parser.add_argument("--kind", choices=("planted", "stitched", "fields"), help="make a data set")
    parser.add_argument("--data", help="folder of images to make it from")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--pairs", type=int, default=1167)
    parser.add_argument("--side", type=int, default=SIDE, help="of the crops, in pixels")
    parser.add_argument("--crops", type=int, default=10, help="from each picture")
    parser.add_argument("--grey-png", action="store_true", help="save crops as grey PNG")
    parser.add_argument("--score", help="overlaps.csv to compare with what is planted")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.kind == "planted":
        make_planted(datasets.open_dataset(args.data), args.out, args.images, args.pairs)
    elif args.kind:
        number = args.images // args.crops
        pictures = draw_fields(rng, number)
        if args.kind == "stitched":
            pictures = stitch(rng, number, datasets.open_dataset(args.data))
        make_crops(pictures, args.out, args.crops, rng, args.side, args.grey_png)
    if args.score:
        print(score(read_pairs(args.out / "planted.csv"), read_pairs(args.score), args.side))


if __name__ == "__main__":
    main()
