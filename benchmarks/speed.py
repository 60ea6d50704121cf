"""One command, one table: what a training step costs, each row a ratio measured in one run.

    python benchmarks/speed.py                                  the embedded model, a minute or two
    python benchmarks/speed.py size=mid pairs=5                 60 million parameters, 32 x 32 latents: an hour on one core
    python benchmarks/speed.py size=sd15 device=cuda            samples/s, MFU and memory on a GPU, batch 1, 4, 16
    python benchmarks/speed.py trl=<python>                     against TRL 0.23.1; docs/performance.md says how to make that python

Every measurement is a fresh process; the processes of a pair follow each other, so that both sides of a ratio see the same machine.
CPU seconds are the process's own, which other load disturbs less than the clock. A ratio's limit is the one-sided 95 % bound of
the mean log ratio over pairs (Student's t). Results are appended to `out` at once; the table is made of all that is in it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import t as student

HERE = Path(__file__).parent
DEFAULTS = {"size": "tiny", "device": "cpu", "pairs": 3, "batch": 2, "steps": 25, "k": 5, "warmup": 1, "measured": 1}
DEFAULTS |= {"rows": "", "trl": "", "out": "", "guidance": 7.5}

# name: the kind that benchmarks/measure.py runs and its flags; {cache} is a folder of the pair, first filled by a cold row
MEASURED = {
    "naive": "naive",
    "fp32 cold": "ours --cache {cache}/a",
    "fp32 warm": "ours --cache {cache}/a",
    "bf16 cold": "ours --precision bf16-mixed --cache {cache}/b",
    "bf16 warm": "ours --precision bf16-mixed --cache {cache}/b",
    "recomputed": "ours --keep none",
    "kept": "ours --keep all",
    "channels last": "ours --channels_last",
    "compiled": "ours --compile",
    "lightning": "lightning",
    "lora kept": "ours --unet_lora --keep all",
    "lora recomputed": "ours --unet_lora --keep none",
    "trl": "trl",
}
# label, cost of, over cost of: the ratio says how many times cheaper the second is
RATIOS = (
    ("b  naive / fp32 cold", "naive", "fp32 cold"),
    ("b  naive / fp32 warm", "naive", "fp32 warm"),
    ("b  naive / bf16 cold", "naive", "bf16 cold"),
    ("b  naive / bf16 warm", "naive", "bf16 warm"),
    ("c  fp32 cold / warm", "fp32 cold", "fp32 warm"),
    ("c  bf16 cold / warm", "bf16 cold", "bf16 warm"),
    ("d  recomputed / kept", "recomputed", "kept"),
    ("e  fp32 / bf16, cold", "fp32 cold", "bf16 cold"),
    ("e  plain / channels last", "kept", "channels last"),
    ("e  plain / compiled", "kept", "compiled"),
    ("f  Lightning / bare loop", "lightning", "kept"),
    ("a  TRL / UNet LoRA, kept", "trl", "lora kept"),
    ("a  TRL / UNet LoRA, recomputed", "trl", "lora recomputed"),
)
DEFAULT_ROWS = ["naive", "fp32 cold", "fp32 warm", "bf16 cold", "bf16 warm", "recomputed", "kept", "channels last", "lightning"]


def settings(words: list[str]) -> dict:
    """key=value words over the defaults."""
    found = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in DEFAULTS:
            raise SystemExit(f"no setting {word!r}: accepted are {', '.join(f'{name}=' for name in DEFAULTS)}")
        found[key] = type(DEFAULTS[key])(value)
    unknown = set(filter(None, found["rows"].split(","))) - set(MEASURED)
    if unknown:
        raise SystemExit(f"rows={found['rows']}: accepted are {', '.join(MEASURED)}")
    return found


def measure(name: str, cache: str, s: dict) -> dict:
    """One measurement in a process of its own."""
    kind, *flags = MEASURED[name].format(cache=cache).split()
    python, script = (s["trl"], "alignprop.py") if kind == "trl" else (sys.executable, "measure.py")
    shared = ("size", "device", "batch", "steps", "k", "warmup", "measured", "guidance")
    command = [python, str(HERE / script), kind, *flags, *(word for key in shared for word in (f"--{key}", str(s[key])))]
    if s["device"] == "cuda":
        command.append("--flops")
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{name}: {' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Geometric mean of over / under, and its one-sided 95 % limits; infinite limits for one pair."""
    logs = [math.log(a / b) for a, b in zip(over, under, strict=True)]
    mean = sum(logs) / len(logs)
    if len(logs) == 1:
        return math.exp(mean), 0.0, math.inf
    spread = math.sqrt(sum((value - mean) ** 2 for value in logs) / (len(logs) - 1) / len(logs))
    reach = float(student.ppf(0.95, len(logs) - 1)) * spread
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def table(found: dict[str, list[dict]]) -> str:
    """Measurements and ratios in markdown."""
    lines = ["| step | CPU s | wall s | UNet calls (with gradient) | peak GB | n |", "|---|---|---|---|---|---|"]
    for name, some in found.items():
        mean = {key: sum(one[key] for one in some) / len(some) for key in ("cpu", "wall", "unet", "unet_gradient", "peak")}
        calls = f"{mean['unet']:.3g} ({mean['unet_gradient']:.3g})"
        lines.append(f"| {name} | {mean['cpu']:.3g} | {mean['wall']:.3g} | {calls} | {mean['peak'] / 1e9:.2f} | {len(some)} |")
    lines += ["", "| ratio | CPU time | 95 % limits | pairs |", "|---|---|---|---|"]
    for label, over, under in RATIOS:
        if over in found and under in found:
            pairs = min(len(found[over]), len(found[under]))
            mean, low, high = ratio(*([one["cpu"] for one in found[name][:pairs]] for name in (over, under)))
            lines.append(f"| {label} | {mean:.2f} | {low:.2f} to {high:.2f} | {pairs} |")
    sweep = [name for name in ("fp32 cold", "fp32 warm") if name in found]
    if len(sweep) == 2:
        cold, warm = (sum(one["cpu"] for one in found[name]) / len(found[name]) for name in sweep)
        lines.append(f"| g  4 runs of one epoch that share a prefix / 4 that do not | {(cold + 3 * warm) / (4 * cold):.2f} | | |")
    return "\n".join(lines)


def machine(s: dict) -> str:
    """Processor, its bf16 flags, threads, load and date."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        cpu = next((line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")), cpu)
        flags = " ".join(flag for flag in ("avx512_bf16", "amx_bf16", "amx_tile") if flag in text) or "none"
    device = torch.cuda.get_device_name() if s["device"] == "cuda" else f"{cpu} (bf16: {flags}), {torch.get_num_threads()} threads"
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{device}; load {load}; torch {torch.__version__}; {time.strftime('%Y-%m-%d %H:%M')} UTC"


def matmul_peak() -> float:
    """FLOP/s of a large bf16 matrix product, the best of ten."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = math.inf
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.monotonic()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return 2 * 8192**3 / best


def on_gpu(s: dict) -> str:
    """Samples/s, MFU and peak memory for batch 1, 4, 16: text stage warm, UNet LoRA."""
    if not torch.cuda.is_available():
        raise SystemExit("device=cuda: this machine has no CUDA device")
    peak, lines = (
        matmul_peak(),
        ["| stage | batch | samples/s | MFU | peak GB | GPU-hours for 2.56M samples |", "|---|---|---|---|---|---|"],
    )
    for batch in (1, 4, 16):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("naive", "bf16 cold", "bf16 warm", "lora recomputed"):
                one = measure(name, cache, {**s, "batch": batch, "warmup": 0 if "cold" in name else 3})
                rate = batch / one["wall"]
                use = one["flops"] / one["wall"] / peak
                row = (name, batch, f"{rate:.3g}", f"{use:.2f}", f"{one['peak'] / 1e9:.1f}", f"{2.56e6 / rate / 3600:.0f}")
                lines.append("| " + " | ".join(map(str, row)) + " |")
                print(lines[-1], flush=True)
    return "\n".join([f"measured matmul peak {peak / 1e12:.0f} TFLOP/s", "", *lines])


def main() -> None:
    s = settings(sys.argv[1:])
    print(machine(s), " ".join(sys.argv[1:]), sep="\n", flush=True)
    if s["device"] == "cuda":
        print(on_gpu(s))
        return
    rows = s["rows"].split(",") if s["rows"] else DEFAULT_ROWS + (["lora kept", "lora recomputed", "trl"] if s["trl"] else [])
    out = Path(s["out"] or tempfile.mkstemp(suffix=".jsonl")[1])
    for pair in range(s["pairs"]):
        with tempfile.TemporaryDirectory() as cache:
            for name in rows:
                one = measure(name, cache, s)
                with out.open("a") as file:
                    file.write(json.dumps({"row": name, **one}) + "\n")
                print(f"pair {pair + 1}/{s['pairs']}: {name}: {one['cpu']:.3g} CPU s", flush=True)
    found: dict[str, list[dict]] = {}
    for line in out.read_text().splitlines():
        one = json.loads(line)
        found.setdefault(one.pop("row"), []).append(one)
    print(f"\n{machine(s)}\n\n{table(found)}")


if __name__ == "__main__":
    main()
