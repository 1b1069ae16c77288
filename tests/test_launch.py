"""Test programs: what is asked of their ends, and a second start after a crash in native code."""

import pytest

from tests.launch import launch

CRASH = "import faulthandler; faulthandler._sigsegv()"
ONCE = f"from pathlib import Path\nif not Path('seen').exists():\n    Path('seen').touch()\n    {CRASH}\nprint('done')"


@pytest.mark.parametrize("processes", [0, 1])
def test_a_crash_in_native_code_is_told_and_tried_again(tmp_path, processes):
    (tmp_path / "once.py").write_text(ONCE)
    with pytest.warns(UserWarning, match=r"crashed in native code(.|\n)*Fatal Python error(.|\n)*once.py"):
        assert "done" in launch(tmp_path / "once.py", processes=processes, cwd=tmp_path).stdout


@pytest.mark.filterwarnings("ignore:.*crashed in native code")
@pytest.mark.parametrize("check", [True, False, None])
def test_a_second_crash_is_no_failure_that_was_asked_for(tmp_path, check):
    (tmp_path / "twice.py").write_text(CRASH)
    with pytest.raises(AssertionError, match="Fatal Python error"):
        launch(tmp_path / "twice.py", processes=0, check=check)


@pytest.mark.parametrize(("status", "check"), [(0, False), (3, True)])
def test_the_end_that_was_asked_for(tmp_path, status, check):
    (tmp_path / "ends.py").write_text(f"raise SystemExit({status})")
    assert launch(tmp_path / "ends.py", processes=0, check=not check).returncode == status
    with pytest.raises(AssertionError):
        launch(tmp_path / "ends.py", processes=0, check=check)
