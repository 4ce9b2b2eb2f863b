# ruff: noqa: E501 (a template is one line)
"""Filters, tests, functions and methods in chat templates.

They are Jinja's and Python's own, but each goes through a rule of ours: what it is given, by position and by
name, must arrive.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_NAMESPACE, DEFAULT_TESTS

import candle_llama
from candle_llama.chat_template.jinja.sandbox import Environment
from jinja_reference import check

CALLS = r"""
{% set t, r, l = true, range(2), ['%', 's'] %}{{ 'a' % t[0] }}{{ 'a' % r }}{{ 'a' % l }}{{ ('0' | e) % l }}{{ ('%s' | e) % ['<'] }}{{ ('%s' | safe) % undefined_name }}|
{{ "it's" | e }}{{ ["it's", 2] | e }}{{ ['a'] | e | e }}{{ 5 | escape }}{{ none | e }}{{ '"&' | escape }}
{{ 'a\nb\r\nc\rd\x0be\u2028f'.splitlines() }}{{ 'a\nb\n'.splitlines(true) }}{{ ''.splitlines() }}{{ '\n'.splitlines(keepends=true) }}
{% for g, l in messages | groupby('role') %}{{ g }}{{ l | length }};{% endfor %}
{{ messages | groupby('role') | list | length }}{{ (messages | groupby('role'))[0].list[0].content }}
{{ [{'a': 1, 'b': 2}, {'a': 1, 'b': 3}, {'b': 4}] | groupby('a', default=0) }}
{{ [{'a': 'x'}, {'a': 'X'}] | groupby('a') | map('first') | list }}{{ [{'a': 'x'}, {'a': 'X'}] | groupby('a', case_sensitive=true) | map('first') | list }}
{{ [{'a': {'b': 1}}] | groupby('a.b') }}
{% set m = '<a>' | safe %}{{ m + '<b>' }}{{ '<b>' + m }}{{ m ~ '<b>' }}{{ m.upper() + '<' }}{{ m | upper + '<' }}{{ m * 2 + '<' }}{{ m[0] + '<' }}{{ m[:1] + '<' }}
{% set m = '%s<' | safe %}{{ m % '<' }}{{ m % 3 }}{{ m % ('<' | safe) }}{{ '%s' % m + '<' }}
{% set m = '<a>' | safe %}{{ m | replace('<', '>') }}{{ m.replace('a', '<') }}{{ m | trim + '<' }}{{ m | length }}{{ [m] }}{{ m | tojson }}{{ m == '<a>' }}{{ m in ['<a>'] }}{{ m.split('a') }}
{% set m = '<a>' | safe %}{{ m | string + '<' }}{{ m | e }}{{ m | escape + '<' }}{{ '<' | e }}{{ '<' | e | e }}{{ ('<' | e) + '<' }}{{ m.join(['<', m]) }}{{ ['<', m] | join }}{{ ['<', m] | join('>') }}{{ m | capitalize + '<' }}{{ m | title + '<' }}{{ m | default('x') + '<' }}
{{ 'a.b.c'.rpartition('.') }}{{ 'abc'.rpartition('x') }}{{ 'a-b'.partition('-') }}
{{ 'aXbX'.split('X') }}{{ 'aXbX'.split('X', maxsplit=1) }}{{ ' a b  c '.split(none, 1) }}{{ ' a b  c '.rsplit(none, 1) }}{{ ' a b  c '.rsplit() }}{{ 'a b'.split(sep=' ') }}{{ ' '.split() }}{{ ''.split(',') }}
{{ 'a'.isalnum() }}{{ '1'.isnumeric() }}{{ '²'.isdigit() }}{{ '²'.isdecimal() }}{{ '½'.isnumeric() }}{{ ' '.isspace() }}{{ 'Ab'.istitle() }}{{ 'a'.islower() }}{{ 'A1'.isupper() }}{{ 'a_1'.isidentifier() }}{{ 'é'.isascii() }}{{ '\n'.isprintable() }}{{ ''.isalpha() }}{{ ''.isascii() }}
{{ 'abc'.startswith('b', 1) }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.endswith('b', 0, 2) }}{{ 'abcabc'.find('a', 1) }}{{ 'abcabc'.count('a', 1) }}{{ 'abcabc'.rfind('a', 0, 3) }}{{ 'éa'.find('a') }}{{ ''.count('') }}{{ 'ab'.count('') }}{{ 'aaaa'.count('aa') }}{{ 'ab'.find('') }}{{ 'ab'.find('', 5) }}
{{ 'aa'.replace('a', 'b', 1) }}{{ 'aa'.replace('', '-') }}{{ 'aa'.replace('', '-', 2) }}{{ 'aa'.replace('a', 'b', -1) }}{{ 'aa' | replace('a', 'b', 1) }}{{ 'aa' | replace('', '-') }}
{{ ' ab '.strip() }}|{{ 'xyaxy'.strip('yx') }}{{ 'xxa'.lstrip('x') }}{{ 'axx'.rstrip('x') }}{{ ' a'.strip(none) }}{{ 'xa' | trim('x') }}{{ ' a ' | trim(none) }}|{{ 'a\x1f'.strip() }}|{{ 'aé'.strip('é') }}
{{ 'hello World'.title() }}{{ "it's o'neil x2y".title() }}{{ "it's o'neil x2y-z (a) [b] {c} <d>" | title }}{{ 'ǆ'.title() }}{{ 'ΑΣ'.lower() }}{{ 'ß'.upper() }}{{ 'HELLO'.capitalize() }}{{ 'ﬁx'.capitalize() }}{{ 'éA' | capitalize }}
{{ [1, 2, 3].index(2) }}{{ [1, 2, 1].count(1) }}{{ [1].copy() }}{{ (1, 2).index(2) }}{{ (1, 2, 1).count(1) }}
{% set x = [1] %}{% set _ = x.append(2) %}{{ x }}
{% set x = [2, 1] %}{% set _ = x.sort() %}{{ x }}
{% set x = {} %}{% set _ = x.update({'a': 1}) %}{{ x }}
{% set x = {'a': 1} %}{{ x.pop('a') }}
{% set x = {'a': 1} %}{{ x.setdefault('b', 2) }}
{{ {'a': 1}.nonsense() }}
{{ messages[0].get('role').upper() }}
{{ 'a,b'.split(',')[0] }}{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'a</think>b'.split('</think>')[0].rstrip('\n').split('<think>')[-1] }}
{{ range(3) + [1] }}
{{ range(2.5) }}
{{ range(100001) }}
{{ [3, 1, 2] | sort | first }}{{ ['b', 'A', 'a'] | sort }}{{ ['b', 'A', 'a'] | sort(case_sensitive=true) }}{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') }}{{ [{'a': 2, 'b': 1}, {'a': 1, 'b': 2}, {'a': 1, 'b': 1}] | sort(attribute='a,b') }}{{ [(1, 2), (1, 1)] | sort }}{{ [(2, 1), (1, 5)] | sort(attribute='1') }}{{ [[1], [0]] | sort(reverse=true) }}{{ 'bca' | sort }}{{ {'b': 1, 'a': 2} | sort }}{{ [2, 1.5, true] | sort }}
{{ [1, 'a'] | sort }}
{{ ['a', 'A', 'b', 'a'] | unique | list }}{{ ['a', 'A'] | unique(true) | list }}{{ [1, true, 1.0, 2] | unique | list }}{{ messages | unique(attribute='role') | map(attribute='role') | list }}{{ 'abca' | unique | list }}{{ [none, none] | unique | list }}
{{ [[1], [1]] | unique | list }}
{{ [1, 2, 3] | sum }}{{ [1.5, 2] | sum }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}{{ [[1], [2]] | sum(start=[]) }}{{ [] | sum }}{{ [1] | sum(start=5) }}{{ [true, true] | sum }}
{{ ['a'] | sum }}
{{ [1, 3, 2] | max }}{{ ['b', 'A'] | max }}{{ ['b', 'A'] | min(case_sensitive=true) }}{{ [] | max }}{{ messages | max(attribute='role') }}{{ [{'a': 1}, {'a': 3}] | max(attribute='a') }}
{{ ['a', 1, none, true, 1.5] | join }}{{ [1, 2] | join(', ') }}{{ messages | join(',', attribute='role') }}{{ 'abc' | join('-') }}{{ {'a': 1} | join }}{{ undefined_name | join }}{{ [1, 2] | join(5) }}{{ [1] | join(none) }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}{{ [1, 2, 3, 4, 5] | slice(3, 'x') | list }}{{ [] | batch(2) | list }}{{ [] | slice(2) | list }}{{ 'abc' | batch(2) | list }}
{{ [1] | batch(0) | list }}
{{ 'a\nb\n\nc' | indent }}{{ 'a\nb' | indent('>>') }}{{ 'a\n\nb' | indent(2, blank=true) }}{{ 'a\n\nb' | indent(2, first=true, blank=true) }}{{ 'a\r\nb' | indent(1) }}{{ '' | indent }}{{ 'a\n' | indent }}|{{ 'a\nb\n' | indent(2) }}|
{{ 5 | indent }}
{{ 'x' | int }}{{ '0x1f' | int(0, 16) }}{{ '12' | int(base=8) }}{{ 3.9 | int }}{{ '3.9' | int }}{{ none | int }}{{ true | int }}{{ ' 5 ' | int }}{{ '1_000' | int }}{{ [] | int }}{{ 'x' | int(default=none) }}{{ '-3' | int }}{{ '1e3' | int }}{{ 'é' | int(1) }}
{{ 'x' | float }}{{ ' 1.5 ' | float }}{{ '1e3' | float }}{{ none | float(2.0) }}{{ true | float }}{{ 'inf' | float }}{{ '1_0.5' | float }}{{ [] | float }}{{ 3 | float }}
{{ 2.5 | round }}{{ 3.5 | round }}{{ 2.567 | round(2) }}{{ 2.5 | round(method='ceil') }}{{ 2.5 | round(0, 'floor') }}{{ 25 | round(-1) }}{{ 7 | round }}{{ 1.005 | round(2) }}{{ -2.5 | round }}{{ 2.51 | round(1, 'ceil') }}{{ true | round }}
{{ -3 | abs }}{{ -1.5 | abs }}{{ true | abs }}
{{ 'abc' | first }}{{ [1] | last }}{{ {'a': 1} | first }}{{ 'abc' | last }}{{ [] | last }}{{ undefined_name | first }}{{ undefined_name | last }}{{ messages | map(attribute='role') | first }}
{{ 'abc' | list }}{{ {'a': 1} | list }}{{ (1, 2) | list }}{{ 'abc' | length }}{{ {'a': 1} | length }}{{ (1,) | count }}
{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}{{ (1, 2) | reverse | list }}{{ 'é!' | reverse }}{{ undefined_name | reverse | list }}
{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(by='value') }}{{ {'b': 1, 'A': 2, 'a': 3} | dictsort(true) }}{{ {'b': 1, 'a': 2} | dictsort(reverse=true) }}{{ {'b': 1, 'a': 2} | dictsort(false, 'value', true) }}
{{ {'a': 1} | items | list }}{{ undefined_name | items | list }}{{ [1] | items | list }}
{{ messages[0] | attr('role') }}
{{ [1] | map('nonsense') | list }}
{{ [1] | map | list }}
{{ [1, 2, 3, 4] | select('even') | list }}{{ [0, 1, none] | select | list }}{{ [1, 2] | select('gt', 1) | list }}{{ [1, 2] | reject('eq', 1) | list }}{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'gt', 1) | list }}{{ [{'a': none}, {}] | selectattr('a', 'none') | list }}{{ [{'a': none}, {}] | selectattr('a', 'defined') | list }}{{ [{'a': 1}, {}] | rejectattr('a') | list }}{{ [{'a': {'b': 0}}] | selectattr('a.b', 'eq', 0) | list }}{{ ['a', 'b'] | select('in', ['a']) | list }}
{{ [1] | select('nonsense') | list }}
{{ 'a' is odd }}
{{ 1.5 is even }}
{{ '%s' | format('a') }}{{ '%(a)s' | format(a=1) }}{{ '%d%%' | format(3) }}
{{ '%s' | format }}
{{ 'a' | string }}{{ 1 | string }}{{ none | string }}{{ [1] | string }}{{ undefined_name | string }}
{{ 'ab' | replace('a', 1) }}{{ 12 | replace(1, 2) }}
{{ 'ab' | upper | lower | title | capitalize | trim }}{{ 5 | upper }}{{ none | lower }}{{ 5 | trim }}{{ none | title }}{{ 1.5 | capitalize }}{{ undefined_name | upper }}|{{ [1] | upper }}
{{ undefined_name | trim }}{{ undefined_name | e }}{{ undefined_name | replace('a', 'b') }}{{ undefined_name | int }}{{ undefined_name | float }}{{ undefined_name | sort }}{{ undefined_name | unique | list }}{{ undefined_name | sum }}{{ undefined_name | max }}{{ undefined_name | dictsort }}
{{ undefined_name | abs }}
{% set ns = namespace(a=1) %}{{ ns.b is defined }}{{ ns['a'] }}
{{ loop is defined }}{% for i in [1, 2, 3] %}{{ loop.nextitem }}{{ loop.revindex0 }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.changed(i // 2) }}{% endfor %}
{% for i in [1] %}{{ loop.cycle() }}{% endfor %}
{% for x in messages | map(attribute='role') %}{{ loop.length }}{{ loop.last }}{{ x }}{% endfor %}
{{ 'a' * 3 }}{{ 'é'[0] }}{{ 'abc'[5] is defined }}{{ 'abc'[-1] }}{{ [1][true] is defined }}{{ [1, 2][1.0] is defined }}{{ {'a': 1}.a }}{{ {'a': 1}['b'] is defined }}{{ {1: 'x'}[true] }}{{ {1: 'x'}[1.0] }}{{ {'a': 1}[none] is defined }}
{{ (1).x }}|{{ 'a'.x }}|{{ none.x }}|{{ [].x }}
{{ 'abc'.index('c') }}{{ 'abc'.rindex('c') }}{{ 'a b'.swapcase() }}{{ 'a'.zfill(3) }}{{ '-1'.zfill(4) }}{{ 'a'.center(4, '*') }}{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}{{ 'a\tb'.expandtabs(4) }}
{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 5) }}{{ {'a': 1}.items() | list }}{{ {'a': 1, 'b': 2}.keys() | list }}{{ {'a': 1}.values() | list }}{{ {'a': 1}.keys() | length }}{{ 'a' in {'a': 1}.keys() }}{{ 1 in {'a': 1}.values() }}{{ ('a', 1) in {'a': 1}.items() }}
{{ ['a', 'b'] | map('upper') | list }}{{ ['1', 'x'] | map('int', 5) | list }}{{ ['1', 'x'] | map('int', default=6) | list }}{{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}{{ [{'a': {'b': 1}}] | map(attribute='a.b') | list }}{{ [[1, 2]] | map(attribute=1) | list }}{{ [[1, 2]] | map('first') | list }}{{ ['ab'] | map('replace', 'a', 'b') | list }}
{{ dict([('a', 1)]) }}{{ dict({'a': 1}, b=2) }}{{ dict() }}{{ dict([('a', 1)], a=2) }}
{{ [] | tojson }}{{ [1, 'é', none, true, 1.0, {'a': ()}] | tojson }}{{ {1: 2, none: 3, 1.5: 5} | tojson }}{{ (1, 2) | tojson }}
{{ 'a' is lt 1 }}
{{ 1 is lt 2 }}{{ 2 is ge 2 }}{{ 'b' is gt 'a' }}{{ 1 is le 0 }}
{{ {} is test }}
{{ undefined_name is callable }}{{ none is callable }}{{ range is callable }}{{ namespace is callable }}{{ [] is callable }}{{ 'a' is callable }}{{ cycler is callable }}{{ joiner is callable }}{{ dict is callable }}{{ 5 is callable }}{{ undefined_name.x is callable }}
{{ none[1:x] }}
{{ 'a{}b{}'.format(1, 'x') }}{{ '{0}{1}{0}'.format(1, 2) }}{{ '{a}'.format(a=3) }}{{ '{:>5}|{:<5}|{:^5}|{:05d}|{:.2f}'.format(1, 2, 3, 4, 5.0) }}{{ '{{}}'.format() }}
{{ '{!r}{!s:>5}{!a}'.format('a', 'b', 'é') }}{{ '{:,}'.format(1234567) }}{{ '{:{}}'.format('a', 5) }}|{{ '{:{w}.{p}f}'.format(1.2345, w=8, p=2) }}
{{ '{a.b}{a[b]}{a[c][0]}'.format(a={'b': 1, 'c': [5]}) }}{{ '{0[0]}{1.x}'.format([1, 2], namespace(x=3)) }}{{ '{a.x}|'.format(a={}) }}
{{ '{a.x.y}'.format(a={}) }}
{{ '{0}{}'.format(1, 2) }}
{{ '{} {}'.format(1) }}
{{ '{:{:{}}}'.format(1, 2, 3) }}
{{ '{a}{b}'.format_map({'a': 1, 'b': 2}) }}{{ ''.format_map({}) }}{{ 'x'.format_map(5) }}{{ '{a.b}'.format_map({'a': {'b': 1}}) }}
{{ '{a}'.format_map({}) }}
{{ '{a}'.format_map(a=1) }}
{{ 'a'.format_map({}, {}) }}
{{ ('<{}>' | safe).format('<') }}{{ ('{!r}' | safe).format('<') }}{{ ('{a}' | safe).format_map({'a': '<'}) }}{{ ('{}' | safe).format(1) + '<' }}
{{ 'ßẞ'.casefold() }}{{ 'a'.isprintable() }}{{ 'a b'.rsplit(' ', maxsplit=1) }}{{ 'a\nb'.splitlines(keepends=true) }}{{ 'a\tb'.expandtabs(tabsize=2) }}
{{ 1500 | filesizeformat }}{{ 1024 | filesizeformat(binary=true) }}{{ '1500' | filesizeformat }}
{{ '<b>Hi</b>  <!-- c > --> x\n\ty &amp; &lt;b&gt;' | striptags }}{{ 5 | striptags }}{{ ('<b>x</b>' | e) | striptags }}{{ ('&lt;' | safe).unescape() }}
{{ 'a b/c?d=é' | urlencode }}{{ {'a b': 'c/d', 'e': 1} | urlencode }}{{ [('a', 1), ['b', none]] | urlencode }}{{ 5 | urlencode }}
{{ {'a': 1, 'b': none, 'c': undefined_name, 'd': '<"'} | xmlattr }}|{{ {'a': 1} | xmlattr(autospace=false) }}
{{ {'a b': 1} | xmlattr }}
{{ 'hello world foo bar' | wordwrap(10) }}|{{ 'hello world' | wordwrap(width=5, break_long_words=false) }}|{{ 'a b c' | wordwrap(3, wrapstring='<br>') }}|{{ 'well-known' | wordwrap(8, break_on_hyphens=false) }}
{{ 'a' | wordwrap(0) }}
{{ 'hello world foo' | truncate(11) }}{{ 'hello world' | truncate(length=8, killwords=true, end='!', leeway=0) }}{{ [1, 2] | truncate(5) }}
{{ {'b': 'x' * 60, 'a': [1, 'word ' * 30, ('a' * 50, 'b' * 50)], 3: none} | pprint }}{{ undefined_name | pprint }}
{{ 'see www.example.com or a@b.org' | urlize }}{{ 'www.example.com' | urlize(trim_url_limit=5, nofollow=true, target='_blank') }}
{{ 'a-b' | replace(old='-', new='+', count=1) }}{{ 'a\nb' | indent(width=2, first=true, blank=true) }}{{ 'xax' | trim(chars='x') }}{{ 'a' | center(width=5) }}|{{ [1, 2] | join(d='-') }}
{{ [1, 2, 3] | batch(linecount=2, fill_with=0) | list }}{{ [1, 2, 3] | slice(slices=2, fill_with=0) | list }}{{ 2.55 | round(precision=1, method='floor') }}{{ '7' | int(default=1, base=8) }}
{{ {'a': [1, {'b': 'é<'}]} | tojson(indent=4) }}{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{{ [1] | tojson(indent='--') }}
{{ 'upper' is filter }}{{ 'x' is filter }}{{ 'odd' is test }}{{ '==' is test }}{{ 6 is divisibleby(num=3) }}{{ 'A' is upper }}{{ 5 is lower }}{{ 1 is sameas true }}
{{ [1, 2][1:] }}{{ 'abc'[1:] }}{{ (1, 2, 3)[::-1] }}{{ none[1:] }}{{ {}[1:] is defined }}{{ range(5)[1:3] | list }}
{{ 'abc'[::0] }}
{{ 2.5.is_integer() }}{{ (5).bit_length() }}{{ (5).real }}{{ 0.5.as_integer_ratio() }}{{ 1.5.hex() }}{{ true.numerator }}
{% set g = (messages | groupby('role'))[0] %}{{ g.grouper }}{{ g.list | length }}{{ g.index(g.grouper) }}{{ g[0] }}
""".strip().split("\n")


# Python warns of a subscript of None that a template has.
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("template", CALLS)
def test_a_call(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)


def test_nothing_of_jinja_is_left_out() -> None:
    environment = Environment()
    assert {*DEFAULT_FILTERS} == {*environment.filters}
    assert {*DEFAULT_TESTS} == {*environment.tests}
    assert {*DEFAULT_NAMESPACE, "raise_exception", "strftime_now"} == {*environment.globals}


# Methods of strings that a template has no use for, or that make what is no text.
WITHOUT_A_RULE = {"encode", "maketrans", "translate"}


def test_no_method_of_a_string_is_forgotten(tokenizer: candle_llama.Tokenizer) -> None:
    for name in (name for name in dir(str) if not name.startswith("_")):
        template = "{{ 'a'." + name + " is defined }}"
        text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template)
        assert text == str(name not in WITHOUT_A_RULE), name


FORMATS = st.tuples(
    st.sampled_from(["", "0", "-", "+", " ", "#", "-0"]),
    st.sampled_from(["", "1", "12", "007"]),
    st.sampled_from(["", ".", ".0", ".3"]),
    st.sampled_from("diouxXeEfFgGcrsa%"),
).map("".join)


@given(st.lists(FORMATS, min_size=1, max_size=3), st.integers(-(10**12), 10**12) | st.floats(-1e20, 1e20))
def test_printf(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], formats: list[str], value: float
) -> None:
    text = " ".join("%" + one for one in formats)
    check(tokenizer, special_tokens, "{{ " + f"{text!r} % (({value!r},) * {len(formats)})" + " }}")


SPECS = st.tuples(
    st.sampled_from(["", "<", "*^", "é>"]),
    st.sampled_from(["", "+"]),
    st.sampled_from(["", "8", "017"]),
    st.sampled_from(["", ",", "_"]),
    st.sampled_from(["", ".0", ".3"]),
    st.sampled_from(["", *"bcdeEfFgGnoxX%s"]),
).map("".join)


@given(SPECS, st.integers(-(10**12), 10**12) | st.floats(-1e20, 1e20) | st.sampled_from([True, "", "é"]))
def test_formatting(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], spec: str, value: object
) -> None:
    check(tokenizer, special_tokens, "{{ " + repr(f"{{:{spec}}}") + f".format({value!r})" + " }}")
