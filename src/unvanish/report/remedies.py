"""What each treatment is, in words a user can act on."""

from __future__ import annotations

REMEDIES: dict[str, str] = {
    "xavier-init": "initialise with torch.nn.init.xavier_uniform_, biases 0 (sigmoid, tanh)",
    "he-init": "initialise with torch.nn.init.kaiming_normal_, biases 0 (ReLU and its kin)",
    "lecun-init": "initialise with variance 1/fan_in, biases 0 (SELU)",
    "orthogonal-init": "initialise with torch.nn.init.orthogonal_ (recurrent and very deep nets)",
    "lsuv-init": "scale each layer's weights until its output has variance 1 on a batch",
    "relu": "use ReLU between the layers",
    "leaky-relu": "use LeakyReLU: its units cannot die",
    "elu": "use ELU between the layers",
    "selu": "use SELU with lecun-init between the layers",
    "gelu": "use GELU between the layers",
    "silu": "use SiLU between the layers",
    "mish": "use Mish between the layers",
    "tanh": "use Tanh: centred at 0, steeper than a sigmoid",
    "batch-norm": "put a batch norm between each layer and its activation",
    "layer-norm": "put a layer norm between each layer and its activation",
    "precise-bn": "compute the batch-norm statistics over the whole training set before testing",
    "fold-bn": "fold the batch norm into the layer before it",
    "skip-connections": "add the input of a block to its output",
    "clip-norm": "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before the step",
    "clip-value": "torch.nn.utils.clip_grad_value_(model.parameters(), 1.0) before the step",
    "adaptive-clip": "clip each layer's gradient relative to its weights",
    "normalise-layers": "normalise each layer's gradient before the step",
    "lower-lr": "divide the learning rate by 10",
    "raise-lr": "multiply the learning rate by 10",
    "warm-up": "raise the learning rate from near 0 over the first steps",
    "layerwise-rates": "lower the learning rate from layer to layer, from the output to the input",
    "weight-decay": "AdamW or SGD with weight_decay, none on biases and norms",
    "dropout": "nn.Dropout after the larger layers",
    "early-stopping": "stop when the validation loss rises, and keep the best weights",
    "limit-units": "build the hidden layers narrower",
    "augment-rotate": "turn each training image by a few degrees",
    "augment-noise": "add a little noise to each training image",
    "augment-smooth": "smooth some of the training images",
    "augment-mirror": "swap left and right in half of the training images",
    "augment-rotate-crop": "turn each training image by a few degrees and crop it",
    "standardise-inputs": "x = (x - mean) / std for each feature, from the training set",
    "standardise-targets": "y = (y - mean) / std from the training set; undo it on the predictions",
    "safe-math": "keep log, sqrt, quotients and exp of the loss off 0 and infinity",
    "descend": "negate the loss, or take maximize=True from the optimizer",
    "zero-grad": "call optimizer.zero_grad() before every backward()",
    "unfreeze": "set requires_grad = True on the layer's parameters",
    "add-to-optimizer": "pass the layer's parameters to the optimizer",
    "logits-loss": "hand raw outputs to the loss: no softmax, sigmoid or tanh at the end",
    "match-target-shape": "give prediction and target one shape, e.g. target.view_as(prediction)",
    "greedy-pretraining": "train the layers one after the other first",
    "transfer": "start from the weights of a trained network",
}


def in_words(treatment: str) -> str:
    """Return a treatment's id and what it means.

    Example:
        >>> in_words("clip-norm=1.0")
        'clip-norm=1.0: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before the step'
        >>> in_words("of-your-own")
        'of-your-own'
    """
    words = REMEDIES.get(treatment.split("=")[0], "")
    return f"{treatment}: {words}" if words else treatment
