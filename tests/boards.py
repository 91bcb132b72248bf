"""Reads the event files of TensorBoard."""
from collections import defaultdict

from tensorboardX.proto import event_pb2


def events(folder):
  """The events of a folder in the order of its files (the format of TFRecord)."""
  for path in sorted(folder.glob('events.*')):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      yield event_pb2.Event.FromString(data[12:12 + size])
      data = data[16 + size:]


def shown(folder) -> dict[str, dict]:
  """{tag: {step: value}} as TensorBoard shows it: a restart hides later steps written before."""
  found = defaultdict(dict)
  for event in events(folder):
    if event.session_log.status == event.session_log.START:
      for steps in found.values():
        for step in [step for step in steps if step >= event.step]:
          del steps[step]
    for value in event.summary.value:
      assert event.step not in found[value.tag], f'{value.tag} has two points at {event.step}'
      kind = value.WhichOneof('value')
      found[value.tag][event.step] = (
          value.tensor.string_val[0].decode() if kind == 'tensor' else getattr(value, kind))
  return {tag: steps for tag, steps in found.items() if steps}
