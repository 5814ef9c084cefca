"""What is shown: replies piece by piece, thinking apart, two replies side by side."""

import io

from megalora.generation.requests import INTERRUPTED, LENGTH, STOP
from megalora.generation.terminal import DIM, PLAIN, Voice, side_by_side, written
from megalora.generation.text import Answer, Piece

PIECES = [Piece("so ", True), Piece("so", True), Piece("ye", False), Piece("s", False)]


class Tty(io.StringIO):
    def isatty(self):
        return True


def say(out, show_thinking, reason=None):
    voice = Voice(out, show_thinking)
    voice.say(PIECES[:1])
    voice.say(PIECES[1:])
    voice.end(reason)
    return out.getvalue()


def test_a_voice():
    assert say(io.StringIO(), False) == "yes\n"
    answer = Answer("yes", "so so", "<think>so so</think>yes", STOP)
    assert say(io.StringIO(), True) == written(answer, True) + "\n" == "<think>\nso so\n</think>\n\nyes\n"
    assert written(answer, False) == "yes"
    assert say(Tty(), True) == f"{DIM}<think>\nso so\n</think>{PLAIN}\n\nyes\n"


def test_how_a_reply_ended():
    assert say(io.StringIO(), False, LENGTH) == "yes ...\n"
    assert say(io.StringIO(), False, INTERRUPTED) == "yes [stopped]\n"
    assert say(io.StringIO(), False, STOP) == "yes\n"


def test_thinking_that_was_cut_off_leaves_the_colours_as_they_were():
    out = Tty()
    voice = Voice(out, True)
    voice.say(PIECES[:1])
    voice.end(INTERRUPTED)
    assert out.getvalue().index(PLAIN) > out.getvalue().index(DIM)


def test_side_by_side():
    shown = side_by_side(["tuned", "base"], ["one two\nthree", "你好" * 20], 63).split("\n")
    assert shown[0].split("|")[0].strip() == "tuned" and shown[0].split("|")[1].strip() == "base"
    assert [line.split("|")[0].strip() for line in shown[2:4]] == ["one two", "three"]
    assert "".join(line.split("|")[1].strip() for line in shown[2:]) == "你好" * 20
    assert all(len(line) + sum(c in "你好" for c in line) <= 63 for line in shown), "two columns a character"
    assert side_by_side(["a", "b"], ["x", "y"], 0) == "a:\nx\n\nb:\ny"
