"""Charts of the report as inline SVG, which takes its colours from the page's style sheet."""
from collections.abc import Sequence
import dataclasses
import itertools
import math
from xml.etree import ElementTree

import markupsafe

_WIDTH, _HEIGHT = 340, 210    # of a chart with two axes, in units of about a CSS pixel
_MAP = 400, 340               # of a scatter plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 12, 8, 24  # margins around the plotted area
_ROW, _LABELS, _VALUES = 26, 114, 104  # of a chart of rows: height of a row, widths beside the bars
_NAMES = 72       # width of the names beside intervals
_FEW_POINTS = 30  # a line with fewer points has markers
SERIES = 6        # colours, as the classes s0, s1, .. of the style sheet


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawing with its text alternative. `legend`: (class, name) of each series."""
  title: str
  description: str
  svg: markupsafe.Markup
  legend: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Point:
  """A value at x, with its interval if there is one."""
  x: float
  y: float
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of horizontal bars. `values`: one per series; `text`: what is written behind them."""
  label: str
  values: Sequence[float]
  text: str


@dataclasses.dataclass(frozen=True)
class _Scale:
  """Maps the values from low to high to the coordinates from start to end."""
  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    share = (value - self.low) / (self.high - self.low)
    return round(self.start + share * (self.end - self.start), 2)


def lines(title: str, series: dict[str, Sequence[Point]], *, names: Sequence[str] = (),
          level: float | None = None, styles: dict[str, str] | None = None) -> Chart:
  """A line per series over x; a dashed rule at `level`; `names`: of x = 0, 1, .., if not numbers.

  `styles`: the class of each series; by default s0, s1, ..
  """
  points = [point for line in series.values() for point in line]
  values = [value for point in points for value in (point.y, point.low, point.high)
            if value is not None] + ([] if level is None else [level])
  y_ticks = ticks(min(values), max(values))
  x_ticks = ([(x, name) for x, name in enumerate(names)] if names else
             [(x, _short(x)) for x in ticks(*_range([point.x for point in points]))])
  svg = _drawing(_HEIGHT, f'{title}: {_describe(series, names)}')
  x = _Scale(*_padded([x for x, _ in x_ticks] if names else [point.x for point in points]),
             _LEFT, _WIDTH - _RIGHT)
  y = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
  _axes(svg, x, y, [tick for tick in x_ticks if x.low <= tick[0] <= x.high], y_ticks)
  if level is not None:
    _add(svg, 'line', 'level', x1=x.start, x2=x.end, y1=y(level), y2=y(level))
  styles = styles or {name: f's{i % SERIES}' for i, name in enumerate(series)}
  for name, line in series.items():
    _line(svg, styles[name], line, x, y)
  return _chart(title, svg, _legend(title, series, styles))


def bars(title: str, series: dict[str, dict[str, float]],
         styles: dict[str, str] | None = None) -> Chart:
  """Vertical bars of shares, {series: {name: share}}, side by side for each name."""
  names = list(dict.fromkeys(name for values in series.values() for name in values))
  shares = {key: {name: values.get(name, 0) for name in names} for key, values in series.items()}
  svg = _drawing(_HEIGHT, f'{title}: ' + '; '.join(
      f'{key} ' + ', '.join(f'{name}: {share:.1%}' for name, share in values.items())
      for key, values in shares.items()))
  y_ticks = ticks(0, max(share for values in shares.values() for share in values.values()))
  x = _Scale(-0.5, len(names) - 0.5, _LEFT, _WIDTH - _RIGHT)
  y = _Scale(0, y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
  _axes(svg, x, y, list(enumerate(names)), y_ticks, '{:.0%}')
  styles = styles or {key: f's{i % SERIES}' for i, key in enumerate(series)}
  width = 0.8 * (x(1) - x(0)) / len(shares)
  for i, (key, values) in enumerate(shares.items()):
    for at, share in enumerate(values.values()):
      left = x(at) + (i - len(shares) / 2) * width
      _add(svg, 'rect', styles[key], x=left, y=y(share), width=width - 1, height=y.start - y(share))
  return _chart(title, svg, _legend(title, series, styles))


def boxes(title: str, found: dict[str, tuple[float, float, float, float, float]],
          styles: dict[str, str]) -> Chart:
  """A row per name, from its quantiles 5, 25, 50, 75 and 95 %: a line, a box and its median."""
  x_ticks = ticks(0, max(high for *_, high in found.values()) or 1)
  end = _ROW * len(found) + 4
  svg = _drawing(end + 18, f'{title}, quantiles 5, 25, 50, 75 and 95 %: ' + '; '.join(
      f'{name} ' + ', '.join(f'{value:.4g}' for value in values)
      for name, values in found.items()))
  x = _Scale(0, x_ticks[-1], _LABELS, _WIDTH - _RIGHT - 12)
  for value in x_ticks:
    _add(svg, 'line', 'grid', x1=x(value), x2=x(value), y1=0, y2=end)
    _text(svg, _short(value), x(value), end + 12, 'middle')
  for i, (name, (low, quarter, median, three_quarters, high)) in enumerate(found.items()):
    top, middle = _ROW * i + 5, _ROW * i + 13
    _text(svg, name, _LABELS - 6, middle + 4, 'end', 'value')
    _add(svg, 'line', f'{styles[name]} whisker', x1=x(low), x2=x(high), y1=middle, y2=middle)
    _add(svg, 'rect', styles[name], x=x(quarter), y=top, width=x(three_quarters) - x(quarter),
         height=16)
    _add(svg, 'line', 'median', x1=x(median), x2=x(median), y1=top, y2=top + 16)
  return _chart(title, svg)


def rows(title: str, found: Sequence[Row], *, series: Sequence[str] = (),
         styles: Sequence[str] = ('s0',), whole: float | None = None) -> Chart:
  """Horizontal bars, stacked if a row has several values; the length of `whole` fills a row.

  A row without values has no bar. `series`: the names of the values. `whole` is by default the
  longest row.
  """
  whole = whole or max([sum(row.values) for row in found] + [1e-9])
  svg = _drawing(_ROW * len(found) + 4,
                 f'{title}: ' + '; '.join(f'{row.label} {row.text}' for row in found))
  x = _Scale(0, whole, _LABELS, _WIDTH - _VALUES)
  for i, row in enumerate(found):
    top, start = _ROW * i + 4, 0.0
    _text(svg, row.label, _LABELS - 6, top + 14, 'end', 'value')
    if row.values:
      _add(svg, 'rect', 'track', x=x.start, y=top, width=x.end - x.start, height=_ROW - 8)
    for value, style in zip(row.values, styles, strict=False):
      _add(svg, 'rect', style, x=x(start), y=top, width=round(x(start + value) - x(start), 2),
           height=_ROW - 8)
      start += value
    _text(svg, row.text, x.end + 6, top + 14, 'start', 'value')
  return _chart(title, svg, tuple(zip(styles, series, strict=False)))


def intervals(title: str, found: dict[str, Point], digits: int = 2, level: float = 0) -> Chart:
  """A row per value, with its interval and a rule at `level`; at 0 values are differences."""
  ends = [value for point in found.values() for value in (point.y, point.low, point.high)
          if value is not None]
  x_ticks = ticks(min([*ends, level]), max([*ends, level]))
  rows_end = _ROW * len(found) + 4
  form = f'{"" if level else "+"}.{digits}f'
  values = {name: _with_interval(point, form) for name, point in found.items()}
  svg = _drawing(rows_end + 18, f'{title}: ' + '; '.join(f'{k} {v}' for k, v in values.items()))
  x = _Scale(x_ticks[0], x_ticks[-1], _NAMES + 6, _WIDTH - 158)
  _add(svg, 'line', 'level', x1=x(level), x2=x(level), y1=0, y2=rows_end)
  for i, (name, point) in enumerate(found.items()):
    middle = _ROW * i + 4 + 9
    _text(svg, name, _NAMES - 6, middle + 4, 'end', 'value')
    if point.low is not None:
      _add(svg, 'line', 'whisker', x1=x(point.low), x2=x(point.high), y1=middle, y2=middle)
    _add(svg, 'circle', 's0', cx=x(point.y), cy=middle, r=4)
    _text(svg, values[name], x.end + 8, middle + 4, 'start', 'value')
  for value in (x_ticks[0], x_ticks[-1]):
    _text(svg, _short(value), x(value), rows_end + 12, 'middle')
  return _chart(title, svg)


def scatter(title: str, series: dict[str, Sequence[Point]], labels: tuple[str, str],
            styles: dict[str, str]) -> Chart:
  """Dots of each series, with the names of the two axes."""
  svg, x, y = _plane(series, labels, f'{title}: ' + ', '.join(
      f'{len(dots)} points of {name}' for name, dots in series.items()))
  for dots in itertools.zip_longest(*series.values()):  # in turns: no series covers the others
    for style, dot in zip(styles.values(), dots, strict=True):
      if dot:
        _add(svg, 'circle', f'{style} dot', cx=x(dot.x), cy=y(dot.y), r=2)
  return _chart(title, svg, _legend(title, series, styles))


def paths(title: str, series: dict[str, dict[str, Point]], labels: tuple[str, str]) -> Chart:
  """A line per series through its points {name: point}, with the names of the two axes."""
  svg, x, y = _plane({name: [*points.values()] for name, points in series.items()}, labels,
                     f'{title}: ' + '; '.join(f'{name} ' + ', '.join(
                         f'{at} {point.y:.4g} at {_short(point.x)}' for at, point in points.items())
                                              for name, points in series.items()))
  styles = {name: f's{i % SERIES}' for i, name in enumerate(series)}
  for name, points in series.items():
    _line(svg, styles[name], [*points.values()], x, y)
    for at, point in points.items():
      _text(svg, at, x(point.x) + 5, y(point.y) - 5, 'start')
  return _chart(title, svg, _legend(title, series, styles))


def _plane(series: dict[str, Sequence[Point]], labels: tuple[str, str], description: str):
  """A drawing with two axes of numbers and their names, and the scales of x and y."""
  points = [point for dots in series.values() for point in dots]
  svg = _drawing(_MAP[1], description, _MAP[0])
  x = _Scale(*_padded([point.x for point in points]), _LEFT, _MAP[0] - _RIGHT)
  y = _Scale(*_padded([value for point in points for value in (point.y, point.low, point.high)
                       if value is not None]), _MAP[1] - _BOTTOM - 16, _TOP + 16)
  x_ticks, y_ticks = ([value for value in ticks(scale.low, scale.high)
                       if scale.low <= value <= scale.high] for scale in (x, y))
  _axes(svg, x, y, [(value, _short(value)) for value in x_ticks], y_ticks)
  _text(svg, labels[0], (x.start + x.end) / 2, _MAP[1] - 6, 'middle')
  _text(svg, labels[1], 0, 10, 'start')
  return svg, x, y


def ticks(low: float, high: float) -> list[float]:
  """Three to seven round values, of which the first is at most `low`, and the last at least `high`.

  >>> ticks(0.52, 0.91), ticks(3, 3)
  ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [2.0, 2.5, 3.0, 3.5, 4.0])
  """
  if low == high:
    margin = abs(low) / 3 or 1
    low, high = low - margin, high + margin
  rough = (high - low) / 4
  power = 10.0 ** math.floor(math.log10(rough))
  step = power * next(size for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def _drawing(height: float, description: str, width: float = _WIDTH) -> ElementTree.Element:
  return ElementTree.Element('svg', {
      'viewBox': f'0 0 {width} {height}', 'role': 'img', 'aria-label': description})


def _chart(title: str, svg: ElementTree.Element, legend=()) -> Chart:
  return Chart(title, svg.get('aria-label'),
               markupsafe.Markup(ElementTree.tostring(svg, encoding='unicode')), legend)


def _legend(title: str, series: dict, styles: dict[str, str]) -> tuple[tuple[str, str], ...]:
  """(class, name) of each series, unless the only one is what the title says."""
  return () if [*series] == [title] else tuple((styles[name], name) for name in series)


def _add(svg, tag: str, style: str, **attributes):
  return ElementTree.SubElement(
      svg, tag, {'class': style, **{name: f'{value:g}' for name, value in attributes.items()}})


def _text(svg, words: str, x: float, y: float, anchor: str, style: str = 'tick'):
  element = _add(svg, 'text', style, x=x, y=y)
  element.set('text-anchor', anchor)
  element.text = words


def _axes(svg, x: _Scale, y: _Scale, x_ticks, y_ticks: Sequence[float], form: str = ''):
  """Horizontal grid lines with their values, and the names under the x axis."""
  for value in y_ticks:
    _add(svg, 'line', 'grid', x1=x.start, x2=x.end, y1=y(value), y2=y(value))
    _text(svg, form.format(value) if form else _short(value), x.start - 6, y(value) + 4, 'end')
  for value, name in x_ticks:
    _text(svg, name, x(value), y.start + 16, 'middle')


def _line(svg, style: str, points: Sequence[Point], x: _Scale, y: _Scale):
  path = ' '.join(f'{x(point.x):g},{y(point.y):g}' for point in points)
  _add(svg, 'polyline', f'{style} line').set('points', path)
  for point in points:
    if point.low is not None:
      _add(svg, 'line', f'{style} whisker', x1=x(point.x), x2=x(point.x), y1=y(point.low),
           y2=y(point.high))
    if len(points) < _FEW_POINTS:
      _add(svg, 'circle', style, cx=x(point.x), cy=y(point.y), r=2.6)


def _range(values: Sequence[float]) -> tuple[float, float]:
  return min(values), max(values)


def _padded(values: Sequence[float]) -> tuple[float, float]:
  """The range of the values with a margin of 5 %, and never empty."""
  low, high = _range(values)
  margin = 0.05 * (high - low) or 0.5
  return low - margin, high + margin


def _describe(series: dict[str, Sequence[Point]], names: Sequence[str]) -> str:
  """Every value of a chart with named x; else the first and the last value of each series."""
  found = []
  for name, line in series.items():
    shown = line if names else [line[0], *line[1:][-1:]]
    where = [names[round(point.x)] if names else f'step {_short(point.x)}' for point in shown]
    found.append(f'{name} ' + ', '.join(
        f'{point.y:.4g} at {at}' for point, at in zip(shown, where, strict=True)))
  return '; '.join(found)


def _with_interval(point: Point, form: str) -> str:
  if point.low is None:
    return f'{point.y:{form}}'
  return f'{point.y:{form}} [{point.low:{form}}, {point.high:{form}}]'


def _short(value: float) -> str:
  """A number for a tick or a bar.

  >>> _short(0.25), _short(12000), _short(1250000.0), _short(0.0001)
  ('0.25', '12k', '1.25M', '0.0001')
  """
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
    if abs(value) >= unit:
      return f'{value / (1e3 if name == "k" else unit):.4g}{name}'
  return f'{value:.4g}'
