"""In-domain pre-training (section 2.4.2): the training of train.py on another data set, its normalisation, and no random crop.

    python pretrain.py --model resnet152 --init cd                     # from random weights on data/cd
    python pretrain.py --model resnet152 --init imagenet+cd            # from ImageNet weights on data/cd
    python pretrain.py --model resnet152 --init imagenet+mine --data data/mine
    python train.py --model resnet152 --init imagenet+cd               # then starts from its best epoch's backbone

--init is the initialisation that comes out. Leaves runs/pretrain/<model>/<init>/ with the files of a run of train.py;
predictions.csv is of the validation images. PatchCamelyon trains on its official training part and validates on its
official validation part; any other set is split 80/20, stratified, with all crops of one image in one part.
"""
import argparse
import pathlib
import re

import numpy as np
import splits
import train

VALIDATION_PARTS = 5  # one of them validates: 20%


def pretraining_parts(cells, seed=0):
    """Parts, str [N, 1] of 'train' and 'val', of a pre-training's Cells (section 2.4.2); of PCam the test part is ''."""
    if cells.parts is not None:
        return np.where(cells.parts == "test", "", cells.parts)[:, None]
    if cells.groups is not None and len(set(cells.groups)) < VALIDATION_PARTS:
        number = len(set(cells.groups))
        raise SystemExit(f"{cells.root}: cells of {number} images only; at least {VALIDATION_PARTS} are needed to split them")
    tested = splits.make_splits(cells.targets, folds=VALIDATION_PARTS, seed=seed, groups=cells.groups)[:, :1] == "test"
    return np.where(tested, "val", "train")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_options(parser)
    parser.add_argument("--init", required=True, help="what comes out: cd, pcam, imagenet+cd, imagenet+pcam, NAME or imagenet+NAME")
    parser.add_argument("--data", help="folder of the data set (default: data/ and the name in --init)")
    args = parser.parse_args()
    start, _, name = args.init.rpartition("+")
    if start not in ("", "imagenet") or not re.fullmatch(r"[\w.-]+", name) or name in ("random", "imagenet"):
        parser.error(f"--init {args.init}: a data set's name (cd, pcam, ...) or imagenet+ and that name")
    settings = train.run_options(args, parser)
    cells, info = train.open_checked(args.data or f"data/{name}", args.runs)
    folder = pathlib.Path(args.runs) / "pretrain" / args.model / args.init
    return train.run(folder, folder, cells, info, pretraining_parts(cells), init=args.init,
                     weights=args.weights if start else None, fold=0, crop=False, **settings)


if __name__ == "__main__":
    train.run_main(main)
