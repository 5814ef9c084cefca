"""Templates of strangers: the text that transformers renders, or one line, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import chat_templates
import pytest
import tiny
from chat_templates import bpe
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from megalora.data.rendering import Refused, Renderer, size_of, told
from megalora.errors import UserError

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "hello 你好\n\n"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"},
    {"role": "user", "content": "b"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", sorted(chat_templates.TEMPLATES))
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_of_transformers(name, prompt):
    special = [token for token in chat_templates.TEMPLATES[name].special if token]
    tokenizer, source = chat_templates.tokenizer_of(name, bpe(special)), chat_templates.source(name)
    if "strftime_now" in source:
        source = source.replace("strftime_now is defined", "false")
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:3]):
        if name == "gemma" and messages is MESSAGES:
            continue
        for tools in (None, TOOLS):
            variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
            ours = Renderer(source, "t").render(size_of(messages), **variables, **tokenizer.special_tokens_map).text
            assert ours == tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, add_generation_prompt=prompt, tokenize=False
            )


EXPRESSIONS = [
    "messages|length", "messages[0].role ~ 1 ~ none", "'%s-%05d' % ('a', 3)", "'{:>5}|{}'.format(1, 123456789)",
    "messages|tojson", "messages|map(attribute='role')|join(', ')",
    "messages|selectattr('role', 'eq', 'user')|list|length",
    "(messages|last).content|trim|upper", "'a,b'.split(',')|reverse|list", "[1, 2] + [3]", "{'a': 1}.items()|list",
    "dict(a=1)", "range(5)|sum", "'x' * 3 + 'y'", "2 ** 10 // 3 % 7", "messages[1:]|length", "messages[::-1][0].role",
    "'b' in messages[0].content", "namespace(a=1).a", "'a'|center(5)", "'abc'|replace('b', 'x')", "none", "1.5", "true",
    "missing", "messages[0].missing is defined", "(1, 2)", "'a' if 1 > 2 else 'b'", "[[1, 2], [3]]|sum(start=[])",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_those_of_transformers(expression):
    """The budget is put around operators, comparisons, literals and filters, and changes none."""
    tokenizer = tiny.tokenizer()
    source = f"{{% set x = {expression} %}}{{{{ {expression} }}}}|{{{{ x }}}}"
    ours = Renderer(source, "t").render(size_of(MESSAGES), messages=MESSAGES).text
    assert ours == tokenizer.apply_chat_template(MESSAGES, chat_template=source, tokenize=False)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "adds": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "nests": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "is": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = (n.x, n.x) %}{{ n.x == 1 }}{% endfor %}",
    "repeats": "{{ 'a' * 10000000000 }}",
    "repeats lists": "{{ (10000000000 * [0]) | length }}",
    "pads": "{{ 'a' | center(9999999999) }}{{ 'a'.ljust(9999999999) }}",
    "formats": "{{ '%999999999d' % 1 }}",
    "formats by method": "{{ '{:999999999}'.format(1) }}",
    "formats by argument": "{{ '{:{}}'.format(1, 999999999) }}{{ '%*d' % (999999999, 1) }}",
    "indents": "{{ messages | tojson(indent=999999999) }}",
    "replaces": "{% set x = 'a' * 9999 %}{{ x.replace('a', x).replace('a', x) | length }}",
    "translates": "{{ ('a' * 99999).translate({97: 'b' * 99999}) | length }}",
    "joins": "{% set x = 'a' * 9999 %}{{ x.join(x.join(x)) | length }}",
    "block": "{% set b = 'a' * 99999 %}{% set x %}{% for i in range(9999) %}{{ b }}{% endfor %}{% endset %}",
    "prints lists": "{% set x = [messages] * 9999 %}{% set y = [x] * 9999 %}{{ y ~ '' }}",
    "searches": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "powers": "{{ 9 ** 999999999 }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop([messages]) }}{% endfor %}",
    "divides": "{{ 1 / 0 }}",
    "lorem": "{{ lipsum(n=99999999) }}",
    "python": "{{ ().__class__.__base__.__subclasses__() }}",
    "includes": "{% include '/etc/passwd' %}",
    "objects": "{{ namespace(a=1) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_templates_are_one_line(name):
    renderer, started = Renderer(HOSTILE[name], "t"), time.thread_time()
    with pytest.raises(Exception) as raised:
        renderer.render(size_of(MESSAGES), messages=MESSAGES)
    assert told(raised.value) and "\n" not in told(raised.value)
    assert time.thread_time() - started < 30  # of processor time: the limit is a count, and a clock behind it


def test_hostile_templates_take_little_memory():
    """All of them one after another, in a process that may not have much more than the interpreter itself."""
    script = """
        import json
        import resource
        import sys
        from megalora.data.rendering import Renderer, size_of
        hostile, messages = json.load(sys.stdin)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for source in hostile:
            try:
                Renderer(source, "t").render(size_of(messages), messages=messages)
            except Exception as error:
                assert not isinstance(error, MemoryError), source
            else:
                raise AssertionError(source)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    import os
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        input=json.dumps([[*HOSTILE.values()], MESSAGES]),
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 512  # MiB


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{% for m in %}",
     "{% for i in range(2) %}" * 40 + "{% endfor %}" * 40, "x" * (1 << 21), "{% generation %}", "{{ 'a' | nofilter }}"],
)  # fmt: skip
def test_sources_that_cannot_be_compiled(source):
    with pytest.raises(UserError) as raised:
        Renderer(source, "the template t")
    assert str(raised.value).startswith("the template t") and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_long_conversations_are_within_the_budget():
    """2,000 turns, in a template that goes over all of them for each."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(2000)]
    special = [token for token in chat_templates.TEMPLATES["qwen3"].special if token]
    tokenizer = chat_templates.tokenizer_of("qwen3", bpe(special))
    renderer = Renderer(chat_templates.source("qwen3"), "t")
    text = renderer.render(size_of(messages), messages=messages, tools=None, add_generation_prompt=True).text
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_a_limit_is_not_an_error_of_ours():
    with pytest.raises(Refused, match="does not end, or does far more than render a conversation"):
        Renderer(HOSTILE["loops"], "t").render(0, messages=[])


@examples(150)
@given(
    st.lists(
        st.sampled_from([*EXPRESSIONS, "x", "(", ")", "{% for i in range(9) %}", "{% endfor %}", "{{", "}}", "~", "|"])
    )
)
def test_any_nonsense(parts):
    source = "{% set x = 1 %}{{ " + " ~ ".join(parts) + " }}"
    try:
        renderer = Renderer(source, "t")
    except UserError:
        return
    try:
        renderer.render(size_of(MESSAGES), messages=MESSAGES)
    except Exception as error:
        assert told(error)
