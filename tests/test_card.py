"""Model cards of exports and merged models, and --push_to_hub with a hub that is none."""

import json
import sys

import huggingface_hub
import pytest
import tiny
import yaml
from tiny import metrics, tune
from told import user_error

import megalora
from megalora import hub
from megalora.card import MARK, adapter_card, merged_card, read_card, write_card


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    evaluation = {"eval_data_path": inputs.data, "eval_steps": 1}
    done = tune(1, inputs.flags(folder, max_steps=2, **evaluation))[0]
    assert done.out.rstrip().splitlines()[-1] == f"look at it: megalora board {folder}", "the next step"
    return folder


def front_matter(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_of_an_export_tells_of_its_run(inputs, run):
    card = (run / "peft/README.md").read_text()
    assert front_matter(card) == {
        "library_name": "peft", "tags": ["lora", "megalora"], "pipeline_tag": "text-generation"
    }, "a folder of this machine is no base_model of the hub"  # fmt: skip
    assert f"# LoRA adapter of {inputs.model.name}\n" in card
    assert f"Trained with megalora {megalora.__version__}" in card
    assert "| learning rate | 0.005, cosine |" in card and "1 = tensor 1 x pipeline 1 x data 1" in card
    mark = json.loads((run / ".megalora.json").read_text())
    whole = [{"layers": [[0, mark["layout"]["stages"][0]["layers"][0][1]]], "share": 1.0}]
    sizes = {"tensor": 1, "pipeline": 1, "context": 1, "data": 1, "schedule": ""}
    assert mark["layout"] == sizes | {"stages": whole}, "which the board draws"
    assert "| torch |" in card and "48 documents in" in card
    losses = [line["loss"] for line in metrics(run, "eval_metrics.jsonl")]
    assert f"| last training loss | {metrics(run)[-1]['loss']:.4f} |" in card
    assert f"| lowest evaluation loss | {min(losses):.4f}, of step {1 + losses.index(min(losses))} |" in card
    flags = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert flags["max_steps"] == 2 and flags["model_path"] == str(inputs.model)


def test_it_goes_along_with_conversions(inputs, run, tmp_path):
    checkpoint = run / "checkpoints/iter_0000002"
    megalora.convert("adapter to-peft", input=checkpoint, output=tmp_path / "peft")
    assert (tmp_path / "peft/README.md").read_text() == (run / "peft/README.md").read_text()
    (inputs.model / "README.md").write_text("the base's own card")
    for number, source in enumerate((checkpoint, run / "peft")):
        megalora.convert("adapter merge", input=source, base=inputs.model, output=tmp_path / f"merged{number}")
        card = (tmp_path / f"merged{number}/README.md").read_text()
        assert front_matter(card)["library_name"] == "transformers" and "peft import" not in card
        assert "merged into it" in card and "| learning rate | 0.005, cosine |" in card
    (run / "peft/README.md").rename(tmp_path / "kept")
    megalora.convert("adapter merge", input=run, base=inputs.model, output=tmp_path / "bare")
    assert "Nothing is known of the run" in (tmp_path / "bare/README.md").read_text()
    (tmp_path / "kept").rename(run / "peft/README.md")


def test_a_name_of_the_hub_is_the_base_model_and_ones_own_card_stays(tmp_path):
    card = adapter_card("owner/name", "SEQ_CLS", {"data": {"a | b": "c\nd"}}, "", "1")
    assert front_matter(card)["base_model"] == "owner/name"
    assert front_matter(card)["pipeline_tag"] == "text-classification"
    assert "| a \\| b | c d |" in card and MARK in card
    assert front_matter(merged_card("owner/name", "CAUSAL_LM", card))["base_model"] == "owner/name"
    write_card(tmp_path, card)
    write_card(tmp_path, card + "more")
    assert read_card(tmp_path) == card + "more"
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, card)
    assert (tmp_path / "README.md").read_text() == "mine" and read_card(tmp_path) is None


class Hub:
    """What is asked of the hub's client. failing: the name of a call that it cannot answer."""

    endpoint = "https://hub.example"  # as HF_ENDPOINT names it

    def __init__(self):
        self.calls, self.failing = [], None

    def __getattr__(self, name):
        def call(*words, **named):
            if name == self.failing:
                raise ConnectionError("no network\nat all")
            self.calls.append((name, *words, named))

        return call


@pytest.fixture
def fake(monkeypatch):
    one = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: one)
    return one


def test_an_adapter_is_pushed_at_the_end(inputs, fake, tmp_path):
    done = tune(1, inputs.flags(tmp_path / "run", max_steps=1, push_to_hub="me/mine"))[0]
    folder = str(tmp_path / "run/peft")
    assert "pushed: https://hub.example/me/mine" in done.out
    assert fake.calls == [
        ("whoami", {}),
        ("create_repo", "me/mine", {"private": True, "exist_ok": True}),
        (
            "upload_folder",
            {"folder_path": folder, "repo_id": "me/mine", "commit_message": "Adapter trained by megalora"},
        ),
    ]


def test_who_cannot_push_is_told_before_and_after(inputs, fake, tmp_path):
    def refused(**flags):
        return user_error(tiny.run(0, 1, [inputs.flags(tmp_path / "run", max_steps=1, **flags)])[0].err)

    assert "push_to_hub mine is no repository: give OWNER/NAME" in refused(push_to_hub="mine")
    fake.failing = "whoami"
    said = refused(push_to_hub="me/mine")
    assert "the hub does not let you in (no network at all): log in with hf auth login" in said
    assert not (tmp_path / "run/metrics.jsonl").exists(), "before a step is made"
    fake.failing = "upload_folder"
    said = refused(push_to_hub="me/mine")
    assert "is whole, but could not be put there (no network at all): put it there later: hf upload me/mine" in said
    assert (tmp_path / "run/peft/adapter_model.safetensors").exists()


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(megalora.UserError, match="push_to_hub a/b: the hub does not let you in"):
        hub.check_hub("a/b")
