# ruff: noqa: E501 (a template is one line)
"""Chat templates: the text that transformers' own Jinja environment gives, or an error where it raises one."""

import json
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

import candle_llama
import llama_cpp_source

Messages = list[dict[str, Any]]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text; what it holds is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def reference(template: str, **variables: Any) -> str:
    """What Jinja gives under transformers' settings."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render(**variables)


MESSAGES: Messages = [
    {"role": "system", "content": 'Be <nice> & "kind".'},
    {"role": "user", "content": "Hi there, it's é"},
    {"role": "assistant", "content": "  Hello\n"},
    {"role": "user", "content": "Bye"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <b>&",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "x"}, "n": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"name": "get_weather", "arguments": {"city": "Paris", "n": 3}}
CONVERSATIONS: dict[str, tuple[Messages, Any]] = {
    "one message": ([{"role": "user", "content": 'Hi <there> & "you"'}], None),
    "system": (MESSAGES, None),
    "tools": (MESSAGES[:2], TOOLS),
    "calls": (
        [
            MESSAGES[1],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}],
            },
            {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny"},
            MESSAGES[3],
        ],
        TOOLS,
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
}


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> candle_llama.Tokenizer:
    return candle_llama.load_tokenizer(tiny)


@pytest.fixture(scope="session")
def special_tokens(tokenizer: candle_llama.Tokenizer) -> dict[str, str]:
    names = ["bos_token", "eos_token"]
    text = tokenizer.apply_chat_template(
        MESSAGES, chat_template="{{ [bos_token, eos_token] | tojson }}", add_generation_prompt=False
    )
    return dict(zip(names, json.loads(text), strict=True))


def rendered(
    tokenizer: candle_llama.Tokenizer,
    template: str,
    messages: Messages = MESSAGES,
    tools: Any = None,
    generation: bool = False,
) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tools=tools, add_generation_prompt=generation
    )


def check(
    tokenizer: candle_llama.Tokenizer,
    special_tokens: dict[str, str],
    template: str,
    messages: Messages = MESSAGES,
    tools: Any = None,
    generation: bool = False,
) -> None:
    """The same text, or an error from both."""
    try:
        expected = reference(
            template,
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=generation,
            **special_tokens,
        )
    except Exception as error:
        with pytest.raises(ValueError, match=r"^chat template"):
            print(error, repr(rendered(tokenizer, template, messages, tools, generation)))
    else:
        assert rendered(tokenizer, template, messages, tools, generation) == expected


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
{{ none[1:] }}
{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 % -3 }}{{ 7 / 2 }}{{ 6 / 2 }}{{ 2 ** 3 }}{{ 7.5 % 2 }}{{ -7.5 % 2 }}
{{ 1 + 1.5 }}{{ true + 1 }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 'a' + 'b' }}
{{ 'a' + 1 }}
{{ 1 + 'a' }}
{{ [1] + (2,) }}
{{ none + 'a' }}
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


@pytest.mark.parametrize("template", FEATURES)
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


# What templates of models that are not Llamas do and Jinja does not do alike.
KNOWN_DIFFERENCES: dict[str, str] = {}


def test_templates_of_many_models(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str]) -> None:
    folder = llama_cpp_source.models_folder() / "templates"
    paths = sorted(folder.glob("*.jinja"))
    assert len(paths) > 50
    for path in paths:
        if path.name in KNOWN_DIFFERENCES:
            continue
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


# Names, as minijinja computes with constants itself, before our operators can.
VALUES = ["0", "1", "-3", "7", "2.5", "true", "none", "'a'", "'%s'", "'é b'", "[1]", "['x', 2]", "(1, 2)"]
NAMES = [f"v{index}" for index in range(len(VALUES))]
ATOMS = st.sampled_from(NAMES)
OPERATORS = st.sampled_from(
    ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, OPERATORS, inner).map(" ".join),
        st.tuples(inner, OPERATORS, inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda text: f"({text}) | string"),
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


DEEP = 100_000
HOSTILE = {
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling captures": "{% set x = 'abcd' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling macros": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(s='abcd') %}"
    "{% for i in range(60) %}{% set ns.s = f(ns.s) %}{% endfor %}",
    "raw text": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "captured raw text": "{% for j in range(99) %}{% set x %}{% for i in range(99999) %}"
    + "x" * 10_000
    + "{% endfor %}{% endset %}{% endfor %}",
    "constants": "{{ 'a' * 99999999 ~ 'b' * 99999999 }}" * 1000,
    "times": "{{ 'a' * 10 ** 18 }}",
    "list times": "{{ ([1] * 1000000) * 1000000 }}",
    "shared lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "deep lists": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "deep dicts": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x }}",
    "deep namespaces": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns == ns }}",
    "width": "{{ '%999999999d' % 1 }}",
    "width of format": "{{ '{:999999999}'.format(1) }}",
    "width of the filter": "{{ '%999999999d' | format(1) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
    "join": "{{ range(99999) | join('b' * 1000000) }}",
    "join method": "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "split": "{% for i in range(99999) %}{% set x = ('a ' * 10000000).split(' ') %}{% endfor %}",
    "characters": "{{ ('a' * 30000000) | list | length }}",
    "batch": "{{ [1] | batch(999999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(999999999999, 'x') | list }}",
    "sums of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "json": "{{ ([['a' * 1000000] * 1000] * 1000) | tojson }}",
    "searching": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% for j in range(99) %}{{ 'b' in s }}{% endfor %}{% endfor %}",
    "comparing": "{% set s, t = 'a' * 30000000, 'a' * 30000000 %}{% for i in range(99999) %}{{ s == t == s }}{% endfor %}",
    "methods": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% set x = s.upper() %}{% endfor %}",
    "items of a string": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% set x = s[29999999] %}{% endfor %}",
    "lengths": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% set x = s | length %}{% endfor %}",
    "slices": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% set x = s[::-1] %}{% endfor %}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a long message": "{{ raise_exception('a' * 30000000) }}",
    "source": "a" * (2 << 20),
    "parentheses": "{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}",
    "lists": "{{ " + "[" * DEEP + "1" + "]" * DEEP + " }}",
    "dicts": "{{ " + "{1:" * DEEP + "1" + "}" * DEEP + " }}",
    "nots": "{{ " + "not " * DEEP + "1 }}",
    "minuses": "{{ " + "-" * DEEP + "1 }}",
    "filters": "{{ 1" + "|abs" * DEEP + " }}",
    "attributes": "{{ messages" + ".a" * DEEP + " }}",
    "subscripts": "{{ messages" + "[0]" * DEEP + " }}",
    "calls": "{{ messages" + "()" * DEEP + " }}",
    "sums": "{{ 1" + "+ x" * DEEP + " }}",
    "comparisons": "{{ 1" + "< x" * DEEP + " }}",
    "ifs": "{{ 1" + " if x else 1" * (DEEP // 2) + " }}",
    "blocks": "{% if 1 %}" * DEEP + "{% endif %}" * DEEP,
    "elifs": "{% if x %}" + "{% elif x %}" * (DEEP // 2) + "{% endif %}",
    "fors": "{% for i in [1] %}" * (DEEP // 2),
    "many sums": ("{{ 1" + "+x" * 1800 + " }}") * 250,
}
RUN = textwrap.dedent("""
    import json, resource, sys, time
    import candle_llama
    tokenizer = candle_llama.load_tokenizer(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=sys.stdin.read())
        error = None
    except ValueError as caught:
        error = str(caught)
    seconds = time.monotonic() - started
    print(json.dumps([error, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
""")


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template(tiny: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny)],
        input=HOSTILE[name],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    error, seconds, kibibytes = json.loads(done.stdout)
    assert error is not None, "no error"
    assert len(error) < 2500
    assert seconds < 10
    assert kibibytes < 1 << 20
