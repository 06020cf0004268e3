"""Renderings are bounded in time and size, whatever a template does."""

import jinja2
import pytest

from jax_it.data import jinja
from jax_it.data.jinja import Environment, ImmutableEnvironment

BIG = "'x' * 5000000"
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that prints": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "a filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursion of a bounded depth": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a product": "{{ 'x' * 10 ** 10 }}",
    "a product with a list": "{{ ([1] * 10 ** 10) | length }}",
    "a number": "{{ 10 ** (10 ** 10) }}",
    "a number that squares itself": "{% set ns = namespace(x=10) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "a text that doubles": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "a sum that doubles": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "a block that doubles": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "a list of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "a mapping of mappings": "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}"
    "{% endfor %}{{ ns.x }}",
    "mappings by dict": "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}"
    "{% endfor %}{{ ns.x }}",
    "namespaces": "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}"
    "{% endfor %}{{ ns.x }}",
    "replace": "{% set x = " + BIG + " %}{{ x | replace('x', x) }}",
    "the method replace": "{% set x = " + BIG + " %}{{ x.replace('x', x) }}",
    "replace of nothing": "{% set x = " + BIG + " %}{{ x.replace('', x) }}",
    "join": "{% set x = " + BIG + " %}{{ range(9999) | join(x) }}",
    "join of a generator": "{% set x = " + BIG + " %}{{ range(9999) | map('string') | join(x) }}",
    "the method join of a generator": "{% set x = " + BIG + " %}{{ x.join(range(9999) | map('string')) }}",
    "the method join": "{% set x = " + BIG + " %}{{ x.join(x) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "the method center": "{{ 'x'.center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(9999999) }}",
    "indent": "{{ ('a\\n' * 999999) | indent(999999) }}",
    "wordwrap": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='x' * 9999) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "tojson": "{{ {'a': [1, 2]} | tojson(indent=10 ** 10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent with a star": "{{ '%*d' % (9999999999, 1) }}",
    "many percents": "{{ ('%s' * 99999) % ((" + BIG + ",) * 99999) }}",
    "the filter format": "{{ '%9999999999d' | format(1) }}",
    "the method format": "{{ '{:>9999999999}'.format(1) }}",
    "a nested format": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "many fields": "{% set x = " + BIG + " %}{{ ('{0}' * 99999).format(x) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "translate": "{% set x = " + BIG + " %}{{ x.translate({120: x}) }}",
    "bytes of a number": "{{ (5).to_bytes(10 ** 10, 'big') }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "a long template": "x" * 300_000,
    "a deep template": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", [Environment, ImmutableEnvironment])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_would_never_end_or_fill_the_memory_is_refused(name, kind, monkeypatch):
    monkeypatch.setattr(jinja, "STEPS", 20_000)  # a million takes seconds
    monkeypatch.setattr(jinja, "ITEMS", 110_000)
    with pytest.raises(Exception) as raised:
        kind(undefined=jinja2.StrictUndefined).from_string(ENDLESS[name]).render()
    expected = (jinja.TooMuch, OverflowError, RecursionError, jinja2.UndefinedError)
    assert isinstance(raised.value, expected), repr(raised.value)


def test_a_list_that_holds_itself_or_grows_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(jinja, "ITEMS", 1000)
    for text in (
        "{% set x = [1] %}{% for i in range(99) %}{% set _ = x.extend(x) %}{% endfor %}",
        "{% set x = [1] %}{% for y in x %}{% set _ = x.append(y) %}{% endfor %}",
        "{% set x = [] %}{% set _ = x.append(x) %}{{ x | length }}{{ x == x }}{{ x | join }}",
    ):
        with pytest.raises(jinja.TooMuch):
            Environment().from_string(text).render()


def test_what_templates_do_with_long_texts_and_large_numbers_is_let_through():
    text, now = "word\tand {more}\n" * 20_000, 1_700_000_000
    for template, expected in {
        "{% for x in xs %}{{ loop.index }}{{ loop.last }}{% endfor %}": "".join(f"{i}{i == 3}" for i in (1, 2, 3)),
        "{{ '{} {}'.format(now, text) }}": f"{now} {text}",
        "{{ '%s %d' % (text, now) }}": f"{text} {now}",
        "{{ text | replace('\\n', '<br>') | length }}": str(len(text) + 3 * 20_000),
        "{{ text.split('\\n') | length }} {{ now * now }} {{ text[:4] ~ 1 ~ none }}": f"20001 {now * now} word1None",
        "{% set n = namespace(x='') %}{% for i in range(99) %}{% set n.x = n.x ~ i %}{% endfor %}{{ n.x[-2:] }}": "98",
        "{{ ', '.join(['a', 'b']) }} {{ [1, 2] | join('+') }} {{ {'a': 1} | tojson }}": 'a, b 1+2 {"a": 1}',
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}": "123",
        "{% set x %}a{{ now }}{% endset %}{{ x }}{% macro f(y) %}({{ y }}){% endmacro %}{{ f(x) }}": f"a{now}(a{now})",
        "{% for k, v in {'a': 1}.items() %}{{ (k, v) }}{% else %}none{% endfor %}": "('a', 1)",
    }.items():  # fmt: skip
        assert ImmutableEnvironment().from_string(template).render(xs=[1, 2, 3], text=text, now=now) == expected, (
            template
        )


def test_the_bounds_are_those_of_one_rendering(monkeypatch):
    monkeypatch.setattr(jinja, "STEPS", 1000)
    template = Environment().from_string("{% for i in range(900) %}{{ i }}{% endfor %}")
    assert len({template.render() for _ in range(5)}) == 1


def test_processor_time_is_the_last_resort(monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.05)
    with pytest.raises(jinja.TooMuch, match="takes more than"):
        Environment().from_string(
            "{% for i in range(99999) %}{% set x = ('x' * 9999).count('y') %}{% endfor %}"
        ).render()
