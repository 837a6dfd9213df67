"""``mlx-maxfactor check``: do the optimizers work on this machine, and how fast?

Each formula runs on the default device and is compared with its float64 twin in NumPy
(``mlx_maxfactor.reference``). Then the optimizers train a small model eagerly, compiled, in bf16
and through a checkpoint, and a step is timed beside those of ``mlx.optimizers``. The report holds
no path, no user name and nothing from the network.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from mlx.optimizers import Optimizer

from .. import functional as f
from .. import reference
from ..checkpoint import load_checkpoint, save_checkpoint
from ..engine.trees import flatten
from ..factory import create_optimizer
from ..optimizers import Muon, OrthoMaxFactor, SignSGD
from ..routing import OPTIMIZERS
from ..routing.plan import table
from .terminal import OneLineParser, integer

STEPS = 20
SEED = 1
WEIGHTS = "RMS of the weights"
RATIOS = ("ratio", "least", "greatest")


class Check(NamedTuple):
    """One measurement and the most that it may be.

    Attributes:
        name: What was measured.
        value: What came out.
        limit: The largest value that passes.
        unit: What the value is a part of.
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the limit."""
        return self.value <= self.limit


def main(argv: Sequence[str]) -> int:
    """Run every check, print a table and write the report."""
    parser = OneLineParser(
        prog="mlx-maxfactor check",
        description="Test the optimizers on this machine, and time a training step.",
        epilog="example: mlx-maxfactor check --output check.json",
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("mlx-maxfactor-check.json"), help="the report (JSON)")
    add("--seconds", type=integer, default=110, help="start no new check after this long (110)")
    arguments = parser.parse_args(argv)
    try:
        output = arguments.output.open("w", encoding="utf-8")
    except OSError as problem:
        parser.error(f"--output: {problem}")
    report = run(arguments.seconds)
    print(f"\n{summary(report)}")
    with output:
        json.dump(report, output, indent=1)
    print(f"report: {arguments.output}: please attach it to an issue of this project")
    return 0 if report["passed"] else 1


def run(seconds: float) -> dict[str, Any]:
    """Run the checks that begin within so many seconds. Prints the report as it grows."""
    start = time.perf_counter()
    report: dict[str, Any] = {**machine(), "checks": [], "not run": [], "times": []}
    print(", ".join(str(report[key]) for key in ("device", "system", "mlx", "mlx_maxfactor")))
    for title, section in SECTIONS.items():
        if time.perf_counter() - start > seconds:
            report["not run"].append(title)
            continue
        print(f"\n{title}", flush=True)
        rows = list(section())
        if section is times:
            report["times"] = rows
            cells = [
                (f"{x['optimizer']}, width {x['width']}", *(f"{x[key]:.2f}" for key in RATIOS))
                for x in rows
            ]
            print(table([("a compiled step over mlx AdamW's", *RATIOS), *cells]))
        else:
            report["checks"] += [{**check._asdict(), "passed": check.passed} for check in rows]
            print(table([("", "value", "limit", "of", ""), *map(_row, rows)]))
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def machine() -> dict[str, Any]:
    """The device and the versions. Nothing here tells one user from another."""
    device = mx.device_info()
    return {
        "device": f"{device.get('device_name', 'unknown')} ({mx.default_device().type.name})",
        "memory_gb": round(int(device.get("memory_size", 0)) / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": f"MLX {version('mlx')}",
        "mlx_maxfactor": f"mlx_maxfactor {version('mlx_maxfactor')}",
    }


def summary(report: dict[str, Any]) -> str:
    """One line: what failed, what was not run."""
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    count = len(report["checks"])
    text = f"{count - len(failed)} of {count} checks passed in {report['seconds']:.0f} s"
    if failed:
        text += f"; failed: {', '.join(failed)}"
    if report["not run"]:
        text += f"; not run for lack of time (--seconds): {', '.join(report['not run'])}"
    return text


def _row(check: Check) -> tuple[str, ...]:
    verdict = "ok" if check.passed else "FAILED"
    return check.name, f"{check.value:.2g}", f"{check.limit:.2g}", check.unit, verdict


# Formulas


def formulas() -> Iterator[Check]:
    """Every rule against its float64 twin, over twenty steps."""
    a, b = _random((64, 256)), _random((256, 64), 2)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    # About 1e-7, or 5e-4 where the device rounds to TF32.
    products = _difference(mx.array(a) @ mx.array(b), exact)
    yield Check("float32 matrix product", products, 2e-3, "largest element")
    # Five steps amplify a rounding of a product by about 12; an H200 was seen to give 29.
    loose = max(1e-5, 60 * products)
    cases = [((24, 96), None), ((96, 24), None), ((48, 96), 16), ((3, 16, 40), None)]
    for method, (shape, block) in product(("newton_schulz", "polar_express"), cases):
        x = _random(shape)
        ours, _ = f.orthogonalize(mx.array(x), cast(Any, method), 5, block)
        exact = reference.orthogonalize_blocks(x.astype(np.float64), method, 5, block)
        name = f"{method}, {shape}, block {block}"
        yield Check(name, _difference(ours, exact), loose, "largest element")
    for bits in (4, 8):
        x = _random((40, 33))
        codes, scale = f.quantize(mx.array(x)[None], cast(f.Bits, bits))
        ours = f.dequantize(codes, scale, (1, *x.shape))[0]
        error = _difference(ours, reference.quantized(x, bits))
        yield Check(f"{bits}-bit momentum", error, 1e-6, "largest element")
    for name, optimizer, twin, shape, layout in _trajectories():
        limit = loose if isinstance(optimizer, (OrthoMaxFactor, Muon)) else 1e-5
        yield Check(name, _distance(optimizer, twin, shape, layout), limit, "largest weight")
    # 64 steps of 2^-12 on 4,096 weights; one rounding moves 2^-8 or 2^-7: 7 standard errors.
    yield Check("stochastic rounding: error of the mean", rounding(), 0.1, "exact mean")


def _trajectories() -> Iterator[tuple[str, Any, Any, tuple[int, ...], str]]:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("OrthoMaxFactor", {"learning_rate": 0.05}),
        ("OrthoMaxFactor", {"momentum": 0.0}),
        ("Muon", {"scale": "rms"}),
        ("MaxFactor", {}),
        ("MaxFactor", {"momentum": 0.9, "cautious": True}),
        ("Adafactor", {}),
        ("SignSGD", {}),
        ("AdamW", {"learning_rate": 1e-2}),
    ]
    kinds = {entry.kind.__name__: entry.kind for entry in OPTIMIZERS.values()}
    for name, options in rows:
        shapes = {"batched": (24, 96), "experts": (3, 16, 40), "conv": (12, 3, 3, 5)}
        ours: dict[str, Any] = {"state_dtype": "float32"}
        if name not in ("OrthoMaxFactor", "Muon"):  # these take matrices alone, and keep few bits
            shapes["vector"], ours = (37,), {}
        for layout, shape in shapes.items():
            title = ", ".join([name, *(f"{key}={x}" for key, x in options.items()), layout])
            optimizer = kinds[name](**options, **ours)
            twin = getattr(reference, name)(**options)
            yield title, optimizer, twin, shape, "batched" if layout == "vector" else layout


def _distance(optimizer: Any, twin: Any, shape: tuple[int, ...], layout: str) -> float:
    """Largest difference over the largest weight, after gradients of very different sizes."""
    start, rng = _random(shape), np.random.default_rng(SEED)
    optimizer.layouts["p"] = layout
    tree, exact = {"p": mx.array(start)}, start.astype(np.float64)
    for _ in range(STEPS):
        g = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 6)).astype(np.float32)
        tree = optimizer.apply_gradients({"p": mx.array(g)}, tree)
        exact = twin.update(exact, g.astype(np.float64), layout)
    return _difference(tree["p"], exact)


# Training


def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
    """Cross-entropy of the same tokens, shifted by one."""
    logits = model(tokens).astype(mx.float32)
    return nn.losses.cross_entropy(logits, (tokens + 1) % 64, reduction="mean")


def training_runs() -> Iterator[Check]:
    """A run ends alike however it is made: compiled, in bf16, from a checkpoint. The loss falls."""
    resumed = 0.0 if mx.default_device() == mx.cpu else 1e-4
    for name in OPTIMIZERS:
        eager, losses, _ = _train(name)
        compiled, _, traces = _train(name, compiled=True)
        # A GPU rounds fused kernels differently, so single codes and signs may differ.
        yield Check(f"{name}: compiled", _rms_difference(compiled, eager), 5e-3, WEIGHTS)
        yield Check(f"{name}: traces", traces, 1, "times")
        yield Check(f"{name}: loss after {STEPS} steps", losses[-1] / losses[0], 0.95, "first loss")
        low = _train(name, dtype=mx.bfloat16)[0]
        yield Check(f"{name}: bf16", _rms_difference(low, eager), 0.1, WEIGHTS)
        again = _train(name, interrupted=True)[0]
        yield Check(f"{name}: resumed", _rms_difference(again, eager), resumed, WEIGHTS)


def _train(
    name: str, compiled: bool = False, dtype: mx.Dtype = mx.float32, interrupted: bool = False
) -> tuple[np.ndarray, list[float], int]:
    """Weights at the end, the losses, and how often the step was traced."""
    mx.random.seed(SEED)
    model, optimizer = _model_and_optimizer(name, dtype)
    losses, traces = [], 0

    def step(tokens: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state]
    run_step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for i in range(STEPS):
        if interrupted and i == STEPS // 2:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "run.safetensors"
                save_checkpoint(path, model, optimizer)
                model, optimizer = _model_and_optimizer(name, dtype)
                load_checkpoint(path, model, optimizer)
        tokens = mx.array(np.random.default_rng(i).integers(64, size=(4, 8)))
        losses.append(cast(float, run_step(tokens).item()))
        mx.eval(model.state, optimizer.state)
    weights = flatten(model.parameters()).values()
    return np.concatenate([_numpy(x).reshape(-1) for x in weights]), losses, traces


def _model_and_optimizer(name: str, dtype: mx.Dtype) -> tuple[nn.Module, Optimizer]:
    """A small model with one layer of each kind that the router tells apart."""
    hidden, head = (nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)), nn.Linear(32, 64, bias=False)
    model = nn.Sequential(nn.Embedding(64, 32), *hidden, nn.RMSNorm(32), head)
    model.set_dtype(dtype)
    return model, create_optimizer(model, cast(Any, name))


def rounding() -> float:
    """The relative error of the mean of small updates to bf16 weights."""
    x = mx.ones((64, 64), mx.bfloat16)
    optimizer = SignSGD(2.0**-12, weight_decay=0.0, rounding="stochastic")
    tree = {"p": x}
    for _ in range(64):
        tree = optimizer.apply_gradients({"p": x}, tree)
    moved = 1 - cast(float, mx.mean(tree["p"].astype(mx.float32)).item())
    return abs(moved * 64 - 1)


# Time


def times() -> Iterator[dict[str, Any]]:
    """Median seconds of a compiled step over mlx's AdamW's, round by round, at two widths."""
    on_cpu = mx.default_device() == mx.cpu
    for width, tokens in ((128, 256), (256, 512)) if on_cpu else ((1024, 2048), (2048, 2048)):
        x = mx.random.normal((tokens, width))
        steps = {name: _timed_step(make, width, x) for name, make in TIMED.items()}
        rounds = [{name: step() for name, step in steps.items()} for _ in range(8)][1:]
        for name in TIMED:
            ratios = sorted(seconds[name] / seconds["mlx AdamW"] for seconds in rounds)
            found = (median(ratios), ratios[0], ratios[-1])
            yield {
                "optimizer": name,
                "width": width,
                **{key: round(x, 3) for key, x in zip(RATIOS, found, strict=True)},
                "milliseconds": round(1e3 * median(seconds[name] for seconds in rounds), 2),
            }


TIMED: dict[str, Callable[[nn.Module], Optimizer]] = {
    "mlx AdamW": lambda _: mlx_optimizers.AdamW(1e-3),
    "mlx Muon": lambda _: mlx_optimizers.Muon(0.02),
    "default": create_optimizer,
    "muon": partial(create_optimizer, hidden="muon"),
}


def _timed_step(
    make: Callable[[nn.Module], Optimizer], width: int, x: mx.array
) -> Callable[[], float]:
    up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    model = nn.Sequential(up, nn.GELU(), down)
    optimizer = make(model)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, lambda x: mx.mean(mx.square(model(x) - x)))(x)
        optimizer.update(model, gradients)
        return loss

    def run_once() -> None:
        mx.eval(step(x), state)
        mx.synchronize()

    return lambda: timeit(run_once, setup=mx.synchronize, number=1)


SECTIONS: dict[str, Callable[[], Iterator[Any]]] = {
    "formulas against float64": formulas,
    "training: against an eager run in float32": training_runs,
    "times": times,
}


# Arrays


def _random(shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def _rms_difference(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def _difference(ours: mx.array, exact: np.ndarray) -> float:
    """Largest difference over the largest exact value. A NaN passes no limit."""
    return float(np.max(np.abs(_numpy(ours) - exact)) / np.max(np.abs(exact)))
