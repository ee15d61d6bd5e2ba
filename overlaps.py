"""Find images that show the same piece of a slide: crops of one scan, shifted, equal pixel for pixel.

    python overlaps.py --data data/bm
    python splits.py --data data/bm --groups runs/groups.csv     # a split that keeps such images together

Writes runs/overlaps.csv (first,second,dx,dy,difference,area: a point (x, y) of the first is (x - dx, y -
dy) of the second), runs/groups.csv (path,group of every image) and runs/results/overlaps.png.

A corner of a picture is found again in every crop that shows it, so the 16x16 pixels around each corner
become 256 bits: signs of random projections of the lowest frequencies, which JPEG changes little. Corners
that share a word of 48 of these bits vote for a displacement of their images; a word that many share, as on
smooth edges, hardly counts. Corners must lie on each other there; then the pixels of the shared rectangle
decide. Flipped, rotated or scaled copies are not looked for.
"""

import argparse
import collections
import csv
import functools
import pathlib
import signal
import sys

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import datasets

PATCH = 16  # a corner's patch has this many pixels a side
SCALES = (1, 5, 5, 1.5), (2, 7, 7, 2.0)  # a patch's step; pixels summed at a corner, to the next, of blur
CORNER = 1e-5  # strength of the weakest corner
TABLES, COMMON, COPY = 8, 8, 1  # words of a corner; corners that share a stop word, bits they may differ in
AGREE = 0.2  # share of one picture's corners that are within 2 pixels of the other's, where they overlap
FLIPS, TONE, CONTRAST = 16, 6, 0.1  # two views of a corner differ by less: bits, grey levels, log contrast
STRICT = 8, 0.6, 0.04  # the same for a vote that is enough alone
SAME = 0.85, 2.0  # correlation at least, mean difference at most (grey levels) where only JPEG differs
TWICE = 0.985, 8.0, 6000  # and of a slide that was scanned twice, on at least so many pixels
COLOURS = 8.0  # mean difference of the three channels at most
BLOCK = 1 << 19  # corners that are compared at once
SHOWN = 12  # pairs on the sheet, unreadable files that are printed


# ---------------------------------------------------------------- corners
# the cosine transform's 14 lowest frequencies without the mean, float32 [256,14], of like energy
U, V = np.array([(u, v) for u in range(5) for v in range(5) if 0 < u + v < 5]).T
WAVES = np.cos(np.pi / PATCH * (np.arange(PATCH)[:, None] + 0.5) * np.arange(5))
WAVES /= np.linalg.norm(WAVES, axis=0)
FREQUENCIES = (WAVES[:, None, U] * WAVES[None, :, V] * (U + V)).reshape(PATCH**2, -1).astype(np.float32)
DIRECTIONS = np.random.default_rng(0).normal(size=(FREQUENCIES.shape[1], 256)).astype(np.float32)


def find_corners(image):
    """Corners of uint8 RGB [H,W,3]: bits uint8 [K,32], places uint16 [K,2] (x, y), tones float16 [K,2].

    A corner is the strongest within a fixed distance, whatever else the picture shows: so it is one in every
    crop. Its tones are the mean grey and the log contrast. The coarser ones, of patches twice as large, are
    found again on slides that were scanned twice.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    found = [(np.zeros((0, 32), np.uint8), np.zeros((0, 2), np.uint16), np.zeros((0, 2), np.float16))]
    for step, block, radius, blur in SCALES:
        side, half = PATCH * step, PATCH * step // 2
        if min(grey.shape) <= side:
            continue
        strength = cv2.cornerMinEigenVal(cv2.GaussianBlur(grey, (0, 0), blur), block)
        strongest = cv2.dilate(strength, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
        y, x = np.nonzero(((strength == strongest) & (strength > CORNER))[half:-half, half:-half])
        if not len(x):
            continue
        patches = np.lib.stride_tricks.sliding_window_view(cv2.blur(grey, (step, step)), (side, side))
        patches = patches[:, :, ::step, ::step][y, x].reshape(-1, PATCH**2).astype(np.float32)
        waves = cv2.gemm(patches, FREQUENCIES, 1, None, 0)  # numpy starts threads, which wait for each other
        bits = np.packbits(cv2.gemm(waves, DIRECTIONS, 1, None, 0) > 0, axis=1)
        tones = np.column_stack([patches.mean(1), np.log(np.linalg.norm(waves, axis=1) + 1)])
        places = np.column_stack([x + half, y + half])
        found.append((bits, places.astype(np.uint16), tones.astype(np.float16)))
    return tuple(map(np.concatenate, zip(*found)))


def collect_corners(cells):
    """find_corners of all images together, and whose each is: (bits, places, tones, image int32 [K])."""

    def work(index):
        try:
            return find_corners(cells[index])
        except ValueError:  # not readable: no corners
            return find_corners(np.zeros((1, 1, 3), np.uint8))

    counts, fields = [], (bytearray(), bytearray(), bytearray())  # which grow in place: half the memory
    for corners in datasets.in_threads(work, range(len(cells)), "corners", "image"):
        counts.append(len(corners[0]))
        for field, part in zip(fields, corners):
            field += part.tobytes()
    if 0 in counts:
        print(
            f"{counts.count(0)} images have no corner (flat, tiny, unreadable): not compared", file=sys.stderr
        )
    bits, places, tones = map(np.frombuffer, fields, (np.uint8, np.uint16, np.float16))
    image = np.repeat(np.arange(len(cells), dtype=np.int32), counts)
    return bits.reshape(-1, 32), places.reshape(-1, 2), tones.reshape(-1, 2), image


# ---------------------------------------------------------------- candidates
def word(bits, table):
    """One of the words of 48 bits, uint8 [K,6]; they overlap."""
    return bits[:, np.arange(4 * table, 4 * table + 6) % bits.shape[1]]


def sort_words(bits, tones, common, table):
    """Order int64 [K] of corners and sorted keys uint64 [K], a word above the mean grey; marks stop words."""
    keys = np.zeros((len(bits), 8), np.uint8)
    keys[:, 0], keys[:, 2:] = tones[:, 0], word(bits, table)
    keys = keys.view(np.uint64)[:, 0]
    order = np.argsort(keys)
    keys = keys[order]
    crowded = np.flatnonzero(keys[COMMON:] - keys[:-COMMON] <= TONE)
    common[order[crowded]] |= 1 << table
    common[order[crowded + COMMON]] |= 1 << table
    return order, keys


def cast_votes(bits, places, tones, image, far, order, keys, common, table, rows):
    """Ballots int64 [M] of corners that look alike, one of each two in rows (a range) of order.

    Bit t of common uint8 [K]: the corner's word t is a stop word (Sivic, Zisserman 2003): only copies count
    then. A ballot is one number for two images and their displacement (elect); a strict vote is two of them.
    """
    rows, ballots = np.arange(rows.start, rows.stop), [np.zeros(0, np.int64)]
    for distance in range(1, COMMON):
        rows = rows[: np.searchsorted(rows, len(keys) - distance)]
        rows = rows[keys[rows + distance] - keys[rows] <= TONE]
        a, b = order[rows], order[rows + distance]
        a, b = np.minimum(a, b), np.maximum(a, b)  # corners are in the order of images
        tone, stop = np.abs(tones[a].astype(np.float32) - tones[b]), common[a] | common[b]
        keep = (image[a] != image[b]) & (tone[:, 1] <= CONTRAST)
        a, b, tone, stop = a[keep], b[keep], tone[keep], stop[keep]
        differ = bits[a] ^ bits[b]
        flips = np.bitwise_count(differ.view(np.uint64)).sum(1)
        keep = flips <= np.where(stop >> table & 1, COPY, FLIPS)
        for earlier in range(table):
            keep &= word(differ, earlier).any(1) | (stop >> earlier & 1 == 1)  # else that table has this vote
        strict = keep & (tone <= STRICT[1:]).all(1) & (flips <= STRICT[0])
        a, b = (np.r_[corner[keep], corner[strict]] for corner in (a, b))
        dx, dy = (places[a].astype(np.int64) - places[b] + far).T
        pair = image[a].astype(np.int64) * (int(image[-1]) + 1) + image[b]
        ballots.append((pair * 2 * far + dx) * 2 * far + dy)
    return np.concatenate(ballots)


def elect(ballots, images, far):
    """Candidates int64 [M,4] (first, second, dx, dy) of sorted ballots: what most say of each pair."""
    pair = ballots // (2 * far) ** 2
    other = np.r_[True, pair[1:] != pair[:-1], True]
    ballots = ballots[~(other[1:] & other[:-1])]  # a pair's only vote, not a strict one, does not count
    ballots, votes = np.unique(ballots, return_counts=True)
    beside = np.add.outer((-1, 0, 1), (-2 * far, 0, 2 * far)).reshape(-1, 1)  # corners may be a pixel beside
    ballots, row = np.unique(ballots + beside, return_inverse=True)
    weights = np.bincount(row.ravel(), (votes * np.where(beside, 2, 3)).ravel())
    ballots, weights = ballots[weights > 4], weights[weights > 4]  # one strict vote, or two
    pair = ballots // (2 * far) ** 2
    order = np.lexsort((-weights, pair))
    ballots = ballots[order[np.unique(pair[order], return_index=True)[1]]]
    pair, dx, dy = ballots // (2 * far) ** 2, ballots // (2 * far) % (2 * far), ballots % (2 * far)
    return np.column_stack([pair // images, pair % images, dx - far, dy - far])


def corners_agree(places, ends, candidate):
    """Whether corners of the first picture are corners of the second, as they are in crops of one scan."""
    first, second, dx, dy = map(int, candidate)
    corners = places[ends[first] : ends[first + 1]].astype(int) - (dx, dy)
    y, x = places[ends[second] : ends[second + 1], ::-1].T
    there = np.zeros((y.max() + 2, x.max() + 2), np.uint8)
    there[y, x] = 1
    inside = ((corners >= (x.min(), y.min())) & (corners <= (x.max(), y.max()))).all(1)
    x, y = corners[inside].T
    return cv2.dilate(there, np.ones((5, 5), np.uint8))[y, x].sum() >= AGREE * len(x)


def find_candidates(cells):
    """Candidates (elect) among all images. SystemExit if there are too many of too large images."""
    bits, places, tones, image = collect_corners(cells)
    if not len(image):
        return []
    far, images = int(places.max()) + 2, int(image[-1]) + 1
    if (2 * far * images) ** 2 >= 1 << 63:
        raise SystemExit(f"{cells.root}: {len(cells)} images of {far} pixels are too many to compare at once")
    ballots, common = np.zeros(0, np.int64), np.zeros(len(image), np.uint8)
    blocks = [range(start, min(start + BLOCK, len(image))) for start in range(0, len(image), BLOCK)]
    for table in range(TABLES):
        order, keys = sort_words(bits, tones, common, table)
        work = functools.partial(cast_votes, bits, places, tones, image, far, order, keys, common, table)
        cast = datasets.in_threads(work, blocks, f"comparing, {table + 1} of {TABLES}", "block")
        ballots = np.concatenate([ballots, *cast])
        ballots.sort()  # at most eight equal ones stay: memory is bounded where many images overlap
        ballots = ballots[np.r_[np.ones(min(8, len(ballots)), bool), ballots[8:] != ballots[:-8]]]
        keys = order = work = None  # gigabytes, before the next ones are made
    stop = np.bitwise_count(common).sum() / (TABLES * len(image))
    plain = len(np.unique(image)) - len(np.unique(image[common < (1 << TABLES) - 1]))
    print(f"{stop:.2%} of words, all of {plain:,} images, are too common: only copies count", file=sys.stderr)
    agree = functools.partial(corners_agree, places, np.searchsorted(image, np.arange(images + 1)))
    del bits, tones, image, common  # memory for the election, which looks at a slice of pairs at a time
    slices = np.searchsorted(
        ballots, (ballots[4 * BLOCK :: 4 * BLOCK] // (2 * far) ** 2 + 1) * (2 * far) ** 2
    )
    parts = [part for part in np.split(ballots, slices) if len(part)]
    elected = np.concatenate([np.zeros((0, 4), np.int64), *(elect(part, images, far) for part in parts)])
    return elected[np.fromiter(datasets.in_threads(agree, elected, "looking at corners", "pair"), bool)]


# ---------------------------------------------------------------- pixels
def shared(one, two, dx, dy):
    """Views of the rectangle that two pictures share if (x, y) of one is (x - dx, y - dy) of two."""
    top, left = max(0, dy), max(0, dx)
    bottom = max(top, min(one.shape[0], two.shape[0] + dy))
    right = max(left, min(one.shape[1], two.shape[1] + dx))
    return one[top:bottom, left:right], two[top - dy : bottom - dy, left - dx : right - dx]


def compare(read, candidate):
    """A row of find_overlaps with indices, if the pixels agree at the displacement or 2 pixels around it."""
    first, second, dx, dy = map(int, candidate)
    pictures = read(first), read(second)
    one, two = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures)
    a, b = shared(one, two, dx, dy)
    if min(a.shape) <= PATCH // 2:
        return None
    y, x = np.unravel_index(cv2.matchTemplate(a, b[2:-2, 2:-2], cv2.TM_CCOEFF_NORMED).argmax(), (5, 5))
    dx, dy = dx + int(x) - 2, dy + int(y) - 2
    a, b = shared(one, two, dx, dy)
    correlation = cv2.matchTemplate(a, b, cv2.TM_CCOEFF_NORMED)[0, 0]
    difference, area = cv2.norm(a, b, cv2.NORM_L1) / a.size, a.size / min(one.size, two.size)
    colours = cv2.norm(*shared(*pictures, dx, dy), cv2.NORM_L1) / (3 * a.size)
    same = correlation >= SAME[0] and difference <= SAME[1]
    twice = correlation >= TWICE[0] and difference <= TWICE[1] and a.size >= TWICE[2]
    return (first, second, dx, dy, difference, area) if (same or twice) and colours <= COLOURS else None


def third_sides(rows):
    """Candidates that complete triangles: how a lies to b and b to c says how a lies to c."""
    near = collections.defaultdict(dict)
    for first, second, dx, dy, *_ in rows:
        near[first][second], near[second][first] = (dx, dy), (-dx, -dy)
    found = {}
    for around in near.values():
        for a, (ax, ay) in around.items():
            for c, (cx, cy) in around.items():
                if a < c and c not in near[a]:
                    found[a, c] = cx - ax, cy - ay
    return [(*pair, *shift) for pair, shift in found.items()]


def find_overlaps(cells):
    """Images of cells (Cells) that share pixels: rows (first, second, dx, dy, difference, area), paths first.

    A point (x, y) of the first is (x - dx, y - dy) of the second, in whole pixels; difference: mean absolute
    difference of grey levels over the shared rectangle; area: that rectangle's share of the smaller image.
    """
    cv2.setNumThreads(1)  # one image a thread
    work = functools.partial(compare, functools.lru_cache(512)(cells.__getitem__))
    candidates, tried, rows = find_candidates(cells), set(), []
    while len(candidates):
        print(f"{len(candidates):,} pairs to look at", file=sys.stderr)
        rows += filter(None, datasets.in_threads(work, candidates, "looking at pixels", "pair"))
        tried |= set(map(tuple, candidates))
        candidates = [candidate for candidate in third_sides(rows) if candidate not in tried]
    return [(str(cells.paths[a]), str(cells.paths[b]), *rest) for a, b, *rest in sorted(rows)]


def find_groups(paths, rows):
    """Group numbers int [N] of paths: connected components of the pairs that rows begin with."""
    index = {path: number for number, path in enumerate(paths)}
    ends = np.array([[index[row[0]], index[row[1]]] for row in rows], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(paths), len(paths)))
    return connected_components(graph, directed=False)[1]


# ---------------------------------------------------------------- what it says and draws
def describe(cells, rows, groups):
    """What was found, as text."""
    label = dict(zip(cells.paths, cells.targets))
    overlapping = np.isin(cells.paths, [path for row in rows for path in row[:2]])
    across = sum(label[row[0]] != label[row[1]] for row in rows)
    lines = [
        f"{overlapping.sum():,} of {len(cells):,} images share pixels with another one",
        f"{len(rows):,} pairs, {across:,} of them across classes",
    ]
    for target, name in enumerate(cells.classes):
        of_class = overlapping[cells.targets == target]
        lines.append(f"  {name:12} {of_class.sum():7,} of {len(of_class):7,}  {of_class.mean():6.1%}")
    sizes = np.bincount(groups)
    lines.append(f"{(sizes > 1).sum():,} groups of more than one image, the largest of {sizes.max()}")
    return "\n".join(lines)


def draw_sheet(cells, rows):
    """Figure of at most SHOWN pairs, what they share framed: across classes first, then the largest area."""
    index = {path: number for number, path in enumerate(cells.paths)}
    label = {path: cells.classes[cells.targets[number]] for path, number in index.items()}
    chosen = sorted(rows, key=lambda row: (label[row[0]] == label[row[1]], -row[5]))[:SHOWN]
    lines = max(1, -(-len(chosen) // 3))
    figure = Figure(figsize=(14, 2.8 * lines), layout="constrained")
    figure.suptitle("" if chosen else "no two images share pixels")
    for part, (*paths, dx, dy, difference, area) in zip(figure.subfigures(lines, 3).flat, chosen):
        part.suptitle(f"shifted by ({dx}, {dy}), {area:.0%} shared, difference {difference:.2f}", fontsize=9)
        pictures = [cells[index[path]].copy() for path in paths]
        for axis, path, picture, view in zip(part.subplots(1, 2), paths, pictures, shared(*pictures, dx, dy)):
            view[:2], view[-2:], view[:, :2], view[:, -2:] = 0, 0, 0, 0
            axis.imshow(picture)
            axis.set_title(f"{label[path]}: {pathlib.PurePath(path).name}", fontsize=8)
            axis.axis("off")
    return figure


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--data", default="data/bm", help="folder of the data set")
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="folder for the results")
    args = parser.parse_args()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):  # Ctrl-C, kill and | head end it at once
        signal.signal(name, signal.SIG_DFL)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # folders may have any name
    cells = datasets.open_dataset(args.data)
    info = datasets.check_dataset(cells, args.runs)
    unreadable = [path for path, _ in info["unreadable"]]
    if unreadable:
        print(f"{len(unreadable)} images cannot be read and stay alone: {', '.join(unreadable[:SHOWN])}")
    rows = find_overlaps(cells.subset(~np.isin(cells.paths, unreadable)))
    known = {frozenset(row[:2]) for row in rows}
    for first, *others in info["duplicates"]:  # those without a corner as well
        rows += [(first, other, 0, 0, 0.0, 1.0) for other in others if frozenset((first, other)) not in known]
    groups = find_groups(cells.paths, rows)
    with datasets.open_atomic(args.runs / "overlaps.csv", "w") as file:
        file.write("first,second,dx,dy,difference,area\n")
        pairs = [(*row[:4], f"{row[4]:.3f}", f"{row[5]:.4f}") for row in rows]
        csv.writer(file, lineterminator="\n").writerows(pairs)
    with datasets.open_atomic(args.runs / "groups.csv", "w") as file:
        file.write("path,group\n")
        csv.writer(file, lineterminator="\n").writerows(zip(cells.paths, groups))
    with datasets.open_atomic(args.runs / "results" / "overlaps.png") as file:
        FigureCanvasAgg(draw_sheet(cells, rows)).print_png(file)
    print(describe(cells, rows, groups))


if __name__ == "__main__":
    main()
