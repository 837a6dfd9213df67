"""Nothing is compiled, unless a test is marked ``compiled``: a kernel takes longer than a step."""

import os
import signal

import pytest

# In the background of a shell, or under nohup, programs ignore these, and so would those of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["MLX_DISABLE_COMPILE"] = "1"  # before MLX is imported; processes of tests inherit it

import mlx.core as mx  # noqa: E402


@pytest.fixture(autouse=True)
def compile_if_marked(request, monkeypatch):
    if request.node.get_closest_marker("compiled") is None:
        yield
        return
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    mx.enable_compile()
    yield
    mx.disable_compile()
