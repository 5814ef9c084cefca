"""A model with images from its rows to its replies: a run, `megalora generate`, conversions, transformers and peft."""

import importlib
import json
import warnings

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from pictured import ASKED, PROCESSOR, make_adapter, make_model, make_rows
from PIL import Image
from spawn import spawn
from talking import run

import megalora
from megalora import cli, pictures
from megalora.data.images import ImageRows, read_processing
from megalora.data.pixels import PixelReader
from megalora.errors import UserError
from megalora.pictures import find_picture
from megalora.tasks.rouge import rouge_l

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for program in (tiny.program, importlib.import_module("megalora.generate")):
        monkeypatch.setattr(program, "choose_device", lambda: (torch.device("cpu"), None))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each language model."""
    return {kind: make_model(kind, tmp_path_factory.mktemp("model") / kind) for kind in ("opt", "t5")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of rows whose images lie beside it."""
    return make_rows(tmp_path_factory.mktemp("rows"))


def flags_of(folder, model, rows, more_lora=None, **flags) -> dict:
    task = "CAUSAL_LM" if model.name == "opt" else "SEQ_2_SEQ_LM"
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task} | (more_lora or {})
    tiny.write_json(folder / "lora.json", lora)
    named = {"model_path": model, "data_path": rows, "lora_config": folder / "lora.json", "output_dir": folder / "run"}
    more = {"seq_length": 64, "max_steps": 24, "learning_rate": 2e-2, "data_cache": folder / "cache"}
    return named | more | {"base_dropout": False, "per_device_train_batch_size": 2} | flags


def tune(*asked, **flags) -> None:
    megalora.finetune(**flags_of(*asked, **flags))


def replies(model, rows, out, adapter=None, **more) -> list[str]:
    named = {} if adapter is None else {"resume_peft_from_checkpoint": adapter}
    megalora.generate(
        model_path=model, prompts_file=rows, output_file=out, max_new_tokens=4, dtype="float32", **named, **more
    )
    told = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    named = json.loads(rows.read_text(encoding="utf-8"))
    assert [row["image"] for row in told] == [str(rows.parent / row["image"]) for row in named]
    return [row["response"] for row in told]


def their_replies(model, folder, rows, ids_of) -> list[str]:
    """Greedy replies of transformers' model, whose generate gives the new tokens alone."""
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), []
    reader = PixelReader(read_processing(folder), 28, str(folder))
    for row in json.loads(rows.read_text(encoding="utf-8")):
        pixels = reader(find_picture(rows.parent / row["image"], 4))[None]
        ids = torch.tensor([ids_of(tokenizer, row["prompt"])])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            reply = model.generate(
                pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                do_sample=False, num_beams=1,
            )[0]  # fmt: skip
        new = reply[-4:] if len(reply) > ids.shape[1] else reply
        found.append(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return found


def ids_of(folder):
    """What our prompt is made of: the image's tokens, those that begin a text, the text."""
    index = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_token_index"]
    return lambda tokenizer, text: [index] * 4 + tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_from_rows_to_replies(kind, models, rows, tmp_path):
    model = models[kind]
    scored = {"eval_generate": 9, "eval_data_path": (str(rows),)} if kind == "t5" else {"eval_fraction": 0.2}
    tune(tmp_path, model, rows, **scored, max_steps=40, learning_rate=3e-2)
    losses, measured = tiny.column(tmp_path / "run", "loss"), tiny.metrics(tmp_path / "run", "eval_metrics.jsonl")[-1]
    assert losses[-1] < 0.7 * losses[0] and "loss" in measured
    export, merged, out = tmp_path / "run" / "peft", tmp_path / "merged", tmp_path / "out.jsonl"
    ours = replies(model, rows, out, tmp_path / "run")
    base = replies(model, rows, out)
    assert ours == replies(model, rows, out, export) != base and len(set(ours)) > 1
    if kind == "t5":
        said = [row["response"] for row in megalora.generate(
            model_path=model, prompts_file=rows, max_new_tokens=64, resume_peft_from_checkpoint=tmp_path / "run"
        )]  # fmt: skip
        asked = json.loads(rows.read_text(encoding="utf-8"))
        rouge = [rouge_l(row["response"], reply) for row, reply in zip(asked[:9], said[:9], strict=True)]
        assert measured["rouge_l"] == pytest.approx(sum(rouge) / 9, abs=1e-12)
    words = ["convert", "adapter", "merge", "--input", tmp_path / "run", "--base", model, "--output", merged]
    assert cli.main([str(word) for word in words]) == 0
    auto = transformers.Blip2ForConditionalGeneration
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(model), export).eval()
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapted and all(".language_model." in name for name in adapted)
    assert their_replies(theirs, export, rows, ids_of(model)) == ours
    assert their_replies(auto.from_pretrained(merged).eval(), merged, rows, ids_of(model)) == ours
    assert their_replies(auto.from_pretrained(model).eval(), model, rows, ids_of(model)) == base


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_adapter_of_peft_replies_alike_on_every_layout(kind, models, rows, tmp_path):
    model, adapter, out = models[kind], tmp_path / "adapter", tmp_path / "out.jsonl"
    theirs = make_adapter(kind, model, adapter)
    expected = their_replies(theirs, model, rows, ids_of(model))
    assert len(set(expected)) > 1
    command = ["--model_path", model, "--resume_peft_from_checkpoint", adapter, "--prompts_file", rows]
    command = [str(word) for word in (*command, "--output_file", out, "--max_new_tokens", 4, "--dtype", "float32")]
    for tp, pp in ((1, 1), (2, 2), (1, 4)):
        layout = ["--tensor_parallel_size", str(tp), "--pipeline_parallel_size", str(pp)]
        printed = [run(0, 1, command)] if tp * pp == 1 else spawn(run, 4, [*command, *layout])
        assert printed == [[""]] * (tp * pp)
        said = [json.loads(line)["response"] for line in out.read_text(encoding="utf-8").splitlines()]
        assert said == expected, (tp, pp)


def test_a_run_goes_on_and_knows_its_images(models, rows, tmp_path):
    """The run that was stopped ends as the one that was not; the same rows with another image are other rows."""
    model, whole, parts = models["opt"], tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    tune(whole, model, rows, max_steps=6)
    tune(parts, model, rows, max_steps=6, save_steps=3)
    (parts / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    for folder in (parts / "run" / "checkpoints").glob("iter_0000006"):
        folder.rename(tmp_path / "away")
    tune(parts, model, rows, max_steps=6, save_steps=3)
    assert tiny.largest_difference(tiny.exported(whole / "run"), tiny.exported(parts / "run")) == 0.0
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "images").mkdir()
    for file in (rows.parent / "images").iterdir():
        (moved / "images" / file.name).write_bytes(file.read_bytes())
    (moved / "rows.json").write_bytes(rows.read_bytes())
    Image.new("RGB", (20, 20), (1, 2, 3)).save(moved / "images" / "4.png")
    with pytest.raises(UserError, match="a checkpoint of another run .*data"):
        tune(parts, model, moved / "rows.json", max_steps=6)
    Image.new("RGB", (20, 20), (3, 2, 1)).save(moved / "images" / "4.png")  # and the rows' tokens are kept
    with pytest.raises(UserError, match="4.png': has changed since the rows were read"):
        tune(tmp_path / "whole", model, moved / "rows.json", overwrite_output_dir=True, data_cache=parts / "cache")


def test_sample_replies_are_those_of_generate(models, rows, tmp_path):
    """While a run trains, of one process and of four: prompts with an image each, and an image alone."""
    model, folders = models["opt"], [tmp_path / "one", tmp_path / "four"]
    asked = [row | {"image": str(rows.parent / row["image"])} for row in json.loads(rows.read_text(encoding="utf-8"))]
    prompts = write(tmp_path, [*asked[:3], {"image": asked[1]["image"]}])
    flags = {"max_steps": 4, "sample_prompts": prompts, "sample_max_new_tokens": 4, "eval_fraction": 0.2}
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": True}
    for folder in folders:
        folder.mkdir()
    tune(folders[0], model, rows, eval_steps=3, **flags)
    tiny.tune(4, tiny.words(flags_of(folders[1], model, rows, eval_steps=3, **flags, **layout)))
    lines = tiny.metrics(folders[0] / "run", "replies.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 4]
    said = replies(model, prompts, tmp_path / "out.jsonl", folders[0] / "run")
    last = lines[-1]["replies"]
    assert [one["response"] for one in last] == said and lines[0]["replies"] != last
    assert [(one["prompt"], one["image"]) for one in last] == [*((ASKED, row["image"]) for row in asked[:3]),
                                                                ("", asked[1]["image"])]  # fmt: skip
    assert tiny.metrics(folders[1] / "run", "replies.jsonl") == lines


@pytest.mark.parametrize(
    ("kind", "prompts", "told"),
    [
        ("opt", "prompts.txt", "sample_prompts .*prompts.txt: its lines name no images, and blip-2 reads one"),
        ("opt", "rows.json", "rows.json row 1: has no image"),
        ("t5", "rows.json", "sample_prompts has no effect for task_type SEQ_2_SEQ_LM"),
    ],
)
def test_bad_sample_prompts(kind, prompts, told, models, rows, tmp_path):
    write(tmp_path, [{"image": str(rows.parent / "images" / "0.png"), "prompt": ASKED}, {"prompt": ASKED}])
    (tmp_path / "prompts.txt").write_text(f"{ASKED}\n")
    with pytest.raises(UserError, match=told):
        tune(tmp_path, models[kind], rows, sample_prompts=tmp_path / prompts)


def test_the_base_goes_through_shards_and_back(models, rows, tmp_path):
    model, shards, back = models["opt"], tmp_path / "shards", tmp_path / "back"
    layout = ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2"]
    for words in (
        ["convert", "to-shards", "--input", model, "--output", shards, *layout],
        ["convert", "to-hf", "--input", shards, "--output", back],
    ):
        assert cli.main([str(word) for word in words]) == 0
    auto = transformers.Blip2ForConditionalGeneration
    theirs, ours = (auto.from_pretrained(folder).state_dict() for folder in (model, back))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def write(folder, rows):
    tiny.write_json(folder / "rows.json", rows)
    return folder / "rows.json"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"image": "none.png"}, r"row 1: image '.*none.png': cannot be read \(No such file or directory\)"),
        ({"image": "rows.json"}, r"row 1: image '.*rows.json': is not an image that can be read"),
        ({"image": "cut.png"}, r"row 1: image '.*cut.png': is not an image that can be read"),
        ({}, "row 1: has no image, and this model reads one before each text"),
        ({"images": ["a.png", "a.png"]}, "row 1: has 2 images, and this model reads one"),
        ({"image": {"bytes": "x"}}, "row 1: image is a JSON object"),
        ({"image": "a.png", "prompt": "<image> which"}, "row 1: a text has <image>"),
        ({"image": "a.png", "prompt": "a " * 60}, "row 1: too long, .* tokens for --seq_length 64"),
        ({"image": "a.png", "pixels": 3}, "row 1: field pixels is not read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_rows(row, told, models, tmp_path):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    good = {"image": "a.png", "prompt": ASKED, "response": "red"}
    with pytest.raises(UserError, match=told):
        tune(tmp_path, models["opt"], write(tmp_path, [good, {"prompt": ASKED, "response": "red"} | row]))


def test_rows_of_other_models_have_no_images(tmp_path):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "a.png")
    model = tiny.save_model(tmp_path / "opt")
    rows = write(tmp_path, [{"image": "a.png", "prompt": ASKED, "response": "red"}])
    with pytest.raises(UserError, match="row 0: field image is not read: rows are trained as text alone"):
        tune(tmp_path, model, rows, base_dropout=None)
    with pytest.raises(UserError, match="image has no effect: llama reads text alone"):
        megalora.generate(model_path=model, image=tmp_path / "a.png", prompt=ASKED)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": ASKED}, "blip-2 reads an image before each text, and does not chat"),
        ({"image": "rows.json"}, "image '.*rows.json': is not an image"),
        ({"prompts_file": "prompts.txt"}, "its lines name no images"),
        ({"prompts_file": "rows.json"}, "row 1: has no image"),
    ],
    ids=str,
)
def test_bad_questions(asked, told, models, tmp_path):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "a.png")
    write(tmp_path, [{"image": "a.png", "prompt": ASKED}, {"prompt": ASKED}])
    (tmp_path / "prompts.txt").write_text(f"{ASKED}\n")
    named = {name: value if name == "prompt" else tmp_path / value for name, value in asked.items()}
    with pytest.raises(UserError, match=told):
        megalora.generate(model_path=models["opt"], **named)


def test_questions_of_one_image(models, rows, tmp_path):
    """An image without a text is described; before a file of prompts it stands before each."""
    image, said = rows.parent / "images" / "0.png", []
    (tmp_path / "prompts.txt").write_text(f"{ASKED}\n{ASKED}\nblue\n")
    for asked in ({}, {"prompt": ASKED}, {"prompts_file": tmp_path / "prompts.txt"}):
        found = megalora.generate(model_path=models["opt"], image=image, max_new_tokens=3, dtype="float32", **asked)
        said.append([row["response"] for row in found])
    assert said[2][:2] == said[1] * 2 and len(said[0]) == 1 and found[0]["image"] == str(image)
    words = ["--model_path", models["opt"], "--image", image, "--prompts_file", tmp_path / "prompts.txt"]
    (printed,) = run(0, 1, [str(word) for word in (*words, "--max_new_tokens", 3, "--dtype", "float32")])
    assert printed.startswith(f"> {image} {ASKED}\n{said[2][0]}\n\n> {image} {ASKED}\n")


def test_the_bytes_of_a_file_are_read_with_care(tmp_path, monkeypatch):
    Image.new("L", (40, 30), 7).save(tmp_path / "grey.png")
    picture = find_picture(tmp_path / "grey.png", 4)
    assert pictures.open_picture(picture).mode == "RGB"
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="has 40 x 30 pixels, more than 1,000: scale it down"):
        find_picture(tmp_path / "grey.png", 4)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match="needs the package pillow to read images: pip install pillow"):
        ImageRows(None, 4, 7, {})


def test_a_photo_is_read_upright(tmp_path):
    """As transformers reads it; EXIF that is damaged says nothing."""
    from transformers.image_utils import load_image

    held = Image.fromarray(np.random.default_rng(2).integers(0, 255, (20, 30, 3)).astype(np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        held.save(tmp_path / "a.png", exif=exif)
        ours = pictures.open_picture(find_picture(tmp_path / "a.png", 4))
        assert np.array_equal(ours, load_image(str(tmp_path / "a.png"))), orientation
    held.save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*\xff\xff")
    assert np.array_equal(pictures.open_picture(find_picture(tmp_path / "a.png", 4)), held)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type = 'CLIPImageProcessor' is not"),
        ({"do_center_crop": True}, "field 'do_center_crop' = True of the image processor is not read"),
        ({"size": {"height": 14, "width": 14}}, r"makes pixels \[3, 14, 14\] of .*, and the model's image_size is 28"),
    ],
    ids=str,
)
def test_image_processors_that_are_refused(change, told, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=told):
        PixelReader(PROCESSOR | change, 28, "model")(find_picture(tmp_path / "a.png", 4))


def test_pixels_are_those_of_transformers(models, rows):
    """Of its own class of pillow, which it takes from the same file."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    theirs = BlipImageProcessorPil.from_pretrained(models["opt"])
    path = rows.parent / "images" / "3.png"
    ours = PixelReader(read_processing(models["opt"]), 28, "model")(find_picture(path, 4))
    assert torch.equal(ours, theirs(Image.open(path), return_tensors="pt")["pixel_values"][0])
