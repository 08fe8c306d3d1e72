"""Write the golden files anew: `python tests/golden/write.py FOLDER [keras | keras2 | flax | onnx]...`.

Each case is a file as the framework itself writes it, and an `.npz` of inputs and of the outputs that the framework
computed. Keras runs on jax, so nothing of torch is in its numbers. Weights are drawn large enough, and far enough from
their first values, that a layout read wrongly shows.

Written with Keras 3.15.1, jax 0.10.2, flax 0.12.8, orbax 0.12.8, onnx 1.23.2 and torch 2.13.0; the files of Keras 2
(`keras2_*.h5`) with tf_keras.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

Case = tuple[Any, Any]


def drawn(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return weights that are no initial ones: variances are small and differ, gains are not 1."""
    if "var" in name:
        return rng.uniform(0.002, 1.5, shape).astype("f4")
    if name in ("gamma", "scale"):
        return rng.uniform(0.5, 2.0, shape).astype("f4")
    fan = max(int(np.prod(shape[:-1])), 1) if len(shape) > 1 else 4
    return (rng.normal(size=shape) / np.sqrt(fan)).astype("f4")


def keras_cases(keras: Any) -> dict[str, Callable[[np.random.Generator], Case]]:
    """Return a model and its input for each case."""
    L = keras.layers

    def one(layer: Any, *shape: int) -> Callable[[np.random.Generator], Case]:
        return lambda rng: (keras.Sequential([keras.Input(shape), layer()]), rng.normal(size=(2, *shape)).astype("f4"))

    def chain(shape: tuple[int, ...], *layers: Callable[[], Any]) -> Callable[[np.random.Generator], Case]:
        return lambda rng: (
            keras.Sequential([keras.Input(shape), *(layer() for layer in layers)]),
            rng.normal(size=(2, *shape)).astype("f4"),
        )

    def attention(rng: np.random.Generator) -> Case:
        given = keras.Input((5, 8))
        return keras.Model(given, L.MultiHeadAttention(2, 4)(given, given)), rng.normal(size=(2, 5, 8)).astype("f4")

    def embedding(rng: np.random.Generator) -> Case:
        model = keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(11, 4)])
        return model, rng.integers(0, 11, (2, 6)).astype("i4")

    def residual(rng: np.random.Generator) -> Case:
        given = keras.Input((8, 8, 3))
        x = L.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(given)
        y = L.ReLU()(L.BatchNormalization(name="block_bn1")(x))
        y = L.Conv2D(6, 3, padding="same", name="block_conv1")(y)
        y = L.ReLU()(L.BatchNormalization(name="block_bn2")(y))
        y = L.Conv2D(6, 3, padding="same", name="block_conv2")(y)
        x = L.Add()([L.Conv2D(6, 1, name="block_shortcut")(x), y])
        x = L.GlobalAveragePooling2D()(x)
        return keras.Model(given, L.Dense(5, name="head")(x)), rng.normal(size=(2, 8, 8, 3)).astype("f4")

    def transformer(rng: np.random.Generator) -> Case:
        given = keras.Input((6,), dtype="int32")
        x = L.Embedding(11, 8, name="tokens")(given)
        y = L.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = L.LayerNormalization(epsilon=1e-6, name="norm1")(L.Add()([x, y]))
        y = L.Dense(16, activation="gelu", name="up")(x)
        y = L.Dense(8, name="down")(y)
        x = L.LayerNormalization(name="norm2")(L.Add()([x, y]))
        x = L.GlobalAveragePooling1D()(x)
        return keras.Model(given, L.Dense(3, name="head")(x)), rng.integers(0, 11, (2, 6)).astype("i4")

    def nested(rng: np.random.Generator) -> Case:
        base = keras.Sequential([keras.Input((6, 6, 2)), L.Conv2D(3, 3), L.BatchNormalization()], name="base")
        base.layers[0].trainable = False
        given = keras.Input((6, 6, 2))
        x = L.Dense(4, name="dense_out")(L.Flatten()(base(given)))
        return keras.Model(given, x), rng.normal(size=(2, 6, 6, 2)).astype("f4")

    cnn = chain(
        (9, 11, 2),
        lambda: L.Conv2D(4, 3, activation="relu", name="conv1"),
        lambda: L.BatchNormalization(name="bn1"),
        lambda: L.MaxPooling2D(),
        lambda: L.Conv2D(4, 2, activation="relu", name="conv2"),
        lambda: L.BatchNormalization(momentum=0.9, epsilon=0.01, name="bn2"),
        lambda: L.Flatten(),
        lambda: L.Dense(6, activation="relu", name="fc1"),
        lambda: L.Dense(5, name="fc2"),
    )
    return {
        "dense": one(lambda: L.Dense(4), 4),
        "conv1d": one(lambda: L.Conv1D(4, 3), 7, 4),
        "conv2d": one(lambda: L.Conv2D(3, 3), 6, 5, 3),
        "conv2d_groups": one(lambda: L.Conv2D(4, 3, groups=2), 6, 5, 4),
        "conv3d": one(lambda: L.Conv3D(2, 2), 4, 3, 4, 2),
        "conv2d_same": one(lambda: L.Conv2D(3, 3, strides=2, padding="same"), 8, 8, 2),
        "depthwise": one(lambda: L.DepthwiseConv2D(3, depth_multiplier=2), 6, 5, 3),
        "separable": one(lambda: L.SeparableConv2D(4, 3), 6, 5, 3),
        "conv2d_transpose": one(lambda: L.Conv2DTranspose(3, 3, strides=2), 4, 5, 3),
        "conv2d_transpose_same": one(lambda: L.Conv2DTranspose(3, 4, strides=2, padding="same"), 4, 5, 3),
        "conv2d_transpose_odd": one(lambda: L.Conv2DTranspose(2, 3, strides=2, padding="same"), 4, 5, 3),
        "batch_norm": one(lambda: L.BatchNormalization(), 5, 4, 3),
        "batch_norm_bare": one(lambda: L.BatchNormalization(scale=False, center=False), 4),
        "batch_norm_unscaled": one(lambda: L.BatchNormalization(scale=False), 4),
        "layer_norm": one(lambda: L.LayerNormalization(), 5, 4),
        "group_norm": one(lambda: L.GroupNormalization(2), 5, 4),
        "lstm": one(lambda: L.LSTM(4, return_sequences=True), 5, 4),
        "lstm_two": chain((5, 3), lambda: L.LSTM(4, return_sequences=True), lambda: L.LSTM(4, return_sequences=True)),
        "lstm_both": one(lambda: L.Bidirectional(L.LSTM(3, return_sequences=True)), 5, 4),
        "gru": one(lambda: L.GRU(4, return_sequences=True), 5, 4),
        "gru_before": one(lambda: L.GRU(4, reset_after=False, return_sequences=True), 5, 4),
        "rnn": one(lambda: L.SimpleRNN(4, return_sequences=True), 5, 4),
        "time_distributed": one(lambda: L.TimeDistributed(L.Dense(4)), 5, 4),
        "attention": attention,
        "embedding": embedding,
        "prelu": one(lambda: L.PReLU(shared_axes=[1, 2]), 4, 5, 3),
        "leaky_relu": chain((4,), lambda: L.Dense(4), lambda: L.LeakyReLU()),
        "flatten": chain((3, 4, 5), lambda: L.Flatten(), lambda: L.Dense(6)),
        "generator": chain(
            (5,),
            lambda: L.Dense(24),
            lambda: L.BatchNormalization(),
            lambda: L.Reshape((2, 3, 4)),
            lambda: L.Conv2DTranspose(3, 3, strides=2),
        ),
        "net_cnn": cnn,
        "net_lstm": chain((5, 4), lambda: L.LSTM(6, return_sequences=True), lambda: L.LSTM(4), lambda: L.Dense(3)),
        "net_gru": chain((5, 4), lambda: L.Bidirectional(L.GRU(4)), lambda: L.Dense(3)),
        "net_transformer": transformer,
        "net_residual": residual,
        "net_nested": nested,
    }


ALSO_WEIGHTS = ("dense", "batch_norm_unscaled", "net_cnn")
ALSO_LEGACY = ("gru", "attention", "net_nested")


def write_keras(folder: Path, only: Sequence[str] = ()) -> None:
    """Write `.keras` files, and of some cases `.weights.h5` and `.h5`; only the named cases if any is."""
    import keras

    for name, case in keras_cases(keras).items():
        if only and name not in only:
            continue
        keras.utils.clear_session()
        rng = np.random.default_rng(sum(map(ord, name)))
        model, x = case(rng)
        _draw_all(model, rng)
        model.save(folder / f"keras_{name}.keras")
        if name in ALSO_WEIGHTS:
            model.save_weights(folder / f"keras_{name}.weights.h5")
        if name in ALSO_LEGACY:
            model.save(folder / f"keras_{name}.h5")
        _keep(
            folder / f"keras_{name}.npz",
            x,
            model(x, training=False),
            _inner(keras, model, x) if name == "net_cnn" else {},
        )


def write_keras2(folder: Path) -> None:
    """Write `.h5` files of Keras 2, whole models and weights alone."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tf_keras

    cases = keras_cases(tf_keras)
    for name in ("separable", "lstm_both", "gru", "net_cnn", "net_nested"):
        tf_keras.backend.clear_session()
        rng = np.random.default_rng(sum(map(ord, name)))
        model, x = cases[name](rng)
        _draw_all(model, rng)
        model.save(folder / f"keras2_{name}.h5")
        if name == "gru":  # a file of weights alone tells no kinds
            model.save_weights(folder / f"keras2_{name}_weights.h5")
        _keep(folder / f"keras2_{name}.npz", x, model(x, training=False), {})


def _draw_all(model: Any, rng: np.random.Generator) -> None:
    for weight in model.weights:
        if "seed" not in weight.name:
            weight.assign(drawn(rng, tuple(weight.shape), weight.name.split("/")[-1].split(":")[0]))


def _inner(keras: Any, model: Any, x: np.ndarray) -> dict[str, Any]:
    """Return the outputs of the layers of a net, by their names."""
    layers = [layer for layer in model.layers if layer.weights]
    outputs = keras.Model(model.inputs, [layer.output for layer in layers])(x, training=False)
    return {layer.name: output for layer, output in zip(layers, outputs, strict=True)}


def _keep(path: Path, x: Any, y: Any, inner: dict[str, Any]) -> None:
    np.savez_compressed(
        path, x=x, y=np.asarray(y), **{f"at_{name}": np.asarray(value) for name, value in inner.items()}
    )


def write_flax(folder: Path) -> None:
    """Write `.msgpack` files of flax.linen and flax.nnx, one safetensors-like npz dump, and a folder of orbax."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from flax import nnx, serialization

    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x))
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.relu(nn.Conv(4, (2, 2), padding="VALID")(x))
            x = x.reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(6)(x))  # made in this order, so counted in this order
            return nn.Dense(3)(x)

    def block(make: Callable[[], Any], *shape: int) -> tuple[Any, tuple[int, ...]]:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return make()(x)

        return Block(), shape

    cases = {
        "dense": block(lambda: nn.Dense(4), 4),
        "conv": block(lambda: nn.Conv(3, (3, 3), padding="VALID"), 6, 5, 3),
        "conv_transpose": block(lambda: nn.ConvTranspose(3, (3, 3), (2, 2), padding="VALID"), 4, 5, 3),
        "batch_norm": block(lambda: nn.BatchNorm(use_running_average=True), 5, 4, 3),
        "layer_norm": block(lambda: nn.LayerNorm(), 5, 4),
        "group_norm": block(lambda: nn.GroupNorm(2), 5, 4),
        "lstm": block(lambda: nn.RNN(nn.LSTMCell(4)), 5, 4),
        "gru": block(lambda: nn.RNN(nn.GRUCell(4)), 5, 4),
        "rnn": block(lambda: nn.RNN(nn.SimpleCell(4)), 5, 4),
        "attention": block(lambda: nn.SelfAttention(2), 5, 8),
        "prelu": block(lambda: nn.PReLU(), 4),
        "net_cnn": (Cnn(), (7, 6, 2)),
    }
    for name, (module, shape) in cases.items():
        rng = np.random.default_rng(sum(map(ord, name)))
        x = rng.normal(size=(2, *shape)).astype("f4")
        tree = _drawn_tree(module.init(jax.random.key(0), jnp.asarray(x)), rng)
        (folder / f"flax_{name}.msgpack").write_bytes(serialization.to_bytes(tree))
        _keep(folder / f"flax_{name}.npz", x, module.apply(tree, jnp.asarray(x)), {})
        if name == "net_cnn":
            _write_orbax(folder / "flax_net_cnn.orbax", tree)
    embed = nn.Embed(11, 4)
    rng = np.random.default_rng(7)
    x = rng.integers(0, 11, (2, 6)).astype("i4")
    tree = _drawn_tree(embed.init(jax.random.key(0), jnp.asarray(x)), rng)
    (folder / "flax_embedding.msgpack").write_bytes(serialization.to_bytes(tree))
    _keep(folder / "flax_embedding.npz", x, embed.apply(tree, jnp.asarray(x)), {})
    _write_nnx(folder, nnx, serialization, jnp)


def _drawn_tree(tree: Any, rng: np.random.Generator, name: str = "") -> Any:
    if isinstance(tree, dict):
        return {key: _drawn_tree(value, rng, key) for key, value in tree.items()}
    return drawn(rng, np.shape(tree), name)


def _write_orbax(path: Path, tree: Any) -> None:
    import shutil

    import orbax.checkpoint as ocp

    shutil.rmtree(path, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
    (path / "commit_success.txt").unlink()  # it only names the folder on the machine that wrote it


def _write_nnx(folder: Path, nnx: Any, serialization: Any, jnp: Any) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.conv1 = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
            self.bn1 = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.fc = nnx.Sequential(nnx.Linear(48, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs))

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.bn1(self.conv1(x)))
            return self.fc(x.reshape(x.shape[0], -1))

    class Recurrent(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))
            self.gru = nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs))
            self.old = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))

        def __call__(self, x: Any) -> Any:
            return self.old(self.gru(self.lstm(x)))

    for name, kind, shape in (("nnx_cnn", Net, (5, 6, 2)), ("nnx_recurrent", Recurrent, (5, 4))):
        rng = np.random.default_rng(sum(map(ord, name)))
        x = rng.normal(size=(2, *shape)).astype("f4")
        model = kind(nnx.Rngs(0))
        state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
        tree = _drawn_tree(nnx.to_pure_dict(state), rng)
        nnx.replace_by_pure_dict(state, {key: _as_jax(value, jnp) for key, value in tree.items()})
        nnx.update(model, state)
        (folder / f"flax_{name}.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        _keep(folder / f"flax_{name}.npz", x, model(jnp.asarray(x)), {})


def _as_jax(tree: Any, jnp: Any) -> Any:
    return {key: _as_jax(value, jnp) for key, value in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)


def write_onnx(folder: Path) -> None:
    """Write `.onnx` files by both exporters of torch, and graphs with the forms that torch does not write."""
    import torch
    from torch import nn

    class Last(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0]

    cnn = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 5 * 4, 3),
    )
    cases = {
        "linear": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), (4,)),
        "conv_transpose": (nn.ConvTranspose2d(3, 3, 3, 2, 1, 1), (3, 4, 5)),
        "layer_norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (5, 4)),
        "prelu": (nn.Sequential(nn.Conv2d(2, 3, 1), nn.PReLU(3)), (2, 4, 4)),
        "lstm": (Last(nn.LSTM(4, 3, bidirectional=True, batch_first=True)), (5, 4)),
        "gru": (Last(nn.GRU(4, 4, batch_first=True)), (5, 4)),
        "net_cnn": (cnn, (2, 7, 6)),
    }
    for name, (model, shape) in cases.items():
        rng = np.random.default_rng(sum(map(ord, name)))
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(drawn(rng, tuple(tensor.shape), key.split(".")[-1])))
        model.eval()
        x = torch.from_numpy(rng.normal(size=(2, *shape)).astype("f4"))
        _keep(folder / f"onnx_{name}.npz", x.numpy(), model(x).detach().numpy(), {})
        torch.onnx.export(model, (x,), folder / f"onnx_{name}.onnx", dynamo=False)
        if name == "net_cnn":
            torch.onnx.export(model, (x,), folder / "onnx_net_cnn_dynamo.onnx", dynamo=True, external_data=False)
            training = torch.onnx.TrainingMode.PRESERVE
            fresh = model.train()
            fresh.eval()
            torch.onnx.export(
                fresh,
                (x,),
                folder / "onnx_net_cnn_whole.onnx",
                dynamo=False,
                training=training,
                do_constant_folding=False,
            )


WRITERS = {"keras": write_keras, "keras2": write_keras2, "flax": write_flax, "onnx": write_onnx}

if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[2:] or list(WRITERS):
        WRITERS[chosen](place)
