"""
The specification of optim.py: one step of training, by the textbook's lines on a copy.

The models are small, in float64, with every parameter scrambled: at fresh weights a forgotten bias
shows in no number. AdamW hides the size of a gradient in its first step, and SGD is
another optimizer than build_state makes, so steps are compared in both, and two of them.
"""

import copy
import io
import math
import re
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import optim
from recipe import TrainConfig
from testing import DATASET, close, difference, flat, rng, small_batch, small_state, weights
from vit import VisionTransformer, ViTConfig

pytestmark = pytest.mark.usefixtures("tiny", "here")

CPU = torch.device("cpu")
# Everything that has a state, at once.
FULL = {"dtype": "float16", "ema_decay": 0.9, "grad_clip": 1.0, "weight_decay": 0.25}
both = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def now(state):
    """Everything that a step may change, as it is at this moment, flat."""
    return flat(copy.deepcopy(state.state_dict()))


def overflowing_step(state, seed, config, factor=math.inf):
    """A step in which one gradient is infinite, or not a number."""
    hook = state.model.head.bias.register_hook(lambda gradient: gradient * factor)
    loss, norm = optim.train_step(state, *small_batch(seed), config)
    hook.remove()
    assert loss.isfinite() and not norm.isfinite()


# ---- The state ----


def trained(seed=0, steps=3, **knobs):
    """A state that has taken some steps, and skipped one."""
    config, state = small_state(seed, **FULL, **knobs)
    for step in range(steps):
        optim.train_step(state, *small_batch(step), config)
    if seed == 0:
        overflowing_step(state, 9, config)
    return config, state


def through_a_file(state):
    """As a checkpoint keeps it: plain data, which loads without unpickling anything else."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
def test_a_loaded_state_continues_to_the_same_bits(optimizer):
    """A state of other weights that loads it takes the same steps and ends as it does."""
    config, state = trained(optimizer=optimizer)
    _, other = trained(seed=1, steps=1, optimizer=optimizer)
    other.load_state_dict(through_a_file(state))
    for step in (3, 4):
        ours, theirs = (optim.train_step(s, *small_batch(step), config) for s in (state, other))
        assert difference(flat(ours), flat(theirs)) is None
    assert difference(now(state), now(other)) is None


@pytest.mark.parametrize("piece", ["model", "ema", "optimizer", "scheduler", "scaler"])
def test_a_piece_that_is_left_out_of_a_state_is_missed(piece):
    """Else equal ends would prove nothing for it."""
    config, state = trained()
    _, other = trained(seed=1, steps=1)
    other.load_state_dict({**through_a_file(state), piece: other.state_dict()[piece]})
    for s in (state, other):
        optim.train_step(s, *small_batch(3), config)
    assert difference(now(state), now(other))


def test_a_state_of_another_network_is_refused_before_anything_of_it_is_loaded():
    """torch's optimizers do not look at shapes: the step after that would fail."""
    _, state = small_state()
    other = optim.build_state(TrainConfig(), network(dim=16), 20, CPU)
    optim.change_lr(other, 7.0)
    rest = lambda: {k: v for k, v in now(state).items() if not k.startswith("/model")}  # noqa: E731
    before = rest()
    with pytest.raises(RuntimeError, match="size mismatch"):
        state.load_state_dict(other.state_dict())
    assert difference(rest(), before) is None


@pytest.mark.parametrize("there, here", [("float32", "float16"), ("float16", "float32")])
def test_a_state_loads_where_another_dtype_is_computed_with(there, here):
    """From a GPU with bfloat16 to one without: the scaler begins anew."""
    config, state = small_state(dtype=here)
    fresh = state.scaler.state_dict()
    _, old = small_state(seed=1, dtype=there)
    state.load_state_dict(through_a_file(old))
    assert state.scaler.state_dict() == fresh
    optim.train_step(state, *small_batch(0), config)
    assert state.scheduler.last_epoch == 1


# ---- Groups and schedule ----


def network(dim=8, depth=2, **knobs):
    return ViTConfig(8, 4, num_classes=3, dim=dim, depth=depth, heads=2, dropout=0.0, **knobs)


NETWORKS = [{}, {"pool": "mean"}, {"relative_position_bias": True}]


@pytest.mark.parametrize("knobs", NETWORKS)
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(knobs):
    """Biases, norms, class token, positions and bias tables are offsets: decay would pull them to
    zero."""
    model = VisionTransformer(network(**knobs))
    names = {id(p): name for name, p in model.named_parameters()}
    matrix = re.compile(r"(patch_embed\.proj|qkv|attn\.proj|fc1|fc2|head)\.weight$")
    groups = optim.parameter_groups(model, 0.25)
    found = [(names[id(p)], g["weight_decay"]) for g in groups for p in g["params"]]
    assert sorted(found) == sorted((n, 0.25 if matrix.search(n) else 0.0) for n in names.values())
    assert bool(knobs.get("relative_position_bias")) == any("table" in n for n in names.values())


@pytest.mark.parametrize("knobs", NETWORKS)
def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(knobs):
    """Head, patches, positions, tables are looked up or read out, not multiplied through: AdamW's.
    Those of a group have one shape, to be orthogonalised in one go."""
    model = VisionTransformer(network(depth=12, **knobs))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g["params"] for g in optim.parameter_groups(model, 0.25) if g["muon"]]
    matrices = [f"{m}.weight" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    expected = sorted(f"blocks.{i}.{m}" for i in range(12) for m in matrices)
    assert sorted(names[id(p)] for group in groups for p in group) == expected
    assert len(groups) == 4 and all(len({p.shape for p in group}) == 1 for group in groups)


def build(config, steps=20, compiled=False):
    return optim.build_state(config, network(), steps, CPU, compiled)


def test_the_weights_of_a_fresh_model_follow_from_the_seed_alone():
    start = []
    for stream, seed in ((5, 0), (6, 0), (5, 1)):
        torch.manual_seed(stream)
        start.append(build(TrainConfig(seed=seed), steps=10 + stream).model.state_dict())
    assert difference(flat(start[0]), flat(start[1])) is None
    assert not torch.equal(start[0]["pos_embed"], start[2]["pos_embed"])


@both
def test_the_recipe_reaches_the_optimizer(optimizer):
    state = build(TrainConfig(optimizer=optimizer, weight_decay=0.3, lr=0.02))
    groups = state.optimizer.param_groups
    assert type(state.optimizer).__name__.lower() == optimizer
    assert {g["weight_decay"] for g in groups} == {0.3, 0.0}
    assert {g["max_lr"] for g in groups} == {0.02}


def test_only_float16_scales_its_loss():
    for dtype, scales in {"float32": False, "bfloat16": False, "float16": True}.items():
        state = build(TrainConfig(dtype=dtype))
        assert state.scaler.is_enabled() == scales and state.dtype == getattr(torch, dtype)


def one_cycle(step, total, pct_start, peak):
    """Half a cosine up from peak/25, half a cosine down to peak/25/10,000 (Smith 2018; torch)."""
    top, last = pct_start * total - 1, total - 1

    def cosine(start, end, share):
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    if step <= top:
        return cosine(peak / 25, peak, step / top)
    return cosine(peak, peak / 25 / 1e4, (step - top) / (last - top))


def run_through(state, config, steps):
    """Take these steps; the learning rates of all groups and the betas before each."""
    seen = []
    for step in range(steps):
        groups = state.optimizer.param_groups
        seen.append(([g["lr"] for g in groups], {g["betas"] for g in groups}))
        optim.train_step(state, *small_batch(step), config)
    return seen


@both
def test_the_learning_rate_rises_once_falls_once_and_ends_at_its_floor(optimizer):
    """Every step has its own rate, the same in all groups; the peak is at 30 % of 20 steps.
    Adam's betas stay (OneCycleLR would cycle beta1 between 0.85 and 0.95)."""
    config, state = small_state(lr=0.03, pct_start=0.3, steps=20, optimizer=optimizer)
    expected = [one_cycle(step, 20, 0.3, 0.03) for step in range(20)]
    assert max(expected) == expected[5] == pytest.approx(0.03)
    for (rates, betas), rate in zip(run_through(state, config, 20), expected, strict=True):
        assert rates == pytest.approx([rate] * len(rates), rel=1e-9) and betas == {(0.9, 0.999)}


@pytest.mark.parametrize("pct_start, equal_to", [(0.0, 0.0), (0.05, 0.05), (0.1, 0.0), (0.2, 0.2)])
def test_a_rise_of_no_or_one_step_is_no_rise(pct_start, equal_to):
    """torch divides by (steps of the rise - 1): pct_start x 10 steps = 1 must not end the run."""
    config, state = small_state(pct_start=pct_start, steps=10)
    rates = [rates[0] for rates, _ in run_through(state, config, 10)]
    expected = [one_cycle(step, 10, equal_to, 0.01) for step in range(10)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("factor", [0.1, 3.0])
@pytest.mark.parametrize("taken", [0, 2, 9])
def test_changing_the_rate_scales_the_rest_of_the_schedule_exactly(taken, factor):
    """Also after loading, which brings the old corner points back; and it can be repeated."""
    config, state = small_state(pct_start=0.4, steps=12)
    run_through(state, config, taken)
    _, changed = small_state(seed=1, steps=12, pct_start=0.4)
    changed.load_state_dict(through_a_file(state))
    optim.change_lr(changed, factor * 2)
    optim.change_lr(changed, 0.5)
    rest = [rates for rates, _ in run_through(state, config, 12 - taken)]
    scaled = [rates for rates, _ in run_through(changed, config, 12 - taken)]
    for ours, theirs in zip(rest, scaled, strict=True):
        assert theirs == pytest.approx([factor * rate for rate in ours], rel=1e-12)


def test_compiling_compiles_the_blocks_and_leaves_no_trace_in_the_names(monkeypatch):
    """All of the model and of the average, one graph for one shape; torch.compile's wrapper would
    put _orig_mod. before every name."""
    compiled = set()

    def compile_(call, dynamic=None, **options):
        assert dynamic is False
        compiled.add(call.__self__)
        return call

    monkeypatch.setattr(torch, "compile", compile_)
    config = TrainConfig(ema_decay=0.9)
    plain, state = build(config), build(config, compiled=True)
    assert compiled == {*state.model.blocks, *state.ema.blocks} and len(compiled) == 4
    assert state.compiled and not plain.compiled
    assert difference(flat(state.state_dict()), flat(plain.state_dict())) is None
    compiled.clear()
    assert build(TrainConfig(), compiled=True).ema is None and len(compiled) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler hides its own, but not from an error
@torch.no_grad()
def test_more_than_eight_sizes_of_batches_are_compiled(monkeypatch):
    """The compiler's own limit: the blocks of one network share its variants, and own pictures may
    come in nine sizes. A stand-in counts what it is given to compile."""
    compiled, real = [], nn.Module.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda *args, **more: real(*args, backend=count, **more)
    )
    torch._dynamo.reset()
    model = build(TrainConfig(), compiled=True).model.eval()
    for n in range(2, 12):
        model(torch.zeros(n, 3, 8, 8))
    assert len(compiled) == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler hides its own, but not from an error
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_one_compiled_block_serves_all_and_computes_what_it_did():
    """Two graphs for any depth: the first block drops no path. A rate in Python would make one
    graph a block, up to torch's limit of eight, and none beyond it."""
    deep = ViTConfig(8, 4, num_classes=3, dim=8, depth=12, heads=2, dropout=0.0, drop_path=0.5)
    config, steps = TrainConfig(optimizer="muon"), []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        state = optim.build_state(config, deep, 20, CPU, compiled)
        with torch.no_grad():
            state.model.blocks[0].attn.qkv.bias.normal_(generator=rng(0))
        state.model.eval()
        images = torch.randn(4, 3, 8, 8, generator=rng(1))
        steps.append([state.model(images)])
        state.model.train()
        for block in state.model.blocks:
            block.drop_path.keep.fill_(1.0)  # masks differ between compiled and eager
        steps[-1] += optim.train_step(state, images, torch.full((4, 3), 1 / 3), config)
        steps[-1] += [p.grad for p in state.model.parameters() if p.grad is not None]
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 + 2  # one to evaluate, two to train


# ---- Averaged weights ----


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_average_is_the_stated_recurrence_and_never_touches_the_model(decay):
    """ema <- d ema + (1 - d) model after step t = 0, 1, ...; d = min(decay, (1 + t) / (10 + t))."""
    config, state = small_state(ema_decay=decay)
    bare_config, bare = small_state()
    expected = weights(state.model)
    for t in range(5):
        optim.train_step(state, *small_batch(t), config)
        optim.train_step(bare, *small_batch(t), bare_config)
        d = min(decay, (1 + t) / (10 + t))
        expected = {n: d * expected[n] + (1 - d) * p for n, p in weights(state.model).items()}
    close(weights(state.ema), expected)
    assert difference(weights(state.model), weights(bare.model)) is None
    assert bare.ema is None and not any(p.requires_grad for p in state.ema.parameters())


def test_the_average_starts_as_the_model():
    state = build(TrainConfig(ema_decay=0.9))
    assert difference(weights(state.model), weights(state.ema)) is None
    assert not {id(p) for p in state.model.parameters()} & {id(p) for p in state.ema.parameters()}


# ---- One step ----


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_steps_equal_two_plain_optimizer_steps_on_a_copy(kind, grad_clip, seed):
    """Forward, backward, clip, step, with the rates of the schedule."""
    config, state = small_state(seed, grad_clip=grad_clip, weight_decay=0.25, lr=0.01)
    if kind == "SGD":
        state.optimizer = torch.optim.SGD(optim.parameter_groups(state.model, 0.25), lr=0.01)
        state.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            state.optimizer, max_lr=0.01, total_steps=20, cycle_momentum=False
        )
    model = copy.deepcopy(state.model)
    offset = ("bias", "norm", "cls_token", "pos_embed")
    plain = [p for n, p in model.named_parameters() if any(part in n for part in offset)]
    decayed = [p for p in model.parameters() if not any(p is q for q in plain)]
    groups = [{"params": decayed, "weight_decay": 0.25}, {"params": plain, "weight_decay": 0.0}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.01)
    for step in range(2):
        images, targets = small_batch(10 * seed + step)
        loss, norm = optim.train_step(state, images, targets, config)

        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, 20, 0.3, 0.01)
        optimizer.zero_grad()
        expected = F.cross_entropy(model(images).float(), targets)
        expected.backward()
        squares = sum((p.grad**2).sum() for p in model.parameters())
        if grad_clip:
            for p in model.parameters():
                p.grad *= grad_clip / (squares.sqrt() + 1e-6)
        optimizer.step()
        assert grad_clip < squares.sqrt(), "nothing would be clipped"
        close(loss, expected.detach())
        close(norm, squares.sqrt())
    close(weights(state.model), weights(model))
    assert state.scheduler.last_epoch == 2


def test_a_small_gradient_is_not_clipped():
    """A bound that no gradient reaches changes no bit."""
    ends = []
    for grad_clip in (0.0, 1e6):
        config, state = small_state(grad_clip=grad_clip)
        optim.train_step(state, *small_batch(0), config)
        ends.append(weights(state.model))
    assert difference(*ends) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_cross_entropy_with_soft_targets(seed):
    """- sum over classes of t log p, mean over images; a number, which holds no graph alive."""
    config, state = small_state(seed)
    images, targets = small_batch(seed)
    logits = state.model(images)
    loss, _ = optim.train_step(state, images, targets, config)
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        log_sum = math.log(sum(map(math.exp, row)))
        total -= sum(t * (z - log_sum) for z, t in zip(row, target))
    assert loss.item() == pytest.approx(total / len(images), abs=1e-6)
    assert loss.shape == () and not loss.requires_grad


def test_the_step_computes_in_bfloat16_and_keeps_float32():
    """The arithmetic is bfloat16's; weights, gradients and loss are not."""
    config, state = small_state(dtype="bfloat16")
    state.model.float()
    seen = []
    state.model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    images, targets = (tensor.float() for tensor in small_batch(0))
    loss, _ = optim.train_step(state, images, targets, config)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert {p.grad.dtype for p in state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_processes_that_share_a_batch_take_the_step_of_one(dtype, monkeypatch):
    """Three equal shares, of which each process computes one. What all_reduce adds is one tensor,
    all gradients in the order of the parameters: in every step of every process the same sum."""
    config, state = small_state(dtype=dtype, grad_clip=0.05)
    _, one = small_state(dtype=dtype, grad_clip=0.05)
    batches = [small_batch(seed) for seed in range(3)]
    _, expected_norm = optim.train_step(one, *map(torch.cat, zip(*batches)), config)
    flats = []
    for images, targets in batches[1:]:
        _, other = small_state(dtype=dtype)
        loss = F.cross_entropy(other.model(images).float(), targets)
        other.scaler.scale(loss).backward()
        flats.append(torch.cat([p.grad.flatten() for p in other.model.parameters()]))
    monkeypatch.setattr(optim.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(optim.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(optim.dist, "all_reduce", lambda flat: flat.add_(sum(flats)))
    _, norm = optim.train_step(state, *batches[0], config)
    close(norm, expected_norm, 1e-6)
    for ours, expected in zip(state.model.parameters(), one.model.parameters(), strict=True):
        close(ours, expected, 1e-6)


def test_a_pytorch_without_distributed_trains(monkeypatch):
    """AMD's builds for Windows lack all of torch.distributed but is_available()."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    config, state = small_state()
    optim.train_step(state, *small_batch(0), config)
    assert state.scheduler.last_epoch == 1


@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_gradients_are_clipped_after_unscaling_and_before_the_step(grad_clip):
    """A loss scale is a power of two, so one of 2^16 must change no bit."""
    results = []
    for dtype in ("float32", "float16"):  # which leave a model in float64 as it is
        config, state = small_state(grad_clip=grad_clip, dtype=dtype)
        numbers = [optim.train_step(state, *small_batch(i), config) for i in range(3)]
        results.append(flat([numbers, weights(state.model)]))
    assert state.scaler.get_scale() == 2.0**16 and difference(*results) is None


@both
@pytest.mark.parametrize("grad_clip, factor", [(0.0, math.inf), (1.0, math.inf), (1.0, math.nan)])
def test_an_overflowing_step_moves_neither_weights_nor_schedule_nor_average(
    optimizer, grad_clip, factor
):
    """float16: one infinite gradient, and only the scale moves, by half. The next one counts."""
    knobs = {"ema_decay": 0.5, "dtype": "float16", "grad_clip": grad_clip}
    config, state = small_state(optimizer=optimizer, **knobs)
    optim.train_step(state, *small_batch(0), config)
    before = now(state)
    overflowing_step(state, 1, config, factor)
    after = now(state)
    assert (before["/scaler/scale"], after["/scaler/scale"]) == (2.0**16, 2.0**15)
    scaler = {key: value for key, value in before.items() if key.startswith("/scaler")}
    assert difference(before, after | scaler) is None
    optim.train_step(state, *small_batch(1), config)
    assert state.scheduler.last_epoch == 2 and difference(before, now(state)).startswith("/model")


class Reads(TorchDispatchMode):
    """Lists what makes a CPU wait for its GPU: reading a number, or how many there are of them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))

    def of(self, step, *args):
        self.seen = []
        with self:
            step(*args)
        return len(self.seen)


@both
@pytest.mark.parametrize("dtype, reads", [("float32", 0), ("bfloat16", 0), ("float16", 1)])
def test_a_step_reads_nothing_off_the_device_but_that_float16_overflowed(dtype, reads, optimizer):
    """Once, and also in a step that is skipped. Reading anything makes the CPU wait for all that
    the GPU has yet to do."""
    knobs = {"grad_clip": 1.0, "ema_decay": 0.9, "optimizer": optimizer}
    config, state = small_state(dtype=dtype, **knobs)
    state.model.float()
    state.ema.float()
    if dtype == "float16":  # its first scale is too large for this model
        state.scaler = torch.amp.GradScaler("cpu", 2.0**8)
    images, targets = (tensor.float() for tensor in small_batch(0))
    counter = Reads()
    for _ in range(3):
        assert counter.of(optim.train_step, state, images, targets, config) == reads
    state.model.head.bias.register_hook(lambda gradient: gradient * math.inf)
    assert counter.of(optim.train_step, state, images, targets, config) == reads
    assert state.scheduler.last_epoch == 4 - reads


def test_the_counter_of_reads_sees_them():
    """Support code is tested too."""
    x = torch.ones(3)
    for read in (x.sum().item, x.nonzero, lambda: bool(x[0]), lambda: x.equal(x + 1)):
        assert Reads().of(read) >= 1
    assert Reads().of(lambda: x + 1) == 0


@pytest.fixture(params=[False, True], ids=["alone", "in a group"])
def group(request):
    """A real process group, of this process only, or none."""
    if request.param:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if request.param:
        dist.destroy_process_group()


@both
def test_what_has_no_gradient_is_passed_over(optimizer, group):
    """The tutorial breaks the model: what the forward pass no longer uses stays as it is, and the
    rest moves by its own gradients, clipped by their own norm."""
    config, state = small_state(grad_clip=0.1, weight_decay=0.25, optimizer=optimizer)
    state.model.blocks[1].mlp.forward = torch.zeros_like
    norms = []

    def look(optimizer, *_):
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        norms.append(sum((gradient**2).sum() for gradient in gradients).sqrt())

    state.optimizer.register_step_pre_hook(look)
    before = weights(state.model)
    _, norm = optim.train_step(state, *small_batch(0), config)
    optim.train_step(state, *small_batch(1), config)
    after = weights(state.model)
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == {n for n in before if n.startswith(("blocks.1.norm2", "blocks.1.mlp"))}
    assert norm > 0.1 == pytest.approx(norms[0].item(), rel=1e-4)


# ---- Learning ----


@pytest.mark.parametrize("seed, labels", [(0, "true"), (1, "random")])
def test_one_batch_can_be_memorised(seed, labels):
    """Plumbing: the step drives the loss of a few pictures below 0.05."""
    config = TrainConfig(lr=0.02, seed=seed, weight_decay=0.0)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=16, depth=1, heads=2, dropout=0.0)
    state = optim.build_state(config, vit_config, 120, CPU)
    images = data.normalize(DATASET.train_images[:8], DATASET.mean, DATASET.std)
    target = DATASET.train_labels[:8]
    if labels == "random":
        target = torch.randint(3, (8,), generator=rng(seed))
    for _ in range(120):
        loss, _ = optim.train_step(state, images, F.one_hot(target, 3).float(), config)
    assert loss < 0.05 and torch.equal(state.model(images).argmax(1), target)


def test_a_model_that_cannot_see_the_image_cannot_memorise_it():
    """Equal pictures: no loss below the entropy of the labels, ln 3 for three of each."""
    config = TrainConfig(lr=0.02)
    vit_config = ViTConfig(8, 4, num_classes=3, dim=16, depth=1, heads=2, dropout=0.0)
    state = optim.build_state(config, vit_config, 60, CPU)
    targets = F.one_hot(torch.arange(9) % 3, 3).float()
    for _ in range(60):
        loss, _ = optim.train_step(state, torch.ones(9, 3, 8, 8), targets, config)
        assert loss > math.log(3) - 1e-5
    assert loss < math.log(3) + 0.01
