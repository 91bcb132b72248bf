"""Strategies of hypothesis for the records of `schema`."""
import dataclasses
import typing

from hypothesis import strategies as st

from srlm_jax import conversation, schema

# Parts of JSON files with tables, which are not lines.
RESULTS = (schema.Harness, schema.Distributions, schema.PromptSet, schema.Nearest, schema.Rows)
KINDS = [kind for kind in vars(schema).values()
         if dataclasses.is_dataclass(kind) and kind not in RESULTS]
FLOATS = st.floats(-1e15, 1e15)
COUNTS = st.integers(0, 10**15)
TYPES = {str: st.text(), int: COUNTS, float: FLOATS,
         float | None: st.none() | FLOATS,
         dict[str, int]: st.dictionaries(st.text(), COUNTS),
         tuple[int, ...]: st.lists(st.integers(0, 2**31)).map(tuple),
         tuple[float, ...]: st.lists(FLOATS).map(tuple),
         conversation.Messages: st.sampled_from(((), conversation.in_turns(['a', ' b', 'c'])))}


def any_record(kind):
  """A strategy for the records of a kind, with and without values that equal the default."""
  required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
  def any_value(hint):
    if hint in TYPES:
      return TYPES[hint]
    if typing.get_origin(hint) is typing.Literal:
      return st.sampled_from(typing.get_args(hint))
    return st.lists(any_record(typing.get_args(hint)[0]), max_size=3).map(tuple)
  fields = {name: any_value(hint) for name, hint in typing.get_type_hints(kind).items()}
  return st.fixed_dictionaries(
      {name: value for name, value in fields.items() if name in required},
      optional={name: value for name, value in fields.items() if name not in required}
  ).map(lambda values: kind(**values | _prompt(values)))


def _prompt(values) -> dict:
  """The prompt that a record with messages must have."""
  messages = values.get('messages')
  return dict(prompt=conversation.text(messages)) if messages else {}
