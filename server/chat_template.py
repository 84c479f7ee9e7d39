"""A model's own chat template: messages → the prompt that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.serving_config import ChatTemplateName
from server.errors import InvalidRequest
from server.token_bytes import TokenizerError

# Templates of models that are exported without one, for ServingConfig's chat_templates.
_ALTERNATE = """
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = none, messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('after an optional system message, user and assistant must take turns') }}
    {%- endif %}
{%- endfor %}
{%- if turns | length is even %}
    {{- raise_exception('the last message must come from the user') }}
{%- endif %}"""
_INTERNLM = """
{{- bos_token }}
{%- if system is not none %}{{- '<|System|>:' + system + '\n' }}{% endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '<|User|>:' + message.content + '<eoh>\n<|Bot|>:' }}
    {%- else %}
        {{- message.content + '<eoa>\n' }}
    {%- endif %}
{%- endfor %}"""
_LLAMA2 = """
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {%- if loop.first and system is not none %}{{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}
        {{- message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
CHAT_TEMPLATES: dict[ChatTemplateName, str] = {"internlm": _ALTERNATE + _INTERNLM, "llama2": _ALTERNATE + _LLAMA2}


class ChatTemplate:
    """A Jinja template with what Hugging Face's chat templates expect, in Jinja's sandbox.

    ``variables`` are the texts of the special tokens: ``bos_token``, ``eos_token``. ``takes_tools`` says whether the
    template shows tools to the model.

    Raises:
        TokenizerError: the template cannot be parsed.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._variables = dict(variables)
        try:
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation, ready for the model's answer if ``add_generation_prompt``.

        ``tools`` have OpenAI's shape.

        Raises:
            InvalidRequest: the template refuses the messages, or they have not the shape that it reads.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self._variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template refuses them: {error}", "messages") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as in Hugging Face's templates: without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
