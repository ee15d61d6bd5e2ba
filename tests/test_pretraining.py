"""What a pre-training trains and validates on (section 2.4.2), against the COCO and HDF5 files themselves."""

import collections
import json
import pathlib

import h5py
import numpy as np
import pytest

import datasets
import demo_data
import pretrain


@pytest.fixture(scope="module")
def cd(tmp_path_factory):
    """Folder of the COCO set at the demo's size: 450 boxes in 11 classes."""
    folder = tmp_path_factory.mktemp("detector")
    demo_data.make(folder, size="demo", seed=0, sets=("cd",))
    return folder / "cd"


def test_pcam_trains_and_validates_on_its_official_parts(demo):
    cells = datasets.open_dataset(demo / "pcam")
    parts = pretrain.pretraining_parts(cells)[:, 0]
    for name, part in (("train", "train"), ("valid", "val"), ("test", "")):
        with h5py.File(demo / "pcam" / f"camelyonpatch_level_2_split_{name}_y.h5") as file:
            labels = file["y"][()].ravel()
        assert cells.targets[parts == part].tolist() == labels.tolist(), name
    assert "test" not in parts


def test_all_boxes_of_an_image_are_in_one_part(cd):
    cells = datasets.open_dataset(cd)
    parts = pretrain.pretraining_parts(cells)[:, 0]
    image_of = {}
    for file in cd.glob("*.json"):
        content = json.loads(file.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for box in content["annotations"]:
            image_of[pathlib.PurePath(names[box["image_id"]]).stem, box["id"]] = names[box["image_id"]]
    found = collections.defaultdict(set)
    for path, part in zip(cells.paths, parts):
        stem, _, box = pathlib.PurePath(path).stem.rpartition("_")
        found[image_of[stem, int(box)]].add(part)
    assert len(found) >= 50 and all(len(some) == 1 for some in found.values())
    assert {some.pop() for some in found.values()} == {"train", "val"}


def test_a_fifth_of_each_class_validates_as_far_as_whole_images_allow(cd):
    cells = datasets.open_dataset(cd)
    parts = pretrain.pretraining_parts(cells)[:, 0]
    assert 0.17 < (parts == "val").mean() < 0.23
    for label in range(len(cells.classes)):
        of_class = parts[cells.targets == label]
        images = (of_class == "val").sum()
        assert abs(images - 0.2 * len(of_class)) <= max(3, 0.1 * len(of_class)), cells.classes[label]


def test_the_split_is_the_same_every_time_and_another_by_another_seed(cd):
    cells = datasets.open_dataset(cd)
    first, again, other = (pretrain.pretraining_parts(cells, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_any_other_set_is_split_80_to_20(demo):
    cells = datasets.open_dataset(demo / "bm")
    parts = pretrain.pretraining_parts(cells)[:, 0]
    tested = np.bincount(cells.targets[parts == "val"], minlength=len(cells.classes))
    assert (abs(tested - 0.2 * np.bincount(cells.targets)) < 1).all() and set(parts) == {"train", "val"}
