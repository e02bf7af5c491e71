"""The import of torch and transformers: what the search for garbage does meanwhile and afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from bmm.imports import import_torch_and_transformers

_STATE = "import gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"


def test_what_was_imported_is_passed_over_for_good() -> None:
    code = "from bmm.imports import import_torch_and_transformers as load; load(); load(); " + _STATE
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["True", "True"]


def test_a_failed_import_leaves_the_search_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ImportError):
        import_torch_and_transformers()
    assert gc.isenabled()


def test_once_torch_is_there_nothing_more_is_passed_over() -> None:
    """Tensors in what would be garbage later must not be kept for good."""
    import torch  # noqa: F401

    gc.unfreeze()
    import_torch_and_transformers()
    assert gc.get_freeze_count() == 0
