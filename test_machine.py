"""
The specification of machine.py: a run computes where it was told to, in what the device really has,
with the threads it has time for; and its numbers can be traced.

GPUs are pretended. Repositories of git are real.
"""

import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import machine
from checkpoint import save_checkpoint
from testing import ALONE, HERE, flat, pretend, refusal, run

pytestmark = pytest.mark.usefixtures("tiny", "here")

VERSIONS, MEASURE_PEAK = machine.versions, machine.measure_peak  # before `tiny` replaces them
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- The device ----


def test_auto_is_the_accelerator_that_is_there(monkeypatch):
    pretend(monkeypatch, "cuda")
    for name, kind in {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu"}.items():
        assert machine.pick_device(name) == torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert machine.pick_device("cuda") == torch.device("cuda")
    pretend(monkeypatch, None)
    for name in ("auto", "cpu"):
        assert machine.pick_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    "there, name, text",
    [
        ("cuda", "mps", 'device "mps" is not available here; there is cuda'),
        ("cuda", "cuda:2", 'device "cuda:2" is not available here; there are 2'),
        (None, "cuda", 'device "cuda" is not available here; there is only cpu'),
        (None, "mps", 'device "mps" is not available here; there is only cpu'),
        ("cuda", "tpu!", 'unknown device "tpu!": expected auto, cpu, cuda or mps'),
        (None, "gpu", 'unknown device "gpu": expected auto, cpu, cuda or mps'),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_there_is(there, name, text, monkeypatch):
    pretend(monkeypatch, there)
    assert refusal(machine.pick_device, name) == text


def test_a_gpu_that_this_pytorch_has_no_code_for_is_refused(monkeypatch):
    """Kaggle's P100 is a 6.0, wheels begin at 7.5: its first call would end in a traceback."""
    pretend(monkeypatch, "cuda")
    capability = {"cuda": (6, 0), "cuda:0": (6, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_100a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    for name in ("auto", "cuda", "cuda:0"):
        text = refusal(machine.pick_device, name)
        found = "no code for P100 (sm_60), only for sm_75, sm_100a, compute_120: "
        assert text.startswith(f"this PyTorch has {found}")
    assert machine.pick_device("cuda:1") == torch.device("cuda:1")
    assert machine.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "names, capability, runs",
    [
        ("sm_75 sm_80 sm_90", (8, 6), True),  # machine code of the same major number
        ("sm_75 sm_80 sm_90", (12, 0), False),
        ("sm_75 sm_86 sm_90", (8, 0), False),
        ("sm_90 sm_100a sm_120", (10, 3), True),
        ("sm_80 sm_90 compute_90", (12, 0), True),  # compiled at the start
        ("sm_80 compute_90", (7, 5), False),
        ("sm_75 compute_60", (6, 1), True),
        ("gfx90a", (9, 0), True),  # AMD
        ("", (9, 0), True),
    ],
)
def test_code_runs_on_later_gpus_of_its_kind(names, capability, runs, monkeypatch):
    pretend(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "get_arch_list", names.split)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if runs:
        assert machine.pick_device("cuda") == torch.device("cuda")
    else:
        refusal(machine.pick_device, "cuda")


# ---- What it computes in, and whether to compile ----


def test_the_dtype_is_the_fastest_one_that_the_device_really_has(monkeypatch):
    """A T4 (7.5) only emulates bfloat16; its is_bf16_supported() says yes all the same."""
    monkeypatch.setattr(torch.version, "hip", None)  # of PyTorch for AMD
    expected = {(9, 0): torch.bfloat16, (8, 0): torch.bfloat16, (7, 5): torch.float16}
    for capability, dtype in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert machine.pick_dtype("auto", CUDA) == machine.pick_dtype("bfloat16", CUDA) == dtype
        assert machine.pick_dtype("float16", CUDA) == torch.float16
    assert machine.pick_dtype("auto", CPU) == machine.pick_dtype("auto", torch.device("mps"))
    assert machine.pick_dtype("auto", CPU) == machine.pick_dtype("float32", CUDA) == torch.float32
    assert machine.pick_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("gfx908", torch.bfloat16),  # MI100
        ("gfx90a:sramecc+:xnack-", torch.bfloat16),  # MI200
        ("gfx942", torch.bfloat16),
        ("gfx950", torch.bfloat16),  # MI350
        ("gfx1100", torch.bfloat16),  # RX 7900
        ("gfx1201", torch.bfloat16),
        ("gfx906", torch.float16),  # Radeon VII
        ("gfx1030", torch.float16),  # RX 6800
    ],
)
def test_gpus_of_amd_are_known_by_their_names(name, dtype, monkeypatch):
    """What they call a capability, (10, 3) or (9, 0), says nothing of bfloat16."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    facts = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 3))
    assert machine.pick_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize("found, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_not_for_cpus_that_only_emulate_it(found, dtype, monkeypatch):
    """With AVX-512 but without AVX512_BF16, as many Xeons in the cloud are, a product takes five
    times as long, and without AVX-512 40 to 500 times. An accelerator has its own."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found)
    assert machine.pick_dtype("bfloat16", CPU) == dtype
    assert machine.pick_dtype("bfloat16", torch.device("mps")) == torch.bfloat16
    assert machine.pick_dtype("float16", CPU) == torch.float16


def test_compiling_is_the_default_where_triton_can_do_it_and_nowhere_else(monkeypatch):
    """Triton wants a GPU of compute capability 7.0, and does not exist on every system."""
    there = True
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: there or None)
    for capability, expected in {(9, 0): True, (7, 0): True, (6, 1): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert machine.can_compile(CUDA) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not machine.can_compile(CPU)
    there = False
    assert not machine.can_compile(CUDA)


def failing(error):
    """A torch.compile whose function fails when it is called, as the real one does."""

    def compile_(function, **options):
        def call(*args):
            raise error

        return call

    return compile_


def test_what_torch_compile_says_of_a_broken_machine_is_its_first_line(monkeypatch):
    """It says it in 115 lines, when the function is called and not before."""
    for text, line in {"\nNo C++ compiler\n  at x\n" * 9: "No C++ compiler", "": "OSError"}.items():
        monkeypatch.setattr(torch, "compile", failing(OSError(text)))
        assert machine.compiler_fault(CPU) == line
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert machine.compiler_fault(CPU) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("compiler", ["/nonexistent", "./broken", "g++"])
def test_a_machine_without_a_working_compiler_is_found_out(compiler, here):
    """The real torch.compile, in a process of its own; it has a cache, which is not to help."""
    (here / "broken").write_text("#!/bin/sh\nexit 1\n")
    (here / "broken").chmod(0o755)
    code = "import machine, torch; print(machine.compiler_fault(torch.device('cpu')))"
    env = {**ALONE, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [fault] = done.stdout.splitlines()
    assert (fault == "None") == (compiler == "g++") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "asked, pays, works, compiled",
    [
        (None, True, True, True),
        (None, True, False, False),
        (None, False, None, False),  # works is None: it is not tried, for that takes seconds
        (True, True, True, True),
        (True, False, True, True),
        (False, True, None, False),
    ],
)
def test_what_was_asked_for_is_compiled_and_else_what_pays_and_works(
    asked, pays, works, compiled, monkeypatch, capsys
):
    """Not compiling for want of a compiler costs one line."""
    monkeypatch.setattr(machine, "can_compile", lambda device: pays)
    compile_ = lambda function, **_: function  # noqa: E731
    if not works:
        compile_ = failing(AssertionError("tried") if works is None else OSError("no g++\n at"))
    monkeypatch.setattr(torch, "compile", compile_)
    assert machine.should_compile(asked, CUDA if works is None else CPU) == compiled
    lines = capsys.readouterr().err.splitlines()
    assert lines == (
        ["warning: not compiled, since torch.compile fails: no g++"] * (works is False)
    )


def test_compiling_that_was_asked_for_and_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing(OSError("no g++\n at")))
    with pytest.raises(ValueError, match=r"^--compile: .* does not work here: no g\+\+$"):
        machine.should_compile(True, CPU)


# ---- Processes and threads ----


@pytest.mark.parametrize(
    "found, local, typed, used",
    [
        ("lo eth0", "3", "", "lo"),
        ("lo0 en0", "3", "", "lo0"),
        ("lo eth0", "3", "eth0", "eth0"),
        ("lo eth0", "2", "", ""),
        ("lo eth0", "", "", ""),
        ("eth0", "3", "", ""),
    ],
    ids=["Linux", "macOS", "as the user says", "others are elsewhere", "unknown", "no loopback"],
)
def test_processes_of_one_machine_talk_where_a_change_of_its_network_cannot_part_them(
    found, local, typed, used, monkeypatch
):
    """Over the loopback interface. By the address of the machine's name, as gloo chooses, they hung
    when that address was gone, as when a laptop leaves its Wi-Fi."""
    seen, name = [], "GLOO_SOCKET_IFNAME"
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(found.split(), 1)))
    init = lambda *_, **__: seen.append(os.environ.get(name, ""))  # noqa: E731
    monkeypatch.setattr(machine.dist, "init_process_group", init)
    for variable, value in (("LOCAL_WORLD_SIZE", local), (name, typed)):
        monkeypatch.setenv(variable, value)
        if not value:
            monkeypatch.delenv(variable)
    machine.join_processes(CPU, 3)
    assert seen == [used]


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "765000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 7.65),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_time_that_a_container_has_is_read_as_linux_writes_it(files, quota, tmp_path):
    """docs.kernel.org, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc, version 1."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(str(tmp_path)) == quota


@pytest.mark.parametrize(
    "limits, quota",
    [
        ({"user.slice/one.service": 2}, 2.0),
        ({"user.slice": 3, "user.slice/one.service": 8}, 3.0),
        ({"user.slice": 8, "user.slice/one.service": 3}, 3.0),
        ({"user.slice/two.service": 1}, math.inf),
    ],
)
def test_the_time_that_a_service_has_is_the_least_of_its_groups(limits, quota, tmp_path):
    """As systemd's CPUQuota= grants it, which JupyterHub uses. A neighbour's is no matter."""
    for folder, cores in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{cores * 100_000} 100000\n")
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/elsewhere\n0::/user.slice/one.service\n")
    assert machine.cpu_quota(str(tmp_path), str(own)) == quota


def test_the_time_that_a_process_has_is_read_where_linux_keeps_it(monkeypatch):
    read = []

    def read_text(path):
        read.append(str(path))
        raise OSError

    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine.cpu_quota() == math.inf
    names = ("cpu.max", "cpu/cpu.cfs_quota_us")
    assert {"/proc/self/cgroup", *(f"/sys/fs/cgroup/{name}" for name in names)} <= set(read)


@pytest.fixture
def threads(monkeypatch):
    """Counts the threads after a call, of the eight there were before, with that quota, and bound
    to so many cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def after(quota, call, bound=64):
        monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
        cores = {*range(3, 3 + bound)}
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores, raising=False)
        torch.set_num_threads(8)
        call()
        return torch.get_num_threads()

    yield after
    torch.set_num_threads(1)


@pytest.mark.parametrize("quota, expected", [(7.65, 7), (0.5, 1), (8.0, 8), (12.0, 8)])
def test_no_more_threads_than_a_container_has_time_for(quota, expected, threads, monkeypatch):
    """Rounded down: one too many is enough for all to wait. What the user has set is obeyed."""
    assert threads(quota, machine.limit_threads) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads(quota, machine.limit_threads) == 8


def test_no_more_threads_than_the_cores_that_a_job_is_bound_to(threads, monkeypatch):
    """By SLURM, taskset or docker --cpuset-cpus. Other systems than Linux know no such thing."""
    assert threads(math.inf, machine.limit_threads, bound=2) == 2
    assert threads(3.0, machine.limit_threads, bound=5) == 3
    monkeypatch.setattr(machine, "os", SimpleNamespace(environ=os.environ))
    assert threads(math.inf, machine.limit_threads, bound=2) == 8


def test_training_and_evaluating_keep_to_the_threads_of_a_container(threads):
    assert threads(2.0, lambda: run("--max-minutes", 1e-9)) == 2
    assert threads(2.0, lambda: evaluate.main(["out/last.pt"])) == 2


def test_processes_share_a_batch_on_cpus_and_on_cudas_gpus_only(monkeypatch):
    """gloo has no MPS and no XPU: it would end in torch's words, after all the loading."""
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *_, **__: None)
    for kind in ("mps", "xpu"):
        assert f"not {kind}" in refusal(machine.join_processes, torch.device(kind), 2)
    assert machine.join_processes(CPU, 2) == CPU


def test_processes_wait_for_the_first_for_an_hour_at_least(monkeypatch):
    """It downloads and decodes for all, and evaluates alone: by default gloo would wait for 30
    minutes, and NCCL for 10."""
    waits = []
    init = lambda *_, timeout, **__: waits.append(timeout)  # noqa: E731
    monkeypatch.setattr(machine.dist, "init_process_group", init)
    machine.join_processes(CPU, 2)
    assert waits[0].total_seconds() >= 3600


@pytest.mark.parametrize(
    "call, ask",
    [
        ("init_process_group", lambda: machine.join_processes(CPU, 2)),
        ("all_gather_object", lambda: machine.all_see(1, 2)),
        ("broadcast", lambda: machine.rank_0_decides(True, 2, CPU)),
    ],
)
def test_what_is_done_together_fails_in_one_line_when_another_process_has_ended(
    call, ask, monkeypatch
):
    """But not before it had time to say why, and torchrun to end this one. Short memory is ours."""
    errors = [RuntimeError("Connection closed by peer"), RuntimeError("CUDA out of memory")]
    monkeypatch.setattr(machine.dist, call, mock.Mock(side_effect=errors))
    waited = []
    monkeypatch.setattr(machine.time, "sleep", waited.append)
    with pytest.raises(OSError, match="another process .* has ended.*Connection closed by peer"):
        ask()
    assert len(waited) == 1 and waited[0] >= 5
    with pytest.raises(RuntimeError, match="out of memory"):
        ask()
    assert len(waited) == 1


@pytest.mark.parametrize(
    "seen, same", [("aaa", True), ("aba", False), ("aab", False), ("baa", False)]
)
def test_all_processes_see_the_same_only_if_each_of_them_does(seen, same, monkeypatch):
    def gather(found, mine):
        found[:] = seen

    monkeypatch.setattr(machine.dist, "all_gather_object", gather)
    assert machine.all_see("a", 3) is same


@pytest.mark.parametrize("rank_0", [False, True])
def test_all_processes_do_what_the_first_decides(rank_0, monkeypatch):
    """Their clocks differ: one would end the epoch while the others wait for its gradients."""

    def broadcast(tensor, src):
        assert src == 0
        tensor.fill_(rank_0)

    monkeypatch.setattr(machine.dist, "broadcast", broadcast)
    for own in (False, True):
        assert machine.rank_0_decides(own, 2, CPU) is rank_0
        assert machine.rank_0_decides(own, 1, CPU) is own


# ---- Its memory ----


@pytest.mark.parametrize(
    "text, is_so",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("MPS backend out of memory (MPS allocated: 1.00 GB)", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("x: can't allocate memory", True),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", True),
        ("Storage size calculation overflowed with sizes=[9]", True),
        ("Invalid buffer size: 9.00 GB", True),
        ("level_zero backend failed: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("value cannot be converted to type uint8_t without overflow", False),
    ],
)
def test_memory_that_is_short_is_told_from_bugs_by_the_words_of_every_backend(text, is_so):
    """Which may speak of memory or overflow, too."""
    assert machine.is_out_of_memory(RuntimeError(text)) == is_so


def test_pythons_own_memory_is_memory():
    assert machine.is_out_of_memory(MemoryError())


# ---- How fast it is ----


class Slow(TorchDispatchMode):
    """A machine whose matrix products take these seconds in turn, and nothing else takes any. As on
    a GPU, they are waited for where a number is read."""

    def __init__(self, *seconds):
        super().__init__()
        self.now, self.owed, self.products = 0.0, 0.0, []
        self.seconds = itertools.cycle(seconds)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            self.now, self.owed = self.now + self.owed, 0.0
        if func.overloadpacket.__name__ != "mm":
            return func(*args, **(kwargs or {}))
        (n, k), m = args[0].shape, args[1].shape[1]
        self.products.append((2 * n * k * m, args[0].dtype, args[0].device.type))
        self.owed += next(self.seconds)
        return torch.zeros(n, m, dtype=args[0].dtype)

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_peak_is_the_work_of_a_large_product_over_its_time_when_it_was_fastest(
    dtype, device, monkeypatch
):
    """The first one warms up, others are disturbed. 2 n^3 operations, in the dtype of the run and
    on its device; fewer where a CPU only emulates it, and many more on an accelerator (for which
    torch's meta device stands), which does 10^12 in a few milliseconds."""
    slow = Slow(4.0, 3.0, 2.0, 5.0)
    monkeypatch.setattr(machine, "time", slow)
    with slow:
        peak = MEASURE_PEAK(torch.device(device), dtype)
    works, dtypes, devices = map(set, zip(*slow.products))
    assert dtypes == {dtype} and devices == {device} and len(works) == 1
    assert peak == max(works) / 2.0
    if device == "meta":
        assert max(works) > 1e12
    else:
        assert peak < 1e8 if dtype == torch.float16 else peak > 1e9


# ---- Where the numbers come from ----


def git(*words, folder="."):
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    alone = {"PATH": os.environ["PATH"]}  # of a hook's repository, and of what its user likes
    command = ["git", "-C", folder, *names, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit_all(folder):
    """Put what lies there into a new repository. Returns the commit."""
    git("init", folder=folder)
    git("add", ".", folder=folder)
    git("commit", "-m", "a", folder=folder)
    return git("rev-parse", "HEAD", folder=folder)


def commit_in(folder, monkeypatch):
    """What a run would say of itself if the files lay there."""
    monkeypatch.setattr(machine, "__file__", str(Path(folder, "machine.py")))
    return VERSIONS(torch.device("cpu"))["commit"]


def copy_files(folder):
    os.makedirs(folder, exist_ok=True)
    for name in ("machine.py", "vit.py"):
        shutil.copy(HERE / name, folder)


def test_the_facts_are_text_that_a_checkpoint_may_hold(monkeypatch):
    """Commit, software, hardware. weights_only=True refuses torch.__version__ itself."""
    facts = VERSIONS(torch.device("cpu"))
    assert facts["torch"] == str(torch.__version__) and type(facts["torch"]) is str
    assert facts["python"] == sys.version.split()[0] and facts["device"].startswith("cpu (")
    assert re.fullmatch("unknown|[0-9a-f]{12}(-dirty)?", facts["commit"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 of {device}")
    assert VERSIONS(torch.device("cuda:1"))["device"] == "H100 of cuda:1"
    save_checkpoint(facts, "a.pt")
    assert flat(torch.load("a.pt", weights_only=True)) == flat(facts)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")


@needs_git
def test_the_commit_is_that_of_the_files_and_says_whether_they_were_changed(monkeypatch):
    """By its number: a tag may be moved."""
    copy_files("mine")
    head = commit_all("mine")
    git("tag", "-a", "v1", "-m", "a", folder="mine")
    assert commit_in("mine", monkeypatch) == head[:12]
    Path("mine/vit.py").write_text("changed")
    assert commit_in("mine", monkeypatch) == f"{head[:12]}-dirty"


@needs_git
def test_files_of_another_user_have_their_commit_too(monkeypatch):
    """As in a container; git would not read their repository ("dubious ownership")."""
    copy_files("theirs")
    head = commit_all("theirs")
    os.symlink("theirs", "linked")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit_in("theirs", monkeypatch) == commit_in("linked", monkeypatch) == head[:12]


@needs_git
def test_files_that_were_copied_into_another_repository_are_of_no_commit_of_it(monkeypatch):
    """Below its top, kept in it or not; and at its top, where they are not kept in it."""
    os.makedirs("other")
    Path("other/a.txt").write_text("a")
    commit_all("other")
    copy_files("other")
    copy_files("other/below")
    assert commit_in("other", monkeypatch) == commit_in("other/below", monkeypatch) == "unknown"
    git("add", "below", folder="other")
    git("commit", "-m", "b", folder="other")
    assert commit_in("other/below", monkeypatch) == "unknown"


def test_what_git_says_in_another_encoding_is_no_reason_to_stop(monkeypatch):
    """Of a folder called caf\\xe9, say, that belongs to somebody else."""
    Path("git").write_text("#!/bin/sh\nprintf 'dubious ownership in caf\\351' >&2; exit 128\n")
    os.chmod("git", 0o700)
    monkeypatch.setenv("PATH", os.getcwd(), prepend=os.pathsep)
    assert commit_in(HERE, monkeypatch) == "unknown"


def test_without_git_or_a_repository_the_commit_is_unknown(monkeypatch):
    """Without a repository git is not even called: a Mac may have a stub that opens a window."""
    copy_files("alone")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", mock.Mock(side_effect=AssertionError))
        assert commit_in("alone", patch) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit_in(HERE, monkeypatch) == "unknown"
