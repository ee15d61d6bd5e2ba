"""In-domain pre-training (section 2.4.2): train.py's training on another data set, without the random crop.

    python pretrain.py --model resnet152 --init cd              # from random weights on data/cd
    python pretrain.py --model resnet152 --init imagenet+cd     # from ImageNet weights on data/cd
    python pretrain.py --model resnet152 --init imagenet+mine --data data/mine
    python train.py --model resnet152 --init imagenet+cd        # then starts from its best epoch's backbone

--init is the initialisation that comes out. Writes runs/pretrain/<model>/<init>/ with the files of a run of
train.py; predictions.csv is of the validation images. A data set with official parts (PatchCamelyon) trains
and validates on those; any other is split 80/20, stratified, all boxes of one image in one part.
"""

import argparse
import re

import numpy as np

import datasets
import splits
import train
from engine import from_rank_0

VALIDATION_PARTS = 5  # one of them validates: 20%


def pretraining_parts(cells, seed=0):
    """Parts of Cells, str [N, 1] of train and val; what an official split keeps for testing is '' (2.4.2)."""
    if cells.parts is not None:
        parts = splits.official_split(cells, seed)
        return np.where(parts == "test", "", parts)
    number = len(cells) if cells.groups is None else len(set(cells.groups))
    if number < VALIDATION_PARTS:
        raise SystemExit(f"{cells.root}: cells of {number} images, at least {VALIDATION_PARTS} are needed")
    folds = splits.make_splits(cells.targets, folds=VALIDATION_PARTS, seed=seed, groups=cells.groups)
    return np.where(folds[:, :1] == "test", "val", "train")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    train.add_options(parser)
    parser.add_argument("--init", required=True, help="what comes out: cd, imagenet+cd, NAME, ...")
    parser.add_argument("--data", help="folder, pattern or table (default: data/ and the name in --init)")
    args = parser.parse_args()
    start, _, name = args.init.rpartition("+")
    if start not in ("", "imagenet") or not re.fullmatch(r"[\w.-]+", name) or name in ("random", "imagenet"):
        parser.error(f"--init {args.init}: a data set's name (cd, pcam, ...) or imagenet+ and that name")
    if args.freeze:
        parser.error("--freeze: a pre-training trains the whole network")
    options = train.run_options(args, parser)
    data = args.data or f"data/{name}"
    cells, info = from_rank_0(lambda: datasets.open_checked(data, args.runs))
    folder = args.runs / "pretrain" / args.model / args.init
    options |= {"init": args.init, "weights": args.weights if start else None, "fold": 0, "crop": False}
    return train.run(folder, folder, cells, info, pretraining_parts(cells), **options)


if __name__ == "__main__":
    train.run_main(main)
