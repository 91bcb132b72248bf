"""Tasks of the sandbox for lm-evaluation-harness, from the held-out prompts of a run.

  python -m srlm_jax.sandbox.tasks --workdir=runs/demo
  python -m srlm_jax.eval.harness --model=m1=runs/demo/m1/model --model=m3=runs/demo/m3/model \\
    --tasks=sandbox_choice,sandbox_exact --include_path=runs/demo/eval/tasks --out=nlp.json

sandbox_choice: which of four responses is best? The oracle gives them 2, 3, 4 and 5 points.
sandbox_exact: is the greedy response one of all those with 5 points? Only of prompts for which
these can be listed.
"""
import itertools
import json
import os

from absl import flags
from etils import epath
import numpy as np

from srlm_jax import cli, InputError, records, schema
from srlm_jax.data import templates
from srlm_jax.sandbox import people, world

FOLDER = 'eval/tasks'   # in the workdir
POINTS = (2, 3, 4, 5)   # of the choices
MAX_TOKENS = 64         # a list of four things has fewer
TASK = '''\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{text}}}}"
{rest}
metadata: {{version: 1}}
'''
CHOICE = '''\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: best
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}'''
EXACT = f'''\
output_type: generate_until
doc_to_target: "{{{{answers}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {MAX_TOKENS}, do_sample: false}}
filter_list:
  - {{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}'''


def choice(prompt: str, rng: np.random.Generator) -> dict:
  """A document of sandbox_choice: four responses in random order, and the place of the best one."""
  points = rng.permutation(POINTS).tolist()
  return dict(prompt=prompt, text=_text(prompt), best=points.index(max(POINTS)),
              choices=[people.answer(prompt, rng, p) for p in points])


def exact(prompt: str) -> dict | None:
  """A document of sandbox_exact: all responses with 5 points; None if there are too many."""
  required = world.require(prompt)
  if len(required.right) > required.count:
    return None
  answers = [f'{opener} {world.listing(items)}.' for opener in world.OPENERS
             for items in itertools.permutations(required.right)]
  return dict(prompt=prompt, text=_text(prompt), answers=answers)


def _text(prompt: str) -> str:
  """What a model of the sandbox continues; bos comes from the tokenizer."""
  return templates.chat('plain', prompt, None)


def write(workdir, split: str) -> epath.Path:
  """Writes both tasks -> their folder, for lm_eval's --include_path."""
  folder = epath.Path(os.path.abspath(workdir)) / FOLDER
  path = epath.Path(workdir) / 'data' / 'seeds' / 'heldout.jsonl'
  if not path.exists():
    raise InputError(f'{path} does not exist; give the workdir of a run of the sandbox')
  prompts = [r.prompt for r in records.read(path, schema.HeldOutPrompt) if r.split == split]
  for prompt in prompts:
    world.require(prompt)
  rng = np.random.default_rng(0)
  documents = dict(sandbox_choice=[choice(prompt, rng) for prompt in prompts],
                   sandbox_exact=list(filter(None, map(exact, prompts))))
  folder.mkdir(parents=True, exist_ok=True)
  for (name, rows), rest in zip(documents.items(), (CHOICE, EXACT), strict=True):
    data = folder / f'{name}.jsonl'
    with records.replacing(data) as file:
      file.writelines(json.dumps(row) + '\n' for row in rows)
    with records.replacing(folder / f'{name}.yaml') as file:
      file.write(TASK.format(name=name, path=json.dumps(str(data)), rest=rest))
    print(f'{folder / name}.yaml: {len(rows)} documents')
  return folder


def main(argv):
  cli.refuse_arguments(argv)
  write(flags.FLAGS.workdir, flags.FLAGS.split)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run of the sandbox.', required=True)
  flags.DEFINE_enum('split', 'test', ('test', 'valid'), 'Held-out prompts to take.')
  cli.run_app(main)
