"""What a chat template may reach: plain data and Jinja's own helpers, and nothing behind them."""

import pytest

import candle_llama
from jinja_reference import MESSAGES, check, rendered

# Undefined, which prints as nothing; used, it is an error.
REFUSED = """
().__class__
''.__class__
(5).__class__
1.5.__class__
none.__class__
messages.__class__
messages['__class__']
messages | attr('__class__')
messages[0].__class__
range.__class__
dict.mro
cycler.__init__
cycler(1).__class__
cycler(1).next.__func__
joiner().__init__
joiner.__init__
namespace.__init__
namespace.__dict__
namespace(a=1).__class__
namespace(a=1)._Namespace__attrs
namespace(a=1)['_Namespace__attrs']
lipsum.__globals__
lipsum | attr('__globals__')
raise_exception.__globals__
strftime_now.__code__
self.__class__
self._TemplateReference__context
self | attr('_TemplateReference__context')
f._func
f.__call__
f._environment
f.__class__
''.upper.__self__
''.format.__self__
''.format.__class__
([1] | select).gi_frame
([1] | select).gi_code
([1] | select)._items
([1] | reverse).__class__
(messages | groupby('role'))[0].__class__
(messages | groupby('role'))[0]._asdict
('' | safe).__html__
""".strip().split("\n")

CALLED = """
().__class__.__base__.__subclasses__()
''.__class__.mro()
cycler.__init__.__globals__
lipsum.__globals__['os']
namespace.__init__.__globals__
f._func.__globals__
f.arguments.append('b')
'a'.__getattribute__('upper')
messages.__len__()
messages.append(1)
messages.extend([1])
messages.insert(0, 1)
messages.pop()
messages.clear()
messages.remove(messages[0])
messages.reverse()
messages.sort()
messages[0].update({'a': 1})
messages[0].pop('role')
messages[0].popitem()
messages[0].setdefault('x', 1)
messages[0].clear()
messages[0].__setitem__('a', 1)
cycler(1).items.__iter__()
([1] | reverse).__reduce__()
(messages | groupby('role'))[0]._replace(grouper=1)
messages | attr('append') | attr('__self__')
(messages | attr('append'))(1)
[messages] | map('attr', 'append') | list | first | attr('__name__')
'{0.__class__.__mro__}'.format('')
'{0.__init__.__globals__}'.format(lipsum)
'{a.__class__.__base__}'.format_map({'a': 1})
('{0.__class__.__base__}' | safe).format(1)
""".strip().split("\n")
MACRO = "{% macro f(a) %}{% endmacro %}"


@pytest.mark.parametrize("expression", REFUSED)
def test_an_attribute_that_is_not_there(
    tokenizer: candle_llama.Tokenizer, special_tokens: dict[str, str], expression: str
) -> None:
    assert rendered(tokenizer, MACRO + "{{ (" + expression + ") is defined }}") == "False"
    check(tokenizer, special_tokens, MACRO + "{{ " + expression + " }}")


@pytest.mark.parametrize("expression", CALLED)
def test_a_use_of_what_is_refused(tokenizer: candle_llama.Tokenizer, expression: str) -> None:
    with pytest.raises(ValueError, match=r"unsafe|not safely callable|has no attribute") as caught:
        rendered(tokenizer, MACRO + "{{ " + expression + " }}")
    assert type(caught.value.__cause__).__name__ in ("SecurityError", "UndefinedError")


@pytest.mark.parametrize(
    "name", ["__class__", "_iterable", "_iterator", "_recurse", "_undefined", "__init__"]
)
def test_what_a_loop_hides(tokenizer: candle_llama.Tokenizer, name: str) -> None:
    template = "{% for m in messages recursive %}{{ loop." + name + " is defined }}{% endfor %}"
    assert rendered(tokenizer, template) == "False" * len(MESSAGES)


@pytest.mark.parametrize("name", ["__class__", "_context", "_stack", "__call__"])
def test_what_a_block_hides(tokenizer: candle_llama.Tokenizer, name: str) -> None:
    template = (
        "{% block a %}{% endblock %}{{ self.a."
        + name
        + " is defined }}{{ self['a']."
        + name
        + " is defined }}"
    )
    assert rendered(tokenizer, template) == "FalseFalse"


@pytest.mark.parametrize(
    "template",
    [
        "{{ dict['a'] }}",
        "{{ messages() }}",
        "{{ 'a'() }}",
        "{{ (1, 2)() }}",
        "{{ messages[0].role() }}",
        "{{ namespace()() }}",
        "{{ cycler(1)() }}",
        "{{ loop() }}",
        "{{ environment.filters }}",
        "{{ context.environment }}",
        "{{ undefined_name.__class__.__base__ }}",
        "{{ messages[0].missing._undefined_obj }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 'a'.upper %}{{ ns | e }}",
        "{{ namespace(**{'__html__': 'a'.upper}) | e }}",
        "{{ namespace([('__html__', 'a'.upper)]) | e }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.translate({97: 'b'}) }}",
        "{{ ''.maketrans('a', 'b') }}",
        "{{ (5).to_bytes(2, 'big') }}",
        "{{ {}.fromkeys([1]) }}",
        "{{ dict.fromkeys([1]) }}",
        "{% include 'x' %}",
        "{% include messages %}",
        "{% import self as x %}",
        "{% extends self %}",
    ],
)
def test_a_way_out_is_an_error_or_nothing(tokenizer: candle_llama.Tokenizer, template: str) -> None:
    text, cause = "", ""
    try:
        text = rendered(tokenizer, template)
    except ValueError as error:
        cause = type(error.__cause__).__name__
    assert text == ""
    assert cause not in ("AttributeError", "KeyError", "ExceededError")


def test_messages_stay_as_they_are(tokenizer: candle_llama.Tokenizer) -> None:
    messages = [{"role": "user", "content": "a", "extra": [1]}]
    rendered(tokenizer, "{% set m = messages[0] %}{% set m = dict(m, role='x') %}{{ m }}", messages)
    assert messages == [{"role": "user", "content": "a", "extra": [1]}]
