"""The command ``mlx-maxfactor check`` passes here and finds defects in the formulas."""

import json

import mlx.core as mx
import pytest
from command_line import error_of

from mlx_maxfactor import SignSGD
from mlx_maxfactor import functional as f
from mlx_maxfactor.commands import check, main
from mlx_maxfactor.functional import first_moment, orthogonalization


@pytest.mark.compiled
def test_every_check_passes_and_the_report_contains_no_path(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["check", "--output", str(path), "--seconds", "600"]) == 0
    text = path.read_text()
    report = json.loads(text)
    assert report["passed"]
    assert report["not run"] == []
    assert {times["optimizer"] for times in report["times"]} == set(check.TIMED)
    assert "/" not in text.replace("times", "")
    count = len(report["checks"])
    assert f"{count} of {count} checks passed" in capsys.readouterr().out


def test_checks_skipped_for_lack_of_time_are_reported(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["check", "--output", str(path), "--seconds", "1"]) in (0, 1)
    report = json.loads(path.read_text())
    assert "times" in report["not run"]
    assert "not run for lack of time" in capsys.readouterr().out


factored_second_moment, second_moment_weight = f.factored_second_moment, f.second_moment_weight


def statistics_over_the_wrong_axis(g, row, column, b, *others, **options):
    row, column, largest = factored_second_moment(g, row, column, b, *others, **options)
    return mx.mean(row, axis=-2, keepdims=True) + 0 * row, column, largest


DEFECTS = {
    "a coefficient": (orthogonalization, "NEWTON_SCHULZ", (3.4445, -4.6750, 2.0315)),
    "an axis": (f, "factored_second_moment", statistics_over_the_wrong_axis),
    "a step": (f, "second_moment_weight", lambda t, *others: second_moment_weight(t + 1, *others)),
    "levels": (first_moment, "LEVELS", tuple(1.02 * level for level in first_moment.LEVELS)),
    "a scale": (f, "muon_scale", lambda *_: 1.0),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_in_a_formula_is_found(defect, monkeypatch):
    assert all(row.passed for row in check.formulas())
    monkeypatch.setattr(*DEFECTS[defect])
    assert not all(row.passed for row in check.formulas())


def test_lost_update_is_found(monkeypatch):
    monkeypatch.setattr(SignSGD, "apply_single", lambda self, g, p, state, layout=None: p)
    assert any("SignSGD" in row.name for row in check.formulas() if not row.passed)


def test_nan_fails_every_check():
    assert not check.Check("x", float("nan"), 1.0, "one").passed


WRONG_ARGUMENTS = [
    ([], None),
    (["chek"], "argument COMMAND: invalid choice: 'chek'"),
    (["check", "--output", "/no/such/folder/x.json"], "--output: [Errno 2] No such file"),
    (["check", "--output", "/"], "--output: [Errno 21] Is a directory"),
    (["check", "--seconds", "0"], "must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_give_a_one_line_error(arguments, message, capsys):
    if message is None:
        assert main(arguments) == 2
        assert "commands" in capsys.readouterr().out
        return
    assert message in error_of(arguments, capsys)
