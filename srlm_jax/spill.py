"""Lists of texts by key that may be larger than memory: a temporary database on a disk."""
from collections.abc import Iterator
import sqlite3

MEMORY = 16  # MB of the database that stay in memory


class Spill:
  """{key: texts}; the texts of a key keep the order in which they were added.

  It is in the folder for temporary files ($TMPDIR), and is deleted with this object.

  >>> found = Spill()
  >>> for key, text in (('b', '1'), ('a', '2'), ('b', '3')):
  ...   found.add(key, text)
  >>> found.get('b'), found.get('c'), 'a' in found, list(found.sorted()), list(found)
  (['1', '3'], [], True, ['2', '1', '3'], ['1', '2', '3'])
  """

  def __init__(self):
    self._rows = sqlite3.connect('', isolation_level=None)  # '': a temporary file
    for line in (f'pragma cache_size = -{1024 * MEMORY}', 'pragma journal_mode = off', 'begin',
                 'create table texts (key blob, text blob)', 'create index keys on texts (key)'):
      self._rows.execute(line)

  def add(self, key: str, text: str):
    self._rows.execute('insert into texts values (?, ?)', (_bytes(key), _bytes(text)))

  def get(self, key: str) -> list[str]:
    """The texts of a key; [] if there are none."""
    return list(self._texts('where key = ? order by rowid', _bytes(key)))

  def __contains__(self, key: str) -> bool:
    rows = self._rows.execute('select 1 from texts where key = ? limit 1', (_bytes(key),))
    return rows.fetchone() is not None

  def __iter__(self) -> Iterator[str]:
    """All texts, in the order in which they were added."""
    return self._texts('order by rowid')

  def sorted(self) -> Iterator[str]:
    """All texts, in the order of their keys."""
    return self._texts('order by key, rowid')

  def _texts(self, which: str, *values: bytes) -> Iterator[str]:
    for text, in self._rows.execute(f'select text from texts {which}', values):
      yield text.decode('utf-8', 'surrogatepass')


def _bytes(text: str) -> bytes:
  """UTF-8, which sorts as the text does."""
  return text.encode('utf-8', 'surrogatepass')
