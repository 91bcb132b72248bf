"""The thread that runs the engine. All use of JAX is here.

Requests come through a queue, and what they generate goes to the event loop of the server.
"""
import asyncio
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import queue
import threading
import time
import traceback

from srlm_jax import InputError
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Request, Result, Sampling

REPORT = 60.0  # seconds between two lines about the load
LAST_CALL = 60.0  # seconds that a call may take after the server has ended


@dataclasses.dataclass
class PromptLogps:
  """The log-probs of a prompt's tokens but the first, and {id: log-prob} of the likely ones."""
  logps: list[float]
  top: list[dict[int, float]]


@dataclasses.dataclass
class Piece:
  """New tokens of a sample."""
  number: int  # of the sample
  ids: list[int]
  logps: list[float]
  top: list[dict[int, float]]
  finish: str  # '' before the last piece; else that of `Result`


@dataclasses.dataclass
class Job:
  """A prompt for the engine."""
  request: Request
  prompt_top: int | None = None  # log-probs of the prompt, with this many likely tokens; None: none
  is_sampled: bool = True        # False: only log-probs of the prompt
  tell: Callable = lambda *_: None  # (a Piece, PromptLogps or Failed) -> None, on the event loop


class Busy(Exception):
  """Too many samples are waiting."""


class Failed(Exception):
  """The engine has stopped with an error."""


@dataclasses.dataclass
class _Running:
  """A job in the engine."""
  results: list[Result]
  sent: list[int]      # tokens of each sample that the event loop has
  is_ended: list[bool]


class Worker:
  """The engine, and the samples that it holds. All methods are for the event loop."""

  def __init__(self, engine: engines.Engine, most_waiting: int, prompt: Sequence[int]):
    """`most_waiting`: samples beyond the slots; `prompt`: ids to compile the programs with."""
    self.engine, self.most_waiting = engine, most_waiting
    self._prompt = prompt
    self._orders = queue.SimpleQueue()
    self._held = 0  # samples that run or wait
    self._call_began: float | None = None  # when the current call began; None: there is none
    self._running: dict[int, tuple[Job, _Running]] = {}  # by id of the job; of the thread
    self._prompts: list[Job] = []    # whose log-probs are wanted; of the thread
    self._ready = threading.Event()
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
    self._loop: asyncio.AbstractEventLoop | None = None
    self.error = ''  # why the engine has stopped

  @property
  def held(self) -> int:
    """The number of samples that run or wait."""
    return self._held

  def start(self):
    """Starts the thread, and waits until the programs are compiled."""
    self._thread.start()
    self._ready.wait()
    if self.error:
      raise InputError(self.error)

  def stop(self):
    """Ends the thread after its current call, or gives up if that takes too long."""
    self._orders.put(None)
    self._thread.join(LAST_CALL)

  @property
  def is_alive(self) -> bool:
    """Whether the thread still runs."""
    return self._thread.is_alive()

  @property
  def call_seconds(self) -> int:
    """Seconds for which the engine's current call has run; 0 if it has nothing to do."""
    began = self._call_began
    return 0 if began is None else int(time.monotonic() - began)

  def check_room(self, count: int):
    """Raises Busy or InputError if there is no room for so many more samples."""
    most = self.engine.slots + self.most_waiting
    if count > most:
      raise InputError(f'the request asks for {count} samples, and the server holds at most '
                       f'{most}; send fewer prompts at once, or lower n')
    if self._held + count > most:
      raise Busy(f'the server holds {self._held} samples, and at most {most}; this request has '
                 f'{count}; try again later')

  @contextlib.contextmanager
  def holding(self, jobs: Sequence[Job]):
    """Inside the block, the engine works on the jobs. Raises Busy, Failed or InputError."""
    self._loop = asyncio.get_running_loop()
    count = sum(job.request.n for job in jobs)
    self.check_room(count)
    self._held += count
    for job in jobs:
      self._orders.put((self._begin, job))
    try:
      if self.error:  # after the orders: the thread answers those that it finds after an error
        raise Failed(self.error)
      yield
    finally:
      self._held -= count
      for job in jobs:
        self._orders.put((self._end, job))

  def stop_sample(self, job: Job, number: int):
    """Frees the slot of a sample that needs no more tokens."""
    self._orders.put((self._stop_sample, job, number))

  # What follows runs in the thread.

  def _run(self):
    try:
      self._slots = self.engine.open()
      self._compile()
      self._ready.set()
      reported = time.monotonic()
      while self._obey():
        self._call_began = time.monotonic()
        self._read_prompts()
        self.engine.advance(self._slots)
        self._call_began = None
        self._tell_all()
        if time.monotonic() - reported > REPORT:
          reported = time.monotonic()
          print(f'serve: {self._held} samples, {self.engine.work.generated:,} tokens generated',
                flush=True)
    except Exception as error:  # whatever it is, no client may wait for ever
      if not isinstance(error, InputError):
        traceback.print_exc()
      self.error = f'the engine has stopped: {error or type(error).__name__}; restart the server'
      jobs = [*(job for job, _ in self._running.values()), *self._prompts]
      while not self._orders.empty():
        order = self._orders.get()
        if order and order[0] == self._begin:
          jobs.append(order[1])
      self._send([(job, Failed(self.error)) for job in jobs])
      self._ready.set()

  def _compile(self):
    """Compiles the programs that decode, with and without likely tokens."""
    for top in (0, 1):
      request = Request('compile', self._prompt, top=top, sampling=Sampling(0.0, 1.0, 1))
      results = self.engine.put(self._slots, request)
      self.engine.advance(self._slots)
      self._slots.schedule.remove(results)
    self.engine.reset_work()

  def _obey(self) -> bool:
    """Carries out all orders; waits for one if there is nothing else to do. False: the end."""
    while True:
      is_idle = not self._running and not self._prompts
      try:
        order = self._orders.get(block=is_idle)
      except queue.Empty:
        return True
      if order is None:
        return False
      order[0](*order[1:])

  def _begin(self, job: Job):
    if job.prompt_top is None:
      self._sample(job)
    else:
      self._prompts.append(job)

  def _sample(self, job: Job):
    if job.is_sampled:
      results = self.engine.put(self._slots, job.request)
      self._running[id(job)] = job, _Running(results, [0] * job.request.n, [False] * job.request.n)

  def _end(self, job: Job):
    self._prompts = [other for other in self._prompts if other is not job]
    if id(job) in self._running:
      self._slots.schedule.remove(self._running.pop(id(job))[1].results)

  def _stop_sample(self, job: Job, number: int):
    if id(job) in self._running:
      self._slots.schedule.stop(self._running[id(job)][1].results[number])

  def _read_prompts(self):
    """Computes the log-probs of a few prompts, so that running samples do not wait long."""
    jobs, self._prompts = (self._prompts[:engines.PROMPT_ROWS], self._prompts[engines.PROMPT_ROWS:])
    if jobs:
      found = self.engine.prompt_logps([job.request.ids for job in jobs],
                                       max(job.prompt_top for job in jobs))
      self._send([(job, PromptLogps(logps, [dict(list(likely.items())[:job.prompt_top])
                                            for likely in top]))
                  for job, (logps, top) in zip(jobs, found, strict=True)])
      for job in jobs:
        self._sample(job)

  def _tell_all(self):
    """Sends the new tokens of all jobs to the event loop."""
    news = []
    for key, (job, state) in list(self._running.items()):
      for number, result in enumerate(state.results):
        new = slice(state.sent[number], len(result.ids))
        if new.start < new.stop or result.finish and not state.is_ended[number]:
          news.append((job, Piece(number, result.ids[new], result.token_logps[new],
                                  result.top[new], result.finish)))
          state.sent[number], state.is_ended[number] = new.stop, bool(result.finish)
      if all(state.is_ended):
        self._slots.schedule.remove(state.results)
        del self._running[key]
    self._send(news)

  def _send(self, news: list):
    if not news:
      return
    def deliver():
      for job, piece in news:
        job.tell(piece)
    with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits
      self._loop.call_soon_threadsafe(deliver)
