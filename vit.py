"""
A Vision Transformer, bottom-up: every name is defined before it is used.

    images                              (B, C, H, W)   normalised pixels
      PatchEmbedding                    (B, P, D)      cut into patches, map each to a vector
      class token first, positions      (B, N, D)      N = P + 1, or P without it (pool="mean")
      TransformerEncoderBlock x depth   (B, N, D)      x + Attention(Norm(x)), then x + MLP(Norm(x))
      final norm, then pool             (B, D)         the class token, or the mean over tokens
      head                              (B, K)         logits

Axes:  B batch   C channels   H, W image height and width   K classes
       P patches = S x S, the patches along a side   N tokens
       D model width (dim)   h heads   d = D / h width of a head

The papers: Vaswani et al. 2017 (Transformer), Dosovitskiy et al. 2021 (ViT), Touvron et al. 2021
(DeiT). With a class token and no position bias, parameter names and shapes are timm's, and weights
fit timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10).

`python vit.py` prints a tour of every module's shapes.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Everything that determines the network, and nothing else.

    The defaults: DeiT-Ti's width and depth, for 32x32 pixels in patches of 4, with some dropout.
    Raises ValueError, with both numbers in the message, for a combination that cannot be built.
    """

    image_size: int = 32  # side of the square input, pixels
    patch_size: int = 4  # side of a patch, pixels; 8 x 8 = 64 patches
    in_channels: int = 3  # C, colours of a pixel; pictures have three
    num_classes: int = 10  # K; train.py takes it from the dataset
    dim: int = 192  # D, width of every token
    depth: int = 12  # number of encoder blocks
    heads: int = 3  # h, attention heads per block
    mlp_ratio: float = 4.0  # hidden width of the MLP / dim
    dropout: float = 0.1  # after the embedding and after both layers of each MLP
    attn_dropout: float = 0.0  # on the attention weights
    drop_path: float = 0.0  # chance to skip a branch of the last block; linear from 0 in the first
    pool: str = "cls"  # what the head reads: "cls" (the class token) or "mean" (of all tokens)
    relative_position_bias: bool = False  # add a learned number by head and displacement to scores

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "in_channels", "num_classes", "dim", "depth", "heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            image, patch = self.image_size, self.patch_size
            raise ValueError(f"image_size {image} is not divisible by patch_size {patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if not 1 <= self.dim * self.mlp_ratio < 2**31:
            ratio = f"mlp_ratio {self.mlp_ratio} times dim {self.dim}"
            raise ValueError(f"{ratio} is no width for a hidden layer")
        for name in ("dropout", "attn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got "{self.pool}"')

    @property
    def side(self) -> int:  # S
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:  # P
        return self.side**2

    @property
    def num_tokens(self) -> int:  # N
        return self.num_patches + (self.pool == "cls")

    @property
    def mlp_dim(self) -> int:  # width of the MLP's hidden layer
        return int(self.dim * self.mlp_ratio)

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of one forward pass of one image, a multiply-add counted as 2.

        Matrix products only: norms, softmax and GELU add a few percent at most. A training step
        costs three times this (forward, gradient by inputs, gradient by weights).
        """
        N, D = self.num_tokens, self.dim
        patches = self.num_patches * self.in_channels * self.patch_size**2 * D
        projections = N * (4 * D * D + 2 * D * self.mlp_dim)  # qkv and output: 4 D^2; fc1 and fc2
        attention = 2 * N * N * D  # q k^T, then weights v
        return 2 * (patches + self.depth * (projections + attention) + D * self.num_classes)


def expect(x: Tensor, *shape: int | str):
    """Assert that x has this shape; a letter stands for any size."""
    fits = all(isinstance(want, str) or want == got for want, got in zip(shape, x.shape))
    expected = ", ".join(map(str, shape))
    assert fits and x.ndim == len(shape), f"expected ({expected}), got {tuple(x.shape)}"


class PatchEmbedding(nn.Module):
    """(B, C, H, W) -> (B, P, D): cut the image into patches, map each to D numbers (ViT, eq. 1).

    A convolution whose stride equals its kernel reads every pixel exactly once, so one call both
    cuts and projects. The patches come out in reading order: left to right, then top to bottom.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.shape = (config.in_channels, config.image_size, config.image_size)
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.shape:  # the user's images: an error, not an assertion
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"expected images of shape (B, {expected}), got {tuple(images.shape)}")
        x = self.proj(images)  # (B, D, S, S)
        # A copy, once: as a view of columns it would be copied by every norm of every block.
        return x.flatten(2).transpose(1, 2).contiguous()  # (B, P, D)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention: softmax(q k^T / sqrt(d) + bias) v (Vaswani 2017, eq. 1).

    q, k, v: (..., N, d). bias: (..., N, N). Returns the output (..., N, d) and the weights
    (..., N, N): row i says how much token i reads from each token, and sums to 1. Dropout zeroes
    single weights before they multiply v, but not in those returned. For q and k of variance 1 the
    scale keeps the scores' variance at 1, whatever the width d of a head.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., N, N)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)  # under autocast scores have 16 bits, and keep them
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) @ v, weights


def start_like_convolution(side: int, heads: int) -> Tensor:
    """float32 ((2 S - 1)^2, h): the bias by displacement and head, before training.

    Every head prefers one displacement, the nearest first: here, above, left, right, below, the
    four corners, and so on. The others get minus their squared distance to it, but at least -4.
    Nine heads then look where a 3x3 convolution looks, by the quadratic form of Cordonnier 2020,
    but softly: on 8x8 patches (and no class token) a quarter of the weight is on the displacement
    preferred, and half on the eight around it. They are free to unlearn it (as in ConViT, d'Ascoli
    2021).
    """
    steps = torch.arange(1 - side, side)
    displacements = torch.cartesian_prod(steps, steps)  # ((2 S - 1)^2, 2): rows down, columns right
    nearest_first = displacements[displacements.square().sum(1).argsort(stable=True)]
    own = nearest_first[torch.arange(heads) % len(nearest_first)]  # (h, 2)
    distances = (displacements[:, None] - own).square().sum(2)  # squared: ((2 S - 1)^2, h)
    return -distances.clamp(max=4).float()


class MultiHeadAttention(nn.Module):
    """(B, N, D) -> (B, N, D): every token reads from all tokens, in h independent ways.

    Vaswani 2017, section 3.2.2. torch has nn.MultiheadAttention; this one exists to be read.
    `attention` above is the definition; F.scaled_dot_product_attention computes the same without
    storing the weights. `fused` picks one; left at None it is the fused call on accelerators, and
    on a CPU the formula: at 65 tokens nearly as fast in float32, faster in bfloat16 (bench.py).
    """

    fused: bool | None = None

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attn_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.relative_position_bias_table = None
        if config.relative_position_bias:
            table = torch.empty((2 * config.side - 1) ** 2, config.heads)
            self.relative_position_bias_table = nn.Parameter(table)
            self.side, self.class_tokens = config.side, config.num_tokens - config.num_patches

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x and split it into queries, keys and values of every head, each (B, h, N, d)."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (3, B, h, N, d)

    def bias(self) -> Tensor | None:
        """(h, N, N): what is added to the scores (Swin, Liu 2021, eq. 4). The class token gets 0.

        The table has a row for every displacement from query to key, in reading order: from S - 1
        up and S - 1 left to as many down and right. Laid out as a picture, a query in row r and
        column c sees a window of S x S numbers, one for every key, that begins at row S - 1 - r and
        column S - 1 - c: the last query sees the first window.
        """
        if self.relative_position_bias_table is None:
            return None
        S = self.side
        table = self.relative_position_bias_table.unflatten(0, (2 * S - 1, 2 * S - 1))
        windows = table.unfold(0, S, 1).unfold(1, S, 1).flip(0, 1)  # (S, S, h, S, S)
        bias = windows.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)  # (h, P, P)
        return F.pad(bias, (self.class_tokens, 0) * 2)  # (h, N, N)

    def forward(self, x: Tensor) -> Tensor:
        expect(x, "B", "N", self.proj.in_features)
        q, k, v = self.split(x)  # (B, h, N, d) each
        dropout = self.dropout if self.training else 0.0
        fused = x.device.type != "cpu" if self.fused is None else self.fused
        if fused:
            x = F.scaled_dot_product_attention(q, k, v, self.bias(), dropout)
        else:
            x, _ = attention(q, k, v, self.bias(), dropout)
        return self.proj(x.transpose(1, 2).flatten(2))  # the heads side by side: (B, N, D)


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D): two linear layers around a GELU, on each token alone (ViT, 3.1)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        expect(x, "B", "N", self.fc1.in_features)
        x = self.dropout(F.gelu(self.fc1(x)))  # (B, N, mlp_dim)
        return self.dropout(self.fc2(x))  # (B, N, D)


class DropPath(nn.Module):
    """(B, N, D) -> (B, N, D): in training, zero the whole branch of an image, with chance `rate`.

    Stochastic depth (Huang 2016). What is kept is divided by the chance of being kept, so that the
    mean is unchanged and evaluation needs no correction. rate: in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.is_off = rate == 0
        # As a tensor, one compiled block serves every rate above 0; a Python number would be
        # compiled into it.
        # Not persistent: timm's state dicts have no such name.
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.is_off:
            return x
        coins = torch.bernoulli(self.keep.expand(x.shape[0], 1, 1))  # one per image: (B, 1, 1)
        return x * coins.to(x.dtype) / self.keep


class TransformerEncoderBlock(nn.Module):
    """(B, N, D) -> (B, N, D): attention moves information between tokens, the MLP works on each.

    ViT, eq. 2 and 3. Pre-norm: the norm stands inside each branch and the residual stream itself is
    never normalised, so gradients reach the first block unhindered.
    """

    def __init__(self, config: ViTConfig, drop_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VisionTransformer(nn.Module):
    """(B, C, H, W) normalised images -> (B, K) logits (ViT, section 3.1).

    ValueError for images of another shape.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        has_token = config.pool == "cls"
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if has_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(TransformerEncoderBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation, in one place.

        Biases 0, LayerNorm gains 1, relative positions like a convolution, the rest normal with
        standard deviation 0.02. DeiT does the same, but leaves the patch projection at PyTorch's
        default (0.083 here). (It calls the normal truncated, but at +-2 = 100 standard deviations
        nothing is cut.)
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("bias_table"):
                parameter.copy_(start_like_convolution(self.config.side, self.config.heads))
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D): the tokens that enter the first block."""
        x = self.patch_embed(images)  # (B, P, D)
        if self.cls_token is not None:
            cls_token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([cls_token, x], dim=1)  # (B, N, D)
        # Under autocast x is 16 bits wide and pos_embed 32. Their plain sum would have 32, and with
        # it the residual stream of all blocks, at twice the memory traffic.
        return self.dropout(x + self.pos_embed.to(x.dtype))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x[:, 0] if self.config.pool == "cls" else x.mean(dim=1)  # (B, D)
        return self.head(x)  # (B, K)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """The attention weights of every block, (depth, B, h, N, N), by the written-out formula.

        Call it in eval mode, as for any prediction: in training, dropout changes what the blocks
        see.
        """
        x, maps = self.embed(images), []
        for block in self.blocks:
            qkv = block.attn.split(block.norm1(x))
            _, weights = attention(*qkv, block.attn.bias())  # (B, h, N, N)
            maps.append(weights)
            x = block(x)
        return torch.stack(maps)


def main():
    """Print what every module makes of one image, with its parameters and FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ViTConfig()
    model = VisionTransformer(config).eval()
    parts = ("norm1", "attn.qkv", "attn.proj", "attn", "norm2", "mlp.fc1", "mlp.fc2", "mlp")
    names = ("patch_embed", *(f"blocks.0.{part}" for part in parts), "blocks.0", "norm", "head")
    shapes = {}  # name -> of what goes in and of what comes out

    def watch(name, module, inputs, output):
        shapes[name] = f"{tuple(inputs[0].shape)!s:<14} -> {tuple(output.shape)!s:<14}"

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(watch, name))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, config.in_channels, config.image_size, config.image_size))
    columns = f"{'name':<20}{'module':<24}{'input':<14}    {'output':<14}"
    print(f"{columns}{'parameters':>11}{'FLOPs':>12}")
    for name in names:
        module = model.get_submodule(name)
        what = f"{name:<20}{type(module).__name__:<24}{shapes[name]}"
        parameters = sum(p.numel() for p in module.parameters())
        flops = sum(counter.flop_counts[f"VisionTransformer.{name}"].values())
        print(f"{what}{parameters:>11,}{flops:>12,}")
    cls_token, pos_embed = tuple(model.cls_token.shape), tuple(model.pos_embed.shape)
    total, flops = sum(p.numel() for p in model.parameters()), config.flops_per_image
    print(f"blocks.1 to blocks.{config.depth - 1} are like blocks.0, with weights of their own.")
    print(f"Added before blocks.0: cls_token {cls_token} and pos_embed {pos_embed}, both learned.")
    print(f"In all {total:,} parameters and {flops:,} FLOPs an image (a multiply-add counts as 2).")


if __name__ == "__main__":
    main()
