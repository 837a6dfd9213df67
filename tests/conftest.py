"""Nothing is compiled, unless a test is marked ``compiled``: a kernel takes longer than a step."""

import os

import pytest

os.environ["MLX_DISABLE_COMPILE"] = "1"  # before MLX is imported; processes of tests inherit it

import mlx.core as mx


@pytest.fixture(autouse=True)
def compile_if_marked(request, monkeypatch):
    if request.node.get_closest_marker("compiled") is None:
        yield
        return
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    mx.enable_compile()
    yield
    mx.disable_compile()
