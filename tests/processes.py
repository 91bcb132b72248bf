"""Starts the processes of a run without a launcher, and reads how they end."""
import concurrent.futures
import multiprocessing
import os
import socket
import subprocess

from conftest import ROOT


def start(count, *command, env=None):
  """Starts a command as the processes of a run, without a launcher."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  run = dict(SRLM_HOSTS=str(count), SRLM_COORDINATOR=f'127.0.0.1:{port}')
  cpu = dict(JAX_PLATFORMS='cpu', XLA_FLAGS='')
  return [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE,
                           env=os.environ | cpu | run | dict(SRLM_HOST=str(i)) | (env or {}))
          for i in range(count)]


def ends(processes, seconds=300):
  """-> the exit code and the lines of stderr of each, without those of Gloo's connections."""
  found = []
  for process in processes:
    _, errors = process.communicate(timeout=seconds)
    found.append((process.returncode,
                  [line for line in errors.splitlines() if '[Gloo]' not in line]))
  return found


def lost(victim, count=2):
  return [f'error: host {victim} of {count} ({socket.gethostname()}) was lost; the same command '
          f'continues from what is saved']


def apart(function, *args):
  """Calls a function in a small process of its own.

  Linux counts the memory of a parent in the peak of its child, which shares it until it begins.
  """
  with concurrent.futures.ProcessPoolExecutor(
      1, mp_context=multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *args).result()
