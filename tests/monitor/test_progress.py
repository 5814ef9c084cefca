"""The progress of a copy: a bar on a terminal, seldom a line elsewhere."""

import io

from megalora.monitor.progress import ByteProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then():
    file, now = io.StringIO(), [0.0]
    with ByteProgress(4_000_000_000, "to-hf", file, clock=lambda: now[0]) as progress:
        for second in (1, 9, 12, 13, 30):
            now[0] = float(second)
            progress.advance(500_000_000)
    assert file.getvalue().splitlines() == ["to-hf: 1.50 of 4.00 GB", "to-hf: 2.50 of 4.00 GB"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with ByteProgress(4_000_000_000, "to-hf", file) as progress:
        progress.advance(4_000_000_000)
    assert "to-hf" in file.getvalue() and "4.0/4.0 GB" in file.getvalue()


def test_a_terminal_that_cannot_draw_is_a_log(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with ByteProgress(10, "to-hf", file) as progress:
        progress.advance(10)
    assert file.getvalue() == ""
