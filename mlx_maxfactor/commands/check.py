"""``mlx-maxfactor check``: do the optimizers work on this machine, and how fast?

Each formula runs on the default device and is compared with its float64 twin in NumPy
(``mlx_maxfactor.reference``). Then the optimizers run compiled and eagerly, in bf16, and through a
checkpoint; the peak memory of a training step is compared with what the library promises; and a
training step is timed beside those of ``mlx.optimizers``. The report holds no path, no user name
and nothing from the network.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from mlx.optimizers import Optimizer

from .. import functional as f
from .. import optimizers, reference
from .._version import __version__
from ..checkpoint import load_checkpoint, save_checkpoint
from ..factory import create_optimizer
from ..optimizers import Muon, OrthoMaxFactor, SignSGD
from ..routing import OPTIMIZERS
from ..trees import flatten
from .terminal import OneLineParser, integer, table

STEPS = 20
SEED = 1


@dataclass(frozen=True)
class Check:
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
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: {arguments.output.parent} is not a folder")
    if arguments.output.is_dir():
        parser.error(f"--output: {arguments.output} is a folder: name a file in it")
    report = run(arguments.seconds)
    print(f"\n{summary(report)}")
    try:
        arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    except OSError as problem:
        parser.error(f"the report was not written: {problem}")
    print(f"report: {arguments.output}")
    return 0 if report["passed"] else 1


def run(seconds: float) -> dict[str, Any]:
    """Run the checks for about so many seconds. Returns the report, and prints it as it grows."""
    start = time.perf_counter()
    report: dict[str, Any] = {**machine(), "checks": [], "not run": [], "times": []}
    print(", ".join(str(report[key]) for key in ("device", "system", "mlx", "mlx_maxfactor")))
    for title, section in SECTIONS.items():
        if time.perf_counter() - start > seconds:
            report["not run"].append(title)
            continue
        print(f"\n{title}", flush=True)
        checks = []
        for check in section():
            checks.append(check)
            if time.perf_counter() - start > seconds:
                report["not run"].append(f"{title}: what follows {check.name}")
                break
        report["checks"] += [{**asdict(check), "passed": check.passed} for check in checks]
        print(table([("", "value", "limit", "of", ""), *map(_row, checks)]), flush=True)
    print("\ntime of a compiled training step", flush=True)
    if time.perf_counter() - start < seconds:
        report["times"] = list(training_times())
        print(table([("", "ratio", "least", "greatest"), *map(_time_row, report["times"])]))
    else:
        report["not run"].append("times")
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
        "mlx_maxfactor": f"mlx_maxfactor {__version__}",
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


def _time_row(times: dict[str, Any]) -> tuple[str, ...]:
    name = f"{times['optimizer']}, width {times['width']}"
    return (name, *(f"{times[key]:.2f}" for key in ("ratio", "least", "greatest")))


# Formulas


def formulas() -> Iterator[Check]:
    """Every rule against its float64 twin, over twenty steps."""
    products = product_error()
    yield Check("float32 matrix product", products, 2e-3, "largest element")
    for name, difference in orthogonalization_errors():
        yield Check(name, difference, _limit(products), "largest element")
    for bits in (4, 8):
        x = _random((40, 33))
        codes, scale = f.quantize(mx.array(x)[None], cast(f.Bits, bits))
        exact = reference.quantized(x, bits)
        yield Check(
            f"{bits}-bit momentum",
            _difference(f.dequantize(codes, scale, (1, *x.shape))[0], exact),
            1e-6,
            "largest element",
        )
    for name, optimizer, twin, shape, layout in _trajectories():
        limit = _limit(products) if isinstance(optimizer, (OrthoMaxFactor, Muon)) else 1e-5
        yield Check(name, _distance(optimizer, twin, shape, layout), limit, "largest weight")


def product_error() -> float:
    """Of a float32 matrix product: about 1e-7, or 5e-4 where the device rounds to TF32."""
    a, b = _random((64, 256)), _random((256, 64), 2)
    return _difference(mx.array(a) @ mx.array(b), a.astype(np.float64) @ b.astype(np.float64))


def _limit(products: float) -> float:
    # Five steps amplify a rounding of a product by about 12; an H200 was seen to give 29.
    return max(1e-5, 60 * products)


def orthogonalization_errors() -> Iterator[tuple[str, float]]:
    """Both methods, whole, tall and in blocks."""
    for method in ("newton_schulz", "polar_express"):
        for shape, block in (
            ((24, 96), None),
            ((96, 24), None),
            ((48, 96), 16),
            ((3, 16, 40), None),
        ):
            x = _random(shape)
            ours = f.orthogonalize(mx.array(x), cast(Any, method), 5, block)
            exact = reference.orthogonalize_blocks(x.astype(np.float64), method, 5, block)
            yield f"{method}, {shape}, block {block}", _difference(ours, exact)


def _trajectories() -> Iterator[tuple[str, Any, Any, tuple[int, ...], str]]:
    kept: dict[str, Any] = {"state_dtype": "float32"}
    cautious: dict[str, Any] = {"momentum": 0.9, "cautious": True}
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("OrthoMaxFactor", {"learning_rate": 0.05}, kept),
        ("OrthoMaxFactor", {"momentum": 0.0}, {}),
        ("Muon", {"scale": "rms"}, kept),
        ("MaxFactor", {}, {}),
        ("MaxFactor", cautious, {}),
        ("Adafactor", {}, {}),
        ("SignSGD", {}, {}),
        ("AdamW", {"learning_rate": 1e-2}, {}),
    ]
    for name, options, ours in rows:
        shapes = {"batched": (24, 96), "experts": (3, 16, 40), "conv": (12, 3, 3, 5)}
        if name not in ("OrthoMaxFactor", "Muon"):  # these take matrices alone
            shapes["vector"] = (37,)
        for layout, shape in shapes.items():
            title = ", ".join([name, *(f"{key}={x}" for key, x in options.items()), layout])
            optimizer = getattr(optimizers, name)(**options, **ours)
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


# Compiled steps, dtypes, memory


class SmallModel(nn.Module):
    """One layer of each kind that the router tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layers = [nn.Linear(32, 64), nn.Linear(64, 32)]
        self.norm = nn.RMSNorm(32)
        self.head = nn.Linear(32, 64, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits: ``(batch, length)`` to ``(batch, length, 64)``."""
        x = self.embedding(tokens)
        x = x + self.layers[1](nn.silu(self.layers[0](x)))
        return self.head(self.norm(x))


def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
    """Cross-entropy of the same tokens, shifted by one."""
    logits = model(tokens).astype(mx.float32)
    return nn.losses.cross_entropy(logits, (tokens + 1) % 64, reduction="mean")


def compiled_steps() -> Iterator[Check]:
    """Compiled and eager training steps end alike, the function is traced once, the loss falls."""
    for name in OPTIMIZERS:
        eager, losses, _ = _train(name, compiled=False)
        compiled, _, traces = _train(name, compiled=True)
        # A GPU rounds fused kernels differently, so single codes and signs may differ.
        yield Check(
            f"{name}: compiled against eager",
            _rms_difference(compiled, eager),
            5e-3,
            "RMS of the weights",
        )
        yield Check(f"{name}: traces", traces, 1, "times")
        yield Check(f"{name}: loss after {STEPS} steps", losses[-1] / losses[0], 0.95, "first loss")


def _train(
    name: str, compiled: bool, dtype: mx.Dtype = mx.float32, **options: Any
) -> tuple[np.ndarray, list[float], int]:
    mx.random.seed(SEED)
    model = SmallModel()
    model.set_dtype(dtype)
    optimizer = create_optimizer(model, cast(Any, name), **options)
    state, traces = [model.state, optimizer.state], 0

    def step(tokens: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return loss

    run_step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for i in range(STEPS):
        losses.append(cast(float, run_step(_tokens(i)).item()))
        mx.eval(state)
    return _weights(model), losses, traces


def low_precision() -> Iterator[Check]:
    """bf16 weights stay bf16, and follow float32; small updates count on average."""
    for name in OPTIMIZERS:
        exact = _train(name, compiled=False)[0]
        low = _train(name, compiled=False, dtype=mx.bfloat16)[0]
        yield Check(
            f"{name}: bf16 against float32", _rms_difference(low, exact), 0.1, "RMS of the weights"
        )
    x = mx.ones((64, 64), mx.bfloat16)
    optimizer = SignSGD(2.0**-12, weight_decay=0.0, rounding="stochastic")
    tree = {"p": x}
    for _ in range(64):
        tree = optimizer.apply_gradients({"p": x}, tree)
    moved = 1 - cast(float, mx.mean(tree["p"].astype(mx.float32)).item())
    # 64 steps of 2^-12 on 4,096 weights; one rounding moves 2^-8 or 2^-7: 7 standard errors.
    yield Check("stochastic rounding: error of the mean", abs(moved * 64 - 1), 0.1, "exact mean")


def resumed_runs() -> Iterator[Check]:
    """A run that goes on from a checkpoint, against one that was not interrupted."""
    limit = 0.0 if mx.default_device() == mx.cpu else 1e-4
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            path = Path(folder) / f"{name}.safetensors"
            whole = _resumed(name, path, interrupted=False)
            yield Check(
                f"{name}: resumed",
                _difference(_resumed(name, path, interrupted=True), whole),
                limit,
                "largest weight",
            )


def _resumed(name: str, path: Path, interrupted: bool) -> np.ndarray:
    mx.random.seed(SEED)
    model = SmallModel()
    optimizer = create_optimizer(model, cast(Any, name))
    for i in range(6):
        if i == 3 and interrupted:
            save_checkpoint(path, model, optimizer)
            model = SmallModel()
            optimizer = create_optimizer(model, cast(Any, name))
            load_checkpoint(path, model, optimizer)
        _, gradients = nn.value_and_grad(model, loss_of)(model, _tokens(i))
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return _weights(model)


def memory() -> Iterator[Check]:
    """A step needs less memory than mlx's AdamW, on top of weights and state."""
    theirs = _peak_of_step(lambda _: mlx_optimizers.AdamW(1e-3))
    for name in OPTIMIZERS:
        ours = _peak_of_step(partial(create_optimizer, hidden=cast(Any, name)))
        yield Check(f"{name}: memory of a step", ours / theirs, 1.0, "mlx AdamW's")


def _peak_of_step(make: Callable[[nn.Module], Optimizer]) -> int:
    """Bytes beyond what is held before an eager step."""
    width, layers = 512, 24
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = make(model)
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, lambda x: mx.mean(mx.square(model(x))))
    x, peak = mx.ones((8, width)), 0
    for _ in range(2):  # the first step may make what is kept
        mx.eval(model.state, optimizer.state, x)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(1)  # MLX then waits for memory instead of running ahead
        optimizer.update(model, loss_and_gradients(x)[1])
        mx.eval(model.state, optimizer.state)
        mx.set_memory_limit(limit)
        peak = mx.get_peak_memory() - held
    return peak


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "formulas against float64": formulas,
    "bf16": low_precision,
    "checkpoints": resumed_runs,
    "memory": memory,
    "compiled steps": compiled_steps,
}


# Time


def training_times() -> Iterator[dict[str, Any]]:
    """Median seconds of a compiled step over mlx's AdamW's, round by round, at two widths."""
    on_cpu = mx.default_device() == mx.cpu
    for width, tokens in ((128, 256), (256, 512)) if on_cpu else ((1024, 2048), (2048, 2048)):
        x = mx.random.normal((tokens, width))
        steps = {name: _timed_step(make, width, x) for name, make in TIMED.items()}
        rounds = [{name: step() for name, step in steps.items()} for _ in range(8)][1:]
        for name in TIMED:
            ratios = [seconds[name] / seconds["mlx AdamW"] for seconds in rounds]
            yield {
                "optimizer": name,
                "width": width,
                "tokens": tokens,
                "ratio": round(median(ratios), 3),
                "least": round(min(ratios), 3),
                "greatest": round(max(ratios), 3),
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

    def timed() -> float:
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(step(x), state)
        mx.synchronize()
        return time.perf_counter() - start

    return timed


# Arrays


def _random(shape: tuple[int, ...], seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _tokens(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(64, size=(4, 8)))


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def _weights(model: nn.Module) -> np.ndarray:
    arrays = flatten(model.parameters()).values()
    return np.concatenate([_numpy(x).reshape(-1) for x in arrays])


def _rms_difference(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def _difference(ours: Any, exact: np.ndarray) -> float:
    """Largest difference over the largest exact value. A NaN passes no limit."""
    ours = _numpy(ours) if isinstance(ours, mx.array) else ours
    return float(np.max(np.abs(ours - exact)) / np.max(np.abs(exact)))
