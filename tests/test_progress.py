import io

from kdx import progress as module
from kdx.progress import TERMINAL, progress, terminal


def test_progress_is_silent_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv(TERMINAL, raising=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert terminal() is None
    assert list(progress([1, 2])) == [1, 2]
    assert capsys.readouterr().out == ""


def test_progress_is_drawn_on_the_terminal_that_is_passed_on(monkeypatch, tmp_path):
    path = tmp_path / "terminal"
    monkeypatch.setenv(TERMINAL, str(path))
    assert module.terminal() == str(path)
    with progress(total=2, desc="images", mininterval=0) as bar:
        bar.update(2)
    assert "images" in path.read_text()
