"""Off a terminal, progress is a line now and then: what, how far, how fast, how long."""

import pytest

from qdiff_jax.runtime import progress as module


def test_lines_are_rare_and_complete(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(module.logging, "info", lambda text, *args: lines.append(text % args))
    with module.progress("training", 100, start=10, every_seconds=30, clock=lambda: now[0]) as tell:
        for done in range(11, 101):
            now[0] += 1.0
            tell(done, loss="0.5")
    assert lines == [
        "training: 40/100, 1.00/s, 1m00s left, loss 0.5",
        "training: 70/100, 1.00/s, 30s left, loss 0.5",
        "training: 100/100, 1.00/s, 0s left, loss 0.5",
    ]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    with module.progress("sampling", 4) as tell:
        tell(2)
        tell(4, loss="1")
    assert "sampling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7384, "2h03m")]
)
def test_format_seconds(seconds, text):
    assert module.format_seconds(seconds) == text
