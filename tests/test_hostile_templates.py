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
