"""UserError: a message and a hint, each of one line, alone and across processes."""

import ast
import pickle
from pathlib import Path

import pytest
from spawn import spawn

from megalora.errors import UserError
from megalora.parallel.collectives import on_first, together
from megalora.parallel.mesh import build_mesh


def test_message_and_hint_are_one_line_each():
    error = UserError("a thing\n  is wrong", "do\nanother")
    assert (error.message, error.hint, str(error)) == ("a thing is wrong", "do another", "a thing is wrong: do another")
    error = UserError("a thing is wrong")
    assert (error.message, error.hint, str(error)) == ("a thing is wrong", None, "a thing is wrong")


def without_hint(source: str) -> list[int]:
    """The lines on which a UserError is made of a message alone."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "UserError"]
    return [
        call.lineno
        for call in made
        if len(call.args) + len(call.keywords) < 2 and not any(isinstance(part, ast.Starred) for part in call.args)
    ]


def test_every_error_has_a_hint():
    """What is wrong and what to do are two arguments: `UserError("r = 0 is not valid", "give a positive integer")`."""
    found = {}
    for file in sorted((Path(__file__).resolve().parents[1] / "megalora").rglob("*.py")):
        if lines := without_hint(file.read_text(encoding="utf-8")):
            found[str(file)] = lines
    assert not found, "give the remedy as the second argument"
    assert without_hint("raise UserError('a')\nraise UserError('a', 'b')\nraise UserError(*c)") == [1]


@pytest.mark.parametrize("hint", [None, "do another"])
def test_pickled(hint):
    error = UserError("a thing is wrong", hint)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.hint, str(copy)) == (error.message, error.hint, str(error))


def agreed(rank: int, world_size: int, failing: list[int], only_first: bool) -> tuple[str, str | None]:
    world = build_mesh(rank, world_size, 1, 1).world

    def work() -> None:
        if rank in failing:
            raise UserError("a thing is wrong", "do another")

    with pytest.raises(UserError) as caught:
        if only_first:
            on_first(work, world)
        else:
            with together(world):
                work()
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("failing", "only_first", "message"),
    [
        ([0, 1], False, "a thing is wrong"),
        ([0], False, "a thing is wrong"),
        ([1], False, "a thing is wrong (on rank 1)"),
        ([0], True, "a thing is wrong"),
    ],
)
def test_ranks_agree_on_both(failing, only_first, message):
    assert spawn(agreed, 2, failing, only_first) == [(message, "do another")] * 2
