"""transformers' environment for chat templates, in which everything that a template does is counted."""

from collections.abc import Callable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, Namespace
from markupsafe import escape

from candle_llama.chat_template.budget import BUDGET, MAX_NESTING, ExceededError, size
from candle_llama.chat_template.jinja import filters, functions, operators
from candle_llama.chat_template.jinja.compiler import CodeGenerator
from candle_llama.chat_template.jinja.methods import ATTRIBUTES, METHODS, format_string
from candle_llama.chat_template.jinja.values import (
    VIEWS,
    attributes,
    count_made,
    sized,
    weigh,
    weigh_text,
)

_SUBSCRIPTABLE = (dict, list, tuple, str, range, TemplateReference)
# What Python's own classes have, whether or not a template may use it.
_EXISTING = {kind: frozenset(dir(kind)) for kind in (*METHODS, *ATTRIBUTES, *VIEWS, type(None))}
_NOTHING: frozenset[str] = frozenset()


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text; what it holds is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Reads up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        """Writes the body."""
        return caller()


class Environment(ImmutableSandboxedEnvironment):
    """Where templates run; one for all, as what a rendering uses is counted by its own budget."""

    code_generator_class = CodeGenerator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    intercepted_unops = frozenset(("+", "-"))

    def __init__(self) -> None:
        # Nothing is computed before it can be counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        self.filters: dict[str, Callable[..., Any]] = filters.filters()
        self.tests: dict[str, Callable[..., Any]] = filters.tests()  # type: ignore[assignment]
        self.globals = {name: function for name, (function, _) in functions.FUNCTIONS.items()}
        self._rules = dict(functions.FUNCTIONS.values())

    # --- what the compiled template calls ---

    def turn(self) -> bool:
        """Counts a turn of a loop."""
        BUDGET.get().turn()
        return True

    def text(self, text: str) -> str:
        """Counts text of the template that is written."""
        budget = BUDGET.get()
        budget.turn()
        budget.memory(2 * size(text))
        return text

    def write(self, value: Any, is_escaping: bool = False) -> str:
        """A value as text that is written."""
        budget = BUDGET.get()
        budget.turn()
        length = size(value) if isinstance(value, str) else weigh_text(value)
        if is_escaping:
            length *= operators.ESCAPED
        budget.room(length)
        text = escape(value) if is_escaping else str(value)
        # What it is written to may be twice as long as it.
        budget.memory(2 * size(text))
        return text

    def made(self, value: Any) -> Any:
        """Counts a list, tuple or dict that is written out in the template."""
        weigh(value)
        return count_made(value)

    def key(self, value: Any) -> Any:
        """Counts a look at the key of a dict."""
        operators.check_key(value)
        return value

    def unpacked(self, value: Any) -> Any:
        """What `*value` or `**value` passes."""
        return sized(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left` `operator` `right`."""
        return operators.binary(operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        """Computes `operator` `arg`."""
        return operators.unary(operator, arg)

    compare = staticmethod(operators.compare)
    compare_chain = staticmethod(operators.compare_chain)
    concatenate = staticmethod(operators.concatenate)
    get_slice = staticmethod(operators.get_slice)

    # --- attributes and items ---

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: an attribute, or else an item."""
        BUDGET.get().turn()
        kind = type(obj)
        if attribute not in _EXISTING.get(kind, _NOTHING):
            if kind is dict:
                return obj[attribute] if attribute in obj else self._missing(obj, attribute)
            if isinstance(obj, TemplateReference):
                return self.getitem(obj, attribute)
        return self.get_attribute(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: an item, or else an attribute."""
        BUDGET.get().turn()
        if isinstance(obj, Undefined):
            obj._fail_with_undefined_error()
        if isinstance(obj, _SUBSCRIPTABLE):
            if isinstance(obj, str):
                operators.look(obj)
            operators.check_key(argument)
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        if isinstance(argument, str):
            return self.get_attribute(obj, argument)
        return self._missing(obj, argument)

    def get_attribute(self, obj: Any, name: str) -> Any:
        """An attribute that templates may read; undefined if there is none, or it is another."""
        if isinstance(obj, Undefined):
            obj._fail_with_undefined_error()
        kind = type(obj)
        if kind is Namespace:
            if name.startswith("_"):
                return self.unsafe_undefined(obj, name)
            try:
                return attributes(obj)[name]
            except KeyError:
                return self._missing(obj, name)
        if name in _methods(kind) or name in ATTRIBUTES.get(kind, getattr(kind, "_fields", ())):
            return getattr(obj, name)
        if hasattr(obj, name):
            return self.unsafe_undefined(obj, name)
        return self._missing(obj, name)

    def _missing(self, obj: Any, name: Any) -> Undefined:
        # Not with the object itself, which it would hold on to.
        what = "None" if obj is None else f"{type(obj).__name__} object"
        if isinstance(name, str):
            return self.undefined(f"{what!r} has no attribute {name[:100]!r}", name=name)
        shown = repr(name) if isinstance(name, (int, float)) else f"of type {type(name).__name__}"
        return self.undefined(f"{what} has no element {shown}", name=shown)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """What a refused attribute is: an error when it is used."""
        reason = f"access to attribute {attribute[:100]!r} of {type(obj).__name__!r} object is unsafe."
        return self.undefined(reason, name=attribute, exc=SecurityError)

    # --- calls ---

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template may call: macros, loops, and what has a rule."""
        budget = BUDGET.get()
        budget.turn()
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        if args or kwargs:
            budget.memory(16 * (len(args) + len(kwargs)))
        if isinstance(obj, (BuiltinMethodType, MethodType)):
            return self._call_method(obj, args, kwargs)
        budget.depth += 1
        if budget.depth > MAX_NESTING:
            raise ExceededError(f"it calls macros and loops within one another more than {MAX_NESTING} times")
        try:
            if isinstance(obj, Macro):
                _check_rest(obj, args, kwargs)
                return count_made(obj(context.eval_ctx, *args, **kwargs))
            if isinstance(obj, (LoopContext, BlockReference, Joiner)):
                return count_made(obj(*args, **kwargs))
            if isinstance(obj, Undefined):
                return obj(*args, **kwargs)
            return self._call_function(obj, args, kwargs)
        finally:
            budget.depth -= 1

    def _call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, owner = method.__name__, method.__self__
        kind = type(owner)
        if kind is Generation:
            return method(*args, **kwargs)
        rule = _methods(kind).get(name)
        if rule is None:
            raise SecurityError(f"the method {name!r} of {kind.__name__!r} is not safely callable")
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                return count_made(format_string(self, owner, name, args, kwargs))
            if name == "join":
                args = tuple(map(sized, args))
        rule(owner, *args, **kwargs)
        return count_made(method(*args, **kwargs))

    def _call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = self._rules.get(function) if isinstance(function, (type, FunctionType)) else None
        if rule is None:
            if callable(function):
                raise SecurityError(f"{type(function).__name__!r} object is not safely callable")
            raise TypeError(f"{type(function).__name__!r} object is not callable")
        if function in (dict, Namespace):
            args = tuple(map(sized, args))
        rule(*args, **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Namespace):
            for name in attributes(result):
                if isinstance(name, str) and name.startswith("__"):
                    raise SecurityError(f"{name!r} is no name for an attribute of a namespace")
        return count_made(result)


def _methods(kind: type) -> dict[str, Callable[..., None]]:
    """The methods of a class. The groups of `groupby` are tuples with names."""
    found = METHODS.get(kind)
    return METHODS[tuple] if found is None and issubclass(kind, tuple) else found or {}


def _check_rest(macro: Macro, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Counts what a macro will have in `varargs` and `kwargs`."""
    if macro.catch_varargs:
        weigh(args[len(macro.arguments) :])
    if macro.catch_kwargs:
        weigh([value for name, value in kwargs.items() if name not in macro.arguments])
