"""The Triton kernels under the versions of Triton that people have, and Triton's own launcher, without a GPU.

Versions beside the installed one are installed into build/ at first use. Each runs in a process of its own.
"""

import pytest

pytest.importorskip("triton")

import stubbed
import tritons

from linformer_kernels import _backends


@pytest.fixture(params=tritons.VERSIONS)
def version(request):
    if reason := tritons.why_not(request.param):
        pytest.skip(reason)
    return request.param


# What each version is known to give in the emulator on sm_90, which checks the fences between copies and products.
PROXIES = {"3.6.0": "proxy-fence"}


def test_chosen(version, seed):
    """Right everywhere; but code of Triton before 3.7.1 for sm_90 lacks a fence, for which it comes last there. With
    the check of that fence switched off it is right."""
    said, *went = tritons.run(version, "under_triton.py", str(seed)).splitlines()
    assert said == version
    on_hopper = [line.split(maxsplit=1)[1] for line in went if line.startswith("sm_90")]
    assert set(on_hopper) == {PROXIES.get(version, "right")} and len(went) > len(on_hopper) > 0
    assert all(line.endswith(" right") for line in went if not line.startswith("sm_90"))
    assert (version in PROXIES) == (_backends.unfenced_triton(version) is not None)


@pytest.mark.skipif(stubbed.why_not() is not None, reason=str(stubbed.why_not()))
def test_launcher(version):
    """Grid, block, shared memory, stream and every argument, as they come to the driver from calls that alternate."""
    assert "of kept plans" in tritons.run(version, "launched.py")
