"""A Cloud Storage server for the tests: gcp-storage-emulator behind a proxy.

The proxy adds what the emulator (2026.7) lacks and clients rely on: preconditions on generations,
the generation of an object that is read, and the answer to the last part of a resumable upload when
a client, which has not received it, sends that part again. It can also make requests fail.

`python tests/buckets.py` starts a server and prints the environment in which programs use it.
"""
from collections.abc import Callable
import contextlib
import dataclasses
import http.client
import http.server
import json
import logging
import re
import sys
import threading
import time
import urllib.parse

BUCKET = 'runs'
HOP = ('connection', 'transfer-encoding', 'content-length', 'server', 'date', 'keep-alive')


@dataclasses.dataclass
class Fault:
  """Makes requests fail that `matches` selects by method, path and body, `times` times.

  kind:
    503, 429, ..   the status of the answer
    hang           no answer
    cut            the connection ends while the request is sent, which has no effect
    lost           the request has its effect, but the connection ends before the answer
    half           the connection ends within the answer
    a function     it is called, and then there is no answer
  """
  kind: int | str | Callable[[], None]
  times: int = 1
  matches: Callable[[str, str, bytes], bool] = lambda method, path, body: True
  happened: int = 0


class Server:
  """Serves the bucket gs://runs; `faults` may be changed while it runs."""

  def __init__(self):
    from gcp_storage_emulator import server as emulator
    logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
    for name in ('api', 'api.object', 'gcp-storage-emulator.server', 'api.bucket'):
      logging.getLogger(name).setLevel(logging.CRITICAL)
    self._emulator = emulator.create_server('localhost', 0, in_memory=True, default_bucket=BUCKET)
    self._emulator._api.daemon = True  # else Python waits for it at exit
    self._emulator.start()
    self._back = self._emulator._api._httpd.server_address[1]
    self._emulator._api._httpd.handle_error = lambda *_: None  # of closed connections
    self._lock = threading.Lock()
    self.faults, self.requests = [], []
    self._uploaded = {}  # answers to the last parts of resumable uploads
    server = self

    class Handler(_Handler):
      proxy = server
    self._proxy = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    self._proxy.daemon_threads = True
    self._proxy.handle_error = lambda *_: None
    threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
    self.url = f'http://localhost:{self._proxy.server_address[1]}'
    self.env = dict(STORAGE_EMULATOR_HOST=self.url, TENSORSTORE_GCS_HTTP_URL=self.url,
                    GOOGLE_CLOUD_PROJECT='test', NO_GCE_CHECK='true')

  def stop(self):
    self._proxy.shutdown()
    self._proxy.server_close()
    self._emulator.stop()

  @contextlib.contextmanager
  def failing(self, *faults: Fault):
    """Inside the block, requests fail."""
    self.faults.extend(faults)
    try:
      yield
    finally:
      for fault in faults:
        self.faults.remove(fault)

  def fault(self, method: str, path: str, body: bytes) -> Fault | None:
    """The fault of a request, which it counts."""
    with self._lock:
      for fault in self.faults:
        if fault.happened < fault.times and fault.matches(method, path, body):
          fault.happened += 1
          return fault
    return None

  def answer(self, method: str, path: str, headers: dict, body: bytes):
    """-> status, headers and body, after the preconditions hold."""
    url = urllib.parse.urlsplit(path)
    query = dict(urllib.parse.parse_qsl(url.query))
    with self._lock:  # the emulator answers one request at a time
      wanted, found = query.get('ifGenerationMatch'), None
      if (name := _object(url.path, query, body)) and (
          wanted is not None or query.get('alt') == 'media'):
        found = self._generation(name)
      if wanted is not None and wanted != found:
        return 412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
      status, found_headers, data = self._forward(method, path, headers, body)
      if upload := query.get('upload_id'):
        if status == 404 and upload in self._uploaded:
          return self._uploaded[upload]
        if status == 200:
          self._uploaded[upload] = status, found_headers, data
    if found and query.get('alt') == 'media':
      found_headers['x-goog-generation'] = found
    return status, found_headers, data

  def _generation(self, name: str) -> str:
    status, _, data = self._forward('GET', f'/storage/v1{name}', {}, b'')
    return json.loads(data)['generation'] if status == 200 else '0'

  def _forward(self, method, path, headers, body):
    connection = http.client.HTTPConnection('localhost', self._back)
    connection.request(method, path, body, headers)
    found = connection.getresponse()
    data = found.read()
    connection.close()
    return found.status, {k: v for k, v in found.getheaders() if k.lower() not in HOP}, data


def _object(path: str, query: dict, body: bytes) -> str | None:
  """/b/BUCKET/o/NAME, quoted, of a request that reads, writes or deletes an object."""
  if found := re.fullmatch(r'(?:/download)?/storage/v1(/b/[^/]+/o/[^/]+)', path):
    return found[1]
  if found := re.fullmatch(r'/upload/storage/v1(/b/[^/]+/o)', path):
    name = query.get('name')
    if name is None and (told := re.search(rb'\{.*?"name".*?\}', body)):
      name = json.loads(told[0])['name']
    return name and f'{found[1]}/{urllib.parse.quote(name, safe="")}'
  return None


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize, disable_nagle_algorithm = -1, True  # otherwise every answer takes 40 ms
  proxy: Server

  def handle_method(self):
    size = int(self.headers.get('Content-Length') or 0)
    body = self.rfile.read(size)
    self.proxy.requests.append((self.command, self.path))
    fault = self.proxy.fault(self.command, self.path, body)
    kind = fault.kind if fault else None
    if kind == 'hang':
      time.sleep(3600)
      return self._cut()  # a long run would otherwise have the effect an hour later
    if callable(kind):
      kind()
    if kind == 'cut' or callable(kind):
      return self._cut()
    if isinstance(kind, int):
      return self._reply(kind, {}, b'{"error": {"code": %d, "message": "injected"}}' % kind)
    headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
    status, headers, data = self.proxy.answer(self.command, self.path, headers, body)
    if kind == 'lost':
      return self._cut()
    self._reply(status, headers, data, len(data) // 2 if kind == 'half' else len(data))
    if kind == 'half':
      self._cut()

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_method

  def _reply(self, status: int, headers: dict, data: bytes, shown: int | None = None):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data[:shown])

  def _cut(self):
    self.close_connection = True

  def log_message(self, *args):
    pass


if __name__ == '__main__':
  server = Server()
  print(' '.join(f'{name}={value}' for name, value in server.env.items()), flush=True)
  sys.stdin.read()
