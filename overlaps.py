"""Find images that show the same piece of a slide: crops of one scan, shifted, equal pixel for pixel.

    python overlaps.py --data data/bm
    python splits.py --data data/bm --groups runs/groups.csv     # the split that keeps such images together

Writes runs/overlaps.csv (first,second,dx,dy,difference,area: a point (x, y) of the first is (x - dx, y -
dy) of the second), runs/groups.csv (path,group: every image; those that overlap or are the same share a
group) and runs/results/overlaps.png.

A corner of a picture is found again in every crop that shows it, so the 16x16 pixels around each corner
become 256 bits: signs of random projections of the lowest frequencies, which JPEG changes little. Corners
that share a word of 48 of these bits vote for a displacement of their images; then the pixels of the shared
rectangle decide. Flipped, rotated or scaled copies are not looked for, and no rectangle narrower than 17
pixels is found.
"""
import argparse
import concurrent.futures
import csv
import functools
import io
import os
import pathlib
import signal
import sys

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

import datasets

PATCH = 16  # a corner's patch has this many pixels a side
SCALES = (1, 5, 5, 1.5), (2, 7, 7, 2.0)  # a patch's step; pixels summed at a corner, to the next, of blur
CORNER = 1e-5  # strength of the weakest corner
TABLES, FREQUENT = 8, 1000  # sorted lists of words; how many others of its word a corner is compared with
FLIPS, TONE, CONTRAST = 16, 6, 0.1  # two views of a corner differ by less: bits, grey levels, log contrast
STRICT = 8, 0.6, 0.04  # the same for a vote that is enough alone
CORRELATION, DIFFERENCE = 0.985, 8.0  # of the shared rectangle's pixels: at least, at most (grey levels)
BALLOT = np.dtype([("pair", "i8"), ("shift", "u4"), ("weight", "i4")])
FAR = 1 << 15  # displacements are smaller, in pixels
BLOCK = 1 << 20  # corners that are compared at once
BITS = np.unpackbits(np.arange(1 << 16, dtype=">u2").view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)
SHOWN = 12  # pairs on the sheet, and unreadable files that are printed


# ---------------------------------------------------------------- corners
def low_frequencies():
    """The cosine transform's 14 lowest frequencies without the mean, float32 [256,14], of like energy."""
    u, v = np.divmod(np.arange(25), 5)
    u, v = u[(0 < u + v) & (u + v < 5)], v[(0 < u + v) & (u + v < 5)]
    waves = np.cos(np.pi / PATCH * (np.arange(PATCH)[:, None] + .5) * np.arange(5))
    waves /= np.linalg.norm(waves, axis=0)
    basis = waves[:, None, u] * waves[None, :, v] * (u + v)
    return basis.reshape(PATCH * PATCH, len(u)).astype(np.float32)


FREQUENCIES = low_frequencies()
DIRECTIONS = np.random.default_rng(0).normal(size=(FREQUENCIES.shape[1], 256)).astype(np.float32)


def grey_image(cells, index):
    """Image index as uint8 grey [H,W]; None if it cannot be read."""
    try:
        return cv2.cvtColor(cells[index], cv2.COLOR_RGB2GRAY)
    except ValueError:
        return None


def find_corners(grey):
    """Corners of uint8 [H,W]: bits uint8 [K,32], places uint16 [K,2] (x, y), tones float16 [K,2].

    A corner is the strongest within a fixed distance, whatever else the picture shows: so it is one in every
    crop. Its tones are the mean grey and the log contrast. The coarser ones, of patches twice as large, are
    found again on slides that were scanned twice.
    """
    empty = np.zeros((0, 32), np.uint8), np.zeros((0, 2), np.uint16), np.zeros((0, 2), np.float16)
    found = [empty]
    for step, block, radius, blur in SCALES:
        side, half = PATCH * step, PATCH * step // 2
        if min(grey.shape) <= side:
            continue
        strength = cv2.cornerMinEigenVal(cv2.GaussianBlur(grey, (0, 0), blur), block)
        highest = cv2.dilate(strength, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
        y, x = np.nonzero(((strength == highest) & (strength > CORNER))[half:-half, half:-half])
        patches = np.lib.stride_tricks.sliding_window_view(cv2.blur(grey, (step, step)), (side, side))
        patches = patches[:, :, ::step, ::step][y, x].reshape(-1, PATCH * PATCH).astype(np.float32)
        waves = patches @ FREQUENCIES
        tones = np.column_stack([patches.mean(1), np.log(np.linalg.norm(waves, axis=1) + 1)])
        bits = np.packbits(waves @ DIRECTIONS > 0, axis=1)
        places = np.column_stack([x + half, y + half])
        found.append((bits, places.astype(np.uint16), tones.astype(np.float16)))
    return tuple(map(np.concatenate, zip(*found)))


def describe(cells, index):
    """find_corners of one image; None if it cannot be read."""
    grey = grey_image(cells, index)
    return None if grey is None else find_corners(grey)


def in_threads(function, items, text, unit):
    """Yield function(item) for all items, in order, from as many threads as cores, with a progress bar."""
    cv2.setNumThreads(1)  # one image a thread
    bar = tqdm(total=len(items), desc=text, unit=unit, disable=None)
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, bar:
        for start in range(0, len(items), 256):
            for result in pool.map(function, items[start:start + 256]):
                yield result
                bar.update()


# ---------------------------------------------------------------- candidates
def collect(cells):
    """find_corners of all images, and whose each is: (bits, places, tones, image int32 [K]), by image."""
    found, counts, unreadable = [find_corners(np.zeros((1, 1), np.uint8))], np.zeros(len(cells), np.int64), 0
    work = functools.partial(describe, cells)
    for index, corners in enumerate(in_threads(work, range(len(cells)), "corners", "image")):
        if corners is None:
            unreadable += 1
            continue
        found.append(corners)
        counts[index] = len(corners[0])
    if unreadable:
        print(f"{unreadable} images cannot be read: not compared")
    flat = (counts == 0).sum() - unreadable
    if flat:
        print(f"{flat} images have no corner (flat, blurred or tiny): not compared")
    bits, places, tones = map(np.concatenate, zip(*found))
    return bits, places, tones, np.repeat(np.arange(len(cells), dtype=np.int32), counts)


def word_bytes(bits, table):
    """The six of 32 bytes, uint8 [K,6], that are a sorted list's word; neighbouring lists' words overlap."""
    return bits[:, np.arange(4 * table, 4 * table + 6) % bits.shape[1]]


def sort_words(bits, tones, table):
    """(order, keys uint64 [K] in order): word above mean grey, so that neighbours are alike in both."""
    keys = np.zeros((len(bits), 8), np.uint8)
    keys[:, 0], keys[:, 2:] = tones[:, 0], word_bytes(bits, table)
    keys = keys.view(np.uint64)[:, 0]
    order = np.argsort(keys)
    return order, keys[order]


def cast_votes(bits, places, tones, image, order, keys, table, rows):
    """Ballots of corners that look alike, from rows (a range) of a sorted list; how many had too many."""
    rows, ballots = np.arange(rows.start, rows.stop), [np.zeros(0, BALLOT)]
    for distance in range(1, FREQUENT + 1):
        rows = rows[:np.searchsorted(rows, len(keys) - distance)]
        rows = rows[keys[rows + distance] - keys[rows] <= TONE]
        if not len(rows):
            break
        a, b = order[rows], order[rows + distance]
        a, b = np.minimum(a, b), np.maximum(a, b)  # corners are sorted by image
        tone = np.abs(tones[a].astype(np.float32) - tones[b])
        keep = (image[a] != image[b]) & (tone[:, 1] <= CONTRAST)
        a, b, tone = a[keep], b[keep], tone[keep]
        flips = bits[a] ^ bits[b]
        count = BITS[flips.view(np.uint16)].sum(1)
        keep = count <= FLIPS
        for earlier in range(table):
            keep &= word_bytes(flips, earlier).any(1)  # that list has had this vote
        strict = (tone <= STRICT[1:]).all(1) & (count <= STRICT[0])
        a, b, strict = a[keep], b[keep], strict[keep]
        ballot = np.empty(len(a), BALLOT)
        ballot["pair"], ballot["weight"] = image[a].astype(np.int64) << 32 | image[b], 1 + strict
        dx, dy = (places[a].astype(np.int64) - places[b]).T
        ballot["shift"] = (dx + FAR) * 2 * FAR + dy + FAR
        ballots.append(ballot)
    return np.concatenate(ballots), len(rows)


def count_votes(ballots):
    """Ballots sorted, those of the same pair and shift as one, their weights summed."""
    ballots = ballots[np.lexsort((ballots["shift"], ballots["pair"]))]
    if len(ballots):
        new = np.r_[True, (np.diff(ballots["pair"]) != 0) | (np.diff(ballots["shift"]) != 0)]
        weight = np.add.reduceat(ballots["weight"], np.flatnonzero(new))
        ballots = ballots[new]
        ballots["weight"] = weight
    return ballots


def elect(ballots):
    """Candidates int64 [M,4] (first, second, dx, dy): of each pair the displacement with most votes."""
    pair, row = np.unique(ballots["pair"], return_inverse=True)
    ballots = ballots[(np.bincount(row, ballots["weight"], len(pair)) > 1)[row]]
    near = []
    for beside in [0, 1, -1, 2 * FAR, -2 * FAR, 2 * FAR + 1, -2 * FAR + 1, 2 * FAR - 1, -2 * FAR - 1]:
        near.append(ballots.copy())  # a corner may be found a pixel beside
        near[-1]["shift"] += np.int64(beside).astype(np.uint32)
        near[-1]["weight"] *= 2 if beside else 3
    ballots = count_votes(np.concatenate(near))
    ballots = ballots[ballots["weight"] > 4]
    ballots = ballots[np.lexsort((-ballots["weight"], ballots["pair"]))]
    ballots = ballots[np.unique(ballots["pair"], return_index=True)[1]]
    shift = ballots["shift"].astype(np.int64)
    first, second = ballots["pair"] >> 32, ballots["pair"] & 0xffffffff
    return np.column_stack([first, second, shift // (2 * FAR) - FAR, shift % (2 * FAR) - FAR])


def find_candidates(cells):
    """Candidates (elect) of all images."""
    corners = collect(cells)
    ballots, new, frequent = [np.zeros(0, BALLOT)], 0, 0
    for table in range(TABLES):
        order, keys = sort_words(corners[0], corners[2], table)
        blocks = [range(start, min(start + BLOCK, len(keys))) for start in range(0, len(keys), BLOCK)]
        work = functools.partial(cast_votes, *corners, order, keys, table)
        for cast, more in in_threads(work, blocks, f"comparing {table + 1}/{TABLES}", "block"):
            ballots.append(cast)
            new, frequent = new + len(cast), frequent + more
            if new > max(len(ballots[0]), 1 << 23):
                ballots, new = [count_votes(np.concatenate(ballots))], 0
    if frequent:
        share = frequent / (TABLES * len(corners[0]))
        print(f"{share:.2%} of the words look like more than {FREQUENT} others: compared with those alone")
    return elect(count_votes(np.concatenate(ballots)))


# ---------------------------------------------------------------- pixels
def shared(one, two, dx, dy):
    """Views of the rectangle that two pictures share if (x, y) of one is (x - dx, y - dy) of two."""
    top, left = max(0, dy), max(0, dx)
    bottom, right = min(one.shape[0], two.shape[0] + dy), min(one.shape[1], two.shape[1] + dx)
    return one[top:bottom, left:right], two[top - dy:bottom - dy, left - dx:right - dx]


def compare(read, candidate):
    """A row of find_overlaps with indices, if the pixels agree at the displacement or 2 pixels around it."""
    first, second, dx, dy = map(int, candidate)
    one, two = read(first), read(second)
    a, b = shared(one, two, dx, dy)
    if min(a.shape) <= PATCH // 2:
        return None
    y, x = np.unravel_index(cv2.matchTemplate(a, b[2:-2, 2:-2], cv2.TM_CCOEFF_NORMED).argmax(), (5, 5))
    dx, dy = dx + int(x) - 2, dy + int(y) - 2
    a, b = shared(one, two, dx, dy)
    correlation = cv2.matchTemplate(a, b, cv2.TM_CCOEFF_NORMED)[0, 0]
    difference = cv2.norm(a, b, cv2.NORM_L1) / a.size
    if correlation < CORRELATION or difference > DIFFERENCE:
        return None
    return first, second, dx, dy, difference, a.size / min(one.size, two.size)


def find_overlaps(cells):
    """Images of cells (Cells) that share pixels: rows (first, second, dx, dy, difference, area), paths first.

    A point (x, y) of the first is (x - dx, y - dy) of the second, in whole pixels; difference: mean absolute
    difference of grey levels over the shared rectangle; area: that rectangle's share of the smaller image.
    """
    read = functools.lru_cache(512)(functools.partial(grey_image, cells))
    rows = []
    candidates = find_candidates(cells)
    for row in in_threads(functools.partial(compare, read), candidates, "looking at pixels", "pair"):
        if row:
            rows.append((str(cells.paths[row[0]]), str(cells.paths[row[1]]), *row[2:]))
    return rows


def find_groups(paths, pairs):
    """Group numbers int [N] of paths: connected components of pairs, numbered by their first path."""
    row = {path: index for index, path in enumerate(paths)}
    ends = np.array([[row[pair[0]], row[pair[1]]] for pair in pairs], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(paths), len(paths)))
    return connected_components(graph, directed=False)[1]


# ---------------------------------------------------------------- what it says and draws
def add_duplicates(rows, duplicates):
    """Rows, and one for each exact duplicate that is not in them yet, beside the first of its kind."""
    known = {frozenset(row[:2]) for row in rows}
    for first, *others in duplicates:
        rows += [(first, other, 0, 0, 0.0, 1.0) for other in others if frozenset((first, other)) not in known]
    return rows


def write_csv(file, header, rows):
    """A CSV file, whole or not at all."""
    with datasets.open_atomic(file, "w") as handle:
        csv.writer(handle, lineterminator="\n").writerows([header, *rows])


def describe_overlaps(cells, rows, groups):
    """What was found, as text."""
    label = dict(zip(map(str, cells.paths), cells.targets))
    targets = {path: label[path] for row in rows for path in row[:2]}
    inside = np.bincount(list(targets.values()), minlength=len(cells.classes))
    across = sum(label[row[0]] != label[row[1]] for row in rows)
    lines = [f"{len(targets)} of {len(cells)} images share pixels with another one, in {len(rows)} pairs, "
             f"{across} of them across classes"]
    totals = np.bincount(cells.targets, minlength=len(cells.classes))
    for name, count, total in zip(cells.classes, inside, totals):
        lines.append(f"  {name:12s} {count:6d} of {total:6d}  {count / max(1, total):6.1%}")
    sizes = np.bincount(groups)
    largest = np.argsort(-sizes, kind="stable")[:5]
    lines.append(f"{(sizes > 1).sum()} groups of more than one image; the largest:")
    for group in largest[sizes[largest] > 1]:
        members = cells.paths[groups == group]
        more = ", ..." if len(members) > 5 else ""
        lines.append(f"  {len(members)} images: {', '.join(members[:5])}{more}")
    return "\n".join(lines)


def choose_pairs(rows, label):
    """At most SHOWN pairs for the sheet, each image once: across classes first, then by the shared area."""
    chosen, used = [], set()
    for row in sorted(rows, key=lambda row: (label[row[0]] == label[row[1]], -row[5])):
        if not used & set(row[:2]) and len(chosen) < SHOWN:
            chosen.append(row)
            used |= set(row[:2])
    return chosen


def draw_sheet(cells, rows):
    """The chosen pairs side by side, the rectangle that they share framed: PNG bytes."""
    index = {str(path): i for i, path in enumerate(cells.paths)}
    label = {path: cells.classes[cells.targets[i]] for path, i in index.items()}
    chosen = choose_pairs(rows, label)
    figure = Figure(figsize=(14, 2.8 * max(1, -(-len(chosen) // 3))), layout="constrained")
    if not chosen:
        figure.text(0.5, 0.5, "no two images share pixels", ha="center")
    parts = figure.subfigures(max(1, -(-len(chosen) // 3)), 3, squeeze=False).flat
    for part, (first, second, dx, dy, difference, area) in zip(parts, chosen):
        pictures = [cells[index[first]].copy(), cells[index[second]].copy()]
        part.suptitle(f"shifted by ({dx}, {dy}), {area:.0%} shared, difference {difference:.2f}", fontsize=9)
        views = shared(*pictures, dx, dy)
        for axis, picture, view, path in zip(part.subplots(1, 2), pictures, views, (first, second)):
            view[:2], view[-2:], view[:, :2], view[:, -2:] = 0, 0, 0, 0
            axis.imshow(picture)
            axis.set_title(f"{label[path]}: {pathlib.PurePath(path).name}", fontsize=8)
            axis.axis("off")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", default="data/bm", help="folder of the data set")
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="folder for the results")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    cells = datasets.open_dataset(args.data)
    info = datasets.check_dataset(cells, args.runs)
    unreadable = [path for path, _ in info["unreadable"]]
    for path, why in info["unreadable"][:SHOWN]:
        print(f"unreadable, a group of its own: {path} ({why})")
    if len(unreadable) > SHOWN:
        print(f"... and {len(unreadable) - SHOWN} more")
    rows = add_duplicates(find_overlaps(cells.subset(~np.isin(cells.paths, unreadable))), info["duplicates"])
    groups = find_groups(cells.paths, rows)
    write_csv(args.runs / "overlaps.csv", ["first", "second", "dx", "dy", "difference", "area"],
              [(*row[:4], f"{row[4]:.3f}", f"{row[5]:.4f}") for row in rows])
    write_csv(args.runs / "groups.csv", ["path", "group"], zip(cells.paths, groups))
    with datasets.open_atomic(args.runs / "results" / "overlaps.png") as file:
        file.write(draw_sheet(cells, rows))
    print(describe_overlaps(cells, rows, groups))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
