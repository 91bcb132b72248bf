"""The arrays of a checkpoint, for a comparison of their bytes."""
import jax
import numpy as np
import orbax.checkpoint as ocp


def arrays(path) -> dict[tuple, np.ndarray]:
  """All arrays that Orbax saved in a folder, whatever devices they were on."""
  handler = ocp.PyTreeCheckpointHandler()
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                      handler.metadata(path).tree)
  with ocp.Checkpointer(handler) as reader:
    found = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
  return {key: np.asarray(x) for key, x in jax.tree_util.tree_leaves_with_path(found)}
