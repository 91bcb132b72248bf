"""The records that stages exchange: one dataclass per kind of line in a JSONL file.

`records.read(path, schema.Pair)` yields checked objects. A field with a default may be absent from
a line, and is left out of a line if it has its default. Other fields of a line are ignored.

`messages` is the conversation of a record with several turns (`conversation`); its prompt is then
their text. `token_ids` are the sampled tokens of a response with thinking, eos included; its text
alone could not reproduce them.

The second part has the summaries in done.json that other modules read. The third has the results of
evaluations, which programs of `eval` write as JSON and the report reads.
"""
import dataclasses
from typing import Annotated, Literal

import msgspec

from srlm_jax import conversation
from srlm_jax.conversation import Messages

# Ranges far beyond any use: sums and squares of such numbers are finite, and text shows them.
Number = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

_record = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)

# Why a text ends: with the end-of-sequence token; cut at the length limit; or nothing was sampled,
# because the prompt left no room.
Finish = Literal['eos', 'length', 'too_long']
EOS, CUT, TOO_LONG = 'eos', 'length', 'too_long'


class _Prompted:
  """Checks the messages of a record that has a prompt and may have messages."""
  __slots__ = ()

  def __post_init__(self):
    conversation.check_record(self.prompt, self.messages)


@_record
class Prompt(_Prompted):
  """prompts.jsonl: a generated prompt."""
  id: str
  prompt: str
  author: str = ''  # the model that wrote it
  messages: Messages = ()


@_record
class HeldOutPrompt(_Prompted):
  """heldout.jsonl: a prompt for evaluation."""
  id: str
  prompt: str
  split: Literal['test', 'valid']
  messages: Messages = ()


@_record
class Attempt:
  """attempts.jsonl: a sampled text that may become a prompt."""
  id: str
  text: str
  finish: Finish
  reason: str  # why it was rejected; '' if it was accepted


@_record
class Reply:
  """A reply to a ranked prompt. Rank 0 is best; equal replies share a rank: 0, 1, 1, 3."""
  id: str
  text: str
  rank: Count


@_record
class RankedPrompt(_Prompted):
  """ranked.jsonl: a prompt with replies that people ranked."""
  id: str
  prompt: str
  split: Literal['train', 'tune', 'eval']
  replies: tuple[Reply, ...]
  source: str = ''
  messages: Messages = ()


@_record
class Document:
  """corpus.jsonl: a document for pretraining."""
  id: str
  text: str


@_record
class Response(_Prompted):
  """responses-*.jsonl: a sampled response to a prompt."""
  id: str
  prompt_id: str
  index: Count     # its position among the responses to the prompt
  prompt: str
  response: str    # without thinking; empty if the thinking did not end
  finish: Finish
  n_tokens: Count  # with those of the thinking
  logp: Number     # sum over the tokens
  thinking: str = ''
  token_ids: tuple[Count, ...] = ()
  messages: Messages = ()


@_record
class GradedResponse(Response):
  """graded.jsonl: a response with its score from a program, as in the sandbox."""
  score: Number


@_record
class Judgement:
  """judgements-*.jsonl: a judgement of a response."""
  id: str
  prompt_id: str
  response_id: str
  index: Count          # its position among the judgements of the response
  text: str
  score: Number | None  # None: the text states no valid score
  reason: str           # why there is no score; '' if there is one
  finish: Finish
  thinking: str = ''
  token_ids: tuple[Count, ...] = ()


@_record
class Comparison:
  """comparisons-*.jsonl: a comparison of two judgements of a response."""
  id: str
  response_id: str
  first: str             # ids of the two judgements
  second: str
  text: str
  winner: Number | None  # 1: the first, -1: the second, 0: a tie; None: the text states no winner
  reason: str            # why there is no winner; '' if there is one
  finish: Finish


@_record
class CandidateScore:
  """scores.jsonl: the mean and the standard deviation of a response's judgements."""
  id: str
  score: Number | None  # None: too few judgements have a score
  spread: Number | None


@_record
class Logp:
  """logp-*.jsonl, older_logp-*.jsonl: the log-probability of a response under one model."""
  id: str
  logp: Number | None  # sum over the tokens; None: the response could not be encoded


@_record
class ImplicitReward:
  """rewards-*.jsonl: reward = logp - older_logp; None if either log-prob is None."""
  id: str
  reward: Number | None
  logp: Number | None
  older_logp: Number | None


@_record
class Preference(_Prompted):
  """What DPO trains on. `soft_label` is the probability that chosen is better."""
  id: str
  prompt: str
  chosen: str
  rejected: str
  chosen_finish: Finish
  rejected_finish: Finish
  soft_label: Number = 1.0
  chosen_token_ids: tuple[Count, ...] = ()
  rejected_token_ids: tuple[Count, ...] = ()
  messages: Messages = ()


@_record
class Pair(Preference):
  """pairs.jsonl: two responses to a prompt."""
  chosen_id: str
  rejected_id: str
  chosen_score: Number
  rejected_score: Number
  chosen_spread: Number      # standard deviation of the judgements
  rejected_spread: Number
  tau: Number | None = None  # strategy `consistency`: Kendall's tau between the two judges


@_record
class JudgePair(Preference):
  """judge_pairs.jsonl: two judgements of a response; the prompt is a judge prompt."""
  chosen_id: str
  rejected_id: str
  chosen_score: Number
  rejected_score: Number
  chosen_elo: Number | None = None  # of meta-judging
  rejected_elo: Number | None = None


@_record
class Demonstration(_Prompted):
  """ift.jsonl, and what SFT trains on: a prompt with its response.

  A response by a person is complete, so `finish` is eos by default.
  """
  id: str
  prompt: str
  response: str
  finish: Finish = EOS
  source: str = ''
  token_ids: tuple[Count, ...] = ()
  messages: Messages = ()


@_record
class EftExample:
  """eft.jsonl: a judge prompt with a judgement as its response."""
  id: str
  prompt: str
  response: str
  score: Number
  finish: Finish = EOS
  token_ids: tuple[Count, ...] = ()


@_record
class Positive(_Prompted):
  """positives.jsonl: a response that scored high enough for SFT."""
  id: str
  prompt: str
  response: str
  score: Number
  finish: Finish
  token_ids: tuple[Count, ...] = ()
  messages: Messages = ()


@_record
class DroppedReply:
  """dropped.jsonl: a ranked reply that gave no EFT example."""
  id: str
  reason: str


@_record
class PairLogps:
  """logps.jsonl: log-probabilities of a pair's responses under DPO's reference."""
  id: str
  chosen_logp: Number
  rejected_logp: Number


@_record
class Measure:
  """measures.jsonl: what checkpoint selection measured at a step."""
  step: Count
  measure: Number


@_record
class StepWins:
  """wins.jsonl: the answers of a checkpoint compared with those of the checkpoint before."""
  step: Count
  before: Count    # 0: the model that training starts from
  wins: Count      # prompts
  ties: Count
  losses: Count
  left_out: Count  # without a verdict in both orders

  @property
  def is_better(self) -> bool:
    return self.wins > self.losses


@_record
class JudgeAnswer:
  """endpoint.jsonl: an outside judge's answer; the id is a hash of the request."""
  id: str
  text: str
  finish: Finish
  prompt_tokens: Count = 0  # as the server counts them; 0: it did not say
  answer_tokens: Count = 0


@_record
class PromptsSummary:
  """done.json of the stage `prompts`."""
  prompts: Count             # accepted
  wanted: Count
  attempts: Count
  near_held_out: Count       # attempts that resemble a held-out or evaluation prompt
  shortened: Count
  dropped: dict[str, Count]  # reason: attempts


@_record
class JudgeSummary:
  """done.json of the stages that judge."""
  judgements: Count
  parsed: Count               # that have a score
  lowest: Number              # of the scale
  highest: Number
  unparsed: dict[str, Count]  # reason: judgements
  cost: Number | None = None  # dollars, of an outside judge; None: unknown


@_record
class PairsSummary:
  """done.json of the stage `pairs`. Means are None without a pair; lengths are in characters."""
  strategy: str
  pairs: Count
  positives: Count
  prompts: Count
  pairs_per_1000_prompts: Number
  judgements: Count
  parsed: Count
  score_histogram: dict[str, Count]
  dropped: dict[str, Count]  # reason: prompts without a pair
  all_scores_equal: Count    # prompts
  spread: Number | None      # mean standard deviation of the judgements of a response
  margin: Number | None      # mean of chosen score minus rejected score
  smallest_margin: Number | None
  chosen_characters: Number | None
  rejected_characters: Number | None
  chosen_minus_rejected_characters: Number | None
  soft_label: Number | None  # of every pair, with the strategy `consistency`


@_record
class AgreementSummary:
  """done.json of the stage `agreement`."""
  pairwise_accuracy: Number | None  # None if no prompt has two replies with scores


@_record
class EftSummary:
  """done.json of the stage `eft`."""
  examples: Count
  prompts: Count
  replies: Count
  judgements: Count
  parsed: Count
  dropped: dict[str, Count]        # reason: replies
  scores_judged: dict[str, Count]  # histograms: of all judgements,
  scores_before: dict[str, Count]  # of the examples before downsampling
  scores: dict[str, Count]         # and after it


@_record
class TrainingSummary:
  """done.json of the stage `model`."""
  steps: Count               # that were trained
  loss: Number               # of the last step
  params: str                # hash of the parameters
  examples: Count
  padding_free: Number       # fraction of the tokens that are not padding
  dropped: dict[str, Count]  # reason: examples
  stopped: str = ''          # why training ended before its last step; '': it did not


@_record
class Rows:
  """rows.json of the stage `model`: the rows of a step, and their width in tokens."""
  shape: tuple[Size, Size]


# Results of evaluations. A field that a later version adds has a default.
@_record
class HeadToHead:
  """head_to_head.json: model a against model b on the same prompts.

  A share is None without a prompt that both orders decided. A judge's verdict per prompt and order
  gives `first_wins` and `second_wins`; answers that a program graded give neither.
  """
  a: str                              # folder or name of the model whose wins are counted
  b: str
  count: Count                        # prompts with an outcome
  wins: Count
  ties: Count
  losses: Count
  win_share: Number | None
  tie_share: Number | None
  loss_share: Number | None
  p_value: Number | None              # two-sided sign test of wins against losses
  win_rate: Number | None = None      # share of wins, ties count half
  win_rate_low: Number | None = None  # its 95 % interval, bootstrap over prompts
  win_rate_high: Number | None = None
  first_wins: Count = 0               # verdicts for the answer shown first: position bias
  second_wins: Count = 0
  inconsistent: Count = 0             # prompts whose two orders disagree; they count as ties
  left_out: Count = 0                 # prompts without a verdict in one order
  unparsed: Count = 0                 # answers of the judge that state no verdict
  missing: Count = 0                  # requests without an answer
  characters_a: Number | None = None  # mean length; judges prefer long answers
  characters_b: Number | None = None
  judge: str = ''                     # name of the judge; '' for graded answers
  cost: Number | None = None          # dollars; None: unknown


@_record
class AlpacaEval:
  """eval/alpaca_MODEL.json: the answers of a model against AlpacaEval's baseline.

  Rates and standard errors are in percent, None where they are unknown.
  """
  generator: str                           # the model
  win_rate: Number | None
  standard_error: Number | None
  wins: Count
  draws: Count
  losses: Count
  count: Count                             # annotations with a preference
  missing: Count                           # without one: the judge's reply could not be parsed
  characters: Number                       # mean length of the model's answers
  discrete_win_rate: Number | None = None  # every preference counts as a win, a draw or a loss
  length_controlled: Number | None = None  # None: not computed
  length_controlled_standard_error: Number | None = None


@_record
class Spread:
  """How values are spread. All are None without a value."""
  mean: Number | None = None
  quantiles: tuple[Number, ...] = ()  # at Distributions.quantiles


@_record
class Diversity:
  """Distinct n-grams of a sample over all its n-grams, over random samples of the same size."""
  n: Count = 0
  ngrams: Count = 0        # of a sample; the same number for every set
  mean: Number = 0.0
  deviation: Number = 0.0  # standard deviation over the samples


@_record
class PromptSet:
  """The prompts of one kind."""
  name: str = ''                        # ift, eft, judge, heldout, or the model of a round: m2, m3
  title: str = ''
  count: Count = 0
  used: Count = 0                       # of them in all figures but `words` and `word_shares`
  cut: Count = 0                        # of `used`, read by the model only in part
  words: Spread = Spread()              # per prompt
  word_shares: tuple[Number, ...] = ()  # of the prompts, per bin of Distributions.word_bins
  distinct: tuple[Diversity, ...] = ()


@_record
class MapPoint:
  """A prompt on the map."""
  set: str = ''    # PromptSet.name
  id: str = ''
  text: str = ''   # its beginning
  x: Number = 0.0  # coordinate on the first and second principal component
  y: Number = 0.0


@_record
class SetDistance:
  """The energy distance of two sets of prompts, in the hidden states of a model.

  `energy` is the energy coefficient: 0 for equal distributions, 1 for two different points. It is
  an unbiased estimate over pairs of prompts up to its denominator, so it may be negative.
  """
  a: str = ''            # PromptSet.name
  b: str = ''
  energy: Number = 0.0
  low: Number = 0.0      # 95 % interval, bootstrap over prompts
  high: Number = 0.0
  p_value: Number = 1.0  # permutation test of equal distributions


@_record
class Neighbour:
  """A prompt and the seed prompt that is most similar to it by ROUGE-L; both are beginnings."""
  text: str = ''
  seed: str = ''
  rouge_l: Number = 0.0


@_record
class Nearest:
  """How similar each prompt of a set is to the seed prompt that is nearest to it."""
  set: str = ''                          # PromptSet.name
  rouge_l: Spread = Spread()             # F, to the IFT and the ranked training prompts
  rouge_shares: tuple[Number, ...] = ()  # of the prompts, per tenth of ROUGE-L from 0 to 1
  cosine: Spread = Spread()              # of centered hidden states, to the used IFT prompts
  nearest: tuple[Neighbour, ...] = ()    # examples
  farthest: tuple[Neighbour, ...] = ()


@_record
class Distributions:
  """eval/distributions.json: whether the new prompts of a run resemble its seed data."""
  model: str = ''  # whose hidden states these are
  params: str = ''  # hash of its parameters
  dtype: str = ''
  limit: Count = 0  # most prompts that are used of a set
  inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # {file: hash}
  missing: tuple[str, ...] = ()  # a sentence for each set that the run does not have
  findings: tuple[str, ...] = ()  # the distances as sentences
  sets: tuple[PromptSet, ...] = ()
  points: tuple[MapPoint, ...] = ()
  explained_variance: tuple[Number, ...] = ()  # shares of x and y
  distances: tuple[SetDistance, ...] = ()
  nearest: tuple[Nearest, ...] = ()
  quantiles: tuple[Number, ...] = ()
  word_bins: tuple[Count, ...] = ()  # the smallest number of words of each bin
  version: Count = 0  # of the computation
  draws: Count = 999  # permutations per p-value


@_record
class MtBench:
  """mt_bench.json holds one per model: mean scores, 1 to 10; None without scores."""
  overall: Number | None
  math_code_reasoning: Number | None
  other: Number | None
  turn_1: Number | None
  turn_2: Number | None
  scored: Count    # judgments with a score
  no_score: Count  # and without
  absent: Count    # question turns without a judgment
  judge: str = ''  # the names of its judges, with commas


@_record
class Harness:
  """harness.json: tasks of lm-evaluation-harness, in percent, {model: {task: percent}}."""
  scores: dict[str, dict[str, Number]]
  standard_errors: dict[str, dict[str, Number]] = dataclasses.field(default_factory=dict)
  differences: dict[str, dict[str, Number]]  # to the first model
  missing: dict[str, list[str]]              # {model: tasks without a result}
  metrics: dict[str, str]                    # {task: metric of lm-eval}
  # What was measured, of the tasks whose results files say so.
  shots: dict[str, Count] = dataclasses.field(default_factory=dict)  # {task: examples in a prompt}
  counts: dict[str, Count] = dataclasses.field(default_factory=dict)  # {task: documents}
  limits: dict[str, Number] = dataclasses.field(default_factory=dict)  # {model: its --limit}
  chats: dict[str, str] = dataclasses.field(default_factory=dict)  # {model: chat format}
