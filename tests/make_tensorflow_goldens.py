"""Writes goldens/tf_<name>/ with TensorFlow: small checkpoints under the names of the published ones, with the state of
optimizers for some of their variables. Run with TensorFlow installed (2.21 wrote those that are there):

    python tests/make_tensorflow_goldens.py

What is in them follows from their names by `tensorflow_values.value`, so that no second file is needed to check.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_values import FAMILIES, SCALARS, config, value, variables

GOLDENS = Path(__file__).parent / "goldens"
V2 = tf.raw_ops.SaveV2


def save(prefix, tensors, shards=1):
    written = [f"{prefix}_part{shard}" for shard in range(shards)]
    for shard, path in enumerate(written):
        part = list(tensors)[shard::shards]
        V2(prefix=path, tensor_names=part, shape_and_slices=[""] * len(part), tensors=[tensors[name] for name in part])
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=written, destination_prefix=str(prefix), delete_old_dirs=False)


def main():
    for family in FAMILIES:
        folder = GOLDENS / f"tf_{family}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shapes = variables(family)
        for name in list(shapes)[:2]:
            shapes |= {f"{name}/{slot}": shapes[name] for slot in ("adam_m", "adam_v", "lamb_m", "lamb_v")}
        tensors = {name: tf.constant(value(name, shape)) for name, shape in shapes.items()}
        tensors |= {name: tf.constant(scalar) for name, scalar in SCALARS.items()}
        save(folder / "model.ckpt", tensors, shards=2 if family == "bert" else 1)
        name, values = config(family)
        (folder / name).write_text(json.dumps(values, indent=1) + "\n")
    folder = GOLDENS / "tf_mixed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    numbers = np.arange(6).reshape(2, 3)
    tensors = {
        "half": tf.constant(numbers, tf.float16),
        "double": tf.constant(2.5, tf.float64),
        "bfloat": tf.cast(tf.constant(numbers), tf.bfloat16),
        "ints": tf.constant(numbers, tf.int32),
        "words": tf.constant(["a", "b"]),
        "slices": tf.constant(numbers, tf.float32),
    }
    slices = ["2 6 0,2:0,3" if name == "slices" else "" for name in tensors]
    V2(
        prefix=str(folder / "model.ckpt"),
        tensor_names=list(tensors),
        shape_and_slices=slices,
        tensors=list(tensors.values()),
    )


if __name__ == "__main__":
    main()
