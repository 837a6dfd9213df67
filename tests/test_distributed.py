"""Two and four ranks on loopback, over MLX's ring backend."""

import json

import pytest
import ring
from distributed_run import CASES, SHARDED, STEPS

pytestmark = pytest.mark.skipif(not ring.is_available(), reason="MLX has no ring backend here")

RANKS = (2, 4)


@pytest.fixture(scope="module", params=RANKS, ids="{} ranks".format)
def reports(request, tmp_path_factory):
    """What each rank says of each case: processes are started once for all of them."""
    folder = tmp_path_factory.mktemp("ring")
    outputs = ring.run(request.param, "distributed_run.py", *CASES, folder=folder)
    lines = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return {cases[0]["case"]: cases for cases in zip(*lines, strict=True)}


def test_data_parallel_steps_end_bit_identical_on_all_ranks(reports):
    ranks = reports["data_parallel"]
    assert ranks[0]["moved"]
    assert ranks[0]["own"] != ranks[1]["own"]  # each has gradients of its own
    assert len({rank["parameters"] for rank in ranks}) == 1
    assert len({rank["state"] for rank in ranks}) == 1


def test_shares_change_no_bit_of_what_an_optimizer_does(reports):
    for name in SHARDED:
        for rank in reports[name]:
            # Of the mean of gradients in other messages, each number may round apart.
            exact = name != "average_gradients"
            assert rank["same as alone"] or not exact, name
            assert rank["same state"] or not exact, name
            assert rank["difference"] <= (0 if exact else 2e-6), name
        assert len({rank["parameters"] for rank in reports[name]}) == 1, name


def test_a_rank_keeps_the_state_of_its_share(reports):
    for name in SHARDED:
        ranks = reports[name]
        assert max(rank["state"] for rank in ranks) <= 1.15 / len(ranks), name
        assert all(rank["planned"][0] == rank["planned"][1] for rank in ranks), name


def test_a_step_that_one_rank_spoils_is_skipped_by_all(reports):
    for name in ("guards", "compiled"):
        for rank in reports[name]:
            assert rank["skipped"] == [1, 1]
            assert rank["steps"] == [STEPS - 1] * 2


def test_a_step_sends_what_the_formula_says(reports):
    for name in SHARDED:
        for rank in reports[name]:
            if rank["sent"] is None:
                pytest.skip("nothing counts the bytes of a connection here")
            assert rank["sent"] == pytest.approx(rank["formula"], rel=0.05), name
