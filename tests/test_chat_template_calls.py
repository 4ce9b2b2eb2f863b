# ruff: noqa: E501 (a template is one line)
"""Filters, tests and Python's methods in chat templates: what transformers' own Jinja environment gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import candle_llama
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
{{ 'abc'.index('x') }}
{{ 'a.b.c'.rpartition('.') }}{{ 'abc'.rpartition('x') }}{{ 'a-b'.partition('-') }}
{{ 'aXbX'.split('X') }}{{ 'aXbX'.split('X', maxsplit=1) }}{{ ' a b  c '.split(none, 1) }}{{ ' a b  c '.rsplit(none, 1) }}{{ ' a b  c '.rsplit() }}{{ 'a b'.split(sep=' ') }}{{ ' '.split() }}{{ ''.split(',') }}
{{ 'abc'.split('') }}
{{ 'a'.isalnum() }}{{ '1'.isnumeric() }}{{ '²'.isdigit() }}{{ '²'.isdecimal() }}{{ '½'.isnumeric() }}{{ ' '.isspace() }}{{ 'Ab'.istitle() }}{{ 'a'.islower() }}{{ 'A1'.isupper() }}{{ 'a_1'.isidentifier() }}{{ 'é'.isascii() }}{{ '\n'.isprintable() }}{{ ''.isalpha() }}{{ ''.isascii() }}
{{ 'abc'.startswith('b', 1) }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.endswith('b', 0, 2) }}{{ 'abcabc'.find('a', 1) }}{{ 'abcabc'.count('a', 1) }}{{ 'abcabc'.rfind('a', 0, 3) }}{{ 'éa'.find('a') }}{{ ''.count('') }}{{ 'ab'.count('') }}{{ 'aaaa'.count('aa') }}{{ 'ab'.find('') }}{{ 'ab'.find('', 5) }}
{{ 'abc'.startswith(['a']) }}
{{ 'aa'.replace('a', 'b', 1) }}{{ 'aa'.replace('', '-') }}{{ 'aa'.replace('', '-', 2) }}{{ 'aa'.replace('a', 'b', -1) }}{{ 'aa' | replace('a', 'b', 1) }}{{ 'aa' | replace('', '-') }}
{{ 'abc'.removeprefix('b') }}{{ 'abc'.removesuffix('b') }}{{ 'abc'.removesuffix('bc') }}{{ 'abc'.removeprefix('abc') }}
{{ ' ab '.strip() }}|{{ 'xyaxy'.strip('yx') }}{{ 'xxa'.lstrip('x') }}{{ 'axx'.rstrip('x') }}{{ ' a'.strip(none) }}{{ 'xa' | trim('x') }}{{ ' a ' | trim(none) }}|{{ 'a\x1f'.strip() }}|{{ 'aé'.strip('é') }}
{{ 'hello World'.title() }}{{ "it's o'neil x2y".title() }}{{ "it's o'neil x2y-z (a) [b] {c} <d>" | title }}{{ 'ǆ'.title() }}{{ 'ΑΣ'.lower() }}{{ 'ß'.upper() }}{{ 'HELLO'.capitalize() }}{{ 'ﬁx'.capitalize() }}{{ 'éA' | capitalize }}
{{ '{}'.format() }}
{{ '{}{}'.format_map({}) }}
{{ [1, 2, 3].index(2) }}{{ [1, 2, 1].count(1) }}{{ [1].copy() }}{{ (1, 2).index(2) }}{{ (1, 2, 1).count(1) }}
{{ [1].index(5) }}
{{ [1].pop() }}
{% set x = [1, 2] %}{{ x.pop() }}
{% set x = [1] %}{% set _ = x.append(2) %}{{ x }}
{% set x = [2, 1] %}{% set _ = x.sort() %}{{ x }}
{% set x = {} %}{% set _ = x.update({'a': 1}) %}{{ x }}
{% set x = {'a': 1} %}{{ x.pop('a') }}
{% set x = {'a': 1} %}{{ x.setdefault('b', 2) }}
{{ {'a': 1}.copy() == {'a': 1} }}{{ {'a': 1} == {'a': 1.0} }}
{{ {'a': 1}.items()[0] }}
{{ {'a': 1}.nonsense() }}
{{ 'a'.nonsense() }}
{{ messages[0].get('role').upper() }}
{{ 'a,b'.split(',')[0] }}{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'a</think>b'.split('</think>')[0].rstrip('\n').split('<think>')[-1] }}
{{ range(3) }}{{ range(3)[1:] }}{{ range(3)[::-1] | list }}{{ range(0, 10, 3)[-1] }}{{ range(3) == range(3) }}{{ range(3) == [0, 1, 2] }}{{ range(5).index(2) }}{{ range(5).count(2) }}{{ range(3) | reverse | list }}{{ range(0) | length }}{{ 'x' if range(0) else 'y' }}{{ range(3) ~ 'a' }}{{ [range(2)] }}
{{ range(3) + [1] }}
{{ range(3) * 2 }}
{{ range(3) | tojson }}
{{ range(2.5) }}
{{ range('a') }}
{{ range() }}
{{ range(1, 5, 0) }}
{{ range(100001) }}
{{ [3, 1, 2] | sort | first }}{{ ['b', 'A', 'a'] | sort }}{{ ['b', 'A', 'a'] | sort(case_sensitive=true) }}{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') }}{{ [{'a': 2, 'b': 1}, {'a': 1, 'b': 2}, {'a': 1, 'b': 1}] | sort(attribute='a,b') }}{{ [(1, 2), (1, 1)] | sort }}{{ [(2, 1), (1, 5)] | sort(attribute='1') }}{{ [[1], [0]] | sort(reverse=true) }}{{ 'bca' | sort }}{{ {'b': 1, 'a': 2} | sort }}{{ [2, 1.5, true] | sort }}
{{ [1, 'a'] | sort }}
{{ [none, 1] | sort }}
{{ [{'a': 1}, {}] | sort(attribute='a') }}
{{ ['a', 'A', 'b', 'a'] | unique | list }}{{ ['a', 'A'] | unique(true) | list }}{{ [1, true, 1.0, 2] | unique | list }}{{ messages | unique(attribute='role') | map(attribute='role') | list }}{{ 'abca' | unique | list }}{{ [none, none] | unique | list }}
{{ [[1], [1]] | unique | list }}
{{ [1, 2, 3] | sum }}{{ [1.5, 2] | sum }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}{{ [[1], [2]] | sum(start=[]) }}{{ [] | sum }}{{ [1] | sum(start=5) }}{{ [true, true] | sum }}
{{ ['a'] | sum }}
{{ ['a', 'b'] | sum(start='') }}
{{ [1, 3, 2] | max }}{{ ['b', 'A'] | max }}{{ ['b', 'A'] | min(case_sensitive=true) }}{{ [] | max }}{{ messages | max(attribute='role') }}{{ [{'a': 1}, {'a': 3}] | max(attribute='a') }}
{{ [1, 'a'] | max }}
{{ ['a', 1, none, true, 1.5] | join }}{{ [1, 2] | join(', ') }}{{ messages | join(',', attribute='role') }}{{ 'abc' | join('-') }}{{ {'a': 1} | join }}{{ undefined_name | join }}{{ [1, 2] | join(5) }}{{ [1] | join(none) }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}{{ [1, 2, 3, 4, 5] | slice(3, 'x') | list }}{{ [] | batch(2) | list }}{{ [] | slice(2) | list }}{{ 'abc' | batch(2) | list }}
{{ [1] | batch(0) | list }}
{{ [1] | slice(0) | list }}
{{ 'a\nb\n\nc' | indent }}{{ 'a\nb' | indent('>>') }}{{ 'a\n\nb' | indent(2, blank=true) }}{{ 'a\n\nb' | indent(2, first=true, blank=true) }}{{ 'a\r\nb' | indent(1) }}{{ '' | indent }}{{ 'a\n' | indent }}|{{ 'a\nb\n' | indent(2) }}|
{{ 5 | indent }}
{{ 'x' | int }}{{ '0x1f' | int(0, 16) }}{{ '12' | int(base=8) }}{{ 3.9 | int }}{{ '3.9' | int }}{{ none | int }}{{ true | int }}{{ ' 5 ' | int }}{{ '1_000' | int }}{{ [] | int }}{{ 'x' | int(default=none) }}{{ '-3' | int }}{{ '1e3' | int }}{{ 'é' | int(1) }}
{{ 'x' | float }}{{ ' 1.5 ' | float }}{{ '1e3' | float }}{{ none | float(2.0) }}{{ true | float }}{{ 'inf' | float }}{{ '1_0.5' | float }}{{ [] | float }}{{ 3 | float }}
{{ 2.5 | round }}{{ 3.5 | round }}{{ 2.567 | round(2) }}{{ 2.5 | round(method='ceil') }}{{ 2.5 | round(0, 'floor') }}{{ 25 | round(-1) }}{{ 7 | round }}{{ 1.005 | round(2) }}{{ -2.5 | round }}{{ 2.51 | round(1, 'ceil') }}{{ true | round }}
{{ 'a' | round }}
{{ 1 | round(1, 'x') }}
{{ -3 | abs }}{{ -1.5 | abs }}{{ true | abs }}
{{ 'a' | abs }}
{{ 'abc' | first }}{{ [1] | last }}{{ {'a': 1} | first }}{{ 'abc' | last }}{{ [] | last }}{{ undefined_name | first }}{{ undefined_name | last }}{{ messages | map(attribute='role') | first }}
{{ messages | map(attribute='role') | last }}
{{ 5 | first }}
{{ 'abc' | list }}{{ {'a': 1} | list }}{{ (1, 2) | list }}{{ 'abc' | length }}{{ {'a': 1} | length }}{{ (1,) | count }}
{{ 5 | list }}
{{ 5 | length }}
{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}{{ (1, 2) | reverse | list }}{{ 'é!' | reverse }}{{ undefined_name | reverse | list }}
{{ {'a': 1} | reverse | list }}
{{ 5 | reverse }}
{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(by='value') }}{{ {'b': 1, 'A': 2, 'a': 3} | dictsort(true) }}{{ {'b': 1, 'a': 2} | dictsort(reverse=true) }}{{ {'b': 1, 'a': 2} | dictsort(false, 'value', true) }}
{{ {1: 2, 'a': 3} | dictsort }}
{{ [] | dictsort }}
{{ {'a': 1} | items | list }}{{ undefined_name | items | list }}{{ [1] | items | list }}
{{ messages[0] | attr('role') }}
{{ [1] | map('nonsense') | list }}
{{ [1] | map | list }}
{{ [1, 2, 3, 4] | select('even') | list }}{{ [0, 1, none] | select | list }}{{ [1, 2] | select('gt', 1) | list }}{{ [1, 2] | reject('eq', 1) | list }}{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'gt', 1) | list }}{{ [{'a': none}, {}] | selectattr('a', 'none') | list }}{{ [{'a': none}, {}] | selectattr('a', 'defined') | list }}{{ [{'a': 1}, {}] | rejectattr('a') | list }}{{ [{'a': {'b': 0}}] | selectattr('a.b', 'eq', 0) | list }}{{ ['a', 'b'] | select('in', ['a']) | list }}
{{ [1] | select('nonsense') | list }}
{{ 1 is divisibleby 2 }}{{ 4 is divisibleby(2) }}{{ 'a' is lower }}{{ 'A' is upper }}{{ [] is sameas [] }}{{ none is sameas none }}{{ 1 is sameas true }}{{ 'x' is callable }}{{ raise_exception is callable }}{{ ('<' | e) is escaped }}{{ '<' is escaped }}{{ 'upper' is filter }}{{ 'x' is filter }}{{ 'odd' is test }}{{ 1 is not odd }}
{{ 'a' is odd }}
{{ 1.5 is even }}
{{ '%s' | format('a') }}{{ '%(a)s' | format(a=1) }}{{ '%d%%' | format(3) }}
{{ '%s' | format }}
{{ 'a' | string }}{{ 1 | string }}{{ none | string }}{{ [1] | string }}{{ undefined_name | string }}
{{ 'ab' | replace('a', 1) }}{{ 12 | replace(1, 2) }}
{{ 'ab' | upper | lower | title | capitalize | trim }}{{ 5 | upper }}{{ none | lower }}{{ 5 | trim }}{{ none | title }}{{ 1.5 | capitalize }}{{ undefined_name | upper }}|{{ [1] | upper }}
{{ undefined_name | trim }}{{ undefined_name | e }}{{ undefined_name | replace('a', 'b') }}{{ undefined_name | int }}{{ undefined_name | float }}{{ undefined_name | sort }}{{ undefined_name | unique | list }}{{ undefined_name | sum }}{{ undefined_name | max }}{{ undefined_name | dictsort }}
{{ undefined_name | int }}
{{ undefined_name | float }}
{{ undefined_name | abs }}
{{ undefined_name | round }}
{{ undefined_name | indent }}
{{ undefined_name | title }}
{{ undefined_name | wordcount }}
{% set ns = namespace(a=1) %}{{ ns.b is defined }}{{ ns['a'] }}
{{ dict([('a', 1)]) }}{{ dict({'a': 1}, b=2) }}{{ dict() }}
{{ loop is defined }}{% for i in [1, 2, 3] %}{{ loop.nextitem }}{{ loop.revindex0 }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.changed(i // 2) }}{% endfor %}
{% for i in [1] %}{{ loop.cycle() }}{% endfor %}
{% for x in messages | map(attribute='role') %}{{ loop.length }}{{ loop.last }}{{ x }}{% endfor %}
{{ 'a' * 3 }}{{ 'é'[0] }}{{ 'abc'[5] is defined }}{{ 'abc'[-1] }}{{ [1][true] is defined }}{{ [1, 2][1.0] is defined }}{{ {'a': 1}.a }}{{ {'a': 1}['b'] is defined }}{{ {1: 'x'}[true] }}{{ {1: 'x'}[1.0] }}{{ {'a': 1}[none] is defined }}
{{ messages[0].role[0] }}{{ messages[0]['role'][1:] }}{{ messages[-1]['content'] }}{{ messages[0].content.role is defined }}
{{ (1).x }}|{{ 'a'.x }}|{{ none.x }}|{{ [].x }}
{{ x.y.z }}
{{ 1_000 }}{{ 0x1f }}{{ 0b11 }}{{ 0o17 }}{{ 1e3 }}{{ 1.5e-7 }}{{ 123456789012345678901234567890 }}
{{ 'abc'.index('c') }}{{ 'abc'.rindex('c') }}{{ 'a b'.swapcase() }}{{ 'a'.zfill(3) }}{{ '-1'.zfill(4) }}{{ 'a'.center(4, '*') }}{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}{{ 'a\tb'.expandtabs(4) }}
{{ 'a{}b{}'.format(1, 'x') }}{{ '{0}{1}{0}'.format(1, 2) }}{{ '{a}'.format(a=3) }}{{ '{:>5}|{:<5}|{:^5}|{:05d}|{:.2f}'.format(1, 2, 3, 4, 5.0) }}{{ '{{}}'.format() }}
{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 5) }}{{ {'a': 1}.items() | list }}{{ {'a': 1, 'b': 2}.keys() | list }}{{ {'a': 1}.values() | list }}{{ {'a': 1}.keys() | length }}{{ 'a' in {'a': 1}.keys() }}{{ 1 in {'a': 1}.values() }}{{ ('a', 1) in {'a': 1}.items() }}
{{ 'a b c' | wordcount }}{{ 'hello world foo' | truncate(11) }}{{ 'hello world' | truncate(8, true) }}{{ 'hello' | truncate(3, true, '') }}{{ 'a' | center(5) }}|{{ '<' | forceescape }}
{{ ['a', 'b'] | map('upper') | list }}{{ ['1', 'x'] | map('int', 5) | list }}{{ ['1', 'x'] | map('int', default=6) | list }}{{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}{{ [{'a': {'b': 1}}] | map(attribute='a.b') | list }}{{ [[1, 2]] | map(attribute=1) | list }}{{ [[1, 2]] | map('first') | list }}{{ ['ab'] | map('replace', 'a', 'b') | list }}
{{ dict([('a', 1)]) }}{{ dict({'a': 1}, b=2) }}{{ dict() }}{{ dict([('a', 1)], a=2) }}
{{ dict([1]) }}
{{ dict(1) }}
{{ [] | tojson }}{{ [1, 'é', none, true, 1.0, {'a': ()}] | tojson }}{{ {1: 2, none: 3, 1.5: 5} | tojson }}{{ (1, 2) | tojson }}
{{ 'a' is lt 1 }}
{{ 1 is lt 2 }}{{ 2 is ge 2 }}{{ 'b' is gt 'a' }}{{ 1 is le 0 }}
{{ '{!r}'.format('a') }}{{ '{!s:>5}'.format('a') }}{{ '{!a}'.format('é\u200b') }}{{ '{0!r}{1!s}'.format([1], none) }}{{ '{a!r:>6}'.format(a='x') }}
{{ '{:,}'.format(1234567) }}{{ '{:_}'.format(1234567) }}{{ '{:,.2f}'.format(1234567.891) }}{{ '{:_x}'.format(123456789) }}{{ '{:>12,}'.format(1234567) }}{{ '{:012,}'.format(1234567) }}{{ '{:,}'.format(12.5) }}{{ '{:,d}'.format(-1234) }}
{{ '{:{}}'.format('a', 5) }}|{{ '{:{w}.{p}f}'.format(1.2345, w=8, p=2) }}|{{ '{:{f}{a}{w}}'.format('x', f='*', a='^', w=7) }}
{{ '{:{:{}}}'.format(1, 2, 3) }}
{{ '{:{:{:{}}}}'.format(1, 2, 3, 4) }}
{{ '{0}{}'.format(1, 2) }}
{{ '{}{0}'.format(1, 2) }}
{{ '{a.b}{a[b]}{a[c][0]}'.format(a={'b': 1, 'c': [5]}) }}
{{ '{0[0]}{0[1]}{1.x}'.format([1, 2], namespace(x=3)) }}
{{ '{a.x}|'.format(a={}) }}
{{ '{a[x]}|'.format(a={}) }}
{{ '{a.x.y}|'.format(a={}) }}
{{ '{.x}'.format({'x': 1}) }}
{{ '{[x]}'.format({'x': 1}) }}
{{ '{a.}'.format(a=1) }}
{{ '{a[]}'.format(a=1) }}
{{ '{a[0}'.format(a=1) }}
{{ '{a[0]x}'.format(a=[1]) }}
{{ '{'.format() }}
{{ '}'.format() }}
{{ '{a'.format(a=1) }}
{{ '{a!}'.format(a=1) }}
{{ '{a!r'.format(a=1) }}
{{ '{a!rx}'.format(a=1) }}
{{ '{a!x}'.format(a=1) }}
{{ '{a!}}'.format(a=1) }}
{{ '{{}}{{{}}}'.format(1) }}{{ '{{'.format() }}
{{ '{} {}'.format(1) }}
{{ '{x}'.format(1) }}
{{ '{}'.format(none) }}{{ '{}'.format(true) }}{{ '{:>5}'.format(true) }}{{ '{:d}'.format(true) }}{{ '{}'.format([1, 'a']) }}{{ '{}'.format({'a': 1}) }}{{ '{}'.format(undefined_name) }}{{ '{}'.format(1.0) }}{{ '{}'.format(1e20) }}
{{ '{:>5}'.format(none) }}
{{ '{:>5}'.format([1]) }}
{{ '{:d}'.format('a') }}
{{ '{:s}'.format(1) }}
{{ '{:d}'.format(1.5) }}
{{ '{:.2}'.format('abc') }}{{ '{:5.1}'.format('abc') }}|{{ '{:x}{:X}{:o}{:b}{:#x}{:#b}'.format(255, 255, 8, 5, 255, 5) }}{{ '{:e}{:E}{:g}{:G}{:%}'.format(1234.5, 1234.5, 1234.5, 1e20, 0.5) }}
{{ '{:+}{: }{:-}{:+.1f}'.format(1, 1, 1, 1.25) }}{{ '{:=+8}'.format(5) }}{{ '{:^7}'.format('ab') }}|{{ '{:*<6}'.format(3) }}{{ '{:c}'.format(65) }}{{ '{:n}'.format(1234) }}{{ '{:08.3f}'.format(3.14159) }}{{ '{:.0f}'.format(2.5) }}{{ '{:.3}'.format(1234.5) }}{{ '{:g}'.format(0.00001) }}
{{ '{:,}'.format('a') }}
{{ '{:.2d}'.format(1) }}
{{ '{:,s}'.format('a') }}
{{ '{:q}'.format(1) }}
{{ '{:5%}'.format(0.25) }}{{ '{:.1%}'.format(0.256) }}{{ '{:,}'.format(0) }}{{ '{:,}'.format(999) }}{{ '{:_b}'.format(255) }}{{ '{:,.0f}'.format(1e6) }}
{{ '{:,x}'.format(255) }}
{{ '{a}{b}'.format_map({'a': 1, 'b': 2}) }}{{ ''.format_map({}) }}{{ 'x'.format_map(5) }}{{ '{a.b}'.format_map({'a': {'b': 1}}) }}
{{ '{}'.format_map({}) }}
{{ '{a}'.format_map({}) }}
{{ '{a}'.format_map([1]) }}
{{ '{a}'.format_map(a=1) }}
{{ 'a'.format_map() }}
{{ 'a'.format_map({}, {}) }}
{{ ('<{}>' | safe).format('<') }}{{ ('{}' | safe).format('<' | safe) }}{{ ('{!r}' | safe).format('<') }}{{ ('{:>5}' | safe).format('<') }}{{ ('{a}' | safe).format_map({'a': '<'}) }}{{ ('{}' | safe).format(1) + '<' }}{{ '{}'.format('<' | safe) + '<' }}
{{ ('{:>5}' | safe).format('<' | safe) }}
{{ 'ßẞ\u0131İΣςǅǈﬁKÅ'.casefold() }}{{ 'Ꭰꭰᏸ'.casefold() }}{{ 'ABC'.casefold() == 'abc' }}{{ ('<A' | e).casefold() + '<' }}
{{ 'a'.casefold(1) }}
{{ 100 | filesizeformat }}{{ 1 | filesizeformat }}{{ 1000 | filesizeformat }}{{ 1024 | filesizeformat(true) }}{{ 1000000 | filesizeformat }}{{ 1048576 | filesizeformat(binary=true) }}{{ '1500' | filesizeformat }}{{ 1e30 | filesizeformat }}{{ 1e27 | filesizeformat }}{{ 1.5 | filesizeformat }}{{ -5 | filesizeformat }}{{ -5000 | filesizeformat }}{{ 0 | filesizeformat }}{{ true | filesizeformat }}{{ 999.9 | filesizeformat }}{{ 999999 | filesizeformat }}{{ 'inf' | float | filesizeformat }}{{ 'nan' | filesizeformat }}{{ -0.5 | filesizeformat }}{{ 1023 | filesizeformat(true) }}{{ 123456789012345678901234 | filesizeformat(true) }}
{{ 'a' | filesizeformat }}
{{ none | filesizeformat }}
{{ undefined_name | filesizeformat }}
{{ [] | filesizeformat }}
{{ '-inf' | filesizeformat }}
{{ '<b>Hi</b>  <!-- c > --> x\n\ty &amp; &lt;b&gt; &#38; &#x26; &#x1F600; & a<b' | striptags }}{{ '<' | striptags }}{{ 'a <!-- b' | striptags }}{{ 5 | striptags }}{{ none | striptags }}{{ undefined_name | striptags }}{{ '<p>&amp;lt;</p>' | striptags }}{{ ('<b>x</b>' | e) | striptags }}{{ '&#0;&#xd800;&#99999999999;&#13;a&#1;b&#x;&#;&;' | striptags }}{{ '<a><b>' | striptags }}{{ '&lt;' | striptags + '<' }}{{ '&lt;' | striptags | e }}{{ '<!-->x-->y' | striptags }}{{ '&#x41 &#65b' | striptags }}
{{ 'a b/c?d=é&f+~' | urlencode }}{{ {'a b': 'c/d', 'e': 1} | urlencode }}{{ [('a', 1), ['b', none]] | urlencode }}{{ ['ab', 'cd'] | urlencode }}{{ 5 | urlencode }}{{ none | urlencode }}{{ undefined_name | urlencode }}{{ {} | urlencode }}{{ '' | urlencode }}{{ ('<' | e) | urlencode }}{{ {'a': [1, 2]} | urlencode }}{{ 1.5 | urlencode }}{{ {'a': undefined_name} | urlencode }}
{{ [1] | urlencode }}
{{ ['a'] | urlencode }}
{{ [(1, 2, 3)] | urlencode }}
{{ {'a': 1, 'b': none, 'c': undefined_name, 'd': '<"'} | xmlattr }}|{{ {'a': 1} | xmlattr(false) }}|{{ {} | xmlattr }}|{{ {'a': none} | xmlattr }}|{{ {'a&': '<' | safe} | xmlattr(autospace=false) }}|{{ {'a': [1]} | xmlattr }}{{ {'a': 1, 'b': 2} | xmlattr }}
{{ {'a b': 1} | xmlattr }}
{{ {'a>': 1} | xmlattr }}
{{ {1: 1} | xmlattr }}
{{ {1: none} | xmlattr }}
{{ [] | xmlattr }}
{{ undefined_name | xmlattr }}
{% autoescape true %}{{ {'a': '<'} | xmlattr }}{{ {'a': '<'} | xmlattr + '<' }}{% endautoescape %}
{{ 'hello world foo bar' | wordwrap(10) }}|{{ 'hello world' | wordwrap(5, false) }}|{{ 'abcdefghij' | wordwrap(4) }}|{{ 'abcdefghij kl' | wordwrap(4, false) }}|{{ 'a\nb c\n\nd' | wordwrap(3) }}|{{ 'well-known fact-based thing' | wordwrap(8) }}|{{ 'well-known fact-based' | wordwrap(8, break_on_hyphens=false) }}|{{ 'a b c' | wordwrap(3, wrapstring='<br>') }}|{{ 'x--y foo---bar' | wordwrap(4) }}|{{ '' | wordwrap }}|{{ '   lead' | wordwrap(5) }}|{{ 'trail   ' | wordwrap(6) }}
{{ 'a' | wordwrap(0) }}
{{ '' | wordwrap(0) }}
{{ '\n' | wordwrap(0) }}
{{ 5 | wordwrap }}
{{ undefined_name | wordwrap }}
{{ none | wordwrap }}
{{ ('<a> b' | safe) | wordwrap(3) + '<' }}{{ 'a < b' | wordwrap(3, wrapstring='<br>' | safe) + '<' }}
{{ [1, 2] | truncate(5) }}{{ undefined_name | truncate }}{{ {'a': 1} | truncate }}{{ (1, 2) | truncate(3) }}{{ range(3) | truncate(5) }}
{{ [1, 2, 3] | truncate(3, false, '...', 0) }}{{ 'abcdef' | truncate(3, false, '...', 0) }}
{{ [1, 2, 3, 4] | truncate(3, false, '...', 0) }}
{{ 5 | truncate }}
{{ none | truncate }}
{{ 'a' | truncate(5, false, '...', -1) }}
{{ 5 is filter }}{{ none is filter }}{{ undefined_name is filter }}{{ 'upper' is filter }}{{ '+' is filter }}{{ ':iter' is filter }}{{ 1.5 is test }}{{ '==' is test }}{{ 'in' is test }}{{ 'x' is test }}{{ (1,) is filter }}{{ 'tojson' is filter }}{{ 'wordwrap' is filter }}{{ 'random' is filter }}{{ 'endingwith' is test }}{{ true is test }}
{{ [] is filter }}
{{ {} is test }}
{{ undefined_name is callable }}{{ none is callable }}{{ range is callable }}{{ namespace is callable }}{{ [] is callable }}{{ 'a' is callable }}{{ cycler is callable }}{{ joiner is callable }}{{ dict is callable }}{{ 5 is callable }}{{ undefined_name.x is callable }}
{{ none[1:] }}
{% set n = none %}{{ n[1:] }}
{{ none[1:] is defined }}{{ none[:] }}{{ none[1:2:3] }}{{ 5[1:] }}{{ true[1:] }}{{ 1.5[:2] }}
{{ none[1:x] }}
{{ {}[1:] }}
{{ {'a': 1}[1:] }}
{{ (1)[1:] }}
{{ undefined_name[1:] }}
{{ [1,2][1:] }}{{ 'abc'[1:] }}
{{ 'abc'[::0] }}
{{ 'abc'['a':] }}
{{ none[1] }}{{ none['a'] }}{{ 5[0] }}
{{ {'b': 'x' * 60, 'a': [1, 'word ' * 30, ('a' * 50, 'b' * 50)], 3: none} | pprint }}{{ 'one\ntwo ' * 20 | pprint }}{{ ('x' * 100,) | pprint }}{{ {} | pprint }}{{ undefined_name | pprint }}{{ {'a': ['y' * 30] * 4} | pprint }}
""".strip().split("\n")


# Python warns of a subscript of None that a template has.
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("template", CALLS)
def test_a_call(tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], template: str) -> None:
    check(tokenizer, special_tokens, template)


# What lines are broken at, and what is quoted in them.
PIECES = [
    "word ",
    "  ",
    "\n",
    "-",
    "--",
    "é",
    "well-known ",
    "x" * 25,
    '"',
    "it's ",
    "日本 ",
    "0",
    "... ",
    "?--w",
    "A-b-c",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | TEXT,
    lambda values: (
        st.lists(values, max_size=5)
        | st.tuples(values, values)
        | st.dictionaries(st.sampled_from("abcdef") | st.integers(0, 5), values, max_size=4)
    ),
    max_leaves=12,
)
NUMBER = st.integers(-(10**12), 10**12) | st.floats(-1e20, 1e20)
SPEC = st.tuples(
    st.sampled_from(["", "", "<", ">", "=", "^", "*<", "é>", "0=", "-^"]),
    st.sampled_from(["", "", "+", "-", " "]),
    st.sampled_from(["", "", "0"]),
    st.sampled_from(["", "1", "8", "17"]),
    st.sampled_from(["", "", ",", "_"]),
    st.sampled_from(["", "", ".0", ".1", ".3"]),
    st.sampled_from(["", *"bcdeEfFgGnoxX%s"]),
).map("".join)


@given(VALUE)
def test_printing_pretty(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], value: object
) -> None:
    check(tokenizer, special_tokens, "{{ " + repr(value) + " | pprint }}")


@given(TEXT, st.integers(1, 30), st.booleans(), st.booleans())
def test_wrapping(
    tokenizer: candle_llama.Tokenizer,
    special_tokens: dict[str, str],
    text: str,
    width: int,
    in_words: bool,
    at_hyphens: bool,
) -> None:
    arguments = f"{width}, {in_words}, break_on_hyphens={at_hyphens}"
    check(tokenizer, special_tokens, "{{ " + repr(text) + f" | wordwrap({arguments})" + " }}")


@given(SPEC, NUMBER | st.booleans() | st.sampled_from(["", "abc", "é"]))
def test_formatting(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], spec: str, value: object
) -> None:
    check(tokenizer, special_tokens, "{{ " + repr(f"{{:{spec}}}") + f".format({value!r})" + " }}")
