import pytest
from tqdm import notebook

from lmc.core.progress import Quiet, beforehand, tqdm


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("0", False), ("", False)])
def test_bars_can_be_switched_off_from_outside(monkeypatch, value, disabled):
    monkeypatch.setenv("TQDM_DISABLE", value)
    bar = tqdm(range(3))
    assert bar.disable is disabled and list(bar) == [0, 1, 2]


def test_quick_loops_show_nothing(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(tqdm(range(3), desc="work")) == [0, 1, 2]
    assert "work" not in capsys.readouterr().err


def test_a_bar_in_a_notebook_empties_its_output(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    told = []

    class Output:
        def update(self, data, raw):
            told.append((data, raw))

    class Bar(Quiet, notebook.tqdm):
        pass

    monkeypatch.setattr("IPython.display.display", lambda shown, display_id: told.append(shown) or Output())
    bar = Bar(range(3), delay=1e-9, mininterval=0.0)
    assert list(bar) == [0, 1, 2]
    assert told == [bar.container, ({"text/html": "", "text/plain": ""}, True)]


def test_long_work_says_beforehand_how_long_and_short_work_nothing(monkeypatch, capsys):
    beforehand("work", 1e6)
    assert capsys.readouterr().err == ""  # switched off from outside
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    beforehand("short work", 9.0, budget=60.0)
    beforehand("work", 40.4, budget=60.0)
    beforehand("work", 150.0, more="; an interrupt keeps what is done")
    beforehand("work", 300.0, budget=float("inf"), least=True)
    assert capsys.readouterr() == (
        "",
        "work: about 40 s, budget 60 s\nwork: about 2 minutes; an interrupt keeps what is done\nwork: at least 5 minutes\n",
    )
