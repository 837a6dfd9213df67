"""Two and four ranks on loopback, over MLX's ring backend."""

import json

import pytest
import ring

pytestmark = pytest.mark.skipif(not ring.is_available(), reason="MLX has no ring backend here")

RANKS = (2, 4)


@pytest.fixture(scope="module", params=RANKS, ids="{} ranks".format)
def reports(request, tmp_path_factory):
    """What each rank says of each case: processes are started once for all of them."""
    folder = tmp_path_factory.mktemp("ring")
    outputs = ring.run(request.param, "distributed_run.py", "data_parallel", folder=folder)
    lines = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return {cases[0]["case"]: cases for cases in zip(*lines, strict=True)}


def test_data_parallel_steps_end_bit_identical_on_all_ranks(reports):
    ranks = reports["data_parallel"]
    assert ranks[0]["moved"]
    assert ranks[0]["own"] != ranks[1]["own"]  # each has gradients of its own
    assert len({rank["parameters"] for rank in ranks}) == 1
    assert len({rank["state"] for rank in ranks}) == 1
