"""Network architectures, the weights they start from, and their layers for Grad-CAM.

    python models.py                                # Table 3: ImageNet accuracies and parameters, the paper's beside

Any classification model of torchvision gets a new last layer. Files are only ever read with weights_only=True: no code in them is run."""
import collections
import difflib
import math
import pathlib
import re
import socket
import sys

import torch
import torchvision

ARCHITECTURES = {  # Table 3: the paper's name, the weights of these accuracies, Acc@1, Acc@5, parameters
    "vgg19_bn": ("VGG-19 BN", "IMAGENET1K_V1", 74.218, 91.842, 143_678_248),
    "resnet152": ("ResNet-152", "IMAGENET1K_V2", 82.284, 96.002, 60_192_808),
    "regnet_y_32gf": ("Regnet_y_32gf", "IMAGENET1K_V2", 83.368, 96.498, 145_046_770),
    "vit_l_32": ("ViT l 32", "IMAGENET1K_V1", 76.972, 93.07, 306_535_400),
    "resnext50_32x4d": ("ResNeXt-50", "DEFAULT", None, None, None),  # baseline of Matek et al., not in Table 3
}
INITS = ("random", "imagenet", "pcam", "cd", "imagenet+pcam", "imagenet+cd")
CHECKPOINT_KEYS = "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts".split()
OURS = "name a best.pt that train.py or pretrain.py left"


def check_name(name, image_size=None, weights=None):
    """ValueError for a model, an image size (pixels) or ImageNet weights that don't exist, saying which do."""
    if name not in (known := torchvision.models.list_models(module=torchvision.models)):
        close = difflib.get_close_matches(str(name).lower(), known, 3) or list(ARCHITECTURES)
        raise ValueError(f"{name}: no classification model of torchvision; do you mean {', '.join(close)}?")
    patch = int(name.rsplit("_", 1)[1]) if name.startswith("vit_") else 224 if name == "maxvit_t" else 1
    least = 75 if name in ("alexnet", "inception_v3") else 32
    if image_size is not None and (image_size < least or image_size % patch):
        raise ValueError(f"{name}: image size {image_size} can't be; at least {least} pixels{f', a multiple of {patch}' * (patch > 1)}")
    if weights is not None:
        find_weights(name, weights)


def find_weights(name, weights="imagenet"):
    """torchvision's entry for ImageNet weights: 'imagenet' for Table 3's, or by name. ValueError if there is none."""
    entries = torchvision.models.get_model_weights(name).__members__
    wanted = ARCHITECTURES.get(name, ("", "DEFAULT"))[1] if weights.lower() == "imagenet" else weights.upper()
    if wanted not in entries:
        raise ValueError(f"{name}: no weights {weights}; torchvision has {', '.join(entries) or 'none'}")
    return entries[wanted]


def is_imagenet(weights):
    """Whether build_model's weights are ImageNet's, by a name without dot or slash, and neither None nor the path of a file."""
    return re.fullmatch(r"imagenet\w*|default", str(weights), re.IGNORECASE) is not None


def imagenet_file(name, weights="imagenet"):
    """(URL, Path) of ImageNet weights: the path is in torch.hub's folder (TORCH_HOME), be the file there or not."""
    url = find_weights(name, weights).url
    return url, pathlib.Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def build_model(name, num_classes, weights=None, image_size=224):
    """A torchvision network (float32, on the CPU) whose last layer is a new one of num_classes units (section 2.2).

    weights: None (random, from torch's global generator, which the caller seeds), 'imagenet' (those of Table 3), torchvision's name
    of ImageNet weights, or the path of a best.pt: all its tensors but the head's are copied. The head is nn.Linear's own random one,
    drawn after the random network: the same for all weights. A ViT's position embeddings are interpolated to image_size (pixels).
    ValueError for arguments that don't exist (check_name), SystemExit for a file that is missing, damaged or of another network."""
    check_name(name, image_size, weights if is_imagenet(weights) else None)
    without = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}  # their side outputs
    options = {"image_size": image_size} if name.startswith("vit_") else without
    net = torchvision.models.get_model(name, weights=None, **options)
    above, _, last = head_name(net).rpartition(".")
    old = net.get_submodule(head_name(net))
    setattr(net.get_submodule(above), last, torch.nn.Linear(old.in_features, num_classes) if hasattr(old, "in_features")
            else torch.nn.Conv2d(old.in_channels, num_classes, old.kernel_size))
    if is_imagenet(weights):
        url, file = imagenet_file(name, weights)
        if not file.exists():
            fetch(url, file)
        advice = f"remove it and put {url} there"
        load_state(net, read_file(file, advice), f"{file}: not the weights of {name}", advice, head=False)
    elif weights is not None:
        checkpoint = read_checkpoint(weights)
        if checkpoint["model"] != name:
            raise SystemExit(f"{weights}: a checkpoint of {checkpoint['model']}, not of {name}; {OURS}")
        load_state(net, checkpoint["state_dict"], f"{weights}: not the weights of {name}", OURS, head=False)
    return net


def head_name(net):
    """Dotted name of the last linear layer, e.g. 'fc', 'classifier.6', 'heads.head' (SqueezeNet: last convolution)."""
    linear, convolution = ([name for name, module in net.named_modules() if type(module) is kind]
                           for kind in (torch.nn.Linear, torch.nn.Conv2d))
    return (linear or convolution)[-1]


def fetch(url, file):
    """Download with progress bar and hash check, whole or not at all. SystemExit with one line if that can't be."""
    print(f"fetching {url} to {file}", file=sys.stderr, flush=True)
    socket.setdefaulttimeout(60)  # seconds without a byte; torch.hub sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[-1])
    except Exception as error:  # no network, no room, a wrong hash, ...
        raise SystemExit(f"{url}: can't be fetched ({error}); get it elsewhere and put it at {file}") from None


def read_file(file, advice):
    """The dict in a .pt or .pth file. SystemExit with one line if it is missing, damaged or more than plain data."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise SystemExit(f"{file}: {error.strerror or error}; {advice}") from None
    except Exception as error:  # whatever the damage leads to: RuntimeError, EOFError, UnpicklingError, OSError, KeyError, ...
        code = "unsupported global" in str(error).lower() or "unsupported class" in str(error).lower()
        why = "holds more than tensors and plain data, nothing of it was run" if code else "damaged or cut short"
        raise SystemExit(f"{file}: {why}; {advice}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{file}: holds a {type(content).__name__}, no weights; {advice}")
    return content


def read_checkpoint(path):
    """The dict of a best.pt. SystemExit with one line if the file is no such thing."""
    content = read_file(path, OURS)
    missing = [key for key in CHECKPOINT_KEYS if key not in content]
    if missing or not isinstance(content["state_dict"], dict):
        raise SystemExit(f"{path}: no checkpoint of ours, it lacks {', '.join(missing[:3]) or 'tensors'}; {OURS}")
    return content


def load_state(net, state, what, advice, head=True):
    """Copy tensors (dict by name) into net; without head, its own last layer stays. SystemExit names a wrong one."""
    own, last, wrong = net.state_dict(), head_name(net) + ".", []
    new = collections.OrderedDict((re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", str(key)), value) for key, value in state.items()  # DenseNet
                                  if head or not str(key).startswith((last, "aux1.", "aux2.", "AuxLogits.")))
    new._metadata = getattr(state, "_metadata", None)  # modules' versions: by them load_state_dict knows older files (VGG, ViT)
    if not head:
        new.update((key, value) for key, value in own.items() if key.startswith(last))
    try:
        if "encoder.pos_embedding" in own.keys() & new.keys():
            new = torchvision.models.vision_transformer.interpolate_embeddings(net.image_size, net.patch_size, new)
        shape = {key: list(getattr(value, "shape", ())) for key, value in new.items()}
        wrong += [f"{key} is {shape[key]}, not {list(value.shape)}" for key, value in own.items()
                  if shape.get(key, list(value.shape)) != list(value.shape)]
        missing, unknown = ([], []) if wrong else net.load_state_dict(new, strict=False)
        wrong += [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
    except (AttributeError, RuntimeError, ValueError) as error:
        wrong.append(str(error))
    if wrong:
        raise SystemExit(f"{what} ({wrong[0]}; {len(wrong)} such tensors); {advice}")


def load_checkpoint(path):
    """(trained network in eval mode, float32 on the CPU; dict of everything else in a best.pt). SystemExit if unfit."""
    info = read_checkpoint(path)
    state, classes = info.pop("state_dict"), info["classes"]
    try:
        net = build_model(info["model"], len(classes), None, info["image_size"])
        sizes = len(classes), len(state[head_name(net) + ".bias"]), len(info["train_counts"]), len(info["mean"]), len(info["std"])
        if sizes != (len(classes),) * 3 + (3, 3):
            raise ValueError("{} classes, {} units, {} train_counts, {} means, {} stds".format(*sizes))
        if not all(isinstance(label, str) for label in classes) or not all(map(math.isfinite, info["mean"])) or min(info["std"]) <= 0:
            raise ValueError(f"classes {classes}, mean {info['mean']}, std {info['std']}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{path}: no checkpoint of ours ({error}); {OURS}") from None
    load_state(net, state, f"{path}: not the weights of {info['model']}", OURS)
    return net.eval(), info


def cam_layer(net):
    """The layer that Grad-CAM looks at: the last one in which place is kept (VGG: the last ReLU before the pooling)."""
    if isinstance(net, torchvision.models.VisionTransformer):  # patches after the last attention have no gradient
        return net.encoder.layers[-1].ln_1
    if hasattr(net, "features") and isinstance(net.features[-1], torch.nn.MaxPool2d):
        return net.features[-2]
    names = "permute layer4 trunk_output conv5 layers Mixed_7c inception5b features".split()  # permute: Swin puts channels first
    return next((getattr(net, name) for name in names if hasattr(net, name)), None) or net.blocks[-1]  # MaxVit


def cam_reshape(net):
    """For a ViT, turns tokens [N, 1 + h*w, C] into a grid [N, C, h, w] without the class token; None for others."""
    if isinstance(net, torchvision.models.VisionTransformer):
        side = net.image_size // net.patch_size
        return lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def main():
    line = "{:<16}{:>8}{:>8}{:>8}{:>8}{:>13}{:>13}  {}"
    print(line.format("Table 3", "Acc@1", "paper", "Acc@5", "paper", "#Params", "paper", "weights"))
    for name, (_, _, *paper) in ARCHITECTURES.items():
        entry, parameters = find_weights(name), sum(p.numel() for p in torchvision.models.get_model(name).parameters())
        accuracy = entry.meta["_metrics"]["ImageNet-1K"]
        acc1, acc5, count = (f"{value:,}" if value else "-" for value in paper)
        print(line.format(name, accuracy["acc@1"], acc1, accuracy["acc@5"], acc5, f"{parameters:,}", count, entry.name))


if __name__ == "__main__":
    main()
