"""Stratified cross-validation (section 2.4): every image is tested once, a fifth of each class's rest validates.

    python splits.py --data data/bm                              # writes runs/split.csv: path,label,fold0,...,fold4
    python splits.py --data data/own --groups 'patient(\\d+)'     # one part a patient; or by a CSV of path,group

train.py makes the same file where there is none, and takes the one it finds as it stands, e.g. a published split."""
import argparse
import csv
import os
import pathlib
import re
import sys

import numpy as np


def make_splits(targets, folds=5, val=0.2, seed=0, groups=None):
    """Split images with class numbers targets (int [N]) into str [N, folds]: "train", "val" or "test" (section 2.4).

    Of a class's n images each fold tests n/folds, rounded up or down, and validates with max(1, round(val * rest)) of
    the rest, or none of a rest of 1. With groups (one id an image) no group is in two parts of a fold, and counts are
    as even as that allows. ValueError if folds or val make no sense or there are too few groups.
    """
    targets = np.asarray(targets, np.int64)
    if folds < 2 or not 0 < val < 1:
        raise ValueError(f"{folds} folds, validation share {val}: it takes 2 folds and a share between 0 and 1")
    if groups is not None:
        return split_groups(targets, folds, val, seed, groups)
    parts = np.full((len(targets), folds), "train", dtype="<U5")
    first = 0
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        keys = random_keys(seed, label, folds + 1, len(members))
        tested = np.empty(len(members), np.int64)
        tested[np.argsort(keys[0], kind="stable")] = (first + np.arange(len(members))) % folds
        first += len(members)  # each class is dealt from where the last one ended: remainders don't pile up in fold 0
        for fold in range(folds):
            rest = np.flatnonzero(tested != fold)
            rest = rest[np.argsort(keys[1 + fold][rest], kind="stable")]
            count = max(0, min(max(1, round(val * len(rest))), len(rest) - 1))
            parts[members[tested == fold], fold] = "test"
            parts[members[rest[:count]], fold] = "val"
    return parts


def random_keys(seed, label, rows, columns):
    """Numbers to sort by, uint64 [rows, columns]: raw bits, which any version of numpy draws alike, unlike shuffles."""
    return np.random.PCG64([int(seed), int(label)]).random_raw(rows * columns).reshape(rows, columns)


def split_groups(targets, folds, val, seed, groups):
    """make_splits where all images of a group are in one part."""
    names, group = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    classes, label = np.unique(targets, return_inverse=True)
    if len(names) < max(folds, 3):
        raise ValueError(f"{len(names)} groups are too few for {folds} folds, {max(folds, 3)} are needed; ask for "
                         "fewer folds or check what --groups takes out of the paths")
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
    """Put groups (counts int [groups, classes]) into parts of the given shares, none empty: int [groups].

    The largest first, each where it adds least to the chi-square statistic of the counts against their shares."""
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
    """Write a split as CSV (path,label,fold0,...), rows sorted by path; the file appears whole or not at all."""
    beside = pathlib.Path(f"{file}.tmp{os.getpid()}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["path", "label"] + [f"fold{k}" for k in range(parts.shape[1])])
            rows = zip(map(str, paths), map(str, labels), parts.tolist())
            writer.writerows(sorted([path, label, *row] for path, label, row in rows))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def read_table(file, columns):
    """Header and rows (lists of str) of a CSV whose fields are all filled, the first ones unique; SystemExit if not."""
    rows = {}
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.reader(handle)
            for row in filter(None, reader):
                if not rows and row[:len(columns)] != columns:
                    raise ValueError(f"the header has to begin with {','.join(columns)}")
                if "" in row or len(row) != len(rows.get("path", row)):
                    raise ValueError("an incomplete row, or one too long")
                if rows.setdefault(row[0], row) is not row:
                    raise ValueError(f"{row[0]!r} is there a second time")
    except OSError as error:
        raise SystemExit(f"{file}: cannot be read ({error.strerror}); correct it or name another") from None
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{file}, line {reader.line_num}: {error}; correct it or make the file anew") from None
    if len(rows) < 2:
        raise SystemExit(f"{file}: lists no image; make the file anew")
    return rows.pop("path"), list(rows.values())


def read_splits(file):
    """Read a split: (paths list, labels list, parts str [N, folds]); SystemExit says which row is wrong."""
    header, rows = read_table(file, ["path", "label", "fold0"])
    if header[2:] != [f"fold{k}" for k in range(len(header) - 2)]:
        raise SystemExit(f"{file}, line 1: the folds have to be fold0,fold1,..., not {','.join(header[2:])}")
    parts = np.array([row[2:] for row in rows])
    for row, k in np.argwhere(~np.isin(parts, ["train", "val", "test"])):
        raise SystemExit(f"{file}, row of {rows[row][0]!r}: fold{k} is {str(parts[row, k])!r}, not train, val or test")
    return [row[0] for row in rows], [row[1] for row in rows], parts.astype("<U5")


def read_groups(source, paths):
    """One group id a path: from a CSV of path,group, or what a regular expression (its bracket, if any) finds there."""
    if os.path.isfile(source):
        found = {row[0]: row[1] for row in read_table(source, ["path", "group"])[1]}
        ids = [found.get(path) for path in paths]
    else:
        ids = [match and match.group(min(1, match.re.groups)) for match in (re.search(source, p) for p in paths)]
    if missing := [path for path, name in zip(paths, ids) if not name]:
        kind = "a file" if os.path.isfile(source) else "no such file, so a regular expression"
        raise SystemExit(f"--groups {source} ({kind}): no group for {len(missing)} of {len(paths)} images, e.g. {missing[0]!r}")
    return ids


def describe(targets, classes, parts):
    """The split as text: test/val/train images of each class and fold, and which classes can't be everywhere."""
    scarce, lines = [], ["test/val/train    images" + "".join(f"{f'fold{k}':>20}" for k in range(parts.shape[1]))]
    for label, name in enumerate(classes):
        rows = parts[targets == label]
        counts = np.array([(rows == part).sum(0) for part in ("test", "val", "train")]).T.tolist()
        lines.append(f"{name:16}{len(rows):8}" + "".join(f"{'/'.join(map(str, count)):>20}" for count in counts))
        if min(map(min, counts)) == 0:
            scarce.append(f"{name} ({len(rows)})")
    lines += [f"too few images or groups to be in every part of every fold: {', '.join(scarce)}"] * bool(scarce)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/bm", help="folder of the data set")
    parser.add_argument("--out", default="runs/split.csv", help="CSV to write")
    parser.add_argument("--folds", type=int, default=5, help="each image is tested in one of them")
    parser.add_argument("--val", type=float, default=0.2, help="validation share of what is not tested")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", help="regular expression that finds the patient in a path, or CSV of path,group")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    if args.folds < 2 or not 0 < args.val < 1 or args.seed < 0:
        parser.error("--folds is 2 or more, --val between 0 and 1, --seed 0 or more")
    from datasets import open_dataset  # the functions above do without
    cells = open_dataset(args.data)
    paths, labels = cells.paths.tolist(), [cells.classes[target] for target in cells.targets]
    try:
        groups = read_groups(args.groups, paths) if args.groups else None
        parts = make_splits(cells.targets, args.folds, args.val, args.seed, groups)
        print(describe(cells.targets, cells.classes, parts))
        if not os.path.lexists(args.out):
            write_splits(args.out, paths, labels, parts)
            return print(f"{args.out}: written, {len(paths):,} images in {args.folds} folds")
    except re.error as error:
        parser.error(f"--groups {args.groups}: neither a file nor a regular expression ({error})")
    except ValueError as error:
        raise SystemExit(f"{args.data}: {error}") from None
    except OSError as error:
        raise SystemExit(f"{args.out}: cannot be written ({error.strerror}); name another file with --out") from None
    old = read_splits(args.out)
    if set(zip(*old[:2], map(tuple, old[2]))) != set(zip(paths, labels, map(tuple, parts))):
        raise SystemExit(f"{args.out}: another split of {len(old[0]):,} images, {old[2].shape[1]} folds, is "
                         "there for train.py to use as it is; remove it to split anew, or name another file with --out")
    print(f"{args.out}: this very split stands there already")


if __name__ == "__main__":
    main()
