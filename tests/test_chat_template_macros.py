# ruff: noqa: E501 (a template is one line)
"""Macros, namespaces, cyclers, joiners and views of dicts in chat templates: what Jinja makes of them."""

import pytest

import candle_llama
from jinja_reference import check

TEMPLATES = r"""
{% macro f(a, b='x', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(undefined_name, undefined_name) }}{{ f(b=undefined_name) }}{{ f() }}
{% macro f(a=b, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f() }}{{ f(1) }}{{ f(b=3) }}
{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(b=3) }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f() }}{{ f(1, 'a', x=2) }}
{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f() }}{{ f(1) }}{{ f(1, 2, 3) }}{{ f(*[1, 2]) }}
{% macro f(a) %}{{ a }}{{ kwargs }}{% endmacro %}{{ f(1, a=2, b=3) }}{{ f(a=2) }}{{ f(**{'b': 1, 'a': 2}) }}
{% macro f(a) %}{{ a }}{{ kwargs }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f(1, b=2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, a=2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}
{% macro f(varargs) %}{{ varargs }}{% endmacro %}{{ f(1) }}
{% macro f(varargs) %}{{ varargs }}{% endmacro %}{{ f(1, 2) }}
{% macro f(kwargs=5) %}{{ kwargs }}{% endmacro %}{{ f() }}{{ f(kwargs=1) }}
{% macro f() %}{{ caller is defined }}{{ caller() if caller }}{% endmacro %}{{ f() }}{% call f() %}x{% endcall %}
{% macro f() %}{{ caller }}{% endmacro %}{{ f(caller=1) }}|{{ f(caller=none) }}|{{ f() }}
{% macro f() %}{{ caller }}{% endmacro %}{% call f() %}{% endcall %}
{% macro f() %}{{ caller() }}{% endmacro %}{{ f() }}
{% macro f() %}x{% endmacro %}{% call f() %}a{% endcall %}
{% macro f() %}{{ kwargs }}{% endmacro %}{% call f() %}a{% endcall %}
{% macro f(caller) %}{{ caller() }}{% endmacro %}{% call f() %}a{% endcall %}
{% macro f(caller) %}x{% endmacro %}{{ f(1) }}
{% macro f(caller=none) %}{{ caller() if caller else 'no' }}{% endmacro %}{% call f() %}a{% endcall %}{{ f() }}
{% macro f(a=1, caller=none) %}{{ a }}{{ caller() if caller else 'no' }}{% endmacro %}{% call f(2) %}a{% endcall %}{{ f(1) }}{{ f(1, 0) }}
{% macro f(caller=none, a=1) %}{{ a }}{{ caller }}{% endmacro %}{{ f(1) }}
{% macro f(caller=none, a=1) %}{{ a }}{{ caller }}{% endmacro %}{{ f(1, 2) }}
{% macro f() %}{{ caller(1, 2, x=3) }}{% endmacro %}{% call(a) f() %}{{ a }}{{ varargs }}{{ kwargs }}{% endcall %}
{% macro f() %}{{ caller(1) }}{% endmacro %}{% call(a, b=5) f() %}{{ a }}{{ b }}{% endcall %}
{% macro f() %}{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}in{% endcall %}{% endmacro %}{% call f() %}out{% endcall %}
{% macro f() %}{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}in{% endcall %}{% endmacro %}{{ f() }}
{% macro f() %}{% macro g() %}{{ varargs }}{% endmacro %}{{ g(1) }}{{ varargs }}{% endmacro %}{{ f(2) }}
{% macro f() %}{% set varargs = 1 %}{{ varargs }}{% endmacro %}{{ f() }}
{% macro f() %}{% set varargs = 1 %}{{ varargs }}{% endmacro %}{{ f(1) }}
{% set kwargs = 5 %}{% macro f() %}{{ kwargs }}{% endmacro %}{{ f() }}{{ kwargs }}
{% set kwargs = 5 %}{% macro f(a=kwargs) %}{{ a }}{% endmacro %}{{ f() }}
{{ varargs }}{{ kwargs }}{{ caller }}|
{% macro f(a) %}{% endmacro %}{{ f.arguments }}{{ f is callable }}{{ f is mapping }}{{ f is iterable }}{{ f is sequence }}{{ [f] }}{{ f == f }}
{% macro f() %}{{ f is callable }}{{ varargs | length }}{% if varargs %}{{ f(*varargs[1:]) }}{% endif %}{% endmacro %}{{ f(1, 2) }}
{% macro f(x) %}{% for a in varargs %}{{ loop.index }}{{ a }}{% endfor %}{% for k, v in kwargs.items() %}{{ k }}{{ v }}{% endfor %}{% endmacro %}{{ f(0, 1, 2, y=3, z=4) }}
{% macro f(d={}) %}{{ d.a }}{{ d is mapping }}{% endmacro %}{{ f() }}{{ f({'a': 1}) }}{{ f(none) }}
{% macro a(x) %}{{ x }}{% endmacro %}{% macro b() %}{{ a(*varargs, **kwargs) }}{% endmacro %}{{ b(1) }}{{ b(x=2) }}
{% autoescape true %}{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f('<', '>') }}{% endautoescape %}
{% macro f() %}{% if true %}{% break %}{% endif %}{% endmacro %}
{% for i in [1,2] %}{% macro f(a=i) %}{{ a }}{{ i }}{% endmacro %}{{ f() }}{% endfor %}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.next() }}{{ c.pos }}{{ c.items }}{{ c['current'] }}{{ c.x }}
{{ cycler() }}
{% set c = cycler(*[1, 2, 3]) %}{% for i in range(5) %}{{ c.next() }}{% endfor %}{{ c is callable }}{{ c is iterable }}{{ c is mapping }}{{ c == c }}
{% set c = cycler(1) %}{{ c() }}
{% set c = cycler(1) %}{% for x in c %}{% endfor %}
{% set j = joiner() %}{{ j() }}a{{ j() }}b{{ j() }}{{ j.sep }}{{ j.used }}{{ j is callable }}
{% set j = joiner('|') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}
{% set j = joiner(sep=5) %}{{ j() }}{{ j() }}
{{ joiner(none)() }}{% set j = joiner(none) %}{{ j() }}{{ j() }}
{% set ns = namespace(j=joiner('-'), c=cycler(1, 2)) %}{% for i in [1, 2, 3] %}{{ ns.j() }}{{ ns.c.next() }}{% endfor %}
{% set ns = namespace(b=1, a='x') %}{{ ns }}{{ [ns] }}{% set ns.x = ns %}{{ ns }}{{ ns.x.x.b }}{{ ns == ns }}{{ ns is callable }}{{ ns is mapping }}{{ ns is sequence }}{{ ns is iterable }}
{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}{{ ns.x[0].x | length }}
{% set a = namespace(n=1) %}{% set b = namespace(a=a) %}{% set a.b = b %}{{ a }}{{ b }}{% set a.n = 2 %}{{ b.a.n }}{{ b }}
{% set ns = namespace(_a=1) %}{{ ns._a }}|{{ ns['_a'] }}|{{ ns }}{{ ns.b }}{{ ns['b'] is defined }}{{ ns[0] is defined }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns }}{{ namespace([('a', 1)]) }}{{ namespace({1: 2}) }}
{{ namespace(1) }}
{{ namespace() | length }}
{{ namespace() | tojson }}
{{ namespace() | list }}
{{ namespace(a=1).items() }}
{{ namespace(a=1).a }}{{ namespace(a=1)['a'] }}{{ 'a' in namespace(a=1) }}
{{ namespace(a=1) | attr('a') }}{{ namespace() == namespace() }}{{ 'x' if namespace() else 'y' }}
{% for x in namespace() %}{% endfor %}
{% set x = {} %}{% set x.a = 1 %}
{% set x.a = 1 %}
{% set ns = namespace() %}{% set ns.a, ns.b = 1, 2 %}{{ ns.a }}{{ ns.b }}
{% set ns = namespace(a=namespace()) %}{% set ns.a.b = 1 %}
{% set ns = namespace() %}{% set ns.a %}x{% endset %}{{ ns.a }}
{% set ns = namespace() %}{% for ns.a in [1, 2] %}{{ ns.a }}{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ loop.length }}{{ loop.last }}{{ k }}{{ v }}{{ loop.nextitem }}{% endfor %}{% for v in {'a': 1}.values() %}{{ v }}{% endfor %}{% for k in {'a': 1}.keys() %}{{ k }}{% endfor %}{{ 'x' if {}.keys() else 'y' }}
{{ messages[0].items() }}{{ messages[0].keys() | list }}{{ 'role' in messages[0].keys() }}{{ 'system' in messages[0].values() }}{{ ('role', 'system') in messages[0].items() }}
{% macro f(a, b) %}{{ a }}{{ b }}{{ caller(b=1) }}{% endmacro %}{% call(b, c=b) f(1, b=2) %}{{ b }}{{ c }}{{ a }}{% endcall %}
{% macro f() %}{{ kwargs.a }}{{ kwargs['b'] }}{{ kwargs | length }}{{ 'a' in kwargs }}{{ kwargs | tojson }}{{ varargs | tojson }}{% endmacro %}{{ f(1, none, a=1, b={'x': 2}) }}
{% macro f(x) %}{% if x %}{{ f(x - 1) }}{% endif %}{{ x }}{{ varargs }}{% endmacro %}{{ f(3) }}
{% set x = 1 %}{% macro f() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ f() }}
{% macro f(x=1) %}{% macro g(y=x) %}{{ y }}{{ x }}{% endmacro %}{{ g() }}{{ g(5) }}{% endmacro %}{{ f() }}{{ f(2) }}
{% macro f(a='<') %}{{ a }}{% endmacro %}{{ f() | e }}{{ f('>') ~ 1 }}{{ f | string }}
{{ (('%s' | safe) % namespace(a='<')) }}
{% set ns = namespace() %}{% set ns['a'] = 1 %}
{% set ns = namespace(items=5) %}{{ ns.items }}{{ ns['items'] }}
{% set ns = namespace(items=5) %}{{ ns.items() }}
{% set ns = namespace(a=[1]) %}{% set ns.a = ns.a + [2] %}{{ ns.a }}{{ ns.a is sequence }}{% for k in ns.a %}{{ k }}{% endfor %}
{{ namespace() < namespace() }}
{{ [namespace()] | sort }}
{{ [namespace()] | unique | list | length }}
{% set ns = namespace() %}{{ {ns: 1}[ns] }}
{% set ns = namespace(x=1) %}{{ [ns, ns] | map(attribute='x') | list }}{{ [ns] | selectattr('x', 'eq', 1) | list | length }}{{ [ns, namespace(x=0)] | sort(attribute='x') | map(attribute='x') | list }}
{% macro f() %}{{ caller(*varargs, **kwargs) }}{% endmacro %}{% call(a, b=2) f(1, b=3) %}{{ a }}{{ b }}{% endcall %}
{% for i in [1, 2] %}{% macro f() %}{{ loop is defined }}{% endmacro %}{{ f() }}{% endfor %}
{% macro f() %}{% for i in varargs %}{% for j in kwargs %}{{ i }}{{ j }}{{ loop.index }}{% endfor %}{% endfor %}{% endmacro %}{{ f(1, 2, a=3) }}
{{ cycler(1, 2) | length }}
{{ joiner() | tojson }}
{{ cycler | string is string }}{{ joiner is defined }}
{% set cycler = 1 %}{{ cycler }}
{{ loop }}|{% for i in [1] %}{% set a = loop.index %}{{ a }}{% endfor %}
{% macro f(a) %}{% endmacro %}{{ f | attr('name') }}{{ cycler(1, 2) | attr('current') }}{{ joiner() | attr('sep') }}{{ [f] | map(attribute='arguments') | list }}{{ f | attr('x') }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(*[1], **{'a': 2}) }}{{ f(a=1, *[2]) }}{{ f(1, *[2], b=3, **{'c': 4}) }}
{% macro f() %}{{ kwargs }}{% endmacro %}{{ f(**{'a': 1}, **{'b': 1}) }}
{% macro f() %}{{ kwargs }}{% endmacro %}{{ f(**{'a': 1}, b=1) }}
{% macro f() %}{{ kwargs }}{% endmacro %}{{ f(a=1, **{'a': 2}) }}
{% macro f(x) %}{{ caller(x) }}{% endmacro %}{% call(y) f(caller=1) %}{{ y }}{% endcall %}
{% macro f() %}{{ kwargs.keys() | list }}{{ caller }}{% endmacro %}{{ f(**{'caller': 5}) }}{{ f(a=1, **{'z': 2, 'b': 3}) }}
{% macro f() %}{% macro g(varargs) %}{{ varargs }}{% endmacro %}{{ g(1) }}{% endmacro %}{{ f(1) }}
{% macro f() %}{% macro g(varargs) %}{{ varargs }}{% endmacro %}{{ g(1) }}{% endmacro %}{{ f() }}
""".strip().split("\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)
