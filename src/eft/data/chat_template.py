"""Which Jinja text renders conversations: the tokenizer's own, a built-in one, a file; with the run's variables in it.

Variables and the date are written into the text, so that one text says all there is to say: it is what trains, what is
saved with the tokenizer and what a server renders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from eft.config.data import DataConfig, DatasetConfig
from eft.config.templates import BUILT_IN_TEMPLATES, FALLBACK
from eft.core.errors import DataError, nearest
from eft.core.records import Message
from eft.data.jinja_environment import parse_template
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import RENDER_ERRORS, Layout, UnprovableError

_CLOCK = "strftime_now"


@cache
def built_in_template(name: str) -> str:
    """The text of one of BUILT_IN_TEMPLATES."""
    return (resources.files("eft.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def template_of(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, spec: DatasetConfig | None = None) -> str:
    """The template of the run, or of one entry. Raises as `resolve_template`."""
    chosen, jinja = cfg.chat_template, cfg.chat_template_jinja
    if spec is not None and (spec.chat_template is not None or spec.chat_template_jinja is not None):
        jinja = spec.chat_template_jinja
        chosen = spec.chat_template or "jinja"
    return resolve_template(
        tokenizer,
        chosen,
        jinja if chosen == "jinja" else None,
        variables=cfg.chat_template_kwargs,
        day=cfg.chat_template_date,
    )


def resolve_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    jinja: str | None,
    *,
    variables: Mapping[str, Any] | None = None,
    day: str | None = None,
) -> str:
    """The Jinja text that `chat_template` (and the keys beside it) mean.

    Args:
        tokenizer: gives its own template for `tokenizer_default`.
        template: `tokenizer_default`, a built-in name, `tokenizer_default_fallback_` and such a name, `jinja`, or the
            path of a Jinja file.
        jinja: text or path of a file, with `jinja`.
        variables: defaults of the template's variables.
        day: `2025-01-31`, what a template that writes today's date takes for today.

    Raises:
        DataError: the tokenizer has no template or lacks its tokens, no such file, the text is not valid Jinja, it
            writes today's date and `day` is not given, or a variable does not occur in it.
    """
    text = _text_of(tokenizer, template, jinja)
    tree = _parsed(text, template)
    text = _with_date(text, tree, day, template)
    text = _with_variables(text, tree, variables or {}, template)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat_template {template!r}: is not valid Jinja: {error.message}") from error
    except RENDER_ERRORS:
        pass  # the template refuses this one conversation; those of the rows are judged one by one
    return text


def _text_of(tokenizer: PreTrainedTokenizerBase, template: str, jinja: str | None) -> str:
    if template == "tokenizer_default":
        return _own_template(tokenizer)
    if template.startswith(FALLBACK):
        return (
            _own_template(tokenizer)
            if tokenizer.chat_template
            else _built_in(tokenizer, template.removeprefix(FALLBACK))
        )
    if template == "jinja":
        if not jinja:
            raise DataError("chat_template: jinja needs the text or file in `chat_template_jinja`")
        is_text = "{" in jinja or "\n" in jinja
        return jinja if is_text else _template_file(jinja, "chat_template_jinja")
    if template in BUILT_IN_TEMPLATES:
        return _built_in(tokenizer, template)
    return _template_file(template, "chat_template")


def _built_in(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if name not in BUILT_IN_TEMPLATES:
        raise DataError(f"chat_template: {name!r} is no built-in template; expected {', '.join(BUILT_IN_TEMPLATES)}")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in BUILT_IN_TEMPLATES[name] if token not in vocabulary]
    if missing:
        listed = ", ".join(f"'{token}'" for token in missing)
        raise DataError(
            f"chat_template: {name} needs {' and '.join(missing)} as tokens, which the tokenizer has not; add "
            f"`tokens: [{listed}]`, or use another chat_template"
        )
    text = built_in_template(name)
    for variable, value in (("bos_token", tokenizer.bos_token), ("eos_token", tokenizer.eos_token)):
        if variable in text and not value:
            raise DataError(f"chat_template: {name} needs a {variable}; set `special_tokens: {{{variable}: …}}`")
    return text


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise DataError(f"the tokenizer has chat templates {', '.join(own)} but no 'default'; set `chat_template`")
        own = own["default"]
    if not own:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template of its own; expected a built-in one, "
            "such as `chat_template: chatml` (which needs its <|im_start|> and <|im_end|> as tokens), or `jinja`, or a "
            "file"
        )
    return str(own)


def _template_file(name: str, key: str) -> str:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: the file {name!r} cannot be read ({error})") from error
    names = ["tokenizer_default", *BUILT_IN_TEMPLATES, "jinja"]
    close = nearest(path.name, [*names, *(entry.name for entry in path.parent.glob("*.jinja*"))])
    hint = f"; did you mean {close}?" if close else ""
    raise DataError(f"{key}: no file {name!r}; expected a Jinja file's path or one of {', '.join(names)}{hint}")


# ---- what is written into the text ----


def _parsed(text: str, name: str) -> nodes.Template:
    try:
        return parse_template(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno} is not valid Jinja: {error.message}"
        raise DataError(f"chat_template {name!r}: {problem}") from error


def _date_formats(tree: nodes.Template, name: str) -> Iterator[str]:
    """The formats in which the template asks for today's date."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == _CLOCK:
            argument = call.args[0] if call.args else None
            if not isinstance(argument, nodes.Const) or not isinstance(argument.value, str):
                raise DataError(f"chat_template {name!r}: line {call.lineno} asks for the date in no fixed format")
            yield argument.value


def _with_date(text: str, tree: nodes.Template, day: str | None, name: str) -> str:
    """The template with the clock stopped: it would give other ids every day."""
    if any(macro.name == _CLOCK for macro in tree.find_all(nodes.Macro)):
        return text  # it has been stopped before
    formats = list(dict.fromkeys(_date_formats(tree, name)))
    if not formats:
        if day is not None:
            raise DataError(f"chat_template_date: the template {name!r} writes no date; remove the key")
        return text
    if day is None:
        raise DataError(
            f"chat_template {name!r}: writes today's date (strftime_now), so the same rows would give other ids every "
            "day; set `chat_template_date: 2025-01-31` (any day; it is saved with the template)"
        )
    try:
        today = date.fromisoformat(day)
    except ValueError as error:
        raise DataError(f"chat_template_date: {day!r} is no day ({error}); expected such as 2025-01-31") from error
    lines = "".join(
        f"{{%- if format == {_literal(one)} -%}}{{{{- {_literal(today.strftime(one))} -}}}}{{%- endif -%}}"
        for one in formats
    )
    return f"{{%- macro {_CLOCK}(format) -%}}{lines}{{%- endmacro -%}}\n{_opened(text)}"


def _with_variables(text: str, tree: nodes.Template, variables: Mapping[str, Any], name: str) -> str:
    """The template with defaults for its variables."""
    names = {node.name for node in tree.find_all(nodes.Name)}
    for variable in variables:
        if variable not in names:
            close = nearest(variable, names)
            hint = f"; did you mean {close!r}?" if close else ""
            raise DataError(f"chat_template_kwargs: the template {name!r} has no variable {variable!r}{hint}")
    lines = "".join(
        f"{{%- if {variable} is not defined -%}}{{%- set {variable} = {_literal(value)} -%}}{{%- endif -%}}\n"
        for variable, value in variables.items()
    )
    return text if text.startswith(lines) else lines + _opened(text)


def _opened(text: str) -> str:
    """The text so that what is put before it, which ends in `-%}`, takes none of its own blanks."""
    return text if not text[:1].isspace() else "{{- '' }}" + text


def _literal(value: Any) -> str:
    """A JSON-like value as a Jinja expression. Raises DataError for anything else."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
        return f"'{escaped}'"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    raise DataError(f"chat_template_kwargs: {value!r} is a {type(value).__name__}; expected text, numbers, lists, …")


# ---- what is asked of a template ----


def stop_token_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The token that ends an assistant turn of this template; None where it writes none, so that a model trained on it
    never learns to stop. Raises DataError where the template cannot render a question and an answer."""
    messages: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    layout = Layout(tokenizer, template, messages, None, TokenizerFacts(tokenizer))
    try:
        _, end = layout.ends(1)
    except UnprovableError as error:
        raise DataError(f"the chat template cannot be used: {error}") from error
    if end is None:
        return None
    tokens = list(layout.facts.end_token.finditer(layout.text, end.start, end.stop))
    return tokens[-1].group() if tokens else layout.text[end.start : end.stop]
