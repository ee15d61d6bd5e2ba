"""Stratified cross-validation (section 2.4): every image is tested once, a fifth of the rest validates.

    python splits.py --data data/bm                             # runs/split.csv: path,label,fold0,...,fold4
    python splits.py --data data/own --groups 'patient(\\d+)'    # all images of a patient in one part
    python splits.py --data data/bm --groups runs/groups.csv    # all images that overlap (see overlaps.py)

train.py makes the first one itself if there is none, and uses the one it finds, e.g. a published split.
"""

import argparse
import collections
import csv
import io
import json
import os
import pathlib
import re
import signal
import sys

import numpy as np
import scipy.sparse


def make_splits(targets, folds=5, val=0.2, seed=0, groups=None):
    """Split images of class numbers targets (int [N]) into str [N, folds]: "train", "val" or "test" (2.4).

    Of a class's n images each fold tests n/folds and validates with max(1, round(val * rest)) of the rest, or
    none of a rest of 1. With groups (one id an image) no group is in two parts of a fold, and counts are as
    even as that allows. ValueError if folds, val, seed or groups allow no such split.
    """
    targets = np.asarray(targets, np.int64)
    if folds < 2 or not 0 < val < 1 or seed < 0:
        raise ValueError(f"folds {folds}, val {val}, seed {seed}: at least 2, between 0 and 1, at least 0")
    if groups is not None:
        return split_groups(targets, folds, val, seed, groups)
    first, parts = 0, np.full((len(targets), folds), "train", dtype="<U5")
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        order = random_keys(seed, label, folds + 1, len(members)).argsort(axis=1, kind="stable")
        for fold in range(folds):
            tested = order[0][(fold - first) % folds :: folds]
            rest = order[1 + fold][~np.isin(order[1 + fold], tested)]
            count = max(0, min(max(1, round(val * len(rest))), len(rest) - 1))
            parts[members[tested], fold] = "test"
            parts[members[rest[:count]], fold] = "val"
        first += len(members)  # deal on where the last class ended: remainders don't pile up in fold 0
    return parts


def random_keys(seed, label, rows, columns):
    """Numbers to sort by, uint64 [rows, columns]: raw bits, which no version of numpy draws otherwise."""
    return np.random.PCG64([int(seed), int(label)]).random_raw(rows * columns).reshape(rows, columns)


def split_groups(targets, folds, val, seed, groups):
    """make_splits where all images of a group are in one part."""
    names, group = np.unique(np.asarray(groups, np.str_), return_inverse=True)
    classes, label = np.unique(targets, return_inverse=True)
    if len(names) < max(folds, 3):
        raise ValueError(f"{len(names)} groups are too few for {folds} folds: lower --folds, check --groups")
    counts = np.zeros((len(names), len(classes) + 1), np.int64)
    np.add.at(counts, (group, label), 1)
    counts[:, -1] = counts.sum(1)  # the size of a part counts like one more class
    keys = random_keys(seed, 0, folds + 1, len(names))
    tested = deal_groups(counts, np.full(folds, 1 / folds), keys[0])
    parts = np.full((len(names), folds), "train", dtype="<U5")
    for fold in range(folds):
        rest = np.flatnonzero(tested != fold)
        chosen = deal_groups(counts[rest], np.array([val, 1 - val]), keys[1 + fold][rest]) == 0
        parts[tested == fold, fold] = "test"
        parts[rest[chosen], fold] = "val"
    return parts[group]


def deal_groups(counts, shares, keys):
    """Put groups (counts int [groups, classes]) into parts of these shares, none empty: int [groups].

    The largest first, each where it adds least to the chi-square of the counts against the shares.
    """
    weights = 2**32 // np.maximum(counts.sum(0), 1)  # integers, since sums of floats differ between machines
    filled, place = np.zeros((len(shares), counts.shape[1]), np.int64), np.empty(len(counts), np.int64)
    for done, group in enumerate(np.lexsort((keys, -counts[:, -1]))):
        cost = (2 * filled + counts[group]) @ (counts[group] * weights) / shares
        empty = filled[:, -1] == 0
        if empty.sum() >= len(counts) - done:  # as many groups left as parts that wait for one
            cost[~empty] = np.inf
        place[group] = np.argmin(cost)
        filled[place[group]] += counts[group]
    return place


def write_splits(file, paths, labels, parts):
    """Write a split as CSV (path,label,fold0,...), sorted by path; the file appears whole or not at all."""
    beside = pathlib.Path(f"{file}.tmp{os.getpid()}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted([str(path), str(label), *row] for path, label, row in zip(paths, labels, parts.tolist()))
    header = ["path", "label", *(f"fold{k}" for k in range(parts.shape[1]))]
    with open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    os.replace(beside, file)


def read_table(file, columns, known=()):
    """Header and rows (lists of str) of a table, these columns first; SystemExit if it is invalid.

    As programs and spreadsheets write it: separated by commas, semicolons or tabs, blank lines anywhere, in
    UTF-8 or -16, or in Windows-1252, which shows in paths that are no UTF-8 and not among the known ones.
    """
    try:
        content = pathlib.Path(file).read_bytes()
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding, "surrogateescape")
        first = next(filter(str.strip, text.splitlines()), "")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        header, *rows = [row for row in lines if any(map(str.strip, row))] or [[]]
    except (OSError, UnicodeError, csv.Error) as error:
        raise SystemExit(f"{file}: cannot be read ({error}); correct it or name another") from None
    header = [name.strip().lower() for name in header]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    order = sorted(range(len(header)), key=lambda i: (columns + header).index(header[i]))
    wrong = [row for row in rows if len(row) < len(header) or any(row[len(header) :])]
    if not {*columns} <= {*header} or not rows or wrong:
        what = f"row {str(wrong[0])[:150]} is incomplete or too long" if wrong else f"header {header}"
        raise SystemExit(f"{file}: no table of {','.join(columns)},... ({what}); correct it or make it anew")
    rows, known = [[row[i] for i in order] for row in rows], {*known}
    if known and any(row[0] not in known and re.search("[\udc80-\udcff]", row[0]) for row in rows):
        rows = [[recode(cell) for cell in row] for row in rows]
    times = collections.Counter(row[0] for row in rows)
    for row in rows:
        if "" in row[: len(columns)] or times[row[0]] > 1:
            what = f"row {str(row)[:150]} is incomplete or a second one for its path"
            raise SystemExit(f"{file}: {what}; correct it or make it anew")
    return [header[i] for i in order], rows


def recode(text):
    """Text of Windows-1252 that was read as UTF-8 with surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def read_splits(file, known=()):
    """Read a split: (paths list, labels list, parts str [N, folds]); SystemExit says which row is wrong."""
    header, rows = read_table(file, ["path", "label", "fold0"], known)
    paths, labels, *parts = map(list, zip(*rows))
    if header[2:] != [f"fold{k}" for k in range(len(parts))]:
        raise SystemExit(f"{file}: the folds have to be fold0,fold1,..., not {','.join(header[2:])}")
    parts = np.array(parts).T
    for row, fold in np.argwhere(~np.isin(parts, ["train", "val", "test"]))[:1]:
        value = str(parts[row, fold])
        raise SystemExit(f"{file}, row of {paths[row]!r}: {value!r} is not train, val or test")
    return paths, labels, parts.astype("<U5")


def read_groups(sources, paths):
    """Groups of images, int [N], that no source tears: the connected components of all of them together.

    A source is a CSV of path,group (.csv) or a regular expression that finds the group, its bracket if any.
    """
    links = []
    for source in sources:
        if source.lower().endswith(".csv"):
            found = {row[0]: row[1] for row in read_table(source, ["path", "group"], paths)[1]}
            names = [found.get(path) for path in paths]
        else:
            matches = [re.search(source, path) for path in paths]
            names = [match and match.group(min(1, match.re.groups)) for match in matches]
        if missing := [path for path, name in zip(paths, names) if not name]:
            why = f"no group for {len(missing)} of {len(paths)} images, e.g. {missing[0]!r}"
            raise SystemExit(f"--groups {source}: {why}; correct it, or name a .csv of path,group")
        _, first, group = np.unique(names, return_index=True, return_inverse=True)
        links.append(first[group])
    edges = np.tile(np.arange(len(paths)), len(links)), np.concatenate(links)
    graph = scipy.sparse.coo_matrix((np.ones(len(edges[0])), edges), (len(paths), len(paths)))
    component = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    return np.unique(component, return_index=True)[1][component]  # named by its first image


def official_split(cells, seed=0):
    """Official parts of Cells as one fold, str [N, 1]; without val a stratified fifth of train validates."""
    parts = cells.parts.astype("<U5")
    train = np.flatnonzero(parts == "train")
    if not len(train):
        raise SystemExit(f"{cells.root}: no image of the official parts {', '.join({*parts})} is of train")
    if "val" not in parts:
        print("no official validation part: a stratified fifth of train validates", file=sys.stderr)
        targets, groups = cells.targets[train], None if cells.groups is None else cells.groups[train]
        chosen = make_splits(targets, folds=5, seed=seed, groups=groups)[:, 0] == "test"
        if groups is None:
            chosen &= np.bincount(targets)[targets] > 1  # the only image of a class trains
        parts[train[chosen]] = "val"
    if cells.groups is not None:
        kinds = collections.Counter(group for group, _ in {*zip(cells.groups.tolist(), parts.tolist())})
        if torn := [group for group, number in kinds.items() if number > 1]:
            print(f"{len(torn)} groups are in several official parts, e.g. {torn[0]}", file=sys.stderr)
    if "test" not in parts:
        print("no official test part: the validation images are predicted", file=sys.stderr)
    return parts[:, None]


def open_split(file, cells, unreadable=()):
    """(images of a split among Cells, their parts: str [N, folds]); without a file, a new one.

    That is the official split where cells have parts, else of 5 folds. unreadable: paths that the split may
    name and cells lack. SystemExit if it does not fit the cells.
    """
    import datasets  # the functions above do without

    names = np.array(cells.classes)[cells.targets]
    with datasets.file_lock(file.with_name(".split.lock")):
        if not file.exists():
            try:
                official = cells.parts is not None
                parts = official_split(cells) if official else make_splits(cells.targets, groups=cells.groups)
            except ValueError as error:
                raise SystemExit(f"{cells.root}: {error}") from None
            write_splits(file, cells.paths, names, parts)
            print(f"{file}: {'the official split' if official else 'new stratified split into 5 folds'}")
            images = zip(cells.classes, np.bincount(cells.targets, minlength=len(cells.classes)))
            few = [f"{name} ({number})" for name, number in images if number < 5]
            if few and not official:
                print(f"  fewer than 5 images, so not tested in each fold: {', '.join(few)}", file=sys.stderr)
    paths, labels, parts = read_splits(file, cells.paths.tolist())
    gone = sorted(set(paths) - set(cells.paths) - set(unreadable))
    if gone:
        what = f"{len(gone)} of its {len(paths)} images are not in {cells.root}, e.g. {gone[0]}"
        raise SystemExit(f"{file}: {what}; put them back, or name another folder with --runs")
    row = {path: i for i, path in enumerate(paths)}
    rows = np.array([row.get(path, -1) for path in cells.paths])
    wrong = cells.paths[(rows >= 0) & (np.array(labels)[rows] != names)]
    if len(wrong):
        what = f"{len(wrong)} labels differ from the class folders, e.g. of {wrong[0]}"
        raise SystemExit(f"{file}: {what}; correct it or remove it")
    if len(missing := cells.paths[rows < 0]):
        what = f"{len(missing)} images of {cells.root} are not in it: left out, e.g. {missing[0]}"
        print(f"{file}: {what}", file=sys.stderr)
    cells, parts = cells.subset(rows >= 0), parts[rows[rows >= 0]]
    official = cells.parts is not None and ((parts == "test") == (cells.parts == "test")[:, None]).all()
    if cells.parts is not None and not official:
        print(f"{file}: not the official split of {cells.source}", file=sys.stderr)
    if cells.groups is not None:
        leaks = sum(count_leaks(parts, group_images(cells.groups)))
        text = (
            f"{leaks or 'no'} test images share one of {len(set(cells.groups))} groups with a training image"
        )
        if leaks and not official:
            raise SystemExit(f"{file}: {text}; remove it to split anew, or name another folder with --runs")
        print(f"{file}: {text}")
    return cells, parts


def read_twins(runs, name, paths):
    """What overlaps.py and datasets.py found in runs: {kind: [indices of images that belong together]}."""
    place, twins = {path: i for i, path in enumerate(paths)}, {}
    if (runs / "overlaps.csv").exists():
        with open(runs / "overlaps.csv", encoding="utf-8", errors="surrogateescape", newline="") as handle:
            twins["overlap with"] = [(row["first"], row["second"]) for row in csv.DictReader(handle)]
    if (runs / "data" / f"{name}.json").exists():
        twins["are copies of"] = json.loads((runs / "data" / f"{name}.json").read_bytes())["duplicates"]
    return {kind: [[place[path] for path in some if path in place] for some in twins[kind]] for kind in twins}


def group_images(groups):
    """[indices of the images of each group], of groups str [N]."""
    order, sizes = np.argsort(groups), np.unique(groups, return_counts=True)[1]
    return np.split(order, np.cumsum(sizes)[:-1])


def count_leaks(parts, groups):
    """How many test images of each fold are in a group (indices of images) with a training image."""
    leaks = np.zeros(parts.shape, bool)
    for group in groups:
        if len(group) > 1:
            leaks[group] |= (parts[group] == "test") & (parts[group] == "train").any(0)
    return leaks.sum(0).tolist()


def describe(targets, classes, parts, groups, twins):
    """The split as text: images of each class, part and fold; groups; test images with a twin in training."""
    folds, scarce = (f"{f'fold{k}':>20}" for k in range(parts.shape[1])), []
    lines = ["test/val/train    images" + "".join(folds)]
    for label, name in enumerate(classes):
        rows = parts[targets == label]
        counts = np.array([(rows == part).sum(0) for part in ("test", "val", "train")])
        cells = (f"{'/'.join(map(str, column)):>20}" for column in counts.T)
        lines.append(f"{name:16}{len(rows):8}{''.join(cells)}")
        if counts.min() == 0:
            scarce.append(f"{name} ({len(rows)})")
    if scarce:
        lines.append(f"too few images or groups to be in every part of every fold: {', '.join(scarce)}")
    if groups is not None:
        twins = {"share a group with": group_images(groups)} | twins
        most = max(map(len, twins["share a group with"]))
        hint = "" if most > 1 else "; does the regular expression take the image's number?"
        lines.append(f"{len(twins['share a group with']):,} groups, the largest of {most:,} images{hint}")
    for kind, found in twins.items():
        lines.append(f"test images that {kind} a training image, by fold: {count_leaks(parts, found)}")
    return "\n".join(lines)


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that | head ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="data/bm", help="folder, pattern or table of the data set")
    parser.add_argument("--out", default="runs/split.csv", help="CSV to write")
    parser.add_argument(
        "--folds", type=int, help="each image is tested in one (default: official parts or 5)"
    )
    parser.add_argument("--val", type=float, default=0.2, help="validation share of what is not tested")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", help="CSVs of path,group, or regular expressions for paths")
    args = parser.parse_args()
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # folders may have any name
    from datasets import open_dataset  # the functions above do without

    cells = open_dataset(args.data)
    paths, labels = cells.paths.tolist(), [cells.classes[target] for target in cells.targets]
    try:
        groups = read_groups(args.groups, paths) if args.groups else cells.groups
        if cells.parts is not None and args.folds is None:
            cells.groups = None if groups is None else np.asarray(groups)
            parts = official_split(cells, args.seed)
        else:
            folds = 5 if args.folds is None else args.folds
            parts = make_splits(cells.targets, folds, args.val, args.seed, groups)
            if cells.parts is not None:
                print("the official parts are pooled: their boundary is given up", file=sys.stderr)
        twins = read_twins(pathlib.Path(args.out).parent, cells.name, paths)
        print(describe(cells.targets, cells.classes, parts, groups, twins))
        if not os.path.lexists(args.out):
            write_splits(args.out, paths, labels, parts)
            return print(f"{args.out}: written, {len(paths):,} images, {parts.shape[1]} fold(s)")
    except re.error as error:
        parser.error(f"--groups {' '.join(args.groups)}: not a regular expression ({error})")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        raise SystemExit(f"{args.out}: cannot be written ({error.strerror}); name another by --out") from None
    old = read_splits(args.out, paths)
    if sorted(zip(*old[:2], old[2].tolist())) != sorted(zip(paths, labels, parts.tolist())):
        why = f"another split, of {len(old[0]):,} images"
        raise SystemExit(f"{args.out}: {why}; remove it to split anew, or name another file with --out")
    print(f"{args.out}: holds this very split already")


if __name__ == "__main__":
    main()
