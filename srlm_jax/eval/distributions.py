"""Whether the new prompts of a run resemble its seed data: hidden states, n-grams, lengths.

  python -m srlm_jax.eval.distributions --workdir=runs/demo

writes WORKDIR/eval/distributions.json (`schema.Distributions`), which the report shows. It compares
the prompts of IFT and EFT, those of the held-out data, and the new prompts of each round:

- Map and distances: the mean hidden states of a model (`--model`), before its head. On the map are
  their first two principal components; distances are in all dimensions (`clouds`).
- Distinct n-grams over all n-grams (Li et al. 2016, arXiv 1510.03055). The ratio falls as a text
  gets longer, so all sets give samples of the same number of n-grams.
- Words per prompt, and the nearest seed of each new prompt by ROUGE-L, as in the filters of
  `sample.prompts`, and by the cosine of hidden states.

An EFT example is a judge prompt: the rubric around an instruction and a response. The set `eft` has
these instructions, each once. The set `judge` has the whole judge prompts, which EFT trains on.
The rubric that they share would be the first component of the map, so they are not on the map.

With data of people, IFT and held-out prompts are drawn from one source. The figures of the held-out
prompts are then those that new prompts of the same kind would have.
"""
import array
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import heapq
import itertools
import random

from absl import flags
from etils import epath
import jax
import numpy as np

from srlm_jax import (
  cli,
  config as configs,
  conversation,
  hosts,
  InputError,
  model_files,
  records,
  schema,
  stage,
)
from srlm_jax.data import similar
from srlm_jax.eval import clouds
from srlm_jax.sample import engine as engines, prompts as prompt_stage

VERSION = 2        # of the computation; another one makes the file again
FILE = 'eval/distributions.json'
MODEL = 'm0'       # every run has it, and it was trained on none of the sets
LIMIT = 400        # prompts per set
FEWEST = 10        # prompts of a set that is compared
MOST_TOKENS = 1024  # of a prompt that the model reads
SHOWN = 120        # characters of a prompt in the file
EXAMPLES = 3       # of the nearest and the farthest prompts
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WORD_BINS = (0, 4, 6, 8, 10, 13, 16, 20, 30, 50, 100, 151)  # the filters allow 4 to 150
NGRAMS = (1, 2, 3)
SAMPLES = 20       # random samples of n-grams
OFF_THE_MAP = ('judge',)
TITLES = dict(ift='IFT prompts', eft='instructions judged in EFT', judge='judge prompts of EFT',
              heldout='held-out prompts')


@dataclasses.dataclass(frozen=True)
class Text:
  """A prompt of a set."""
  id: str
  text: str


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A set of prompts, of which only those are in memory that are used for most figures."""
  words: np.ndarray  # of every prompt [prompts]
  used: list[Text]


def run(workdir, model: str = MODEL, limit: int = LIMIT):
  """Writes WORKDIR/eval/distributions.json, unless it is of the same inputs and arguments."""
  path = epath.Path(workdir) / FILE
  folder = stage.finished_model(workdir, model)
  hashes = model_files.read_hashes(folder)
  sources, missing = find(workdir)
  made_of = schema.Distributions(
      version=VERSION, model=model, limit=limit, params=hashes.params.stored,
      dtype='float32' if jax.default_backend() == 'cpu' else 'bfloat16', missing=tuple(missing),
      inputs={f'model/{name}': value for name, value in hashes.files.items()} | {
          str(file.relative_to(epath.Path(workdir))): records.hash_file(file)
          for file in sources.values()})
  before = read(path)
  hosts.sync('distributions: the earlier result was read')
  if before and _identity(before) == _identity(made_of):
    hosts.log(f'{path}: already done')
    return
  sets, seeds = prompts_of(sources, limit)
  vectors, cut = hidden_states(folder, made_of.dtype, {n: s.used for n, s in sets.items()})
  found = dataclasses.replace(made_of, **measure(sets, vectors, cut, seeds))
  if hosts.is_first_host():
    stage.write_json(path, dataclasses.asdict(found))
  hosts.log(table(found))
  hosts.log(str(path))


def read(path) -> schema.Distributions | None:
  """The result in a file; None if there is none. Raises InputError if it is damaged."""
  if not path.exists():
    return None
  return records.read_object(path, schema.Distributions,
                             'delete it, and run srlm_jax.eval.distributions again')


def _identity(found: schema.Distributions) -> tuple:
  """What a result depends on."""
  return tuple(getattr(found, name)
               for name in ('version', 'model', 'limit', 'params', 'dtype', 'missing', 'inputs'))


def find(workdir) -> tuple[dict[str, epath.Path], list[str]]:
  """-> {seed file or model: the file of its prompts}, and a sentence for each that is missing.

  The seed files are ift, ranked and heldout, which every run has. The file of EFT is `eft`. Raises
  InputError if the seed data are missing, or if a finished file has changed.
  """
  workdir = epath.Path(workdir)
  found = {name: stage.seeds(workdir) / f'{name}.jsonl' for name in ('ift', 'ranked', 'heldout')}
  rounds = configs.MODELS[configs.MODELS.index('m2'):]
  folders = {'eft': workdir / 'm1' / 'eft'} | {
      model: workdir / model / 'prompts' for model in rounds}
  missing = []
  for name, folder in folders.items():
    if (folder / 'done.json').exists():
      found[name] = folder / ('eft.jsonl' if name == 'eft' else 'prompts.jsonl')
    elif name not in configs.OPTIONAL:
      what = 'EFT examples' if name == 'eft' else f'prompts for {name}'
      missing.append(f'The run has no finished {what} ({folder.relative_to(workdir)}).')
  for folder in {path.parent: None for path in found.values()}:
    stage.check_records(folder)
  return found, missing


def prompts_of(sources: dict[str, epath.Path], limit: int) -> tuple[dict[str, Prompts], list[str]]:
  """-> {set: its prompts}, and the prompts of the seed data that new ones may not repeat."""
  def of(name: str, kind: type[records.Record]) -> Iterator[records.Record]:
    return records.read(sources[name], kind)
  found = {'ift': sample(_texts(of('ift', schema.Demonstration)), limit)}
  if 'eft' in sources:
    judged = _judged(of('eft', schema.EftExample), of('ranked', schema.RankedPrompt),
                     sources['eft'])
    found |= {'eft': sample(judged, limit),
              'judge': sample(_texts(of('eft', schema.EftExample)), limit)}
  found['heldout'] = sample(_texts(of('heldout', schema.HeldOutPrompt)), limit)
  for model in configs.MODELS:
    if model in sources:
      found[model] = sample(_texts(of(model, schema.Prompt)), limit)
  seeds = [conversation.user_messages(r)[0] for r in of('ift', schema.Demonstration)]
  seeds += prompt_stage.user_prompts(
      r for r in of('ranked', schema.RankedPrompt) if r.split == 'train')
  return found, seeds


def _texts(found: Iterable) -> Iterator[Text]:
  return (Text(r.id, r.prompt) for r in found)


def _judged(examples: Iterable[schema.EftExample], ranked: Iterable[schema.RankedPrompt],
            path) -> Iterator[Text]:
  """The ranked prompts that the examples judge, each once."""
  known = {r.id: r.prompt for r in ranked}
  for name in dict.fromkeys(e.id.rpartition('/')[0] for e in examples):
    if name not in known:
      raise InputError(f'{path} judges a reply to the prompt {name!r}, which ranked.jsonl of the '
                       f'seed data does not have; restore the seed data of this run')
    yield Text(name, known[name])


def sample(texts: Iterable[Text], limit: int) -> Prompts:
  """Keeps at most `limit` prompts: those whose ids have the smallest hashes, in their order."""
  words = array.array('q')

  def counted():
    for t in texts:
      words.append(len(t.text.split()))
      yield t
  used = heapq.nsmallest(limit, counted(), key=lambda t: records.digest(t.id))
  return Prompts(np.array(words), used)


def hidden_states(folder, dtype: str, used: dict[str, list[Text]]) -> tuple[
    dict[str, np.ndarray], dict[str, int]]:
  """The model in `folder` -> {set: mean hidden states [prompts, D]}, and the number of prompts that
  it reads only in part.

  The model reads the text of a prompt as it is, without a chat format, which M0 does not know. bos
  does not count in the mean: its hidden state is the same for all prompts.
  """
  engine, tokenizer = engines.load(engines.config_alone(dtype, slots=1), folder, 'distributions')
  most, rows, cut = min(engine.context, MOST_TOKENS), [], {}
  for name, texts in used.items():
    encoded = [[*tokenizer.start, *tokenizer.encode(t.text)] for t in texts]
    cut[name] = sum(len(ids) > most for ids in encoded)
    rows += [ids[:most] for ids in encoded]
  found = engine.mean_hidden(rows, len(tokenizer.start)).astype(np.float64)
  if not np.isfinite(found).all():
    raise InputError(f'hidden states of {folder} are not finite; the model\'s parameters are '
                     f'damaged, train or convert it again')
  ends = list(itertools.accumulate(map(len, used.values())))
  return dict(zip(used, np.split(found, ends[:-1]), strict=True)), cut


def measure(sets: dict[str, Prompts], vectors: dict[str, np.ndarray], cut: dict[str, int],
            seeds: list[str]) -> dict:
  """-> the fields of `schema.Distributions` that are measured. vectors: of the used prompts."""
  used = {name: found.used for name, found in sets.items()}
  if len(used['ift']) < FEWEST:
    raise InputError(f'the run has {len(used["ift"])} IFT prompts; a comparison needs {FEWEST}')
  large = [name for name in sets if len(used[name]) >= FEWEST]
  diversities = distinct({name: used[name] for name in large})
  on_map = [name for name in sets if name not in OFF_THE_MAP]
  coordinates, explained = clouds.pca(np.concatenate([vectors[name] for name in on_map]))
  points = [(name, text) for name in on_map for text in used[name]]
  apart = _distances({name: vectors[name] for name in large})
  return dict(
      quantiles=QUANTILES, word_bins=WORD_BINS, draws=clouds.DRAWS,
      explained_variance=tuple(_rounded(x) for x in explained),
      sets=tuple(schema.PromptSet(
          name=name, title=title(name), count=len(found.words), used=len(found.used), cut=cut[name],
          words=spread(found.words), word_shares=shares(found.words, WORD_BINS),
          distinct=diversities.get(name, ())) for name, found in sets.items()),
      points=tuple(schema.MapPoint(set=name, id=t.id, text=short(t.text), x=_rounded(x),
                                   y=_rounded(y))
                   for (name, t), (x, y) in zip(points, coordinates, strict=True)),
      distances=apart, findings=findings(apart),
      nearest=nearest(used, vectors, seeds))


def title(name: str) -> str:
  """What a set is called."""
  return TITLES.get(name, f'new prompts for {name}')


def _distances(vectors: dict[str, np.ndarray]) -> tuple[schema.SetDistance, ...]:
  """{set: hidden states} -> the distance of each set to IFT and, of those after it, to EFT."""
  names = list(vectors)
  pairs = [(a, b) for b in ('ift', 'eft') for a in names
           if b in names and names.index(a) > names.index(b)]
  found = []
  for a, b in pairs:
    points = np.concatenate([vectors[a], vectors[b]])
    energy = clouds.compare(clouds.distances(points), len(vectors[a]))
    rounded = {key: _rounded(x) for key, x in dataclasses.asdict(energy).items()}
    found.append(schema.SetDistance(a=a, b=b, energy=rounded.pop('value'), **rounded))
  return tuple(found)


def findings(distances: Sequence[schema.SetDistance]) -> tuple[str, ...]:
  """The distances to IFT as one sentence per set."""
  to_ift = {d.a: d for d in distances if d.b == 'ift'}
  found = []
  for name, d in to_ift.items():
    text = (f'The energy distance of the {title(name)} to IFT is {d.energy:.4f} [{d.low:.4f}, '
            f'{d.high:.4f}], p {_p(d.p_value)}')
    known = [f'{to_ift[other].energy:.4f} for the {title(other)}' for other in ('heldout', 'judge')
             if other in to_ift and name not in TITLES]
    found.append(f'{text}; it is {" and ".join(known)}.' if known else f'{text}.')
  return tuple(found)


def _p(value: float) -> str:
  """
  >>> _p(0.001), _p(0.25)
  ('<= 0.001', '= 0.25')
  """
  smallest = 1 / (clouds.DRAWS + 1)
  return f'<= {smallest:g}' if value <= smallest else f'= {value:.2g}'


def spread(values: Sequence[float]) -> schema.Spread:
  """
  >>> spread([1, 2, 3]).mean
  2.0
  """
  if not len(values):
    return schema.Spread()
  return schema.Spread(mean=_rounded(np.mean(values)),
                       quantiles=tuple(map(_rounded, np.quantile(values, QUANTILES))))


def shares(values: Sequence[float], bins: Sequence[float]) -> tuple[float, ...]:
  """The share of the values in each bin; `bins`: the smallest value of each; the last has no end.

  >>> shares([1, 2, 2, 9], (0, 2, 4))
  (0.25, 0.5, 0.25)
  """
  places = np.searchsorted(bins, values, side='right') - 1
  counts = np.bincount(places, minlength=len(bins))
  return tuple(_rounded(n / max(len(values), 1)) for n in counts)


def distinct(sets: dict[str, list[Text]]) -> dict[str, tuple[schema.Diversity, ...]]:
  """{set: prompts} -> {set: its share of distinct n-grams for each n of NGRAMS}.

  An n-gram is in one prompt; words are those of ROUGE-L. A sample has whole prompts in random
  order, up to half of the n-grams that the smallest set has. Half, so that its samples differ.
  """
  words = {name: [similar.tokens(t.text) for t in texts] for name, texts in sets.items()}
  found = {name: [] for name in sets}
  for n in NGRAMS:
    grams = {name: [list(zip(*(w[i:] for i in range(n)), strict=False)) for w in texts]
             for name, texts in words.items()}
    size = min((sum(map(len, g)) for g in grams.values()), default=0) // 2
    for name in sets if size else ():
      ratios = [len({*itertools.islice(_shuffled(grams[name], seed), size)}) / size
                for seed in range(SAMPLES)]
      found[name].append(schema.Diversity(
          n=n, ngrams=size, mean=_rounded(np.mean(ratios)), deviation=_rounded(np.std(ratios))))
  return {name: tuple(made) for name, made in found.items()}


def _shuffled(texts: list[list], seed: int) -> Iterable:
  """The items of all texts, the texts in random order."""
  order = list(range(len(texts)))
  random.Random(seed).shuffle(order)
  return itertools.chain.from_iterable(texts[i] for i in order)


def nearest(used: dict[str, list[Text]], vectors: dict[str, np.ndarray],
            seeds: list[str]) -> tuple[schema.Nearest, ...]:
  """The nearest seeds of the new prompts of each round, and of the held-out prompts."""
  index = similar.Index(seeds)
  center = np.concatenate([vectors[name] for name in vectors if name not in OFF_THE_MAP]).mean(0)
  ift = _unit(vectors['ift'] - center)
  found = []
  for name, texts in used.items():
    if name in TITLES and name != 'heldout' or not texts:
      continue
    nearby = [index.nearest(t.text) or (0.0, None) for t in texts]
    order = sorted(range(len(texts)), key=lambda i: -nearby[i][0])  # stable
    examples = [schema.Neighbour(
        text=short(texts[i].text), rouge_l=_rounded(nearby[i][0]),
        seed='' if nearby[i][1] is None else short(seeds[nearby[i][1]])) for i in order]
    values = [value for value, _ in nearby]
    cosines = (_unit(vectors[name] - center) @ ift.T).max(1)
    found.append(schema.Nearest(
        set=name, rouge_l=spread(values), cosine=spread(cosines),
        rouge_shares=shares(np.minimum(values, 0.99), [i / 10 for i in range(10)]),
        nearest=tuple(examples[:EXAMPLES]), farthest=tuple(examples[::-1][:EXAMPLES])))
  return tuple(found)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def short(text: str) -> str:
  """The beginning of a text in one line.

  >>> short('Name a\\nfruit.')
  'Name a fruit.'
  """
  line = ' '.join(text.split())
  return line if len(line) <= SHOWN else f'{line[:SHOWN - 1]}…'


def _rounded(value: float) -> float:
  """Four significant digits. Smaller values than 1e-9 are 0 but for rounding."""
  return float(f'{value:.4g}') if abs(value) > 1e-9 else 0.0


def table(found: schema.Distributions) -> str:
  """The figures as text."""
  lines = [f'hidden states of {found.model} ({found.dtype}); the map explains '
           f'{" + ".join(f"{x:.1%}" for x in found.explained_variance)} of their variance']
  lines.append(_row('set', 'prompts', 'used', 'words', 'median',
                    *(f'distinct-{n}' for n in NGRAMS)))
  lines += [_row(s.name, s.count, s.used, _digits(s.words.mean, 1),
                 _digits(s.words.quantiles[2] if s.words.quantiles else None, 0),
                 *(f'{d.mean:.3f}±{d.deviation:.3f}' for d in s.distinct)) for s in found.sets]
  lines.append(_row('a', 'b', 'energy', '95 % from', 'to', 'p'))
  lines += [_row(d.a, d.b, f'{d.energy:.4f}', f'{d.low:.4f}', f'{d.high:.4f}', f'{d.p_value:g}')
            for d in found.distances]
  lines.append(_row('nearest', 'ROUGE-L', 'median', '95th pct', 'cosine', 'median'))
  lines += [_row(n.set, *(_digits(x, 3) for s in (n.rouge_l, n.cosine)
                          for x in (s.mean, s.quantiles[2], *s.quantiles[4:][:s is n.rouge_l])))
            for n in found.nearest]
  return '\n'.join([*lines, *found.findings, *found.missing])


def _row(first, *cells) -> str:
  return ' '.join([f'  {first:8}', *(str(cell).rjust(11) for cell in cells)]).rstrip()


def _digits(value: float | None, digits: int) -> str:
  return '-' if value is None else f'{value:.{digits}f}'


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_string('model', MODEL, 'Model of the run whose hidden states are compared: m0, sft, '
                      'm1, ..; or the folder of a checkpoint.')
  flags.DEFINE_integer('limit', LIMIT, 'Most prompts of a set that the model reads.',
                       lower_bound=FEWEST)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  cli.cache_compilations(f.workdir)
  run(f.workdir, f.model, f.limit)


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
