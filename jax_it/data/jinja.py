"""Jinja environments for untrusted templates: a rendering ends, and stays small.

Jinja's sandbox keeps a template from files and attributes, but not from loops within loops, nor from texts that double
at every turn. Here each turn of a loop, each call, filter and operator is counted, and what goes in and comes out is
measured; where one step could make much of little, as `replace` and `%` can, its result is estimated first. The count
decides, so that a template is refused on every machine or on none; processor time is the last resort.
"""

import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jinja2
import jinja2.nodes as nodes
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.visitor import NodeTransformer

SOURCE = 200_000  # characters of a template
STEPS = 1_000_000  # of a rendering
SIZE = 10_000_000  # characters of a value, with all that it holds
ITEMS = 500_000  # that it holds
MADE = 200_000_000  # characters of all texts that a rendering makes on the way
SECONDS = 10.0  # of processor time, of a rendering
_SLOW = 100_000  # characters that filters take whose time may grow with the square of them
_BITS = 100_000  # of a whole number

_state = threading.local()  # .budget: that of the rendering under way in this thread


class TooMuch(jinja2.TemplateError):
    """Raised by a template that would take too long, or make too much."""


class _Budget:
    def __init__(self) -> None:
        self.steps, self.made, self.until = STEPS, MADE, time.thread_time() + SECONDS


def _step() -> None:
    budget = getattr(_state, "budget", None)
    if budget is None:  # of constants, when a template is compiled
        return
    budget.steps -= 1
    if budget.steps < 0:
        raise TooMuch(f"it takes more than {STEPS:,} steps")
    if budget.steps % 16 == 0 and time.thread_time() > budget.until:
        raise TooMuch(f"it takes more than {SECONDS:.0f} seconds")


def _check(size: int) -> None:
    if size > SIZE:
        raise TooMuch(f"it makes a value of more than {SIZE:,} characters")


def _made(value: Any) -> Any:
    """Measure a value, charge it to the budget and return it."""
    if not isinstance(value, str | bytes):
        _measure(value)
        return value
    _check(len(value))
    budget = getattr(_state, "budget", None)
    if budget is not None:
        budget.made -= len(value)
        if budget.made < 0:
            raise TooMuch(f"it makes texts of more than {MADE:,} characters on the way")
    return value


def _measure(*values: Any) -> int:
    """Count the characters of values and all that they contain, as often as they contain it. Raises TooMuch."""
    size, items = 0, 0
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        items += 1
        if type(value) is str:  # nearly all are
            size += len(value)
            continue
        if type(value) is dict:
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, bool | float | None):
            size += 1
        elif isinstance(value, int):
            if value.bit_length() > _BITS:
                raise TooMuch("it makes a number of too many digits")
            size += 1 + value.bit_length() // 8
        elif isinstance(value, range):
            size += len(value)
        elif isinstance(value, Mapping):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            size += 1
            waiting += value
        elif isinstance(value, jinja2.utils.Namespace):
            waiting += [object.__getattribute__(value, "_Namespace__attrs")]
        else:
            size += 1
        if size > SIZE or items + len(waiting) > ITEMS:
            break
    _check(size)
    if items + len(waiting) > ITEMS:
        raise TooMuch(f"it makes a value of more than {ITEMS:,} items")
    return size


def _numbers(values: Iterable[Any]) -> int:
    """Return the largest whole number among the values, or 0."""
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _estimate_format(template: Any, values: Iterable[Any]) -> None:
    """Check what `%` and `format` would make: fields whose width digits in the template, or a value, may say."""
    text, given = str(template), list(values)
    digits, width = 0, 0
    for character in text:
        digits = min(digits * 10 + int(character), SIZE + 1) if character in "0123456789" else 0
        width = max(width, digits)
    nested = "*" in text or re.search(r"\{[^{}]*\{", text)  # the width is a value
    fields = text.count("%") + text.count("{")
    _check(len(text) + fields * (_measure(*given) + width + (_numbers(given) if nested else 0)))


def _estimate_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


_METHODS = types.BuiltinMethodType | types.FunctionType  # of texts, numbers and lists; functions wrap `format`


def _estimate_call(function: Any, args: tuple[Any, ...], values: list[Any]) -> None:
    """Check what a method of a text or number would make."""
    owner, name = (
        getattr(getattr(function, "__wrapped__", function), "__self__", None),
        getattr(function, "__name__", ""),
    )
    if isinstance(owner, list | dict | set):
        _measure(owner)  # which the call may lengthen
    if isinstance(owner, int) or name in ("center", "ljust", "rjust", "zfill"):
        _check(_numbers(values))
    elif not isinstance(owner, str | bytes):
        return
    elif name in ("format", "format_map"):
        _estimate_format(owner, [*values, 0])
    elif name == "replace" and len(args) > 1:
        _estimate_replace(owner, *args)
    elif name == "join":
        _check(len(owner) * _measure(*args))
    elif name == "expandtabs":
        _check(len(owner) * max(8, _numbers(values)))
    elif name == "translate":
        table = args[0] if args and isinstance(args[0], Mapping) else {}
        _check(len(owner) * max((len(to) for to in table.values() if isinstance(to, str)), default=1))


_ESTIMATED = frozenset(
    """
    center batch slice tojson truncate wordwrap urlize round striptags title wordcount pprint replace format indent join
    """.split()
)


def _bounded_filter(name: str, function: Callable) -> Callable:
    """Return a filter that is counted, and whose result is estimated and measured."""
    estimated = name in _ESTIMATED
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment, which comes first

    @wraps(function)  # with what says whether it comes
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        if name == "join" and len(args) > skipped and isinstance(args[skipped], Iterator):
            args = (*args[:skipped], list(args[skipped]), *args[skipped + 1 :])  # so that it can be measured
        given = [*args[skipped:], *kwargs.values()]
        _measure(*given)
        if not estimated:
            return _made(function(*args, **kwargs))
        value, *options = given or [None]
        if name in ("center", "batch", "slice", "tojson", "truncate", "wordwrap", "urlize", "round"):
            _check(_numbers(options))
        if name in ("striptags", "urlize", "wordwrap", "title", "wordcount", "pprint") and _measure(value) > _SLOW:
            raise TooMuch(f"the filter {name} takes at most {_SLOW:,} characters")
        if name == "replace" and len(options) > 1:
            _estimate_replace(value, *options)
        elif name == "format":
            _estimate_format(value, options)
        elif name in ("indent", "tojson", "wordwrap", "urlize"):
            longest = max([1, _numbers(options), *(len(option) for option in options if isinstance(option, str))])
            _check(_measure(value) * longest)
        elif name == "join" and options and isinstance(options[0], str):
            _check(_measure(value) * (1 + len(options[0])))
        return _made(function(*args, **kwargs))

    return bounded


class _Counted(NodeTransformer):
    """Counts each turn of a loop, and measures each list, mapping and text that is put together."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        turn = nodes.Filter(nodes.Const(None), "_turn", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
        if node.test is not None:
            node.test = nodes.Filter(node.test, "_turn", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load")
        return nodes.Filter(parts, "_concat", [], [], None, None).set_lineno(node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_literal", [], [], None, None).set_lineno(node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if node.ctx != "load":  # the names of a loop or an assignment
            return node
        return nodes.Filter(node, "_literal", [], [], None, None).set_lineno(node.lineno)


@jinja2.pass_context  # so that it is not a constant
def _turn(context: Any, value: Any) -> Any:
    _step()
    return value


@jinja2.pass_environment
def _concat(environment: jinja2.Environment, parts: tuple[Any, ...]) -> str:
    _measure(*parts)
    join = jinja2.runtime.markup_join if environment.autoescape else jinja2.runtime.str_join
    return _made(join(parts))


_FILTERS = {name: _bounded_filter(name, function) for name, function in DEFAULT_FILTERS.items()}
_FILTERS |= {"_turn": _turn, "_concat": _concat, "_literal": _made}


@contextmanager
def _budgeted() -> Iterator[None]:
    before = getattr(_state, "budget", None)
    _state.budget = _Budget()
    try:
        yield
    finally:
        _state.budget = before


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        with _budgeted():
            return super().render(*args, **kwargs)


def render_before(template: jinja2.Template, mark: str, fields: Mapping[str, Any]) -> str:
    """Return a template's text up to a mark in it; the rest is not computed. Raises TooMuch."""
    parts = []
    with _budgeted():
        for part in template.generate(fields):
            before, found, _ = part.partition(mark)
            parts.append(before)
            if found:
                break
        return str(template.environment.concat(parts))


class Environment(SandboxedEnvironment):
    """A sandbox whose renderings are bounded; templates may change lists and mappings. Raises TooMuch."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})
    template_class = _Template

    def __init__(self, finalize: Callable[[Any], Any] | None = None, **options: Any):
        def measured(value: Any) -> Any:
            if not isinstance(value, str):  # whose length counts where the parts are put together
                _measure(value)
            return value if finalize is None else finalize(value)

        super().__init__(finalize=measured, **options)
        self.globals.pop("lipsum", None)  # random text
        self.filters |= _FILTERS

    def add_filter(self, name: str, function: Callable) -> None:
        self.filters[name] = _bounded_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise TooMuch(f"a template of more than {SOURCE:,} characters")
        return _Counted().visit(super()._parse(source, name, filename))

    def concat(self, parts: Iterable[str]) -> str:
        """Join the parts of a template, a macro or a block."""
        found = list(parts)
        _check(sum(map(len, found)))
        return _made("".join(found))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        _measure(left, right)
        if operator == "%" and isinstance(left, str | bytes):
            _estimate_format(left, right if isinstance(right, tuple) else [right])
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if digits > _BITS:
                raise TooMuch("it makes a number of too many digits")
        elif operator == "*":
            _check(_measure(left) * _numbers([right]) if isinstance(right, int) else _measure(right) * _numbers([left]))
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        if getattr(__function, "__name__", "") == "join":
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)  # so that it can be measured
        values = [*args, *kwargs.values()]
        _measure(*values)
        if isinstance(__function, _METHODS):
            _estimate_call(__function, args, values)
        return _made(super().call(__context, __function, *args, **kwargs))


class ImmutableEnvironment(Environment, ImmutableSandboxedEnvironment):
    """The same, for templates that may not change anything."""
