# ruff: noqa: E501 (a template is one line)
"""Chat templates that would run, or grow, without end: an error, soon and in little memory."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
    started = time.process_time()
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=sys.stdin.read())
        error = None
    except ValueError as caught:
        error = str(caught)
    seconds = time.process_time() - started
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
    assert seconds < 8
    assert kibibytes < 1 << 20
