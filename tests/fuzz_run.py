"""Fuzzing targets: what a run reads. See tests/fuzzing.py."""
import fuzzing
from fuzzing import Target
import samples

from srlm_jax import records, schema

ROWS = [samples.response('p/0'), samples.response('p/1', thinking='hm', token_ids=(1, 2)),
        samples.judgement('p/0', 0, 3.0), samples.pair('p'), samples.ranked('q', [0, 1, 1])]


def parse(kind):
  return lambda data: records.parse(data, 'x.jsonl:1', kind)


TARGETS = [
    Target('parse', [(type(row).__name__, records.dump(row).encode()) for row in ROWS],
           lambda given: records.parse(given[1], 'x.jsonl:1', getattr(schema, given[0]))),
    Target('read_any', [records.dump(row).encode() for row in ROWS],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl')),
]
