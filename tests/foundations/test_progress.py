import pytest
from tqdm import notebook

from lmc.core.progress import Quiet, tqdm


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
