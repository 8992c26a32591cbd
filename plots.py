"""
The plots of a run and a result.

draw(plot_curves, "curves.png", ...) draws one; whatever goes wrong costs a warning and no run.

Axes:  B images   h heads   N tokens   P patches   K classes
"""

import math
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from vit import VisionTransformer


def draw(plot, path: str, *arguments):
    """plot(path, *arguments), whatever Matplotlib's settings. A failure costs a warning line."""
    try:
        import matplotlib
        from matplotlib import font_manager

        # before 3.11, Matplotlib sees only the first of the fonts in a file: of Noto's it is JP
        chinese = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei")
        wanted = ("DejaVu Sans", *chinese, "Noto Sans")
        installed = {font.name for font in font_manager.fontManager.ttflist}
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place says enough
            matplotlib.rcdefaults()
            matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x^$
            matplotlib.rcParams["font.family"] = [name for name in wanted if name in installed]
            plot(path, *arguments)
    except Exception as error:  # nothing that goes wrong here is worth losing a run for
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: could not draw {path} ({reason})", file=sys.stderr)


def new_figure(rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure and its axes, (rows, columns): no window system, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path: str):
    """A title longer than the figure makes the picture larger: nothing is cut off."""
    figure.savefig(path, dpi=110, bbox_inches="tight")


def short(name: str, width: int = 24) -> str:
    """A class name that fits beside a picture."""
    return name if len(name) <= width else name[: width - 1] + "…"


def title_of(dataset: str, data_dir: str) -> str:
    """What the plots call the data: a folder of pictures by its own name."""
    return os.path.basename(os.path.abspath(data_dir)) if dataset == "folder" else dataset


def show_image(axis, image: Tensor, title: str):
    """image: uint8 (3, H, W), on the CPU."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def plot_confusion_matrix(path: str, metrics: dict, title: str):
    """Rows are true classes, columns predicted ones; metrics as measure() gives them."""
    confusion = torch.tensor(metrics["confusion_matrix"])  # (K, K)
    classes = [short(name) for name in metrics["classes"]]
    K = len(classes)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(0.45 * K, 45)  # inches, for 100 names to be read; more would take gigabytes
    figure, [[axis]] = new_figure(figsize=(max(6, 2.5 + side), max(4.5, 2 + side)))
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
    save(figure, path)


def plot_curves(path: str, history: list[dict], title: str):
    """Loss, accuracy and learning rate by epoch."""
    figure, [axes] = new_figure(1, 3, figsize=(13, 4))

    def curve(axis, key, label, scale=1.0):
        points = [(row["epoch"], scale * row[key]) for row in history if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)

    curve(axes[0], "train_loss", "training batches, as augmented")
    curve(axes[0], "val_loss", "validation")
    curve(axes[1], "train_accuracy", "training images, clean", 100)
    curve(axes[1], "val_accuracy", "validation", 100)
    curve(axes[1], "ema_accuracy", "validation, averaged weights", 100)
    curve(axes[2], "lr", "at the end of the epoch")
    for axis, name in zip(axes, ("cross-entropy loss", "accuracy (%)", "learning rate")):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.set_title(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def attention_rollout(maps: Tensor) -> Tensor:
    """What each final token is made of, through all blocks: (depth, B, h, N, N) -> (B, N, N).

    Attention rollout (Abnar & Zuidema 2020): heads are averaged, half of each block's flow is taken
    to be the residual connection, and blocks multiply; values and MLPs are ignored. Rows sum to 1.
    """
    rollout = identity = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    for attention in maps.mean(dim=2):  # (B, N, N), first block first
        rollout = (attention + identity) / 2 @ rollout
    return rollout


def plot_attention(
    path: str, model, images: Tensor, labels: Tensor, classes: list, mean: tuple, std: tuple, title
):
    """Attention rollout over up to eight uint8 images (B, 3, H, W).

    Each map is stretched to its own range: the shares themselves differ by a few percent.
    """
    images, labels = images[:8].cpu(), labels[:8].tolist()
    device, side = next(model.parameters()).device, model.config.side
    figure, axes = new_figure(2, len(images), figsize=(1.5 * len(images) + 0.8, 4))
    for image, label, above, below in zip(images, labels, *axes):  # one by one: maps are large
        x = data.normalize(image[None].to(device), mean, std)
        rollout = attention_rollout(model.attention_maps(x))[0]  # (N, N)
        flow = rollout[0, 1:] if model.config.pool == "cls" else rollout.mean(0)  # (P,)
        flow = (flow - flow.min()) / (flow.max() - flow.min()).clamp(min=1e-6)  # less is rounding
        with torch.no_grad():
            confidence, answer = model(x)[0].softmax(0).max(0)
        verdict = f"{short(classes[answer], 14)} {confidence:.0%}"
        show_image(above, image, f"{short(classes[label], 18)}\ntaken for\n{verdict}")
        grey, heat = image.float().mean(0).numpy(), flow.view(side, side).cpu().numpy()  # (H, W)
        below.imshow(grey, cmap="gray", vmin=0, vmax=255)
        H, W = grey.shape
        extent = (-0.5, W - 0.5, H - 0.5, -0.5)
        overlay = below.imshow(
            heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=extent, interpolation="bilinear"
        )
        below.axis("off")
    bar = figure.colorbar(overlay, ax=axes[1], ticks=[0, 1], shrink=0.8)
    bar.ax.set_yticklabels(["least", "most"])
    figure.suptitle(f"{title}: attention rollout")
    save(figure, path)


def plot_mistakes(path: str, images: Tensor, labels: Tensor, logits: Tensor, classes, title: str):
    """The wrong answers the model was surest of, up to twenty.

    uint8 images (B, 3, H, W), int64 labels (B,) and logits (B, K), on the CPU.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:20].tolist()
    rows = max(1, math.ceil(len(worst) / 5))
    figure, axes = new_figure(rows, 5, figsize=(9, 1 + 2 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, worst):
        answer, truth = short(classes[predicted[i]], 18), short(classes[labels[i]], 18)
        show_image(axis, images[i], f"{answer}, {confidence[i]:.0%} sure\nis {truth}")
    count = f"{len(worst)} of {len(wrong)} mistakes, most confident first"
    what = count if worst else "no mistakes"
    figure.suptitle(f"{title}: {what}")
    save(figure, path)


def plot_positions(path: str, model: VisionTransformer, title: str):
    """Cosine similarity of a learned position with all others, for each of the patches, or at most
    8 x 8 of them (ViT, figure 7)."""
    # Without the class token's, which is the first: (P, D).
    table = model.pos_embed.detach()[0, -model.config.num_patches :].cpu()
    side = model.config.side
    shown = range(0, side, math.ceil(side / 8))  # at most 8 x 8 of the patches
    size = 0.8 * len(shown)
    figure, axes = new_figure(len(shown), len(shown), figsize=(size + 1.5, size + 0.8))
    for row, line in zip(shown, axes):
        for column, axis in zip(shown, line):
            similarity = F.cosine_similarity(table[row * side + column], table, dim=-1)  # (P,)
            grid = similarity.view(side, side).numpy()
            picture = axis.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.7)
    what = "similarity of the learned positions,\none small map per patch"
    figure.suptitle(f"{title}: {what}", fontsize=10)
    save(figure, path)
