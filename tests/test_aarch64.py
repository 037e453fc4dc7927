"""The CPU kernels without torch, as a program: built by a cross compiler and run by qemu for aarch64, and built for
this machine, so that the program itself is tested everywhere. Cases and tolerance are those of all tests."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import Case, Inputs

from linformer_kernels.segments import choose_segments

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/problem.h
PROJECT, ATTEND, ATTEND_BACKWARD, PROJECT_BACKWARD, POOL, POOL_BACKWARD = (1 << i for i in range(6))

CASES = [
    Case(batch=1, heads=2, kv_heads=2, n=70, n_q=33, k=17, d=20, extra=3, sharing="key-value"),
    Case(batch=2, heads=4, kv_heads=2, n=45, n_q=20, k=33, d=7, d_v=13, mask="random", dropout_p=0.3),
    Case(batch=2, heads=2, kv_heads=1, n=64, n_q=64, k=16, d=32, layout="bnhd", sharing="per-head", grad="bnhd"),
    Case(batch=2, heads=3, kv_heads=3, n=31, n_q=6, k=9, d=16, layout="padded", sharing="per-sequence", bias="holes"),
    Case(batch=2, heads=2, kv_heads=2, n=23, n_q=1, k=1, d=1, d_v=2, layout="offset", mask="nothing", grad="scalar"),
    Case(batch=2, heads=2, kv_heads=2, n=40, n_q=40, k=64, d=64, layout="expanded", sharing="per-sequence-head"),
    Case(lengths=(30, 0, 41), lengths_q=(5, 9, 18), heads=4, kv_heads=2, k=13, d=24, bias="normal", bias_shape="11k"),
    Case(batch=1, heads=2, kv_heads=2, n=300, n_q=210, k=130, d=12, scale=-0.7, sharing="same", bias="out"),
    Case(batch=2, heads=4, kv_heads=2, n=50, n_q=18, k=11, d=18, pooled="random", segments_per_head=True),
    Case(lengths=(33, 20), heads=2, kv_heads=2, k=6, d=10, d_v=5, pooled="windows"),
]


@functools.cache
def program(machine: str) -> list[str]:
    """How to run tests/bare, built at its first use and again when a source has changed."""
    compiler, emulator = [], []
    if machine == "aarch64" and platform.machine() != "aarch64":
        cross = shutil.which("aarch64-linux-gnu-g++")
        if cross is None:
            pytest.skip("there is no aarch64-linux-gnu-g++ (Debian, Ubuntu: apt install g++-aarch64-linux-gnu)")
        qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if qemu is None:
            pytest.skip("there is no qemu-aarch64 (Debian, Ubuntu: apt install qemu-user)")
        compiler = [f"-DCMAKE_CXX_COMPILER={cross}", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
        emulator = [qemu, "-cpu", "max"]
    build = ROOT / "build" / f"bare-{machine}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("there is no cmake (pip install cmake)")
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DLINFORMER_BARE=ON", *compiler]
    if shutil.which("ninja", path=path) and not (build / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    for command in (configure, [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return [*emulator, str(build / "bare")]


def execute(machine: str, problem: Path, result: Path, capability: str, cpu: str = "max"):
    command = [cpu if word == "max" else word for word in program(machine)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LINFORMER_")}
    environment |= {"LINFORMER_CPU_CAPABILITY": capability} if capability else {}
    return subprocess.run([*command, str(problem), str(result)], capture_output=True, text=True, env=environment)


class Bare:
    """One run of the program: memory that holds the storages of tensors, apart from each other, and what to do."""

    APART = 64

    def __init__(self):
        self.memory, self.words = bytearray(b"\xff" * self.APART), []
        self.places: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def address(self, tensor: torch.Tensor) -> int:
        bytes_of = memory_of(tensor)
        key = bytes_of.data_ptr() if bytes_of.numel() else -len(self.tensors) - 1
        if key not in self.places:
            self.tensors.append(tensor)  # a storage that is freed would give its address to another
            self.places[key] = len(self.memory)
            self.memory += bytes_of.numpy().tobytes()
            self.memory += b"\xff" * (self.APART + -len(self.memory) % self.APART)
        return self.places[key] + tensor.storage_offset() * tensor.element_size()

    def set(self, **numbers) -> None:
        self.words += [f"{name} {value!r}" for name, value in numbers.items() if value is not None]

    def point(self, result: bool = False, **tensors: torch.Tensor | None) -> None:
        """Addresses alone."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.words.append(f"{name} {self.address(tensor)}")
                self.written += [tensor] if result else []

    def rows(self, result: bool = False, **tensors: torch.Tensor | None) -> None:
        """(B, H, N, D), packed (total, H, D), or the matrices of sequences and heads, (K, N) and more."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            assert tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1
            batch, head, row = 0, 0, tensor.stride(-2)
            if name.startswith(("proj", "grad_proj")):
                head = tensor.stride(-3) if tensor.dim() > 2 and tensor.shape[-3] > 1 else 0
                batch = tensor.stride(0) if tensor.dim() == 4 else 0
            elif tensor.dim() == 4:
                batch, head = tensor.stride(0), tensor.stride(1)
            else:
                head, row = tensor.stride(1), tensor.stride(0)
            self.words.append(f"{name} {self.address(tensor)} {batch} {head} {row}")
            self.written += [tensor] if result else []

    def run(self, machine: str, folder: Path, capability: str, *stages: tuple[int, int]) -> None:
        """Fills the results; nothing else may have changed."""
        self.words += [f"run {stage} {threads}" for stage, threads in stages]
        problem, result = folder / "problem", folder / "result"
        problem.write_bytes(b"memory %d\n" % len(self.memory) + self.memory + "\n".join(["", *self.words]).encode())
        done = execute(machine, problem, result, capability)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == capability
        after = bytearray(result.read_bytes())
        for tensor in self.written:
            bytes_of = memory_of(tensor)
            place = self.address(tensor) - tensor.storage_offset() * tensor.element_size()
            here = slice(place, place + bytes_of.numel())
            if bytes_of.numel():
                bytes_of.copy_(torch.frombuffer(after[here], dtype=torch.uint8))
                after[here] = self.memory[here]
        assert after == self.memory, "memory outside of the results was written"


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def like(tensor: torch.Tensor | None, columns: int | None = None) -> torch.Tensor | None:
    """Of the same shape but for the columns, with nothing written; heads inside where they are."""
    if tensor is None:
        return None
    shape = [*tensor.shape[:-1], tensor.shape[-1] if columns is None else columns]
    if tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] > 1 and tensor.stride(1) < tensor.stride(2):
        shape[1], shape[2] = shape[2], shape[1]
        return torch.empty(shape, dtype=tensor.dtype).transpose(1, 2)
    return torch.empty(shape, dtype=tensor.dtype)


def through(x: Inputs, machine: str, folder: Path, capability: str, threads: int) -> dict[str, torch.Tensor]:
    """What cases.run gives, computed by the program."""
    c, packed = x.case, x.case.lengths is not None
    batch, d_v = (len(c.lengths) if packed else c.batch), x.value.shape[-1]
    f = None if c.pooled else x.proj_key if x.proj_value is None else x.proj_value
    of_k = (batch, c.kv_heads, c.k)
    made = {"out": like(x.query, d_v), "key_proj": torch.empty(*of_k, c.d, dtype=c.dtype)}
    made["value_proj"] = torch.empty(*of_k, d_v, dtype=c.dtype)
    cu = {name: None if t is None else t.long() for name, t in x.cu_seqlens().items()}
    longest = {name: 0 if t is None or not batch else int(t.diff().max()) for name, t in cu.items()}
    rows_q, rows_k = (x.query.shape[0], x.key.shape[0]) if packed else (c.n_q, c.n)
    bias = None if x.key_bias is None else x.key_bias.detach().expand(of_k)
    grad_out = x.grad_out if x.grad_out.stride(-1) == 1 else x.grad_out.contiguous()  # as the functions do

    def start() -> Bare:
        bare = Bare()
        bare.set(
            dtype=DTYPES[c.dtype], batch=batch, heads=c.heads, heads_kv=c.kv_heads, proj_dim=c.k, head_dim=c.d,
            value_dim=d_v, total_q=rows_q, total_k=rows_k, len_q=longest["cu_seqlens_q"] if packed else rows_q,
            len_k=longest["cu_seqlens_k"] if packed else rows_k,
        )  # fmt: skip
        bare.point(**cu)
        return bare

    def set_softmax(bare: Bare) -> None:
        bare.set(scale=c.d**-0.5 if c.scale is None else c.scale, dropout_p=c.dropout_p or None)
        bare.point(rng_state=x.rng_state, key_bias=bias)
        if bias is not None:
            bare.set(key_bias_batch_stride=bias.stride(0), key_bias_head_stride=bias.stride(1))

    grads = {f"grad_{name}": like(getattr(x, name).detach()) for name in ("query", "key", "value")}
    grad_bias = None if bias is None else torch.empty(of_k)
    if c.pooled:
        made["count"] = torch.empty(of_k)
        segments = x.segments.int()
        segments = segments.unsqueeze(1) if not c.segments_per_head else segments
        heads = 0 if segments.shape[1] == 1 else segments.stride(1)
        grad_k, grad_v = like(made["key_proj"]), like(made["value_proj"])

        def set_segments(bare: Bare) -> None:
            strides = (0, segments.stride(0)) if packed else (segments.stride(0), segments.stride(2))
            bare.point(segments=segments)
            bare.set(segments_batch_stride=strides[0], segments_row_stride=strides[1], segments_head_stride=heads)

        bare = start()
        set_segments(bare)
        bare.rows(key=x.key, value=x.value)
        bare.rows(result=True, key_proj=made["key_proj"], value_proj=made["value_proj"])
        bare.point(result=True, count=made["count"])
        bare.run(machine, folder, capability, (POOL, threads))
        bias = made["count"].log()
        bare = start()
        set_softmax(bare)
        bare.rows(query=x.query, key_proj=made["key_proj"], value_proj=made["value_proj"], grad_out=grad_out)
        bare.rows(result=True, out=made["out"], grad_query=grads["grad_query"])
        bare.rows(result=True, grad_key_proj=grad_k, grad_value_proj=grad_v)
        bare.run(machine, folder, capability, (ATTEND, threads), (ATTEND_BACKWARD, threads))
        bare = start()
        set_segments(bare)
        bare.point(count=made["count"])
        bare.rows(grad_key_proj=grad_k, grad_value_proj=grad_v)
        bare.rows(result=True, grad_key=grads["grad_key"], grad_value=grads["grad_value"])
        bare.run(machine, folder, capability, (POOL_BACKWARD, threads))
    else:
        grads["grad_proj_key"] = torch.empty(x.proj_key.shape, dtype=c.dtype)
        grads["grad_proj_value"] = None if x.proj_value is None else torch.empty(f.shape, dtype=c.dtype)
        bare = start()
        set_softmax(bare)
        matrices = x.proj_key.dim() - 3
        bare.set(
            seq_len_max=x.proj_key.shape[-1], per_batch_proj=int(x.proj_key.dim() == 4),
            per_head_proj=int(matrices >= 0 and (matrices == 0 or x.proj_key.shape[1] > 1)),
            shared_kv=int(x.proj_value is None),
        )  # fmt: skip
        if x.mask is not None:
            bare.point(mask=x.mask)
            bare.set(mask_batch_stride=x.mask.stride(0), mask_row_stride=x.mask.stride(1))
        bare.rows(query=x.query, key=x.key, value=x.value, proj_key=x.proj_key, proj_value=f, grad_out=grad_out)
        bare.rows(result=True, **made, **grads)
        bare.point(result=True, grad_key_bias=grad_bias)
        forward, backward = PROJECT | ATTEND, ATTEND_BACKWARD | PROJECT_BACKWARD
        bare.run(machine, folder, capability, (forward, threads), (backward, threads))
        if grad_bias is not None:
            grads["grad_key_bias"] = grad_bias.sum_to_size(x.key_bias.shape)
    for leaf, tensor in x.leaves().items():  # a tensor given twice has the sum
        for name in cases.ARGUMENTS:
            if name != leaf and getattr(x, name) is tensor:
                grads[f"grad_{leaf}"] = grads[f"grad_{leaf}"] + grads.pop(f"grad_{name}")
    return made | {name: grad for name, grad in grads.items() if grad is not None}


BUILDS = [
    ("here", "generic"), ("here", "emulate_neon_bf16"), ("aarch64", "generic"), ("aarch64", "neon"),
    ("aarch64", "neon_bf16"),
]  # fmt: skip


def chosen(machine: str, folder: Path, capability: str = "", cpu: str = "max") -> str:
    """The build that runs there."""
    (folder / "nothing").write_bytes(b"memory 0\n")
    done = execute(machine, folder / "nothing", folder / "result", capability, cpu)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(("machine", "build"), BUILDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
def test_kernels(machine, build, dtype, seed, tmp_path):
    """Forward and backward. Builds for bfloat16 differ from the others in nothing else."""
    if build.endswith("bf16") and dtype != torch.bfloat16:
        chosen_cases = CASES[seed % len(CASES) :][:1]
    else:
        chosen_cases = CASES if build != "generic" else CASES[seed % 3 :: 3]
    if chosen(machine, tmp_path, build) != build:
        pytest.skip(f"this machine does not run {build}")
    for i, case in enumerate(chosen_cases):
        x = Inputs(cases.dataclasses.replace(case, dtype=dtype), "cpu")
        threads = (1, 4)[(seed + i) % 2]
        cases.compare({f"{build}, {threads} threads, {case}": through(x, machine, tmp_path, build, threads)}, x)


@pytest.mark.parametrize("build", ["neon", "neon_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_values_near_the_largest_number(build, dtype, tmp_path):
    """As in test_limits.py. Of overflow BFMMLA makes an infinity, also within a sum."""
    if chosen("aarch64", tmp_path, build) != build:
        pytest.skip(f"this machine does not run {build}")
    for case in cases.ENORMOUS:
        x = cases.enormous(case, dtype, "cpu")
        cases.compare({f"{build}, {case}": through(x, "aarch64", tmp_path, build, 1)}, x)


def test_the_processor_decides(tmp_path):
    """BFMMLA where the processor has it; a build that it does not run is never taken, even by name."""
    if platform.machine() == "aarch64":
        pytest.skip("qemu has several processors, this machine has one")
    assert chosen("aarch64", tmp_path) == "neon_bf16"
    for cpu in ("cortex-a53", "cortex-a72", "neoverse-n1"):
        assert chosen("aarch64", tmp_path, cpu=cpu) == "neon"
        assert chosen("aarch64", tmp_path, "neon_bf16", cpu) == "neon"
    assert chosen("aarch64", tmp_path, "generic") == "generic"
    wrong = chosen("aarch64", tmp_path, "sve")
    assert "LINFORMER_CPU_CAPABILITY is 'sve'" in wrong and '"neon_bf16"' in wrong


@pytest.mark.parametrize("machine", ["here", "aarch64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
def test_segments_are_chosen_to_the_last_bit(machine, dtype, tmp_path):
    """As linformer_kernels.segments has it: which keys have a row for themselves must not hang on the processor."""
    for heads, kv_heads, length, width in itertools.product((4,), (4, 2), (5, 200), (17, 64)):
        query, key = (torch.randn(2, h, length, width, dtype=dtype) for h in (heads, kv_heads))
        mask, segments = torch.rand(2, length) < 0.8, torch.empty(2, kv_heads, length, dtype=torch.int32)
        bare = Bare()
        bare.set(dtype=DTYPES[dtype], batch=2, heads=heads, heads_kv=kv_heads, len_q=length, len_k=length)
        bare.set(proj_dim=24, head_dim=width, mask_batch_stride=length, mask_row_stride=1)
        bare.rows(query=query, key=key)
        bare.point(mask=mask)
        bare.words.append(f"choose 9 1 2 {bare.address(segments)} {kv_heads * length} {length} 1")
        bare.written.append(segments)
        bare.run(machine, tmp_path, "generic")
        assert torch.equal(segments, choose_segments(query, key, mask, None, None, 24, 9, 1, 2))


def inner_loops(name: str, instruction: str, count: int) -> list[list[str]]:
    """Of the functions of that name: the loops with so many of the instruction."""
    program("aarch64")
    objdump = shutil.which("aarch64-linux-gnu-objdump") or "objdump"
    command = [objdump, "-dC", "--no-show-raw-insn", str(ROOT / "build" / "bare-aarch64" / "bare")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for body in re.findall(rf"(?m)^\w+ <[^\n]*{name}<.*?>:\n((?:.+\n)+)", shown):
        lines = [(int(at, 16), text) for at, text in re.findall(r"(?m)^ *(\w+):\t(.*)$", body)]
        for at, text in lines:
            back = re.match(r"b\.\w+\s+(\w+) <", text)
            loop = [other for place, other in lines if back and int(back[1], 16) <= place <= at]
            if sum(other.startswith(f"{instruction}\t") for other in loop) == count:
                found.append(loop)
    return found


@pytest.mark.parametrize(("name", "instruction", "loads"), [
    ("multiply_tile", "fmla", 8), ("multiply_tile_of_quads", "bfmmla", 14),
])  # fmt: skip
def test_inner_loops_stay_in_registers(name, instruction, loads):
    """24 sums of 6 x 16 in registers, as docs/backends.md counts. g++ put three to five of them on the stack where it
    scheduled before it allocated registers."""
    loops = inner_loops(name, instruction, 24)
    assert loops
    for loop in loops:
        assert not [text for text in loop if "[sp" in text]
        assert sum(text.startswith("ld") for text in loop) <= loads, loop
