"""The command ``mlx-maxfactor check``: it passes here, and it finds defects in the formulas."""

import json

import mlx.core as mx
import pytest

from mlx_maxfactor import SignSGD
from mlx_maxfactor import functional as f
from mlx_maxfactor.commands import check, main


def test_every_check_passes_and_the_report_holds_no_path(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["check", "--output", str(path), "--seconds", "600"]) == 0
    text = path.read_text()
    report = json.loads(text)
    assert report["passed"]
    assert report["not run"] == []
    assert {times["optimizer"] for times in report["times"]} == set(check.TIMED)
    assert "/" not in text.replace("times", "")
    assert (
        f"{len(report['checks'])} of {len(report['checks'])} checks passed"
        in capsys.readouterr().out
    )


def test_checks_that_find_no_time_are_named_and_fail_nothing(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["check", "--output", str(path), "--seconds", "1"]) in (0, 1)
    report = json.loads(path.read_text())
    assert "times" in report["not run"]
    assert "not run for lack of time" in capsys.readouterr().out


def newton_schulz_with_a_wrong_coefficient(monkeypatch):
    from mlx_maxfactor.functional import orthogonalization

    monkeypatch.setattr(orthogonalization, "NEWTON_SCHULZ", (3.4445, -4.6750, 2.0315))


def statistics_of_the_wrong_axis(monkeypatch):
    right = f.factored_second_moment

    def wrong(g, row, column, b, *others):
        row, column = right(g, row, column, b, *others)
        return mx.mean(row, axis=-2, keepdims=True) + 0 * row, column

    monkeypatch.setattr(f, "factored_second_moment", wrong)


def a_weight_of_statistics_that_lags_a_step(monkeypatch):
    right = f.second_moment_weight
    monkeypatch.setattr(f, "second_moment_weight", lambda t, *others: right(t + 1, *others))


def levels_that_are_shifted(monkeypatch):
    from mlx_maxfactor.functional import quantization

    levels = tuple(1.02 * level for level in quantization.LEVELS)
    monkeypatch.setattr(quantization, "LEVELS", levels)


def a_muon_without_its_scale(monkeypatch):
    monkeypatch.setattr(f, "muon_scale", lambda *_: 1.0)


DEFECTS = [
    newton_schulz_with_a_wrong_coefficient,
    statistics_of_the_wrong_axis,
    a_weight_of_statistics_that_lags_a_step,
    levels_that_are_shifted,
    a_muon_without_its_scale,
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_a_formula_is_found(defect, monkeypatch):
    assert all(row.passed for row in check.formulas())
    defect(monkeypatch)
    failed = [row.name for row in check.formulas() if not row.passed]
    assert failed


def test_a_sign_that_is_lost_is_found(monkeypatch):
    monkeypatch.setattr(SignSGD, "apply_single", lambda self, g, p, state, layout=None: p)
    assert any("SignSGD" in row.name for row in check.formulas() if not row.passed)


def test_a_nan_passes_no_limit():
    assert not check.Check("x", float("nan"), 1.0, "one").passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], None),
        (["chek"], "argument COMMAND: invalid choice: 'chek'"),
        (["check", "--output", "/no/such/folder/x.json"], "/no/such/folder is not a folder"),
        (["check", "--seconds", "0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, message, capsys):
    if message is None:
        assert main(arguments) == 2
        assert "commands" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
