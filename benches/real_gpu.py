#!/usr/bin/env python3
"""Runs and checks everything that a graphics processor must show, in under eight minutes, and keeps the results.

    cargo build --release
    python3 benches/real_gpu.py                 # gpu:0, against PyTorch if it is installed and sees a CUDA device
    python3 benches/real_gpu.py --toy           # sizes for a software device, which show only that all of it runs

What is timed runs in turn with PyTorch in one sitting: ours, PyTorch, ours, PyTorch; the ratio is that of the best of each. TF32 is
off, attention takes the flash backend. What is checked: kernels against the textbook (by `supernode bench` itself), ten training
steps against the processor's losses, the same steps again bit for bit, chips on both kinds in one mesh, and that the product of f16
went through cooperative matrices where the card lists them.

First it looks for what it needs (the command, a Vulkan loader and the card's driver for it, the card among the adapters, PyTorch on the
same card) and says what is missing and how to get it. Without --device it takes the first adapter that is no software.

The results go to benches/results/DATE-DEVICE.json and to standard output, each as soon as it is there: what fails, or finds no
time, is named there and the rest still runs. The exit status is 1 if something that was checked is wrong or failed, 2 if all is
right and a ratio is missed, 3 if something that it needs is missing.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds for all of it
PATIENCE = 150  # seconds for one command: what hangs shall not take the time of all
# Where NVIDIA's driver says where its Vulkan part is; the last one is a container's that got the driver from its host.
NVIDIA = [
    "/usr/share/vulkan/icd.d/nvidia_icd.json",
    "/usr/share/vulkan/icd.d/nvidia_icd.x86_64.json",
    "/etc/vulkan/icd.d/nvidia_icd.json",
    "/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json",
]

MATMUL = {"op": "matmul", "layout": "nn", "threads": 1}
ATTENTION = {"op": "attention", "head_dim": 128, "causal": True, "pass": "forward", "dtype": "f16", "threads": 1}
STEP = {"op": "train_step", "dtype": "f32", "threads": 1}

# Name, case, least ratio of PyTorch's time to ours.
FULL = [
    ("matmul f32", MATMUL | {"m": 8192, "k": 8192, "n": 8192, "dtype": "f32"}, 0.85),
    ("matmul f16", MATMUL | {"m": 8192, "k": 8192, "n": 8192, "dtype": "f16"}, 0.40),
    ("attention f16 causal", ATTENTION | {"batch": 4, "heads": 16, "kv_heads": 16, "tokens": 8192}, 0.25),
    ("GPT-2 124M step f32", STEP | {"model": "gpt2-124m", "batch": 8, "tokens": 1024}, 0.40),
]
TOY = [
    ("matmul f32", MATMUL | {"m": 128, "k": 128, "n": 128, "dtype": "f32"}, 0.85),
    ("matmul f16", MATMUL | {"m": 128, "k": 128, "n": 128, "dtype": "f16"}, 0.40),
    ("attention f16 causal", ATTENTION | {"batch": 1, "heads": 2, "kv_heads": 2, "tokens": 64, "head_dim": 32}, 0.25),
    ("step f32", STEP | {"model": "char-6x384", "batch": 1, "tokens": 16}, 0.40),
]


class Failed(Exception):
    """Something that was run ended badly, or did not end in time."""


class Clock:
    """The time that is left."""

    def __init__(self):
        self.end = time.monotonic() + LIMIT

    def left(self):
        left = self.end - time.monotonic()
        if left <= 0:
            raise Failed(f"no time was left of {LIMIT} s")
        return left


def run(clock, command, stdin=None):
    line = " ".join(map(str, command))
    limit = min(clock.left(), PATIENCE)
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except FileNotFoundError as missing:
        raise Failed(f"{missing.filename} is not there; cargo build --release makes it, --binary names another") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{line} was not done after {limit:.0f} s; one command has {PATIENCE} s and all have {LIMIT}") from None
    except OSError as broken:
        raise Failed(f"{line} cannot be started: {broken}") from None
    if done.returncode != 0:
        raise Failed(f"{line} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def lines(text):
    try:
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    except ValueError as broken:
        raise Failed(f"what was printed is no JSON ({broken}): is the command of this version? cargo build --release") from None


def ours(clock, binary, device, case):
    out = run(clock, [binary, "bench", "--json", "--backend", device, "--cases", "-"], json.dumps(case))
    found = lines(out)
    if not found:
        raise Failed(f"{binary} bench printed no result")
    return found[0]


# ------------------------------------------------------------------------------------------------------------------ PyTorch


def best_of(run, budget=1.0):
    import torch

    run()
    torch.cuda.synchronize()
    best, end = float("inf"), time.monotonic() + budget
    while time.monotonic() < end:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def torch_matmul(case):
    import torch

    dtype = {"f32": torch.float32, "f16": torch.float16}[case["dtype"]]
    a = torch.randn(case["m"], case["k"], device="cuda", dtype=dtype)
    b = torch.randn(case["k"], case["n"], device="cuda", dtype=dtype)
    return lambda: a @ b


def torch_attention(case):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (case["batch"], case["heads"], case["tokens"], case["head_dim"])
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(3))

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward


def torch_step(case):
    """GPT-2 as PyTorch's users write it: eager, fused AdamW, tied embeddings."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    size = {"gpt2-124m": (50257, 1024, 768, 12, 12), "char-6x384": (256, 256, 384, 6, 6)}[case["model"]]
    vocabulary, context, width, heads, layers = size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (y.view(b, t, heads, c // heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), nn.LayerNorm(width)

        def forward(self, ids, labels):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.tokens.weight.T
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model = Model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids, labels = torch.randint(vocabulary, (2, case["batch"], case["tokens"]), device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(ids, labels).backward()
        optimizer.step()

    return step


def pytorch(adapter):
    """What PyTorch runs by op, and its version; none and why if it is not here or sees no such card."""
    try:
        import torch
    except ImportError:
        return None, "not installed"
    except OSError as broken:  # A library of its own that does not load.
        return None, f"cannot be loaded: {broken}"
    if not torch.cuda.is_available():
        return None, f"{torch.__version__} sees no CUDA device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if adapter not in names:
        return None, f"{torch.__version__} sees {', '.join(names)}, not {adapter}"
    torch.cuda.set_device(names.index(adapter))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {"matmul": torch_matmul, "attention": torch_attention, "train_step": torch_step}, torch.__version__


def give_back():
    """What PyTorch keeps of the card's memory goes back: the next case of ours needs it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------------- checks


def losses(clock, binary, folder, device, mesh, steps):
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(p.read_text() for p in sorted((ROOT / "src" / "ops").glob("*.rs"))))
    command = [binary, "train", "--text", text, "--preset", "nanogpt-cpu", "--chars", "--json", "--device", device]
    command += ["--steps", str(steps), "--mesh", mesh] if mesh else ["--steps", str(steps)]
    return [x["loss"] for x in lines(run(clock, command)) if "loss" in x]


def far(a, b):
    assert len(a) == len(b) and a, (len(a), len(b))
    return max(abs(x - y) for x, y in zip(a, b))


def checks(clock, binary, folder, device, steps):
    """Pairs of a name and what says whether it is so and how far off it was."""

    def of(device, mesh=None):
        return losses(clock, binary, folder, device, mesh, steps)

    def near(other, mesh=None):
        off = far(of("cpu"), of(other, mesh))
        return off <= 1e-3, off

    def twice():
        first, second = of(device), of(device)
        return first == second, far(first, second)

    return [
        ("losses of the processor within 1e-3", lambda: near(device)),
        ("two runs bit for bit", twice),
        ("a 2x2 mesh of both kinds within 1e-3", lambda: near(f"cpu,{device}", "dp=2,tp=2")),
    ]


def through_matrices(adapter, rounds):
    """A product of f16 on a card that lists 16x16x16 matrices of it runs there, unless the first product came out wrong."""
    listed = any(m.startswith("16x16x16 F16*F16+F32") for m in adapter["matrices"])
    names = {k["kernel"] for r in rounds for k in r.get("kernels", [])}
    if listed and names and "matmul_matrices" not in names:
        raise Failed(f"the card lists matrices of f16, and the product ran by {', '.join(sorted(names))}: their first sums were wrong")


def compared(clock, binary, device, adapter, peer, case, bar):
    """What is kept of a case, and its line."""
    rounds, theirs = [ours(clock, binary, device, case)], []
    if case["op"] == "matmul" and case["dtype"] == "f16":
        through_matrices(adapter, rounds)
    line = {}
    if peer:
        try:
            call = peer[case["op"]](case)
            theirs.append(best_of(call))
            rounds.append(ours(clock, binary, device, case))
            theirs.append(best_of(call))
        except (RuntimeError, ImportError) as failed:  # PyTorch's: ours stands alone, and the ratio is missed.
            theirs = []
            line = {"pytorch_failed": str(failed)[-2000:], "ratio": None, "bar": bar}
        finally:
            call = None
            give_back()
    best = min(rounds, key=lambda r: r["seconds"])
    line |= {"seconds": best["seconds"], "gflops": best["gflops"], "kernels": best.get("kernels", [])}
    text = f"{best['seconds'] * 1e3:.3f} ms, {best['gflops']:.0f} GFLOP/s"
    if theirs:
        ratio = min(theirs) / best["seconds"]
        line |= {"pytorch_seconds": min(theirs), "ratio": ratio, "bar": bar}
        text += f"; PyTorch {min(theirs) * 1e3:.3f} ms, ratio {ratio:.2f} ({'met' if ratio >= bar else 'MISSED'}, bar {bar})"
    elif peer:
        text += f"; PyTorch failed: {line['pytorch_failed']}"
    return line, text


# ----------------------------------------------------------------------------------------------------------- what is needed


def card():
    """The name of an NVIDIA card that the system knows of, whatever Vulkan sees; none without its tool or a card."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return None
    try:
        done = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def name_the_driver():
    """A driver that lies where loaders do not look is named to them, for the commands that follow."""
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    looked_at = [f for f in NVIDIA[:-1] if pathlib.Path(f).exists()]
    if not named and not looked_at and pathlib.Path(NVIDIA[-1]).exists():
        os.environ["VK_DRIVER_FILES"] = NVIDIA[-1]
        print(f"the card's Vulkan driver is at {NVIDIA[-1]}, where no loader looks: VK_DRIVER_FILES names it now")


def missing(message):
    print(f"MISSING  {message}", file=sys.stderr)
    sys.exit(3)


def why_no_card():
    """What keeps an NVIDIA card that the system has from Vulkan."""
    name = card()
    if name is None:
        return "install the driver of the graphics card, with its Vulkan part; with --toy a software adapter will do"
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return f"the system has a {name} and no Vulkan loader: on Debian and Ubuntu install libvulkan1"
    files = [f for f in NVIDIA if pathlib.Path(f).exists()]
    if not files:
        return (
            f"the system has a {name} and its driver brings no {pathlib.Path(NVIDIA[0]).name}: install the driver's graphics part "
            "(libnvidia-gl), or start the container with NVIDIA_DRIVER_CAPABILITIES=all"
        )
    return (
        f"the system has a {name} and {files[0]}, whose library does not load: on Debian and Ubuntu it needs libegl1, libglvnd0 and "
        "libgl1; VK_LOADER_DEBUG=error shows what the loader says"
    )


def adapter_of(clock, binary, wanted, toy):
    """The adapter that is measured."""
    try:
        found = [d for d in lines(run(clock, [binary, "devices", "--json"])) if d["device"].startswith("gpu:")]
    except Failed as why:
        missing(f"{why}")
    for d in found:
        print(f"{d['device']}: {d['name']} ({d['kind']}, {d['driver']})")
    if not found:
        missing(f"`{binary} devices` lists no graphics processor: {why_no_card()}")
    if wanted:
        named = [d for d in found if d["device"] == wanted]
        if not named:
            missing(f"there is no {wanted}: see the adapters above")
    else:
        named = [d for d in found if d["kind"] != "software"] or (found if toy else [])
        if not named:
            missing(f"there is no adapter but software, for which the sizes are too large: {why_no_card()}")
    adapter = named[0]
    if adapter["kind"] == "software" and not toy:
        missing(f"{adapter['device']} is software, for which the sizes are too large: name another, or give --toy")
    if not adapter["timestamps"]:
        print(f"{adapter['device']} has no timestamps: kernels are not timed one by one")
    if not adapter["matrices"]:
        print(f"{adapter['device']} lists no cooperative matrices: products of f16 run without them, and will miss their bar")
    return adapter


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", help="an adapter as `supernode devices` names it; by default the first that is no software")
    arguments.add_argument("--binary", default=ROOT / "target/release/supernode", type=pathlib.Path)
    arguments.add_argument("--toy", action="store_true", help="sizes for a software device")
    arguments.add_argument("--out", type=pathlib.Path, help="where the results go; by default benches/results")
    arguments = arguments.parse_args()
    clock, began = Clock(), time.monotonic()
    name_the_driver()
    binary = arguments.binary.absolute()
    adapter = adapter_of(clock, binary, arguments.device, arguments.toy)
    device = adapter["device"]
    peer, version = pytorch(adapter["name"])
    if not peer:
        print(f"no ratio is measured: PyTorch {version}")
    result = {"date": datetime.date.today().isoformat(), "device": adapter, "pytorch": version, "toy": arguments.toy}
    result |= {"settings": {k: v for k, v in os.environ.items() if k.startswith("SUPERNODE_")}, "cases": [], "checks": []}
    slug = re.sub(r"[^a-z0-9]+", "-", adapter["name"].lower()).strip("-")
    into = arguments.out or ROOT / "benches/results"
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{result['date']}-{slug}{'-toy' if arguments.toy else ''}.json"

    def keep(kind, entry, text):
        result[kind].append(entry)
        result["seconds"] = time.monotonic() - began
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(text, flush=True)

    wrong, missed = False, False
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(clock, binary, pathlib.Path(folder), device, 3 if arguments.toy else 10):
            try:
                passed, seen = check()
                entry, text = {"passed": passed, "seen": seen}, f"{name}: {seen:.3g}"
            except (Failed, AssertionError) as why:
                passed, entry, text = False, {"passed": False, "failed": str(why)}, f"{name}: {why}"
            wrong |= not passed
            keep("checks", {"check": name} | entry, f"{'passed' if passed else 'FAILED'}  {text}")

    for name, case, bar in TOY if arguments.toy else FULL:
        try:
            line, text = compared(clock, binary, device, adapter, peer, case, bar)
            missed |= "ratio" in line and not (line["ratio"] is not None and line["ratio"] >= bar)
        except Failed as why:
            wrong, line, text = True, {"failed": str(why)}, f"FAILED  {why}"
        keep("cases", {"case": name} | line, f"{name}: {text}")

    print(f"{result['seconds']:.0f} s; PyTorch: {version}; written to {path}")
    sys.exit(1 if wrong else 2 if missed else 0)


if __name__ == "__main__":
    main()
