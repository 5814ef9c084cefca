"""Who is to blame, from what the ranks last said: pure data, with a clock of the test's own."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalora.cluster.verdict import DONE, FAILED, GONE, LOST, STOPPED, Beat, Member, Table

HOSTS = ("a", "a", "b", "b")
TIMEOUT = 30.0


class World:
    """The table of one rank of four on two hosts, fed with beats second by second."""

    def __init__(self, rank: int = 0, hosts: tuple[str, ...] = HOSTS):
        self.table = Table([Member(r, host, 100 + r) for r, host in enumerate(hosts)], rank, now=0.0)
        self.beats = {r: Beat(0, 0, f"step {r}") for r in range(len(hosts))}
        self.now = 0.0

    def go_on(self, seconds: float, silent=(), stuck=False, answers=True, **changes):
        """Every rank but the silent ones says so each second; stuck: nobody makes progress."""
        for _ in range(round(seconds)):
            self.now += 1
            for rank, beat in self.beats.items():
                if rank not in silent:
                    told = changes.get(f"rank{rank}", {})
                    self.beats[rank] = replace(
                        beat, number=beat.number + 1, progress=beat.progress + (not stuck), **told
                    )
            if answers:
                self.table.update(self.beats, self.now)

    def judge(self, **options):
        return self.table.judge(self.now, TIMEOUT, **options)


def test_all_is_well():
    world = World()
    world.go_on(100)
    assert world.judge() is None and world.judge(broken=True) is None


def test_a_rank_that_died_beside_another_is_known_at_once():
    world = World()
    world.go_on(3)
    world.go_on(1, silent=[3], rank2={"processes": {3: GONE}})
    verdict = world.judge()
    assert verdict.text == "rank 3 on b has died, last heard of in step 3" and verdict.culprits == [3]
    assert world.table.speaker(verdict) == 0


def test_a_rank_that_died_on_this_host_is_known_once_its_last_word_must_have_come():
    world = World()
    world.go_on(3)
    world.table.beside({1: GONE}, world.now)
    assert world.judge() is None
    world.go_on(1, silent=[1])
    world.table.beside({1: GONE}, world.now)
    assert world.judge().text == "rank 1 on a has died, last heard of in step 1"


def test_a_rank_that_left_in_order_is_not_missed():
    world = World()
    world.go_on(1, rank3={"left": DONE})
    world.go_on(100, silent=[3], rank2={"processes": {3: GONE}})
    assert world.judge() is None


def test_silence():
    world = World()
    world.go_on(3)
    world.go_on(TIMEOUT, silent=[2])
    assert world.judge() is None
    world.go_on(1, silent=[2])
    assert world.judge().text == "rank 2 on b has not been heard of for 31 s, in step 2"


def test_a_silent_rank_whose_process_runs_is_busy():
    """It holds the interpreter for long, in one call; a stopped one is named."""
    world = World()
    world.go_on(60, silent=[2], rank3={"processes": {2: "R"}})
    assert world.judge() is None
    world.go_on(1, silent=[2], rank3={"processes": {2: "T"}})
    assert "rank 2 on b (its process is stopped) has not been heard of" in world.judge().text


def test_a_silent_host():
    """What its ranks said of one another counts no more."""
    world = World()
    world.go_on(1, rank2={"processes": {3: "R"}}, rank3={"processes": {2: "R"}})
    world.go_on(TIMEOUT + 1, silent=[2, 3])
    verdict = world.judge()
    assert (
        verdict.text
        == "b (ranks 2-3) has not been heard of for 31 s: it or the link to it is down; rank 2 was in step 2"
    )
    assert verdict.culprits == [2, 3] and world.table.speaker(verdict) == 0


def test_cut_off_from_the_store():
    """The ranks on this side speak for themselves."""
    world = World(rank=3)
    world.go_on(3)
    world.go_on(TIMEOUT + 1, answers=False)
    verdict = world.judge()
    assert verdict.text.startswith("a (ranks 0-1) has not been heard of for 31 s") and verdict.cut_off
    assert world.table.speaker(verdict) == 2


def test_a_silent_store_is_not_taken_for_a_silent_rank():
    """The last beat that it gave is older than its last answer."""
    world = World(rank=3)
    world.go_on(3)
    world.go_on(1, silent=[0, 1])
    world.go_on(TIMEOUT, answers=False)
    assert world.judge() is None, "not yet: the store was heard of a second later than the ranks"
    world.go_on(1, answers=False)
    assert world.judge().cut_off


def test_the_store_of_this_host_is_silent():
    world = World(rank=1)
    world.go_on(TIMEOUT + 1, answers=False)
    assert "the store of the run, on this host (a), has not answered for 31 s" in world.judge().text


def test_a_broken_connection_makes_silence_count_sooner():
    world = World()
    world.go_on(12, silent=[2])
    assert world.judge() is None and "rank 2 on b" in world.judge(broken=True).text


def test_words_go_before_signs():
    world = World()
    world.go_on(1, rank2={"left": FAILED, "why": "ValueError: no"})
    assert world.judge().text == "rank 2 on b failed in step 2: ValueError: no"
    world.go_on(1, rank1={"left": LOST, "why": "rank 3 has died", "culprits": [3]})
    verdict = world.judge()
    assert verdict.text == "rank 3 has died" and verdict.culprits == [3]


def test_ranks_that_stop_together_are_given_time():
    world = World()
    world.go_on(5, rank2={"left": STOPPED, "why": "UserError: no"})
    assert world.judge() is None
    world.go_on(2)
    assert "rank 2 on b stopped in step 2: UserError: no" == world.judge().text


def test_a_process_that_was_itself_asleep_blames_nobody():
    world = World()
    world.go_on(3)
    world.now += 1000
    world.table.forgive(1000)
    assert world.judge() is None


@pytest.mark.parametrize(
    "answered, ats, text",
    [
        ({0, 1, 3}, {}, "rank 2 on b does not answer, last seen in step 2"),
        ({0}, {}, "rank 1 on a, rank 2 on b, rank 3 on b do not answer, last seen in step 1"),
        ({0, 1, 2, 3}, {r: "communication" for r in (0, 1, 3)}, "rank 2 on b is in step 2, the others wait for it"),
        ({0, 1, 2, 3}, {r: "communication" for r in range(4)}, "every rank answers, rank 0 on a from communication"),
    ],
)
def test_a_hang(answered, ats, text):
    world = World()
    world.go_on(2)
    world.go_on(20, stuck=True, **{f"rank{rank}": {"at": at} for rank, at in ats.items()})
    assert world.table.hung(world.now, answered).text == f"no progress for 20 s: {text}"


beats = st.builds(
    Beat,
    st.integers(),
    st.integers(),
    st.text(),
    st.booleans(),
    st.sampled_from([None, DONE, LOST]),
    st.text(),
    st.lists(st.integers()),
    st.dictionaries(st.integers(), st.sampled_from("RSTDZ")),
    st.lists(st.text()),
)


@given(beats)
def test_a_beat_survives_the_store(beat):
    assert Beat.from_json(beat.to_json()) == beat
