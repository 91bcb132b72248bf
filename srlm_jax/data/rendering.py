"""Renders chat templates: Jinja in a sandbox, with what transformers passes to a template.

One thing differs: the date (`strftime_now`) is fixed. A run then has the same prompts on every day,
so that it can be resumed and trained on the tokens that it sampled.
"""
from collections.abc import Mapping, Sequence
import datetime
import functools
import json

import jinja2
from jinja2 import ext, nodes, sandbox

from srlm_jax import InputError
from srlm_jax.conversation import Message

DATE = datetime.datetime(2024, 7, 26)  # the default of Llama 3's own templates


def render(source: str, messages: Sequence[Message], variables: Mapping[str, str], prompt: bool,
           where: str) -> str:
  """The text of messages in a template.

  variables: bos_token, eos_token and other special tokens. prompt: ask for the next response
  (add_generation_prompt). Raises InputError, which calls the template `where`, if the template is
  not valid, refuses the messages, or tries what the sandbox forbids.
  """
  template = _compile(source, where)
  try:
    return template.render(
        messages=[dict(role=m.role, content=m.content) for m in messages], tools=None,
        documents=None, add_generation_prompt=prompt, **variables)
  except jinja2.exceptions.SecurityError as error:
    raise InputError(f'{where} tries what the sandbox forbids ({_line(error)}); '
                     f'{ADVICE}') from error
  except Exception as error:  # a template is a program: it may raise anything
    raise InputError(f'{where} refuses the conversation ({_line(error)}); change the roles, or '
                     f'{ADVICE}') from error


ADVICE = 'correct the template, or set config.chat to plain, llama2 or chatml'


def _line(error: Exception) -> str:
  """The message of an error as one short line."""
  return ' '.join(f'{error or type(error).__name__}'.split())[:200]


@functools.lru_cache(maxsize=16)
def _compile(source: str, where: str) -> jinja2.Template:
  try:
    return _environment().from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise InputError(f'{where} is not valid Jinja (line {error.lineno}: {_line(error)}); '
                     f'{ADVICE}') from error
  except (RecursionError, SyntaxError, TypeError, ValueError, MemoryError) as error:
    raise InputError(f'{where} cannot be compiled ({_line(error)}); {ADVICE}') from error


@functools.cache
def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  """The environment that transformers gives to chat templates."""
  found = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation])
  found.filters['tojson'] = _to_json
  found.globals.update(raise_exception=_raise, strftime_now=DATE.strftime)
  return found


class _Generation(ext.Extension):
  """{% generation %} marks what an assistant says; it renders its body."""
  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Jinja's own filter escapes HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _raise(message: str):
  raise jinja2.TemplateError(message)
