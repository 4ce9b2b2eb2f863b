# ruff: noqa: E501 (a template is one line)
"""Chat templates that would run, or grow, without end: an error, soon and in little memory."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from side_by_side import side_by_side

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
    "deep methods": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = {'a': ns.x}.items %}{% endfor %}",
    "deep generators": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = [ns.x] | select %}{% for y in ns.x %}{% endfor %}{% endfor %}",
    "batches of batches": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x | batch(1) %}{% endfor %}",
    "deep namespaces": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}{{ ns }}",
    "a chain of namespaces": "{% set root = namespace() %}{% set end = namespace(n=[root]) %}{% for i in range(9) %}{% for j in range(99999) %}"
    "{% set last = end.n[0] %}{% set next = namespace() %}{% set last.x = [next] %}{% set end.n = [next] %}{% endfor %}{% endfor %}",
    "shared namespaces": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.y = namespace(a=ns.x, b=ns.x) %}{% set ns.x = ns.y %}{% endfor %}{{ ns.x }}",
    "many namespaces": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = namespace() %}{% endfor %}{% endfor %}",
    "cyclers in cyclers": "{% set ns = namespace(c=1) %}{% for i in range(99999) %}{% set ns.c = cycler(ns.c) %}{% endfor %}",
    "joiners in joiners": "{% set ns = namespace(j=1) %}{% for i in range(99999) %}{% set ns.j = joiner([ns.j]) %}{% endfor %}",
    "long cyclers": "{% for i in range(99999) %}{% set x = cycler(*([1] * 100000)) %}{% endfor %}",
    "varargs": "{% macro f() %}{{ varargs | length }}{% endmacro %}{% set l = [1] * 100000 %}{% for i in range(99999) %}{{ f(*l) }}{% endfor %}",
    "kwargs": "{% macro f() %}{{ kwargs | length }}{% endmacro %}{% set d = dict(range(99998) | map('string') | batch(2)) %}{% for i in range(99999) %}{{ f(**d) }}{% endfor %}",
    "wrapping": "{% set s = 'ab-cd ' * 100000 %}{% for i in range(99999) %}{% set x = s | wordwrap(1) %}{% endfor %}",
    "wrapping hyphens": "{% set s = '-' * 1000000 %}{% for i in range(99999) %}{% set x = s | wordwrap(500000) %}{% endfor %}",
    "wrapping by a string": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "printing pretty": "{% set l = [['a' * 50] * 1000] * 100 %}{% for i in range(99999) %}{% set x = l | pprint %}{% endfor %}",
    "printing long strings pretty": "{% set s = 'a ' * 1000000 %}{% for i in range(99999) %}{% set x = s | pprint %}{% endfor %}",
    "printing shared lists pretty": "{% set ns = namespace(x=[1]) %}{% for i in range(140) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | pprint }}",
    "printing long keys pretty": "{% set d = {'a' * 1000000: 'b ' * 1000000} %}{{ d | pprint }}",
    "tags": "{% set s = '<a>&amp;' * 1000000 %}{% for i in range(99999) %}{% set x = s | striptags %}{% endfor %}",
    "tags without an end": "{% set s = '<' * 10000000 %}{% for i in range(99999) %}{% set x = s | striptags %}{% endfor %}",
    "queries": "{% set s = 'é' * 1000000 %}{% for i in range(99999) %}{% set x = s | urlencode %}{% endfor %}",
    "queries of pairs": "{% set l = [['a', 'b']] * 100000 %}{% for i in range(99999) %}{% set x = l | urlencode %}{% endfor %}",
    "attributes of tags": "{% set d = {'a': '<' * 1000000} %}{% for i in range(99999) %}{% set x = d | xmlattr %}{% endfor %}",
    "sizes of files": "{% set s = '1' * 10000000 %}{% for i in range(99999) %}{% set x = s | filesizeformat %}{% endfor %}",
    "folding": "{% set s = 'ẞ' * 1000000 %}{% for i in range(99999) %}{% set x = s.casefold() %}{% endfor %}",
    "fields": "{{ ('{0:>10000}' * 10000).format(1) }}",
    "fields of long strings": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "paths of fields": "{% set s = '{0' ~ '[0]' * 100000 ~ '}' %}{% for i in range(99999) %}{% set x = s.format('a') %}{% endfor %}",
    "formats": "{% set s = '{0}' * 100000 %}{% for i in range(99999) %}{% set x = s.format('') %}{% endfor %}",
    "comparing keys": "{% set d = dict(range(99998) | batch(2)) %}{% for i in range(99999) %}{% set x = d.keys() == d.keys() %}{% endfor %}",
    "values in": "{% set d = dict(range(99998) | batch(2)) %}{% for i in range(99999) %}{% set x = 'a' in d.values() %}{% endfor %}",
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
    "attributes of a sort": "{{ range(100000) | sort(attribute='real,' * 10 ** 4) }}",
    "a deep attribute of a sort": "{{ range(100000) | sort(attribute='real.' * 10 ** 6) }}",
    "a deep attribute of map": "{{ range(100000) | map(attribute='real.' * 10 ** 6) | list }}",
    "a deep attribute of select": "{{ range(100000) | selectattr('real.' * 10 ** 6) | list }}",
    "a deep attribute of groupby": "{{ range(100000) | groupby('real.' * 10 ** 6) }}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    "sorting long strings": "{% set s = 'a' * 1000000 %}{{ ([s ~ 'b', s ~ 'c'] * 100000) | sort }}",
    "sorting deep lists": "{% set ns = namespace(x=[1]) %}{% for i in range(140) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ [ns.x, ns.x] | sort }}",
    "comparing shared lists": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "unique long strings": "{% set s = 'a' * 1000000 %}{{ ([s] * 100000) | unique | list }}",
    "unique shared tuples": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ [ns.x] | unique | list }}",
    "groups": "{% for i in range(99999) %}{% set x = ([{'a': 1}] * 100000) | groupby('a') %}{% endfor %}",
    "largest of long strings": "{% set s = 'a' * 1000000 %}{{ ([s] * 100000) | max }}",
    "summing tuples": "{{ ([(1, 2)] * 100000) | sum(start=()) }}",
    "joining": "{% for i in range(99999) %}{% set x = range(99999) | join %}{% endfor %}",
    "mapping": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "mapping replace": "{{ (['a' * 100000] * 100000) | map('replace', 'a', 'b') | list }}",
    "lists of strings": "{% for i in range(99999) %}{% set x = ('a' * 999999) | list %}{% endfor %}",
    "strip by a set": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% set x = s.strip(s) %}{% endfor %}",
    "trim by a set": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% set x = s | trim(s) %}{% endfor %}",
    "finding": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% set x = s.find('b') %}{% endfor %}",
    "counting": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% set x = s.count('a') %}{% endfor %}",
    "finding a long part": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% set x = s.find('a' * 5000000 ~ 'b') %}{% endfor %}",
    "finding in reverse": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% set x = s.rfind('b' ~ 'a' * 5000000) %}{% endfor %}",
    "finding in a part": "{% set s = 'é' * 10000000 %}{% for i in range(99999) %}{% set x = s.find('b', 5000000, 9000000) %}{% endfor %}",
    "replacing": "{% set s = 'ab' * 5000000 %}{% for i in range(99999) %}{% set x = s.replace('b', 'c') %}{% endfor %}",
    "replacing nothing": "{% set s = 'ab' * 5000000 %}{% for i in range(99999) %}{% set x = s.replace('c', 'd') %}{% endfor %}",
    "splitting once": "{% set s = 'ab' * 5000000 %}{% for i in range(99999) %}{% set x = s.split('c', 1) %}{% endfor %}",
    "splitting lines": "{% set s = 'ab' * 5000000 %}{% for i in range(99999) %}{% set x = s.splitlines() %}{% endfor %}",
    "partitioning": "{% set s = 'ab' * 5000000 %}{% for i in range(99999) %}{% set x = s.partition('c') %}{% endfor %}",
    "starting with many": "{% set s = 'a' * 100000 %}{% for i in range(99999) %}{% set x = s.startswith((s ~ 'b',) * 100000) %}{% endfor %}",
    "looking up long keys": "{% set s = 'a' * 10000000 %}{% set d = {s: 1} %}{% for i in range(99999) %}{% set x = d[s] %}{% endfor %}",
    "getting long keys": "{% set s = 'a' * 10000000 %}{% set d = {s: 1} %}{% for i in range(99999) %}{% set x = d.get(s) %}{% endfor %}",
    "long keys in": "{% set s = 'a' * 10000000 %}{% set d = {s: 1} %}{% for i in range(99999) %}{% set x = s in d %}{% endfor %}",
    "long keys of dicts": "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% set x = {s: 1} %}{% endfor %}",
    "a list in": "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = 'a' in l %}{% endfor %}",
    "a range in": "{% for i in range(99999) %}{% set x = 'a' in range(99999) %}{% endfor %}",
    "index": "{% set l = range(99999) | list %}{% for i in range(99999) %}{% set x = l.count('a') %}{% endfor %}",
    "center": "{{ 'a' | center(10 ** 12) }}",
    "center method": "{{ 'a'.center(10 ** 12) }}",
    "zfill": "{{ 'a'.zfill(10 ** 12) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(10 ** 6) }}",
    "indentation of nothing": "{{ '' | indent(10 ** 12) }}",
    "indentation by a string": "{{ ('\n' * 1000000) | indent('a' * 1000000) }}",
    "cases": "{% set s = 'aB' * 10000000 %}{% for i in range(99999) %}{% set x = s | title %}{% endfor %}",
    "counting words": "{% set s = 'é ' * 1000000 %}{% for i in range(99999) %}{% set x = s | wordcount %}{% endfor %}",
    "kinds of characters": "{% set s = 'é' * 1000000 %}{% for i in range(99999) %}{% set x = s.isalpha() %}{% endfor %}",
    "representations": "{% set s = 'é\u200b' * 1000000 %}{% for i in range(99999) %}{% set x = [s] | string %}{% endfor %}",
    "escapes": "{% set s = '<' * 5000000 %}{% for i in range(99999) %}{% set x = s | e %}{% endfor %}",
    "json with indent": "{{ ([[[1] * 100] * 100] * 100) | tojson(indent=1000) }}",
    "json of strings": "{% set s = '\u0001' * 5000000 %}{% for i in range(99999) %}{% set x = s | tojson %}{% endfor %}",
    "json of shared lists": "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "json sorted": "{% for i in range(99999) %}{% set x = ([{'b': 1, 'a': 2}] * 100000) | tojson(sort_keys=true) %}{% endfor %}",
    "json separators": "{{ range(99999) | list | tojson(separators=('a' * 1000000, 'b')) }}",
    "numbers": "{% set s = '1' * 10000000 %}{% for i in range(99999) %}{% set x = s | int %}{% endfor %}",
    "floats": "{% set s = '1' * 10000000 %}{% for i in range(99999) %}{% set x = s | float %}{% endfor %}",
    "many widths": "{{ ('%9999d' * 100000) % ((1,) * 100000) }}",
    "a dict of pairs": "{% for i in range(99999) %}{% set x = dict([(1, 2)] * 100000) %}{% endfor %}",
    "arguments": "{% macro f() %}{% endmacro %}{% for i in range(99999) %}{{ namespace(*([1] * 100000)) }}{% endfor %}",
    "many arguments": "{% for i in range(99999) %}{% set x = dict(*[[1] * 1000000], **{}) %}{% endfor %}",
    "unpacking": "{% for i in range(99999) %}{% for a, b in ['a' * 30000000] %}{% endfor %}{% endfor %}",
    "defaults of macros": "{% macro f(a, b=f(a)) %}{% endmacro %}{{ f(1) }}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if j %}{% endfor %}{% endfor %}",
    "loops in filtered loops": "{% for i in range(99999) if range(99999) | list %}{% endfor %}",
    "the cycle of nothing": "{% for i in [1] %}{{ loop.cycle() }}{% endfor %}",
    "changes": "{% set a, b = range(99999) | list, range(99999) | list %}{% for i in range(99999) %}{% set x = loop.changed(a if i % 2 else b) %}{% endfor %}",
    "the clock": "{{ strftime_now('%A' * 1000000) }}",
    "long names": "{{ undefined." + "a" * 1_000_000 + ".b }}",
    "names of filters": "{{ 1 | " + "a" * 1_000_000 + " }}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a long message": "{{ raise_exception('a' * 30000000) }}",
    "source": "{# long #}" + "a" * (2 << 20),
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
    "chain of loops": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% for j in [ns.x] %}{% set ns.x = loop %}{% endfor %}{% endfor %}",
    "chain of undefined": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = {'a': ns.x}.foo %}{% endfor %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "maps of maps": "{% set ns = namespace(g=[1]) %}{% for i in range(99999) %}{% set ns.g = ns.g | map('string') %}{% endfor %}",
    "lists by batch": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x | batch(1) | list %}{% endfor %}",
    "tuples by varargs": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{% for i in range(99999) %}{{ f(ns.x) }}{% endfor %}{{ {ns.x: 1} }}",
    "dicts by kwargs": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}{% for i in range(99999) %}{{ f(a=ns.x) }}{% endfor %}{{ ns.x }}",
    "items of items": "{% set ns = namespace(x={'a': 1}) %}{% for i in range(99999) %}{% set ns.x = dict(a=ns.x.items()) %}{% endfor %}",
    "calling a shared tuple": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x() }}",
    "item of a shared tuple": "{% set ns = namespace(x=(1,)) %}{% for i in range(20) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{% for i in range(99999) %}{{ messages[0][ns.x] }}{{ messages[0].get(ns.x) }}{% endfor %}",
    "is odd of a width": "{{ '%999999999d' is odd }}",
    "is divisibleby of a width": "{{ '%999999999d' is divisibleby 3 }}",
    "star width": "{{ '%*d' % (10**9, 1) }}",
    "star precision": "{{ '%.*f' % (10**9, 1.5) }}",
    "zeros before a width": "{{ '%0000000000000000999999999d' % 1 }}",
    "width after a key": "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
    "digits as a format": "{{ ('9' * 30000000) % 1 }}",
    "stars as a format": "{{ ('*' * 30000000) % () }}",
    "percent signs": "{{ ('%%' * 10000000) % () }}",
    "keys of printf": "{{ ('%(a)s' * 100000) % {'a': 'b' * 100000} }}",
    "braces": "{{ ('{{' * 15000000).format() }}",
    "nested width": "{{ '{:{}}'.format('', 10**9) }}",
    "format spec of digits": "{{ '{:{}}'.format(1, '1 ' * 1000000) }}",
    "format map": "{{ ('{a}' * 1000000).format_map({'a': 'x' * 1000000}) }}",
    "join by separators": "{{ ([1]*100000) | tojson(separators=(['a'*1000000, 'b'] | map('string'))) }}",
    "separators of a dict": "{{ ([1]*100000) | tojson(separators={'a'*1000000: 1, 'b': 2}) }}",
    "json indent string": "{{ ([1]*100000) | tojson(indent='x'*100000) }}",
    "json indent int": "{{ [[[1]]] | tojson(indent=10**12) }}",
    "paragraphs": "{{ lipsum(n=10**9) }}",
    "paragraphs of no words": "{{ lipsum(n=10**9, min=-5, max=0) }}",
    "many paragraphs": "{% for i in range(99999) %}{{ lipsum(n=200, max=200, html=false) }}{% endfor %}",
    "digits of a rounding": "{{ 5 | round(-10**9) }}",
    "power of powers": "{% set ns = namespace(n=2) %}{% for i in range(99999) %}{% set ns.n = ns.n ** 2 %}{% endfor %}",
    "product": "{% set ns = namespace(n=2) %}{% for i in range(99999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "sum of ints": "{% set ns = namespace(n=1) %}{% for i in range(99999) %}{% set ns.n = ns.n + ns.n %}{% endfor %}",
    "hexadecimal digits": "{{ ('f' * 1000000) | int(0, 16) }}",
    "urlize parens": "{{ ('a' ~ ')' * 100000) | urlize }}",
    "urlize dots": "{{ ('www.' ~ 'a-.' * 30000) | urlize }}",
    "urlize target": "{{ ('www.a.com ' * 3000) | urlize(target='x' * 100000) }}",
    "comments of tags": "{{ ('<!---->' * 1000000) | striptags }}",
    "truncate": "{{ ('a b ' * 5000000) | truncate(19000000, end='x' * 30000000) }}",
    "wordwrap words": "{{ ('a' * 3000000) | wordwrap(1) }}",
    "wordwrap hyphens": "{{ ('a-' * 1000000) | wordwrap(10) }}",
    "title words": "{{ ('a ' * 3000000) | title }}",
    "a long center": "{{ 'é' | center(30000000) }}" * 30,
    "escape all": "{% autoescape true %}{{ '<' * 30000000 }}{% endautoescape %}",
    "escape join": "{% autoescape true %}{{ (['<'] * 900000) | join('<' * 30) | length }}{{ ('<' * 900000) ~ ('<' * 30000000) }}{% endautoescape %}",
    "markup join": "{{ ('<' | safe).join(['<' * 1000000] * 30) }}",
    "markup format": "{{ (('{0}' * 1000) | safe).format('<' * 30000) }}",
    "html of namespace": "{% set ns = namespace(**{'__html__': ('\t' * 30000000).expandtabs}) %}{% autoescape true %}{{ ns }}{% endautoescape %}",
    "upper of ligatures": "{{ ('ΐ' * 10000000).upper() | length }}" * 50,
    "in lazy of shared": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x in ([b.x] | select) }}",
    "index error of shared": "{% set a = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% endfor %}{{ [].index(a.x) }}",
    "max of shared": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ [a.x, b.x] | max }}",
    "maps in maps": "{{ [[[1] * 1000] * 1000] | map('map', 'map', 'string') | list | length }}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "unpack a string": "{{ dict(*('a' * 30000000)) }}",
    "unpack lazies": "{% macro f() %}{% endmacro %}{{ f(*(range(99999) | slice(10**12))) }}",
    "self recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "self doubling": "{% block a %}x{% endblock %}{% for i in range(99999) %}{% for i in range(99999) %}{% for i in range(99999) %}{{ self.a() }}{% endfor %}{% endfor %}{% endfor %}",
    "caller recursion": "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "filter blocks": "{% filter upper %}" * 60
    + "{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}"
    + "{% endfilter %}" * 60,
    "loop length": "{% for i in (('a' * 30000000) | map('string')) %}{{ loop.length }}{% endfor %}",
    "loop last": "{% for i in range(99999) %}{% for i in range(99999) | map('string') %}{{ loop.length }}{% endfor %}{% endfor %}",
    "nested dict display": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = {ns.x: 1}.items() | list | first %}{% endfor %}",
    "tuple keys": "{% set ns = namespace(x=(1,)) %}{% for i in range(22) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{% for i in range(99999) %}{{ {ns.x: 1} | length }}{% endfor %}",
    "many messages": "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = ns.s + [messages] %}{% endfor %}",
    "locals": "".join(f"{{% set a{i} = 'a' * ({30_000_000 + i}) %}}" for i in range(50)),
    "wide strings": "".join(f"{{% set a{i} = 'ẞ' * ({15_000_000 + i}) %}}" for i in range(50)),
    "small lists": "{% for i in range(99999) %}{% for i in range(99999) %}{% set x = [i, [i], {'a': i}] %}{% endfor %}{% endfor %}",
    "output of bytes": "{% for i in range(99999) %}{% for i in range(99999) %}a{% endfor %}{% endfor %}",
    "keep strings": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + ['a' ~ i] %}{% endfor %}",
    "keep namespaces": "{% set ns = namespace(x=()) %}{% for i in range(99999) %}{% for i in range(99999) %}{% set n = namespace(a=1,b=2,c=3,d=4,e=5,f=6) %}{% set n.p = ns.x %}{% set ns.x = n %}{% endfor %}{% endfor %}",
    "pprint wide": "{{ range(99999) | list | pprint }}",
    "repr nul": "{{ ['\\x00' * 30000000] | string | length }}",
    "rsplit": "{{ ('a' * 10000000).rsplit('b' ~ 'a' * 5000000) }}",
    "splitlines": "{{ ('\\n' * 30000000).splitlines() }}",
    "partition": "{% for i in range(99999) %}{{ ('a' * 10000000).rpartition('ab') | length }}{% endfor %}",
    "ljust fill": "{{ 'a'.ljust(20000000, '\U0001f600') | length }}",
    "many zfill": "{% for i in range(99999) %}{% set x = 'a'.zfill(30000000) %}{% endfor %}",
    "strftime": "{% for i in range(99999) %}{{ strftime_now('%c' * 500) }}{% endfor %}",
    "raise list": "{% set a = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% endfor %}{{ raise_exception(a.x) }}",
    "cycle": "{% for i in range(99999) %}{{ cycler(*range(99999)).next() }}{% endfor %}",
    "compare chain": "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{{ s <= s ~ '' <= s }}{% endfor %}",
    "sort mixed": "{{ ([('a' * 1000, 1)] * 900000) | sort | length }}",
    "batch fill": "{{ ([1] * 900000) | batch(1) | list | length }}" * 20,
    "slice many": "{{ ([1] * 900000) | slice(900000) | list | length }}" * 20,
    "slices that say whether to escape": "{% autoescape ('a' | center(30000000))"
    + "[::-1]" * 380
    + " %}{% endautoescape %}",
    "strings that say whether to escape": "{% autoescape "
    + "(" * 60
    + "('a' | center(30000000))"
    + " ~ 'b')" * 60
    + " %}{% endautoescape %}",
    "many names": "{{ a }}" * 33000,
    "nested blocks of with": "{% with a = 1 %}" * 5000 + "{% endwith %}" * 5000,
    "a long number": "{{ " + "1" * 1_000_000 + " }}",
    "a long hexadecimal number": "{{ 0x" + "f" * 4200 + " }}",
    "beginnings": "{{" * 500_000,
    "comments": "{# x #}" * 100_000,
    "breaks in generations": "{% for i in [1] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
}
# What ends a hostile template: our bounds, or else Jinja's and Python's own errors.
REFUSALS = ("ExceededError", "RecursionError", "TemplateSyntaxError")
OTHERWISE = {
    "arguments": "TypeError",
    "many arguments": "TypeError",
    "unpacking": "ValueError",
    "the cycle of nothing": "TypeError",
    "long names": "UndefinedError",
    "names of filters": "TemplateAssertionError",
    "a long message": "TemplateError",
    "html of namespace": "SecurityError",
    "a long hexadecimal number": "ValueError",
    "breaks in generations": "SyntaxError",
}
RUN = textwrap.dedent("""
    import json, resource, sys, time
    import candle_llama
    tokenizer = candle_llama.load_tokenizer(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=sys.stdin.read())
        error = cause = None
    except ValueError as caught:
        error, cause = str(caught), type(caught.__cause__).__name__
    seconds = time.process_time() - started
    print(json.dumps([error, cause, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
""")


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tiny: Path
) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    def run(name: str) -> CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", RUN, str(tiny)],
            input=HOSTILE[name],
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=60,
        )

    with side_by_side(request, "test_a_hostile_template", run) as outcomes:
        yield outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template(
    request: pytest.FixtureRequest, outcomes: dict[str, Future[CompletedProcess[str]]], name: str
) -> None:
    done = outcomes[request.node.nodeid].result()
    assert done.returncode == 0, done.stderr
    error, cause, seconds, kibibytes = json.loads(done.stdout)
    assert error is not None, "no error"
    assert len(error) < 2500
    assert seconds < 8
    assert kibibytes < 600 << 10
    assert cause in REFUSALS or cause == OTHERWISE.get(name), (cause, error)
