"""
The machine a run is on: its device and dtype, whether to compile, how many processes and threads,
how fast it is, and the versions and hardware to which a run's numbers can be traced.
"""

import contextlib
import importlib.util
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": the accelerator that is there, else the CPU.

    ValueError for a device that is not there.
    """
    # Unchecked, a torch built for CUDA would name it on a machine without a GPU, too.
    found = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name) if name != "auto" else found or torch.device("cpu")
    except RuntimeError:
        raise ValueError(f'unknown device "{name}": expected auto, cpu, cuda or mps') from None
    kind = found.type if found else "only cpu"
    if device.type not in ("cpu", kind):
        raise ValueError(f'device "{name}" is not available here; there is {kind}')
    count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f'device "{name}" is not available here; there are {count}')
    if device.type == "cuda":
        refuse_unknown_gpu(device)
    return device


def refuse_unknown_gpu(device: torch.device):
    """ValueError for a GPU that this PyTorch has no code for: its first call would fail.

    Machine code (sm_75 is of capability 7.5) runs on later GPUs of the same major number, code that
    is compiled at the start (compute_75) on all later ones.
    """
    names = [re.match(r"(sm|compute)_(\d+)", name) for name in torch.cuda.get_arch_list()]
    known = [(name[1], int(name[2])) for name in names if name]
    if not known:  # AMD's have other names
        return
    major, minor = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    if not any(
        number <= here and (kind == "compute" or number // 10 == major) for kind, number in known
    ):
        raise ValueError(
            f"this PyTorch has no code for {torch.cuda.get_device_name(device)} (sm_{here}), only "
            f"for {', '.join(torch.cuda.get_arch_list())}: install another build (cu126 for an "
            f"old GPU, the newest for a new one; see pytorch.org), or use --device cpu"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: GPUs before Ampere (of AMD, before the MI100 and the
    RX 7000), and x86 CPUs that lack AVX512_BF16, only emulate it.

    On such a CPU a product takes five times as long as in float32 where it has AVX-512 (measured),
    else 40 to 500 times as long (pytorch/pytorch#146508). ARM's CPUs are not asked, and count as
    without.
    """
    if device.type == "cuda" and torch.version.hip:  # AMD's, whose capability says nothing of it
        name = torch.cuda.get_device_properties(device).gcnArchName
        return re.match(r"gfx(908|90a|9[45]|1[12])", name) is not None
    if device.type == "cuda":  # is_bf16_supported() says yes of a GPU that emulates it
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()  # PyTorch 2.10 has no public way to ask
    return True


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for "auto" bfloat16 on CUDA and float32 elsewhere.

    Where bfloat16 would only be emulated: float16 on CUDA, float32 on a CPU.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and not has_bfloat16(device):
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def can_compile(device: torch.device) -> bool:
    """torch.compile pays on CUDA; its code generator, Triton, needs a GPU of Volta or younger."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def compiler_fault(device: torch.device) -> str | None:
    """What torch.compile says when it fails on a trivial function here, in one line; else None."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, one that fails, no Triton: types of many modules
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def should_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: if it was asked for, or by default (None) where it pays; and if it works.

    ValueError where it was asked for and does not work.
    """
    wanted = can_compile(device) if asked is None else asked
    fault = compiler_fault(device) if wanted else None
    if fault and asked:
        raise ValueError(f"--compile: torch.compile does not work here: {fault}")
    if fault:
        print(f"warning: not compiled, since torch.compile fails: {fault}", file=sys.stderr)
    return wanted and not fault


GRACE = 10  # seconds in which torchrun, once a process has ended, ends the others


@contextlib.contextmanager
def together():
    """Around a call in which the processes of a run wait for each other.

    If one of them has ended, it has said why, and torchrun ends this one as well: OSError only if
    that does not happen.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        time.sleep(GRACE)
        raise OSError(
            f"another process of this run has ended, or is out of reach ({error})"
        ) from None


def join_processes(device: torch.device, world: int) -> torch.device:
    """Join the other processes of a run. Returns the device of this one.

    ValueError for more processes than this machine has GPUs, or a device other than CPU or CUDA.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes want CUDA's GPUs, or --device cpu, not {device.type}")
    if device.type == "cuda":
        here, gpus = os.environ.get("LOCAL_WORLD_SIZE", world), torch.cuda.device_count()
        if int(here) > gpus:
            raise ValueError(f"{here} processes need as many GPUs, and here are {gpus}")
        if "LOCAL_RANK" not in os.environ:  # not every launcher sets it
            raise ValueError("LOCAL_RANK is not set: start several processes with torchrun")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}  # Linux's, macOS's
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world) and loopback:
        # All are on this machine. By the address of its name, as gloo would, they would wait for
        # each other in vain when a laptop changes its network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    wait = timedelta(hours=3)  # while rank 0 downloads, decodes or evaluates
    with together():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return device


def all_see(value, world: int) -> bool:
    """Whether the value, which can be pickled and hashed, is the same in all processes."""
    if world == 1:
        return True
    seen = [None] * world
    with together():
        dist.all_gather_object(seen, value)
    return len({*seen}) == 1


def rank_0_decides(decision: bool, world: int, device: torch.device) -> bool:
    """Rank 0's decision, in all processes: their clocks differ."""
    if world == 1:
        return decision
    decision = torch.tensor(float(decision), device=device)
    with together():
        dist.broadcast(decision, src=0)
    return bool(decision)


def limit_threads():
    """Use no more threads than the cores that a container (docker run --cpus 2) or a job may use.

    PyTorch starts one for every core of the machine, some versions also where SLURM or taskset has
    bound the process to a few (pytorch/pytorch#193859). They wait for each other in each operation,
    so dozens that share the time of two cores are many times slower than two (ollama/ollama#17916).
    OMP_NUM_THREADS, where it is set, is obeyed.
    """
    cores = cpu_quota()
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = min(cores, len(os.sched_getaffinity(0)))
    if cores < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, int(cores)))


def cpu_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """How many cores' time Linux grants to this process; inf where there is no limit.

    A container sees its limit at the root. A service of systemd, as a notebook of JupyterHub, has
    it in its group or in one above.
    """
    group = ""
    with contextlib.suppress(OSError):
        found = re.search("^0::/(.*)", Path(own).read_text(), re.MULTILINE)
        group = found[1] if found else ""
    quotas = [math.inf]
    for folder in (Path(root, group), *Path(root, group).parents):
        for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
            with contextlib.suppress(OSError, ValueError):  # it is not there; it says "max"
                words = " ".join((folder / name).read_text() for name in names).split()
                quota, period = map(float, words)
                if quota > 0:  # -1 is v1's word for no limit
                    quotas.append(quota / period)
    return min(quotas)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the best of a few: the 100 % of the log's MFU."""
    n = 1024
    if device.type != "cpu":
        n = 8192
    elif dtype == torch.float16:  # emulated there
        n = 256
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # item() waits until it is computed
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is short. Torch has a type for that on GPUs only: its words are searched."""
    words = (
        "out of memory|allocate memory|storage size calculation overflow|alloc_failed|"
        "not enough memory|invalid buffer size|out_of_device_memory"
    )
    return isinstance(error, MemoryError) or re.search(words, str(error).lower()) is not None


def versions(device: torch.device) -> dict:
    """What a number has to be traced to: commit, software, hardware."""
    folder = Path(__file__).resolve().parent
    # Named outright: in a container it is often another user's, and git would not look there.
    repository = f"--git-dir={folder / '.git'}"

    def git(*words: str) -> str:
        command = ["git", "-C", folder, repository, *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    # At the top of another repository these files may be untracked: its commit is not theirs.
    # Without one, git is not called: on a Mac without developer tools it would open a window.
    is_own = (folder / ".git").exists() and git("ls-files", "machine.py") == "machine.py"
    describe = ("describe", "--always", "--exclude=*", "--dirty", "--abbrev=12")  # by no tag
    name = f"{device.type} ({platform.machine()})"
    return {
        "commit": git(*describe) if is_own else "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that weights_only=True refuses
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
    }
