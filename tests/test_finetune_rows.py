"""The flags of the rows through the whole program: what is read, held out, cut, and gone on from."""

import shutil

import pytest
import tiny
from spawn import spawn
from tiny import column, tune


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_flags_of_the_rows(inputs, tmp_path):
    """The user's own names, a harmless field, a long row that is split and a share for evaluation."""
    mine = [{"ask": row["instruction"], "reply": row["output"], "n": 1, "id": 7} for row in tiny.questions(30)]
    mine[0]["weight"] = 0.5
    talk = [{"input": row["instruction"], "output": row["output"]} for row in tiny.questions(9)]
    files = [tiny.write_json(tmp_path / "mine.json", mine)]
    files += [tiny.write_json(tmp_path / "talk.json", [{"conversation": talk}])]
    flags = {
        "data_path": f"{files[0]}:2,{files[1]}",
        "columns": ["instruction=ask", "output=reply"],
        "ignore_columns": ["n"],
        "on_long_row": "split",
        "eval_fraction": 0.2,
        "max_steps": 2,
        "data_cache": tmp_path / "cache",
    }
    (done,) = tune(1, inputs.flags(tmp_path / "run", **flags, save=False))
    assert "fields of the rows that are not learned: " in done.out and "id (30)" in done.out
    assert "1 rows longer than seq_length were split into" in done.out
    assert "1 rows have weights of their own: the loss is the weighted mean over the labels" in done.out
    assert "perplexity" in done.out
    assert "made in" in done.out and len(list((tmp_path / "cache").glob("*/ids.bin"))) == 1
    (again,) = tune(1, inputs.flags(tmp_path / "again", **flags, save=False))
    assert "are those of an earlier run" in again.out
    assert column(tmp_path / "run", "loss") == column(tmp_path / "again", "loss")


@pytest.mark.parametrize("damage", ["remove", "flip"])
def test_a_run_goes_on_bit_for_bit_without_its_cache(inputs, tmp_path, damage):
    flags = {"data_cache": tmp_path / "cache", "save_steps": 2}
    tune(1, inputs.flags(tmp_path / "half", **flags, max_steps=2, lr_scheduler_type="constant"))
    tune(1, inputs.flags(tmp_path / "other", **flags, max_steps=4, lr_scheduler_type="constant"))
    (ids,) = (tmp_path / "cache").glob("*/ids.bin")
    if damage == "remove":
        shutil.rmtree(tmp_path / "cache")
    else:
        ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    (done,) = tune(1, inputs.flags(tmp_path / "half", **flags, max_steps=4, lr_scheduler_type="constant"))
    assert "made in" in done.out, "the damage is noticed"
    assert column(tmp_path / "half", "loss") == column(tmp_path / "other", "loss")


def test_all_ranks_read_what_one_has_made(inputs, tmp_path):
    """The same numbers on two ranks, whose tokens are made once."""
    flags = {"data_cache": tmp_path / "cache", "max_steps": 3, "gradient_accumulation_steps": 2}
    tune(1, inputs.flags(tmp_path / "one", **flags | {"gradient_accumulation_steps": 4}))
    shutil.rmtree(tmp_path / "cache")
    tune(2, inputs.flags(tmp_path / "two", **flags))
    assert column(tmp_path / "one", "tokens") == column(tmp_path / "two", "tokens")
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=1e-5)
    assert len(list((tmp_path / "cache").glob("*/ids.bin"))) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_that_cannot_be_used_are_a_line_a_kind(inputs, tmp_path, world_size):
    """On the terminal too, behind what the ranks agree on."""
    rows = [{"instruction": "a", "output": ""}, {"instruction": "why " * 99, "output": "b"}, {"instruction": "c"}]
    flags = inputs.flags(tmp_path / "run", data_path=tiny.write_json(tmp_path / "bad.json", rows * 2))
    (done,) = tiny.run(0, 1, [flags]) if world_size == 1 else spawn(tiny.run, 2, [flags])[0]
    first, *kinds, lengths, hint = done.err.removeprefix("error: ").splitlines()
    assert (done.status, first) == (2, "6 of 6 rows cannot be used:") and len(kinds) == 3
    assert all(kind.startswith("2 x ") for kind in kinds) and lengths.startswith("the longest row is ")
    assert hint == "hint: fix them, or leave bad rows out with --on_bad_row skip"
