"""Compiles a template to Python that counts what it does, within bounds of its own."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator as JinjaCodeGenerator
from jinja2.compiler import Frame
from jinja2.environment import Environment
from jinja2.exceptions import TemplateSyntaxError

from candle_llama.chat_template.budget import BUDGET

# Longest source, in bytes; the longest in use have some twenty thousand.
_MAX_SOURCE = 1 << 20
# Most tokens in all, and within one pair of delimiters.
_MAX_TOKENS = 50_000
_MAX_TOKENS_OF_ONE = 4000
_MAX_ELIF = 1000
_MAX_DEPTH = 400
# Longest number; Python reads up to 4300 digits.
_MAX_DIGITS = 4300

_BEGINS = ("data", "block_begin", "variable_begin", "raw_begin", "linestatement_begin")


def parse(environment: Environment, source: str) -> nodes.Template:
    """Reads a template.

    Raises:
        TemplateSyntaxError: It is no template, or it is too large.
    """
    if len(source) > _MAX_SOURCE:
        raise _too_large(f"it has {len(source)} characters, the limit is {_MAX_SOURCE}", 1)
    _check_tokens(environment, source)
    template = environment.parse(source)
    _check_depth(template)
    return template


def _check_tokens(environment: Environment, source: str) -> None:
    total = of_one = elifs = 0
    for line, token, text in environment.lexer.tokeniter(source, None):
        if token == "whitespace":
            continue
        total += 1
        of_one = 0 if token in _BEGINS else of_one + 1
        elifs += text == "elif"
        if token in ("integer", "float") and len(text) > _MAX_DIGITS:
            raise _too_large("a number is too long", line)
        if total > _MAX_TOKENS or of_one > _MAX_TOKENS_OF_ONE or elifs > _MAX_ELIF:
            raise _too_large("too many expressions, or too many in one another", line)


def _check_depth(template: nodes.Template) -> None:
    level: list[nodes.Node] = [template]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            return
    raise _too_large("its parts are nested too deep", level[0].lineno)


def _too_large(reason: str, line: int) -> TemplateSyntaxError:
    return TemplateSyntaxError(f"the template is too large: {reason}", line)


class CodeGenerator(JinjaCodeGenerator):
    """Calls the environment at each turn of a loop, and for each operation that may make something large."""

    environment: Environment

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Writes the program of a node."""
        BUDGET.get().turn()
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - Jinja's names
        """Counts each turn, and each item that a test leaves out."""
        turn = nodes.ExprStmt(_internal("environment.turn()"), lineno=node.lineno)
        node.body.insert(0, turn)
        if node.test is not None:
            node.test = nodes.And(_internal("environment.turn()"), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    # --- text ---

    def _output_const_repr(self, group: Any) -> str:
        return f"environment.text({super()._output_const_repr(group)})"

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        # What else can be computed now would be computed before it can be counted.
        if not isinstance(node, (nodes.TemplateData, nodes.Const)):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("environment.write(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write(", context.eval_ctx.autoescape")
        elif frame.eval_ctx.autoescape:
            self.write(", True")
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Computes `a ~ b`."""
        # Where the template decides while it runs, Jinja does not escape.
        escaping = frame.eval_ctx.autoescape and not frame.eval_ctx.volatile
        self.write(f"environment.concatenate({bool(escaping)}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    # --- operators ---

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """Computes `a < b`, and `a < b < c`."""
        if len(node.ops) == 1:
            self.write(f"environment.compare({node.ops[0].op!r}, ")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(node.ops[0].expr, frame)
            self.write(")")
            return
        self.write("environment.compare_chain(")
        self.visit(node.expr, frame)
        self.write(", (")
        for operand in node.ops:
            self.write(f"({operand.op!r}, lambda: ")
            self.visit(operand.expr, frame)
            self.write("), ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        """Computes `a[b]`, and `a[b:c]`."""
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        # Of a constant, Jinja takes an impossible slice for undefined.
        is_constant = _is_constant(node.node) and _is_constant(node.arg)
        self.write("environment.getitem(" if is_constant else "environment.get_slice(")
        self.visit(node.node, frame)
        self.write(", slice(" if is_constant else ", ")
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            if part is None:
                self.write("None, ")
            else:
                self.visit(part, frame)
                self.write(", ")
        self.write("))" if is_constant else ")")

    # --- lists, tuples and dicts ---

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        """Computes `[a, b]`."""
        self._made(node, frame, super().visit_List)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        """Computes `(a, b)`, or assigns to it."""
        if node.ctx == "load":
            self._made(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        """Computes `{a: b}`."""
        for item in node.items:
            if not isinstance(item.key, nodes.Const):
                item.key = nodes.Call(_internal("environment.key"), [item.key], [], None, None)
        self._made(node, frame, super().visit_Dict)

    def _made(self, node: Any, frame: Frame, write: Callable[[Any, Frame], None]) -> None:
        if _is_constant(node):
            write(node, frame)
            return
        self.write("environment.made(")
        write(node, frame)
        self.write(")")

    def visit_EvalContextModifier(  # noqa: N802
        self, node: nodes.EvalContextModifier, frame: Frame
    ) -> None:
        """Changes whether text is escaped, by a value that is not computed before the template runs."""
        for option in node.options:
            if not isinstance(option.value, nodes.Const):
                option.value = nodes.Call(_internal("environment.key"), [option.value], [], None, None)
        super().visit_EvalContextModifier(node, frame)

    def visit_NSRef(self, node: nodes.NSRef, frame: Frame) -> None:  # noqa: N802
        """Assigns to an attribute of a namespace."""
        if node.attr.startswith("__"):
            self.fail("an attribute of a namespace begins with two underscores", node.lineno)
        super().visit_NSRef(node, frame)

    # --- calls ---

    def visit_Call(  # noqa: N802
        self, node: nodes.Call, frame: Frame, forward_caller: bool = False
    ) -> None:
        """Computes `f(a)`; what this class itself has written calls the environment without detours."""
        if not isinstance(node.node, nodes.InternalName):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write(f"{node.node.name}(")
        self.visit(node.args[0], frame)
        self.write(")")

    def signature(self, node: Any, frame: Frame, extra_kwargs: Mapping[str, Any] | None = None) -> None:
        """Writes the arguments of a call; those of `*a` and `**a` are counted before they are passed."""
        for name in ("dyn_args", "dyn_kwargs"):
            given = getattr(node, name)
            if given is not None:
                call = nodes.Call(_internal("environment.unpacked"), [given], [], None, None)
                setattr(node, name, call)
        super().signature(node, frame, extra_kwargs)


def _internal(name: str) -> nodes.InternalName:
    """A name of the generated program, which Jinja only makes for itself."""
    node = object.__new__(nodes.InternalName)
    nodes.Node.__init__(node, name)
    return node


def _is_constant(node: nodes.Node) -> bool:
    """Tells whether a value is written out in the template."""
    if isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Slice)):
        return all(map(_is_constant, node.iter_child_nodes()))
    return isinstance(node, nodes.Const)
