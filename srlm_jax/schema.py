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
from typing import Literal

from srlm_jax import conversation
from srlm_jax.conversation import Messages

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
  rank: int


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
  index: int  # its position among the responses to the prompt
  prompt: str
  response: str  # without thinking; empty if the thinking did not end
  finish: Finish
  n_tokens: int  # with those of the thinking
  logp: float  # sum over the tokens
  thinking: str = ''
  token_ids: tuple[int, ...] = ()
  messages: Messages = ()


@_record
class GradedResponse(Response):
  """graded.jsonl: a response with its score from a program, as in the sandbox."""
  score: float


@_record
class Judgement:
  """judgements-*.jsonl: a judgement of a response."""
  id: str
  prompt_id: str
  response_id: str
  index: int           # its position among the judgements of the response
  text: str
  score: float | None  # None: the text states no valid score
  reason: str          # why there is no score; '' if there is one
  finish: Finish
  thinking: str = ''
  token_ids: tuple[int, ...] = ()


@_record
class Comparison:
  """comparisons-*.jsonl: a comparison of two judgements of a response."""
  id: str
  response_id: str
  first: str            # ids of the two judgements
  second: str
  text: str
  winner: float | None  # 1: the first, -1: the second, 0: a tie; None: the text states no winner
  reason: str           # why there is no winner; '' if there is one
  finish: Finish


@_record
class CandidateScore:
  """scores.jsonl: the mean and the standard deviation of a response's judgements."""
  id: str
  score: float | None  # None: too few judgements have a score
  spread: float | None


@_record
class Logp:
  """logp-*.jsonl, older_logp-*.jsonl: the log-probability of a response under one model."""
  id: str
  logp: float | None  # sum over the tokens; None: the response could not be encoded


@_record
class ImplicitReward:
  """rewards-*.jsonl: reward = logp - older_logp; None if either log-prob is None."""
  id: str
  reward: float | None
  logp: float | None
  older_logp: float | None


@_record
class Preference(_Prompted):
  """What DPO trains on. `soft_label` is the probability that chosen is better."""
  id: str
  prompt: str
  chosen: str
  rejected: str
  chosen_finish: Finish
  rejected_finish: Finish
  soft_label: float = 1.0
  chosen_token_ids: tuple[int, ...] = ()
  rejected_token_ids: tuple[int, ...] = ()
  messages: Messages = ()


@_record
class Pair(Preference):
  """pairs.jsonl: two responses to a prompt."""
  chosen_id: str
  rejected_id: str
  chosen_score: float
  rejected_score: float
  chosen_spread: float  # standard deviation of the judgements
  rejected_spread: float
  tau: float | None = None  # strategy `consistency`: Kendall's tau between the two judges


@_record
class JudgePair(Preference):
  """judge_pairs.jsonl: two judgements of a response; the prompt is a judge prompt."""
  chosen_id: str
  rejected_id: str
  chosen_score: float
  rejected_score: float
  chosen_elo: float
  rejected_elo: float


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
  token_ids: tuple[int, ...] = ()
  messages: Messages = ()


@_record
class EftExample:
  """eft.jsonl: a judge prompt with a judgement as its response."""
  id: str
  prompt: str
  response: str
  score: float
  finish: Finish = EOS
  token_ids: tuple[int, ...] = ()


@_record
class Positive(_Prompted):
  """positives.jsonl: a response that scored high enough for SFT."""
  id: str
  prompt: str
  response: str
  score: float
  finish: Finish
  token_ids: tuple[int, ...] = ()
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
  chosen_logp: float
  rejected_logp: float


@_record
class Measure:
  """measures.jsonl: what checkpoint selection measured at a step."""
  step: int
  measure: float


@_record
class StepWins:
  """wins.jsonl: the answers of a checkpoint compared with those of the checkpoint before."""
  step: int
  before: int    # 0: the model that training starts from
  wins: int      # prompts
  ties: int
  losses: int
  left_out: int  # without a verdict in both orders

  @property
  def is_better(self) -> bool:
    return self.wins > self.losses


@_record
class JudgeAnswer:
  """endpoint.jsonl: an outside judge's answer; the id is a hash of the request."""
  id: str
  text: str
  finish: Finish
  prompt_tokens: int = 0  # as the server counts them; 0: it did not say
  answer_tokens: int = 0


@_record
class PromptsSummary:
  """done.json of the stage `prompts`."""
  prompts: int                 # accepted
  wanted: int
  attempts: int
  near_held_out: int           # attempts that resemble a held-out or evaluation prompt
  shortened: int
  dropped: dict[str, int]      # reason: attempts


@_record
class JudgeSummary:
  """done.json of the stages that judge."""
  judgements: int
  parsed: int                  # that have a score
  lowest: float                # of the scale
  highest: float
  unparsed: dict[str, int]     # reason: judgements
  cost: float | None = None    # dollars, of an outside judge; None: unknown


@_record
class PairsSummary:
  """done.json of the stage `pairs`. Means are None without a pair; lengths are in characters."""
  strategy: str
  pairs: int
  positives: int
  prompts: int
  pairs_per_1000_prompts: float
  judgements: int
  parsed: int
  score_histogram: dict[str, int]
  dropped: dict[str, int]      # reason: prompts without a pair
  all_scores_equal: int        # prompts
  spread: float | None         # mean standard deviation of the judgements of a response
  margin: float | None         # mean of chosen score minus rejected score
  smallest_margin: float | None
  chosen_characters: float | None
  rejected_characters: float | None
  chosen_minus_rejected_characters: float | None
  soft_label: float | None     # of every pair, with the strategy `consistency`


@_record
class AgreementSummary:
  """done.json of the stage `agreement`."""
  pairwise_accuracy: float | None  # None if no prompt has two replies with scores


@_record
class EftSummary:
  """done.json of the stage `eft`."""
  examples: int
  prompts: int
  replies: int
  judgements: int
  parsed: int
  dropped: dict[str, int]         # reason: replies
  scores_judged: dict[str, int]   # histograms: of all judgements,
  scores_before: dict[str, int]   # of the examples before downsampling
  scores: dict[str, int]          # and after it


@_record
class TrainingSummary:
  """done.json of the stage `model`."""
  steps: int                   # that were trained
  loss: float                  # of the last step
  params: str                  # hash of the parameters
  examples: int
  padding_free: float          # fraction of the tokens that are not padding
  dropped: dict[str, int]      # reason: examples
  stopped: str = ''            # why training ended before its last step; '': it did not


# Results of evaluations. A field that a later version adds has a default.
@_record
class HeadToHead:
  """head_to_head.json: model a against model b on the same prompts.

  A share is None without a prompt that both orders decided. A judge's verdict per prompt and order
  gives `first_wins` and `second_wins`; answers that a program graded give neither.
  """
  a: str                        # folder or name of the model whose wins are counted
  b: str
  count: int                    # prompts with an outcome
  wins: int
  ties: int
  losses: int
  win_share: float | None
  tie_share: float | None
  loss_share: float | None
  p_value: float | None         # two-sided sign test of wins against losses
  win_rate: float | None = None       # share of wins, ties count half
  win_rate_low: float | None = None   # its 95 % interval, bootstrap over prompts
  win_rate_high: float | None = None
  first_wins: int = 0           # verdicts for the answer shown first: position bias
  second_wins: int = 0
  inconsistent: int = 0         # prompts whose two orders disagree; they count as ties
  left_out: int = 0             # prompts without a verdict in one order
  unparsed: int = 0             # answers of the judge that state no verdict
  missing: int = 0              # requests without an answer
  characters_a: float | None = None   # mean length; judges prefer long answers
  characters_b: float | None = None
  judge: str = ''               # name of the judge; '' for graded answers
  cost: float | None = None     # dollars; None: unknown


@_record
class AlpacaEval:
  """eval/alpaca_MODEL.json: the answers of a model against AlpacaEval's baseline.

  Rates and standard errors are in percent, None where they are unknown.
  """
  generator: str               # the model
  win_rate: float | None
  standard_error: float | None
  wins: int
  draws: int
  losses: int
  count: int                   # annotations with a preference
  missing: int                 # without one: the judge's reply could not be parsed
  characters: float            # mean length of the model's answers
  discrete_win_rate: float | None = None  # every preference counts as a win, a draw or a loss
  length_controlled: float | None = None  # None: not computed
  length_controlled_standard_error: float | None = None


@_record
class Spread:
  """How values are spread. All are None without a value."""
  mean: float | None = None
  quantiles: tuple[float, ...] = ()  # at Distributions.quantiles


@_record
class Diversity:
  """Distinct n-grams of a sample over all its n-grams, over random samples of the same size."""
  n: int = 0
  ngrams: int = 0         # of a sample; the same number for every set
  mean: float = 0.0
  deviation: float = 0.0  # standard deviation over the samples


@_record
class PromptSet:
  """The prompts of one kind."""
  name: str = ''                       # ift, eft, judge, heldout, or the model of a round: m2, m3
  title: str = ''
  count: int = 0
  used: int = 0                        # of them in all figures but `words` and `word_shares`
  cut: int = 0                         # of `used`, read by the model only in part
  words: Spread = Spread()             # per prompt
  word_shares: tuple[float, ...] = ()  # of the prompts, per bin of Distributions.word_bins
  distinct: tuple[Diversity, ...] = ()


@_record
class MapPoint:
  """A prompt on the map."""
  set: str = ''   # PromptSet.name
  id: str = ''
  text: str = ''  # its beginning
  x: float = 0.0  # coordinate on the first and second principal component
  y: float = 0.0


@_record
class SetDistance:
  """The energy distance of two sets of prompts, in the hidden states of a model.

  `energy` is the energy coefficient: 0 for equal distributions, 1 for two different points. It is
  an unbiased estimate over pairs of prompts up to its denominator, so it may be negative.
  """
  a: str = ''            # PromptSet.name
  b: str = ''
  energy: float = 0.0
  low: float = 0.0       # 95 % interval, bootstrap over prompts
  high: float = 0.0
  p_value: float = 1.0   # permutation test of equal distributions


@_record
class Neighbour:
  """A prompt and the seed prompt that is most similar to it by ROUGE-L; both are beginnings."""
  text: str = ''
  seed: str = ''
  rouge_l: float = 0.0


@_record
class Nearest:
  """How similar each prompt of a set is to the seed prompt that is nearest to it."""
  set: str = ''                         # PromptSet.name
  rouge_l: Spread = Spread()            # F, to the IFT and the ranked training prompts
  rouge_shares: tuple[float, ...] = ()  # of the prompts, per tenth of ROUGE-L from 0 to 1
  cosine: Spread = Spread()             # of centered hidden states, to the used IFT prompts
  nearest: tuple[Neighbour, ...] = ()   # examples
  farthest: tuple[Neighbour, ...] = ()


@_record
class Distributions:
  """eval/distributions.json: whether the new prompts of a run resemble its seed data."""
  model: str = ''                             # whose hidden states these are
  params: str = ''                            # hash of its parameters
  dtype: str = ''
  limit: int = 0                              # most prompts that are used of a set
  inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # {file: hash}
  missing: tuple[str, ...] = ()               # a sentence for each set that the run does not have
  findings: tuple[str, ...] = ()              # the distances as sentences
  sets: tuple[PromptSet, ...] = ()
  points: tuple[MapPoint, ...] = ()
  explained_variance: tuple[float, ...] = ()  # shares of x and y
  distances: tuple[SetDistance, ...] = ()
  nearest: tuple[Nearest, ...] = ()
  quantiles: tuple[float, ...] = ()
  word_bins: tuple[int, ...] = ()             # the smallest number of words of each bin
  version: int = 0                            # of the computation
  draws: int = 999                            # permutations per p-value


@_record
class MtBench:
  """mt_bench.json holds one per model: mean scores, 1 to 10; None without scores."""
  overall: float | None
  math_code_reasoning: float | None
  other: float | None
  turn_1: float | None
  turn_2: float | None
  scored: int      # judgments with a score
  no_score: int    # and without
  absent: int      # question turns without a judgment
  judge: str = ''  # the names of its judges, with commas


@_record
class Harness:
  """harness.json: tasks of lm-evaluation-harness, in percent, {model: {task: percent}}."""
  scores: dict[str, dict[str, float]]
  standard_errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  differences: dict[str, dict[str, float]]   # to the first model
  missing: dict[str, list[str]]              # {model: tasks without a result}
  metrics: dict[str, str]                    # {task: metric of lm-eval}
  # What was measured, of the tasks whose results files say so.
  shots: dict[str, int] = dataclasses.field(default_factory=dict)     # {task: examples in a prompt}
  counts: dict[str, int] = dataclasses.field(default_factory=dict)    # {task: documents}
  limits: dict[str, float] = dataclasses.field(default_factory=dict)  # {model: its --limit, if any}
  chats: dict[str, str] = dataclasses.field(default_factory=dict)     # {model: chat format, if any}
