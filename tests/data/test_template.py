"""Labels are exactly the replies and their end tokens; training and generation get the same prompt."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from megalora.data import ChatTemplate, Conversation, load_tokenizer
from megalora.data.template import TemplateOptions
from megalora.errors import UserError

HI = [{"role": "user", "content": "hello, who are you?"}, {"role": "assistant", "content": "I am Mega."}]
CHINESE = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是 Mega。"}]
TALK = [{"role": "system", "content": "Be brief."}, *HI, *CHINESE]
SYSTEM = [{"role": "system", "content": "Be brief."}, *HI]
NEWLINES = [{"role": "user", "content": "a\n\n"}, {"role": "assistant", "content": "\n\nb \n"}]


def talk(messages):
    return Conversation.from_dicts(messages)


def encode(template, messages):
    """The one document of a conversation."""
    (sample,) = template.encode(talk(messages))
    return sample


def labelled(template, sample) -> list[str]:
    """The text of each run of labelled tokens."""
    runs, last = [], False
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        assert label in (-100, token)
        if label != -100:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = label != -100
    return [template.tokenizer.decode(run) for run in runs]


def check_prompts(template, messages):
    """Every prompt of the conversation is a prefix of the document, and labels start right behind it."""
    sample = encode(template, messages)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template.prompt(talk(messages[:turn]))
            assert sample.input_ids[: len(prompt)].tolist() == prompt
            assert sample.labels[len(prompt)] != -100 and sample.labels[len(prompt) - 1] == -100


@pytest.mark.parametrize("name", ["chatml", "llama3", "r1"])
@pytest.mark.parametrize("messages", [HI, CHINESE, SYSTEM, TALK, NEWLINES])
def test_prompt_is_the_same_in_training_and_generation(request, name, messages):
    check_prompts(ChatTemplate(request.getfixturevalue(name)), messages)


def test_chatml(chatml):
    template = ChatTemplate(chatml)
    sample = encode(template, TALK)
    assert labelled(template, sample) == ["I am Mega.<|im_end|>", "我是 Mega。<|im_end|>"]
    assert chatml.decode(sample.input_ids) == chatml.apply_chat_template(TALK, tokenize=False).removesuffix("\n")
    assert template.stop_token_ids == tuple(chatml.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert template.description == "the tokenizer's chat template"
    assert chatml.decode(template.prompt(talk(HI[:1]))).startswith("<|im_start|>system\nYou are helpful.")


def test_llama3_sets_bos_once_and_trims(llama3):
    template = ChatTemplate(llama3)
    sample = encode(template, [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b \n"}])
    assert sample.input_ids.tolist().count(llama3.bos_token_id) == 1
    assert labelled(template, sample) == ["b<|eot_id|>"]
    assert template.end_token_id == llama3.convert_tokens_to_ids("<|eot_id|>") != llama3.eos_token_id


def test_r1(r1):
    template = ChatTemplate(r1)
    assert labelled(template, encode(template, TALK)) == [
        "I am Mega.<｜end▁of▁sentence｜>",
        "我是 Mega。<｜end▁of▁sentence｜>",
    ]
    rendered = r1.apply_chat_template(TALK, tokenize=False)
    assert encode(template, TALK).input_ids.tolist() == r1(rendered, add_special_tokens=False)["input_ids"]
    assert template.stop_token_ids == (r1.eos_token_id,)


THOUGHT = "<think>\nhm\n</think>\n\nI am Mega."


def documents(template, messages):
    """What is trained of a conversation: a list of texts a document."""
    return [labelled(template, sample) for sample in template.encode(talk(messages))]


def test_r1_thinking_is_trained_where_it_is_generated(r1):
    """The template drops it from the history: a document for each reply that has some."""
    end = "<｜end▁of▁sentence｜>"
    thinking = [HI[0], {"role": "assistant", "content": THOUGHT}]
    two = [*thinking, *thinking]
    assert documents(ChatTemplate(r1), two) == [[THOUGHT + end], [THOUGHT + end]]
    assert documents(ChatTemplate(r1), [*HI, *two]) == [[THOUGHT + end], ["I am Mega." + end, THOUGHT + end]]
    for kind, expected in [("mask", [[THOUGHT + end]]), ("keep", [[THOUGHT + end, THOUGHT + end]])]:
        template = ChatTemplate(r1, options=TemplateOptions(history_thinking=kind))
        assert documents(template, two) == expected
        sample = template.encode(talk(two))[-1]
        assert (r1.decode(sample.input_ids).count("</think>") == 2) == (kind == "keep")
    check_prompts(ChatTemplate(r1), [*HI, *thinking])


@pytest.mark.parametrize(
    "content, learned",
    [(THOUGHT, "hm\n</think>\n\nI am Mega."), ("I am Mega.", "\n</think>\n\nI am Mega.")],
)
def test_prompt_that_opens_the_thinking(r1, tmp_path, content, learned):
    """The later R1 template: generation starts with <think>, which the full rendering does not have."""
    path = tmp_path / "later.jinja"
    before, found, after = r1.chat_template.rpartition("<｜Assistant｜>")
    path.write_text(before + found + "<think>\\n" + after)
    template = ChatTemplate(r1, str(path))
    assert template.description == f"the template {path}"
    messages = [HI[0], {"role": "assistant", "content": content}]
    assert r1.decode(template.prompt(talk(HI[:1]))).endswith("<｜Assistant｜><think>\n")
    assert labelled(template, encode(template, messages)) == [learned + "<｜end▁of▁sentence｜>"]
    check_prompts(template, messages)
    end = "<｜end▁of▁sentence｜>"
    first = "\n</think>\n\nI am Mega." + end  # as it is generated behind the <think> of its prompt
    assert documents(template, [*HI, *messages]) == [[first], [learned + end]]
    keeps = ChatTemplate(r1, str(path), TemplateOptions(history_thinking="keep"))
    assert documents(keeps, [*HI, *messages]) == [[first, learned + end]]
    (sample,) = keeps.encode(talk([*HI, *messages]))
    assert r1.decode(sample.input_ids).count("<think>\n") == 2


def test_reply_that_holds_the_templates_own_text(chatml):
    template = ChatTemplate(chatml)
    tricky = "user\nhello, who are you?\nmegalora-reply-marker\nassistant\n"
    messages = [*HI, HI[0], {"role": "assistant", "content": tricky}, *HI]
    assert labelled(template, encode(template, messages))[1] == tricky + "<|im_end|>"


def test_plain_template_for_a_tokenizer_without_one(make_tokenizer):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for adds_bos in (False, True):
        template = ChatTemplate(make_tokenizer(["<s>", "</s>"], None, adds_bos=adds_bos, **names))
        assert "plain" in template.description and "no chat template" in template.description
        text = template.tokenizer.decode(encode(template, TALK).input_ids)
        assert text.startswith("<s>Be" if adds_bos else "Be") and text.count("<s>") == adds_bos
        assert "### Instruction:\nhello, who are you?\n\n### Response:\nI am Mega.</s>\n\n### Instruction" in text
        assert labelled(template, encode(template, TALK)) == ["I am Mega.</s>", "我是 Mega。</s>"]
        check_prompts(template, TALK)


def test_built_in_over_the_tokenizers_own(chatml):
    template = ChatTemplate(chatml, "chatml")
    assert template.description == "the built-in template chatml"
    assert chatml.decode(template.prompt(talk(HI[:1]))).startswith("<|im_start|>user")


def test_templates_that_refuse_or_drop_the_system_text(chatml, tmp_path):
    body = chatml.chat_template
    refusal = "{{ raise_exception('System role not supported') }}"
    refuses = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}" + body
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + body
    for source, told in [(refuses, "System role not supported"), (drops, "drops the system text")]:
        path = tmp_path / "t.jinja"
        path.write_text(source)
        template = ChatTemplate(chatml, str(path))
        encode(template, HI)
        with pytest.raises(UserError, match=told + ".*first user turn.*--template"):
            encode(template, SYSTEM)


def test_a_system_text_that_is_elsewhere_in_the_text_is_dropped_all_the_same(chatml, tmp_path):
    """One letter of the template's own, or the question once more."""
    path = tmp_path / "t.jinja"
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    path.write_text(drops + chatml.chat_template)
    for content in ("s", HI[0]["content"], "user"):
        messages = [{"role": "system", "content": content}, *HI]
        encode(ChatTemplate(chatml), messages)
        with pytest.raises(UserError, match="drops the system text"):
            encode(ChatTemplate(chatml, str(path)), messages)
    encode(ChatTemplate(chatml, str(path)), [{"role": "system", "content": " "}, *HI])


def test_the_last_of_two_system_texts_alone_is_printed(r1):
    """R1's template keeps one."""
    template = ChatTemplate(r1)
    for first, second in (("s", "t"), ("Be brief.", "Be kind.")):
        messages = [{"role": "system", "content": first}, *HI, {"role": "system", "content": second}, *CHINESE]
        with pytest.raises(UserError, match="drops the system text"):
            encode(template, messages)


@pytest.mark.parametrize(
    "source, told",
    [
        ("{{ messages[-1].content }}", "no special token"),
        ("{% for m in messages %}<|im_end|>{% endfor %}", "does not print the reply"),
        ("{% for m in messages %", "not valid jinja"),
        ("{{ 'a' + missing }}", "refuses"),
    ],
)
def test_unusable_templates(chatml, tmp_path, source, told):
    path = tmp_path / "t.jinja"
    path.write_text(source)
    with pytest.raises(UserError, match=told):
        ChatTemplate(chatml, str(path))


@pytest.mark.parametrize("value", [{"default": {"a": "b"}}, {"default": 3}])
def test_a_template_of_the_tokenizer_that_is_no_text(chatml, value):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = value
    with pytest.raises(UserError, match="chat_template is no text: copy tokenizer_config.json again"):
        ChatTemplate(tokenizer)


def test_unknown_template_name(chatml):
    with pytest.raises(UserError, match="no built-in template.*plain | chatml"):
        ChatTemplate(chatml, "nonesuch")


def test_templates_that_print_the_date_are_the_same_tomorrow(chatml, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ 'Today ' + strftime_now('%d %b %Y') }}" + chatml.chat_template)
    template = ChatTemplate(chatml, str(path))
    assert chatml.decode(template.prompt(talk(HI[:1]))).startswith("Today 26 Jul 2024")


def test_a_tokenizer_that_sets_a_space_before_any_text():
    """As Llama 2's: pieces from the middle of a text must get no space of their own."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "<0x0A>", *letters]
    merges = [("\u2581", "b"), ("b", "b")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[I] ' + m.content + ' [/I]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}] * 2
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encode(template, messages).input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    check_prompts(template, messages)


@pytest.mark.parametrize("pairs", [[], ["<0x0A><0x0A>"], ["\n\n"]])
def test_a_vocabulary_with_a_piece_of_line_breaks(pairs):
    """Where the newline before a piece would merge with its own, something else stands there."""
    letters = [*map(chr, range(33, 127)), "\n"] if pairs == ["\n\n"] else [*map(chr, range(33, 127))]
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pairs]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = {"<0x0A><0x0A>": [("<0x0A>", "<0x0A>")], "\n\n": [("\n", "\n")]}[pairs[0]] if pairs else []
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "a\n\n\n"}, {"role": "assistant", "content": "\n\nb"}]
    check_prompts(template, [*messages, *messages])
    sample = encode(template, messages)
    reply = [token for token in sample.labels.tolist() if token != -100]
    unprefixed = backend.encode("\n\nb").ids[1:]  # without the space that begins every text
    assert reply == [*unprefixed, tokenizer.eos_token_id]


def test_load_tokenizer(chatml, tmp_path):
    chatml.save_pretrained(tmp_path / "good")
    assert ChatTemplate(load_tokenizer(tmp_path / "good")).prompt(talk(HI[:1])) == ChatTemplate(chatml).prompt(
        talk(HI[:1])
    )
    with pytest.raises(UserError, match="no folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_load_tokenizer_from_sentencepiece_only(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    (tmp_path / "corpus.txt").write_text("\n".join(["hello world who are you", "I am Mega", "be brief"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    template = ChatTemplate(load_tokenizer(tmp_path))
    assert labelled(template, encode(template, HI)) == ["I am Mega.</s>"]
    check_prompts(template, TALK)


QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].removeprefix('<think>').strip() if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip() + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_that_prints_the_last_reply_unlike_the_earlier_ones(chatml, tmp_path):
    """As Qwen3: thinking, if only an empty one, in the last reply; none in the history."""
    path = tmp_path / "qwen3.jinja"
    path.write_text(QWEN3)
    template = ChatTemplate(chatml, str(path))
    thinking = [HI[0], {"role": "assistant", "content": THOUGHT}]
    thought, empty = THOUGHT + "<|im_end|>", "<think>\n\n</think>\n\nI am Mega.<|im_end|>"
    assert documents(template, [*thinking, *thinking]) == [[thought], [thought]]
    assert documents(template, [*thinking, *HI]) == [[thought], [empty]]
    assert documents(template, [*HI, *HI]) == [[empty], [empty]]
    for turns in ([*thinking, *HI], [*HI, *HI, *thinking]):
        for stop in range(2, len(turns) + 1, 2):  # each document is what generation sees, and what the template prints
            sample = template.encode(talk(turns[:stop]))[-1]
            prompt = template.prompt(talk(turns[: stop - 1]))
            assert sample.input_ids[: len(prompt)].tolist() == prompt
            rendered = chatml.apply_chat_template(turns[:stop], chat_template=QWEN3, tokenize=False)
            assert chatml.decode(sample.input_ids) == rendered.removesuffix("\n")
    keeps = ChatTemplate(chatml, str(path), TemplateOptions(history_thinking="keep"))
    assert documents(keeps, [*thinking, *HI]) == [[thought, empty]]


def test_plain_template_needs_an_end_token(make_tokenizer):
    with pytest.raises(UserError, match="plain.*eos_token.*--template"):
        ChatTemplate(make_tokenizer(["<s>"], None, bos_token="<s>"))
