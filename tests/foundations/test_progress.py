import pytest

from lmc.core.progress import tqdm


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("0", False), ("", False)])
def test_bars_can_be_switched_off_from_outside(monkeypatch, value, disabled):
    monkeypatch.setenv("TQDM_DISABLE", value)
    bar = tqdm(range(3))
    assert bar.disable is disabled and list(bar) == [0, 1, 2]


def test_quick_loops_show_nothing(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(tqdm(range(3), desc="work")) == [0, 1, 2]
    assert "work" not in capsys.readouterr().err
