"""Chat templates as programs of a stranger: rendered as transformers renders them, with bounded time and memory.

A template comes with a model's folder. Jinja's sandbox keeps it from Python; here it is also kept from looping, from
growing without end and from recursing: every iteration, call, filter and operator charges a budget by the characters
that it goes over, and whatever a template raises becomes one UserError. The budget is a count and not a clock, so a
template that renders does so on every machine; the clock is the second line of defence.

Extensions are those of transformers: `{% generation %}`, `{% break %}`, `{% continue %}`, `tojson`, `raise_exception`,
`strftime_now`.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError

MAX_SOURCE = 1 << 20  # characters of a template; the longest in use have 20,000
MAX_WORK = 1 << 26  # characters that a rendering may go over, and
WORK_PER_CHARACTER = 256  # so many more for each character of its input
MAX_SECONDS = 5.0  # of this thread's processor time, for one rendering
_BETWEEN_LOOKS = 1 << 22  # characters of the budget from one look at the clock to the next
_STEP = 64  # characters that an iteration or a call counts as, beside its operands
_LONGEST_NUMBER = 10_000  # in a call: what pads, repeats or indents
_WIDTH = re.compile(r"\d{5,}|[%{][^{}a-z]*[*{]")  # in a format string: a large width, or one that is an argument
_DEEP = frozenset("tojson string pprint join format escape e urlencode xmlattr sum sort unique groupby min max".split())
_GROWS = frozenset("replace join translate expandtabs format format_map indent batch slice sum wordwrap".split())
_WEIGHED, _STEPPED, _JOINED = "_weighed", "_step", "_joined"  # filters, which compiled templates call directly
# Tests that look at no more than a type or an identity; what a loop does of these, its steps charge (see `_parse`).
_INSTANT = frozenset("none defined undefined string mapping number boolean true false integer float sameas".split())
_SCALARS = (str, int, float, bool, type(None), jinja2.Undefined)
# What attribute of one is safe depends on its name alone.
_PLAIN = frozenset([str, list, tuple, dict, jinja2.utils.Namespace, jinja2.runtime.LoopContext])
_MOST_NAMES = 1 << 10


class Refused(Exception):
    """A limit that a template ran into."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and where in it the template's {% generation %} blocks lie: (start, stop) each."""

    text: str
    generated: tuple[tuple[int, int], ...]


class Renderer:
    """A compiled chat template. Raises UserError, naming `description`, where it cannot be compiled.

    source         of the template
    variables      names that the template reads and does not set itself
    marks_replies  whether it says with {% generation %} what the assistant writes
    """

    def __init__(self, source: str, description: str):
        self.source, self._description = source, description
        if len(source) > MAX_SOURCE:
            raise UserError(
                f"{description} has {len(source):,} characters, more than {MAX_SOURCE:,}", "give another one"
            )
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self.marks_replies = any(
                isinstance(call.node, nodes.ExtensionAttribute) for call in tree.find_all(nodes.Call)
            )
            self._template = self._environment.from_string(source)
        except Exception as error:  # jinja's own errors, and Python's where the source nests too deep
            raise UserError(
                f"{description} is not valid jinja ({told(error)})", "fix it, or give another --template"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Renderer, (self.source, self._description)  # what is compiled cannot be pickled

    def render(self, size: int, **variables: Any) -> Rendered:
        """Render with `variables`, whose texts have `size` characters in all.

        Raises Refused for a limit, and whatever else the template raises.
        """
        environment = self._environment
        environment.begin(MAX_WORK + WORK_PER_CHARACTER * size)
        blocks = self._template.root_render_func(self._template.new_context(variables))
        text = "".join(environment.collected(blocks) if self.marks_replies else blocks)
        return Rendered(text, tuple(environment.generated))


def size_of(value: Any) -> int:
    """Return the characters of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    if isinstance(value, (dict, Mapping)):
        return sum(size_of(key) + size_of(item) for key, item in value.items())
    return 1


def told(error: BaseException) -> str:
    """Return what a template raised, in words."""
    if isinstance(error, RecursionError):
        return "it nests or calls itself too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, ZeroDivisionError):
        return "it divides by zero"
    return f"{error!s:.300}" or type(error).__name__


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: notes where its text comes to lie."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        start = self.environment.written
        self.environment.generated.append((start, start + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._printed
        )
        self.budget = self._look_at = self.written = 0
        self._deadline: float | None = None
        self.generated: list[tuple[int, int]] = []
        self._safe: dict[tuple[type, str], bool] = {}
        self.filters = {name: self._charged(name, work) for name, work in self.filters.items()}
        self.filters["tojson"] = self._charged("tojson", _to_json)
        self.filters |= {_WEIGHED: self._weighed, _STEPPED: self._step, _JOINED: self._joined}
        charged = {name: self._charged(name, work) for name, work in self.tests.items() if name not in _INSTANT}
        self.tests = {**self.tests, **charged}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "range": self._range}

    def begin(self, budget: int) -> None:
        """Start a rendering."""
        self.budget, self._deadline, self.written, self.generated = budget, None, 0, []
        self._look_at = max(budget - _BETWEEN_LOOKS, 0)

    def collected(self, blocks: Any) -> Any:
        """Yield the blocks of a rendering, with `written` kept up to date."""
        for block in blocks:
            yield block
            self.written += len(block)

    def charge(self, characters: int) -> None:
        self.budget -= characters + _STEP
        if self.budget < self._look_at:
            self._look()

    def _look(self) -> None:
        """Look at the budget and the clock, which is too slow to be asked at every step."""
        if self.budget < 0:
            raise Refused("it does not end, or does far more than render a conversation")
        now = time.thread_time()
        self._deadline = now + MAX_SECONDS if self._deadline is None else self._deadline
        if now > self._deadline:
            raise Refused(f"it takes longer than {MAX_SECONDS:g} s")
        self._look_at = max(self.budget - _BETWEEN_LOOKS, 0)

    # What the compiled template calls. It is given the context so that the compiler does not call it by itself.

    @jinja2.pass_context
    def _step(self, context: Any, work: int) -> None:
        """Charge one iteration of a loop, or a call of a macro, whose body has `work` characters and expressions."""
        self.budget -= work + _STEP
        if self.budget < self._look_at:
            self._look()

    @jinja2.pass_context
    def _joined(self, context: Any, *parts: Any) -> str:
        """Return the operator ~."""
        texts = [str(self._printed(part)) for part in parts]
        self.charge(sum(map(len, texts)))
        return "".join(texts)

    @jinja2.pass_context
    def _weighed(self, context: Any, value: Any) -> Any:
        """Return a side of a comparison, or a list, tuple or dict that the template makes."""
        if isinstance(value, str):
            self.charge(len(value) // 16)
        elif not isinstance(value, _SCALARS):
            self._weigh(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str:  # nearly all there are
            self.charge(len(left) + len(right))
            return left + right
        if operator == "*":
            self.charge(_product(left, right))
        elif operator == "**" and (abs(left) > _LONGEST_NUMBER or abs(right) > 64):
            raise Refused("it computes a power that is too large")
        elif operator == "%" and isinstance(left, str):
            self._check_growth("format", left, (right,))
        elif operator == "+":
            self.charge(_length(left) + _length(right))
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (names of jinja's)
        receiver, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(receiver, (str, list, tuple, dict)):
            __self._check_growth(name, receiver, (*args, *kwargs.values()))
        elif isinstance(__obj, type):  # dict(...), namespace(...): they may hold what they are given several times
            __self._weigh([*args, *kwargs.values()])
        else:
            __self.charge(0)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Wrap str.format, which is no method of a text any more once the sandbox has made it safe."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._check_growth("format", value.__self__, (*args, *kwargs.values()))
            return safe(*args, **kwargs)

        return formatted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return what the sandbox says of an attribute, which it takes long to find: it is asked once for each."""
        key = type(obj), attr
        if key[0] not in _PLAIN or len(self._safe) > _MOST_NAMES:
            return super().is_safe_attribute(obj, attr, value)
        if key not in self._safe:
            self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._safe[key]

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        if isinstance(argument, slice):
            self.charge(_length(obj))
        return super().getitem(obj, argument)

    def _printed(self, value: Any) -> Any:
        if isinstance(value, str):
            self.charge(len(value))
        else:
            self._weigh(value, printed=True)
        return value

    def _weigh(self, value: Any, printed: bool = False) -> None:
        """Charge all that a value holds, as often as it holds it."""
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, (list, tuple)):
                self.charge(len(item))
                left += item
            elif isinstance(item, dict):
                self.charge(len(item))
                left += [*item, *item.values()]
            elif isinstance(item, str):
                self.charge(len(item) // 16)
            elif printed and not isinstance(item, _SCALARS):
                raise Refused(f"it prints an object ({type(item).__name__})")

    def _charged(self, name: str, work: Any) -> Any:
        """Return a filter or test that charges what it goes over first. Jinja passes some of them its environment
        first.
        """
        at = 0 if getattr(work, "jinja_pass_arg", None) is None else 1

        def charged(*args: Any, **kwargs: Any) -> Any:
            self._check_growth(name, args[at], (*args[at + 1 :], *kwargs.values()))
            return work(*args, **kwargs)

        if at:
            charged.jinja_pass_arg = work.jinja_pass_arg
        return charged

    def _check_growth(self, name: str, receiver: Any, arguments: Sequence[Any]) -> None:
        """Charge a call of a method, filter or test, before it is made, by how long its result may be."""
        numbers = [argument for argument in arguments if isinstance(argument, (int, float))]
        large = [number for number in numbers if not abs(number) <= _LONGEST_NUMBER]
        if name in ("format", "format_map"):
            if _WIDTH.search(str(receiver)):
                raise Refused("it formats with a width that is too large, or an argument")
        elif large and isinstance(receiver, (str, list, tuple, dict)):
            raise Refused(f"it calls {name} with {large[0]:g}, which is too large")
        length = _length(receiver)
        if name in _DEEP or name in _GROWS:
            self._weigh([receiver, *arguments])
        given = sum(map(_length, arguments))
        if name in _GROWS:
            given = sum(map(size_of, arguments))
            length *= max([1, given, *(int(abs(number)) for number in numbers if number not in large)])
        self.charge(length + given)

    def _range(self, *arguments: int) -> range:
        found = range(*arguments)
        if len(found) > 100_000:
            raise Refused(f"it counts to {len(found):,}")
        self.charge(len(found))
        return found

    # What is compiled

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Return the tree of a template whose loops and macros charge their steps, and ~ what it joins."""
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            work = literal + sum(1 for _ in node.find_all(nodes.Expr))
            step = _calls(_STEPPED, [nodes.Const(work)], node.lineno)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        _instrument(tree)
        return tree


def _calls(name: str, arguments: Sequence[nodes.Expr], line: int) -> nodes.Filter:
    first, *others = arguments
    return nodes.Filter(first, name, others, [], None, None).set_lineno(line)


def _instrument(node: nodes.Node) -> None:
    """Put what charges the budget around the ~ operators, comparisons, lists, tuples and dicts below a node."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_instrumented(item, node) if isinstance(item, nodes.Node) else item for item in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _instrumented(value, node))


def _instrumented(node: nodes.Node, parent: nodes.Node) -> nodes.Node:
    _instrument(node)
    if isinstance(node, nodes.Concat):
        return _calls(_JOINED, node.nodes, node.lineno)
    made = isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    compared = isinstance(parent, (nodes.Compare, nodes.Operand)) and isinstance(node, nodes.Expr)
    if isinstance(parent, nodes.Compare) and _is_brief(parent):
        compared = False
    if (made or compared) and not isinstance(node, nodes.Const):
        return _calls(_WEIGHED, [node], node.lineno)
    return node


def _is_brief(compare: nodes.Compare) -> bool:
    """Return whether a comparison is `== constant` or `!= constant`, which goes over no more than the constant."""
    if len(compare.ops) != 1 or compare.ops[0].op not in ("eq", "ne"):
        return False
    return any(isinstance(side, nodes.Const) for side in (compare.expr, compare.ops[0].expr))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _product(left: Any, right: Any) -> int:
    """Return characters or items of left * right."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if abs(left) > 1e300 or abs(right) > 1e300:
            raise Refused("it computes a number that is too large")
        return 1
    many = left if isinstance(left, int) else right if isinstance(right, int) else 1
    return _length(right if isinstance(left, int) else left) * max(many, 1)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
