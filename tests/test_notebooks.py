"""Every notebook runs, one test each, as nbdev would run it. Cells marked `#| slow` run under `-m
slow`, those marked `#| gpu` where there is a GPU."""
import re
from pathlib import Path

import nbdev.test
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config(path=Path(__file__).parent.parent)
NBS = sorted(nbglob(cfg.nbs_path, as_path=True))


def run(nb, capsys, **flags):
    ok, _ = nbdev.test.test_nb(Path(nb).absolute(), basepath=cfg.config_path, **flags)
    if not ok: pytest.fail(capsys.readouterr().err[-4000:], pytrace=False)


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.stem)
def test_notebook(nb, capsys): run(nb, capsys, skip_flags=cfg.tst_flags.split())


@pytest.mark.slow
@pytest.mark.parametrize("nb", [p for p in NBS if re.search(r'"#\| slow', p.read_text())],
                         ids=lambda p: p.stem)
def test_slow_cells(nb, capsys): run(nb, capsys, skip_flags=["notest", "gpu"])


@pytest.mark.gpu
@pytest.mark.parametrize("nb", [p for p in NBS if re.search(r'"#\| gpu', p.read_text())],
                         ids=lambda p: p.stem)
def test_gpu_cells(nb, capsys): run(nb, capsys, skip_flags=["notest", "slow"])
