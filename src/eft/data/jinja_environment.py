"""Reading Jinja as transformers renders it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


@cache
def _environment() -> jinja2.Environment:
    """Loop controls, and the tag that marks what the model writes."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  # jinja2's own interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )


def parse_template(text: str) -> nodes.Template:
    """The syntax tree of a template. Raises jinja2.TemplateSyntaxError."""
    return _environment().parse(text)
