"""
Reads checkpoints, and alone does so: metrics, pictures, and the classes of your own images.

    python evaluate.py out/best.pt                     the test set: numbers here, and pictures and
                                                       metrics.json beside the checkpoint
    python evaluate.py out/best.pt --split val         the images the checkpoint was chosen on
    python evaluate.py out/best.pt --images cat.jpg    what is in this picture, and how sure is it

A checkpoint holds all that is needed (both configs, class names, normalisation), so there are no
model flags.

Axes:  B images   h heads   N tokens   P patches   K classes
"""

import argparse
import csv
import json
import os
import sys
import zipfile

import torch
import torch.nn.functional as nnF
from torch import Tensor

import data
from vit import VisionTransformer, ViTConfig

FORMAT = "vit-cifar10 checkpoint 2"  # train.py writes this line into its checkpoints


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of train.py: plain data only, with every tensor on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is damaged (every stored byte is checked
    against its CRC, which torch.load does not do) or foreign. Code hidden in a file is never run:
    weights_only.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # zipfile and torch.load raise half a dozen types for broken files
        raise ValueError(
            f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})"
        ) from None
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum in {damaged}")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train.py, or one of another version")
    try:
        build_model(checkpoint)
        missing = {"train", "classes", "mean", "std", "fingerprint", "epoch"} - set(checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        missing = [type(error).__name__]
    if missing:
        raise ValueError(f"{path} does not hold a whole model and its data ({', '.join(missing)})")
    return checkpoint


def build_model(checkpoint: dict) -> VisionTransformer:
    """The trained model in eval mode: with the averaged weights (EMA) where the run kept them."""
    model = VisionTransformer(ViTConfig(**checkpoint["vit"]))
    model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    return model.eval()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": the accelerator that is there, else the CPU.

    ValueError for a device that is not there.
    """
    # Unchecked, a torch built for CUDA would name it on a machine without a GPU, too.
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'unknown device "{name}": expected auto, cpu, cuda or mps') from None
    absent = f'device "{name}" is not available here; there'
    if device.type != "cpu" and (found is None or device.type != found.type):
        raise ValueError(f"{absent} is {found.type if found else 'only cpu'}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(f"{absent} are {torch.accelerator.device_count()}")
    return device


@torch.no_grad()
def predict(
    model, images: Tensor, mean: tuple, std: tuple, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits, float32 (B, K), of uint8 images (B, 3, H, W): each once, in order, only normalised.

    In eval mode; the model is left in the mode it was found in. A dtype below float32 means
    autocast.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = []
    for batch in images.split(1_000):
        x = data.normalize(batch.to(device), mean, std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits.append(model(x).float())
    model.train(was_training)
    return torch.cat(logits)


def measure(logits: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """All the numbers about predictions, as plain data, from logits (B, K) and int64 labels (B,).

    Fractions are in [0, 1]; a class never predicted has precision 0. confusion_matrix[i][j] counts
    images of class i that were taken for class j. ece is the expected calibration error (Guo 2017):
    the mean distance between confidence and accuracy, over 15 equal bins of confidence.
    """
    K, labels = len(classes), labels.cpu()
    probabilities = logits.cpu().double().softmax(1)
    confidence, predicted = probabilities.max(1)
    correct = (predicted == labels).double()
    confusion = torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)
    hits = confusion.diagonal().double()
    precision, recall = hits / confusion.sum(0).clamp(min=1), hits / confusion.sum(1).clamp(min=1)
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, confidence - correct)
    return {
        "accuracy": correct.mean().item(),
        "loss": nnF.cross_entropy(logits.cpu().double(), labels).item(),
        "ece": (gaps.abs().sum() / len(labels)).item(),
        "images": len(labels),
        "classes": list(classes),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": (2 * precision * recall / (precision + recall).clamp(min=1e-12)).tolist(),
        "confusion_matrix": confusion.tolist(),
    }


def describe(metrics: dict) -> str:
    """The metrics as a text for people."""
    classes, width = metrics["classes"], max(len("class"), *map(len, metrics["classes"]))
    lines = [
        f"accuracy {metrics['accuracy']:.2%} of {metrics['images']:,} images | "
        f"loss {metrics['loss']:.4f} | calibration error {metrics['ece']:.2%}",
        f"{'class':<{width}}   images   precision   recall       F1",
    ]
    for i, name in enumerate(classes):
        count = sum(metrics["confusion_matrix"][i])
        precision, recall, f1 = (f"{metrics[key][i]:.2%}" for key in ("precision", "recall", "f1"))
        lines.append(f"{name:<{width}}  {count:>7,}  {precision:>10}  {recall:>7}  {f1:>7}")
    confusions = [
        (count, f"{classes[i]} for {classes[j]} {count}x")
        for i, row in enumerate(metrics["confusion_matrix"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    confusions.sort(key=lambda pair: -pair[0])
    lines.append("commonest mistakes: " + ("; ".join(text for _, text in confusions[:5]) or "none"))
    return "\n".join(lines)


def attention_rollout(maps: Tensor) -> Tensor:
    """What each final token is made of, through all blocks: (depth, B, h, N, N) -> (B, N, N).

    Attention rollout (Abnar & Zuidema 2020): heads are averaged, half of each block's flow is the
    residual connection, and blocks multiply. Row i says what final token i is made of, and sums to
    1.
    """
    rollout = identity = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    for attention in maps.mean(dim=2):  # (B, N, N), first block first
        rollout = (attention + identity) / 2 @ rollout
    return rollout


# --- pictures -------------------------------------------------------------------------------------


def new_figure(rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure and its axes, (rows, columns): no window system, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axis, image: Tensor, title: str = ""):
    """image: uint8 (3, H, W)."""
    axis.imshow(image.permute(1, 2, 0).cpu().numpy())
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def plot_confusion_matrix(path: str, metrics: dict, title: str):
    """Rows are true classes, columns predicted ones; metrics as measure() gives them."""
    confusion, classes = torch.tensor(metrics["confusion_matrix"]), metrics["classes"]  # (K, K)
    K = len(classes)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(0.45 * K, 45)  # inches, for 100 names to be read; more would take gigabytes
    figure, [[axis]] = new_figure(figsize=(2.5 + side, 2 + side))
    picture = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(K), classes, rotation=45, ha="right")
    axis.set_yticks(range(K), classes)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title(f"{title}: accuracy {metrics['accuracy']:.2%}")
    if K <= 20:  # numbers in the squares, while they can be read
        for i, row in enumerate(confusion.tolist()):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if share[i, j] > 0.5 else "black"
                    axis.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)


def read_log(path: str) -> list[dict]:
    """The rows of log.csv, as dictionaries of floats; an empty cell is None."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{key: float(text) if text else None for key, text in row.items()} for row in rows]
    except (TypeError, ValueError):
        raise ValueError(f"{path} is not a log of train.py any more: delete it") from None


def plot_curves(path: str, history: list[dict], title: str):
    """Loss, accuracy and learning rate by epoch."""
    figure, [axes] = new_figure(1, 3, figsize=(13, 4))

    def draw(axis, key, label, scale=1.0):
        points = [(row["epoch"], scale * row[key]) for row in history if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)

    draw(axes[0], "train_loss", "training batches, as augmented")
    draw(axes[0], "val_loss", "validation")
    draw(axes[1], "train_accuracy", "training images, clean", 100)
    draw(axes[1], "val_accuracy", "validation", 100)
    draw(axes[1], "ema_accuracy", "validation, averaged weights", 100)
    draw(axes[2], "lr", "at the end of the epoch")
    for axis, name in zip(axes, ("cross-entropy loss", "accuracy (%)", "learning rate")):
        axis.set_xlabel("epoch")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_attention(path: str, model, images: Tensor, mean: tuple, std: tuple, title: str):
    """Where the answer comes from: rollout over up to eight uint8 images (B, 3, H, W)."""
    images = images[:8].cpu()
    device = next(model.parameters()).device
    # (depth, B, h, N, N)
    maps = model.attention_maps(data.normalize(images.to(device), mean, std))
    rollout = attention_rollout(maps)  # (B, N, N)
    flow = rollout[:, 0, 1:] if model.config.pool == "cls" else rollout.mean(1)  # (B, P)
    side = model.config.image_size // model.config.patch_size
    flow = flow.view(-1, 1, side, side)
    flow = flow / flow.amax(dim=(2, 3), keepdim=True)
    flow = nnF.interpolate(flow, size=images.shape[-2:], mode="bilinear").cpu()
    figure, axes = new_figure(2, len(images), figsize=(1.5 * len(images), 3.6))
    for column, image, heat in zip(axes.T, images, flow):
        show_image(column[0], image)
        show_image(column[1], (image * (0.15 + 0.85 * heat)).to(torch.uint8))
    figure.suptitle(f"{title}: attention rollout, bright where the answer comes from")
    figure.savefig(path, dpi=110)


def plot_mistakes(path: str, images: Tensor, labels: Tensor, logits: Tensor, classes, title: str):
    """The wrong answers the model was surest of, up to twenty.

    uint8 images (B, 3, H, W), int64 labels (B,) and logits (B, K), on the CPU.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:20].tolist()
    rows = max(1, -(-len(worst) // 5))
    figure, axes = new_figure(rows, 5, figsize=(9, 1 + 2 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, worst):
        text = f"{classes[predicted[i]]}, {confidence[i]:.0%} sure\nis {classes[labels[i]]}"
        show_image(axis, images[i], text)
    what = f"the {len(worst)} most confident mistakes" if worst else "no mistakes"
    figure.suptitle(f"{title}: {what}")
    figure.savefig(path, dpi=110)


def plot_positions(path: str, model: VisionTransformer, title: str):
    """Cosine similarity of each patch's learned position with all others (ViT, figure 7)."""
    # Without the class token's, which is the first: (P, D).
    table = model.pos_embed.detach()[0, -model.config.num_patches :].cpu()
    side = model.config.image_size // model.config.patch_size
    shown = range(0, side, -(-side // 8))  # at most 8 x 8 of the patches
    size = 0.8 * len(shown)
    figure, axes = new_figure(len(shown), len(shown), figsize=(size + 1.5, size + 0.8))
    for row, line in zip(shown, axes):
        for column, axis in zip(shown, line):
            similarity = nnF.cosine_similarity(table[row * side + column], table, dim=-1)  # (P,)
            grid = similarity.view(side, side).numpy()
            picture = axis.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.7)
    what = "similarity of the learned positions,\none small map per patch"
    figure.suptitle(f"{title}: {what}", fontsize=10)
    figure.savefig(path, dpi=110)


# --- the program ----------------------------------------------------------------------------------


def evaluate(
    checkpoint: dict,
    out: str,
    split: str = "test",
    data_dir: str | None = None,
    device: str = "auto",
    dataset: data.Dataset | None = None,
    log: str | None = None,
) -> dict:
    """Evaluate on split "test" or "val": write metrics.json and pictures, return the metrics.

    dataset: a data.Dataset that is loaded already; otherwise the one the checkpoint was trained on
    is loaded. log: the run's log.csv, for the curves; by default the one in out. The files of the
    validation split are called *_val, but for curves and positions. ValueError if the data do not
    fit the checkpoint.
    """
    recipe, classes, mean, std = (checkpoint[key] for key in ("train", "classes", "mean", "std"))
    data_dir, image_size = data_dir or recipe["data_dir"], checkpoint["vit"]["image_size"]
    if dataset is None:
        dataset = data.load(recipe["dataset"], data_dir, image_size, recipe["download_url"])
    if list(dataset.classes) != list(classes):
        known, found = ", ".join(classes), ", ".join(dataset.classes)
        raise ValueError(f"the checkpoint knows the classes {known}; the data have {found}")
    images, labels = dataset.test_images, dataset.test_labels
    if split == "val":  # the same images as in training, or none: others may have been trained on
        if dataset.fingerprint != checkpoint["fingerprint"]:
            raise ValueError(
                "the training images have changed since: the validation images are lost among them"
            )
        _, index = data.split(len(dataset.train_images), recipe["val_size"], recipe["seed"])
        images, labels = dataset.train_images[index], dataset.train_labels[index]

    model = build_model(checkpoint).to(pick_device(device))
    logits = predict(model, images, mean, std).cpu()
    log = log or os.path.join(out, "log.csv")
    history = read_log(log) if os.path.exists(log) else []
    metrics = {"split": split, "epoch": checkpoint["epoch"], "epochs_trained": len(history)}
    metrics |= measure(logits, labels, classes)

    os.makedirs(out, exist_ok=True)
    suffix = "" if split == "test" else f"_{split}"
    name = recipe["dataset"]
    if name == "folder":
        name = os.path.basename(os.path.abspath(data_dir))
    title = f"{name}, {split} images"

    def path(name):
        return os.path.join(out, name)

    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $x^$
        plot_confusion_matrix(path(f"confusion_matrix{suffix}.png"), metrics, title)
        # Eight from all over the set: a folder is sorted by class, and the shapes come in turn.
        some = images[torch.linspace(0, len(images) - 1, 8).long().unique()]
        plot_attention(path(f"attention{suffix}.png"), model, some, mean, std, title)
        plot_mistakes(path(f"mistakes{suffix}.png"), images, labels, logits, classes, title)
        plot_positions(path("positions.png"), model, name)
        if history:
            plot_curves(path("curves.png"), history, name)
    text = json.dumps(metrics, indent=1)  # last, so that where it is, everything is
    data.save_atomically(text, path(f"metrics{suffix}.json"), write=data.write_text)
    return metrics


def read_metrics(out: str) -> dict:
    """The metrics.json of a folder; {} where there is none, or none that can be read."""
    try:
        with open(os.path.join(out, "metrics.json")) as file:
            metrics = json.load(file)
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def classify(checkpoint: dict, paths: list[str], device: str = "auto") -> list[str]:
    """One line for each picture: the three likeliest classes with their probabilities."""
    images = torch.stack([data.open_image(path, checkpoint["vit"]["image_size"]) for path in paths])
    model = build_model(checkpoint).to(pick_device(device))
    probabilities = predict(model, images, checkpoint["mean"], checkpoint["std"]).softmax(1)
    lines = []
    for path, row in zip(paths, probabilities):
        likeliest = row.topk(min(3, len(row)))
        answers = [f"{checkpoint['classes'][i]} {p:.1%}" for p, i in zip(*likeliest)]
        lines.append(f"{path}: {', '.join(answers)}")
    return lines


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and without guessing abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def fail(error: Exception | str) -> int:
    """Report what the user can mend as one line on stderr; returns the exit code, 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Evaluate a checkpoint of train.py, or classify pictures with it.")
    add = parser.add_argument
    add("checkpoint", help="such as out/best.pt")
    add("--split", choices=("test", "val"), default="test", help="which images (default: test)")
    add("--images", nargs="+", metavar="PICTURE", help="classify these pictures instead")
    add("--data-dir", help="where the dataset lies (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--out", help="folder for metrics and pictures (default: the checkpoint's)")
    try:
        args = parser.parse_args(argv)
        checkpoint = load_checkpoint(args.checkpoint)
        if args.images:
            print("\n".join(classify(checkpoint, args.images, args.device)))
            return 0
        folder = os.path.dirname(args.checkpoint) or "."
        out, log = args.out or folder, os.path.join(folder, "log.csv")
        metrics = evaluate(checkpoint, out, args.split, args.data_dir, args.device, log=log)
    except (ValueError, OSError) as error:
        return fail(error)
    source = f"{args.split} images of {checkpoint['train']['dataset']}"
    print(f"{args.checkpoint}, epoch {checkpoint['epoch']}, {source}")
    print(describe(metrics))
    print(f"wrote metrics and pictures into {out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
