"""Plots of the report as SVG data URIs."""
import base64
from collections.abc import Sequence
import io

import matplotlib
from matplotlib import figure, ticker

_BLUE, _GREY = '#2a5d9c', '#999'
_FEW_POINTS = 30  # a curve with fewer points has markers


def curve(title: str, points: Sequence[tuple[float, float]], level: float | None) -> str:
  """A curve over steps from (step, value) points, with a dashed line at `level`."""
  fig, ax = _axes(title)
  style = '.-' if len(points) < _FEW_POINTS else '-'
  ax.plot(*zip(*points, strict=True), style, color=_BLUE, linewidth=1.4)
  if level is not None:
    ax.axhline(level, color=_GREY, linewidth=0.8, linestyle='--')
  ax.set_xlabel('step')
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  return _data_uri(fig)


def bars(title: str, values: dict[str, float], label_format: str = '%d',
         errors: Sequence[float] | None = None) -> str:
  """A bar chart of {name: value} with the value above each bar; `errors`: half error bars."""
  fig, ax = _axes(title)
  drawn = ax.bar(list(values), list(values.values()), yerr=errors, color=_BLUE, width=0.7,
                 capsize=3)
  ax.bar_label(drawn, fmt=label_format, fontsize=8, padding=2)
  ax.margins(y=0.15)
  return _data_uri(fig)


def _axes(title: str):
  fig = figure.Figure(figsize=(3.4, 2.3), layout='constrained')
  ax = fig.subplots()
  ax.set_title(title, fontsize=10)
  ax.tick_params(labelsize=8)
  ax.spines[['top', 'right']].set_visible(False)
  return fig, ax


def _data_uri(fig) -> str:
  file = io.BytesIO()
  # A fixed salt and no date: the same files give the same page.
  with matplotlib.rc_context({'svg.hashsalt': 'srlm_jax'}):
    fig.savefig(file, format='svg', metadata=dict(Date=None))
  return 'data:image/svg+xml;base64,' + base64.b64encode(file.getvalue()).decode()
