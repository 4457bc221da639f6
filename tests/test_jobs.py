"""Many trainings in a few processes: results are kept, and nothing goes on alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from experiments.studies.jobs import run_jobs


def touch_and_wait(number):
    Path(f"begun {number}").touch()
    time.sleep(600)


def test_one_worker_is_this_process_with_one_thread(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run_jobs(torch.get_num_threads, [()], tmp_path / "threads", workers=1) == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert run_jobs(divmod, [(7, 2), (9, 2)], tmp_path / "kept", workers=1) == [[3, 1], [4, 1]]
    assert run_jobs(pow, [(9, 2), (7, 2), (2, 3)], tmp_path / "kept", workers=1) == [[4, 1], [3, 1], 8]
    with pytest.raises(ZeroDivisionError):
        run_jobs(divmod, [(3, 2), (1, 0)], tmp_path / "failed", workers=1)
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["0003 0002.json"]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = "from test_jobs import run_jobs, touch_and_wait; run_jobs(touch_and_wait, [(1,), (2,)], 'jobs', 2)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.time() + 300
        while len(list(tmp_path.glob("begun *"))) < 2 and time.time() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
