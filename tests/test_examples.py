"""Each example runs from the command line at a small size; README's snippets run."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import communication
import compare_optimizers
import mlx.core as mx
import numpy as np
import pytest
from command_line import assert_refused, assert_resumes_exactly, run
from compare_optimizers import Record, next_runs
from configurations import CONFIGURATIONS, LADDER, TRAININGS
from speech_data import Clip, write_wav
from training import NAMES, Parser, Probe, make_optimizer
from trajectories import parameter
from variants import VARIANTS, NorMuon

from mlx_maxfactor import MaxFactor, Muon, OrthoMaxFactor

pytestmark = pytest.mark.examples

ROOT = Path(__file__).parent.parent
LANGUAGE_MODEL = ROOT / "examples" / "train_language_model.py"
REASONING = ROOT / "examples" / "train_reasoning.py"
SPEECH = ROOT / "examples" / "train_speech.py"
COMPARE = ROOT / "examples" / "compare_optimizers.py"

SMALL = ("--steps", "12", "--width", "16", "--context", "16", "--batch-size", "2")


def test_profile_option_prints_a_table_and_does_not_change_training(tmp_path):
    ends = []
    for asked in ([], ["--profile"]):
        done = run(LANGUAGE_MODEL, *asked, "--optimizer", "signsgd", *SMALL, cwd=tmp_path)
        curves = json.loads((tmp_path / "runs" / "language_model" / "curves.json").read_text())
        ends.append(curves["runs"][0]["training_loss"])
    assert ends[0] == ends[1]
    lines = done.stdout.splitlines()
    for part in ("forward and backward", "guard", "signsgd", "adamw", "sum", "whole step"):
        assert sum(line.startswith(f"{part} ") and " ms" in line for line in lines) == 1


def test_language_model_example_trains_compares_and_draws(tmp_path):
    names = ["orthomaxfactor", "maxfactor", "adafactor", "signsgd", "muon", "adamw"]
    done = run(LANGUAGE_MODEL, "--compare", ",".join(names), *SMALL, cwd=tmp_path)
    assert done.stdout.index("state bytes") < done.stdout.index("validation")
    folder = tmp_path / "runs" / "language_model"
    curves = json.loads((folder / "curves.json").read_text())
    assert [run["optimizer"] for run in curves["runs"]] == names
    starts = {run["training_loss"][0] for run in curves["runs"]}
    assert len(starts) == len(names), "two runs have the same losses"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert re.search(rf"^{name} writes:\ndef ", done.stdout, re.MULTILINE)
    assert "step/s" in done.stderr


@pytest.mark.compiled
def test_resumed_run_equals_the_uninterrupted_run(tmp_path):
    arguments = (*SMALL, "--dtype", "bfloat16", "--rounding", "stochastic", "--save-every", "5")
    assert_resumes_exactly(LANGUAGE_MODEL, *arguments, cwd=tmp_path)
    other = (*arguments, "--option", "momentum=0.9", "--output", "b", "--resume")
    done = run(LANGUAGE_MODEL, *other, cwd=tmp_path, fails=True)
    assert "momentum is 0.8 in the file, 0.9 here" in done.stderr
    assert "give another --output, or start without --resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_new_run_in_an_old_folder_keeps_other_files_and_resumes_its_own(tmp_path):
    folder = tmp_path / "runs" / "language_model"
    steps = lambda: sorted(int(file.stem[-6:]) for file in folder.glob("*.safetensors"))  # noqa: E731
    run(LANGUAGE_MODEL, *SMALL, "--save-every", "5", cwd=tmp_path)
    shorter = (*SMALL, "--steps", "8", "--save-every", "4")
    run(LANGUAGE_MODEL, *shorter, cwd=tmp_path)
    assert steps() == [4, 8, 10, 12], "the second run deleted files of the first"
    done = run(LANGUAGE_MODEL, *shorter, "--resume", cwd=tmp_path)
    assert "after 8 steps" in done.stdout, done.stderr
    (folder / "orthomaxfactor-000008.safetensors").unlink()
    done = run(LANGUAGE_MODEL, *shorter, "--keep", "1", "--resume", cwd=tmp_path)
    assert "after 4 steps" in done.stdout, done.stderr
    assert steps() == [8, 10, 12], "a resumed run deletes only its own files"


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(tmp_path):
    command = [sys.executable, str(LANGUAGE_MODEL), *SMALL, "--steps", "900000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        printed = ""
        while "loss" not in printed and child.poll() is None:
            printed += child.stderr.read(1)
        child.send_signal(signal.SIGINT)
        last = child.stderr.read().strip().splitlines()[-1]
    assert child.returncode == 130, last
    path, done = re.fullmatch(r"(\S+) has (\d+) steps; continue with: .* --resume", last).groups()
    assert (tmp_path / path).name == f"orthomaxfactor-{int(done):06}.safetensors"
    assert (tmp_path / path).exists()


def test_command_line_options_reach_the_optimizer(tmp_path):
    published = ("--optimizer", "maxfactor", "--option", "cautious=true")
    eight = ("--option", "block=5", "--option", 'state_dtype="int8"')
    for options, size in ((published, 4 * 16 * 16), (eight, 16 * 16 + 4 * 2)):
        options = ("--option", "momentum=0.9", *options)
        done = run(LANGUAGE_MODEL, *options, *SMALL, cwd=tmp_path)
        row = next(line for line in done.stdout.splitlines() if "query" in line)
        assert int(row.split()[-1].replace(",", "")) == size + 4 * (16 + 16)


# Speech


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Recordings of three speakers; each text is the pitch of the tone."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for speaker in ("anna", "ben", "carl"):
        (folder / speaker).mkdir()
        for name, pitch in (("low", 200), ("high", 1500), ("both", 0)):
            t = np.arange(4000) / 16_000
            tone = sum(np.sin(2 * np.pi * f * t) for f in ((pitch,) if pitch else (200, 1500)))
            samples = 0.3 * tone + 0.01 * random.normal(size=t.size)
            write_wav(folder / speaker / f"{name}.wav", Clip(samples, "", ""))
            (folder / speaker / f"{name}.txt").write_text(name)
    return folder


TINY = ("--steps", "8", "--width", "16", "--batch-size", "2", "--eval-every", "4")


def test_speech_example_trains_on_own_recordings_compares_and_draws(recordings, tmp_path):
    convolution = ("--convolution-option", "momentum=0.9")
    arguments = ("--data", str(recordings), *TINY, *convolution)
    done = run(SPEECH, "--compare", "orthomaxfactor,muon,mlx_adafactor", *arguments, cwd=tmp_path)
    row = next(line for line in done.stdout.splitlines() if line.startswith("encoder.conv1.weight"))
    assert "MaxFactor" in row, "a rule gives the first convolution to MaxFactor"
    assert "unexplained" not in done.stdout
    for baseline in ("most frequent", "untrained"):
        assert re.search(rf"^{baseline} .*\d\.\d{{3}}$", done.stdout, re.MULTILINE)
    assert re.search(r"^muon writes:\nsaid +understood\nboth ", done.stdout, re.MULTILINE)
    folder = tmp_path / "runs" / "speech"
    curves = json.loads((folder / "curves.json").read_text())
    assert set(curves["runs"][0]["validation"]) == {"loss", "character error", "word error"}
    assert len({run["training_loss"][0] for run in curves["runs"]}) == 3
    for picture in ("curves.png", "transcripts.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_speech_example_synthesizes_once_and_draws_bands(tmp_path):
    fam = 'momentum={"bands": 3}'
    maxfactor = ("--optimizer", "maxfactor", "--option", fam)
    arguments = ("--clips", "12", *maxfactor, "--convolution-option", fam, *TINY)
    first = run(SPEECH, *arguments, cwd=tmp_path)
    assert "synthesizing speech" in first.stderr
    folder = tmp_path / "runs" / "speech"
    curves = json.loads((folder / "curves.json").read_text())
    (bands,) = [run["bands"] for run in curves["runs"]]
    assert set(bands) == {"encoder.conv1.weight", "encoder.blocks.0.up.weight"}
    for history in bands.values():
        shares, momenta = np.array(history)[-1]
        assert shares.sum() == pytest.approx(1, abs=1e-5)
        damping = np.clip(np.arange(3) / 3 * (1 - 5 * shares), 0, 0.9)
        assert momenta == pytest.approx(0.9 * (1 - damping), abs=1e-5)
    assert (folder / "bands-maxfactor.png").read_bytes().startswith(b"\x89PNG")
    again = run(SPEECH, *arguments, cwd=tmp_path)
    assert "synthesizing speech" not in again.stderr


def test_resuming_with_other_batches_is_refused(recordings, tmp_path):
    run(SPEECH, "--data", str(recordings), *TINY, cwd=tmp_path)
    batches = (*TINY[:4], "--batch-size", "3")
    arguments = ("--data", str(recordings), *batches, "--resume")
    done = run(SPEECH, *arguments, cwd=tmp_path, fails=True)
    assert "other data or other batches" in done.stderr
    assert "Traceback" not in done.stderr


def test_texts_with_dollar_signs_can_be_drawn(recordings, tmp_path):
    copy = tmp_path / "recordings"
    shutil.copytree(recordings, copy)
    for text in copy.rglob("*.txt"):
        text.write_text("$^$ é")
    run(SPEECH, "--data", str(copy), *TINY, cwd=tmp_path)


def test_resumed_speech_run_equals_the_uninterrupted_run(recordings, tmp_path):
    fam = ("--optimizer", "maxfactor", "--option", "momentum={}")
    arguments = ("--data", str(recordings), *TINY, "--save-every", "5", *fam)
    assert_resumes_exactly(SPEECH, *arguments, cwd=tmp_path)


BAD_ARGUMENTS = {
    LANGUAGE_MODEL: [
        (["--optimizer", "sgd"], "'maxfactor'"),
        (["--compare", "muon,sgd"], "muon,sgd"),
        (["--compare", "muon", "--optimizer", "muon"], "not allowed with"),
        (["--steps", "0"], "--steps"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--width", "30", "--heads", "4"], "--width"),
        (["--context", "99999999"], "--context"),
        (["--output", "/dev/null"], "--output"),
        (["--stepz", "3"], "--stepz"),
        (["--option", "momentum=2.0"], "momentum must be in [0, 1), got 2.0"),
        (["--option", "speed=9"], "speed"),
        (["--option", "nesterov=True"], "(true, not True)"),
        (["--option", "momentum=0.8,nesterov=true"], "one --option each"),
    ],
    SPEECH: [
        (["--data", "nowhere"], "nowhere: 0 .wav files"),
        (["--width", "30", "--heads", "4"], "--width"),
        (["--option", 'momentum={"bands": 0}'], "bands must be a whole number of at least 1"),
        (["--option", 'momentum={"variant": "x"}'], "'x'"),
        (["--convolution-option", "speed=9"], "speed"),
        (["--rest-option", "speed=9"], "--rest-option"),
    ],
    REASONING: [
        (["chess"], "chess"),
        (["--batch-size", "7"], "divisible by --segments"),
        (["--width", "9"], "divisible by --heads"),
        (["--puzzle-option", "speed=9"], "speed"),
        (["--optimizer", "hrm", "--option", "speed=9"], "speed"),
        (["--optimizer", "sgd"], "'hrm'"),
    ],
}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(script, *case) for script, cases in BAD_ARGUMENTS.items() for case in cases],
    ids=lambda x: getattr(x, "stem", str(x)),
)
def test_bad_arguments_give_one_line_and_status_2(script, arguments, message, capsys, monkeypatch):
    printed = assert_refused(script, arguments, message, capsys, monkeypatch)
    assert not printed or script != LANGUAGE_MODEL


@pytest.mark.parametrize("name", VARIANTS)
def test_every_momentum_variant_changes_the_update_and_stays_finite(name):
    tree = {"w": mx.zeros((8, 12))}
    optimizer = MaxFactor(momentum=VARIANTS[name](bands=3), cautious=True)
    plain = MaxFactor(momentum=0.9, cautious=True)
    other = tree
    for seed in range(6):
        g = {"w": mx.random.normal((8, 12), key=mx.random.key(seed)) + mx.arange(12) / 4}
        tree, other = optimizer.apply_gradients(g, tree), plain.apply_gradients(g, other)
    assert mx.all(mx.isfinite(tree["w"])).item()
    assert not mx.array_equal(tree["w"], other["w"]).item(), "the variant equals plain momentum"


def test_normuon_updates_all_rows_by_the_same_size():
    # The gradient's rows have many sizes. NorMuon's rows end with one size, Muon's do not.
    g = parameter((16, 12)) * np.logspace(-3, 0, 16, dtype=np.float32)[:, None]
    sizes = []
    for optimizer in (NorMuon(1.0, momentum=0), Muon(1.0, momentum=0, steps=2)):
        tree = before = {"w": mx.zeros((16, 12))}
        for _ in range(50):
            before, tree = tree, optimizer.apply_gradients({"w": mx.array(g)}, tree)
        step = np.array(tree["w"] - before["w"])
        sizes.append(np.sqrt(np.mean(step**2, axis=1)))
    assert sizes[0] == pytest.approx([0.2] * 16, rel=1e-3)
    assert max(sizes[1]) > 3 * min(sizes[1])


# Comparisons


def searched_runs(losses):
    """Every run that the search asks for, if the loss is this function of rate and seed."""
    records = []
    while missing := next_runs("AdamW", "speech", records):
        for rate, seed in missing:
            loss = {"loss": losses(rate, seed)}
            records.append(Record("AdamW", rate, seed, "", "", 1, 10, 5, 0.1, loss))
    return [(record.rate, record.seed) for record in records]


@pytest.mark.parametrize("best", [1e-4, 1.5e-3, 1e-2])
def test_search_ends_with_three_seeds_at_the_best_rate(best):
    runs = searched_runs(lambda rate, seed: abs(np.log(rate / best)) + seed)
    rates = sorted(rate for rate, seed in runs if seed == 1)
    assert len(runs) == len(set(runs)) == len(rates) + 2
    assert len(rates) >= 4
    assert rates[0] < best < rates[-1]
    assert {seed for rate, seed in runs if rate == pytest.approx(best)} == {1, 2, 3}
    assert set(rates) <= set(LADDER)


def test_diverged_run_is_never_the_best_rate():
    runs = searched_runs(lambda rate, seed: None if rate > 1.6e-3 else 1 / rate)
    assert {rate for rate, seed in runs if seed > 1} == {1.5e-3}


def test_search_without_a_best_rate_raises_an_error():
    with pytest.raises(RuntimeError, match="AdamW: no best rate inside"):
        searched_runs(lambda rate, seed: None)
    with pytest.raises(RuntimeError, match="AdamW: no best rate inside"):
        searched_runs(lambda rate, seed: rate)


def test_every_configuration_is_a_different_optimizer():
    # One called "momentum" was once the cautious one, because it kept the factory's default.
    made = set()
    for name, configuration in CONFIGURATIONS.items():
        parser = Parser("", steps=10, batch_size=2, rest_learning_rate=1e-2, eval_every=5)
        for flag in ("--convolution-option", "--convolution-learning-rate"):
            parser.add_argument(flag, action="append")
        searched = [f"{configuration.searched}=0.1"] * bool(configuration.searched)
        given = parser.parse_args([*configuration.arguments, *searched])
        rates = dict.fromkeys(NAMES, 0.1) if searched else {}
        optimizer = make_optimizer(given.optimizer, Probe(), {}, rates, given)
        options = [
            {k: str(v) for k, v in vars(member).items() if k[0] != "_" and k not in NOT_OPTIONS}
            for member in optimizer.optimizers
        ]
        kinds = [type(member) for member in optimizer.optimizers]
        own = given.convolution_option, given.rest_option, float(optimizer.learning_rate)
        made.add(str((kinds, options, own)))
        lead = optimizer.optimizers[0]
        assert ("cautious" in name) <= ("cautious=true" in str(configuration.arguments))
        assert name.startswith(("MaxFactor", "mel axis")) == (type(lead) is MaxFactor)
        assert name.startswith("OrthoMaxFactor") == (type(lead) is OrthoMaxFactor)
        if found := re.search(r"(?:momentum|Muon|beta_1) ([\d.]+)", name):
            kept = lead.beta_1 if "beta_1" in name else lead.momentum
            assert kept == float(found.group(1))
        if found := re.search(r"(\d) bits", name):
            assert lead.state_dtype == f"int{found.group(1)}"
    assert len(made) == len(CONFIGURATIONS)


NOT_OPTIONS = ("layouts", "paths", "optimizers", "seed")


def test_comparison_makes_missing_runs_and_prints_its_table(tmp_path):
    few = ("--run", "--only", "AdamW", "--records", str(tmp_path / "r.jsonl"), "--", *SMALL)
    done = run(COMPARE, "language_model", *few, cwd=tmp_path)
    records = compare_optimizers.read(tmp_path / "r.jsonl")
    assert len(records) >= 6
    best = [r for r in records if r.seed == 2]
    assert f"| {best[0].rate:g} (" in done.stdout
    for picture in ("loss_by_state.png", "loss_by_rate.png"):
        kept = tmp_path / "runs" / "comparison" / picture
        assert kept.read_bytes().startswith(b"\x89PNG")
    again = run(COMPARE, "language_model", "--records", str(tmp_path / "r.jsonl"), cwd=tmp_path)
    rows = [[x for x in run.stdout.splitlines() if x[:1] == "|"] for run in (done, again)]
    assert rows[0] == rows[1]


def test_published_tables_equal_the_report_of_the_records():
    folder = ROOT / "examples" / "records"
    names = compare_optimizers.kept_trainings()
    assert set(names) <= set(TRAININGS)
    records = {name: compare_optimizers.read(folder / f"{name}.jsonl") for name in names}
    assert compare_optimizers.report(records) == (folder / "tables.md").read_text()
    assert compare_optimizers.overview(records) in (ROOT / "examples/records/README.md").read_text()


def test_benchmark_prints_ratios_and_saves_every_round(tmp_path, monkeypatch):
    import benchmark_optimizers as benchmark

    shapes = {"0.5b": benchmark.Shape(32, 48, 4, 2)}
    monkeypatch.setattr(benchmark, "SHAPES", shapes)
    names = ("default", "muon", "mlx Adafactor")
    only = [part for name in names for part in ("--only", name)]
    small = ("--vocabulary", "40", "--rounds", "2", "--tokens", "8", "16")
    monkeypatch.setattr(sys, "argv", ["benchmark", *small, *only, f"--output={tmp_path}"])
    benchmark.main()
    (measured,) = json.loads((tmp_path / "benchmark.json").read_text())["results"].values()
    assert list(measured) == ["mlx AdamW", *names]
    weights = 4 * (40 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32)
    for result in measured.values():
        assert [len(times) for times in result["seconds"].values()] == [2, 2]
        # The peak includes weights and state.
        assert result["peak"] > weights + result["state"]
    assert measured["mlx AdamW"]["state"] == pytest.approx(2 * weights, rel=1e-3)
    rows = benchmark.rows_of(measured)
    assert [row[0] for row in rows[1:-1]] == list(measured)
    assert rows[1][1:] == ["1.00 (1.00 to 1.00)"] * 2 + ["1.000"] * 2
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_orthogonality_table_is_complete(tmp_path):
    script = ROOT / "examples" / "orthogonality.py"
    done = run(script, "--rows", "8", "--columns", "16", cwd=tmp_path)
    errors = np.array([line.split("|")[2:-1] for line in done.stdout.splitlines()[2:]], dtype=float)
    assert errors[:, 0].tolist() == [*range(2, 9)] * 2
    # Eight steps of the Polar Express end at 1; the Newton–Schulz quintic has no fixed point there.
    assert errors[13, 1] < 1e-3 < errors[6, 1]


def test_communication_plan_allocates_nothing():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cost = communication.plan_of(communication.Model(*communication.SHAPES["8 B"]), 2)
    assert cost.largest_state > 1e9
    assert mx.get_peak_memory() - before < 1e6


def test_readme_snippets_run(tmp_path):
    readme = (ROOT / "README.md").read_text()
    first, *others = re.findall(r"```python\n(.*?)```", readme, re.S)
    done = run("-c", first, cwd=tmp_path)
    assert float(done.stdout) < 0.5  # chance level is 3
    assert len(others) == 2
    done = run("-c", "\n".join([first, *others]), cwd=tmp_path)
    assert "layers.1.weight  (256, 64)  hidden" in done.stdout
