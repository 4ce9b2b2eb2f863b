"""Runs templates with Jinja; imported when one is first rendered.

`compiler` makes a program of a template, which counts its turns and calls. `sandbox` is the environment that
the program runs in. `operators`, `methods`, `filters` and `functions` check what is about to be made, by the
sizes that `values` finds.
"""

from jinja2 import Template
from jinja2.nodes import Name

from candle_llama.chat_template.jinja.compiler import parse
from candle_llama.chat_template.jinja.sandbox import Environment

FILE = "<chat template>"
"""What tracebacks call a template."""

_environment = Environment()


def compile_template(source: str) -> tuple[Template, frozenset[str]]:
    """Makes a program of a template. Also returns the names that it reads.

    Raises:
        jinja2.TemplateSyntaxError: It is no template, or it is too large.
        SyntaxError: Python says so of the program, as of a `break` outside a loop.
    """
    parsed = parse(_environment, source)
    names = frozenset(node.name for node in parsed.find_all(Name) if node.ctx == "load")
    program = _environment.compile(parsed, filename=FILE)
    return Template.from_code(_environment, program, _environment.globals), names
