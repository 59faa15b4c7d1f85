#!/usr/bin/env python3
"""Runs and checks everything that a graphics processor must show, in under eight minutes, and keeps the results.

    cargo build --release
    python3 benches/real_gpu.py                 # gpu:0, against PyTorch if it is installed and sees a CUDA device
    python3 benches/real_gpu.py --toy           # sizes for a software device, which show only that all of it runs

What is timed runs in turn with PyTorch in one sitting: ours, PyTorch, ours, PyTorch; the ratio is that of the best of each. TF32 is
off, attention takes the flash backend. What is checked: kernels against the textbook (by `supernode bench` itself), ten training
steps against the processor's losses, the same steps again bit for bit, chips on both kinds in one mesh.

The results go to benches/results/DATE-DEVICE.json and to standard output, each as soon as it is there: what fails, or finds no
time, is named there and the rest still runs. The exit status is 1 if something that was checked is wrong or failed, 2 if all is
right and a ratio is missed.
"""

import argparse
import datetime
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds for all of it

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
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=clock.left(), cwd=ROOT)
    except FileNotFoundError as missing:
        raise Failed(f"{missing.filename} is not there; cargo build --release makes it, --binary names another") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{line} was not done when the {LIMIT} s of all were over") from None
    if done.returncode != 0:
        raise Failed(f"{line} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def ours(clock, binary, device, case):
    out = run(clock, [binary, "bench", "--json", "--backend", device, "--cases", "-"], json.dumps(case))
    return lines(out)[0]


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


def pytorch():
    """None if PyTorch is not here or sees no CUDA device, and why."""
    try:
        import torch
    except ImportError:
        return None, "PyTorch is not installed"
    if not torch.cuda.is_available():
        return None, "PyTorch sees no CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {"matmul": torch_matmul, "attention": torch_attention, "train_step": torch_step}, torch.__version__


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


def compared(clock, binary, device, peer, case, bar):
    """What is kept of a case, and its line."""
    rounds, theirs = [ours(clock, binary, device, case)], []
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


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="gpu:0")
    arguments.add_argument("--binary", default=ROOT / "target/release/supernode", type=pathlib.Path)
    arguments.add_argument("--toy", action="store_true", help="sizes for a software device")
    arguments.add_argument("--out", type=pathlib.Path, help="where the results go; by default benches/results")
    arguments = arguments.parse_args()
    clock, began = Clock(), time.monotonic()
    binary, device = arguments.binary, arguments.device
    try:
        found = [d for d in lines(run(clock, [binary, "devices", "--json"])) if d.get("device") == device]
    except Failed as why:
        sys.exit(str(why))
    if not found:
        sys.exit(f"there is no {device}: see `{binary} devices`")
    peer, version = pytorch()
    result = {"date": datetime.date.today().isoformat(), "device": found[0], "pytorch": version, "toy": arguments.toy}
    result |= {"cases": [], "checks": []}
    slug = re.sub(r"[^a-z0-9]+", "-", found[0]["name"].lower()).strip("-")
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
            line, text = compared(clock, binary, device, peer, case, bar)
            missed |= "ratio" in line and not (line["ratio"] is not None and line["ratio"] >= bar)
        except Failed as why:
            wrong, line, text = True, {"failed": str(why)}, f"FAILED  {why}"
        keep("cases", {"case": name} | line, f"{name}: {text}")

    print(f"{result['seconds']:.0f} s; PyTorch: {version}; written to {path}")
    sys.exit(1 if wrong else 2 if missed else 0)


if __name__ == "__main__":
    main()
