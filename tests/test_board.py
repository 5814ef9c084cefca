"""`megalora board` and `megalora report` in a real browser: open, live, zoomed, compared, dark, on a phone."""

from __future__ import annotations

import json
import time

import pytest
from browser import browser
from runs_on_disk import make_run, metrics_line
from server import started
from told import user_error

pytest.importorskip("starlette")

from megalora import cli  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; the rows of the first can be shown."""
    from tiny import make_inputs

    folder = tmp_path_factory.mktemp("runs")
    inputs = make_inputs(folder / "inputs")
    first = make_run(folder / "all" / "first", steps=30, evaluations=3)
    (first / "profile").mkdir()
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="31" height="9"><script>alert(1)</script></svg>'
    (first / "profile/schedule.svg").write_text(drawing)
    stages = [{"layers": [[0, 1], [4, 4]], "share": 0.4}, {"layers": [[2, 3], [5, 5]], "share": 0.6}]
    layout = {"tensor": 2, "pipeline": 2, "context": 1, "data": 3, "schedule": "interleaved_1f1b", "stages": stages}
    (first / ".megalora.json").write_text(json.dumps({"format": 1, "owns": [], "layout": layout}))
    (first / "peft").mkdir()
    (first / "peft/adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    make_run(folder / "all" / "second", steps=1500, learning_rate=0.01)
    (first / "run.yaml").write_text(
        f"# megalora 0, started in {folder}; flags that are not here have their defaults\n"
        f"model_path: inputs/model\ndata_path: inputs/{inputs.data.name}\noutput_dir: all/first\nlearning_rate: 0.001\n"
    )
    return folder / "all"


CHARTS = "[...document.querySelectorAll('.chart')].map(chart => chart.dataset.field)"
SHOWN = ["loss", "eval/loss", "learning_rate", "phases/forward"]
LOSS = "state.plots.get('loss').chart"


def open_tab(page, name):
    page.run(f"document.querySelector('[data-tab={name}]').click()")


def see_on_a_phone(page):
    open_tab(page, "curves")
    page.screen(390, 800, dark=True)
    page.wait(f"{LOSS}.width <= 390 && {LOSS}.series.length === 3")  # both runs again
    page.wait("document.documentElement.scrollWidth <= 390")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    few = "state.plots.get('eval/loss').chart"
    assert page.run(f"{few}.series[1].points.show({few}, 1)"), "one value has no line"
    assert not page.run(f"{LOSS}.series[2].points.show({LOSS}, 2)")
    for tab in ("settings", "rows", "replies", "notes", "curves"):
        open_tab(page, tab)
        page.wait(f"document.querySelector('#{tab}').childElementCount > 0")
        assert page.run("document.documentElement.scrollWidth") <= 390, tab
        assert page.run("document.querySelector('#tools').hidden") == (tab != "curves")
        assert page.run("document.querySelector('#tabs').offsetHeight") < 45, "one line of tabs"


HOLD = """(() => {
  const series = source.series;
  source.series = async (...asked) => {
    source.series = series;
    const answer = await series(...asked);
    await new Promise((go) => { window.release = go; });
    return answer;
  };
  setRange([300, 800]);
})()"""


def see_an_answer_that_comes_late(page):
    """Behind that to a later question: it is not drawn over it."""
    page.run(HOLD)
    page.wait("window.release !== undefined")
    page.run("setRange([100, 200])")
    page.wait(f"{LOSS}.data[0][0] >= 100 && {LOSS}.data[0].at(-1) <= 200")
    page.run("release(), new Promise((done) => setTimeout(done, 50))")
    assert page.run(f"{LOSS}.data[0].at(-1)") <= 200
    page.run("setRange(null)")
    page.wait(f"{LOSS}.scales.x.min < 5 && {LOSS}.scales.x.max > 1400")


def see_what_it_serves(server, runs):
    model, run = runs.parent / "inputs/model", (runs / "first").resolve()
    serves = f"megalora serve --model_path {model} --adapters tuned={run}"
    next_step = f"megalora: to talk to it, after Ctrl-C or elsewhere: {serves}"
    assert server.said[-1] == next_step
    assert server.ask("/api/runs", method="POST", body={})[0] == 405, "it only reads"
    assert server.ask("/api/runs", headers={"Host": "evil.example"})[0] == 403
    assert server.ask("/api/series?field=loss&points=inf")[0] == 200
    assert server.ask("/api/runs/9/notes")[0] == 404 and server.ask("/static/../server.py")[0] == 404


def test_the_board(runs, tmp_path):
    with started("board", runs, "--port", 0) as server, browser(tmp_path / "profile") as page:
        page.screen(1200, 800)
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait(f"JSON.stringify({CHARTS}) === JSON.stringify({json.dumps(SHOWN)})")
        assert page.run("document.querySelector('#runs').innerText").split("\n")[::2] == ["first", "second"]
        assert "step 30 of 40, loss 0.03333" in page.run("document.querySelector('#runs').innerText")

        with (runs / "first" / "metrics.jsonl").open("a") as file:  # it goes on
            file.write(metrics_line(31))
        page.wait("document.querySelector('#runs').innerText.includes('step 31 of 40')")
        page.wait(f"{LOSS}.data[1].some((value, at) => {LOSS}.data[0][at] === 31 && value === 1 / 31)")

        left, top = page.run(f"(box => [box.left, box.top])({LOSS}.over.getBoundingClientRect())")
        width = page.run(f"{LOSS}.over.clientWidth")
        page.drag((left + width * 0.25, top + 50), (left + width * 0.5, top + 60))
        page.wait(f"{LOSS}.scales.x.min > 300 && {LOSS}.scales.x.max < 800")
        page.wait(f"{LOSS}.data[0].length > 350")  # within the range every step is there
        page.run("document.querySelector('#whole').click()")
        page.wait(f"{LOSS}.scales.x.min < 5 && {LOSS}.scales.x.max > 1400")
        see_an_answer_that_comes_late(page)

        page.run("document.querySelectorAll('#runs input')[1].click()")
        page.wait(f"{LOSS}.data[0].length === 31 && {LOSS}.series.length === 2")
        page.run("document.querySelectorAll('#runs input')[1].click()")

        open_tab(page, "settings")
        page.run("document.querySelector('#differences').click()")
        page.wait("document.querySelectorAll('#flags tr').length > 1")
        lines = page.run("[...document.querySelectorAll('#flags tr')].map(line => line.innerText)")
        assert page.run("document.querySelectorAll('.layout').length") == 1, "the second run has no mark"
        drawn = page.run("[...document.querySelectorAll('.layout tr')].map(line => line.innerText.split('\\t'))")
        assert [line[:2] for line in drawn] == [["stage 0", "layers 0 to 1, 4"], ["stage 1", "layers 2 to 3, 5"]]
        ranks = "[...document.querySelectorAll('.layout tr')].map(line => [...line.querySelectorAll('.ranks')]"
        ranks += ".map(frame => [...frame.children].map(rank => Number(rank.textContent))))"
        assert page.run(ranks) == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
        assert "12 processes: tensor 2 x pipeline 2 x data 3" in page.run("document.querySelector('.layout').innerText")
        assert "learning_rate\t0.001\t0.01" in lines and not any(line.startswith("flag\tsecond") for line in lines)
        open_tab(page, "notes")
        page.wait("document.querySelectorAll('#notes pre.fault').length === 2")
        open_tab(page, "replies")
        page.wait("document.querySelectorAll('.prompt tr').length === 3")
        said = page.run("document.querySelector('.prompt').innerText")
        assert said.startswith("a/<i>.png\nWho <b>are</b> you?")
        assert "before\tI am 0." in said and "step 2\tI am 2." in said
        assert "No replies" in page.run("document.querySelector('#replies').innerText"), "of the second"
        page.wait("document.querySelector('.timeline').naturalWidth === 31")
        open_tab(page, "rows")
        page.wait("document.querySelectorAll('#rows .document').length === 3")
        trained = "document.querySelector('.document').querySelectorAll('.trained')"
        assert page.run(f"[...{trained}].map(piece => piece.textContent).join('')") == "I am Mega.<|im_end|>"
        assert "The rows cannot be shown" in page.run("document.querySelector('#rows').innerText")

        see_on_a_phone(page)
        assert page.errors == []
        see_what_it_serves(server, runs)


def test_the_report(runs, tmp_path):
    out = tmp_path / "report.html"
    (runs / "second" / "logs" / "rank_00000.log").write_text("2026-11-28 23:50:13 </script><script>alert(1)</script>\n")
    assert cli.main(["report", str(runs / "first"), str(runs / "second"), "--output", str(out)]) == 0
    with browser(tmp_path / "profile") as page:
        page.open(out.as_uri())
        page.wait(f"JSON.stringify({CHARTS}) === JSON.stringify({json.dumps(SHOWN)})")
        open_tab(page, "rows")
        page.wait("document.querySelectorAll('.document').length === 3")
        open_tab(page, "notes")
        page.wait("document.querySelector('#notes').innerText.includes('</script><script>alert(1)</script>')")
        page.run("setRange([100, 200])")
        open_tab(page, "curves")
        page.wait(f"{LOSS}.scales.x.min >= 100 && {LOSS}.scales.x.max <= 200")
        time.sleep(0.2)
        assert page.errors == []
    assert "http://" not in out.read_text().replace("http://www.w3.org", ""), "it needs nothing else"


def test_mistakes(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert "holds no run" in user_error(capsys.readouterr().err)
    make_run(tmp_path / "run")
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in user_error(capsys.readouterr().err)
    assert cli.main(["board", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in user_error(capsys.readouterr().err)
    assert cli.main(["board", "--port", "0"]) == 2
    assert "--runs must be given" in user_error(capsys.readouterr().err)
