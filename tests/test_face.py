"""The public face: what is named here is a promise."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import unvanish

FACE = """
    DEFAULT_RULES EarlyStopping Finding Findings Layer LayerError OptionError RecordError Recording Run
    StaleCacheError TargetError Trace TreatmentError UnvanishError WeightsError __version__ Changes Coupling Replicas
    cache_features check diagnose freeze_to landscape load_weights pretrain read_recording thaw treat watch without
""".split()


def test_the_face_is_frozen() -> None:
    """`__all__` is exactly the promised names, and each can be had."""
    assert sorted(unvanish.__all__) == sorted(FACE)
    for name in FACE:
        assert getattr(unvanish, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A wrong name fails as in any module."""
    with pytest.raises(AttributeError, match="module 'unvanish' has no attribute 'wach'"):
        _ = unvanish.wach


def test_functions_win_over_modules_of_their_name() -> None:
    """`unvanish.watch` and `unvanish.check` are functions, whatever module was loaded first."""
    for name in ("watch", "check", "treat"):
        assert isinstance(getattr(unvanish, name), types.FunctionType)
    code = "import unvanish.watch, unvanish.check, types; assert isinstance(unvanish.watch, types.FunctionType)\n"
    code += "assert isinstance(unvanish.check, types.FunctionType)\n"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
