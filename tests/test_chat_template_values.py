# ruff: noqa: E501 (a template is one line)
"""Generators, methods named as attributes, and tags in chat templates: what transformers' own Jinja gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import candle_llama
from jinja_reference import check, rendered

VALUES = r"""
{{ {'items': 1}['items'] }}
{{ {'items': 1}.items is defined }}{{ {}.items is defined }}{{ {}.get is defined }}{{ {}.foo is defined }}{{ 'a'.upper is defined }}{{ [].append is defined }}
{{ 'y' if {}.items else 'n' }}{{ 'y' if 'a'.strip else 'n' }}
{{ {'items': 1}.items is callable }}{{ {}.items is mapping }}{{ 'a'.upper is string }}
{{ {'keys': 1}.keys is number }}
{% set f = 'a'.upper %}{{ f() }}
{% set f = {'a':1}.items %}{{ f()|list }}
{{ {'a':1}['items'] is defined }}
{{ {'a':1}|attr('items') is defined }}
{{ 'abc'['upper'] is defined }}
{% for k, v in {'a':1}.items %}{{ k }}{% endfor %}
{{ [1,2].count is defined }}{{ (1,).index is defined }}{{ none.foo is defined }}
{{ {1:'a',1.0:'b'} }}
{{ {1.0:'a',1:'b'} }}
{{ [{'a':1}]|selectattr('items')|list }}
{{ [{'a':1}]|map(attribute='keys.x')|list }}
{{ [{'a':1}]|map(attribute='get')|list|length }}
{% break %}
{% macro m() %}{% break %}{% endmacro %}
{% for x in [1] %}{% macro m() %}{% break %}{% endmacro %}{{ m() }}{% endfor %}
{% for x in [1] %}{% call m() %}{% break %}{% endcall %}{% endfor %}
{% for x in [1] %}{% set z %}{% break %}{% endset %}{% endfor %}
{% for x in [1] %}{% filter upper %}a{% break %}{% endfilter %}{% endfor %}
{{ namespace is callable }}{{ range is callable }}{{ cycler(1) is callable }}
{{ {}.update is defined }}{{ {'update': 1}.update }}|{{ {'update': 1}['update'] }}
{{ ''.join is defined }}{{ 'x'.format is defined }}
{{ range(3).start }}{{ range(3).stop }}{{ range(3).step }}
{% macro m(a) %}{% endmacro %}{{ m.name }}{{ m.arguments }}{{ m.catch_kwargs }}{{ m.foo is defined }}
{% set g = [{"role":"user","content":"hi"},{"role":"x","content":" yo "}]|map(attribute='role') %}
{% set g = [{"role":"user","content":"hi"},{"role":"x","content":" yo "}]|map(attribute='role') %}{% for r in g %}{{ r }}{% endfor %}|{% for r in g %}{{ r }}{% endfor %}
{% set g = [1,2,3]|select %}{{ g|first }}{{ g|first }}{{ g|list }}{{ g|list }}{{ g|first is defined }}
{% set g = [1,2,3]|select %}{{ 2 in g }}{{ g|list }}{{ 5 in g }}
{% set g = [1,2,3]|select %}{% for x in g %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{{ loop.nextitem }} {% endfor %}
{% set g = [1,2,3]|select %}{% for x in g %}{{ x }}{% if loop.first %}{{ g|first }}{% endif %}{% endfor %}
{% set g = [1,2,3]|select %}{% for x in g %}{{ x }}{% break %}{% endfor %}{{ g|join('-') }}
{% set g = [1,2,3]|select %}{{ g == g }}{{ g == [1,2,3] }}{{ g in [g] }}{{ g|list }}
{% set g = [3,1,2]|select %}{{ g|sort }}{{ g|sort }}{{ g|sum }}{{ g|join }}{{ 'y' if g else 'n' }}
{% set a, b = [1,2]|select %}{{ a }}{{ b }}
{% set g = [1,2,3]|reverse %}{{ g|list }}{{ g|list }}{{ (g|reverse) is iterable }}
{% set g = [1,2,3]|select %}{{ g|reverse }}{{ g|list }}
{% set g = {'a': 1}|items %}{% for k, v in g %}{{ k }}{{ v }}{% endfor %}{{ g|list }}
{% set g = [1,2,3]|batch(2) %}{{ g|first }}{{ g|list }}{{ g|list }}
{% set g = [1,2]|select %}{{ g is iterable }}{{ g is sequence }}{{ g is mapping }}{{ g[0] is defined }}{{ g|length }}
{% set g = [1,2]|select %}{{ g.count(1) }}
{% set g = [1,2]|select %}{{ g.copy() }}
{% set g = [1,2]|select %}{{ g|tojson }}
{% set g = [1,2]|select %}{{ '-'.join(g|map('string')) }}{{ g|max }}
{% set g = [1,2]|select %}{{ dict(g|map('string')|batch(2)) }}{{ g|list }}
{% macro m() %}{{ varargs }}{% endmacro %}{% set g = [1,2]|select %}{{ m(*g) }}{{ m(*g) }}
{% for x in [1,2,3]|select('odd') if x > 1 %}{{ x }}{{ loop.last }}{% else %}e{% endfor %}
{% set ns = namespace(g=[1,2]|map('string')) %}{{ ns.g|join }}{{ ns.g|join }}|
{% set g = []|select %}{% for x in g %}a{% else %}b{% endfor %}{{ g|last }}
{% set g = [1,[2,[3]]] %}{% for x in g recursive %}{{ loop(x|select) if x is iterable else x }}{% endfor %}
{{ [1]|map('string')|map('upper')|list }}{{ ([1,2]|select)|unique|list }}{{ ([{'a':1}]|map(attribute='a'))|min }}
{% set g = 'abc'|list|reverse %}{{ g|slice(2)|list }}
{{ {true:1, 0:2} }}{{ {false:1, 1: 2} }}
{{ [] in {} }}
{{ {'a':1}.get([]) }}
{{ {}[[]] is defined }}{{ {}[([1]|select)] is defined }}
{% set f = 'a-b'.split %}{{ f('-') }}{{ f is callable }}{% set g = [{"role":"user","content":"hi"},{"role":"x","content":" yo "}][0].get %}{{ g('role') }}
{{ [1]|map(attribute='count')|list|length }}
{{ 'a'.upper|tojson }}
{{ 'a'.upper|length }}
{% for x in [1] %}{{ loop.index }}{% endfor %}{{ [1,2].index(2) }}{{ 'abc'.index('b') }}
{{ {'title': 5}.title }}{{ {'count': 5}.count }}{{ {'format': 'x'}.format }}{{ {'index': 3}.index }}
{{ undefined_name.items }}
{{ undefined_name.foo }}
{{ none.items is defined }}{{ none.foo is defined }}{{ (5).items is defined }}
{{ [{"role":"user","content":"hi"},{"role":"x","content":" yo "}][0].content.strip().upper() }}{{ [{"role":"user","content":"hi"},{"role":"x","content":" yo "}][0].items()|list|length }}
{% for m in [{"role":"user","content":"hi"},{"role":"x","content":" yo "}] %}{% if m.items and m.get('role') == 'user' %}{{ m.content }}{% endif %}{% endfor %}
{% for x in [1,2] %}{% generation %}a{% continue %}{% endgeneration %}{% endfor %}
{% for x in [1,2] %}{% generation %}{% for y in [1,2] %}a{% break %}{% endfor %}{% endgeneration %}{% break %}{% endfor %}
{% macro m() %}{% set caller = caller() %}{{ caller }}{% endmacro %}{% call m() %}x{% endcall %}
{% macro m() %}{% set kwargs = kwargs %}{{ kwargs }}{% endmacro %}{{ m(a=1) }}
{% macro m() %}{% set kwargs = kwargs %}{{ kwargs }}{% endmacro %}{{ m() }}
{% macro m() %}{% set a, varargs = varargs|list, 1 %}{{ varargs }}{% endmacro %}{{ m(1) }}
{% macro m() %}{% for varargs in varargs %}{{ varargs }}{% endfor %}{% endmacro %}{{ m(1) }}
{% macro m() %}{% with varargs = varargs %}{{ varargs }}{% endwith %}{% endmacro %}{{ m(1) }}
{% macro m() %}{% with x = varargs, varargs = 1 %}{{ varargs }}{{ x }}{% endwith %}{% endmacro %}{{ m(1) }}
{% macro m() %}{% set varargs %}{{ varargs }}{% endset %}{{ varargs }}{% endmacro %}{{ m(1) }}
{% macro m() %}{% set x = varargs %}{% set varargs = 2 %}{{ x }}{{ varargs }}{% endmacro %}{{ m(1) }}
{{ [1,2,3]|select('gt', 1)|list }}{{ [1,2,3]|reject('odd')|list }}{{ [{'a':{'b':1}},{'a':{}}]|selectattr('a.b')|list }}{{ [{'a':1}]|rejectattr('a','eq',1)|list }}
{{ [1]|select(none)|list }}
{{ [1]|select(undefined_name)|list }}
{{ [1,2]|select(foo=1)|list }}
{{ [1,2]|selectattr(attribute='a')|list }}
{{ [1,2]|selectattr|list }}
{{ undefined_name|select|list }}{{ undefined_name|selectattr('a')|list }}{{ undefined_name|map('upper')|list }}{{ undefined_name|items|list }}
{{ 'abc'|select('in','ab')|list }}{{ {'a':1,'b':0}|select|list }}{{ [[1,2],[0]]|selectattr(0)|list }}{{ [[1,2],[0]]|selectattr('0','eq',0)|list }}
{{ none|select|list }}
{{ [1]|select('divisibleby', num=1)|list }}
{{ ['a','B']|select('upper')|list }}{{ ['a']|select('sameas','a')|list }}{{ [none,1]|select('none')|list }}{{ [[1],2]|select('iterable')|list }}
{{ [1,2]|select('==',2)|list }}{{ [1,2]|select('odd', 3)|list }}
{{ [{'a':1},{'b':2}]|selectattr('a','defined')|list }}{{ [{'a':1},{'b':2}]|rejectattr('a','undefined')|list }}{{ [{'a':1},{'b':2}]|selectattr('a.c','undefined')|list }}
{{ [{'a':1},{'b':2}]|selectattr('x.y')|list }}
{{ none|select|list }}{{ none|map('upper')|list }}{{ 0|selectattr('a')|list }}{{ ''|reject|list }}{{ []|map('nonsense')|list }}{{ []|selectattr|list }}{{ []|select('nonsense')|list }}
{{ 5|select|list }}
{{ 5|map('upper')|list }}
{{ 6 is divisibleby(num=3) }}
""".strip().split("\n")

# What Jinja writes an address of its memory for.
REFUSED = {
    "{{ messages | map(attribute='role') }}": "generator",
    "{{ [messages | map(attribute='role')] }}": "generator",
    "{{ 'roles: ' ~ (messages | select) }}": "generator",
    "{{ messages[0].items }}": "method",
    "{{ messages[0].content.strip ~ '' }}": "method",
    "{{ '{0.upper}'.format('a') }}": "method",
    "{{ raise_exception }}": "address",
    "{{ cycler(1) }}": "address",
    "{{ joiner() }}": "address",
    "{{ {(messages | select): 1} }}": "generator",
    "{{ ('%s' | safe) % cycler(1) }}": "address",
    "{{ [cycler(1)] | pprint }}": "address",
    "{% autoescape true %}{{ joiner() }}{% endautoescape %}": "address",
}

MAKERS = ["select", "map('string')", "reject('none')", "unique", "batch(2)", "slice(2)", "reverse"]
USES = [
    "{{ g | first }}",
    "{{ g | list }}",
    "{{ g | join('-') }}",
    "{{ 2 in g }}{{ 'b' in g }}",
    "{% for x in g %}{{ x }}{{ loop.last }}{% endfor %}",
    "{% for x in g %}{{ x }}{% break %}{% endfor %}",
    "{% for x in g %}{{ x }}{{ g | first }}{% endfor %}",
    "{{ g | map('string') | list }}",
    "{{ g | sort }}",
    "{{ 'y' if g else 'n' }}{{ g is iterable }}",
    "{{ g | length }}",
    "{{ [g] | length }}",
    "{{ g | default('x') | list }}",
    "{% set g = g | select %}",
]


@pytest.mark.parametrize("template", VALUES)
def test_a_value(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)


@pytest.mark.parametrize("template", REFUSED)
def test_what_is_refused_by_name(tokenizer: candle_llama.Tokenizer, template: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[template]):
        rendered(tokenizer, template)


@given(
    st.lists(st.integers(0, 3) | st.sampled_from(["a", "b"]), max_size=5),
    st.sampled_from(MAKERS),
    st.lists(st.sampled_from(USES), max_size=4),
)
def test_a_generator_is_used_up(
    tokenizer: candle_llama.Tokenizer,
    special_tokens: dict[str, str],
    items: list[object],
    maker: str,
    uses: list[str],
) -> None:
    template = "{% set g = " + repr(items) + " | " + maker + " %}" + "|".join(uses)
    check(tokenizer, special_tokens, template)
