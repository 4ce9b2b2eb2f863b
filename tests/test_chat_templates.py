# ruff: noqa: E501 (a template is one line)
"""Chat templates: the text that transformers' own Jinja environment gives, or an error where it raises one."""

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import candle_llama
import llama_cpp_source
from jinja_reference import CONVERSATIONS, MESSAGES, check, rendered

FEATURES = r"""
{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if not loop.last }}{% endfor %}
{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}
{% for m in [] %}x{% else %}empty{% endfor %}
{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}
{% for x in none %}{% endfor %}
{% for x in undefined_name %}x{% else %}empty{% endfor %}
{% for x in 5 %}{% endfor %}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}
{% for c in 'héy' %}{{ c }},{% endfor %}
{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen }}
{% macro f(a, b='x', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }}{{ f(1, c=2) }}{{ f(a='é') }}
{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}in{% endcall %}
{% macro f() %}[{{ caller(1) }}]{% endmacro %}{% call(x) f() %}in{{ x }}{% endcall %}
{% set x %}a{{ 1 }}b{% endset %}{{ x }}{{ x | length }}
{% filter upper %}a{{ 'b' }}{% endfilter %}
{% generation %}a{% set hidden = 1 %}{% endgeneration %}{{ hidden is defined }}
  {%- generation +%}  a {%- endgeneration %}  b
{% raw %}{% generation %}{{ x }}{% endraw %}
{# {% generation %} #}a
{{ none is iterable }}{{ undefined_name is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}{{ {} is iterable }}
{{ none is none }}{{ none is defined }}{{ undefined_name is defined }}{{ undefined_name is none }}
{{ 'a' is string }}{{ 1 is string }}{{ {} is mapping }}{{ [] is mapping }}{{ [] is sequence }}{{ {} is sequence }}
{{ true is true }}{{ 1 is true }}{{ false is false }}{{ 1 is number }}{{ 1.5 is number }}{{ 1 is integer }}{{ true is integer }}{{ 1.5 is float }}
{{ true is boolean }}{{ 2 is even }}{{ 3 is odd }}{{ 1 is eq 1 }}{{ 1 is in [1] }}{{ 'x' is in 'xy' }}
{{ tools is none }}{{ documents is none }}{{ tools }}{{ documents }}
{{ none }}{{ true }}{{ false }}{{ 1.0 }}{{ 1e20 }}{{ [1, 'a', none, "it's", true, 1.5] }}{{ {'a': [1, {'b': 'c'}]} }}{{ (1, 'a') }}
{{ undefined_name }}|{{ undefined_name ~ 'x' }}
{{ undefined_name.x }}
{{ undefined_name + 'x' }}
{{ messages[0].missing }}|{{ messages[9] }}|{{ messages[-1].role }}|{{ messages[-9] }}
{{ messages[1:] | length }}{{ messages[:-1] | length }}{{ messages[::-1][0].role }}{{ messages[::2] | length }}{{ messages[5:] }}
{{ 'héllo'[1:3] }}{{ 'héllo'[::-1] }}{{ 'héllo'[-2:] }}{{ 'héllo'[3:0:-2] }}{{ [1,2,3][-100:100] }}{{ (1,2,3)[1:] }}
{% set n = none %}{{ n[1:] }}
{% set n = true %}{{ n[1:] }}
{% set n = {} %}{{ n[1:] }}
{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 % -3 }}{{ 7 / 2 }}{{ 6 / 2 }}{{ 2 ** 3 }}{{ 7.5 % 2 }}{{ -7.5 % 2 }}
{{ 1 + 1.5 }}{{ true + 1 }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 'a' + 'b' }}
{{ 'a' + 1 }}
{{ 1 + 'a' }}
{{ [1] + (2,) }}
{{ none + 'a' }}
{{ ('ẞ' * 3000000 ~ '😀' * 2000000) | length }}{{ ('é ' * 400000).split() | length }}
{{ 'ab' * 3 }}{{ 3 * 'ab' }}{{ [1] * 2 }}{{ 'a' * -1 }}{{ (1,) * 2 }}{{ 2 * 3.5 }}
{{ 'a' * 'b' }}
{{ 'a' * 1.5 }}
{{ 1 ~ none ~ true ~ 1.5 ~ [1, 'a'] ~ {'a': 1} }}
{{ 'a' ~ 'b' | upper ~ 'c' }}{{ ('a' ~ 'b') | upper }}{{ 1 + 2 ~ 3 * 4 }}
{{ 1 / 0 }}
{{ 1 % 0 }}
{{ '%s is %d (%.2f)' % ('x', 3, 1.5) }}{{ '%5d|%-5s|%05d|%x' % (1, 'a', 2, 255) }}{{ '%r %%' % 'a' }}
{{ '%(a)s-%(b)s' % {'a': 1, 'b': 'x'} }}
{{ '%s' % messages[0].role }}{{ '%s' % [1, 2] }}
{{ '%s %s' % 'a' }}
{{ '%d' % 'a' }}
{{ 1 < 2 < 3 }}{{ 'a' < 'b' }}{{ 1 < 1.5 }}{{ 1 == 1.0 }}{{ 'a' == 1 }}{{ [1] == [1] }}{{ none == undefined_name }}
{% set n, a, t = none, 'a', true %}{{ 1 < 2 == 2 }}{{ t == 1 == 1.0 }}{{ 2 < 1 < n }}{{ a in 'ab' != 'b' }}{{ a not in 'b' == 'b' }}{{ 3 > 2 >= 2 <= 2 > 1 }}
{% set n, t = none, true %}{{ 0 < t == n }}{{ t < 2 != n }}{{ n == n != t }}{{ (0 < t) == 1 }}
{% set n = none %}{{ 0 < n == 0 }}
{% set n = none %}{{ 0 < 1 < n }}
{% set n = 5 %}{{ 0 in n == n }}
{% set ns = namespace(n=0) %}{% macro f() %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endmacro %}{{ '0' < f() < 'a' }}{{ ns.n }}{{ 'b' < f() < f() }}{{ ns.n }}
{% set a, b, t = [1, 'x'], [1, 2], (1, 2) %}{{ a == b }}{{ b == t }}{{ [t] == [t] }}{{ [true] == [1.0] }}{{ [t] > [(1, 1, 9)] }}{{ [1] < b }}{{ b <= [1] }}
{% set a, b = [1, 'x'], [1, 2] %}{{ a < b }}
{% set a, b = [1, 2], (1, 3) %}{{ a < b }}
{% set a, b = {'a': true, 'b': 2}, {'b': 2.0, 'a': 1} %}{{ a == b }}{{ [] in [[], a] }}{{ b in [a] }}{{ (1,) in [[1]] }}
{% set a, b = {}, {} %}{{ a < b }}
{% set s = 'nan' %}{% set n = s | float %}{{ n == n }}{{ n != n }}{{ n < n }}{{ n >= 1 }}{{ 1 < n }}
{{ messages[0].role < 1 }}
{{ tools < 1 }}
{{ 'a' in 'abc' }}{{ 'x' not in 'abc' }}{{ 1 in [1, 2] }}{{ 'role' in messages[0] }}{{ 'x' in undefined_name }}
{{ loop_index in 'abc' }}
{{ tools in 'abc' }}
{{ 'a' in none }}
{{ 'a' if false }}|{{ 'a' if true else 'b' }}|{{ none or 'x' }}|{{ '' and 'y' }}|{{ not none }}
{{ messages[0].content | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=True, ensure_ascii=True) }}
{{ {'a': [1, 2.5, none, true]} | tojson(separators=(',', ':')) }}{{ [] | tojson(indent=4) }}{{ {} | tojson(indent=4) }}
{{ messages | map(attribute='role') | tojson }}
{{ range(3) | tojson }}
{{ undefined_name | tojson }}
{{ messages | map(attribute='role') | list }}{{ messages | map(attribute='role') | join(', ') }}{{ ['a', 'b'] | map('upper') | join }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', '==', 'user') | map(attribute='role') | list }}
{{ messages | selectattr('content') | list | length }}{{ [1, 2, 3] | select('odd') | list }}{{ [1, none] | reject('none') | list }}
{{ none | selectattr('a') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | length }}
{{ 'yes' if (messages | selectattr('role', 'equalto', 'nobody')) else 'no' }}
{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | items | list }}{{ {'b': 1, 'a': 2} | list }}{{ {'b': 1} | length }}
{{ [3, 1, 2] | sort }}{{ [3, 1, 2] | sort(reverse=true) }}{{ ['b', 'A'] | sort }}{{ messages | sort(attribute='role') | map(attribute='role') | list }}
{{ [1, 1, 2] | unique | list }}{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2] | sum }}{{ [1, 2] | max }}{{ [1, 2] | min }}
{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{{ g[0] }};{% endfor %}
{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [] | first }}{{ 'abc' | first }}{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}
{{ none | list }}
{{ none | length }}
{{ none | join }}
{{ undefined_name | length }}{{ undefined_name | list }}{{ undefined_name | default('d') }}{{ '' | default('d', true) }}{{ none | d('x') }}
{{ ' a ' | trim }}{{ 'aXa' | lower | upper | title | capitalize }}{{ 'a-b' | replace('-', '+') }}{{ 'xax' | trim('x') }}
{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(4, true) }}|{{ 'a\nb' | indent(width=1) }}
{{ '3' | int + 1 }}{{ 'x' | int(7) }}{{ '1.5' | float }}{{ 1.25 | round(1) }}{{ 2 | string + 'a' }}{{ -3 | abs }}{{ 2.5 | round | int }}
{{ '%s-%s' | format('a', 1) }}{{ '<a>' | e }}{{ '<a>' | safe + '<b>' }}{{ '<b>' ~ '<a>' | safe }}
{{ 'a' | nonsense }}
{{ 'a' is nonsense }}
{{ 'abc'.upper() }}{{ 'ABC'.lower() }}{{ 'abc def'.title() }}{{ 'ABC'.capitalize() }}{{ 'a,b'.split(',') }}{{ ' a  b '.split() }}
{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a '.strip() }}{{ 'xxaxx'.strip('x') }}{{ ' a '.lstrip() }}|{{ ' a '.rstrip('a ') }}
{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.find('c') }}{{ 'abc'.find('x') }}{{ 'aXbX'.replace('X', 'y', 1) }}
{{ ', '.join(['a', 'b']) }}{{ 'aba'.count('a') }}{{ 'a\nb'.splitlines() }}{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}{{ '{}-{}'.format(1, 'a') }}
{{ ', '.join([1]) }}
{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'abc'.partition('b') }}{{ 'abc'.partition('x') }}{{ 'abc'.rfind('c') }}
{{ messages[0].keys() | list }}{{ messages[0].values() | list }}{{ messages[0].get('role') }}{{ messages[0].get('x') }}{{ messages[0].get('x', 1) }}
{{ {'items': [1], 'a': 2}.items() | list }}{{ {'items': 1}['items'] }}
{{ [1, 1].count(1) }}{{ {'a': 1}.copy() }}
{{ [].append(1) }}
{% do messages.append(1) %}
{{ {'a': 1}.update({'b': 2}) }}
{{ messages.__class__ }}
{{ raise_exception('a message') }}
{{ dict(a=1, b='x') }}{{ range(3) | list }}{{ range(5, 1, -2) | list }}
{{ range(1000000) | list }}
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set x = [1, 2] %}{% for a in x %}{% set x = [] %}{% endfor %}{{ x }}
{%- if true -%}   a   {%- endif -%}   b
{% if messages[0]['role'] == 'system' and not tools %}a{% elif tools %}b{% else %}c{% endif %}
{{ bos_token + 'x' + eos_token }}
{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}
{{ 'a' 'b' }}{{ "\u00e9\n" }}{{ 'it\'s' }}
{{ f(*[1]) }}
{% include 'x' %}
{% if %}
{{ 'unclosed }}
{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}
{% block a %}in{% endblock %}
""".strip().split("\n")


# Which names are seen where, and what is an error where it is not reached.
SCOPES = r"""
{% set x = 1 %}{% set y %}{% set x = 2 %}{% set z = 3 %}{{ x }}{% endset %}{{ x }}{{ y }}{{ z is defined }}
{% set x = 1 %}{% filter upper %}a{% set x = 2 %}{{ x }}{% endfilter %}{{ x }}
{% set y | replace('a', x) %}{% set x = 'b' %}aaa{% endset %}{{ y }}
{% set a = 5 %}{% with a = 1, b = a %}{{ a }}{{ b }}{% endwith %}{{ a }}{{ b is defined }}
{% with a = 1 %}{% with a = 2, b = a, c = a %}{{ a }}{{ b }}{{ c }}{% endwith %}{{ a }}{% endwith %}
{% set a = 5 %}{% with a = a + 1 %}{{ a }}{% set a = 9 %}{{ a }}{% endwith %}{{ a }}
{% with (a, b) = (1, 2), c = 3 %}{{ a }}{{ b }}{{ c }}{% endwith %}
{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q is defined }}
{% macro f(a, b=a, c=b ~ 'x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }}|{{ f(1, 2) }}|{{ f(1, c=3) }}
{% set b = 7 %}{% macro f(a=b, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f() }}|{{ f(1) }}
{% macro f(a, b=x) %}{{ a }}{{ b }}{% endmacro %}{% set x = 4 %}{{ f(1) }}
{% macro f() %}{{ x }}{% endmacro %}{{ f() }}{% set x = 4 %}{{ f() }}{% set x = 5 %}{{ f() }}
{% set x = 1 %}{% macro f() %}{% set x = x + 1 %}{{ x }}{% endmacro %}{{ f() }}{{ x }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}
{% macro f(x) %}{% for i in range(2) %}{% set x = i %}{{ x }}{% endfor %}{{ x }}{% endmacro %}{{ f(8) }}
{% macro outer() %}{% macro inner(x) %}{{ x }}{{ y }}{% endmacro %}{% set y = 2 %}{{ inner(1) }}{% endmacro %}{{ outer() }}
{% macro f() %}{{ caller is defined }}{% endmacro %}{{ f() }}{% call f() %}{% endcall %}
{% macro f(caller=none) %}{{ caller is none }}{% endmacro %}{{ f() }}
{% macro f(x) %}[{{ caller(x, y=2) }}]{% endmacro %}{% call(a, y, z=3) f(1) %}{{ a }}{{ y }}{{ z }}{% endcall %}
{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}g{% endmacro %}{{ f() }}
{% for i in [] %}{% else %}{% set q = 1 %}{{ q }}{% endfor %}{{ q is defined }}
{% for i in [1, 2] %}{% break %}{% else %}else{% endfor %}
{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{% else %}else{% endfor %}
{% for i in [1, 2] %}{% continue %}{% else %}else{% endfor %}
{% for i in [1, 2] %}{% set x %}a{{ i }}{% if i == 1 %}{% continue %}{% endif %}b{% endset %}{{ x }}{% endfor %}|
{% for i in [1, 2, 3] %}{% with q = i %}{% if i == 2 %}{% continue %}{% endif %}{{ q }}{% endwith %}{{ q is defined }}{% endfor %}{{ q is defined }}
{% for a in [1, 2] %}{% for b in [3, 4] %}{% if b == 4 %}{% break %}{% endif %}{{ a }}{{ b }}{% else %}e{% endfor %}{% endfor %}
{% for a in [1, 2] %}{% for b in [] %}{% else %}{% if a == 1 %}{% continue %}{% endif %}e{{ a }}{% endfor %}f{% endfor %}
{% for x in [1, [2, []]] recursive %}{{ loop(x) if x is iterable else x }}{% else %}E{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ loop.depth }}{{ loop.index }}{% if x is iterable %}<{{ loop(x) }}>{% endif %}{% endfor %}
{% for x in [none] recursive %}{{ loop(x) }}{% endfor %}
{% for x in [1] recursive %}{{ loop(5) }}{% endfor %}
{% for x in [1] %}{{ loop([2]) }}{% endfor %}
{% for a, b in [(1, 2), 'xy', [3, 4]] %}{{ a }}{{ b }}{% endfor %}
{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}
{% for a, b in [1] %}{{ a }}{% endfor %}
{% set a, b = 'xy' %}{{ a }}{{ b }}
{% set a, b = 'xyz' %}{{ a }}{{ b }}
{% set a, b = {'k': 1, 'l': 2} %}{{ a }}{{ b }}
{% for i in range(5) if i % 2 == 0 %}{{ i }}{{ loop.index }}{{ loop.last }}{% else %}none{% endfor %}
{% for i in range(5) if i > 9 %}{{ i }}{% else %}none{% endfor %}
{% for a, b in [(1, 2), (3, 4)] if a > 1 %}{{ a }}{{ b }}{% endfor %}
{% if x %}{{ y | nonsense }}{% endif %}ok
{{ x | nonsense if x else 'ok' }}
{% if x %}{% for i in [] %}{{ i | nonsense }}{% endfor %}{% endif %}ok
{% if x %}{{ y is nonsense }}{% else %}ok{% endif %}
{% for i in [] %}{{ i | nonsense }}{% endfor %}
{% macro f() %}{{ 1 is nonsense }}{% endmacro %}
{{ 'a' < 1 }}
{{ 1 if true else 'a' < 1 }}
{{ [1] in 'a' }}
{{ +1 }}{{ +true }}{{ 1 + +2 }}{{ -true }}{{ - 3 }}{{ +x.y|default(3) if false else 4 }}
{{ +'a' }}
{{ {(1, 2): 3}[(1, 2)] }}
{{ {[1]: 2} }}
{{ -7 // 2 }}{{ 7 // -2 }}{{ 7.5 // 2 }}{{ -7.5 // 2 }}{{ 0.3 // 0.1 }}{{ -0.0 // 5 }}{{ true // 1 }}{{ 7 // 2.0 }}{{ 2 ** -1 }}{{ 2 ** 0.5 }}{{ (-2) ** 3 }}{{ 0 ** 0 }}{{ 1 ** 999 }}{{ (-1) ** 3 }}{{ true ** 2 }}{{ 2 ** 60 }}
{{ 0 ** -1 }}
{{ 10.0 ** 400 }}
{{ 1 // 0 }}
{{ 1.5 // 0 }}
{% autoescape true %}{{ '<' }}{{ '<' | safe }}{% set x %}<{{ '>' }}{% endset %}{{ x }}{% endautoescape %}{{ '<' }}
{% autoescape false %}{{ '<' }}{% endautoescape %}
{% autoescape tools is none %}{{ '<' }}{{ '<' ~ ('>' | safe) }}{% endautoescape %}{% autoescape [] %}{{ '<' ~ 1 }}{% endautoescape %}
{% macro f() %}{{ caller() }}{{ '<' }}{% endmacro %}{% autoescape true %}{% call f() %}<{{ '>' }}{% endcall %}{{ f | e }}{% endautoescape %}
{% call dict() %}{% endcall %}
{% set x %}{% call dict() %}{% endcall %}{% endset %}
{% if false %}{% include 'x' %}{% endif %}a
{% extends 'x' %}
{% from 'x' import y %}
{% import 'x' as y %}
{% do 1 %}
{% set ns = namespace(a=1) %}{% set ns.a, b = 5, 6 %}{{ ns.a }}{{ b }}
{% set ns = namespace() %}{% set ns.t %}a{{ 1 }}{% endset %}{{ ns.t }}
{% set d = {} %}{% set d.x = 1 %}
{{ dict(a=1, **{'b': 2}) }}{{ range(*[1, 3]) | list }}
{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(*[1], **{'b': 2}) }}{{ f(*'xy') }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f() }}|{{ f(none) }}|{{ f.name }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}
{% block a %}{{ messages[0].role }}{% endblock %}{{ self.a() }}
""".strip().split("\n")


@pytest.mark.parametrize("template", FEATURES + SCOPES)
def test_a_feature(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)


@pytest.mark.parametrize(
    "template",
    [
        "  {% if true %}\n a\n  {% endif %}\nb\n",
        "{{ 1 }}\n\n",
        "a\n{# c #}\n b",
        "{%- if true +%}\n a {% endif %}\n",
        "a  {{- 1 -}}  b\n{{ 2 }}\n",
    ],
)
def test_whitespace(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)


def test_templates_of_many_models(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str]) -> None:
    folder = llama_cpp_source.models_folder() / "templates"
    paths = sorted(folder.glob("*.jinja"))
    assert len(paths) > 50
    for path in paths:
        for messages, tools in CONVERSATIONS.values():
            for generation in (False, True):
                check(tokenizer, special_tokens, path.read_text(), messages, tools, generation)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content | trim }}<|im_end|>{% endfor %}"
    "{{ messages | tojson }}{{ messages }}"
)


# Whether repr escapes a character that this Python's Unicode does not know depends on the Python.
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=1, max_size=4))
def test_any_content(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], contents: list[str]
) -> None:
    check(tokenizer, special_tokens, CHATML, [{"role": "user", "content": text} for text in contents])


# Names, as Jinja computes with constants before it runs, and takes some errors for undefined values there.
VALUES = ["0", "1", "-3", "7", "2.5", "true", "none", "'a'", "'%s'", "'é b'", "[1]", "['x', 2]", "(1, 2)"]
NAMES = [f"v{index}" for index in range(len(VALUES))]
ATOMS = st.sampled_from(NAMES)
# Without `**`: a power of a negative number may be a complex one.
OPERATORS = st.sampled_from(
    ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]
)
UNARY = st.sampled_from(["-", "+", "not "])
FILTERS = st.sampled_from(
    ["string", "length", "int", "float", "list", "abs", "upper", "title", "first", "last", "sum", "sort", "e"]
)
SUBSCRIPTS = st.sampled_from(["0", "-1", "1:", "::-1", ":2"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, OPERATORS, inner).map(" ".join),
        st.tuples(inner, OPERATORS, inner).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(UNARY, inner).map(lambda parts: f"({parts[0]}({parts[1]}))"),
        st.tuples(inner, FILTERS).map(lambda parts: f"({parts[0]}) | {parts[1]}"),
        st.tuples(inner, SUBSCRIPTS).map(lambda parts: f"({parts[0]})[{parts[1]}]"),
        st.tuples(inner, ATOMS).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[1]})"),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_any_expression(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], expression: str
) -> None:
    template = "{% set " + ", ".join(NAMES) + " = " + ", ".join(VALUES) + " %}{{ " + expression + " }}"
    check(tokenizer, special_tokens, template)


def test_the_clock_is_the_local_one(tokenizer: candle_llama.Tokenizer) -> None:
    form = "%d %b %Y %A %-d %B %j %y"
    before = datetime.now().strftime(form)
    text = rendered(tokenizer, "{{ strftime_now('" + form + "') }}")
    assert text in (before, datetime.now().strftime(form))


def test_the_message_of_raise_exception_is_passed_on(tokenizer: candle_llama.Tokenizer) -> None:
    with pytest.raises(ValueError, match="line 2: Roles must <alternate> é"):
        rendered(
            tokenizer,
            "\n{% macro f() %}{{ raise_exception('Roles must <alternate> é') }}{% endmacro %}{{ f() }}",
        )


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"thinking": "hm"}, {"thinking": "hm", "role": "assistant", "reasoning_content": "hm"}),
        (
            {"reasoning": "hm"},
            {"thinking": "hm", "role": "assistant", "reasoning": "hm", "reasoning_content": "hm"},
        ),
        (
            {"reasoning_content": "a", "thinking": "b"},
            {"thinking": "b", "role": "assistant", "reasoning_content": "a"},
        ),
        (
            {"reasoning_content": None, "thinking": "b"},
            {"thinking": "b", "role": "assistant", "reasoning_content": "b"},
        ),
        ({"reasoning": None}, {"role": "assistant", "reasoning": None}),
    ],
)
def test_reasoning_has_the_names_that_transformers_gives_it(
    tokenizer: candle_llama.Tokenizer, given: dict[str, Any], seen: dict[str, Any]
) -> None:
    text = rendered(tokenizer, "{{ messages[0] | tojson }}", [{"role": "assistant", **given}])
    assert text == json.dumps(seen)


def test_variables_of_the_caller(tokenizer: candle_llama.Tokenizer) -> None:
    text = tokenizer.apply_chat_template(
        MESSAGES,
        chat_template="{{ enable_thinking }}{{ documents | length }}{{ deep.a[0] }}",
        add_generation_prompt=False,
        enable_thinking=False,
        documents=[1],
        deep={"a": [None]},
    )
    assert text == "False1None"
